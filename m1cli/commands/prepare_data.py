"""The command ``m1 prepare-data``: it shows progress while it runs, and an account of every record at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from m1_data.errors import shown
from m1_data.prepare.run import prepare
from m1_data.sampling.mix_report import TOLERANCE
from m1_data.sampling.stage_draw import document_lengths
from m1_data.storage.manifest import Manifest, SourceEntry
from m1_data.storage.source_files import describe_left_out
from m1_data.storage.store import open_store
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.load import load_config
from m1_stages.stage_data import explain, impossible_stages, stage_mixes
from m1cli.console import console


def prepare_command(path: Path, overrides: list[str]) -> None:
    """Load the configuration at ``path`` and prepare its sources."""
    run_prepare(load_config(path, overrides))


def run_prepare(resolved: Resolved) -> Manifest:
    """Prepare the sources, print progress and the closing account, and return the manifest."""
    config = resolved.config
    out = resolved.path(config.data.out)
    began = time.perf_counter()
    with _Bars(len(config.data.sources)) as bars:
        manifest, did = prepare(
            config.data,
            config.tokenizer,
            stage_mixes(resolved),
            base_dir=resolved.base_dir,
            length_scale=config.curriculum.length_scale,
            seed=config.run.seed,
            progress=bars.update,
            notice=lambda sentence: console.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True),
        )
    if not did:
        console.print(
            f"{escape(shown(out))} is up to date: same sources, same settings, every byte as written", soft_wrap=True
        )
    by_pattern = {source.name for source in config.data.sources if source.format in ("files", "packages")}
    _account(manifest, by_pattern)
    seconds = time.perf_counter() - began
    console.print(f"[green]{escape(shown(out))}[/]" + (f" in {seconds:.1f} s" if did else ""), soft_wrap=True)
    _stages(resolved, manifest)
    return manifest


class _Bars:
    """Shows one line for the source at work; finished sources move the bar."""

    def __init__(self, sources: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("prepare", total=sources, detail="")
        self._seen: list[str] = []
        self._rate = (0.0, 0)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, phase: str, source: str, documents: int, size: int) -> None:
        key = f"{phase} {source}"
        if key not in self._seen:
            self._seen.append(key)
            self._rate = (time.perf_counter(), size)
            if not console.is_terminal and phase != "done":
                console.print(f"{phase} {source}")
        since, first = self._rate
        speed = (size - first) / 1e6 / max(time.perf_counter() - since, 1e-6)
        words = {"train": "training the tokenizer on", "encode": "encoding", "generate": "generating",
                 "reuse": "already done:", "done": "done"}  # fmt: skip
        self._progress.update(
            self._task,
            description=f"{words[phase]} {source}",
            completed=sum(1 for k in self._seen if k.startswith(("encode", "generate", "reuse")))
            - (phase in ("encode", "generate")),
            detail=f"{documents:,} documents, {size / 1e6:,.1f} MB"
            + (f", {speed:.0f} MB/s" if phase == "encode" else ""),
        )


def _account(manifest: Manifest, by_pattern: set[str]) -> None:
    """Print the account. Sources in ``by_pattern`` name the files they want, so that others are left out is no news."""
    table = Table(title="sources", title_justify="left")
    for name in ("source", "domain", "documents", "tokens", "longest", "excluded"):
        table.add_column(name, justify="left" if name in ("source", "domain", "excluded") else "right")
    for source in manifest.sources:
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in source.rejected.items())
        table.add_row(
            source.name,
            source.domain,
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.longest_tokens:,}",
            escape(rejected),
        )
    console.print(table)
    for source in manifest.sources:
        _what_is_missing(source, "dim" if source.name in by_pattern else "bold yellow")
    lengths = ", ".join(f"{name} {count:,}" for name, count in manifest.tokens_by_bucket.items() if count)
    console.print(f"tokens by document length: {lengths}", soft_wrap=True)
    held_out = sum(source.held_out for source in manifest.sources)
    console.print(f"held out from training: {held_out:,} documents" + ("" if held_out else " (no loss by position)"))
    verified = sum(source.verified_ids for source in manifest.sources)
    console.print(
        f"vocabulary {manifest.vocab_size:,}, encoder {manifest.engine}"
        + (f" ({verified:,} ids proved equal to tokenizers)" if verified else "")
    )
    console.print(f"STEM, code, book and reasoning: {manifest.core_share:.1%} of all tokens at hand")


def _stages(resolved: Resolved, manifest: Manifest) -> None:
    """Show what each stage draws; the last line names the stages that this data cannot feed, and what to do."""
    lengths = document_lengths(open_store(resolved.path(resolved.config.data.out)))
    refused = impossible_stages(resolved, STAGE_NAMES, lengths)
    for stage in STAGE_NAMES:
        if stage in refused:
            console.print(f"  [bold red]cannot run:[/] {escape(refused[stage].what)}", soft_wrap=True)
            continue
        mix = manifest.mixes[stage]
        reached, wanted = mix["core"]["reached"], mix["core"]["wanted"]
        colour = "green" if abs(reached - wanted) <= TOLERANCE else "yellow"
        most = max((cell["epochs"] for cell in mix["epochs"]), default=0.0)
        console.print(
            f"  stage {stage}: STEM, code, book and reasoning [{colour}]{reached:.1%}[/] of the wanted {wanted:.0%}, "
            f"at most {most:.1f} passes over a part",
            soft_wrap=True,
        )
        for reason in mix["reasons"]:
            console.print(f"    [dim]{escape(reason)}[/]", soft_wrap=True)
    if refused:
        error = explain(resolved, STAGE_NAMES, lengths, refused)
        console.print(f"[bold red]m1 pretrain will refuse:[/] {escape(error.what)}", soft_wrap=True)
        console.print(f"  {escape(error.where)}\n  {escape(error.fix)}", soft_wrap=True)


def _what_is_missing(source: SourceEntry, left_out_style: str) -> None:
    """Print a line for each reason why text of a source is not there, with the first place."""
    for reason, place in source.first_places.items():
        count = source.rejected[reason]
        text = f"{source.name}: {count:,} of {source.records:,} records are lost: {reason}, first at {place}"
        console.print(f"[bold yellow]{escape(text)}[/]", soft_wrap=True)
    if source.left_out:
        text = f"{source.name}: not read from its folders: {describe_left_out(source.left_out)}"
        console.print(f"[{left_out_style}]{escape(text)}[/]", soft_wrap=True)
    if source.noted:
        noted = ", ".join(f"{count:,} {kind}" for kind, count in source.noted.items())
        console.print(f"[dim]{escape(f'{source.name}: read all the same: {noted}')}[/]", soft_wrap=True)
