"""Exports that are interrupted or killed, and who may read what commands write."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.exporting import MODEL, make_checkpoint, make_tokenizer, weights, write
from support.tiny_run import make_run

from m1_data.storage.durable import write_atomically
from m1_data.storage.ownership import temporary_sibling, write_whole
from m1_data.storage.process import ProcessId, this_process
from m1_stages.hf.checkpoint_tensors import CheckpointSource, MemorySource


class Stopped(KeyboardInterrupt):
    """What the command line raises when it is asked to stop."""


def stop(*arguments: Any, **named: Any) -> None:
    raise Stopped("SIGTERM")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("moment", ["ShardWriter.add", "ShardWriter.close", "flush", "_put_in_place"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stopped_export_leaves_what_was_there(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, moment: str, overwrite: bool
) -> None:
    if overwrite:
        write(tmp_path / "hf", tokenizer_dir)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(f"m1_stages.hf.export.{moment}", stop)
    with pytest.raises(Stopped):
        write(tmp_path / "hf", tokenizer_dir, dtype="bf16", overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["hf"] if overwrite else [])


def test_the_next_export_sweeps_what_a_killed_one_left(tmp_path: Path, tokenizer_dir: Path) -> None:
    me = this_process()
    dead = tmp_path / f".hf.tmp-{ProcessId(me.machine, me.pid, me.started + 1)}-0123abcd"
    alive = temporary_sibling(tmp_path / "hf")
    mine = tmp_path / ".hf.tmp-mine"
    for folder in (dead, alive, mine):
        folder.mkdir()
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"half")
    write(tmp_path / "hf", tokenizer_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["hf", alive.name, mine.name])


def test_a_stop_while_a_checkpoint_is_read_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, expected = make_checkpoint(tmp_path / "run")
    source = CheckpointSource(committed)
    name = next(iter(expected))
    for error in (Stopped, OSError):

        def fail(*arguments: Any, error: type[BaseException] = error, **named: Any) -> None:
            raise error("in the reader")

        with monkeypatch.context() as planted:
            planted.setattr("torch.distributed.checkpoint.filesystem.FileSystemReader.read_data", fail)
            with pytest.raises(error, match="in the reader"):
                source.get(name)
    assert source.get(name).equal(expected[name])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_mode_that_the_user_asks_for(tmp_path: Path, tokenizer_dir: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "data").mkdir()
        make_run(tmp_path / "data")
        make_checkpoint(tmp_path / "run")
        write(tmp_path / "hf", tokenizer_dir)
        write_atomically(tmp_path / "state.json", "{}")
        write_whole(tmp_path / "report.html", "")
    finally:
        os.umask(before)
    found = {p.relative_to(tmp_path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert len([name for name in found if name.startswith(("data/data/", "run/checkpoints/step", "hf/"))]) > 25
    for name, mode in found.items():
        assert oct(mode) == oct((0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask), name


def test_weights_are_written_one_tensor_at_a_time(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A tensor is on the disk, but for Python's buffer, before the next one is read."""
    written: list[int] = []

    class Watched(MemorySource):
        def get(self, name: str) -> Any:
            files = list(tmp_path.glob(".hf.tmp-*/*.safetensors"))
            written.append(sum(path.stat().st_size for path in files))
            return super().get(name)

    report = write(tmp_path / "hf", tokenizer_dir, source=Watched(weights(MODEL)), shard_bytes=1 << 40)
    assert len(report.files) == 1
    assert written[-1] > 0.9 * report.num_bytes
    assert sum(a < b for a, b in pairwise(written)) > 15
