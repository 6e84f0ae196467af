"""The fused lightning layer, on Triton only: checks arguments before it imports the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from m1_kernels.backend_choice import BackendChoice
from m1_kernels.lightning.chunk_layout import doc_lengths_of
from m1_kernels.lightning.dispatch import check_inputs, explain_backend
from m1_kernels.lightning.zigzag import ContextShards


def lightning_layer(
    x: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    *,
    eps: float,
    cu_seqlens: Tensor | None = None,
    doc_lengths: Sequence[int] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    shards: ContextShards | None = None,
    choice: BackendChoice | None = None,
) -> Tensor:
    """Compute the lightning layer between its projections, fused: SiLU, attention, RMSNorm over all heads, sigmoid gate.

    ``y = rmsnorm(lightning_attention(silu(q), silu(k), silu(v))) * weight * sigmoid(gate)``; Triton only.
    Source: MiniMax-01 section 2.2; transformers ``modeling_minimax.py``, ``MiniMaxLightningAttention``.

    Args:
        x: [1, T, H, 4, D], parts q, k, v, gate, as the fused projection returns them; fp16, bf16 or fp32.
        weight: [H * D], this rank's share of the norm's weight.
        log_decay: [H] fp32 or fp64, <= 0.
        eps: added to the mean of squares in the norm.
        cu_seqlens, doc_lengths, shards: as for ``lightning_attention``.
        tp_group: ranks that share the heads; their sums of squares are added, forward and backward.
        choice: the backend "triton", where the caller has chosen it for these inputs; None: it is checked here.

    Returns:
        [1, T, H * D] in x's dtype. The gradient of ``weight`` is of this rank's channels alone, and complete.

    Raises:
        TypeError, ValueError: as ``lightning_attention`` with backend "triton".
    """
    if x.dim() != 5 or x.shape[0] != 1 or x.shape[3] != 4 or weight.shape != (x.shape[2] * x.shape[4],):
        raise ValueError(f"x, weight are {tuple(x.shape)}, {tuple(weight.shape)}; want [1, T, H, 4, D], [H * D]")
    q = x[:, :, :, 0]
    check_inputs(q, q, q, log_decay)
    if choice is None:
        explain_backend("triton", q)
    elif choice.name != "triton":
        raise ValueError(f"the fused layer runs on backend 'triton', not on {choice.name!r}")
    if shards is not None:
        cu_seqlens, doc_lengths = None, shards.doc_lengths
        shards = shards if shards.crossed else None
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    from m1_kernels.lightning.gpu.fused_layer import lightning_layer_triton

    return lightning_layer_triton(x[0], weight, log_decay, lengths, eps, tp_group, shards)[None]
