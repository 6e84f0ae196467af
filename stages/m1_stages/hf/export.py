"""Writes a Hugging Face export: weights, ``config.json``, tokenizer and model card, in a folder that appears when complete.

``export`` reads from top to bottom: it refuses what cannot be exported, decides what the files say, writes them to a temporary
folder, and renames that folder. The functions below it follow in the order of their calls.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from m1_data.chat.encoder import default_template
from m1_data.storage.ownership import refuse_to_replace
from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, is_released
from m1_stages.errors import ConfigError
from m1_stages.hf.checkpoint_tensors import TensorSource, get_checked, require_all
from m1_stages.hf.config_json import (
    CARD_MARK,
    DTYPES,
    Lineage,
    SpecialTokens,
    loader_notes,
    model_card,
    released_config,
)
from m1_stages.hf.safetensors_writer import ShardWriter
from m1_stages.hf.tensor_names import decay_buffers, our_shapes, to_exported

TRANSFORMERS_NORM_EPS = 1e-6
_OURS = ("README.md", "*.json", "*.safetensors", "chat_template.jinja")


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
    *,
    model: ModelConfig,
    slopes: Slopes,
    rope_base: float,
    max_positions: int,
    tokenizer_dir: Path,
    dtype: str,
    shard_bytes: int,
    lineage: Lineage,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder that transformers loads, and other loaders of this family where the model permits it.

    All files are written to a temporary folder beside ``out``, which is renamed at the end. At most one of our tensors and one
    shard are in memory.

    Args:
        source: full tensors under our names.
        slopes: decay rates that the weights were last trained with, [num_layers][num_heads], tokens^-1. Released ones are not
            stored, because every loader computes them; others are stored as transformers' buffers.
        max_positions: longest context that was trained, tokens.
        dtype: ``fp32`` or ``bf16`` for the weights; decay buffers are always fp32.
        shard_bytes: largest weight file; a single larger tensor gets a file of its own.
        chat_template: Jinja source; None takes the tokenizer's own, else the one shipped with m1.
        overwrite: replace ``out`` when it is an export of ours.

    Raises:
        ConfigError: ``out`` exists (with ``overwrite``: and is no export of ours), or no configuration of transformers
            describes the model.
        CheckpointError: tensors are missing or have another shape.
        DataError: there is no tokenizer.
    """
    _refuse_unexportable(model, out, overwrite)
    require_all(source, model, lineage.checkpoint)
    special = SpecialTokens.of(tokenizer_dir)
    released = is_released(slopes, model)
    notes = loader_notes(model, released=released)
    config = released_config(model, rope_base=rope_base, max_positions=max_positions, dtype=dtype, special=special)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        writer = ShardWriter(temporary, shard_bytes)
        for name, shape in our_shapes(model).items():
            for exported_name, tensor in to_exported(name, get_checked(source, name, shape), model):
                writer.add(exported_name, tensor.to(DTYPES[dtype]))
        parameters = writer.elements
        if not released:
            for name, tensor in decay_buffers(model, slopes):
                writer.add(name, tensor)
        files = writer.close()
        _write_json(temporary / "config.json", config)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(temporary / "generation_config.json", generation)
        _copy_tokenizer(tokenizer_dir, temporary, chat_template)
        card = model_card(model, lineage, notes, dtype=dtype, max_positions=max_positions)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ExportReport(
        path=out,
        files=files,
        tensors=writer.tensors,
        parameters=parameters,
        num_bytes=writer.num_bytes,
        portable=released and model.rotary_dim == model.head_dim,
        notes=notes,
    )


def _refuse_unexportable(model: ModelConfig, out: Path, overwrite: bool) -> None:
    fix = "choose another --out"
    refuse_to_replace(out, what="the export folder", marked=_is_export(out), ours=_OURS, fix=fix)
    if out.exists() and not overwrite:
        raise ConfigError("the export folder exists already", where=str(out), fix=f"{fix}, or --overwrite")
    if model.lightning_norm_eps != TRANSFORMERS_NORM_EPS:
        raise ConfigError(
            f"transformers computes the lightning output norm with epsilon {TRANSFORMERS_NORM_EPS:g} and reads no "
            f"other, but this model was trained with {model.lightning_norm_eps:g}",
            where="key model.lightning_norm_eps",
            fix=f"train with model.lightning_norm_eps = {TRANSFORMERS_NORM_EPS:g}",
        )


def _is_export(folder: Path) -> bool:
    """Whether ``folder`` has the model card of an export of ours."""
    try:
        return CARD_MARK in (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return False


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, out: Path, chat_template: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    has_own = (out / "chat_template.jinja").exists() or "chat_template" in json.loads(
        (out / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    if chat_template is not None or not has_own:
        (out / "chat_template.jinja").write_text(chat_template or default_template(), encoding="utf-8")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; an export that is replaced is restored when this fails."""
    old = out.with_name(f"{temporary.name}.old")
    if out.exists():
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)
