"""Seconds of one optimizer step on the slowest rank, by kind of work.

Matrix products and softmax attention go by FLOPs, everything else by bytes. Each kind has one measured share of the GPU's
rate (``hardware.Calibration``). Passes: forward 1, backward 2, and 1 more where the layer is computed again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from m1_stages.config import ModelConfig
from m1_stages.plan.comm import Group
from m1_stages.plan.hardware import CALIBRATION, TRAINER, Calibration, Gpu, Trainer
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory import Activations
from m1_stages.plan.shapes import expert, layers_of_stage, lightning_sublayer, local, softmax_sublayer


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step."""

    projections: float = 0.0
    experts: float = 0.0
    head: float = 0.0
    softmax: float = 0.0
    lightning: float = 0.0
    element_wise: float = 0.0
    moe_index: float = 0.0
    host: float = 0.0
    """Waiting for Python and kernel launches."""
    tensor: float = 0.0
    """Gathers and scatters of tensor and sequence parallelism."""
    expert: float = 0.0
    """Tokens to experts and back."""
    context: float = 0.0
    """Attention states, keys and values."""
    pipeline: float = 0.0
    """Messages between stages."""
    bubble: float = 0.0
    """Filling and draining the pipeline."""
    data: float = 0.0
    """Sum of gradients, gather of parameters."""
    optimizer: float = 0.0
    offload: float = 0.0
    """Copies from and to the host that nothing hides."""

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, float]:
        """Parts and sum."""
        return {**asdict(self), "total": self.total}


Parts = dict[str, float]


class StepModel:
    """Times of one layout; ``of`` gives the step."""

    def __init__(
        self,
        m: ModelConfig,
        layout: Layout,
        gpu: Gpu,
        *,
        tokens: int,
        pairs: float,
        bf16: bool,
        activations: Activations,
        offload_optimizer: bool = False,
        trainer: Trainer = TRAINER,
        c: Calibration = CALIBRATION,
    ) -> None:
        """``tokens`` of a micro-batch, each attending to ``pairs`` tokens on average."""
        self.m, self.layout, self.gpu, self.trainer, self.c = m, layout, gpu, trainer, c
        self.size, self.again = (2 if bf16 else 4), (1 if activations.recompute else 0)
        self.activations, self.offload_optimizer, self.bf16 = activations, offload_optimizer, bf16
        self.host_link = gpu.host_link * c.host_bandwidth
        self.flops = gpu.bf16_flops if bf16 else gpu.fp32_flops
        self.copy = gpu.memory_bandwidth * c.bandwidth
        self.pairs, self.tokens = pairs, tokens
        self.t = tokens / layout.context
        self.s = self.t / layout.tensor
        self.width = m.num_heads * m.head_dim / layout.tensor
        self.tp = Group(layout.tensor, 1, gpu, c)
        self.cp = Group(layout.context, layout.tensor, gpu, c)
        self.ep = Group(layout.expert, layout.expert_tensor, gpu, c)
        self.etp = Group(layout.expert_tensor, 1, gpu, c)
        self.all_experts = Group(layout.expert * layout.expert_tensor, 1, gpu, c)
        self.pp = Group(layout.pipeline, layout.gpus // layout.pipeline, gpu, c)

    def of(self, micro_batches: int) -> StepTime:
        """A step of ``micro_batches`` micro-batches on every data-parallel rank."""
        kinds = {"lightning": self._layer("lightning"), "softmax": self._layer("softmax")}
        worst: Parts = {}
        last = self.layout.pipeline - 1
        mixes = {layers_of_stage(self.m, self.layout, stage): stage for stage in range(last)}
        for stage in {*mixes.values(), last}:
            lightning, softmax = layers_of_stage(self.m, self.layout, stage)
            parts = {name: lightning * kinds["lightning"][name] + softmax * kinds["softmax"][name]
                     for name in kinds["lightning"]}  # fmt: skip
            if stage == last:
                for name, seconds in self._head().items():
                    parts[name] = parts.get(name, 0.0) + seconds
            held = local(self.m, self.layout, stage)
            # Each micro-batch adds its gradients to the fp32 buffer: written, read, added.
            parts["element_wise"] += (held.dense + held.experts) * (2 * self.size + 8) / self.copy
            gpu_busy = sum(parts.values())
            passes = (lightning + softmax) * (2 + self.again)
            parts["host"] = max(0.0, passes * self.c.host_s_per_layer_pass - gpu_busy)
            # Inputs leave and come back while other layers compute.
            moved = 2 * (lightning + softmax) * self.s * self.m.hidden_size * self.size * self.activations.offload
            parts["offload"] = max(0.0, moved / self.host_link - gpu_busy)
            if sum(parts.values()) > sum(worst.values()):
                worst = parts
        message = self.s * self.m.hidden_size * self.size
        worst["pipeline"] = self.pp.pass_on(message, times=2 * self.layout.virtual_pipeline)
        one = sum(worst.values())
        parts = {name: seconds * micro_batches for name, seconds in worst.items()}
        if self.offload_optimizer:
            # Master weights and moments come for the update and leave before the next forward, waited for both times.
            parts["offload"] += 2 * self._updated() * (12 if self.bf16 else 8) / self.host_link
        parts["host"] += self.m.num_layers / self.layout.pipeline * self.c.host_s_per_layer_step
        return StepTime(
            **parts, bubble=(self.layout.pipeline - 1) / self.layout.virtual_pipeline * one, **self._per_step()
        )

    def _layer(self, kind: str) -> Parts:
        m, c, size, t, again = self.m, self.c, self.size, self.t, self.again
        lightning = kind == "lightning"
        sublayer = lightning_sublayer(m) if lightning else softmax_sublayer(m)
        products = 2.0 * t * (sublayer / self.layout.tensor + m.num_experts * m.hidden_size / self.layout.tensor)
        parts = {
            "projections": products * (3 + again) / (self.flops * c.matrix),
            "tensor": self.tp.ring(t * m.hidden_size * size, times=5 + 2 * again),
            "softmax": 0.0,
            "lightning": 0.0,
            **self._experts(),
        }
        key_width = 2 * m.num_kv_heads * m.head_dim / self.layout.tensor
        rate = self.copy * c.element_wise
        if lightning:
            tensor = t * self.width * size / self.copy
            # Forward: split 4 + 3, scan 3 + 1, norm and gate 2 + 1. Backward: norm and gate 5, split 6, scan 7, split 9.
            forward, backward = 14 * tensor / c.lightning_forward, 27 * tensor / c.lightning_backward
            parts["lightning"] = forward * (1 + again) + backward
            state = 2 * self.layout.context * self.width * m.head_dim * 4
            parts["context"] = self.cp.ring(state, times=2 + again)
        else:
            passes = 1 + c.softmax_backward + (0 if self.trainer.recompute_keeps_softmax else again)
            # A shard's queries follow keys of other shards, which cuDNN's causal mask cannot say: flash does it.
            whole = self.gpu.cudnn and self.layout.context == 1
            share = c.cudnn_attention if whole else self.gpu.flash_attention
            parts["softmax"] = 4.0 * t * self.pairs * self.width * passes / (self.flops * share)
            # Values of a channel: rotation 2, keys and values repeated 2, result copied 2; backward about twice as many.
            parts["element_wise"] += t * (self.width + key_width) * size * 6 * (1 + again + 2) / rate
            parts["context"] = self.cp.ring(self.tokens * key_width * size, times=2 + again)
        return parts

    def _experts(self) -> Parts:
        """Of one layer, with its norms, residuals and router."""
        m, c, size, s, again = self.m, self.c, self.size, self.s, self.again
        h, k, f = m.hidden_size, m.experts_per_token, m.expert_hidden_size
        tensor = self.layout.expert_tensor
        moved = self.layout.expert > 1 or tensor > 1
        slots = s * k * (c.expert_imbalance if self.layout.expert > 1 else 1.0)
        # With recomputation gate and up are not kept: the backward makes them anew, two products of three.
        passes = 3 + again * 2 / 3
        # Bytes of a hidden channel, forward: norm 2, norm of sum 3, sum 3, router 1 values; backward: norms 3 and 5, sum 2,
        # sums of gradients 9, and fp32 copies of the router, 20 bytes. (m1_kernels.norm.rms_norm, m1_stages.model.moe)
        channel = 9 * size * (1 + again) + 19 * size + 20
        # Of a slot's channels, forward: row copied 2, rows summed 1.5; SwiGLU 3 of the inner. Backward: rows copied 4, summed
        # 1.5; SwiGLU 9. Recomputation leaves the inside of the experts out, but Megatron's dispatcher moves rows again.
        # Expert tensor parallelism gathers the rows of all its ranks and gives each a share of the inner channels.
        rows = (3.5 * (1 + again * moved) + 5.5) * tensor * h * size
        per_slot = rows + (3 + 9) * f * size
        return {
            "experts": 2.0 * slots * expert(m) * passes / (self.flops * c.experts),
            "element_wise": (s * h * channel + slots * per_slot) / (self.copy * c.element_wise),
            "moe_index": slots * (2 + again * moved) * c.moe_index_s_per_slot * _H200_COPY / self.copy,
            "expert": self._dispatch(s, slots) * (4 + 2 * again),
        }

    def _dispatch(self, s: float, slots: float) -> float:
        """Tokens to the experts, or back, once."""
        row, tensor = self.m.hidden_size * self.size, self.layout.expert_tensor
        if self.layout.dispatcher == "allgather":
            return self.all_experts.ring(s * self.all_experts.size * row)
        return self.ep.exchange(slots * row) + self.etp.ring(slots * tensor * row)

    def _head(self) -> Parts:
        m, c = self.m, self.c
        rows = m.padded_vocab_size / self.layout.tensor
        # The backward computes the logits again, whatever run.recompute says: four products.
        products = 4 * 2.0 * self.t * m.hidden_size * rows / (self.flops * c.head)
        traffic = self.t * rows * c.head_bytes_per_logit / self.copy
        return {
            "head": products + traffic,
            "tensor": self.tp.ring(self.t * m.hidden_size * self.size, times=2),
        }

    def _per_step(self) -> dict[str, float]:
        layout, c = self.layout, self.c
        held = [local(self.m, layout, stage) for stage in range(layout.pipeline)]
        dense, experts = max(x.dense for x in held), max(x.experts for x in held)
        replicas = Group(layout.dense_replicas, layout.tensor, self.gpu, c)
        expert_replicas = Group(layout.expert_replicas, layout.expert * layout.expert_tensor, self.gpu, c)
        if layout.distributed_optimizer:
            data = replicas.ring(dense * (4 + self.size)) + expert_replicas.ring(experts * (4 + self.size))
        else:
            data = replicas.ring(dense * 4, times=2) + expert_replicas.ring(experts * 4, times=2)
        return {"data": data, "optimizer": self._updated() * c.optimizer_bytes_per_parameter / self.copy}

    def _updated(self) -> float:
        """Parameters that the optimizer of one rank updates, of the fullest."""
        held = [local(self.m, self.layout, stage) for stage in (0, self.layout.pipeline - 1)]
        dense, experts = max(x.dense for x in held), max(x.experts for x in held)
        if not self.layout.distributed_optimizer:
            return dense + experts
        return dense / self.layout.dense_replicas + experts / self.layout.expert_replicas


_H200_COPY = 4.8e12 * CALIBRATION.bandwidth
"""Copy bandwidth of the GPU that index work was measured on, bytes/s."""
