"""Reads weights from a committed checkpoint, one tensor at a time in one process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.config import ModelConfig
from m1_stages.config.lora import adapter_name, recorded_lora
from m1_stages.errors import CheckpointError
from m1_stages.hf.tensor_names import our_shapes
from m1_stages.model.merged import merged


class TensorSource(Protocol):
    """A source of full (unsharded) tensors under our names."""

    def keys(self) -> set[str]:
        """Return the names of all tensors, which may include others than the model's."""

    def get(self, name: str) -> Tensor:
        """Read the tensor ``name``."""


class MemorySource:
    """A source of tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._tensors)

    def get(self, name: str) -> Tensor:
        """Return the tensor ``name``."""
        return self._tensors[name]


class CheckpointSource:
    """A committed checkpoint as a source; every file is verified before the first tensor is read.

    Args:
        verified: they were verified just now.

    Raises:
        CheckpointError: a file is not what was written.
    """

    def __init__(self, committed: Committed, *, verified: bool = False) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        if not verified:
            CheckpointStore(committed.path.parent).verify(committed)
        self.committed, self.lora = committed, recorded_lora(committed.meta.extra)
        self._reader = FileSystemReader(committed.path)
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def keys(self) -> set[str]:
        """Return the names of all tensors in the checkpoint, optimizer state included."""
        return set(self._tensors)

    def get(self, name: str) -> Tensor:
        """Read the tensor ``name``, join its shards, and merge its adapter into it, in fp32, if it has one.

        Raises:
            OSError: a file cannot be read.
        """
        weight = self.stored(name)
        adapter = self.adapter_of(name)
        return weight if adapter is None or self.lora is None else merged(weight, *adapter, self.lora.scale)

    def adapter_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Read the two matrices of the adapter of the weight ``name``; None when it has none."""
        adapter = adapter_name(name)
        if f"{adapter}.a" not in self._tensors:
            return None
        return self.stored(f"{adapter}.a"), self.stored(f"{adapter}.b")

    def stored(self, name: str) -> Tensor:
        """Read the tensor ``name`` as it is stored, and join its shards.

        Raises:
            OSError: a file cannot be read.
        """
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        entry = self._tensors[name]
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we want
            try:
                dcp.load(state, storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:  # wraps whatever was raised inside, stop requests and interrupts too
                raise next(reason for reason, _ in error.failures.values()) from error
        return state[name]


def require_all(source: TensorSource, model: ModelConfig, where: str) -> None:
    """Refuse a source in which tensors of the model are missing.

    Raises:
        CheckpointError: tensors are missing; the message names the first one.
    """
    missing = [name for name in our_shapes(model) if name not in source.keys()]  # noqa: SIM118 - a protocol, no mapping
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the model are missing, {missing[0]} first",
            where=where,
            fix="export a checkpoint that was trained with this model section",
        )


def get_checked(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read ``name`` and check its shape.

    Raises:
        CheckpointError: the tensor has another shape.
    """
    tensor = source.get(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, the model section needs {shape}",
            fix="use the model section the checkpoint was trained with",
        )
    return tensor
