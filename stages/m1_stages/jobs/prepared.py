"""Opens the prepared data for a job: verified, and made from what the configuration says."""

from __future__ import annotations

import os

from m1_data.prepare.inputs import describe_inputs, refuse_changed_inputs
from m1_data.storage.manifest import Manifest, load_manifest
from m1_data.storage.store import PreparedData, open_prepared, verify_tokenizer
from m1_stages.config import Resolved
from m1_stages.curriculum import stage_mixes
from m1_stages.events import DataVerified


def open_for_training(resolved: Resolved) -> tuple[PreparedData, list[str]]:
    """Open the configured data, and return it with what is worth saying about it.

    Raises:
        DataError: no prepared data, damaged data, or data that was made from other keys, files or another tokenizer.
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


def data_verified(data: PreparedData, notes: list[str]) -> DataVerified:
    """Return the event that says what was verified."""
    return DataVerified(
        folder=str(data.folder), bytes=data.num_bytes, how=data.verified, seconds=data.seconds, notes=notes
    )
