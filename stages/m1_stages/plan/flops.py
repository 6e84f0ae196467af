"""Counts FLOPs per token, split into matrix products, softmax and lightning attention, and the cost of generating tokens.

A product of [m, k] and [k, n] is 2 m k n FLOPs. Softmax attention counts the causal half alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from m1_stages.config import ModelConfig
from m1_stages.plan.shapes import expert_parameters, lightning_sublayer, softmax_sublayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """FLOPs per token by part of the model."""

    projections: float
    """Attention projections and routers."""
    experts: float
    head: float
    softmax: float
    """Scores and weighted values of the softmax layers."""
    lightning: float
    """State update and read-out of the lightning layers."""

    @property
    def dense(self) -> float:
        """FLOPs of all products with weights."""
        return self.projections + self.experts + self.head

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.dense + self.softmax + self.lightning

    def scaled(self, factor: float) -> Flops:
        """Return all parts times ``factor``."""
        return Flops(**{name: value * factor for name, value in asdict(self).items()})

    def as_dict(self) -> dict[str, float]:
        """Return the parts and the sums ``dense`` and ``total``."""
        return {**asdict(self), "dense": self.dense, "total": self.total}


def forward_flops(m: ModelConfig, pairs: float) -> Flops:
    """Count one token's forward pass when it attends to ``pairs`` tokens (seq_len / 2 on average in one causal document).

    Lightning: ``S += k^T v`` and ``q S``, 2 D^2 FLOPs each and head; what a kernel computes in
    addition, because it works in chunks, is not counted.
    """
    num_softmax = m.num_layers // m.softmax_every
    num_lightning = m.num_layers - num_softmax
    width = m.num_heads * m.head_dim
    norm = width  # the norm over the heads is no product
    matrices = num_lightning * (lightning_sublayer(m) - norm) + num_softmax * softmax_sublayer(m)
    return Flops(
        projections=2.0 * (matrices + m.num_layers * m.num_experts * m.hidden_size),
        experts=2.0 * m.num_layers * m.experts_per_token * expert_parameters(m),
        head=2.0 * m.vocab_size * m.hidden_size,
        softmax=4.0 * num_softmax * width * pairs,
        lightning=4.0 * num_lightning * width * m.head_dim,
    )


def training_flops(m: ModelConfig, pairs: float) -> Flops:
    """Count forward and backward of one token, the usual three times the forward, without recomputation: the numerator of MFU."""
    return forward_flops(m, pairs).scaled(3.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """FLOPs of generating ``tokens`` tokens one after another, compared with a model of DeepSeek-R1's shape."""

    tokens: int
    ours: float
    r1: float
    """With attention over full heads, as in training and prefill."""
    r1_absorbed: float
    """With attention over the compressed cache, as servers decode: fewer bytes, more FLOPs."""
    last_token: float
    """Ours over R1's (full heads) for the last token alone."""
    published: float | None
    """What the MiniMax-M1 paper says (arXiv 2506.13585, section 1): below 0.5 at 64K, about 0.25 at 100K."""

    @property
    def ratio(self) -> float:
        """Our FLOPs over those of R1 with full heads."""
        return self.ours / self.r1

    @property
    def ratio_absorbed(self) -> float:
        """Our FLOPs over those of R1 with the compressed cache."""
        return self.ours / self.r1_absorbed

    def as_dict(self) -> dict[str, float | None]:
        """Return all fields and both ratios."""
        return {**asdict(self), "ratio": self.ratio, "ratio_absorbed": self.ratio_absorbed}


# DeepSeek-V3/R1 (arXiv 2412.19437, section 4.2): 671B parameters, 37B active, 61 layers, 128 heads; per head 128 + 64
# channels of query and key, 128 of value; the compressed cache has 512 channels and 64 rotated ones.
R1_ACTIVE = 37e9
R1_LAYERS, R1_HEADS = 61, 128
R1_QK, R1_V, R1_CACHE, R1_ROTATED = 192, 128, 512, 64
PUBLISHED_RATIO = {65_536: 0.5, 102_400: 0.25}
"""By generated tokens; for the released shape."""


def r1_per_pair(*, absorbed: bool) -> float:
    """Count R1's FLOPs of attention for one (query, key) pair over all layers: two for each channel of key and value."""
    channels = 2 * R1_CACHE + R1_ROTATED if absorbed else R1_QK + R1_V
    return 2.0 * R1_LAYERS * R1_HEADS * channels


def generation_flops(m: ModelConfig, tokens: int, *, published: bool) -> Generation:
    """Sum over t = 1 .. ``tokens`` the FLOPs of 2 x active parameters + attention to t tokens (softmax) or the state (lightning).

    Active parameters without embedding and head for ours; 37B for R1, as its authors count them. The prompt is not counted.
    """
    per_pair = forward_flops(m, 1.0).softmax
    fixed = forward_flops(m, 0.0)
    base = fixed.projections + fixed.experts + fixed.lightning
    pairs = tokens * (tokens + 1) / 2
    r1 = [2 * R1_ACTIVE * tokens + r1_per_pair(absorbed=absorbed) * pairs for absorbed in (False, True)]
    return Generation(
        tokens=tokens,
        ours=base * tokens + per_pair * pairs,
        r1=r1[0],
        r1_absorbed=r1[1],
        last_token=(base + per_pair * tokens) / (2 * R1_ACTIVE + r1_per_pair(absorbed=False) * tokens),
        published=PUBLISHED_RATIO.get(tokens) if published else None,
    )
