"""Context parallelism of lightning attention: the algebra of states between shards, without any collective.

A packed sequence is cut into contiguous shards. Only the state ``[K, V]`` of each head crosses an edge between shards,
so one all-gather of states, a prefix sum over shards and a correction per shard replace a ring (LASP-2, arXiv
2502.07563; with decay and packing: LASP+ in MiniMax-01, arXiv 2501.08313, section 3.2.2). With ``w = exp(log_decay)``:

    S_in[n] = S_local[n-1] + w^length S_in[n-1]     if shard n's first document started before it, else 0
    o_t    += w^(t+1)   q_t S_in                     tokens t = 0.. of the shard's first document
    dq_t   += w^(t+1)   do_t S_in^T
    dk_i   += w^(m-1-i) v_i dS_out^T                 tokens i = 0..m-1 of the shard's last document
    dv_i   += w^(m-1-i) k_i dS_out

S_local is the end state of the shard's last document from a zero state; a shard with a document edge inside passes no
S_in on. dS_out is the gradient of the state that leaves the shard: the same sum, run from the last shard to the first.

Shards are in sequence order: where a rank holds two of them (zig-zag), the gathered states are put in order first. What
happens inside a shard is the caller's kernel. Documents that cross no edge are never touched, and states are chosen, not
masked: no neighbour reaches another document, not even an infinite one.

**The simpler way** needs no corrections: pass S_in as row 0 of ``initial_state`` [documents, H, K, V], zeros elsewhere,
to ``lightning_attention(..., doc_lengths=cut.doc_lengths, output_final_state=True)``, and in the backward dS_out as the
last row of the gradient of the final states. Both must be known first: S_local is the sum of w^(m-1-i) k_i^T v_i, its
counterpart dS_local that of w^(t+1) q_t^T do_t (plus w^length times the gradient of a final state, where the document
ends in the shard). Corrections let the all-gather overlap with the attention instead. Sums and decays are fp32, float64
for float64 inputs, autocast or not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ShardCut:
    """The parts of the packed documents that one shard holds."""

    doc_lengths: tuple[int, ...]
    """Tokens of each document inside the shard, in order, each >= 1."""
    from_previous: bool
    """The first document started in an earlier shard."""
    into_next: bool
    """The last document goes on in the next shard."""

    def reversed(self) -> ShardCut:
        """Return this shard as read from its last token to its first."""
        return ShardCut(self.doc_lengths[::-1], self.into_next, self.from_previous)


def cut_shards(doc_lengths: Sequence[int], shard_lengths: Sequence[int]) -> tuple[ShardCut, ...]:
    """Cut packed documents of ``doc_lengths`` tokens into contiguous shards of ``shard_lengths`` tokens.

    Raises:
        ValueError: a document or shard without tokens, or the two do not cover the same number of tokens.
    """
    for name, lengths in (("doc_lengths", doc_lengths), ("shard_lengths", shard_lengths)):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"{name} has an entry without tokens: {tuple(lengths)}")
    docs, shards = (list(accumulate(lengths, initial=0)) for lengths in (doc_lengths, shard_lengths))
    if docs[-1] != shards[-1]:
        raise ValueError(f"doc_lengths cover {docs[-1]} tokens, shard_lengths {shards[-1]}")
    edges, cuts = set(docs), []
    for start, end in pairwise(shards):
        inside = docs[bisect_right(docs, start) : bisect_left(docs, end)]
        parts = tuple(b - a for a, b in pairwise((start, *inside, end)))
        cuts.append(ShardCut(parts, start not in edges, end not in edges))
    return tuple(cuts)


def entering_states(local: Tensor, log_decay: Tensor, cuts: Sequence[ShardCut]) -> Tensor:
    """Compute the state that enters every shard: the prefix sum over shards.

    Args:
        local: [shards, H, K, V] fp32 or fp64: end state of each shard's last document, from a zero state.
        log_decay: [H] fp32 or fp64, <= 0, per token.
        cuts: of all shards, in sequence order.

    Returns:
        [shards, H, K, V] in local's dtype; zero where the shard's first document starts there.

    Raises:
        TypeError: ``local`` or ``log_decay`` is neither fp32 nor fp64.
        ValueError: shapes do not fit, or the cuts are not those of one whole sequence.
    """
    _check_state("local", local, log_decay, (len(cuts),))
    if [False, *(c.into_next for c in cuts)] != [*(c.from_previous for c in cuts), False]:
        raise ValueError("cuts disagree at an edge between shards: they are not of one whole sequence, in order")
    zero = leaving = torch.zeros_like(local[0])
    entering = []
    for state, cut in zip(local, cuts, strict=True):
        # Never multiplied by 0: an infinite state of another document would leave NaN.
        entering.append(leaving if cut.from_previous else zero)
        decay = (log_decay.to(state.dtype) * cut.doc_lengths[0]).exp()[:, None, None]
        leaving = state + decay * entering[-1] if len(cut.doc_lengths) == 1 else state
    return torch.stack(entering)


def leaving_state_gradients(local: Tensor, log_decay: Tensor, cuts: Sequence[ShardCut]) -> Tensor:
    """Compute the gradient dS_out of the state that leaves every shard: the suffix sum over shards.

    Args:
        local: [shards, H, K, V] fp32 or fp64: dS_local, gradient of the state entering each shard's first document, from
            a zero dS_out. Where that document ends in the shard, the gradient of its final state is part of it.
            Entries of shards whose first document starts there are not used.
        log_decay, cuts: as for ``entering_states``, which names the errors.

    Returns:
        [shards, H, K, V] in local's dtype; zero where the shard's last document ends there.
    """
    return entering_states(local.flip(0), log_decay, [cut.reversed() for cut in reversed(cuts)]).flip(0)


def correct_outputs_(out: Tensor, q: Tensor, entering: Tensor, log_decay: Tensor, cut: ShardCut) -> None:
    """``o_t += w^(t+1) q_t S_in`` for the shard's first document, if it started earlier; in place.

    Args:
        out: [tokens, H, V], outputs from a zero state, any floating dtype; rounded to it once.
        q: [tokens, H, K].
        entering: [H, K, V] fp32 (fp64 for fp64 inputs), this shard's row of ``entering_states``.
        log_decay: [H] fp32 or fp64.
        cut: of this shard.

    Raises:
        TypeError: ``entering`` or ``log_decay`` is of the wrong dtype.
        ValueError: shapes do not fit the cut or each other.
    """
    _add("out, q", out, q, entering, log_decay, cut, first=True)


def correct_final_states_(final: Tensor, entering: Tensor, log_decay: Tensor, cut: ShardCut) -> None:
    """``S += w^length S_in`` for the shard's first document, if it started earlier; in place.

    Args:
        final: [documents in the shard, H, K, V] in entering's dtype, end states from zero states. A last document
            that goes on has its state at the shard's end here.
        entering, log_decay, cut: as for ``correct_outputs_``, which names the errors.
    """
    _check_state("final", final, log_decay, (len(cut.doc_lengths),))
    _check_state("entering", entering, log_decay, (), final.dtype)
    if cut.from_previous:
        final[0] += (log_decay.to(final.dtype) * cut.doc_lengths[0]).exp()[:, None, None] * entering


def correct_query_gradients_(dq: Tensor, do: Tensor, entering: Tensor, log_decay: Tensor, cut: ShardCut) -> None:
    """``dq_t += w^(t+1) do_t S_in^T`` for the shard's first document, if it started earlier; in place.

    Args:
        dq, do: [tokens, H, K] from a zero S_in, [tokens, H, V].
        entering, log_decay, cut: as for ``correct_outputs_``, which names the errors.
    """
    _add("dq, do", dq, do, entering.mT, log_decay, cut, first=True)


def correct_key_value_gradients_(
    dk: Tensor, dv: Tensor, k: Tensor, v: Tensor, leaving_gradient: Tensor, log_decay: Tensor, cut: ShardCut
) -> None:
    """``dk_i += w^(m-1-i) v_i dS_out^T``, ``dv_i += w^(m-1-i) k_i dS_out`` for the last document, if it goes on; in place.

    Args:
        dk, k, dv, v: [tokens, H, K] and [tokens, H, V]; dk and dv from a zero dS_out.
        leaving_gradient: [H, K, V] fp32 (fp64), this shard's row of ``leaving_state_gradients``.
        log_decay, cut: as for ``correct_outputs_``, which names the errors.
    """
    _add("dk, v", dk, v, leaving_gradient.mT, log_decay, cut, first=False)
    _add("dv, k", dv, k, leaving_gradient, log_decay, cut, first=False)


def _add(names: str, total: Tensor, x: Tensor, state: Tensor, log_decay: Tensor, cut: ShardCut, first: bool) -> None:
    """Add ``w^distance x state`` to the tokens of the document that crosses the shard's first or last edge."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    _check_state(f"the state for {names}", state, log_decay, (), dtype)
    tokens, (heads, *sizes) = sum(cut.doc_lengths), state.shape
    got, want = [tuple(total.shape), tuple(x.shape)], [(tokens, heads, size) for size in reversed(sizes)]
    if got != want:
        raise ValueError(f"{names} are {got}; cut and state want {want}")
    if not (cut.from_previous if first else cut.into_next):
        return
    m = cut.doc_lengths[0 if first else -1]
    here = slice(m) if first else slice(tokens - m, tokens)
    # A state enters before the first token, a gradient at the last one: hence one decay more.
    distance = torch.arange(1, m + 1, device=x.device) if first else torch.arange(m - 1, -1, -1, device=x.device)
    decay = (log_decay.to(dtype) * distance[:, None]).exp()
    with torch.autocast(x.device.type, enabled=False):
        product = torch.einsum("thk,hkv->thv", x[here].to(dtype), state)
    total[here] = torch.addcmul(total[here].to(dtype), product, decay[..., None]).to(total.dtype)


def _check_state(name: str, state: Tensor, log_decay: Tensor, lead: tuple[int, ...], *dtypes: torch.dtype) -> None:
    floats = (torch.float32, torch.float64)
    if log_decay.dtype not in floats or state.dtype not in (dtypes or floats):
        raise TypeError(f"{name} is {state.dtype}, log_decay {log_decay.dtype}; want fp32, or fp64 for fp64 inputs")
    got, decays = tuple(state.shape), tuple(log_decay.shape)
    if len(got) != len(lead) + 3 or len(decays) != 1 or got[:-2] != (*lead, *decays):
        raise ValueError(f"{name} is {got}, log_decay {decays}; want {[*lead, 'H', 'K', 'V']} and ['H']")
