"""Megatron-Core's traps in saving and loading, sprung on purpose: docs/traps.md names them."""

from __future__ import annotations

import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_on_ranks

from m1_stages.checkpoint import CheckpointStore
from m1_stages.errors import EnvironmentProblem


def resumed(folder: Path, mutation: str = "") -> dict[str, Any]:
    (result,) = run_on_ranks(1, "distributed.saving_worker:resume", {"folder": str(folder), "mutation": mutation})
    return dict(result)


def test_every_parameter_counts_its_own_steps_after_a_load(tmp_path: Path) -> None:
    found = resumed(tmp_path)
    assert found["came_back"] == found["went_on"]
    assert found["counters"] == [7.0]


def test_one_step_counter_for_all_parameters_is_found(tmp_path: Path) -> None:
    """The first loss after the load is right: it takes a second step to see it."""
    found = resumed(tmp_path, "one step counter for all parameters")
    assert found["mutated"] == 1
    assert found["came_back"][0] == found["went_on"][0]
    assert max(abs(a - b) for a, b in zip(found["came_back"], found["went_on"], strict=True)) > 1e-3
    assert found["counters"] != [7.0]


def test_saving_without_psutil_does_not_hang(tmp_path: Path) -> None:
    """Megatron's own writers die of it, and the save waits for those of a second file for ever; ours need none."""
    (answer,) = run_on_ranks(1, "distributed.saving_worker:save_without_psutil", {"folder": str(tmp_path)})
    assert answer == [".metadata", "__0_0.distcp", "metadata.json"]


def test_starting_without_psutil_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(EnvironmentProblem, match="checkpoints need psutil") as caught:
        CheckpointStore(tmp_path)
    assert caught.value.fix == "pip install psutil"


def test_psutil_is_declared() -> None:
    """megatron-core needs it and does not say so."""
    assert any(line.startswith("psutil") and "extra" not in line for line in requires("m1cli") or ())
    assert not any(line.startswith("psutil") for line in requires("megatron-core") or ()), "ours may go now"


def test_a_part_that_one_rank_refuses_is_refused_by_all(tmp_path: Path) -> None:
    """Each rank reads for itself, and without a word to the other each would go on with another checkpoint."""
    seen = run_on_ranks(2, "distributed.saving_worker:one_part_refused", {"folder": str(tmp_path)}, timeout_s=60)
    assert seen == [{"step": 1, "mine": 1, "ran": False}] * 2
    assert (tmp_path / "step_00000002.quarantined-1").is_dir()


def test_background_saves_of_two_ranks(tmp_path: Path) -> None:
    """Nothing is committed before both have written; what goes wrong on one is told by both, and the next save works."""
    seen = run_on_ranks(2, "distributed.saving_worker:background_saves", {"folder": str(tmp_path)})
    for rank in (0, 1):
        early, first, full, stuck, dumped, refused, again, *loaded = seen[rank]
        assert early is None
        assert first == "step_00000001"
        assert "No space left on device" in full
        assert full.endswith("rank 1")
        assert "its writer has not moved for" in stuck
        assert stuck.endswith("rank 1")
        assert dumped == rank, "only the rank whose writer is stuck writes its stacks"
        assert "still stuck" in refused
        assert again == "step_00000005"
        assert loaded == ([] if rank else ["step_00000001", [10.0] * 4 + [11.0] * 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001", "step_00000005"]


def test_what_two_ranks_hold_each_writes_half_of(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, "distributed.saving_worker:replicas", {"folder": str(tmp_path)})
    assert first == second
    assert first["values"] == [[float(n)] for n in range(8)]
    sizes = {name.split("_")[2]: size for name, size in first["written"].items()}
    assert sizes.keys() == {"0", "1"}
    assert 16_000 < sizes["0"] < 28_000
    assert 16_000 < sizes["1"] < 28_000
