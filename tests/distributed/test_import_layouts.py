"""What was exported from TP2 x EP2 x PP2 and from one process is imported into both, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exporting import contents, make_tokenizer
from support.importing import released_tensors, write_source
from support.ranks import filled_once, run_on_ranks
from support.tiny_checkpoint import contents_of

from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config.load import load_config
from m1_stages.hf.checkpoint_tensors import CheckpointSource
from m1_stages.hf.export import export
from m1_stages.hf.tensor_names import from_released, our_shapes
from m1_stages.jobs import import_model

CONFIG = """
preset = "tiny"
[model]
hidden_size = 32
num_heads = 4
head_dim = 8
num_kv_heads = 2
rotary_dim = 4
num_experts = 4
expert_hidden_size = 48
vocab_size = 300
init_std = 0.12
[run]
threads = 1
device = "cpu"
"""
ALL = ["parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"]
BF16, SHARDED = ['run.precision="bf16"'], ["parallel.distributed_optimizer=true"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {"TP2 EP2 PP2": (4, ALL), "one process": (1, [])}
TAKEN: dict[str, tuple[str, int, list[str]]] = {
    "TP2 EP2 PP2 from one process": ("one process", *LAYOUTS["TP2 EP2 PP2"]),
    "one process from TP2 EP2 PP2": ("TP2 EP2 PP2", *LAYOUTS["one process"]),
    "bf16": ("released", 1, BF16),
    "bf16 EP2 DP2 sharded": ("released", 2, ["parallel.expert=2", *BF16, *SHARDED]),
}
"""What each job starts from (the export of another job, or a folder with the released dtypes), processes and settings."""

Seen = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """The folder with the checkpoints of all jobs, and what every rank of each saw."""

    def fill(folder: Path) -> None:
        seen: dict[str, list[dict[str, Any]]] = {}
        (folder / "m1.toml").write_text(CONFIG)
        model = load_config(folder / "m1.toml").config.model
        tokenizer = make_tokenizer(folder / "tokenizer")
        write_source(folder / "hf released", model, with_tokenizer=False)

        def work(name: str, world: int, settings: list[str], load: str, seed: int) -> None:
            job = {"name": name, "set": settings, "load": load, "seed": seed, "folder": str(folder)}
            seen[name] = run_on_ranks(world, "distributed.import_worker:work", job)

        for name, (world, sizes) in LAYOUTS.items():
            work(name, world, sizes, "", 1)
            source = CheckpointSource(read_manifest(checkpoint(folder, name)))
            export(source, folder / f"hf {name}", contents(tokenizer, model), shard_bytes=50_000)
        for name in (*LAYOUTS, "released"):
            resolved = load_config(folder / "m1.toml", [f"run.dir={folder}/import {name}"])
            import_model.run(resolved, folder / f"hf {name}")
        for seed, (name, (made, world, sizes)) in enumerate(TAKEN.items(), 2):
            work(name, world, sizes, f"import {made}", seed)
        (folder / "seen.json").write_text(json.dumps(seen))

    folder = filled_once(tmp_path_factory, "import", fill)
    return folder, json.loads((folder / "seen.json").read_text())


def checkpoint(folder: Path, job: str) -> Path:
    (path,) = (folder / job / "checkpoints").glob("step_*")
    return path


def tensors(folder: Path, job: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Sharded tensors below ``prefix``, without it."""
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}" if path else str(key), item)
        elif isinstance(value, torch.Tensor) and path.startswith(prefix):
            flat[path.removeprefix(prefix)] = value

    walk("", contents_of(checkpoint(folder, job)))
    return {key: value for key, value in flat.items() if key.startswith(("decoder.", "embedding.", "output_layer."))}


@pytest.mark.parametrize("name", [name for name in TAKEN if " from " in name])
def test_weights_are_bit_equal(ran: tuple[Path, Seen], name: str) -> None:
    folder, _ = ran
    mine, theirs = tensors(folder, name), tensors(folder, TAKEN[name][0])
    assert len(theirs) == 66
    assert mine.keys() == theirs.keys()
    rows = 300  # the rows of the vocabulary's padding are not exported, and no token has them
    for key, expected in theirs.items():
        padded = "embedding" in key or "output_layer" in key
        assert torch.equal(mine[key][:rows] if padded else mine[key], expected[:rows] if padded else expected), key
    assert torch.equal(
        theirs["decoder.layers.0.mlp.router.weight"],
        tensors(folder, "one process")["decoder.layers.0.mlp.router.weight"],
    )


@pytest.mark.parametrize("name", [name for name in TAKEN if name.startswith("bf16")])
def test_master_weights_start_from_the_imported_fp32_values(ran: tuple[Path, Seen], name: str) -> None:
    folder, _ = ran
    model = load_config(folder / "m1.toml").config.model
    source = released_tensors(model)
    masters = tensors(folder, name, "optimizer.state.fp32_param." if name == "bf16" else "optimizer.state.param.")
    weights = tensors(folder, name)
    assert masters.keys() == weights.keys() == our_shapes(model).keys()
    rounded = 0
    for key, master in masters.items():
        expected = from_released(key, source.__getitem__, model)
        assert master.dtype == torch.float32
        assert torch.equal(master, expected.float()), key
        assert torch.equal(weights[key], expected.bfloat16()), key
        rounded += not torch.equal(master, expected.bfloat16().float())
    assert rounded == model.num_layers, "the routers, which bf16 does not hold"


def test_all_layouts_begin_with_the_same_loss(ran: tuple[Path, Seen]) -> None:
    losses = {name: [rank["loss"] for rank in ranks] for name, ranks in ran[1].items()}
    fp32 = [loss for name, seen in losses.items() if not name.startswith("bf16") for loss in seen]
    assert max(fp32) - min(fp32) < 1e-6, losses
    bf16 = [loss for name, seen in losses.items() if name.startswith("bf16") for loss in seen]
    assert max(bf16) - min(bf16) < 3e-3, losses
    assert abs(min(bf16) - min(fp32)) > 0.01, "other weights have another loss"


@pytest.mark.parametrize("name", TAKEN)
def test_loaded_again_it_trains_with_a_fresh_optimizer(ran: tuple[Path, Seen], name: str) -> None:
    """As when a run is rolled back to it: no moment and no step of the first time is left."""
    for rank in ran[1][name]:
        first, again = rank["twice"]
        assert first == again
