"""A small model with random weights, its tokenizer, and exports and checkpoints of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from m1_data.spec import TokenizerSpec
from m1_data.storage.manifest import Manifest
from m1_data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from m1_stages.checkpoint import CheckpointMeta, CheckpointStore, Committed
from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, released_slopes
from m1_stages.hf.checkpoint_tensors import MemorySource, TensorSource
from m1_stages.hf.contents import Contents
from m1_stages.hf.export import ExportReport, export
from m1_stages.hf.model_card import Lineage, StageFacts
from m1_stages.hf.tensor_names import our_shapes
from m1_stages.hf.tokenizer_files import TokenizerFiles
from m1_stages.hf.verification import child
from m1_stages.hf.verification.transformers_loading import transformers_logits

MODEL = ModelConfig(
    hidden_size=48, num_layers=4, num_heads=4, head_dim=16, num_kv_heads=2, rotary_dim=16, num_experts=4,
    expert_hidden_size=40, vocab_size=300, softmax_every=4,
)  # fmt: skip
ROPE_BASE = 5e4
LINEAGE = Lineage(
    checkpoint="step_00000010", checkpoint_sha256="ab" * 32, tokens_seen=12_345, global_step=10, decay_policy="relax",
    stages=(StageFacts(name="32k", row_tokens=1024), StageFacts(name="128k", row_tokens=4096, rope_base=5e6, tokens=9, mix="x")),
)  # fmt: skip


def weights(model: ModelConfig, seed: int = 3) -> dict[str, Tensor]:
    """Random weights of a trained model's scale: every branch contributes, every norm weight differs from one."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in our_shapes(model).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            out[name] = 1 + 0.2 * values
        elif "embedding" in name:
            out[name] = values
        else:
            out[name] = values * shape[-1] ** -0.5
    return out


def relaxed(model: ModelConfig) -> Slopes:
    return [[s * 1.7 for s in row] for row in released_slopes(model.num_layers, model.num_heads)]


def make_tokenizer(out: Path, text: str = "one two three four") -> Path:
    save_tokenizer(train_tokenizer(iter([text] * 9), TokenizerSpec(vocab_size=280)), out)
    return out


def prepare_tokenizer(data_dir: Path, tokenizer_dir: Path) -> None:
    """Make a folder of prepared data that has a tokenizer, a copy of ``tokenizer_dir``, and no shards."""
    loaded = load_tokenizer(tokenizer_dir, "")
    files = save_tokenizer(loaded, data_dir / "tokenizer")
    manifest = Manifest(
        fingerprint="f", engine="tokenizers", vocab_size=loaded.vocab_size, eod_id=loaded.eod_id, eod_token=loaded.eod_token,
        tokenizer_sha256=files["tokenizer.json"], length_scale=1.0, bucket_edges_tokens=(), sources=(), shards=(),
        tokens_by_domain={}, tokens_by_bucket={}, documents_by_bucket={}, core_share=0.0, mixes={}, tokenizer_files=files,
    )  # fmt: skip
    (data_dir / "manifest.json").write_text(manifest.to_json())


def contents(tokenizer_dir: Path, model: ModelConfig = MODEL, slopes: Slopes | None = None, **kw: Any) -> Contents:
    values: dict[str, Any] = {
        "model": model,
        "slopes": slopes or released_slopes(model.num_layers, model.num_heads),
        "rope_base": ROPE_BASE,
        "max_positions": 4096,
        "tokenizer": TokenizerFiles.of(tokenizer_dir),
        "dtype": "fp32",
        "lineage": LINEAGE,
    }
    return Contents(**values | kw)


def write(
    out: Path,
    tokenizer_dir: Path,
    model: ModelConfig = MODEL,
    slopes: Slopes | None = None,
    *,
    source: TensorSource | None = None,
    overwrite: bool = False,
    shard_bytes: int = 150_000,
    **kw: Any,
) -> ExportReport:
    what = contents(tokenizer_dir, model, slopes, **kw)
    return export(source or MemorySource(weights(model)), out, what, shard_bytes=shard_bytes, overwrite=overwrite)


def largest_difference(folder: Path, expected: Tensor, tokens: Tensor) -> float:
    """Largest difference of the logits that transformers computes from an export."""
    return float((transformers_logits(folder, tokens).double() - expected.double()).abs().max())


def compute_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a verification compute here: a child spends its time importing torch, Megatron-Core and transformers."""

    def compute(job: dict[str, Any], tokens: Tensor, device: str) -> dict[str, Tensor]:
        return child.compute(json.loads(json.dumps(job | {"device": device})), tokens)

    monkeypatch.setattr(child, "in_child", compute)


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    out = {}
    for name, file in index.items():
        with safe_open(folder / file, framework="pt") as handle:
            out[name] = handle.get_tensor(name)
    return out


def make_checkpoint(run_dir: Path, **extra: Any) -> tuple[Committed, dict[str, Tensor]]:
    """A final checkpoint of stage 128k as a run writes it, and the weights in it."""
    from m1_stages.config import ParallelConfig
    from m1_stages.runtime import device, parallel

    parallel.start(ParallelConfig(), device=device.use("cpu"), seed=0)
    try:
        from m1_stages.model import build_model

        built = build_model(MODEL, parallel=ParallelConfig(), rope_base=ROPE_BASE, seed=5)[0]
        meta = CheckpointMeta(
            stage="128k", stage_step=10, global_step=10, stage_final=True, config_sha256="c", data_fingerprint="d",
            topology={}, decay={"policy": "fixed", "slopes": released_slopes(4, 4)},
            extra={"tokens_seen": 12_345, "rope_base": 5e6, "model": dataclasses.asdict(MODEL)} | extra,
        )  # fmt: skip
        state = {"model": built.sharded_state_dict(metadata={"non_homogeneous_layers": True}), "train_state": {"x": 1}}
        store = CheckpointStore(run_dir / "checkpoints")
        store.save(state, meta)
        return store.committed()[0], {name: p.detach().clone() for name, p in built.named_parameters()}
    finally:
        parallel.stop()
