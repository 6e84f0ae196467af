"""Implements ``m1 export``, which writes a checkpoint as a folder that other programs load."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from m1_stages.config.load import load_config
from m1_stages.errors import CheckpointError
from m1_stages.run_dir import EXPORT_PREFIX
from m1cli.console import console

TOLERANCE = 1e-4
"""Largest fp32 logit difference between the trained model and transformers that counts as equal."""


def export_command(
    path: Path,
    overrides: list[str],
    stage: str | None,
    out: Path | None,
    *,
    verify: bool,
    prompts: Sequence[str],
    overwrite: bool,
    checkpoint: Path | None = None,
) -> None:
    """Export a checkpoint, then compare it and generate from it when asked.

    Args:
        stage: stage whose final checkpoint is exported; None takes the newest final one.
        out: folder to write; None takes ``RUN_DIR/export-STAGE``.
        verify: compare transformers' logits with the trained model's.
        prompts: texts that transformers continues from the export.
        overwrite: replace an existing folder.
        checkpoint: a checkpoint directory in place of a stage's final one.

    Raises:
        M1Error: what ``choose_checkpoint``, ``Export`` and ``generate`` raise.
    """
    from m1_stages.hf.verify import generate
    from m1_stages.jobs.export import Export, choose_checkpoint

    resolved = load_config(path, overrides)
    committed = choose_checkpoint(resolved, stage=stage, checkpoint=checkpoint)
    meta = committed.meta
    console.print(
        f"exporting [bold]{committed.path.name}[/] (stage {meta.stage}, {meta.extra['tokens_seen']:,} tokens trained, "
        f"decay {meta.decay['policy']})",
        highlight=False,
    )
    job = Export(resolved, committed)
    if job.configuration_changed:
        console.print(
            "[yellow]note[/] the configuration changed since this checkpoint; the context length is taken from it"
        )
    target = out or resolved.run_dir / f"{EXPORT_PREFIX}{meta.stage}"
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\..*")  # about Transformer Engine and Apex
            seen = job.compare(target)
        console.print(
            "verified: transformers' logits differ from the trained model's by at most "
            f"[bold]{seen.max_difference:.2g}[/] over {seen.positions} positions "
            f"(fp32; largest logit {seen.largest_logit:.3g})",
            highlight=False,
        )
        if seen.max_difference > TOLERANCE:
            raise CheckpointError(
                f"the export does not compute what was trained: logits differ by {seen.max_difference:.2g}",
                where=str(target),
                fix="do not use it, and report this with the configuration",
            )
    if prompts:
        for prompt, text in zip(prompts, generate(target, prompts), strict=True):
            console.print(f"[dim]{escape(prompt)}[/]{escape(text)}", highlight=False, soft_wrap=True)
