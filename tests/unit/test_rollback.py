"""What a roll back leaves in the state that is loaded after it, also by a process that is started later."""

from __future__ import annotations

import pytest

from m1_stages.guard import GuardState
from m1_stages.training.rollback import RollbackRecord, apply_rollback_exclusions
from m1_stages.training.train_state import TrainState


def loaded(global_step: int) -> TrainState:
    return TrainState(
        stage="128k",
        slopes=[[0.5]],
        global_step=global_step,
        ramp_progress=0.5,
        excluded_steps=[1],
        guard=GuardState(skipped=[8]),
        first_loss=4.5,  # the default, NaN, does not equal itself
    )


def record(to: int, excluded: tuple[int, ...], ramp: float) -> RollbackRecord:
    return RollbackRecord("128k", "data", to, excluded, "spike", ramp)


@pytest.mark.parametrize(
    ("global_step", "ramp", "skipped"),
    [(14, 0.2, []), (13, 0.2, []), (15, 0.5, [8])],
    ids=["the one gone back to", "one before it", "one made after it"],
)
def test_ramp_and_budget_are_those_of_the_run_that_rolled_back(
    global_step: int, ramp: float, skipped: list[int]
) -> None:
    state = apply_rollback_exclusions(loaded(global_step), [record(10, (3,), 0.9), record(14, (4, 5), 0.2)])
    assert (state.ramp_progress, state.guard.skipped, state.excluded_steps) == (ramp, skipped, [1, 3, 4, 5])


def test_the_ramp_is_never_put_forward() -> None:
    assert apply_rollback_exclusions(loaded(14), [record(14, (4,), 0.9)]).ramp_progress == 0.5
    assert apply_rollback_exclusions(loaded(14), []) == loaded(14)
