"""A packed sequence that is sharded over a group of ranks: which rank holds which tokens, and what the ranks exchange.

Zig-zag: the sequence is cut into 2P equal shards and rank r holds shards r and 2P-1-r, so that causal softmax attention costs
every rank the same and no token ever moves between layer kinds. Lightning layers exchange one fp32 state per shard and head
(``cp_states.py``), softmax layers gather keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.lightning.cp_states import ShardCut, cut_shards, entering_states, leaving_state_gradients


@dataclass(frozen=True, slots=True)
class ContextShards:
    """This rank's two shards of a packed sequence; built by ``zigzag_shards``."""

    cuts: tuple[ShardCut, ...]
    """The cuts of all 2P shards, in sequence order."""
    group: dist.ProcessGroup
    rank: int
    """This rank in the group."""
    tokens: int
    """Tokens of one shard."""
    doc_starts: tuple[int, ...]
    """Per shard: where its first document starts in the sequence."""

    @property
    def mine(self) -> tuple[int, int]:
        """This rank's shards."""
        return self.rank, len(self.cuts) - 1 - self.rank

    @property
    def my_cuts(self) -> tuple[ShardCut, ShardCut]:
        """The cuts of this rank's shards."""
        first, second = self.mine
        return self.cuts[first], self.cuts[second]

    @property
    def doc_lengths(self) -> tuple[int, ...]:
        """Tokens of each part of a document that this rank holds, both shards."""
        first, second = self.my_cuts
        return first.doc_lengths + second.doc_lengths

    @property
    def crossed(self) -> bool:
        """Whether any document goes on in another shard: the same on every rank."""
        return any(cut.into_next for cut in self.cuts)

    def entering(self, local: Tensor, log_decay: Tensor) -> Tensor:
        """Turn the end states of this rank's shards, [2, H, K, V], into the states that enter them; one all-gather.

        ``local``: as for ``entering_states``, whose rows of shards without a document that goes on are not used.
        """
        return entering_states(self._gather(local), log_decay, self.cuts)[list(self.mine)]

    def leaving(self, local: Tensor, log_decay: Tensor) -> Tensor:
        """Turn the gradients of the states that enter this rank's shards, [2, H, K, V], into those of the states that leave."""
        return leaving_state_gradients(self._gather(local), log_decay, self.cuts)[list(self.mine)]

    def _gather(self, local: Tensor) -> Tensor:
        """[2, ...] of this rank to [2P, ...] in sequence order."""
        return self.in_sequence(_all_gather(local.contiguous(), self.group), 1)

    def in_sequence(self, gathered: Tensor, tokens: int) -> Tensor:
        """Reorder [2P * tokens, ...] from rank order, two shards a rank, to sequence order."""
        shards = gathered.view(-1, 2, tokens, *gathered.shape[1:])
        return torch.cat([shards[:, 0], shards[:, 1].flip(0)]).flatten(0, 1)

    def by_ranks(self, sequence: Tensor) -> Tensor:
        """Invert ``in_sequence`` for shards of ``tokens`` tokens."""
        first, second = sequence.view(2, -1, self.tokens, *sequence.shape[1:])
        return torch.stack([first, second.flip(0)], dim=1).flatten(0, 2)


def zigzag_shards(doc_lengths: Sequence[int], group: dist.ProcessGroup) -> ContextShards:
    """Cut documents of ``doc_lengths`` tokens over the ranks of ``group``.

    Raises:
        ValueError: twice the ranks do not divide the tokens.
    """
    count, total = 2 * group.size(), sum(doc_lengths)
    if total % count:
        raise ValueError(f"{total} tokens do not divide into {count} shards, two for each of {group.size()} ranks")
    size = total // count
    edges = list(accumulate(doc_lengths, initial=0))
    starts, doc = [], 0
    for at in range(0, total, size):
        while edges[doc + 1] <= at:
            doc += 1
        starts.append(edges[doc])
    return ContextShards(cut_shards(doc_lengths, (size,) * count), group, group.rank(), size, tuple(starts))


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x, group=group)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ContextShards) -> Tensor:
        ctx.shards = shards
        return shards.in_sequence(_all_gather(x.contiguous(), shards.group), shards.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shards: ContextShards = ctx.shards
        by_ranks = shards.by_ranks(grads[0].contiguous())
        out = by_ranks.new_empty(2 * shards.tokens, *by_ranks.shape[1:])
        dist.reduce_scatter_tensor(out, by_ranks, group=shards.group)
        return out, None


def gather_sequence(x: Tensor, shards: ContextShards) -> Tensor:
    """Gather [2 * tokens, ...] of every rank into the whole sequence [2P * tokens, ...]; gradients are summed over the ranks."""
    result: Tensor = _GatherSequence.apply(x, shards)
    return result
