"""Writes tensors as a sharded set of safetensors files with an index, as transformers' ``save_pretrained`` lays them out.

The header of a safetensors file names every tensor in it, and comes first. All names and shapes are known before the first weight
is read, so the header is written at once and each tensor goes straight to its file: only that tensor is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from m1_data.storage.durable import flush

INDEX = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class ShardWriter:
    """Writes files of up to ``shard_bytes``, one dtype each, so that every tensor is aligned; a larger tensor has its own file.

    Args:
        folder: where the files go.
        planned: the tensors to come, in order; only names, shapes and dtypes count, so they may be on the meta device.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Tensor], shard_bytes: int) -> None:
        self._folder, self.planned, self._waiting = folder, planned, iter(planned)
        shards = _shards(planned, shard_bytes)
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        self.files = tuple(names)
        self.num_bytes = sum(tensor.nbytes for tensor in planned.values())
        self._place = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        self._keys = dict(zip(names, shards, strict=True))
        self._open: IO[bytes] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor``, which is the next of the planned ones.

        Raises:
            ValueError: another name, shape or dtype was planned.
            OSError: the disk is full or failing.
        """
        expected, planned = next(self._waiting, None), self.planned.get(name)
        if planned is None or name != expected or (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} comes where {expected} was planned")
        file = self._place[name]
        if name == self._keys[file][0]:
            self._close_file()
            self._open = (self._folder / file).open("wb")
            self._open.write(self._header(self._keys[file]))
        assert self._open is not None
        self._open.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush the last file to disk, and write the index.

        Raises:
            ValueError: a planned tensor did not come.
        """
        self._close_file()
        if (missing := next(self._waiting, None)) is not None:
            raise ValueError(f"{missing} was planned and did not come")
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._place}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _header(self, keys: list[str]) -> bytes:
        """The length of the header as 8 bytes, and the header, padded to whole eights."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in keys:
            tensor = self.planned[key]
            start, end = end, end + tensor.nbytes
            entries[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _close_file(self) -> None:
        if self._open is not None:
            self._open.close()
            flush(Path(self._open.name))
            self._open = None


def _shards(planned: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Cut the planned tensors into files."""
    shards: list[list[str]] = []
    size, dtype = 0, None
    for name, tensor in planned.items():
        if not shards or size + tensor.nbytes > limit or tensor.dtype != dtype:
            shards.append([])
            size, dtype = 0, tensor.dtype
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
