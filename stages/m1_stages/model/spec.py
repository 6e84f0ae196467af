"""The hybrid for Megatron-Core: its configuration and the specification of every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from m1_kernels import HostInputs, recomputed
from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.moe import MixtureOfExperts
from m1_stages.model.norms import RMSNorm
from m1_stages.model.packed_seq_params import PackedSeqParams
from m1_stages.model.post_norm import post_norm_layer


def transformer_config(model: ModelConfig, parallel: ParallelConfig, *, bf16: bool, on_cpu: bool) -> TransformerConfig:
    """Return Megatron's configuration of the model; everything that would need Transformer Engine is off."""
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
        moe_token_dispatcher_type=parallel.dispatcher,
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
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(model, parallel),
        # In an interleaved pipeline of two both neighbours are one process, and batched messages to it are swapped silently.
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """The content of each chunk in Megatron's layout, which takes splits that its other settings do not."""
    if parallel.pipeline == 1:
        return None
    chunks = [["decoder"] * layers for layers in parallel.chunk_layers(model.num_layers)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


class HybridLayer(TransformerLayer):
    """A decoder layer with the post-norm residual of ``post_norm_layer``; Megatron's own norm and residual slots stay empty."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        alpha: float,
        beta: float,
        recompute: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        self.alpha, self.beta = alpha, beta
        self.set_recompute(recompute, host=None)
        self.attn_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def set_recompute(self, recompute: bool, *, host: HostInputs | None) -> None:
        """Recompute this layer's activations in the backward pass, or keep them. ``host`` offloads the layer's input."""
        self.recompute, self.host = recompute, host
        self.mlp.experts.keep = not recompute

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedSeqParams, **__: Any
    ) -> tuple[Tensor, None]:
        """Map [this rank's tokens, 1, hidden] to [this rank's tokens, 1, hidden], and no context."""
        if self.training and torch.is_grad_enabled() and not hidden_states.requires_grad:
            # Behind a frozen embedding: what is recomputed, and what a pipeline sends on, has gradients only if its input has.
            hidden_states = hidden_states.requires_grad_()
        self.mlp.router.trained_tokens = packed_seq_params.trained_tokens
        attend = partial(self.self_attention, packed_seq_params=packed_seq_params)
        layer = partial(
            post_norm_layer,
            attn_norm=self.attn_norm,
            attention=attend,
            mlp_norm=self.mlp_norm,
            experts=self.mlp,
            alpha=self.alpha,
            beta=self.beta,
        )
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return layer(hidden_states), None
        keep_softmax = isinstance(self.self_attention, SoftmaxAttention)
        return recomputed(layer, hidden_states, keep_softmax=keep_softmax, host=self.host), None


def block_spec(
    model: ModelConfig, config: TransformerConfig, *, chunk: int | None, recompute: bool
) -> TransformerBlockSubmodules:
    """Return the specifications of the layers of this pipeline rank, or of its ``chunk``-th chunk, by their global index."""
    first = get_transformer_layer_offset(config, chunk)
    residual = {"alpha": model.residual_alpha, "beta": model.beta, "recompute": recompute}

    def layer(index: int) -> ModuleSpec:
        kind = SoftmaxAttention if model.is_softmax(index) else LightningAttention
        attention = ModuleSpec(module=kind, params={"model": model})
        submodules = TransformerLayerSubmodules(self_attention=attention, mlp=MixtureOfExperts)
        return ModuleSpec(module=HybridLayer, params=residual, submodules=submodules)

    count = get_num_layers_to_build(config, chunk)
    return TransformerBlockSubmodules(
        layer_specs=[layer(first + i) for i in range(count)], layer_norm=ModuleSpec(module=RMSNorm)
    )
