"""Writes the adapters of a fine-tuning as PEFT reads them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of names and shapes: PEFT 0.21, ``tuners/lora/layer.py``. One of our projections is several modules of transformers, which
have its ``A`` each and divide the rows of its ``B``. The router is a parameter there, not a linear module: a target parameter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from m1_data.storage.durable import flush
from m1_stages.config import ModelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.errors import ConfigError
from m1_stages.hf.checkpoint_tensors import CheckpointSource, require_all
from m1_stages.hf.checksums import write_sums
from m1_stages.hf.config_json import DTYPES
from m1_stages.hf.contents import Contents
from m1_stages.hf.export import ExportReport, new_folder
from m1_stages.hf.model_card import CARD, adapter_card
from m1_stages.hf.tensor_names import our_shapes, to_exported

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {
    "lightning": ("qkv_proj", "output_gate", "out_proj"),
    "softmax": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
_PARAMETERS = {"router": ("mlp.gate.weight",)}
_RENAMED = {"block_sparse_moe.gate": "mlp.gate"}
"""Modules whose parameters have other names in a file than in transformers' model."""


def export_adapter(
    source: CheckpointSource, out: Path, contents: Contents, *, base: str, overwrite: bool = False
) -> ExportReport:
    """Write a folder that PEFT loads beside the export of what was fine-tuned; it appears when it is complete.

    Args:
        base: in words, what it has to be loaded on.
        overwrite: replace ``out`` when it is an export of ours.

    Raises:
        ConfigError: the checkpoint has no adapters, the target is not ``hf``, or ``out`` exists.
        CheckpointError: tensors are missing.
    """
    from safetensors.torch import save_file

    lora, checkpoint = source.lora, contents.lineage.checkpoint
    if lora is None:
        raise ConfigError(
            "the checkpoint has no adapters: all weights were trained",
            where=checkpoint,
            fix="leave out --adapter, or fine-tune with sft.lora_rank above 0",
        )
    if contents.target != "hf":
        raise ConfigError(
            f"adapters are written for PEFT, which works on transformers' model, not on the target {contents.target}",
            where="key export.target",
            fix=f"leave out --adapter: an export for {contents.target} has them merged; or take --target hf",
        )
    require_all(source, contents.model, checkpoint)
    tensors = {
        name: tensor.to(DTYPES[contents.dtype]).contiguous().clone()
        for name, tensor in adapter_tensors(source, contents.model, lora)
    }
    notes = (
        f"PEFT loads it (0.21 was run) on {base}.",
        "Merged into the weights it is what m1 export writes without --adapter.",
    )
    with new_folder(out, overwrite=overwrite) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(adapter_config(lora), indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(adapter_card(contents.lineage, lora, notes), encoding="utf-8")
        for name in (WEIGHTS, CONFIG, CARD):
            flush(folder / name)
        write_sums(folder)
    return ExportReport(
        path=out,
        files=(WEIGHTS,),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        portable=False,
        notes=notes,
    )


def adapter_tensors(source: CheckpointSource, model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield PEFT's name and the values of ``A`` [rank, in] and ``B`` [out, rank] of every module with an adapter."""
    of_rank = dataclasses.replace(model, hidden_size=lora.rank)  # rows of B are divided as rows of the weight are
    for name in our_shapes(model):
        if (adapter := source.adapter_of(name)) is None:
            continue
        a, b = adapter
        for exported, rows in to_exported(name, b, of_rank):
            module = exported.removesuffix(".weight")
            for stored, present in _RENAMED.items():
                module = module.replace(stored, present)
            yield f"base_model.model.{module}.lora_A.weight", a
            yield f"base_model.model.{module}.lora_B.weight", rows


def adapter_config(lora: LoraConfig) -> dict[str, Any]:
    """Return the values of ``adapter_config.json``."""
    parameters = [name for target in lora.targets for name in _PARAMETERS.get(target, ())]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": [name for target in lora.targets for name in _MODULES.get(target, ())],
        **({"target_parameters": parameters} if parameters else {}),
    }
