"""Math on tensors. Knows nothing of Megatron, of configurations or of this project."""

from m1_kernels.cross_entropy import linear_cross_entropy
from m1_kernels.dispatch import explain_backend, lightning_attention, lightning_decode, lightning_layer
from m1_kernels.experts import grouped_experts, mix_experts
from m1_kernels.norm import add_rms_norm
from m1_kernels.offload import HostInputs
from m1_kernels.recompute import recomputed, recomputing
from m1_kernels.rotary import apply_rotary
from m1_kernels.softmax import causal_attention

__all__ = [
    "HostInputs",
    "add_rms_norm",
    "apply_rotary",
    "causal_attention",
    "explain_backend",
    "grouped_experts",
    "lightning_attention",
    "lightning_decode",
    "lightning_layer",
    "linear_cross_entropy",
    "mix_experts",
    "recomputed",
    "recomputing",
]
