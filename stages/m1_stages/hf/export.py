"""Writes an export: weights, ``config.json``, tokenizer, model card and hashes, in a folder that appears when complete.

``export`` reads from top to bottom: it refuses what cannot be exported, writes the files to a temporary folder, and renames that
folder. The functions below it follow in the order of their calls.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from m1_data.storage.durable import flush
from m1_data.storage.ownership import refuse_to_replace, sweep_siblings, temporary_sibling
from m1_stages.errors import ConfigError
from m1_stages.hf.checkpoint_tensors import TensorSource, require_all
from m1_stages.hf.checksums import SUMS, write_sums
from m1_stages.hf.contents import Contents
from m1_stages.hf.llama_cpp.convert import convert
from m1_stages.hf.model_card import CARD, checkpoint_of_card
from m1_stages.hf.safetensors_writer import ShardWriter
from m1_stages.hf.targets import gguf_name, refuse_inexact

_OURS = (CARD, SUMS, "*.json", "*.safetensors", "*.gguf", "chat_template.jinja")
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The files of an export, and who can load them."""

    path: Path
    files: tuple[str, ...]
    """Names of the weight files."""
    tensors: int
    parameters: int
    """Number of parameters, without the decay buffers."""
    num_bytes: int
    """Bytes of all tensors."""
    portable: bool
    """Whether loaders besides transformers compute the same function."""
    notes: tuple[str, ...]
    """Sentences on who can load the export and how, as in the model card."""


def export(
    source: TensorSource,
    out: Path,
    contents: Contents,
    *,
    shard_bytes: int,
    overwrite: bool = False,
    llama_cpp: Path | None = None,
) -> ExportReport:
    """Write a folder that the loaders of ``contents.target`` read.

    All files are written to a temporary folder beside ``out``, which is renamed at the end. What a killed export left there is
    removed first. One of our tensors is in memory at a time.

    Args:
        source: full tensors under our names.
        shard_bytes: largest weight file; a single larger tensor gets a file of its own.
        overwrite: replace ``out`` when it is an export of ours.
        llama_cpp: sources of llama.cpp (``llama_cpp.convert.find_converter``), for the target ``gguf``.

    Raises:
        ConfigError: ``out`` exists (with ``overwrite``: and is no export of ours), or the target cannot hold the model.
        CheckpointError: tensors are missing or have another shape, or llama.cpp's converter failed.
    """
    refuse_inexact(contents.target, contents.model, contents.slopes)
    _refuse_occupied(out, overwrite)
    require_all(source, contents.model, contents.lineage.checkpoint)
    with new_folder(out, overwrite=overwrite) as temporary:
        if contents.target == "gguf":
            assert llama_cpp is not None
            writer = _write_gguf(temporary, source, contents, llama_cpp)
            files: tuple[str, ...] = (gguf_name(contents.dtype),)
        else:
            writer = _write_files(temporary, source, contents, shard_bytes)
            files = writer.files
        write_sums(temporary)
    return ExportReport(
        path=out,
        files=files,
        tensors=len(writer.planned),
        parameters=sum(tensor.numel() for name, tensor in writer.planned.items() if name.endswith(".weight")),
        num_bytes=writer.num_bytes,
        portable=contents.portable,
        notes=contents.notes,
    )


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside ``out``, which gets that name at the end of the block; after an error it is removed.

    Raises:
        ConfigError: ``out`` exists (with ``overwrite``: and is no export of ours).
    """
    _refuse_occupied(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_siblings(out)
    temporary = temporary_sibling(out)
    try:
        temporary.mkdir()
        yield temporary
        _put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_files(folder: Path, source: TensorSource, contents: Contents, shard_bytes: int) -> ShardWriter:
    """Write weights, index, configuration, tokenizer and model card."""
    writer = ShardWriter(folder, contents.planned(), shard_bytes)
    for name, tensor in contents.tensors(source):
        writer.add(name, tensor)
    writer.close()
    for name, data in contents.files().items():
        (folder / name).write_bytes(data)
        flush(folder / name)
    return writer


def _write_gguf(folder: Path, source: TensorSource, contents: Contents, llama_cpp: Path) -> ShardWriter:
    """Write a gguf file and the model card; what llama.cpp's converter reads lies beside them meanwhile."""
    released = folder / "text01"
    released.mkdir()
    writer = _write_files(released, source, contents, _NO_LIMIT)
    path = folder / gguf_name(contents.dtype)
    name = f"{contents.lineage.stages[-1].name}-{contents.lineage.checkpoint}"
    convert(released, path, sources=llama_cpp, dtype=contents.dtype, name=name)
    shutil.rmtree(released)
    (folder / CARD).write_bytes(contents.card())
    for written in (path, folder / CARD):
        flush(written)
    return writer


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    fix = "choose another --out"
    refuse_to_replace(out, what="the export folder", marked=checkpoint_of_card(out) is not None, ours=_OURS, fix=fix)
    if out.exists() and not overwrite:
        raise ConfigError(
            "the export folder exists already",
            where=str(out),
            fix=f"{fix}, or --overwrite; to compare it with its checkpoint: m1 export --verify-only {out}",
        )


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; an export that is replaced is restored when this fails."""
    old = temporary_sibling(out)
    if out.exists():
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    flush(out.parent)
    if old.exists():
        shutil.rmtree(old)
