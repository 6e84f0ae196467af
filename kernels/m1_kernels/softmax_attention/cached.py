"""Softmax attention over a cache of keys and values, for generation. No gradient flows.

A cache is [slots, capacity, KV, D]; what lies behind a slot's last token is never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels.softmax_attention.attention import choose_softmax_backend, document_attention, varlen_attention
from m1_kernels.softmax_attention.rotary import rotate
from m1_kernels.triton_support import takes_triton


def rotate_into_cache(
    grouped: Tensor, positions: Tensor, rows: Tensor, frequencies: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate the queries and the key of one token of every slot, and write key and value into the cache, in place.

    Args:
        grouped: [slots, KV, G + 2, D]: of every key head its G queries, the key and the value, not rotated.
        positions: [slots] int64 position of each token.
        rows: [slots] int64: the row of its slot that takes the key and the value.
        frequencies: as ``rotary_frequencies`` returns them.
        keys, values: [slots, capacity, KV, D].

    Returns:
        The rotated queries [slots, KV * G, D].
    """
    if takes_triton(grouped):
        from m1_kernels.softmax_attention.rotary_triton import rotate_into_cache_triton

        return rotate_into_cache_triton(grouped, positions, rows, frequencies, keys, values)
    turned = rotate(grouped[:, :, :-1].flatten(1, 2), positions, frequencies).unflatten(1, (grouped.shape[1], -1))
    slot = torch.arange(len(rows), device=rows.device)
    keys[slot, rows], values[slot, rows] = turned[:, :, -1], grouped[:, :, -1]
    return turned[:, :, :-1].flatten(1, 2)


def chunk_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """Attend from the newest tokens of some slots, packed one slot after the other, to all of their tokens so far.

    Args:
        q: [T, H, D] queries of the documents' new tokens.
        keys, values: [slots, capacity, KV, D]; the new tokens' are in them already.
        slots: the slot of each document, on the host like the next two.
        starts: tokens of each document before the new ones.
        lengths: new tokens of each document; their sum is T.

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        ValueError: the lengths do not cover the queries, or a document does not fit into its slot.
    """
    seen = tuple(start + length for start, length in zip(starts, lengths, strict=True))
    if sum(lengths) != q.shape[0] or max(seen) > keys.shape[1]:
        raise ValueError(
            f"documents of {lengths} tokens up to {seen} do not fit {q.shape[0]} queries, {keys.shape[1]} keys"
        )
    of = [(keys[slot, :end], values[slot, :end]) for slot, end in zip(slots, seen, strict=True)]
    if choose_softmax_backend(q.device, q.dtype).name == "per-document":
        parts = zip(q.split(list(lengths)), of, strict=True)
        return torch.cat([document_attention(x, k, v) for x, (k, v) in parts])
    k, v = (torch.cat([pair[which] for pair in of]) for which in (0, 1))
    return varlen_attention(q, k, v, tuple(lengths), seen)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attend from one token of every slot to the slot's tokens.

    On a CUDA device nothing waits for the host, and the work follows each slot's own length.

    Args:
        q: [slots, H, D].
        keys, values: [slots, capacity, KV, D], the new tokens' included.
        lengths: [slots] integers >= 1: tokens of each slot.

    Returns:
        [slots, H, D] in q's dtype.
    """
    if takes_triton(q):
        from m1_kernels.softmax_attention.decode_triton import decode_attention_triton

        return decode_attention_triton(q, keys, values, lengths)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=q.device) < lengths[:, None]
    k, v = (x[:, :longest].transpose(1, 2) for x in (keys, values))
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], enable_gqa=True)
    return out[:, :, 0]
