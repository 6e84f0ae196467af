"""The lightning layer between its two projections with a state that is carried from call to call, for generation.

``y = rmsnorm(o) * weight * sigmoid(gate)`` with ``o`` the attention of ``silu(q), silu(k), silu(v)``. No gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m1_kernels.lightning.decode import lightning_decode
from m1_kernels.lightning.dispatch import choose_backend, lightning_attention


@torch.no_grad()
def lightning_prefill_layer(
    parts: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    doc_lengths: Sequence[int],
    eps: float,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue the documents of a packed pass from their states.

    Args:
        parts: [T, H, 4, D], parts q, k, v, gate, as the layer's fused projection returns them.
        weight: [H * D], this rank's share of the norm's weight.
        log_decay: [H] fp32, <= 0.
        state: [documents, H, D, D] fp32: the state before each document's first token here.
        doc_lengths: tokens of each document, on the host.
        eps: added to the mean of squares in the norm.
        tp_group: ranks that share the heads; their sums of squares are added.

    Returns:
        [T, H * D] in the dtype of ``parts``, and the states after the documents' last tokens.
    """
    backend = choose_backend(parts.device, parts.dtype, (parts.shape[-1], parts.shape[-1]))
    if backend.name == "triton":
        from m1_kernels.lightning.gpu.fused_layer import split_parts

        q, k, v = split_parts(parts)
    else:
        q, k, v = F.silu(parts[:, :, :3]).unbind(2)
    out, final = lightning_attention(
        q[None],
        k[None],
        v[None],
        log_decay,
        doc_lengths=doc_lengths,
        initial_state=state,
        output_final_state=True,
        backend=backend,
    )
    assert final is not None
    return _gated_norm(out[0], parts, weight, eps, tp_group, triton=backend.name == "triton"), final


@torch.no_grad()
def lightning_decode_layer(
    parts: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    eps: float,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute one token of each sequence and advance ``state`` [B, H, D, D] fp32 by it, in place.

    The other arguments are those of ``lightning_prefill_layer``, with T = B tokens, one of each sequence. Nothing waits for the
    host, so that a CUDA graph can hold it.

    Returns:
        [B, H * D] in the dtype of ``parts``.
    """
    backend = choose_backend(parts.device, parts.dtype, (parts.shape[-1], parts.shape[-1]))
    if backend.name == "triton":
        from m1_kernels.lightning.gpu.decode import decode_triton

        q, k, v = parts[:, :, :3].unbind(2)
        out = decode_triton(q, k, v, log_decay, state, silu=True)
    else:
        q, k, v = F.silu(parts[:, :, :3]).unbind(2)
        out = lightning_decode(q, k, v, log_decay, state)
    return _gated_norm(out, parts, weight, eps, tp_group, triton=backend.name == "triton")


def _gated_norm(
    out: Tensor, parts: Tensor, weight: Tensor, eps: float, tp_group: dist.ProcessGroup | None, *, triton: bool
) -> Tensor:
    """[T, H, D] and the gate in ``parts`` to [T, H * D]."""
    if triton:
        from m1_kernels.lightning.gpu.fused_layer import gated_norm_triton

        return gated_norm_triton(out, parts, weight, eps, tp_group)[0]
    y = out.flatten(1).float()
    squares = y.square().sum(-1, keepdim=True)
    width = y.shape[1]
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(squares, group=tp_group)
        width *= tp_group.size()
    y = (weight.float() * (y * torch.rsqrt(squares / width + eps))).to(parts.dtype)
    return y * torch.sigmoid(parts[:, :, 3].flatten(1))
