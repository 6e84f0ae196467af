"""Estimates the seconds of one optimizer step on the slowest rank, by kind of work.

Matrix products and softmax attention go by FLOPs, everything else by bytes. Each kind has one measured share of the GPU's
rate (``hardware.Calibration``). Passes: forward 1, backward 2, and 1 more where the layer is recomputed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from m1_stages.config import ModelConfig
from m1_stages.plan.hardware import CALIBRATION, TRAINER, Calibration, Gpu, Trainer
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory import Activations
from m1_stages.plan.shapes import (
    expert_parameters,
    layers_of_pipeline_rank,
    lightning_sublayer,
    rank_parameters,
    softmax_sublayer,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of an optimizer step by kind of work."""

    projections: float = 0.0
    experts: float = 0.0
    head: float = 0.0
    softmax: float = 0.0
    lightning: float = 0.0
    element_wise: float = 0.0
    moe_index: float = 0.0
    host: float = 0.0
    """Seconds in which the GPU waits for Python and kernel launches."""
    tensor: float = 0.0
    """Gathers and scatters of tensor and sequence parallelism."""
    expert: float = 0.0
    """Exchange of tokens with the experts of other ranks."""
    context: float = 0.0
    """Exchange of attention states, keys and values between context ranks."""
    pipeline: float = 0.0
    """Messages between stages."""
    bubble: float = 0.0
    """Filling and draining the pipeline."""
    data: float = 0.0
    """Reduction of gradients and gather of parameters over data-parallel ranks."""
    optimizer: float = 0.0
    offload: float = 0.0
    """Copies from and to the host that do not overlap with computing."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        parts: Parts = asdict(self)
        return sum(parts.values())

    def as_dict(self) -> dict[str, float]:
        """Return the parts and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class CommGroup:
    """A group of ranks that communicate; its methods give the seconds of collectives.

    Nothing overlaps with computing: the trainer waits. Ranks are numbered as Megatron does: tensor fastest, then context, data,
    pipeline; experts: expert-tensor, expert, replicas, pipeline. A group whose ranks lie ``stride`` apart therefore fills
    machines one after another.
    """

    size: int
    stride: int
    gpu: Gpu
    c: Calibration = CALIBRATION

    @property
    def ranks_on_node(self) -> int:
        """Number of ranks of the group on one machine."""
        return min(self.size, max(1, self.gpu.gpus_per_node // self.stride))

    def ring_collective(self, total_bytes: float, *, times: float = 1.0) -> float:
        """Time ``times`` all-gathers (or reduce-scatters) of ``total_bytes`` over the group; an all-reduce is two of them.

        Between machines a ring enters and leaves each by the network cards of all its ranks there.
        """
        if self.size == 1 or not times:
            return 0.0
        rate = self.gpu.link_bandwidth * self.c.link
        if self.ranks_on_node < self.size:
            rate = min(rate, self.gpu.network_bandwidth * self.c.network * self.ranks_on_node)
        sent = total_bytes * (self.size - 1) / self.size
        return times * (sent / rate + self._latency)

    def all_to_all(self, bytes_per_rank: float, *, times: float = 1.0) -> float:
        """Time ``times`` all-to-alls in which each rank sends ``bytes_per_rank``, its own share included."""
        if self.size == 1 or not times:
            return 0.0
        near = bytes_per_rank * (self.ranks_on_node - 1) / self.size / (self.gpu.link_bandwidth * self.c.link)
        far = (
            bytes_per_rank
            * (self.size - self.ranks_on_node)
            / self.size
            / (self.gpu.network_bandwidth * self.c.network)
        )
        return times * (max(near, far) + self._latency)

    def send_to_next(self, message_bytes: float, *, times: float = 1.0) -> float:
        """Time ``times`` messages to the next rank."""
        if self.size == 1:
            return 0.0
        near = self.stride < self.gpu.gpus_per_node
        rate = self.gpu.link_bandwidth * self.c.link if near else self.gpu.network_bandwidth * self.c.network
        return times * (message_bytes / rate + self.c.latency_s)

    @property
    def _latency(self) -> float:
        return self.c.latency_s + self.c.hop_s * (self.size - self.ranks_on_node)


Parts = dict[str, float]


class StepTimeModel:
    """The time model of one layout; ``step`` gives the time of an optimizer step."""

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
        """Take the ``tokens`` of a micro-batch, each attending to ``pairs`` tokens on average."""
        self.m, self.layout, self.gpu, self.trainer, self.c = m, layout, gpu, trainer, c
        self.size, self.recomputed = (2 if bf16 else 4), (1 if activations.recompute else 0)
        self.activations, self.offload_optimizer, self.bf16 = activations, offload_optimizer, bf16
        self.host_link = gpu.host_link * c.host_bandwidth
        self.flops = gpu.bf16_flops if bf16 else gpu.fp32_flops
        self.copy = gpu.memory_bandwidth * c.bandwidth
        self.pairs, self.tokens = pairs, tokens
        self.t = tokens / layout.context
        self.s = self.t / layout.tensor
        self.width = m.num_heads * m.head_dim / layout.tensor
        self.tp = CommGroup(layout.tensor, 1, gpu, c)
        self.cp = CommGroup(layout.context, layout.tensor, gpu, c)
        self.ep = CommGroup(layout.expert, layout.expert_tensor, gpu, c)
        self.etp = CommGroup(layout.expert_tensor, 1, gpu, c)
        self.all_experts = CommGroup(layout.expert * layout.expert_tensor, 1, gpu, c)
        self.pp = CommGroup(layout.pipeline, layout.gpus // layout.pipeline, gpu, c)

    def step(self, micro_batches: int) -> StepTime:
        """Time a step of ``micro_batches`` micro-batches on every data-parallel rank."""
        kinds = {"lightning": self._layer("lightning"), "softmax": self._layer("softmax")}
        worst: Parts = {}
        last = self.layout.pipeline - 1
        mixes = {layers_of_pipeline_rank(self.m, self.layout, stage): stage for stage in range(last)}
        for stage in {*mixes.values(), last}:
            lightning, softmax = layers_of_pipeline_rank(self.m, self.layout, stage)
            parts = {name: lightning * kinds["lightning"][name] + softmax * kinds["softmax"][name]
                     for name in kinds["lightning"]}  # fmt: skip
            if stage == last:
                for name, seconds in self._head().items():
                    parts[name] = parts.get(name, 0.0) + seconds
            parameters = rank_parameters(self.m, self.layout, stage)
            # Each micro-batch adds its gradients to the fp32 buffer: written, read, added.
            parts["element_wise"] += (parameters.dense + parameters.experts) * (2 * self.size + 8) / self.copy
            gpu_busy = sum(parts.values())
            passes = (lightning + softmax) * (2 + self.recomputed)
            parts["host"] = max(0.0, passes * self.c.host_s_per_layer_pass - gpu_busy)
            # Inputs are offloaded and reloaded while other layers compute.
            copied = 2 * (lightning + softmax) * self.s * self.m.hidden_size * self.size * self.activations.offload
            parts["offload"] = max(0.0, copied / self.host_link - gpu_busy)
            if sum(parts.values()) > sum(worst.values()):
                worst = parts
        message = self.s * self.m.hidden_size * self.size
        worst["pipeline"] = self.pp.send_to_next(message, times=2 * self.layout.virtual_pipeline)
        one_micro_batch = sum(worst.values())
        parts = {name: seconds * micro_batches for name, seconds in worst.items()}
        if self.offload_optimizer:
            # Master weights and moments are reloaded for the update and offloaded before the next forward; both are waited for.
            parts["offload"] += 2 * self._updated() * (12 if self.bf16 else 8) / self.host_link
        parts["host"] += self.m.num_layers / self.layout.pipeline * self.c.host_s_per_layer_step
        return StepTime(
            **parts,
            bubble=(self.layout.pipeline - 1) / self.layout.virtual_pipeline * one_micro_batch,
            **self._per_step(),
        )

    def _layer(self, kind: str) -> Parts:
        m, c, size, t, recomputed = self.m, self.c, self.size, self.t, self.recomputed
        lightning = kind == "lightning"
        sublayer = lightning_sublayer(m) if lightning else softmax_sublayer(m)
        products = 2.0 * t * (sublayer / self.layout.tensor + m.num_experts * m.hidden_size / self.layout.tensor)
        parts = {
            "projections": products * (3 + recomputed) / (self.flops * c.matrix),
            "tensor": self.tp.ring_collective(t * m.hidden_size * size, times=5 + 2 * recomputed),
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
            parts["lightning"] = forward * (1 + recomputed) + backward
            state = 2 * self.layout.context * self.width * m.head_dim * 4
            parts["context"] = self.cp.ring_collective(state, times=2 + recomputed)
        else:
            passes = 1 + c.softmax_backward + (0 if self.trainer.recompute_keeps_softmax else recomputed)
            # A shard's queries follow keys of other shards. cuDNN's causal mask cannot express that, so flash attention is used.
            whole = self.gpu.cudnn and self.layout.context == 1
            share = c.cudnn_attention if whole else self.gpu.flash_attention
            parts["softmax"] = 4.0 * t * self.pairs * self.width * passes / (self.flops * share)
            # Values of a channel: rotation 2, keys and values repeated 2, result copied 2; backward about twice as many.
            parts["element_wise"] += t * (self.width + key_width) * size * 6 * (1 + recomputed + 2) / rate
            parts["context"] = self.cp.ring_collective(self.tokens * key_width * size, times=2 + recomputed)
        return parts

    def _experts(self) -> Parts:
        """Time the experts of one layer with its norms, residuals and router."""
        m, c, size, s, recomputed = self.m, self.c, self.size, self.s, self.recomputed
        h, k, f = m.hidden_size, m.experts_per_token, m.expert_hidden_size
        tensor = self.layout.expert_tensor
        dispatched = self.layout.expert > 1 or tensor > 1
        slots = s * k * (c.expert_imbalance if self.layout.expert > 1 else 1.0)
        # With recomputation gate and up are not kept: the backward recomputes them, two products of three.
        passes = 3 + recomputed * 2 / 3
        # Bytes of a hidden channel, forward: norm 2, norm of sum 3, sum 3, router 1 values; backward: norms 3 and 5, sum 2,
        # sums of gradients 9, and fp32 copies of the router, 20 bytes. (m1_kernels.norm.rms_norm, m1_stages.model.moe)
        channel = 9 * size * (1 + recomputed) + 19 * size + 20
        # Of a slot's channels, forward: row copied 2, rows summed 1.5; SwiGLU 3 of the inner. Backward: rows copied 4, summed
        # 1.5; SwiGLU 9. Recomputation excludes the inside of the experts, but Megatron's dispatcher moves rows again.
        # Expert tensor parallelism gathers the rows of all its ranks and gives each a share of the inner channels.
        rows = (3.5 * (1 + recomputed * dispatched) + 5.5) * tensor * h * size
        per_slot = rows + (3 + 9) * f * size
        return {
            "experts": 2.0 * slots * expert_parameters(m) * passes / (self.flops * c.experts),
            "element_wise": (s * h * channel + slots * per_slot) / (self.copy * c.element_wise),
            "moe_index": slots * (2 + recomputed * dispatched) * c.moe_index_s_per_slot * _H200_COPY / self.copy,
            "expert": self._dispatch(s, slots) * (4 + 2 * recomputed),
        }

    def _dispatch(self, s: float, slots: float) -> float:
        """Time one transfer of tokens to the experts, or back."""
        row, tensor = self.m.hidden_size * self.size, self.layout.expert_tensor
        if self.layout.dispatcher == "allgather":
            return self.all_experts.ring_collective(s * self.all_experts.size * row)
        return self.ep.all_to_all(slots * row) + self.etp.ring_collective(slots * tensor * row)

    def _head(self) -> Parts:
        m, c = self.m, self.c
        rows = m.padded_vocab_size / self.layout.tensor
        # The backward recomputes the logits, whatever run.recompute says: four products.
        products = 4 * 2.0 * self.t * m.hidden_size * rows / (self.flops * c.head)
        traffic = self.t * rows * c.head_bytes_per_logit / self.copy
        return {
            "head": products + traffic,
            "tensor": self.tp.ring_collective(self.t * m.hidden_size * self.size, times=2),
        }

    def _per_step(self) -> dict[str, float]:
        layout, c = self.layout, self.c
        parameters = [rank_parameters(self.m, layout, stage) for stage in range(layout.pipeline)]
        dense, experts = max(x.dense for x in parameters), max(x.experts for x in parameters)
        replicas = CommGroup(layout.dense_replicas, layout.tensor, self.gpu, c)
        expert_replicas = CommGroup(layout.expert_replicas, layout.expert * layout.expert_tensor, self.gpu, c)
        if layout.distributed_optimizer:
            data = replicas.ring_collective(dense * (4 + self.size)) + expert_replicas.ring_collective(
                experts * (4 + self.size)
            )
        else:
            data = replicas.ring_collective(dense * 4, times=2) + expert_replicas.ring_collective(experts * 4, times=2)
        return {"data": data, "optimizer": self._updated() * c.optimizer_bytes_per_parameter / self.copy}

    def _updated(self) -> float:
        """Return the number of parameters that the optimizer of the fullest rank updates."""
        parameters = [rank_parameters(self.m, self.layout, stage) for stage in (0, self.layout.pipeline - 1)]
        dense, experts = max(x.dense for x in parameters), max(x.experts for x in parameters)
        if not self.layout.distributed_optimizer:
            return dense + experts
        return dense / self.layout.dense_replicas + experts / self.layout.expert_replicas


_H200_COPY = 4.8e12 * CALIBRATION.bandwidth
"""Copy bandwidth of the GPU that index work was measured on, bytes/s."""
