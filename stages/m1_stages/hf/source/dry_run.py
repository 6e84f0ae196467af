"""Compares the names, shapes and bytes of a source with a model, without reading weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from m1_stages.config import ModelConfig
from m1_stages.errors import CheckpointError
from m1_stages.hf.safetensors_writer import INDEX
from m1_stages.hf.source.config_json import SourceConfig
from m1_stages.hf.source.folder import Index, SourceFolder
from m1_stages.hf.source.tensors import DECAY, SourceTensors, refuse_other_names, released_bytes, released_shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What was compared; nothing was missing and nothing extra."""

    tensors: int
    num_bytes: int | None
    """Bytes of all tensors; None where an index does not say."""
    dtypes: str
    """Dtypes of the weights, in words."""
    files: int
    with_headers: bool
    """Whether the weight files were there, so that their headers were compared too: shapes, dtypes, bytes."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weight files, or something else than an index without them."""
    return not (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def check_folder(folder: Path, config: SourceConfig) -> DryRun:
    """Compare the index and the headers of all weight files with ``config``.

    Raises:
        ConfigError: there are no safetensors files.
        CheckpointError: files are missing or damaged, or names, shapes, dtypes or bytes differ.
    """
    source = SourceFolder(folder)
    try:
        tensors = SourceTensors(source, config)
        kinds = sorted({str(dtype).removeprefix("torch.") for dtype, _ in source.entries.values()})
        tensors.slopes()
        return DryRun(
            tensors=len(source.entries),
            num_bytes=source.num_bytes,
            dtypes=", ".join(kinds),
            files=len(set(source.file_of.values())),
            with_headers=True,
        )
    finally:
        source.close()


def check_index(path: Path, model: ModelConfig) -> DryRun:
    """Compare an index alone with ``model``: its names, and its bytes with those that the shapes of the model have.

    Raises:
        CheckpointError: the index is damaged, or names or bytes differ.
    """
    index = Index.read(path)
    buffers = {name for name in index.place if name.endswith(tuple(f".self_attn.{part}" for part in DECAY))}
    refuse_other_names(released_shapes(model), index.place.keys() - buffers, str(path))
    known = dict(_sizes(model))
    dtypes = "not known: it has decay buffers, whose bytes depend on the block size"
    if index.total_size is None:
        dtypes = "not known: the index has no total_size"
    elif not buffers:
        if index.total_size not in known:
            raise CheckpointError(
                f"total_size is {index.total_size:,}, and the tensors of this model have "
                + ", or ".join(f"{size:,} bytes in {what}" for size, what in known.items()),
                where=str(path),
                fix="the index belongs to another model, or its weights are quantized",
            )
        dtypes = known[index.total_size]
    return DryRun(
        tensors=len(index.place),
        num_bytes=index.total_size,
        dtypes=dtypes,
        files=len(set(index.place.values())),
        with_headers=False,
    )


def _sizes(model: ModelConfig) -> Iterator[tuple[int, str]]:
    for weights, routers, what in (
        (torch.bfloat16, torch.float32, "bf16 with fp32 routers"),
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float32, "fp32"),
    ):
        yield released_bytes(model, weights, routers), what
