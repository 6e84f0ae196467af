"""Weights belong to a tokenizer: checkpoints name theirs, and are used with no other."""

from __future__ import annotations

from pathlib import Path

from m1_stages.checkpoint.manifest import Committed
from m1_stages.errors import ConfigError


def refuse_other_tokenizer(committed: Committed, sha256: str, data_dir: Path) -> None:
    """Refuse a checkpoint that was trained with another tokenizer than that of the prepared data.

    Checkpoints of versions that did not record theirs are accepted.

    Args:
        sha256: of the ``tokenizer.json`` of the prepared data in ``data_dir``.

    Raises:
        ConfigError: the hashes differ; both are named.
    """
    trained = committed.meta.extra.get("tokenizer_sha256")
    if trained and trained != sha256:
        raise ConfigError(
            f"the checkpoint was trained with another tokenizer (SHA-256 {trained[:16]}…) than that of the prepared data "
            f"(SHA-256 {sha256[:16]}…): its ids mean other text",
            where=f"{committed.path} and {data_dir / 'tokenizer' / 'tokenizer.json'}",
            fix="set tokenizer.path to the tokenizer it was trained with and run m1 prepare-data, or use another run.dir",
        )
