"""Which CUDA calls Megatron-Core makes in training and saving: an upgrade that adds or drops one shows here."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import run_on_ranks

TRAIN = {
    "torch.cuda.manual_seed",
    "torch.cuda.get_rng_state",
    "random._set_cuda_rng_state",
    "torch.cuda.Stream",
    "torch.cuda.current_device",
    'device="cuda"',
    "torch.cuda.current_stream",
}
DISPATCH = {"torch.cuda.stream", "token_dispatcher.maybe_move_tensor_to_cpu"}
"""Only with expert parallelism are tokens dispatched."""
MESSAGES = {"torch.cuda.synchronize"}
"""After a message between pipeline stages."""


@pytest.mark.parametrize(
    ("world", "job", "expected"),
    [
        (1, {"recompute": True}, TRAIN),
        (2, {"parallel": {"pipeline": 2}}, TRAIN | MESSAGES),
        (2, {"parallel": {"expert": 2}}, TRAIN | DISPATCH),
    ],
    ids=["one process, recomputation", "two pipeline stages", "two expert ranks"],
)
def test_redirected_calls_of_two_steps_and_a_save(world: int, job: dict, expected: set[str], tmp_path: Path) -> None:
    job = {"parallel": {}, "steps": 2, "save": str(tmp_path), **job}
    record = run_on_ranks(world, "distributed.parity_worker:train", job, fresh=True)[-1]
    assert any(tmp_path.glob("*.distcp")), "nothing was saved"
    assert set(record["hits"]) == expected
