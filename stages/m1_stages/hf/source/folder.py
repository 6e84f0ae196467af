"""The safetensors files of a Hugging Face folder: names, shapes and dtypes of all tensors, and one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.hf.safetensors_writer import INDEX

SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CONVERT = "convert the weights to bf16 first; quantized ones are not read"
_FIX = "download the files again, and compare them with the publisher's hashes"


@dataclass(frozen=True, slots=True)
class Index:
    """A ``model.safetensors.index.json``."""

    path: Path
    place: Mapping[str, str]
    """File of every tensor."""
    total_size: int | None
    """Bytes of all tensors, as it says."""
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read the file.

        Raises:
            CheckpointError: missing or damaged.
        """
        try:
            data = path.read_bytes()
            values = json.loads(data)
            place, size = values.get("weight_map"), values.get("metadata", {}).get("total_size")
            if not isinstance(place, dict) or not place:
                raise ValueError("it has no weight_map that names the file of each tensor")
            for name, file in place.items():
                if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
                    raise ValueError(f"{name} is in {file!r}, which is no safetensors file of the folder")
            if isinstance(size, float) and size.is_integer():
                size = int(size)  # as some writers of this file put it
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise ValueError(f"its total_size is {size!r}")
        except OSError as error:
            raise CheckpointError(f"cannot read the index: {error.strerror}", where=str(path), fix=_FIX) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the index is damaged: {error}", where=str(path), fix=_FIX) from error
        return cls(path, place, size, hashlib.sha256(data).hexdigest())


class SourceFolder:
    """The tensors of a folder; the headers of all files are read at once, and one file is mapped at a time.

    Raises:
        ConfigError: there are no safetensors files.
        CheckpointError: the index or a header is damaged, a file is missing or cut, or the index and the files disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path / INDEX) if (path / INDEX).exists() else None
        self._handle: Any = None
        self._open_file = ""
        files = sorted(set(self.index.place.values())) if self.index else [self._single()]
        if missing := [name for name in files if not (path / name).is_file()]:
            raise CheckpointError(
                f"{len(missing)} of {len(files)} weight files are missing, {missing[0]} first",
                where=str(path),
                fix=_FIX,
            )
        self.file_of: dict[str, str] = {}
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for file in files:
            self._read_header(file)
        self._compare_with_index()
        self.sha256 = self.index.sha256 if self.index else _header_sha256(path / files[0])
        """Of the index; of the header of a single file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.entries.values())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest weight file."""
        return max((self.path / name).stat().st_size for name in set(self.file_of.values()))

    def get(self, name: str) -> Tensor:
        """Read the tensor ``name``; it may share memory with the mapped file.

        Raises:
            CheckpointError: it cannot be read.
        """
        file = self.file_of[name]
        from safetensors import SafetensorError

        try:
            if file != self._open_file:
                self.close()
                self._handle, self._open_file = _opened(self.path / file), file
            tensor: Tensor = self._handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path / file, f"{name} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        """Unmap the file that is open."""
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
        self._handle, self._open_file = None, ""

    def _single(self) -> str:
        if (self.path / SINGLE).is_file():
            return SINGLE
        names = sorted(p.name for p in self.path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        pickled = [name for name in names if not name.endswith(".safetensors")]
        what = f"there is neither {INDEX} nor {SINGLE}"
        if pickled:
            what += f", only pickled weights ({pickled[0]}), which can run code and are not read"
        raise ConfigError(what, where=str(self.path), fix="name a folder of safetensors files, or convert the weights")

    def _read_header(self, file: str) -> None:
        from safetensors import SafetensorError

        path = self.path / file
        try:
            with _opened(path) as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle, no mapping
                    part = handle.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in DTYPES:
                        raise _damaged(path, f"{name} is {dtype}; m1 imports {', '.join(DTYPES)}", _CONVERT)
                    if name in self.entries:
                        raise _damaged(path, f"{name} is also in {self.file_of[name]}")
                    self.entries[name] = DTYPES[dtype], tuple(part.get_shape())
                    self.file_of[name] = file
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, f"the file is damaged or cut: {error}") from error

    def _compare_with_index(self) -> None:
        if self.index is None:
            return
        for name, file in self.index.place.items():
            if self.file_of.get(name) != file:
                raise _damaged(self.path / file, f"{INDEX} says that {name} is in this file, and it is not")
        for name, file in self.file_of.items():
            if name not in self.index.place:
                raise _damaged(self.path / file, f"{name} is in this file, and {INDEX} does not say so")
        if self.index.total_size not in (None, self.num_bytes):
            raise _damaged(
                self.index.path,
                f"its total_size is {self.index.total_size:,}, and the files hold {self.num_bytes:,} bytes",
            )


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt").__enter__()


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def _damaged(path: Path, what: str, fix: str = _FIX) -> CheckpointError:
    return CheckpointError(f"the source's weights cannot be used: {what}", where=str(path), fix=fix)
