"""Low-rank adaptation (LoRA): which matrices have adapters, of which rank and scale. No torch.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m1_stages.config.sft_section import SftConfig

_ATTENTION_OUT = ("self_attention.linear_out.weight", "self_attention.linear_out_adapter")
LORA_TARGETS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "lightning": (("self_attention.linear_in.weight", "self_attention.linear_in_adapter"), _ATTENTION_OUT),
    "softmax": (("self_attention.linear_qkv.weight", "self_attention.linear_qkv_adapter"), _ATTENTION_OUT),
    "router": (("mlp.router.weight", "mlp.router.adapter"),),
}
"""By target: weight and adapter of each of its matrices, as they are named inside a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapters of a fine-tuning: beside a matrix W, ``scale * B A`` with A [rank, in] and B [out, rank]."""

    stage: str
    """The stage that trains them. A stage that starts from their checkpoint starts from the merged weights."""
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor on the product of the two adapter matrices."""
        return self.alpha / self.rank

    def in_layer(self, *, is_softmax: bool) -> dict[str, str]:
        """Return the adapters of a layer of that kind, by the weight they belong to; both as named inside a layer."""
        other = "lightning" if is_softmax else "softmax"
        return dict(pair for target in self.targets if target != other for pair in LORA_TARGETS[target])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint records them."""
        return {**asdict(self), "targets": list(self.targets)}


def adapter_name(weight: str) -> str | None:
    """Return the name of the adapter that a weight of the whole model can have; None when it can have none."""
    for pairs in LORA_TARGETS.values():
        for part, adapter in pairs:
            if weight.endswith(f".{part}"):
                return weight.removesuffix(part) + adapter
    return None


def recorded_lora(extra: Mapping[str, Any]) -> LoraConfig | None:
    """Return the adapters of a checkpoint, which records them in ``extra`` of its manifest; None when it has none."""
    recorded = extra.get("lora")
    return LoraConfig(**{**recorded, "targets": tuple(recorded["targets"])}) if recorded else None


def configured_lora(sft: SftConfig, stage: str) -> LoraConfig | None:
    """Return the adapters that ``sft`` asks for in ``stage``, the fine-tuning it describes; None when all weights are trained."""
    if not sft.lora_rank:
        return None
    return LoraConfig(stage=stage, rank=sft.lora_rank, alpha=sft.lora_alpha, targets=tuple(sorted(sft.lora_targets)))
