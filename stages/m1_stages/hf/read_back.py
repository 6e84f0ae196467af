"""Reads an export back from the disk and compares every value in it with the checkpoint's, bit by bit.

A forward pass over some tokens does not touch most embedding rows and many experts. This comparison leaves no value out; that the
conversion itself is right is what the comparison of logits shows (``verify``).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError
from m1_stages.hf.checkpoint_tensors import TensorSource, require_all
from m1_stages.hf.checksums import FIX, refuse_changed
from m1_stages.hf.contents import CONFIG, GENERATION_CONFIG, Contents
from m1_stages.hf.model_card import CARD
from m1_stages.hf.safetensors_writer import INDEX

_READ_BY_LOADERS = tuple(
    f"*.{ending}" for ending in (
        "safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "json", "jinja", "py", "model",
    )
)  # fmt: skip


def compare_files(source: TensorSource, folder: Path, contents: Contents) -> int:
    """Compare all files of an export with what they should hold, and with their hashes from when it was written.

    The model card has its hash alone: evaluations may have come since.

    One of our tensors and one mapped file are in memory at a time. Nothing is written.

    Returns:
        The number of tensors, all of which are equal.

    Raises:
        CheckpointError: something differs; the message names file, tensor and element, or key, and both values.
    """
    require_all(source, contents.model, contents.lineage.checkpoint)
    planned = contents.planned()
    place = _weight_map(folder, planned)
    names = {*contents.files(), INDEX, *place.values()}
    refuse_other_files(folder, names)
    for name, data in contents.files().items():
        if name in (CONFIG, GENERATION_CONFIG):
            _compare_values(folder / name, json.loads(data))
        elif name != CARD and _read(folder / name) != data:
            raise _differs(folder / name, "the file is not the tokenizer's that the model was trained with")
    with _Shards(folder, place) as shards:
        for name, expected in contents.tensors(source):
            shards.compare(name, expected)
    refuse_changed(folder, names)
    return len(planned)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of an export.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise _differs(path, f"the file is damaged: {error}") from error
    if not isinstance(values, dict):
        raise _differs(path, "the file is damaged: it is no JSON object")
    return values


def _weight_map(folder: Path, planned: dict[str, Tensor]) -> dict[str, str]:
    """Read the index: the file of every tensor."""
    path = folder / INDEX
    index = read_json(path)
    place, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(place, dict) or not isinstance(metadata, dict):
        raise _differs(path, "the file is damaged: it has no weight_map and metadata")
    for name in sorted(place.keys() ^ planned.keys()):
        raise _differs(path, f"{name!r} is {'missing' if name in planned else 'no tensor of this model'}")
    for name, file in place.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise _differs(path, f"{name} is in {file!r}, which is no file of the export")
    size = sum(tensor.nbytes for tensor in planned.values())
    if metadata.get("total_size") != size:
        raise _differs(path, f"total_size is {metadata.get('total_size')!r}, the tensors have {size} bytes")
    return place


def refuse_other_files(folder: Path, expected: set[str]) -> None:
    """Refuse what a loader would read in place of the export's files, or beside them."""
    for pattern in _READ_BY_LOADERS:
        for path in sorted(folder.glob(pattern)):
            if path.name not in expected:
                raise _differs(path, "m1 export did not write this file, and loaders may read it")


def _compare_values(path: Path, expected: dict[str, Any]) -> None:
    found = read_json(path)
    for key in (*expected, *(key for key in found if key not in expected)):
        if key not in expected or key not in found or _exact(found[key]) != _exact(expected[key]):
            now, then = (repr(v[key]) if key in v else "missing" for v in (found, expected))
            raise _differs(path, f"{key} is {now}, of the checkpoint it is {then}")


def _exact(value: Any) -> str:
    """JSON text, which also tells 1 from 1.0 and from true."""
    return json.dumps(value, sort_keys=True)


class _Shards:
    """The weight files, of which one is mapped at a time."""

    def __init__(self, folder: Path, place: dict[str, str]) -> None:
        self._folder, self._place = folder, place
        self._file, self._keys = "", frozenset[str]()
        self._handle: Any = None

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def compare(self, name: str, expected: Tensor) -> None:
        """Read the tensor ``name`` and compare it with ``expected``."""
        file = self._place[name]
        path = self._folder / file
        if file != self._file:
            self._switch(file)
        if name not in self._keys:
            raise _differs(path, f"{name} is not in the file that {INDEX} names")
        found = self._handle.get_tensor(name)
        refuse_different(path, name, found, expected)

    def _switch(self, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        self._close()
        try:
            self._handle = safe_open(self._folder / file, framework="pt").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise _differs(self._folder / file, f"the file is missing or damaged: {error}") from error
        self._file, self._keys = file, frozenset(self._handle.keys())
        if extra := sorted(key for key in self._keys if self._place.get(key) != file):
            raise _differs(self._folder / file, f"{extra[0]!r} is in this file, and {INDEX} does not say so")

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
            self._handle = None


def refuse_different(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    """Compare a tensor that was read back with the checkpoint's, bit by bit.

    Raises:
        CheckpointError: it has another shape, dtype or value; the message names the first element and both values.
    """
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise _differs(
            path,
            f"{name} is {tuple(found.shape)} of {found.dtype}, of the checkpoint it is {tuple(expected.shape)} "
            f"of {expected.dtype}",
        )
    differing = _bits(found) != _bits(expected)
    if count := int(differing.sum()):
        first = tuple(int(n) for n in torch.unravel_index(differing.flatten().to(torch.uint8).argmax(), found.shape))
        raise _differs(
            path,
            f"{name}{list(first)} is {float(found[first])!r}, of the checkpoint it is {float(expected[first])!r} "
            f"({count:,} of {found.numel():,} values differ)",
        )


def _bits(tensor: Tensor) -> Tensor:
    """The values as whole numbers: a NaN equals itself, and 0.0 differs from -0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _differs(path, f"the file cannot be read: {error.strerror}") from error


def _differs(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the export is not the checkpoint's: {what}", where=str(path), fix=FIX)
