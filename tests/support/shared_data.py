"""Where the optional real corpora lie; tests that use them skip when they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zstandard


def shared_data() -> Path:
    """Return the folder with ``corpus/``, ``dirty/`` and ``tokenizers/``, or skip the test."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("M1_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("the shared corpora are not here (set M1_SHARED_DATA)")
    return folder


def unpack_zst(source: Path, target: Path) -> Path:
    """Decompress ``source`` (.zst) to ``target`` and return ``target``."""
    with source.open("rb") as src, target.open("wb") as dst:
        zstandard.ZstdDecompressor().copy_stream(src, dst)
    return target
