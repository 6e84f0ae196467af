"""Implements ``m1 export``, which writes a checkpoint as a folder that other programs load, and verifies such a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError
from m1_stages.run_dir import EXPORT_PREFIX
from m1cli.console import console
from m1cli.library_notes import hide_library_notes

if TYPE_CHECKING:
    from m1_stages.checkpoint import Committed
    from m1_stages.jobs.export import Export


def export_command(
    path: Path,
    overrides: list[str],
    stage: str | None,
    out: Path | None,
    *,
    verify: bool,
    verify_only: Path | None,
    prompts: Sequence[str],
    overwrite: bool,
    checkpoint: Path | None = None,
) -> None:
    """Export a checkpoint, then verify the export and generate from it when asked; or verify an existing one.

    Args:
        stage: stage whose final checkpoint is exported; None takes the newest final one.
        out: folder to write; None takes ``RUN_DIR/export-STAGE``.
        verify: read everything back and compare it with the checkpoint, then compare transformers' logits.
        verify_only: an existing export to verify; nothing is written.
        prompts: texts that transformers continues from the export.
        overwrite: replace an existing folder.
        checkpoint: a checkpoint directory in place of a stage's final one.

    Raises:
        ConfigError: ``verify_only`` together with an option that writes, or with a folder that is not there.
        M1Error: what ``choose_checkpoint``, ``checkpoint_of``, ``Export`` and ``generate`` raise.
    """
    if verify_only is not None:
        if out is not None or overwrite:
            raise ConfigError("--verify-only writes nothing", fix="leave out --out and --overwrite")
        if not verify_only.is_dir():
            raise ConfigError(
                "there is no such folder", where=str(verify_only), fix="name a folder that m1 export wrote"
            )
    resolved = load_config(path, overrides)
    if verify_only is None:
        target = _write(resolved, stage, out, overwrite=overwrite, checkpoint=checkpoint, verify=verify)
    else:
        target = verify_only
        _verify_existing(resolved, target, stage, checkpoint)
    if prompts:
        from m1_stages.hf.verify import generate

        for prompt, text in zip(prompts, generate(target, prompts), strict=True):
            console.print(f"[dim]{escape(prompt)}[/]{escape(text)}", highlight=False, soft_wrap=True)


def _write(
    resolved: Resolved, stage: str | None, out: Path | None, *, overwrite: bool, checkpoint: Path | None, verify: bool
) -> Path:
    from m1_stages.jobs.export import Export, choose_checkpoint

    committed = choose_checkpoint(resolved, stage=stage, checkpoint=checkpoint)
    _announce("exporting", committed)
    job = Export(resolved, committed)
    _show_notes(job)
    target = out or resolved.run_dir / f"{EXPORT_PREFIX}{committed.meta.stage}"
    report = job.write(target, overwrite=overwrite)
    console.print(
        f"wrote {report.tensors:,} tensors, {report.parameters:,} parameters, {report.num_bytes / 2**20:,.1f} MiB "
        f"in {len(report.files)} file{'s' if len(report.files) > 1 else ''}",
        highlight=False,
    )
    console.print(escape(f"  {report.path}"), highlight=False, soft_wrap=True)
    for text in report.notes:
        console.print(f"  - {escape(text)}", highlight=False)
    if verify:
        _verify(job, target)
    return target


def _verify_existing(resolved: Resolved, target: Path, stage: str | None, checkpoint: Path | None) -> None:
    from m1_stages.jobs.export import Export, checkpoint_of, stored_dtype

    committed = checkpoint_of(resolved, target, stage=stage, checkpoint=checkpoint)
    _announce(f"comparing {escape(str(target))} with", committed)
    job = Export(resolved, committed, stored_dtype(target))
    _show_notes(job)
    _verify(job, target)


def _announce(doing: str, committed: Committed) -> None:
    meta = committed.meta
    console.print(
        f"{doing} [bold]{committed.path.name}[/] (stage {meta.stage}, {meta.extra['tokens_seen']:,} tokens trained, "
        f"decay {meta.decay['policy']})",
        highlight=False,
    )


def _show_notes(job: Export) -> None:
    for text in job.notes:
        console.print(f"[yellow]note[/] {escape(text)}", highlight=False)


def _verify(job: Export, target: Path) -> None:
    hide_library_notes()
    seen = job.verify(target)
    console.print(
        f"verified: all {seen.tensors:,} tensors read back equal the checkpoint's bit by bit, configuration and tokenizer files "
        f"too; {seen.sentences} sentences give the same tokens",
        highlight=False,
    )
    console.print(
        "verified: transformers' logits differ from the trained model's by at most "
        f"[bold]{seen.max_difference:.2g}[/] over {seen.positions} positions "
        f"(fp32; largest logit {seen.largest_logit:.3g})",
        highlight=False,
    )
