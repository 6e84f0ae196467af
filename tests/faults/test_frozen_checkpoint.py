"""Checkpoints of version 0.1.0 that are kept in the repository still load; one of another format is refused by name.

Number 7 of docs/reliability.md. ``frozen/make.py`` and ``support/frozen_sharded.py`` wrote them, with Megatron-Core 0.16.1; a
change of the format needs a new one beside them, not instead.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_on_ranks

from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint import manifest as manifest_module
from m1_stages.checkpoint.manifest import MANIFEST, read_manifest
from m1_stages.errors import CheckpointError

FROZEN = Path(__file__).with_name("frozen")


def _make() -> Any:
    spec = importlib.util.spec_from_file_location("make_frozen", FROZEN / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    target = tmp_path / "run" / "checkpoints" / "step_00000007"
    shutil.copytree(FROZEN / "step_00000007", target)
    return tmp_path / "run"


def test_it_still_loads(run_dir: Path) -> None:
    make = _make()
    with make.session(run_dir.parent) as opened:
        found = opened.checkpointer.restore(opened.checkpointer.store.committed())
        assert found is not None
        committed, state = found
        values = dict(make.tensors(opened))
        parameters = sum(1 for _ in opened.model.parameters())
    assert committed.meta.versions["m1cli"] == "0.1.0"
    assert state == make.position()
    assert len(values) == 3 * parameters == 54, "each with both moments"
    wrong = [name for name, tensor in values.items() if not torch.equal(tensor, make.expected(name, tensor))]
    assert wrong == []
    assert len({float(tensor.sum()) for tensor in values.values()}) > len(values) // 2, "they differ from each other"


@pytest.mark.parametrize(
    ("world", "sizes"), [(4, {"tensor": 2, "pipeline": 2, "expert": 2}), (1, {})], ids=["TP2 PP2 EP2", "one process"]
)
def test_that_of_four_ranks_still_loads(world: int, sizes: dict[str, int], tmp_path: Path) -> None:
    """bf16 weights, fp32 masters and both moments of TP2 PP2 EP2, in the same layout and in another."""
    written = read_manifest(FROZEN / "four-ranks" / "step_00000007").meta
    assert written.versions["megatron-core"] == "0.16.1"
    assert (written.topology["tp"], written.topology["pp"], written.topology["ep"]) == (2, 2, 2)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(FROZEN / "four-ranks", checkpoints)
    job = {"folder": str(tmp_path), "checkpoints": str(checkpoints), "parallel": sizes}
    ranks = run_on_ranks(world, "support.frozen_sharded:read", job)
    assert [rank["wrong"] for rank in ranks] == [[]] * world
    assert len({name for rank in ranks for name in rank["names"]}) == 72, (
        "18 weights, each with a master and both moments"
    )
    assert [(rank["steps"], rank["position"]) for rank in ranks] == [([7.0], True)] * world


def test_another_format_is_refused_by_name_and_left_alone(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step_00000007"
    values = json.loads((path / MANIFEST).read_text())
    del values["sha256"]
    later = {**values, "format": 3, "meta": {**values["meta"], "versions": {"m1cli": "3.1.4"}}, "shards": []}
    (path / MANIFEST).write_text(manifest_module._text(later))
    store = CheckpointStore(path.parent)
    for listing in (store.committed, store.latest, lambda: store.load_first_verified([], dict)):
        with pytest.raises(
            CheckpointError, match=r"manifest format 3, written by m1cli 3\.1\.4; this is .* formats 1 to 2"
        ):
            listing()
    assert [p.name for p in path.parent.iterdir()] == ["step_00000007"], "not quarantined: nothing is wrong with it"
    (path / MANIFEST).write_text(json.dumps(later | {"sha256": "0"}))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_manifest(path)
