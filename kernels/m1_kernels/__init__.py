"""Math on tensors. Knows nothing of Megatron, of configurations or of this project."""

from m1_kernels.cross_entropy import linear_cross_entropy
from m1_kernels.dispatch import explain_backend, lightning_attention, lightning_decode, lightning_layer
from m1_kernels.rotary import apply_rotary
from m1_kernels.softmax import causal_attention

__all__ = [
    "apply_rotary",
    "causal_attention",
    "explain_backend",
    "lightning_attention",
    "lightning_decode",
    "lightning_layer",
    "linear_cross_entropy",
]
