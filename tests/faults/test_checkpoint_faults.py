"""Checkpoints that are damaged, swapped, planted, half-written or out of space: never loaded in silence."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m1_data.errors import CheckpointError
from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.checkpoint import store as store_module
from m1_stages.checkpoint.files import sha256_of
from m1_stages.checkpoint.manifest import MANIFEST, read_manifest
from m1_stages.config import ParallelConfig
from m1_stages.engine import device, parallel


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


def state(value: float) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    weights = {
        f"layer{n}": ShardedTensor.from_rank_offsets(f"layer{n}", torch.full((40, 30), value + n), replica_id=0)
        for n in range(3)
    }
    return {"model": weights, "train_state": {"value": value}}


def meta(step: int, *, stage: str = "32k", final: bool = False) -> CheckpointMeta:
    return CheckpointMeta(
        stage=stage, stage_step=step, global_step=step, stage_final=final, config_sha256="c", data_fingerprint="d",
        topology={"world": 1}, decay={"policy": "fixed", "slopes": [[0.5]]},
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        store.save(state(float(step)), meta(step))
    return store


def load(store: CheckpointStore) -> tuple[int, float] | None:
    found = store.load_first_verified(store.committed(), lambda: state(-1.0))
    if found is None:
        return None
    committed, loaded = found
    assert torch.equal(loaded["model"]["layer2"], torch.full((40, 30), committed.meta.global_step + 2.0))
    return committed.meta.global_step, loaded["train_state"]["value"]


def test_round_trip_and_latest(saved: CheckpointStore) -> None:
    assert load(saved) == (20, 20.0)
    assert (saved.root / "LATEST").read_text() == "step_00000020\n"
    assert read_manifest(saved.root / "step_00000020").meta.parent == "step_00000010"


def test_an_empty_run_has_nothing_to_load(tmp_path: Path) -> None:
    assert load(CheckpointStore(tmp_path / "none")) is None


@pytest.mark.parametrize("seed", range(25))
def test_one_flipped_bit_anywhere_is_found(saved: CheckpointStore, seed: int) -> None:
    rng = random.Random(seed)
    newest = saved.root / "step_00000020"
    files = sorted(p for p in newest.iterdir() if p.is_file())
    victim = files[seed % len(files)]
    data = bytearray(victim.read_bytes())
    position = rng.randrange(len(data))
    data[position] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    seen: list[str] = []
    store = CheckpointStore(
        saved.root, on_rejected=lambda path, reason, moved: seen.append(f"{path.name} {reason} {moved.name}")
    )
    assert load(store) == (10, 10.0)
    assert len(seen) == 1
    assert victim.name in seen[0] or (victim.name == MANIFEST and "manifest" in seen[0])
    assert (saved.root / "step_00000020.quarantined-1" / victim.name).read_bytes() == data, "put aside, not deleted"


@pytest.mark.parametrize("how", ["truncate", "empty", "delete", "extra"])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json", MANIFEST])
def test_missing_cut_and_extra_files(saved: CheckpointStore, name: str, how: str) -> None:
    victim = saved.root / "step_00000020" / name
    if how == "delete":
        victim.unlink()
    elif how == "extra":
        victim.with_name(f"extra-{name}").write_bytes(b"x")
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2] if how == "truncate" else b"")
    assert load(CheckpointStore(saved.root)) == (10, 10.0)


def test_a_shard_of_another_step_is_refused(saved: CheckpointStore) -> None:
    shutil.copy(saved.root / "step_00000010" / "__0_0.distcp", saved.root / "step_00000020" / "__0_0.distcp")
    assert load(CheckpointStore(saved.root)) == (10, 10.0)


def test_when_nothing_is_left_it_stops_and_says_so(saved: CheckpointStore) -> None:
    for step in (10, 20):
        (saved.root / f"step_{step:08d}" / "common.pt").write_bytes(b"")
    for _ in range(2):  # also the second time, when everything is in quarantine already
        with pytest.raises(CheckpointError, match="there are checkpoints, and none can be used") as caught:
            load(CheckpointStore(saved.root))
        assert "quarantined" in caught.value.where


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_planted_pickle_runs_nothing(saved: CheckpointStore, tmp_path: Path, name: str) -> None:
    """Even with a manifest that matches: whoever plants a file can also write a manifest."""
    newest, proof = saved.root / "step_00000020", tmp_path / "proof"
    (newest / name).write_bytes(pickle.dumps(Evil(proof)))
    committed = read_manifest(newest)
    files = {**committed.files, name: ((newest / name).stat().st_size, sha256_of(newest / name))}
    (newest / MANIFEST).write_text(store_module.manifest_text(committed.meta, files))
    seen: list[str] = []
    store = CheckpointStore(saved.root, on_rejected=lambda path, reason, moved: seen.append(reason))
    assert load(store) == (10, 10.0)
    assert not proof.exists()
    if name == ".metadata":
        assert "posix.system is not allowed" in seen[0]


@pytest.mark.parametrize("point", ["Snapshot", "Writer", "manifest_text", "flush", "write_durably"])
def test_dying_at_any_point_leaves_the_older_checkpoint(
    saved: CheckpointStore, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    class Dead(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(store_module, point, die)
        with pytest.raises(Dead):
            saved.save(state(30.0), meta(30))
    assert load(CheckpointStore(saved.root)) == (20, 20.0)
    CheckpointStore(saved.root).save(state(30.0), meta(30))
    assert load(CheckpointStore(saved.root)) == (30, 30.0)
    assert not list(saved.root.glob("*.tmp-*")), "what the dead save left is swept"


def test_uncommitted_newer_directory_and_missing_latest(saved: CheckpointStore) -> None:
    shutil.copytree(saved.root / "step_00000020", saved.root / "step_00000030.tmp-abc")
    (saved.root / "LATEST").unlink()
    assert load(CheckpointStore(saved.root)) == (20, 20.0)


def test_a_committed_step_is_never_overwritten(saved: CheckpointStore) -> None:
    before = {p.name: p.read_bytes() for p in (saved.root / "step_00000020").iterdir()}
    with pytest.raises(CheckpointError, match="this step is committed already"):
        saved.save(state(99.0), meta(20))
    assert {p.name: p.read_bytes() for p in (saved.root / "step_00000020").iterdir()} == before


def test_retention_keeps_the_newest_and_every_stage_final(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in range(1, 9):
        store.save(state(float(step)), meta(step, final=step in (3, 6)))
    assert [c.meta.global_step for c in store.committed()] == [8, 7, 6, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        store = CheckpointStore(small / "checkpoints")
        store.save(state(1.0), meta(1))
        filler = os.open(small / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, b"x" * 4096)
        os.close(filler)
        with pytest.raises(CheckpointError, match=r"could not be written: .* \(0 MiB are free there\)"):
            store.save(state(2.0), meta(2))
        assert load(CheckpointStore(store.root)) is not None
        assert not list(store.root.glob("*.tmp-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
