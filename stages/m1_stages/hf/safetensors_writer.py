"""Writes tensors as a sharded set of safetensors files with an index, as transformers' ``save_pretrained`` lays them out."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors up to ``shard_bytes`` and writes them as one safetensors file of a sharded set.

    At most one shard is in memory; a single larger tensor gets a file of its own. ``tensors``, ``elements`` and ``num_bytes``
    count what was added.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.tensors = self.elements = self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor``; a full shard is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu().clone().contiguous()
        self._pending_bytes += size
        self.tensors += 1
        self.elements += tensor.numel()
        self.num_bytes += size

    def close(self) -> tuple[str, ...]:
        """Write the last shard and the index, give the files their final names, and return these names."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return tuple(names)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"
