"""Causal softmax attention over packed documents; no mask of tokens x tokens ever exists."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels.layout import doc_lengths_of


def explain_softmax_backend(q: Tensor) -> tuple[str, str]:
    """``varlen`` (one flash kernel for all documents) or ``per-document`` (one SDPA call each), and why."""
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return "varlen", "16-bit inputs on CUDA: torch.nn.attention.varlen"
    return "per-document", f"{q.dtype} on {q.device.type}: the varlen kernel takes 16-bit CUDA tensors only"


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, doc_lengths: Sequence[int] | None = None
) -> Tensor:
    """Grouped-query causal attention inside each document, scaled by ``1/sqrt(D)``.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, KV, D]; H is a multiple of KV and query head h reads key head ``h // (H / KV)``.
        cu_seqlens: [documents + 1] int32 edges from 0 to T.
        doc_lengths: the same edges as host-side lengths, so that a GPU is not waited for.

    Returns:
        [1, T, H, D] in q's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if q.shape[0] != 1 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    if sum(lengths) != q.shape[1]:
        raise ValueError(f"document lengths sum to {sum(lengths)}, not {q.shape[1]} tokens")
    if explain_softmax_backend(q)[0] == "varlen":
        return _varlen(q, k, v, cu_seqlens, max(lengths))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    parts = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[2] // k.shape[2]
    k, v = (x[0].repeat_interleave(group, dim=1) for x in (k, v))
    edges = cu_seqlens.to(torch.int32)
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in signature(varlen_attn).parameters else {"is_causal": True}
    )  # torch 2.10 said is_causal, later releases say window_size
    out: Tensor = varlen_attn(q[0].contiguous(), k, v, edges, edges, longest, longest, **causal)
    return out[None]
