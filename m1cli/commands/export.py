"""Implements ``m1 export``, which writes a checkpoint as a folder that other programs load, and verifies such a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError
from m1_stages.packages import require_packages
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
    target: str | None = None,
    device: str = "cpu",
    adapter: bool = False,
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
        target: who reads the export; None takes ``export.target``, or what an existing export is.
        device: ``cpu`` or ``cuda``, where a verification computes.
        adapter: write the adapters of a fine-tuning alone.

    Raises:
        EnvironmentProblem: a package that loads the export is not installed; nothing was written.
        ConfigError: ``verify_only`` together with an option that writes, or with a folder that is not there; a prompt for an
            export that transformers does not load.
        M1Error: what ``choose_checkpoint``, ``checkpoint_of``, ``Export`` and ``generate`` raise.
    """
    if adapter and (verify or verify_only is not None or prompts):
        raise ConfigError(
            "--adapter writes adapters without the weights they belong to, and there is nothing to compute with",
            fix="leave out --verify, --verify-only and --prompt, or --adapter: the export with merged adapters can be verified",
        )
    if verify_only is not None:
        if out is not None or overwrite or target is not None:
            raise ConfigError("--verify-only writes nothing", fix="leave out --out, --overwrite and --target")
        if not verify_only.is_dir():
            raise ConfigError(
                "there is no such folder", where=str(verify_only), fix="name a folder that m1 export wrote"
            )
    resolved = load_config(path, overrides + [f"export.target={target}"] * (target is not None))
    if prompts and verify_only is None and resolved.config.export.target != "hf":
        raise ConfigError(
            f"--prompt generates with transformers, which does not load the target {resolved.config.export.target}",
            fix="leave out --prompt, or export with --target hf",
        )
    if prompts:
        require_packages("transformers", for_what="--prompt", extra="hf")
    if verify_only is None:
        folder = _write(
            resolved,
            stage,
            out,
            overwrite=overwrite,
            checkpoint=checkpoint,
            device=device if verify else None,
            adapter=adapter,
        )
    else:
        folder = verify_only
        _verify_existing(resolved, folder, stage, checkpoint, device)
    if prompts:
        from m1_stages.hf.verification.transformers_loading import generate

        for prompt, text in zip(prompts, generate(folder, prompts), strict=True):
            console.print(f"[dim]{escape(prompt)}[/]{escape(text)}", highlight=False, soft_wrap=True)


def _write(
    resolved: Resolved,
    stage: str | None,
    out: Path | None,
    *,
    overwrite: bool,
    checkpoint: Path | None,
    device: str | None,
    adapter: bool = False,
) -> Path:
    """Write an export, and verify it on ``device`` unless that is None."""
    from m1_stages.jobs.export import Export, choose_checkpoint
    from m1_stages.jobs.export_verification import require_loader

    committed = choose_checkpoint(resolved, stage=stage, checkpoint=checkpoint)
    _announce("exporting", committed)
    job = Export(resolved, committed)
    _show_notes(job)
    kind = job.contents.target
    if device is not None:
        require_loader(kind)
    suffix = "-adapter" if adapter else "" if kind == "hf" else f"-{kind}"
    folder = out or resolved.run_dir / f"{EXPORT_PREFIX}{committed.meta.stage}{suffix}"
    report = (job.write_adapter if adapter else job.write)(folder, overwrite=overwrite)
    console.print(
        f"wrote {report.tensors:,} tensors, {report.parameters:,} parameters, {report.num_bytes / 2**20:,.1f} MiB "
        f"in {len(report.files)} file{'s' if len(report.files) > 1 else ''}",
        highlight=False,
    )
    console.print(escape(f"  {report.path}"), highlight=False, soft_wrap=True)
    for text in report.notes:
        console.print(f"  - {escape(text)}", highlight=False)
    if device is not None:
        _verify(job, folder, device)
    return folder


def _verify_existing(resolved: Resolved, folder: Path, stage: str | None, checkpoint: Path | None, device: str) -> None:
    from m1_stages.hf.targets import target_of
    from m1_stages.jobs.export import Export, checkpoint_of, stored_architecture, stored_dtype

    committed = checkpoint_of(resolved, folder, stage=stage, checkpoint=checkpoint)
    target = target_of(folder)
    _announce(f"comparing {escape(str(folder))} (target {target}) with", committed)
    job = Export(
        resolved,
        committed,
        target=target,
        dtype=stored_dtype(folder, target),
        architecture=stored_architecture(folder) if target == "text01" else None,
    )
    _show_notes(job)
    _verify(job, folder, device)


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


def _verify(job: Export, folder: Path, device: str) -> None:
    from m1_stages.hf.verification.comparison import describe
    from m1_stages.jobs.export_verification import verify_export

    hide_library_notes()
    seen = verify_export(job, folder, device)
    found = seen.difference
    console.print(
        f"verified: all {seen.tensors:,} tensors read back equal the checkpoint's bit by bit, every other byte of the folder is "
        f"what was written; {seen.sentences} sentences give the same tokens",
        highlight=False,
    )
    console.print(
        f"verified: logits of {seen.loader} differ from the trained model's by at most [bold]{found.largest:.2g}[/] over "
        f"{found.positions - found.rerouted:,} of {found.positions:,} positions (text {found.text + 1}, position "
        f"{found.position}, token {found.token}; {seen.computed}; largest logit {found.largest_logit:.3g})",
        highlight=False,
    )
    if seen.epsilon_effect is not None:
        console.print(
            f"  both with the epsilon of {seen.loader}; its other epsilon alone changes a logit of the trained model by up to "
            f"{seen.epsilon_effect:.2g}",
            highlight=False,
        )
    if found.near_ties:
        console.print(
            f"  {len(found.near_ties)} near-ties of a router, the closest: {describe(found.near_ties)}; {found.rerouted} "
            "positions differ after one, which is no error",
            highlight=False,
        )
