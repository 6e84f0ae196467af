"""Chunked lightning attention in PyTorch: linear time, our own backward, documents isolated by construction.

Within a chunk of C tokens attention is a masked C x C product; between chunks only the [Dk, Dv] state travels:

    A = (Q K^T) * exp(log_decay * (i - j)),  i >= j
    O = A V + (Q * exp(log_decay * i)) S
    S <- exp(log_decay * m) S + (K * exp(log_decay * (m - j)))^T V      (i, j = 1..m, m tokens in the chunk)

(MiniMax-01, arXiv 2501.08313, algorithm 1; 1-based i, j.) States, decays and sums are fp32 whatever the inputs, float64
for float64 inputs, autocast or not. The backward recomputes the states instead of keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.autocast import without_autocast
from m1_kernels.lightning.chunk_layout import ChunkLayout, chunk_layout
from m1_kernels.lightning.zigzag import ContextShards

CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 32, 128  # measured: kernels/README.md


def lightning_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    doc_lengths: tuple[int, ...],
    initial_state: Tensor | None,
    shards: ContextShards | None = None,
) -> tuple[Tensor, Tensor]:
    """Take packed inputs [tokens, H, D] and return o [tokens, H, Dv] in v's dtype and final states [documents, H, Dk, Dv]."""
    layout = chunk_layout(doc_lengths, CPU_CHUNK_TOKENS if q.device.type == "cpu" else GPU_CHUNK_TOKENS, q.device)
    if initial_state is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        initial_state = torch.zeros(len(doc_lengths), q.shape[1], q.shape[2], v.shape[2], dtype=dtype, device=q.device)
    result: tuple[Tensor, Tensor] = _Chunked.apply(q, k, v, log_decay, initial_state, layout, shards)
    return result


class _Decays:
    """Decay factors of one call: per head, per position in the chunk."""

    def __init__(self, log_decay: Tensor, layout: ChunkLayout, dtype: torch.dtype) -> None:
        log_decay = log_decay.to(dtype)
        i = torch.arange(1, layout.chunk + 1, device=log_decay.device, dtype=dtype)
        m = layout.lengths.to(dtype)
        distance = i[:, None] - i[None, :]
        scaled = log_decay[:, None, None] * distance.clamp(min=0)
        self.mask = torch.where(distance >= 0, scaled.exp(), torch.zeros((), dtype=dtype, device=i.device))
        self.query = (log_decay[:, None] * i).exp()[:, :, None]
        to_end = (m[:, None] - i).clamp(min=0)
        self.key = (log_decay[None, :, None] * to_end[:, None, :]).exp()[..., None]
        self.chunk = (log_decay * m[:, None]).exp()[..., None, None]


def _chunks(x: Tensor, layout: ChunkLayout, dtype: torch.dtype) -> Tensor:
    """[tokens, H, D] to [chunks, H, C, D]; empty slots are zero."""
    padded = torch.cat([x.to(dtype), x.new_zeros(1, *x.shape[1:], dtype=dtype)])
    return padded[layout.gather].view(-1, layout.chunk, *x.shape[1:]).transpose(1, 2).contiguous()


def _tokens(x: Tensor, layout: ChunkLayout, dtype: torch.dtype) -> Tensor:
    """[chunks, H, C, D] to [tokens, H, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])[layout.scatter].to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b`` over [chunks, H] without a temporary: on a CPU fresh memory costs more than the arithmetic."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return total


def _states_before(update: Tensor, decay: Tensor, initial: Tensor, layout: ChunkLayout) -> Tensor:
    """State at the start of every chunk, [chunks, H, Dk, Dv]."""
    before = torch.empty_like(update)
    before[: layout.widths[0]] = initial[layout.order]
    for rank in range(1, len(layout.offsets)):
        here, width = layout.offsets[rank], layout.widths[rank]
        prev = slice(layout.offsets[rank - 1], layout.offsets[rank - 1] + width)
        torch.addcmul(update[prev], before[prev], decay[prev], out=before[here : here + width])
    return before


def _state_gradients(update: Tensor, decay: Tensor, final: Tensor, layout: ChunkLayout) -> tuple[Tensor, Tensor]:
    """Gradient of the state after every chunk, and of the initial states; ``update`` is each chunk's own share."""
    after = torch.empty_like(update)
    after[layout.last] = final
    for rank in range(len(layout.offsets) - 1, 0, -1):
        here = slice(layout.offsets[rank], layout.offsets[rank] + layout.widths[rank])
        prev = slice(layout.offsets[rank - 1], layout.offsets[rank - 1] + layout.widths[rank])
        after[prev] = torch.addcmul(update[here], after[here], decay[here])
    first = slice(0, layout.widths[0])
    initial = torch.empty_like(final)
    initial[layout.order] = torch.addcmul(update[first], after[first], decay[first])
    return after, initial


def _first_documents(shards: ContextShards) -> list[int]:
    return [0, len(shards.my_cuts[0].doc_lengths)]


def _last_documents(shards: ContextShards) -> list[int]:
    return [len(shards.my_cuts[0].doc_lengths) - 1, len(shards.doc_lengths) - 1]


def _placed(states: Tensor, shards: ContextShards, like: Tensor, *, first: bool) -> Tensor:
    """[2, H, Dk, Dv] of the two shards as rows of [documents, H, Dk, Dv], zeros elsewhere."""
    rows = torch.zeros_like(like)
    rows[_first_documents(shards) if first else _last_documents(shards)] = states
    return rows


class _Chunked(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial: Tensor,
        layout: ChunkLayout,
        shards: ContextShards | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = initial.dtype
        decays = _Decays(log_decay, layout, dtype)
        qc, kc, vc = (_chunks(x, layout, dtype) for x in (q, k, v))
        update = kc.transpose(2, 3) @ (vc * decays.key)
        before = _states_before(update, decays.chunk, initial, layout)
        if shards is not None:
            final = torch.addcmul(update[layout.last], before[layout.last], decays.chunk[layout.last])
            initial = _placed(shards.entering(final[_last_documents(shards)], log_decay), shards, initial, first=True)
            before = _states_before(update, decays.chunk, initial, layout)
        out = _add_product((qc @ kc.transpose(2, 3)).mul_(decays.mask) @ vc, qc * decays.query, before)
        final = torch.addcmul(update[layout.last], before[layout.last], decays.chunk[layout.last])
        ctx.save_for_backward(q, k, v, log_decay, initial)
        ctx.layout, ctx.shards = layout, shards
        return _tokens(out, layout, v.dtype), final

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_final = grads
        q, k, v, log_decay, initial = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        shards: ContextShards | None = ctx.shards
        dtype = initial.dtype
        decays = _Decays(log_decay, layout, dtype)
        qc, kc, vc, do = (_chunks(x, layout, dtype) for x in (q, k, v, grad_out))
        do_query, v_key = do * decays.query, vc * decays.key
        before = _states_before(kc.transpose(2, 3) @ v_key, decays.chunk, initial, layout)
        update = qc.transpose(2, 3) @ do_query
        grad_final = grad_final.to(dtype)
        after, grad_initial = _state_gradients(update, decays.chunk, grad_final, layout)
        if shards is not None:
            leaving = shards.leaving(grad_initial[_first_documents(shards)], log_decay)
            grad_final = _placed(leaving, shards, grad_final, first=False)
            after, grad_initial = _state_gradients(update, decays.chunk, grad_final, layout)
        scores = (qc @ kc.transpose(2, 3)).mul_(decays.mask)
        grad_scores = (do @ vc.transpose(2, 3)).mul_(decays.mask)
        dq = _add_product(grad_scores @ kc, do_query, before.transpose(2, 3))
        dk = _add_product(grad_scores.transpose(2, 3) @ qc, v_key, after.transpose(2, 3))
        dv = _add_product(scores.transpose(2, 3) @ do, kc * decays.key, after)
        tokens = (_tokens(g, layout, x.dtype) for g, x in ((dq, q), (dk, k), (dv, v)))
        return (*tokens, None, grad_initial, None, None)
