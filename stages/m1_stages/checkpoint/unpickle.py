"""Reads the pickled ``.metadata`` of a checkpoint with an allow-list, so that a planted pickle cannot run code.

torch's reader calls plain ``pickle.load`` on it; here the file is parsed first and refused by the name of the global.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from m1_data.errors import CheckpointError

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
