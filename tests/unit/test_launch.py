"""What a rank started by srun or torchrun is told."""

from __future__ import annotations

import os

import pytest

from m1_data.errors import EnvironmentProblem
from m1cli import launch

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_step_of_srun_becomes_a_rank(slurm: pytest.MonkeyPatch) -> None:
    assert launch.is_worker()
    launch.adopt_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "127.0.0.1", "29500"]


def test_several_machines_need_an_address(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(EnvironmentProblem, match="several machines"):
        launch.adopt_slurm()


def test_a_batch_script_alone_is_no_rank(slurm: pytest.MonkeyPatch) -> None:
    slurm.delenv("SLURM_STEP_ID")
    assert not launch.is_worker()


def test_torchrun_has_the_last_word(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("RANK", "0")
    launch.adopt_slurm()
    assert os.environ["RANK"] == "0"
    assert "WORLD_SIZE" not in os.environ
