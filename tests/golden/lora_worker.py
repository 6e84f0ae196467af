"""One process that opens checkpoints of a fine-tuning with adapters, as generation and as a further fine-tuning do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import packed_batch

from m1_stages.checkpoint.loading import load_verified
from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.config.load import load_config
from m1_stages.config.lora import LoraConfig, recorded_lora
from m1_stages.errors import ConfigError
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.runtime import device, parallel
from m1_stages.training.session import open_session, with_vocab


def logits(job: dict[str, Any]) -> list[list[list[float]]]:
    """Of the last tokens of a text: beside its adapters, and with these merged, of the model in ``checkpoint``."""
    sizes, here = ParallelConfig(**job.get("parallel", {})), device.use("cpu")
    parallel.start(sizes, device=here, seed=0)
    try:
        from m1_stages.generation.forward import IncrementalModel
        from m1_stages.generation.loading import load_weights
        from m1_stages.model import build_model

        committed = read_manifest(Path(job["checkpoint"]))
        shape = ModelConfig(**committed.meta.extra["model"])
        tokens = torch.arange(300) * 7 % shape.vocab_size
        found = []
        for lora in (recorded_lora(committed.meta.extra), None):
            model = build_model(shape, parallel=sizes, rope_base=1.0, lora=lora)
            if lora is None:
                load_weights(model, committed)
                assert all("adapter" not in name for name, _ in model[0].named_parameters())
            else:
                metadata = {"non_homogeneous_layers": True}
                state = load_verified(committed.path, partial(model.sharded_state_dict, metadata=metadata))
                model.load_state_dict(state)
                model.set_rope_base(float(committed.meta.extra["rope_base"]))
                model.set_slopes(committed.meta.decay["slopes"])
                with pytest.raises(ConfigError, match="adapters beside"):
                    IncrementalModel(model[0])
            with torch.no_grad():
                out = model[0].eval()(packed_batch(tokens, [120, 180]), logits=True)
            found.append(out[0, -50:].tolist())
        return found
    finally:
        parallel.stop()


def started(job: dict[str, Any]) -> None:
    """Save as ``out`` the parameters with which another fine-tuning, of rank 2 or of all weights, starts from the first."""
    resolved = load_config(Path(job["config"]))
    manifest = open_tokenizer(resolved)
    lora = LoraConfig(stage="second", rank=2, alpha=2.0, targets=("softmax",)) if job["lora"] else None
    with open_session(with_vocab(resolved, manifest.vocab_size), [], rope_base=1e4, fresh=False, lora=lora) as run:
        run.checkpointer.tokenizer_sha256 = manifest.tokenizer_sha256
        for param in run.model.parameters():  # what a step before a roll back would have made of it
            param.data.add_(1.0)
        found = run.checkpointer.restore(run.checkpointer.finals("sft"))
        assert found is not None
        assert {*found[1].guard.series, *found[1].guard.before} == {"loss"}, "its norms were those of other parameters"
        assert sum(len(part.optimizer.state) for part in run.optimizer.parts if part.optimizer is not None) == 0
        torch.save({name: param.detach().clone() for name, param in run.model[0].named_parameters()}, job["out"])
