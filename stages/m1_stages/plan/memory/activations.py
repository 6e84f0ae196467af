"""Counts the bytes that one layer keeps for the backward pass, and those that its backward uses.

``t`` is the number of tokens of a context rank, ``s = t / tensor`` that of a rank under sequence parallelism, and ``size``
the bytes of a number.
"""

from __future__ import annotations

from m1_stages.config import ModelConfig
from m1_stages.plan.hardware import CALIBRATION, Trainer
from m1_stages.plan.layout import Layout


class LayerBytes:
    """Bytes that a layer of one kind keeps for the backward when nothing is recomputed, and that the backward itself uses.

    The layer is ``x = norm(h)``, ``y = norm(alpha x + beta attention(x))``, ``alpha y + beta experts(y)``; both norms keep
    their inputs (``m1_kernels.norm.rms_norm_triton``), so h, x, the attention's result and y are kept.
    """

    def __init__(
        self,
        m: ModelConfig,
        layout: Layout,
        kind: str,
        t: float,
        tokens: int,
        size: int,
        trainer: Trainer,
        *,
        keep: bool,
    ) -> None:
        """Count the bytes of a micro-batch of ``tokens`` tokens, ``t`` of them on this context rank.

        ``keep`` says that gate and up of the experts are kept, which recomputation switches off. The attribute ``states`` counts
        the states that enter the segments; a layer's backward has the same number of gradients in addition.
        """
        width = m.num_heads * m.head_dim / layout.tensor
        hidden = t / layout.tensor * m.hidden_size * size  # one [tokens, hidden] of this rank
        heads = t * width * size
        self.attention_output = heads + 4 * t * width / m.head_dim  # output and log-sum-exp
        self.communication = 0.0
        if kind == "lightning":
            # q, k, v, gate before SiLU; result before and after norm and gate: ``save_for_backward`` of
            # m1_kernels.lightning.gpu.fused_layer.
            attention = 6 * heads
            # Gradient of the result after and before norm and gate, of q, k, v, gate; SiLU of q, k, v, their gradients.
            backward = (1 + 1 + 4 + 3 + 3) * heads
            programs = min(_MOST_STATES, m.num_heads / layout.tensor * t / _FEWEST_TOKENS)
            self.states = programs * m.head_dim**2 * 4
            if layout.context > 1:
                self.communication = 2 * layout.context * width * m.head_dim * 4
        else:
            keys = 2 * m.num_kv_heads * m.head_dim / layout.tensor
            held_keys = (tokens if layout.context > 1 else t) * (2 * width if trainer.expands_keys else keys) * size
            # Rotated queries, keys and values, result by documents and joined (one of them when a row is one document).
            attention = heads + held_keys + heads + self.attention_output
            # Gradients of result and queries, before and after rotation, of keys and values, of the projection.
            backward = 4 * heads + held_keys + t * keys * size
            self.states = 0.0
            if layout.context > 1:
                self.communication = 2 * tokens * keys * size
        gathered = t * m.hidden_size * size if layout.tensor > 1 else 0.0
        kept, experts_gradients, received = _experts(m, layout, t / layout.tensor, size, trainer, keep)
        self.communication = max(self.communication, received)
        self.input = hidden
        self.inside = 3 * hidden + attention + kept
        """Bytes kept in addition to the layer's input."""
        # The experts' backward comes first: gradients of the layer's output, of y by the residual and by the experts.
        experts_backward = self.inside + 3 * hidden + experts_gradients
        # The attention's backward follows: x and the gradient by its residual stay; the output projection has released its input.
        attention_backward = 2 * hidden + attention - heads + backward + gathered
        self.backward = max(experts_backward, attention_backward) - self.inside
        """Bytes that the backward uses in addition to ``input`` and ``inside``."""


_MOST_STATES, _FEWEST_TOKENS = 8 * 132, 512
"""The lightning kernel keeps one state per segment and head: at most eight waves of programs on the 132 multiprocessors of an
H100, none shorter than 512 tokens (``m1_kernels.lightning.gpu.segments``)."""


def _experts(
    m: ModelConfig, layout: Layout, s: float, size: int, trainer: Trainer, keep: bool
) -> tuple[float, float, float]:
    """Count the experts' bytes: kept for the backward in addition to y, used by the backward, received from other ranks."""
    h, k, f = m.hidden_size, m.experts_per_token, m.expert_hidden_size / layout.expert_tensor
    routing = s * (2 * 4 * m.num_experts + k * (4 + 8))  # logits and probabilities; weight and index of each slot
    dispatched = layout.expert > 1 or layout.expert_tensor > 1
    weights = 3 * h * f * m.num_experts / layout.expert * size  # gradients of the experts in the weights' dtype
    router = s * h * (4 + 4)  # fp32 copies of y and of its gradient
    if dispatched:
        # Megatron's dispatcher holds the rows of all slots at the same time.
        rows = s * k * layout.expert_tensor * (CALIBRATION.expert_imbalance if layout.expert > 1 else 1.0)
        kept = routing + rows * size * h + keep * rows * size * 2 * f
    else:
        rows = min(s, trainer.tile_tokens) * k
        kept = routing + keep * s * k * 2 * f * size
        if s > trainer.tile_tokens:
            weights *= 1 + 4 / size  # sums over tiles are fp32
    # Rows and their gradients; gate and up unless kept, activation, and their gradients (m1_kernels.moe.experts).
    inside = rows * size * (2 * h + (4 if keep else 6) * f)
    received_rows = s * layout.expert * layout.expert_tensor if layout.dispatcher == "allgather" else rows
    return kept, max(inside + weights, router), 2 * received_rows * h * size if dispatched else 0.0
