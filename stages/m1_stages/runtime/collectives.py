"""Collectives between the ranks of a run outside of a training step. One process needs no process group.

Everything here is collective and belongs to the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m1_stages.errors import CheckpointError


def rank() -> int:
    """This process's rank."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        import torch
        import torch.distributed as dist

        # Unless told, NCCL takes the GPU numbered as the rank, which may be another process's.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def gather(value: Any) -> list[Any]:
    """Every rank's ``value``, on every rank."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank: what it read from a file, say, that others may not see yet."""
    if world() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree_max(value: int) -> int:
    """The largest of the ranks' small numbers, on every rank: one all-reduce."""
    return int(_reduced(value, largest=True))


def agree_min(value: float) -> float:
    """The smallest of the ranks' values, on every rank: one all-reduce in fp64."""
    return _reduced(value, largest=False)


def _reduced(value: float, *, largest: bool) -> float:
    if world() == 1:
        return value
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)
    return float(number.item())


def run_together(action: Callable[[], Any]) -> None:
    """Run ``action`` on every rank; when it fails on any, fail on all with the first rank's reason.

    Raises:
        CheckpointError: naming what went wrong, where, and the rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failed = ("", "", "")
    try:
        action()
    except (Exception, CheckpointException) as error:  # torch's is no Exception; no other rank may go on
        place = (error.where, error.fix) if isinstance(error, CheckpointError) else ("", "")
        failed = (reason_of(error), *place)
    for number, (what, where, fix) in enumerate(gather(failed)):
        if what:
            raise CheckpointError(what, where=", ".join(filter(None, (where, f"rank {number}"))), fix=fix)


def reason_of(error: BaseException) -> str:
    """One line: the operating system's reason where there is one, else the error's own first line."""
    if isinstance(error, CheckpointError):
        return error.what
    for wrapped, _ in getattr(error, "failures", {}).values():  # torch's CheckpointException holds those of all ranks
        return reason_of(wrapped)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}: {cause.filename or ''}".rstrip(": ")
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else repr(error)}"
