"""Keeps planted pickles from running code: torch's readers trust a checkpoint in two places.

``.metadata`` goes through plain ``pickle.load``: it is parsed first with an allow-list and refused by the name of the global.
Objects inside the shards go through ``torch.load(weights_only=False)`` (``default_planner.py``): they are read restricted.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m1_stages.errors import CheckpointError

_ALLOWED = {
    "builtins": {"set", "slice", "list", "dict", "tuple", "frozenset"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {
        "Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
        "device", "strided", "contiguous_format",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}  # fmt: skip


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the global {module}.{name} is not allowed in a checkpoint")


def check_metadata(path: Path) -> None:
    """Parse a ``.metadata`` file.

    Raises:
        CheckpointError: it names a global that has no place there, or is no pickle.
    """
    try:
        _Restricted(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"refused to read the checkpoint's metadata: {error}", where=str(path)) from error


@contextmanager
def objects_restricted() -> Iterator[None]:
    """While a checkpoint is loaded, the objects in its shards must be plain values, as its tensors must be tensors.

    Raises:
        pickle.UnpicklingError: from the load, naming the global that has no place there.
    """
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    def load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        start = value.tell()
        torch.load(value, weights_only=True)
        value.seek(start)
        original(planner, read_item, value)

    original = DefaultLoadPlanner.load_bytes
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        DefaultLoadPlanner.load_bytes = original  # type: ignore[method-assign]
