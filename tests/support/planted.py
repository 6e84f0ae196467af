"""Puts pickles that run a command into checkpoints."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


def plant_object(shard: Path, name: str, evil: bytes) -> None:
    """Put a pickle where the shard of ``shard.parent`` keeps the object or tensor ``name``."""
    index = shard.parent / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    (entry,) = (info for key, info in metadata.storage_data.items() if key.fqn.split("/")[0] == name)
    data = bytearray(shard.read_bytes())
    entry.offset, entry.length = len(data), len(evil)
    shard.write_bytes(data + evil)
    index.write_bytes(pickle.dumps(metadata))


def torch_saved(value: Any, proof: Path) -> bytes:
    path = proof.with_suffix(".pt")
    torch.save(value, path)
    assert zipfile.is_zipfile(path)
    return path.read_bytes()
