"""Fine-tuning with adapters: the weights stay, a cut run continues exactly, and merging changes no logit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config import ModelConfig
from m1_stages.config.lora import adapter_name
from m1_stages.hf.checkpoint_tensors import CheckpointSource
from m1_stages.hf.tensor_names import our_shapes

LORA = """
[sft]
data = ["chats.jsonl"]
base_stage = "32k"
epochs = 4
global_batch_tokens = 1024
lr_peak = 0.02
lr_final = 0.02
lora_rank = 3
lora_alpha = 6.0
lora_targets = ["softmax", "lightning", "router"]
"""
BASE, FINAL = "step_00000006", "step_00000010"


def train(config: Path, stage: str, **job: Any) -> dict[str, Any]:
    job |= {"config": str(config), "stages": [stage], "events": str(config.parent / "events.jsonl")}
    (ended,) = run_on_ranks(1, "support.pretraining:pretrained", job, timeout_s=200)
    return dict(ended)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the first stage trained."""
    folder = tmp_path_factory.mktemp("base")
    config = make_run(folder, LORA)
    chats = [{"messages": [{"role": "user", "content": f"{n} + 5"}, {"role": "assistant", "content": f"It is {n + 5}"}]}
             for n in range(12)]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    assert train(config, "32k")["exit"] == 0
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, fine-tuned with adapters for four steps."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(base, folder)
    ended = train(folder / "m1.toml", "sft")
    assert ended["exit"] == 0, ended["error"]
    return folder


def checkpoint(folder: Path, name: str) -> Path:
    return folder / "run" / "checkpoints" / name


def weight_keys(checkpoint: Path) -> list[str]:
    return list(our_shapes(ModelConfig(**read_manifest(checkpoint).meta.extra["model"])))


def test_only_adapters_are_trained_and_have_optimizer_state(tuned: Path) -> None:
    before, after = (tensors_of(checkpoint(tuned, name)) for name in (BASE, FINAL))
    weights = [f".{name}" for name in weight_keys(checkpoint(tuned, FINAL))]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    adapters = [
        name for name in after if name.endswith(("adapter.a", "adapter.b")) and not name.startswith(".optimizer")
    ]
    assert len(adapters) == 2 * (2 * 8 + 8), "in, out and router of eight layers"
    assert all(float(after[name].abs().max()) > 1e-3 for name in adapters), "b began as 0"
    moments = [name for name in after if name.startswith(".optimizer") and after[name].dim()]
    assert len(moments) == 2 * len(adapters)
    assert sum(after[name].numel() for name in moments) == 2 * sum(after[name].numel() for name in adapters)


def test_a_cut_run_continues_exactly(base: Path, tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    assert train(folder / "m1.toml", "sft", stop_at=7)["exit"] == 75
    assert train(folder / "m1.toml", "sft")["exit"] == 0
    mine, theirs = (tensors_of(checkpoint(path, FINAL)) for path in (folder, tuned))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    losses = [[event["loss"] for event in events_of(path / "events.jsonl", "StepDone")] for path in (folder, tuned)]
    assert losses[0] == losses[1]


def test_merged_weights_give_the_logits_of_adapters(tuned: Path) -> None:
    """In one process and cut over two; the adapters say something: without them the logits are others."""
    job = {"checkpoint": str(checkpoint(tuned, FINAL))}
    (alone,) = run_on_ranks(1, "golden.lora_worker:logits", job)
    beside, merged = map(torch.tensor, alone)
    assert float((beside - merged).abs().max()) < 1e-5
    source = CheckpointSource(read_manifest(checkpoint(tuned, FINAL)))
    moved = [name for name in weight_keys(checkpoint(tuned, FINAL)) if adapter_name(name)]
    assert len(moved) == 3 * 8
    for name in moved:
        a, b = (source.stored(f"{adapter_name(name)}.{part}") for part in "ab")
        assert torch.allclose(source.get(name), source.stored(name) + 2.0 * b @ a, atol=1e-7)
        assert float((source.get(name) - source.stored(name)).abs().max()) > 1e-3


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "all weights"])
def test_the_next_fine_tuning_starts_from_merged_weights(tuned: Path, tmp_path: Path, lora: bool) -> None:
    job = {"config": str(tuned / "m1.toml"), "lora": lora, "out": str(tmp_path / "started.pt")}
    run_on_ranks(1, "golden.lora_worker:started", job)
    started = torch.load(tmp_path / "started.pt")
    source = CheckpointSource(read_manifest(checkpoint(tuned, FINAL)))
    for name in weight_keys(checkpoint(tuned, FINAL)):
        assert torch.equal(started.pop(name), source.get(name)), name
    assert len(started) == (4 if lora else 0), "its own adapters"
    for name, value in started.items():
        assert (float(value.abs().max()) == 0) == name.endswith(".b"), "they are as at the beginning"


def test_other_adapters_cannot_go_on(tuned: Path) -> None:
    ended = train(tuned / "m1.toml", "sft", set=["sft.lora_rank=0"])
    assert ended["exit"] == 2
    assert "sft.lora_rank 3 -> 0: fixed within fine-tuning" in ended["error"]
