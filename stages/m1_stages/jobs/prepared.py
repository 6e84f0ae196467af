"""Opens the prepared data for a job: verified, and made with what the configuration says; and its chat template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from m1_data.chat.encoder import SHIPPED_TEMPLATE
from m1_data.prepare.inputs import describe_inputs, refuse_changed_inputs
from m1_data.storage.manifest import Manifest, load_manifest
from m1_data.storage.store import PreparedData, open_prepared, verify_tokenizer
from m1_stages.config import Resolved
from m1_stages.stage_data import stage_mixes


def open_for_training(resolved: Resolved) -> tuple[PreparedData, list[str]]:
    """Open the configured data, and return it with what is worth saying about it.

    Raises:
        DataError: no prepared data, damaged data, or data that was made with other keys or another tokenizer.
    """
    data_dir, config = resolved.path(resolved.config.data.out), resolved.config
    manifest = load_manifest(data_dir)
    notes: list[str] = []
    if int(os.environ.get("RANK", "0")) == 0:  # one process looks at the raw text's folders, not a thousand
        present = describe_inputs(
            config.data,
            config.tokenizer,
            stage_mixes(resolved),
            resolved.base_dir,
            config.curriculum.length_scale,
            config.run.seed,
            missing_files=True,
        )
        notes = refuse_changed_inputs(manifest, present, resolved.origins)
    return open_prepared(data_dir), notes


def open_tokenizer(resolved: Resolved) -> Manifest:
    """Return the manifest of the configured data, whose tokenizer's files are what was written.

    Raises:
        DataError: no prepared data, or a damaged manifest or tokenizer.
    """
    data_dir = resolved.path(resolved.config.data.out)
    manifest = load_manifest(data_dir)
    verify_tokenizer(data_dir, manifest)
    return manifest


def chat_template(resolved: Resolved) -> Path | None:
    """Return the configured chat template, ``m1`` for the shipped one; None for the tokenizer's own, if it has one."""
    name = resolved.config.sft.chat_template
    if name == "m1":
        return SHIPPED_TEMPLATE
    return resolved.path(name) if name else None


def described(data: PreparedData, notes: Sequence[str] = ()) -> list[str]:
    """Return what to report of the data: when and how it is verified, then what else a person should know."""
    first = f"data: {data.num_bytes / 1e9:,.2f} GB, {data.verified} ({data.seconds:.1f} s)"
    older = (
        "an older version prepared this data and did not record what it was made from: only curriculum.length_scale is "
        "compared; m1 prepare-data writes the present format"
    )
    return [first, *notes, *([] if data.manifest.has_hashes else [older])]
