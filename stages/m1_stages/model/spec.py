"""How the hybrid is put together for Megatron-Core: its configuration and the specification of every layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.moe import GroupedExperts, Router
from m1_stages.model.norms import RMSNorm, ScaledResidual
from m1_stages.model.packing import Packing


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, bf16: bool, recompute: bool, on_cpu: bool
) -> TransformerConfig:
    """Megatron's configuration of the model; everything that would need Transformer Engine is off."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.expert_hidden_size,
        moe_ffn_hidden_size=model.expert_hidden_size,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.experts_per_token,
        moe_aux_loss_coeff=model.aux_loss_coef,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=not on_cpu,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


class HybridLayer(TransformerLayer):
    """Post-norm residual: the residual is taken after the norm, ``h = alpha * norm(h) + beta * sublayer(norm(h))``.

    Megatron's layer takes the residual before its norm slots, so ours run before them and those stay empty.
    """

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)
        self.attn_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def _forward_attention(self, hidden_states: Tensor, *args: Any, packed_seq_params: Packing, **kwargs: Any) -> Any:
        self.mlp.router.trained_tokens = packed_seq_params.trained_tokens
        normed = self.attn_norm(hidden_states)
        return super()._forward_attention(normed, *args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._forward_mlp(self.mlp_norm(hidden_states), *args, **kwargs)


def block_spec(model: ModelConfig, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Specifications of this pipeline stage's layers, each by its global index."""
    first = get_transformer_layer_offset(config)
    residual = ModuleSpec(module=ScaledResidual, params={"alpha": model.residual_alpha, "beta": model.beta})
    moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(router=Router, experts=ModuleSpec(GroupedExperts)))

    def layer(index: int) -> ModuleSpec:
        kind = SoftmaxAttention if model.is_softmax(index) else LightningAttention
        return ModuleSpec(
            module=HybridLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=IdentityOp,
                self_attention=ModuleSpec(module=kind, params={"model": model}),
                self_attn_bda=residual,
                pre_mlp_layernorm=IdentityOp,
                mlp=moe,
                mlp_bda=residual,
            ),
        )

    count = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer(first + i) for i in range(count)], layer_norm=ModuleSpec(module=RMSNorm)
    )
