"""Checkpoints that are damaged, swapped, planted, half-written or out of space: never loaded in silence.

Numbers are those of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.planted import Evil, plant_object, torch_saved
from support.tiny_checkpoint import load, meta, rehash, save, state

from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint.manifest import MANIFEST, read_manifest
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError
from m1_stages.runtime import device, parallel

FILES = [".metadata", "__0_0.distcp", "metadata.json", MANIFEST]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    """Steps 10 and 20."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        save(store, step)
    return store


def newest(store: CheckpointStore) -> Path:
    return store.root / "step_00000020"


def test_round_trip_and_latest(saved: CheckpointStore) -> None:
    assert load(saved) == 20
    assert (saved.root / "LATEST").read_text() == "step_00000020\n"
    assert read_manifest(newest(saved)).meta.parent == "step_00000010"
    assert sorted(p.name for p in newest(saved).iterdir()) == sorted(FILES)


def test_an_empty_run_has_nothing_to_load(tmp_path: Path) -> None:
    assert load(CheckpointStore(tmp_path / "none")) is None


def flip_a_bit(checkpoint: Path, seed: int) -> tuple[Path, bytes]:
    """One bit of one file, each kind of file in turn; returns the file and its new content."""
    rng = random.Random(seed)
    victim = checkpoint / FILES[seed % len(FILES)]
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return victim, bytes(data)


def finds_the_flipped_bit(store: CheckpointStore, seed: int) -> None:
    """9: refused with the file's name, quarantined and not deleted, and the checkpoint before it is used."""
    victim, data = flip_a_bit(newest(store), seed)
    seen: list[str] = []
    fresh = CheckpointStore(
        store.root, on_rejected=lambda path, reason, moved: seen.append(f"{path.name} {reason} {moved.name}")
    )
    assert load(fresh) == 10
    assert len(seen) == 1
    assert victim.name in seen[0] or (victim.name == MANIFEST and "manifest" in seen[0])
    assert "step_00000020.quarantined-1" in seen[0]
    assert (store.root / "step_00000020.quarantined-1" / victim.name).read_bytes() == data


@pytest.mark.parametrize("seed", range(3 * len(FILES)))
def test_one_flipped_bit_anywhere_is_found(saved: CheckpointStore, seed: int) -> None:
    finds_the_flipped_bit(saved, seed)


@pytest.mark.faults
def test_flipped_bits_a_hundred_for_each_kind_of_file(saved: CheckpointStore, tmp_path: Path) -> None:
    for seed in range(100 * len(FILES)):
        root = tmp_path / str(seed)
        shutil.copytree(saved.root, root)
        finds_the_flipped_bit(CheckpointStore(root), seed)
        shutil.rmtree(root)


@pytest.mark.parametrize("how", ["truncate", "empty", "delete", "extra"])
@pytest.mark.parametrize("name", FILES)
def test_missing_cut_and_extra_files(saved: CheckpointStore, name: str, how: str) -> None:
    victim = newest(saved) / name
    if how == "delete":
        victim.unlink()
    elif how == "extra":
        victim.with_name(f"extra-{name}").write_bytes(b"x")
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2] if how == "truncate" else b"")
    seen: list[str] = []
    assert load(CheckpointStore(saved.root, on_rejected=lambda path, reason, moved: seen.append(reason))) == 10
    assert len(seen) == 1
    assert "\n" not in seen[0]
    assert name in seen[0] or "manifest" in seen[0]


def test_a_shard_of_another_step_is_refused(saved: CheckpointStore) -> None:
    shutil.copy(saved.root / "step_00000010" / "__0_0.distcp", newest(saved) / "__0_0.distcp")
    assert load(CheckpointStore(saved.root)) == 10


def test_when_nothing_is_left_it_stops_and_says_so(saved: CheckpointStore) -> None:
    for step in (10, 20):
        (saved.root / f"step_{step:08d}" / "metadata.json").write_bytes(b"")
    for _ in range(2):  # also the second time, when everything is in quarantine already
        with pytest.raises(CheckpointError, match="there are checkpoints, and none can be used") as caught:
            load(CheckpointStore(saved.root))
        assert "step_00000010.quarantined-1, step_00000020.quarantined-1" in caught.value.where


PLANTED = {"object in a shard": "extra", "tensor in a shard": "layer1", "plain values in a shard": "common_state"}


@pytest.mark.parametrize("name", [*FILES, *PLANTED, "common.pt", "LATEST"])
def test_a_planted_pickle_runs_nothing(saved: CheckpointStore, tmp_path: Path, name: str) -> None:
    """31: even with a manifest that matches. Megatron-Core 0.16.1 wrote ``common.pt``, and where there is one it is read."""
    proof, checkpoint = tmp_path / "proof", newest(saved)
    if name in PLANTED:
        plant_object(checkpoint / "__0_0.distcp", PLANTED[name], torch_saved(Evil(proof), proof))
    elif name == "LATEST":
        (saved.root / name).write_bytes(pickle.dumps(Evil(proof)))
    elif name in ("common.pt", "__0_0.distcp"):
        (checkpoint / name).write_bytes(torch_saved(Evil(proof), proof))
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Evil(proof)))
    if name not in (MANIFEST, "LATEST"):
        rehash(checkpoint, name)
    seen: list[str] = []
    store = CheckpointStore(saved.root, on_rejected=lambda path, reason, moved: seen.append(reason))
    if name in ("metadata.json", "__0_0.distcp"):  # no pickle is looked for there: not the checkpoint's own content
        with contextlib.suppress(Exception):
            load(store)
    else:
        assert load(store) == (20 if name == "LATEST" else 10)
    assert not proof.exists()
    if name == ".metadata":
        assert "posix.system is not allowed" in seen[0]
    if name in ("common.pt", *PLANTED):
        assert "refused to unpickle it" in seen[0]


def test_the_planted_object_would_run_without_the_restriction(saved: CheckpointStore, tmp_path: Path) -> None:
    """The test above is empty unless Megatron's reader really runs what is in a shard."""
    from megatron.core import dist_checkpointing

    proof = tmp_path / "proof"
    plant_object(newest(saved) / "__0_0.distcp", "extra", torch_saved(Evil(proof), proof))
    with contextlib.suppress(TypeError):  # about the exit status that it takes for the object
        dist_checkpointing.load(state(-1.0), str(newest(saved)))
    assert proof.exists()


def test_an_uncommitted_newer_directory_does_not_count(saved: CheckpointStore) -> None:
    """13."""
    shutil.copytree(newest(saved), saved.root / "step_00000030.tmp-abc")
    shutil.copytree(newest(saved), saved.root / "step_00000040")
    (saved.root / "step_00000040" / MANIFEST).unlink()
    assert load(CheckpointStore(saved.root)) == 20


@pytest.mark.parametrize("content", [None, "", "step_00000099\n", "\0\0"])
def test_whatever_latest_says_the_newest_is_found(saved: CheckpointStore, content: str | None) -> None:
    """20."""
    latest = saved.root / "LATEST"
    latest.unlink() if content is None else latest.write_text(content)
    assert load(CheckpointStore(saved.root)) == 20


def test_a_committed_step_is_never_overwritten(saved: CheckpointStore) -> None:
    before = {p.name: p.read_bytes() for p in newest(saved).iterdir()}
    with pytest.raises(CheckpointError, match="this step is committed already"):
        saved.save(state(99.0), meta(20))
    assert {p.name: p.read_bytes() for p in newest(saved).iterdir()} == before


def test_two_stages_that_start_from_one_have_the_same_steps(saved: CheckpointStore) -> None:
    """Fine-tuning starts from a stage, and then the next stage does: the second one must not lose its work at the first save."""
    paths = [saved.save(state(20.0), meta(20, stage=stage)) for stage in ("sft", "128k")]
    assert [path.name for path in paths] == ["step_00000020-sft", "step_00000020-128k"]
    found = {c.path.name: c.meta.stage for c in CheckpointStore(saved.root).committed() if c.meta.global_step == 20}
    assert found == {"step_00000020": "32k", "step_00000020-sft": "sft", "step_00000020-128k": "128k"}
    with pytest.raises(CheckpointError, match="this step is committed already"):
        saved.save(state(20.0), meta(20, stage="sft"))
    (saved.root / "step_00000021-sft.tmp-0123abcd").mkdir()
    saved.sweep()
    assert not list(saved.root.glob("*.tmp-*"))
    assert load(saved) == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        store = CheckpointStore(small / "checkpoints")
        save(store, 1)
        filler = os.open(small / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, b"x" * 4096)
        os.close(filler)
        with pytest.raises(CheckpointError, match=r"could not be written: .* \(0 MiB are free there\)"):
            save(store, 2)
        assert load(CheckpointStore(store.root)) == 1
        assert not list(store.root.glob("*.tmp-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
