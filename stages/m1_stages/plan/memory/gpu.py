"""Estimates the memory of one GPU by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from m1_stages.config import ModelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.plan.hardware import CALIBRATION, GIB, TRAINER, Calibration, Trainer
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory.activations import LayerBytes
from m1_stages.plan.shapes import chunk_spans, held_parameters, layers_of_pipeline_rank, trained_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """How a layer's activations are held between forward and backward."""

    recompute: bool = False
    """Only the layer's input is kept (and the output of softmax attention); the rest is recomputed."""
    offload: bool = False
    """The layer's input is offloaded to host memory; at most two inputs are on the device."""


WORKSPACE_GIB = 0.15
"""Memory that torch allocates for cuBLAS (32 MiB a handle and stream on Hopper), batches, counters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of the fullest rank in GiB. ``peak`` is what torch reports as allocated; ``needed`` is what must fit the device."""

    weights: float
    gradients: float
    """The fp32 buffer in which gradients of micro-batches are summed."""
    optimizer: float
    """Master weights (bf16 training) and both moments, fp32."""
    activations: float
    """Activations kept from forward to backward, over all micro-batches in flight."""
    layer: float
    """Largest addition of one layer's backward pass: recomputed activations, gradients and gathered tokens, minus the
    activations that later layers have released by then."""
    states: float
    """fp32 attention states at segment edges and from other context ranks, of the layers that keep them."""
    head: float
    """A chunk of logits with its gradient, and the fp32 gradient of the head."""
    communication: float
    """Gathered keys and values, and tokens sent to experts."""
    update: float
    """Temporaries of the optimizer step, when layer and head have none; with ``optim.offload`` also the reloaded state."""
    workspace: float
    reserve: float
    """Memory outside torch, and memory lost to fragmentation."""
    host_activations: float
    """Offloaded inputs of layers, in pinned host memory; part of no sum of the device."""
    host_optimizer: float
    """Offloaded master weights and moments, in pinned host memory between the updates; part of no sum of the device."""

    @property
    def peak(self) -> float:
        """GiB that torch allocates at most: layers and head do not work at the same time, and the update comes last."""
        busy = self.activations + self.states + max(self.layer + self.communication, self.head)
        return self.weights + self.gradients + self.optimizer + self.workspace + max(busy, self.update)

    @property
    def needed(self) -> float:
        """GiB that the device must have."""
        return self.peak + self.reserve

    @property
    def host(self) -> float:
        """GiB of pinned host memory."""
        return self.host_activations + self.host_optimizer

    def as_dict(self) -> dict[str, float]:
        """Return the parts and the sums ``peak``, ``needed`` and ``host``."""
        return {**asdict(self), "peak": self.peak, "needed": self.needed, "host": self.host}


def estimate_memory(
    m: ModelConfig,
    layout: Layout,
    *,
    tokens: int,
    micro_batches: int,
    bf16: bool,
    activations: Activations,
    offload_optimizer: bool = False,
    lora: LoraConfig | None = None,
    trainer: Trainer = TRAINER,
    c: Calibration = CALIBRATION,
) -> Memory:
    """Estimate the memory of the fullest rank, with micro-batches of ``tokens`` tokens.

    Where adapters are trained (``lora``), frozen weights have neither gradients nor optimizer state. Activations are counted as
    if all weights were trained, which is more than is needed.
    """
    even = m.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0 and not layout.pipeline_layers
    stages = sorted({0, layout.pipeline - 1}) if even else range(layout.pipeline)
    ranks = [
        _pipeline_rank_memory(
            m, layout, stage, tokens, micro_batches, bf16, activations, offload_optimizer, lora, trainer, c
        )
        for stage in stages
    ]
    return max(ranks, key=lambda rank: rank.needed)


def _pipeline_rank_memory(
    m: ModelConfig,
    layout: Layout,
    stage: int,
    tokens: int,
    micro_batches: int,
    bf16: bool,
    activations: Activations,
    offload_optimizer: bool,
    lora: LoraConfig | None,
    trainer: Trainer,
    c: Calibration,
) -> Memory:
    held, trained, size = (
        held_parameters(m, layout, stage, lora),
        trained_parameters(m, layout, stage, lora),
        2 if bf16 else 4,
    )
    recompute = activations.recompute
    shards = (layout.dense_replicas, layout.expert_replicas) if layout.distributed_optimizer else (1, 1)
    sharded = trained.dense / shards[0] + trained.experts / shards[1]
    lightning, softmax = layers_of_pipeline_rank(m, layout, stage)
    kinds = {"lightning": lightning, "softmax": softmax}
    t = tokens / layout.context
    # 1F1B schedule: a stage of a pipeline runs ahead by as many micro-batches as stages follow.
    in_flight: float = min(layout.pipeline - stage, micro_batches)
    if (chunks := layout.virtual_pipeline) > 1:
        # Interleaved, counted in chunks: twice the stages that follow, and all but the last of its own chunks for each stage.
        ahead = 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline + 1
        in_flight = min(ahead / chunks, micro_batches)
    layers = {
        kind: LayerBytes(m, layout, kind, t, tokens, size, trainer, keep=not recompute)
        for kind, n in kinds.items()
        if n
    }
    if recompute:
        saved = {kind: x.input for kind, x in layers.items()}
        backward = {kind: x.inside + x.backward for kind, x in layers.items()}
        if trainer.recompute_keeps_softmax and softmax:
            saved["softmax"] += layers["softmax"].attention_output
            backward["softmax"] -= layers["softmax"].attention_output
        states = 2 * max(x.states for x in layers.values())
    else:
        saved = {kind: x.input + x.inside for kind, x in layers.items()}
        backward = {kind: x.backward for kind, x in layers.items()}
        states = sum(kinds[kind] * x.states for kind, x in layers.items()) * in_flight
        states += max(x.states for x in layers.values())
    # The layers after the last one of a kind have released their activations when its backward runs.
    end = chunk_spans(m.num_layers, layout.pipeline, layout.virtual_pipeline, layout.pipeline_layers, stage)[-1][1]
    every = m.softmax_every
    released_per_layer = {
        kind: saved[kind] - activations.offload * x.input + (0.0 if recompute else x.states)
        for kind, x in layers.items()
    }
    released = {"lightning": 0.0 if end % every else released_per_layer.get("softmax", 0.0)}
    released["softmax"] = end % every * released_per_layer.get("lightning", 0.0)
    kept, offloaded = sum(kinds[kind] * saved[kind] for kind in layers) * in_flight, 0.0
    if activations.offload:
        hidden = next(iter(layers.values())).input
        offloaded = (lightning + softmax) * hidden * in_flight
        kept += 2 * hidden - offloaded
    master = sharded * (12 if bf16 else 8)
    update = trainer.optimizer_copies * 4 * max(trained.dense / shards[0], trained.experts / shards[1])
    last = stage == layout.pipeline - 1
    allocated = Memory(
        weights=(held.dense + held.experts) * size / GIB,
        gradients=(trained.dense + trained.experts) * 4 / GIB,
        optimizer=(0.0 if offload_optimizer else master) / GIB,
        activations=kept / GIB,
        layer=max(backward[kind] - released[kind] for kind in layers) / GIB,
        states=states / GIB,
        head=_head_bytes(m, layout, t, size, trainer) / GIB if last else 0.0,
        communication=max(x.communication for x in layers.values()) / GIB,
        update=(update + offload_optimizer * master) / GIB,
        workspace=WORKSPACE_GIB,
        reserve=0.0,
        host_activations=offloaded / GIB,
        host_optimizer=offload_optimizer * master / GIB,
    )
    return Memory(**{**asdict(allocated), "reserve": c.reserve_gib + c.fragmentation * allocated.peak})


def chunk_tokens(rows: int, trainer: Trainer = TRAINER) -> int:
    """Return the number of tokens whose logits exist at the same time, for a head of ``rows`` rows."""
    return max(trainer.fewest_tokens, trainer.logits_at_once // rows // 256 * 256)


def _head_bytes(m: ModelConfig, layout: Layout, t: float, size: int, trainer: Trainer) -> float:
    rows = m.padded_vocab_size // layout.tensor
    chunk = min(t, chunk_tokens(rows, trainer))
    hidden = 2 * t * m.hidden_size * size  # gathered input and its gradient
    return chunk * rows * (4 + size) + rows * m.hidden_size * (4 + size) + hidden
