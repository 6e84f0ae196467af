"""Causal softmax attention over packed documents; no mask of tokens x tokens ever exists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from m1_kernels.backend_choice import BackendChoice
from m1_kernels.lightning.chunk_layout import doc_lengths_of
from m1_kernels.lightning.zigzag import ContextShards, gather_sequence

BACKENDS = ("auto", "cudnn", "varlen", "per-document")
QUERIES_AT_ONCE = 256
CUDNN_TOKENS = 4096
"""Documents of as many tokens get a cuDNN call of their own; shorter neighbours share one varlen call."""
CUDNN_LENGTHS_PER_OCTAVE = 16
"""cuDNN plans its kernels anew for every length it meets, in tens of milliseconds, so documents are padded to few lengths."""


def choose_softmax_backend(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> BackendChoice:
    """Choose the backend of causal softmax attention for inputs of ``dtype`` on ``device``.

    ``cudnn`` runs long documents one by one through cuDNN, 1.6 times as fast as flash on Hopper, and the others through
    ``varlen``. ``varlen`` is one flash kernel for all documents. ``per-document`` is one SDPA call each, on any device.

    Args:
        backend: the request, one of ``BACKENDS``.

    Raises:
        ValueError: the backend is unknown or does not take such tensors; nothing else is chosen in its place.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "per-document":
        return BackendChoice(backend, "requested")
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if backend == "varlen":
            return BackendChoice(backend, "requested")
        if torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available():
            return BackendChoice("cudnn", "16-bit inputs on Hopper or newer")
        if backend == "auto":
            return BackendChoice("varlen", "16-bit inputs on CUDA: torch.nn.attention.varlen")
    inputs = f"{dtype} on {device.type}"
    if backend != "auto":
        hopper = ", cudnn from Hopper on" if backend == "cudnn" else ""
        raise ValueError(f"backend {backend!r} cannot run {inputs}: it takes 16-bit CUDA tensors only{hopper}")
    return BackendChoice("per-document", f"{inputs}: the other backends take 16-bit CUDA tensors only")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    doc_lengths: Sequence[int] | None = None,
    shards: ContextShards | None = None,
) -> Tensor:
    """Compute grouped-query causal attention inside each document, scaled by ``1/sqrt(D)``.

    Documents never see each other, bit for bit. One exception: on CUDA flash sums the gradient of q in no fixed order,
    so that gradient repeats bit for bit only under ``torch.use_deterministic_algorithms(True)``.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, KV, D]; H is a multiple of KV and query head h reads key head ``h // (H / KV)``.
        cu_seqlens: [documents + 1] int32 edges from 0 to T; one document if neither this nor ``doc_lengths`` is given.
        backend: one of ``BACKENDS``.
        doc_lengths: tokens of each document, on the host. They spare the wait for a GPU's ``cu_seqlens``, and replace them
            where those are None.
        shards: given when q, k, v are this rank's tokens of a sequence that is sharded over a group. k and v are gathered,
            and their gradients are summed over the group. ``shards`` replaces ``cu_seqlens`` and ``doc_lengths``.

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
    choice = choose_softmax_backend(q.device, q.dtype, backend)
    attend = {"cudnn": _cudnn, "varlen": _varlen, "per-document": _per_document}[choice.name]
    if shards is not None and shards.group.size() > 1:
        keys, values = gather_sequence(torch.cat([k, v], dim=2)[0], shards).chunk(2, dim=1)
        outs = []
        for shard, x, cut in zip(shards.mine, q[0].chunk(2), shards.my_cuts, strict=True):
            seen = slice(shards.doc_starts[shard], (shard + 1) * shards.tokens)
            before = shard * shards.tokens - shards.doc_starts[shard]
            outs.append(attend(x, keys[seen], values[seen], cut.doc_lengths, before))
        return torch.cat(outs)[None]
    lengths = doc_lengths_of(q, cu_seqlens, shards.doc_lengths if shards else doc_lengths)
    return attend(q[0], k[0], v[0], lengths, 0)[None]


def _per_document(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], before: int) -> Tensor:
    """q [T, H, D]; k, v [before + T, KV, D] with ``before`` tokens of the first document that have no query here."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    seen = (before + lengths[0], *lengths[1:])
    parts = zip(q.split(lengths), k.split(seen), v.split(seen), strict=True)
    return torch.cat([_document(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts])


def _document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[1, H, tokens, D]; the queries are the document's last tokens. Masks hold a block of queries at a time."""
    before = k.shape[2] - q.shape[2]
    if before == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    outs = []
    for start in range(0, q.shape[2], QUERIES_AT_ONCE):
        block = q[:, :, start : start + QUERIES_AT_ONCE]
        last = before + start + torch.arange(block.shape[2], device=q.device)
        end = before + start + block.shape[2]
        mask = torch.arange(end, device=q.device) <= last[:, None]
        outs.append(F.scaled_dot_product_attention(block, k[:, :, :end], v[:, :, :end], attn_mask=mask))
    return torch.cat(outs, dim=2)


def document_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [tokens, H, D], the last tokens of a document; k, v [keys, KV, D], all of its tokens. Returns [tokens, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return _document(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


@lru_cache(maxsize=16)
def _edges(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], before: int) -> Tensor:
    """This does what ``_per_document`` does. A document with keys before its queries goes to varlen, because SDPA's causal
    mask starts at key 0."""
    own = [n >= CUDNN_TOKENS and not (i == 0 and before) for i, n in enumerate(lengths)]
    outs, start = [], 0
    for long, run in groupby(zip(own, lengths, strict=True), itemgetter(0)):
        neighbours = tuple(n for _, n in run)
        for part in [(n,) for n in neighbours] if long else [neighbours]:
            keys = slice(start + before if start else 0, start + before + sum(part))
            inputs = q[start : start + sum(part)], k[keys], v[keys]
            outs.append(_cudnn_document(*inputs) if long else _varlen(*inputs, part, 0 if start else before))
            start += sum(part)
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def padded_length(tokens: int) -> int:
    """The next of ``CUDNN_LENGTHS_PER_OCTAVE`` lengths between powers of two: at most 1/16 more tokens."""
    step = max(1, (1 << (tokens.bit_length() - 1)) // CUDNN_LENGTHS_PER_OCTAVE)
    return -(-tokens // step) * step


def _cudnn_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[tokens, H, D] of one document. Causality hides the zeros after its end; they get and give no gradient."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    if more := padded_length(tokens) - tokens:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)[:tokens]


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], before: int) -> Tensor:
    """This does what ``_per_document`` does."""
    return varlen_attention(q, k, v, lengths, (before + lengths[0], *lengths[1:]))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], seen: tuple[int, ...]) -> Tensor:
    """One flash kernel for all documents, which aligns queries with the last keys of their document.

    Args:
        q: [T, H, D], 16-bit on a CUDA device.
        k, v: [keys, KV, D].
        lengths: queries of each document.
        seen: keys of each document.
    """
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    edges, key_edges = _edges(lengths, q.device), _edges(seen, q.device)
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = varlen_attn(q, k, v, edges, key_edges, max(lengths), max(seen), **options)
    assert isinstance(out, Tensor)
    return out
