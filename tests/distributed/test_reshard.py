"""A checkpoint is the same run in every layout: saved, loaded elsewhere, saved again, bit for bit.

Every job starts from other random weights, loads, saves before it trains, and then trains two steps: the first shows the
weights, the second what the optimizer made of its state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import filled_once, run_on_ranks
from support.tiny_checkpoint import contents_of

from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.decay import released_slopes

CONFIG = """
preset = "tiny"
[model]
hidden_size = 32
num_heads = 4
head_dim = 8
num_kv_heads = 2
rotary_dim = 8
num_experts = 4
expert_hidden_size = 48
vocab_size = 250
init_std = 0.12
aux_loss_coef = 0.02
[optim]
eps = 1e-8
[run]
threads = 1
device = "cpu"
"""

ONE, TP2, PP2, VPP2, CP2, EP2, EP4 = (
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {"expert": 2},
    {"expert": 4},
)
TP2_EP2, TP2_ETP2, TP2_PP2 = TP2 | EP2, TP2 | {"expert_tensor": 2}, TP2 | PP2
CHAINS: dict[str, list[tuple[int, dict[str, int]]]] = {
    "fp32": [(1, ONE), (2, TP2_EP2), (4, EP4), (2, VPP2), (2, CP2), (2, TP2_ETP2), (4, TP2_PP2), (1, ONE)],
    "distributed-optimizer": [(2, ONE), (1, ONE), (2, ONE)],
    "distributed-optimizer-sharded": [(4, TP2), (2, EP2), (4, PP2), (4, VPP2), (1, ONE)],
    "bf16": [(2, TP2_EP2), (1, ONE), (2, PP2)],
    "bf16-distributed-optimizer": [(4, TP2_EP2), (1, ONE), (2, CP2)],
}
"""Processes and parallel sizes of each job; the first starts, every other loads what the one before saved."""

EXPERTS, DENSE, DENSE_TP2 = 8 * 4 * 3 * 48 * 32, 57_088, 29_328
"""Parameters; norms and routers are on both tensor-parallel ranks."""
WEIGHTS = [
    (ONE, DENSE + EXPERTS),
    (CP2, DENSE + EXPERTS),
    (TP2, DENSE_TP2 + EXPERTS),
    (EP2, DENSE + EXPERTS // 2),
    (EP4, DENSE + EXPERTS // 4),
    (TP2_EP2, DENSE_TP2 + EXPERTS // 2),
    (TP2_ETP2, DENSE_TP2 + EXPERTS // 2),
    (PP2, 101_248),
    (VPP2, 101_248),
    (TP2_PP2, 87_888),
]
"""Parameters on the last rank of each layout."""
SHORT = {
    "tensor": "tp",
    "pipeline": "pp",
    "virtual_pipeline": "vpp",
    "context": "cp",
    "expert": "ep",
    "expert_tensor": "etp",
}
MUTATIONS = {"weight": "fp32-1", "moment": "fp32-1", "shared step": "distributed-optimizer-0",
             "moments forgotten": "fp32-1"}  # fmt: skip
"""What is spoilt after one process loaded a job's checkpoint."""


def jobs() -> list[dict[str, Any]]:
    planned = []
    for chain, layouts in CHAINS.items():
        for number, (world, sizes) in enumerate(layouts):
            keys = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
            load = f"{chain}-{number - 1}" if number else ""
            planned.append({"name": f"{chain}-{number}", "world": world, "set": keys + options(chain), "load": load})
    for mutation, load in MUTATIONS.items():
        planned.append({"name": mutation, "world": 1, "set": options(load), "load": load, "mutation": mutation})
    return [{**job, "seed": seed} for seed, job in enumerate(planned)]


def options(chain: str) -> list[str]:
    sharded = ["parallel.distributed_optimizer=true"] * ("distributed-optimizer" in chain)
    if chain.startswith("distributed-optimizer-sharded"):  # the first job saves what its last update has not gathered
        sharded += ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    return sharded + ['run.precision="bf16"'] * ("bf16" in chain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and records of all jobs."""

    def fill(folder: Path) -> None:
        (folder / "m1.toml").write_text(CONFIG)
        for job in jobs():
            run_on_ranks(job["world"], "distributed.reshard_worker:work", {**job, "folder": str(folder)})

    return filled_once(tmp_path_factory, "reshard", fill)


def record(folder: Path, job: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / job / "record.json").read_text())
    return values


def records(folder: Path, chain: str) -> list[dict[str, Any]]:
    return [record(folder, f"{chain}-{number}") for number in range(len(CHAINS[chain]))]


def checkpoint(folder: Path, job: str) -> Path:
    (path,) = (folder / job / "checkpoints").glob("step_*")
    return path


def contents(folder: Path, job: str) -> dict[str, Any]:
    """Everything in the job's checkpoint by global key: full tensors, and the plain values beside them."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", contents_of(checkpoint(folder, job)))
    return flat


def tensors(found: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Sharded tensors below ``prefix``, without it."""
    common = ("common.", "optimizer.") if not prefix else ("common.",)
    return {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if isinstance(value, torch.Tensor) and key.startswith(prefix) and not key.startswith(common)
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Global keys that only one has, or whose values are not bit-equal."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return bool(a == b)

    return sorted(k for k in one.keys() | other.keys() if k not in one or k not in other or not same(one[k], other[k]))


@pytest.mark.parametrize("chain", CHAINS)
def test_saved_again_from_another_layout_it_is_bit_equal(folder: Path, chain: str) -> None:
    first = contents(folder, f"{chain}-0")
    for number in range(1, len(CHAINS[chain])):
        assert differences(first, contents(folder, f"{chain}-{number}")) == [], CHAINS[chain][number]
    # Nothing is equal because it is missing: each weight has both moments, and a master where it is not its own.
    weights = tensors(first)
    assert len(weights) == 66
    assert sum(weight.numel() for weight in weights.values()) == DENSE + EXPERTS
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = tensors(first, f"optimizer.state.{moment}.")
        assert {name: m.shape for name, m in moments.items()} == {name: w.shape for name, w in weights.items()}
        assert all(m.dtype == torch.float32 and m.any() for m in moments.values())
    masters = tensors(first, f"optimizer.state.{'fp32_param' if chain == 'bf16' else 'param'}.")
    assert masters.keys() == (weights.keys() if options(chain) else set())
    assert all(torch.equal(master.to(weights[name].dtype), weights[name]) for name, master in masters.items())
    assert {m.dtype for m in masters.values()} <= {torch.float32}
    steps = [float(v) for key, v in first.items() if key.endswith((".common_step", ".step"))]
    assert len(steps) >= 2, "of the dense and of the expert parameters"
    assert set(steps) == {3.0}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_job_started_from_other_weights(folder: Path, chain: str) -> None:
    """Otherwise a load that does nothing would pass."""
    assert [r["unchanged"] for r in records(folder, chain)] == [[]] * len(CHAINS[chain])


@pytest.mark.parametrize("chain", CHAINS)
def test_decay_rates_are_restored(folder: Path, chain: str) -> None:
    rates = [[1.1 * rate for rate in row] for row in released_slopes(8, 4)]
    for number, seen in enumerate(records(folder, chain)):
        assert read_manifest(checkpoint(folder, f"{chain}-{number}")).meta.decay["slopes"] == rates
        used = {int(layer): heads for layer, heads in seen["decay"].items() if heads}
        assert len(used) == (3 if CHAINS[chain][number][1] in (PP2, VPP2, TP2_PP2) else 7), (
            "lightning layers of the last rank"
        )
        for layer, heads in used.items():
            assert heads == torch.tensor(rates[layer - 1])[-len(heads) :].tolist()


@pytest.mark.parametrize("chain", CHAINS)
def test_training_goes_on_as_if_nothing_had_happened(folder: Path, chain: str) -> None:
    """The first job of a chain loaded nothing: it is the run that was never cut.

    In fp32 layouts differ by the order of sums. In bf16 every activation is rounded (2^-9 relative) after sums that
    tensor, expert and data parallelism take in another order: Megatron's own parity runs differ by up to 3e-3.
    """
    seen = records(folder, chain)
    for step, bound in enumerate((3e-3, 3e-3) if "bf16" in chain else (1e-6, 1e-6)):
        losses = [r["losses"][step] for r in seen]
        assert max(losses) - min(losses) < bound, losses
    assert [r["adam_steps"] for r in seen] == [[5.0]] * len(seen)


@pytest.mark.parametrize("chain", CHAINS)
def test_layouts_were_sharded(folder: Path, chain: str) -> None:
    expected = {tuple(sorted(sizes.items())): weights for sizes, weights in WEIGHTS}
    for number, (world, sizes) in enumerate(CHAINS[chain]):
        seen, meta = record(folder, f"{chain}-{number}"), read_manifest(checkpoint(folder, f"{chain}-{number}")).meta
        size = meta.topology
        assert size | {SHORT[axis]: n for axis, n in sizes.items()} | {"world": world} == size
        assert seen["weights"] == expected[tuple(sorted(sizes.items()))]
        experts = EXPERTS // size["ep"] // size["etp"] // size["pp"]
        shares = size["dp"] * size["cp"], world // size["ep"] // size["etp"] // size["pp"]
        if "distributed-optimizer" not in chain:
            shares = 1, 1
        state = (seen["weights"] - experts) / shares[0] + experts / shares[1]
        assert seen["moments"] == pytest.approx(state, rel=0.01), "shards are cut at multiples of 128"


@pytest.mark.parametrize(
    ("mutation", "named"),
    [
        ("weight", "decoder.layers.3.mlp.router.weight"),
        ("moment", "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight"),
    ],
)
def test_one_changed_bit_is_named(folder: Path, mutation: str, named: str) -> None:
    assert differences(contents(folder, MUTATIONS[mutation]), contents(folder, mutation)) == [named]


@pytest.mark.parametrize("mutation", ["shared step", "moments forgotten"])
def test_the_second_loss_shows_wrong_optimizer_state(folder: Path, mutation: str) -> None:
    right, wrong = record(folder, MUTATIONS[mutation]), record(folder, mutation)
    assert abs(wrong["losses"][0] - right["losses"][0]) < 1e-6, "the first loss shows the weights only"
    assert abs(wrong["losses"][1] - right["losses"][1]) > 1e-3


@pytest.mark.parametrize(
    ("world", "sizes", "more"),
    [
        (2, ONE, []),
        (4, TP2_EP2, ['run.precision="bf16"', "parallel.overlap_grad_reduce=true"]),
    ],
    ids=["DP2", "TP2 EP2 DP2 in buckets"],
)
def test_the_distributed_optimizers_state_is_gathered_as_megatron_does(
    tmp_path: Path, world: int, sizes: dict[str, int], more: list[str]
) -> None:
    (tmp_path / "m1.toml").write_text(CONFIG)
    settings = [f"parallel.{axis}={size}" for axis, size in sizes.items()] + more
    settings += ["parallel.distributed_optimizer=true", f"run.dir={tmp_path / 'run'}"]
    job = {"folder": str(tmp_path), "set": settings}
    for seen in run_on_ranks(world, "distributed.reshard_worker:gathered", job):
        assert seen["different"] == []
        assert seen["meta"]
        assert seen["same keys"]
        assert seen["Megatron's way is back"]
        assert seen["numbers"] == 3 * {str(k): v for k, v in WEIGHTS}[str(sizes)]
        assert seen["pieces"] > 300
