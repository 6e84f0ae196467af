"""Causal softmax attention over packed documents; no mask of tokens x tokens ever exists."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels.layout import doc_lengths_of

BACKENDS = ("auto", "varlen", "per-document")


def explain_softmax_backend(q: Tensor, backend: str = "auto") -> tuple[str, str]:
    """``varlen`` (one flash kernel for all documents) or ``per-document`` (one SDPA call each), and why.

    Raises:
        ValueError: unknown backend, or ``varlen`` for tensors it does not take; nothing else is chosen in its place.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "per-document":
        return backend, "requested"
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return "varlen", "16-bit inputs on CUDA: torch.nn.attention.varlen"
    reason = f"{q.dtype} on {q.device.type}: the varlen kernel takes 16-bit CUDA tensors only"
    if backend == "varlen":
        raise ValueError(f"backend 'varlen' cannot run {reason}")
    return "per-document", reason


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    doc_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Grouped-query causal attention inside each document, scaled by ``1/sqrt(D)``.

    Documents never see each other, bit for bit. One exception: on CUDA flash sums the gradient of q in no fixed order,
    so that gradient repeats bit for bit only under ``torch.use_deterministic_algorithms(True)``.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, KV, D]; H is a multiple of KV and query head h reads key head ``h // (H / KV)``.
        cu_seqlens: [documents + 1] int32 edges from 0 to T; one document if neither this nor ``doc_lengths`` is given.
        backend: one of ``BACKENDS``.
        doc_lengths: the same edges as host-side lengths, so that a GPU is not waited for; may stand alone.

    Returns:
        [1, T, H, D] in q's dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or documents that do not fit, or a backend that cannot run.
    """
    if k.dtype != q.dtype or v.dtype != q.dtype or not q.is_floating_point():
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating dtype")
    fits = q.dim() == 4 and q.shape[0] == 1 and k.shape == v.shape and k.shape == (1, q.shape[1], *k.shape[2:])
    if not fits or k.shape[-1] != q.shape[-1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "want [1, T, H, D] and twice [1, T, KV, D] with H a multiple of KV"
        )
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    if explain_softmax_backend(q, backend)[0] == "varlen":
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
        return _varlen(q, k, v, cu_seqlens, max(lengths))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    documents = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(qd, kd, vd, is_causal=True) for qd, kd, vd in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[2] // k.shape[2]
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    edges = cu_seqlens.to(torch.int32)
    q, k, v = (x[0].contiguous() for x in (q, k, v))
    out = varlen_attn(q, k, v, edges, edges, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]
