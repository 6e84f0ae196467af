"""A stop is asked for wherever a run can be; it is always saved, and continues as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

from m1_stages.checkpoint.manifest import read_manifest


def start(folder: Path, place: str) -> None:
    job = {"config": str(folder / "m1.toml"), "stages": "32k", "place": place}
    (ended,) = run_on_ranks(1, "faults.stop_worker:train", job, fresh=True)
    assert ended["exit"] == (0 if place == "none" else 75), f"{place}: {ended['error']}"


def newest(folder: Path) -> Path:
    return sorted((folder / "run" / "checkpoints").glob("step_????????"))[-1]


def test_a_stop_anywhere_is_saved_and_continued(tmp_path: Path) -> None:
    """Reading rows, the first forward pass (where kernels are compiled), between micro-batches, saving, measuring."""
    (tmp_path / "prepared").mkdir()
    make_run(tmp_path / "prepared")
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    for folder in (uncut, cut):
        shutil.copytree(tmp_path / "prepared", folder)
        text = (folder / "m1.toml").read_text().replace("save_every_steps = 100", "save_every_steps = 5")
        micro = "[stages.32k]\nmicro_batch_rows = 4\n"
        text = text.replace("enabled = false", "enabled = true\nsamples = 1")
        text = text.replace("[stages.32k]\ntokens = 6144\n", f"{micro}tokens = 8192\n")
        (folder / "m1.toml").write_text(text)
    start(uncut, "none")
    steps = []
    for place in ("data", "forward", "micro-batch", "save", "evaluate"):
        start(cut, place)
        meta = read_manifest(newest(cut)).meta
        steps.append(meta.global_step)
        assert (meta.stage, meta.stage_final) == ("32k", place == "evaluate")
        assert (cut / "run" / "evaluation" / "32k.json").exists() is False
    assert steps == sorted(set(steps)), "each part trained and saved something"
    assert steps[-1] == 8
    start(cut, "none")
    assert (cut / "run" / "evaluation" / "32k.json").exists(), "measured at the next start"
    mine, theirs = tensors_of(newest(cut)), tensors_of(newest(uncut))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_one_rank_asked_is_enough() -> None:
    job = {"parallel": {}, "steps": 4, "fault": "stop asked", "rank": 3, "step": 1}
    for seen in run_on_ranks(4, "distributed.guard_worker:train", job):
        assert seen["error"]["code"] == 75
        assert seen["step"] == 2, "after the step in which it was asked"
