"""The command ``m1 prepare-data``: it shows progress while it runs, and an account of every record at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from m1_data.prepare.run import prepare
from m1_data.storage.manifest import Manifest
from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.curriculum import stage_mixes
from m1cli.console import console


def prepare_command(path: Path, overrides: list[str]) -> None:
    """Load the configuration at ``path`` and prepare its sources."""
    run_prepare(load_config(path, overrides))


def run_prepare(resolved: Resolved) -> Manifest:
    """Prepare the sources, print progress and the closing account, and return the manifest."""
    config = resolved.config
    began = time.perf_counter()
    with _Bars(len(config.data.sources)) as bars:
        manifest, did = prepare(
            config.data,
            config.tokenizer,
            stage_mixes(resolved),
            base_dir=resolved.base_dir,
            length_scale=config.curriculum.length_scale,
            progress=bars.update,
            notice=lambda sentence: console.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True),
        )
    out = resolved.path(config.data.out)
    if not did:
        console.print(f"{escape(str(out))} is up to date: same sources, same settings", soft_wrap=True)
    _account(manifest)
    seconds = time.perf_counter() - began
    console.print(f"[green]{escape(str(out))}[/]" + (f" in {seconds:.1f} s" if did else ""), soft_wrap=True)
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


def _account(manifest: Manifest) -> None:
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
            rejected,
        )
    console.print(table)
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
    for stage, mix in manifest.mixes.items():
        if not mix["possible"]:
            console.print(
                f"[yellow]stage {stage} cannot run on this data:[/] {escape(mix['reasons'][0])}", soft_wrap=True
            )
            continue
        reached, wanted = mix["core"]["reached"], mix["core"]["wanted"]
        colour = "green" if reached >= wanted - 0.005 else "yellow"
        console.print(f"  stage {stage}: [{colour}]{reached:.1%}[/] of the wanted {wanted:.0%}", soft_wrap=True)
        for reason in mix["reasons"]:
            console.print(f"    [dim]{escape(reason)}[/]", soft_wrap=True)
