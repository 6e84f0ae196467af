"""Hugging Face export: released tensor names in sharded safetensors, written one tensor at a time."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from m1_data.chat.encoder import default_template
from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, is_released
from m1_stages.errors import ConfigError
from m1_stages.hf.checkpoint_tensors import TensorSource, get_checked, require_all
from m1_stages.hf.config_json import DTYPES, Lineage, SpecialTokens, decay_buffers, model_card, released_config
from m1_stages.hf.tensor_names import our_shapes, proportional_rows, to_released

TRANSFORMERS_NORM_EPS = 1e-6
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    path: Path
    files: tuple[str, ...]
    """Weight files."""
    tensors: int
    parameters: int
    """Decay buffers not counted."""
    num_bytes: int
    """Of all tensors."""
    portable: bool
    """Whether loaders besides transformers compute the same function."""
    notes: tuple[str, ...]
    """Who can load it, and how; also in the model card."""


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

    Everything is written to a temporary folder beside ``out`` and renamed at the end; at most one of our tensors and
    one shard are in memory.

    Args:
        source: full tensors under our names.
        slopes: decay rates the weights were last trained with. Released ones are left out of the file (every loader
            computes them); others are stored as transformers' buffers.
        max_positions: longest context trained, tokens.
        dtype: ``fp32`` or ``bf16`` for the weights; decay buffers are always fp32.
        shard_bytes: largest weight file; a single larger tensor gets a file of its own.
        chat_template: Jinja source; None takes the tokenizer's own, else the one shipped with m1.
        overwrite: replace ``out`` when it exists.

    Raises:
        ConfigError: ``out`` exists, or the model computes what transformers cannot be told.
        CheckpointError: tensors are missing or have another shape.
        DataError: no tokenizer.
    """
    _refuse(model, out, overwrite)
    require_all(source, model, lineage.checkpoint)
    special = SpecialTokens.of(tokenizer_dir)
    released = is_released(slopes, model)
    notes = _notes(model, released=released)
    config = released_config(model, rope_base=rope_base, max_positions=max_positions, dtype=dtype, special=special)

    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        writer = ShardWriter(work, shard_bytes)
        for name, shape in our_shapes(model).items():
            for released_name, tensor in _released(name, get_checked(source, name, shape), model):
                writer.add(released_name, tensor.to(DTYPES[dtype]))
        parameters = writer.elements
        if not released:
            for name, tensor in decay_buffers(model, slopes):
                writer.add(name, tensor)
        files = writer.close()
        _write_json(work / "config.json", config)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(work / "generation_config.json", generation)
        _copy_tokenizer(tokenizer_dir, work, chat_template)
        card = model_card(model, lineage, notes, dtype=dtype, max_positions=max_positions)
        (work / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
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


class ShardWriter:
    """Collects tensors up to ``shard_bytes`` and writes them as one safetensors file of a sharded set."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.tensors = self.elements = self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor``."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu().clone().contiguous()
        self._pending_bytes += size
        self.tensors += 1
        self.elements += tensor.numel()
        self.num_bytes += size

    def close(self) -> tuple[str, ...]:
        """Write the rest, give the files their final names, write the index; the file names."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
        _write_json(self._folder / INDEX, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})
        return tuple(names)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"


def _released(name: str, tensor: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for released_name, value in to_released(name, tensor, model):
        if model.rotary_dim != model.head_dim and released_name.endswith(("q_proj.weight", "k_proj.weight")):
            value = proportional_rows(value, head_dim=model.head_dim, rotary_dim=model.rotary_dim)
        yield released_name, value


def _refuse(model: ModelConfig, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ConfigError(
            "the export folder exists already", where=str(out), fix="choose another --out, or --overwrite"
        )
    if model.lightning_norm_eps != TRANSFORMERS_NORM_EPS:
        raise ConfigError(
            f"transformers computes the lightning output norm with epsilon {TRANSFORMERS_NORM_EPS:g} and reads no "
            f"other, but this model was trained with {model.lightning_norm_eps:g}",
            where="key model.lightning_norm_eps",
            fix=f"train with model.lightning_norm_eps = {TRANSFORMERS_NORM_EPS:g}",
        )


def _notes(model: ModelConfig, *, released: bool) -> tuple[str, ...]:
    notes = ["transformers >= 5.20 loads it. Use fp32: its bf16 decoding rounds decay rates and state to bf16."]
    if not released:
        notes.append(
            "transformers only: the decay rates are not the released ones. They are stored as buffers, which vLLM, "
            "SGLang and the released code neither read nor accept."
        )
    if model.rotary_dim != model.head_dim:
        notes.append(
            f"transformers only: {model.rotary_dim} of {model.head_dim} channels are rotated. transformers ignores "
            "rotary_dim, so query and key rows are permuted for its 'proportional' RoPE type; other loaders would "
            "rotate the wrong channels."
        )
    if len(notes) == 1:
        notes.append(
            "Tensor names and configuration are also those vLLM <= 0.23 reads (later versions dropped the model); "
            "start it with --mamba-cache-dtype float32. Its lightning norm uses epsilon 1e-5, this model 1e-6. "
            "Known from its source, not run."
        )
    return tuple(notes)


def _copy_tokenizer(source: Path, out: Path, chat_template: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    has_own = (out / "chat_template.jinja").exists() or "chat_template" in json.loads(
        (out / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    if chat_template is not None or not has_own:
        (out / "chat_template.jinja").write_text(chat_template or default_template(), encoding="utf-8")


def _put_in_place(work: Path, out: Path) -> None:
    old = out.with_name(f"{work.name}.old")
    if out.exists():
        out.rename(old)
    try:
        work.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
