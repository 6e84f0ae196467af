"""The two attention kinds of the hybrid, as Megatron self-attention modules.

Shapes: T tokens of one packed micro-batch, H local heads, D head_dim; Megatron's layout is [T, 1, hidden].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from m1_kernels import (
    BackendChoice,
    apply_rotary,
    causal_attention,
    choose_backend,
    lightning_attention,
    lightning_layer,
)
from m1_stages.config import ModelConfig
from m1_stages.model.norms import HeadShardedRMSNorm
from m1_stages.model.packed_seq_params import PackedSeqParams


class _Attention(MegatronModule):
    """The input and output projections over sharded heads, which both kinds share."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, in_rows: int, heads_width: int
    ) -> None:
        super().__init__(config)
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self._in_rows = in_rows
        self._linear = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": self.tp_group}
        self.linear_out = RowParallelLinear(
            heads_width, config.hidden_size, input_is_parallel=True, skip_bias_add=True, is_expert=False, **self._linear
        )
        self.linear_out_adapter: nn.Module | None = None

    def _input_projection(self) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            self.config.hidden_size, self._in_rows, gather_output=False, is_expert=False, **self._linear
        )

    def _output(self, heads: Tensor) -> Tensor:
        return _adapted(self.linear_out, self.linear_out_adapter, heads)


def _adapted(linear: nn.Module, adapter: nn.Module | None, x: Tensor) -> Tensor:
    """Apply a projection, and add what its adapter gives where there is one (``model.lora``)."""
    out: Tensor = linear(x)[0]
    return out if adapter is None else out + adapter(x)


class LightningAttention(_Attention):
    """SiLU on q, k, v; decayed linear attention; RMSNorm over all heads; sigmoid gate; output projection.

    One fused projection with rows (head, {q, k, v, gate}, D). Source: MiniMax-01 section 2.2; transformers
    ``modeling_minimax.py``, ``MiniMaxLightningAttention``. On a CUDA device everything between the projections is fused.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        model: ModelConfig,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        assert pg_collection is not None
        width = model.num_heads * model.head_dim
        super().__init__(config, pg_collection, 4 * width, width)
        tp = self.tp_group.size()
        self.layer_number, self.head_dim, self.num_heads = layer_number, model.head_dim, model.num_heads // tp
        self.linear_in = self._input_projection()
        self.linear_in_adapter: nn.Module | None = None
        self.norm = HeadShardedRMSNorm(config, width // tp, width, model.lightning_norm_eps, self.tp_group)
        self.log_decay: Tensor | None = None
        self._slopes: list[float] = []

    def set_slopes(self, slopes: list[float], device: torch.device) -> None:
        """Take this rank's heads of ``slopes`` [all heads]; kept fp32 whatever the model's dtype."""
        first = self.tp_group.rank() * self.num_heads
        mine = slopes[first : first + self.num_heads]
        if self.log_decay is None or mine != self._slopes:  # a copy to the device waits for all that is queued
            self._slopes, self.log_decay = mine, -torch.tensor(mine, dtype=torch.float32, device=device)

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedSeqParams, **_: Any) -> tuple[Tensor, None]:
        """Map [this rank's tokens, 1, hidden] to [this rank's tokens, 1, hidden]."""
        if self.log_decay is None:
            raise RuntimeError("set_slopes was not called")
        projected = _adapted(self.linear_in, self.linear_in_adapter, hidden_states)
        parts = projected.view(1, -1, self.num_heads, 4, self.head_dim)
        documents = packed_seq_params.documents()
        backend = choose_backend(parts.device, parts.dtype, (self.head_dim, self.head_dim))
        if backend.name == "triton":
            out = self._fused(parts, documents, backend)
        else:
            out = self._unfused(parts, documents, backend)
        return self._output(out), None

    def _fused(self, parts: Tensor, documents: dict[str, Any], backend: BackendChoice) -> Tensor:
        """[1, T, H, 4, D] to [T, 1, H * D] on the fused Triton kernels."""
        assert self.log_decay is not None
        group = self.tp_group if self.tp_group.size() > 1 else None
        out = lightning_layer(
            parts, self.norm.weight, self.log_decay, eps=self.norm.eps, tp_group=group, choice=backend, **documents
        )
        return out.view(-1, 1, out.shape[-1])

    def _unfused(self, parts: Tensor, documents: dict[str, Any], backend: BackendChoice) -> Tensor:
        """[1, T, H, 4, D] to [T, 1, H * D] in PyTorch; only the attention runs on the chosen backend."""
        assert self.log_decay is not None
        q, k, v, gate = parts.unbind(3)
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        out, _state = lightning_attention(q, k, v, self.log_decay, backend=backend, **documents)
        normed: Tensor = self.norm(out.reshape(out.shape[1], 1, -1))
        return normed * torch.sigmoid(gate.reshape(normed.shape))


class SoftmaxAttention(_Attention):
    """Grouped-query causal attention with rotary positions that restart in every document.

    Projection rows per key/value group: [its query heads | k | v].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        model: ModelConfig,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        assert pg_collection is not None
        d = model.head_dim
        super().__init__(config, pg_collection, (model.num_heads + 2 * model.num_kv_heads) * d, model.num_heads * d)
        tp = self.tp_group.size()
        self.layer_number, self.head_dim, self.rotary_dim = layer_number, d, model.rotary_dim
        self.num_groups, self.group = model.num_kv_heads // tp, model.num_heads // model.num_kv_heads
        self.linear_qkv = self._input_projection()
        self.linear_qkv_adapter: nn.Module | None = None
        self.rope_base = 0.0

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedSeqParams, **_: Any) -> tuple[Tensor, None]:
        """Map [this rank's tokens, 1, hidden] to [this rank's tokens, 1, hidden]."""
        projected = _adapted(self.linear_qkv, self.linear_qkv_adapter, hidden_states)
        grouped = projected.view(1, -1, self.num_groups, self.group + 2, self.head_dim)
        q, k, v = grouped.split([self.group, 1, 1], dim=3)
        assert packed_seq_params.positions is not None
        q, k = (
            apply_rotary(x.flatten(2, 3), packed_seq_params.positions, base=self.rope_base, rotary_dim=self.rotary_dim)
            for x in (q, k)
        )
        out = causal_attention(q, k, v.flatten(2, 3), **packed_seq_params.documents())
        return self._output(out.reshape(out.shape[1], 1, -1)), None
