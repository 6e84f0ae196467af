"""Checks that the replicas of the parameters still agree. A bit that flips in one GPU's memory makes no error message.

Every data-parallel rank holds the same weights. Their checksums are compared every ``run.check_replicas_every`` steps: one
pass over the weights and one small gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import NumericStop

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_replicas(chunks: Sequence[Any], *, step: int) -> None:
    """Compare all parameters over the ranks that hold the same ones; every rank calls it, between two updates.

    Raises:
        NumericStop: on every rank, naming the ranks that are alone with their value, or all when there is no majority.
    """
    from megatron.core import parallel_state as mpu

    named = [
        (f"chunk {n}, {name}" if len(chunks) > 1 else name, param)
        for n, chunk in enumerate(chunks)
        for name, param in chunk.module.named_parameters()
    ]
    found: list[str] = []
    for experts, group in (
        (False, mpu.get_data_parallel_group(with_context_parallel=True)),
        (True, mpu.get_expert_data_parallel_group()),
    ):
        mine = [(name, param) for name, param in named if getattr(param, "allreduce", True) is not experts]
        if mine and group.size() > 1:
            found += _differing(mine, group)
    device = named[0][1].device
    differs = torch.tensor(int(bool(found)), device=device)
    torch.distributed.all_reduce(differs, torch.distributed.ReduceOp.MAX)
    if not differs.item():
        return
    everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, found)
    lines = list(dict.fromkeys(line for lines in everyone for line in lines))
    raise NumericStop(
        f"replicas of the same parameters differ: {lines[0]}" + (f" and {len(lines) - 1} more" if lines[1:] else ""),
        where=f"step {step}",
        fix="check that machine's memory and GPU; run the same command again to continue from the last checkpoint, and go "
        "back further (move the newest aside) if it was saved after the fault",
    )


def _differing(named: list[tuple[str, Tensor]], group: Any) -> list[str]:
    own = torch.stack([checksum(param) for _, param in named])
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, own, group=group)
    ranks = torch.distributed.get_process_group_ranks(group)
    lines = []
    for (name, _), values in zip(named, torch.stack(gathered, 1).tolist(), strict=True):
        value, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        alone = (
            [rank for rank, v in zip(ranks, values, strict=True) if v != value] if 2 * count > len(values) else ranks
        )
        lines.append(f"{name} on rank {', '.join(map(str, alone))} of ranks {', '.join(map(str, ranks))}")
    return lines


def checksum(x: Tensor) -> Tensor:
    """Sum of the bits of ``x`` read as integers, int64 (wrapping), on x's device; one flipped bit changes it."""
    return x.detach().contiguous().view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)
