"""Math on tensors. This package knows nothing of Megatron, of configurations or of the rest of this project."""

from m1_kernels.backend_choice import BackendChoice
from m1_kernels.cross_entropy.linear import linear_cross_entropy
from m1_kernels.decode.bookkeeping import StepInputs, begin_step, end_step
from m1_kernels.decode.post_norm import mix_and_norm, norm_and_route
from m1_kernels.host_inputs import HostInputs
from m1_kernels.lightning.carried import lightning_decode_layer, lightning_prefill_layer
from m1_kernels.lightning.decode import lightning_decode
from m1_kernels.lightning.dispatch import choose_backend, explain_backend, lightning_attention
from m1_kernels.lightning.fused_layer import lightning_layer
from m1_kernels.moe.experts import choose_expert_backend, grouped_experts, mix_experts
from m1_kernels.moe.local_experts import fp32_logits, mix_local_experts, route
from m1_kernels.norm.rms_norm import add_rms_norm
from m1_kernels.recompute import recomputed
from m1_kernels.restoring import recomputing
from m1_kernels.sampling.choose import choose_tokens
from m1_kernels.softmax_attention.attention import causal_attention, choose_softmax_backend
from m1_kernels.softmax_attention.cached import chunk_attention, decode_attention, rotate_into_cache
from m1_kernels.softmax_attention.rotary import apply_rotary, rotary_frequencies, rotate
from m1_kernels.triton_support import choose_elementwise_backend

__all__ = [
    "BackendChoice",
    "HostInputs",
    "StepInputs",
    "add_rms_norm",
    "apply_rotary",
    "begin_step",
    "causal_attention",
    "choose_backend",
    "choose_elementwise_backend",
    "choose_expert_backend",
    "choose_softmax_backend",
    "choose_tokens",
    "chunk_attention",
    "decode_attention",
    "end_step",
    "explain_backend",
    "fp32_logits",
    "grouped_experts",
    "lightning_attention",
    "lightning_decode",
    "lightning_decode_layer",
    "lightning_layer",
    "lightning_prefill_layer",
    "linear_cross_entropy",
    "mix_and_norm",
    "mix_experts",
    "mix_local_experts",
    "norm_and_route",
    "recomputed",
    "recomputing",
    "rotary_frequencies",
    "rotate",
    "rotate_into_cache",
    "route",
]
