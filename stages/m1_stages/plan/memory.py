"""Memory of one GPU by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from m1_stages.config import ModelConfig
from m1_stages.plan.activations import LayerBytes
from m1_stages.plan.hardware import CALIBRATION, GIB, TRAINER, Calibration, Trainer
from m1_stages.plan.layout import Layout
from m1_stages.plan.shapes import layers_of_stage, local, spans_of_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What becomes of a layer's activations between forward and backward."""

    recompute: bool = False
    """Only its input is kept (and the output of softmax attention); the rest is computed again."""
    offload: bool = False
    """That input waits in host memory; at most two are on the device."""


WORKSPACE_GIB = 0.15
"""Allocated by torch for cuBLAS (32 MiB a handle and stream on Hopper), batches, counters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """GiB on the fullest rank. ``peak`` is what torch reports as allocated; ``needed`` is what must fit the device."""

    weights: float
    gradients: float
    """fp32 buffer that micro-batches are summed in."""
    optimizer: float
    """Master weights (bf16 training) and both moments, fp32."""
    activations: float
    """Kept from forward to backward, over all micro-batches in flight."""
    layer: float
    """Most that the backward pass of one layer has besides: what it computes again, gradients, gathered tokens; less what
    the layers behind it have given back by then."""
    states: float
    """fp32 attention states at segment edges and from other context ranks, of the layers that keep them."""
    head: float
    """A chunk of logits with its gradient, fp32 gradient of the head."""
    communication: float
    """Gathered keys and values, tokens sent to experts."""
    update: float
    """Temporaries of the optimizer step, when layer and head have none; with ``optim.offload`` the optimizer's own part too."""
    workspace: float
    reserve: float
    """Outside torch, and lost to fragmentation."""
    host: float
    """Pinned host memory; in no sum."""

    @property
    def peak(self) -> float:
        """Allocated by torch at its fullest: layers and head are not busy together, the update comes last."""
        busy = self.activations + self.states + max(self.layer + self.communication, self.head)
        return self.weights + self.gradients + self.optimizer + self.workspace + max(busy, self.update)

    @property
    def needed(self) -> float:
        """Of the device."""
        return self.peak + self.reserve

    def as_dict(self) -> dict[str, float]:
        """Parts and sums."""
        return {**asdict(self), "peak": self.peak, "needed": self.needed}


def memory(
    m: ModelConfig,
    layout: Layout,
    *,
    tokens: int,
    micro_batches: int,
    bf16: bool,
    activations: Activations,
    offload_optimizer: bool = False,
    trainer: Trainer = TRAINER,
    c: Calibration = CALIBRATION,
) -> Memory:
    """Of the fullest rank, with micro-batches of ``tokens`` tokens."""
    even = m.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0 and not layout.pipeline_layers
    stages = sorted({0, layout.pipeline - 1}) if even else range(layout.pipeline)
    parts = [
        _of_stage(m, layout, stage, tokens, micro_batches, bf16, activations, offload_optimizer, trainer, c)
        for stage in stages
    ]
    return max(parts, key=lambda part: part.needed)


def _of_stage(
    m: ModelConfig,
    layout: Layout,
    stage: int,
    tokens: int,
    micro_batches: int,
    bf16: bool,
    activations: Activations,
    offload_optimizer: bool,
    trainer: Trainer,
    c: Calibration,
) -> Memory:
    held, size = local(m, layout, stage), 2 if bf16 else 4
    recompute = activations.recompute
    both = held.dense + held.experts
    shards = (layout.dense_replicas, layout.expert_replicas) if layout.distributed_optimizer else (1, 1)
    sharded = held.dense / shards[0] + held.experts / shards[1]
    lightning, softmax = layers_of_stage(m, layout, stage)
    kinds = {"lightning": lightning, "softmax": softmax}
    t = tokens / layout.context
    # One forward, one backward: the first stage of a pipeline runs ahead by as many micro-batches as stages follow.
    in_flight: float = min(layout.pipeline - stage, micro_batches)
    if (chunks := layout.virtual_pipeline) > 1:
        # Interleaved, counted in chunks: twice the stages that follow, and all but the last of its own chunks for each stage.
        ahead = 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline + 1
        in_flight = min(ahead / chunks, micro_batches)
    layer = {
        kind: LayerBytes(m, layout, kind, t, tokens, size, trainer, keep=not recompute)
        for kind, n in kinds.items()
        if n
    }
    if recompute:
        saved = {kind: x.input for kind, x in layer.items()}
        working = {kind: x.inside + x.backward for kind, x in layer.items()}
        if trainer.recompute_keeps_softmax and softmax:
            saved["softmax"] += layer["softmax"].attention_output
            working["softmax"] -= layer["softmax"].attention_output
        states = 2 * max(x.states for x in layer.values())
    else:
        saved = {kind: x.input + x.inside for kind, x in layer.items()}
        working = {kind: x.backward for kind, x in layer.items()}
        states = sum(kinds[kind] * x.states for kind, x in layer.items()) * in_flight
        states += max(x.states for x in layer.values())
    # Layers behind the last one of a kind have let go of theirs when its backward runs.
    end = spans_of_stage(m.num_layers, layout.pipeline, layout.virtual_pipeline, layout.pipeline_layers, stage)[-1][1]
    every = m.softmax_every
    gone = {
        kind: saved[kind] - activations.offload * x.input + (0.0 if recompute else x.states)
        for kind, x in layer.items()
    }
    behind = {"lightning": 0.0 if end % every else gone.get("softmax", 0.0)}
    behind["softmax"] = end % every * gone.get("lightning", 0.0)
    kept, moved = sum(kinds[kind] * saved[kind] for kind in layer) * in_flight, 0.0
    if activations.offload:
        hidden = next(iter(layer.values())).input
        moved = (lightning + softmax) * hidden * in_flight
        kept += 2 * hidden - moved
    master = sharded * (12 if bf16 else 8)
    update = trainer.optimizer_copies * 4 * max(held.dense / shards[0], held.experts / shards[1])
    last = stage == layout.pipeline - 1
    allocated = Memory(
        weights=both * size / GIB,
        gradients=both * 4 / GIB,
        optimizer=(0.0 if offload_optimizer else master) / GIB,
        activations=kept / GIB,
        layer=max(working[kind] - behind[kind] for kind in layer) / GIB,
        states=states / GIB,
        head=_head_bytes(m, layout, t, size, trainer) / GIB if last else 0.0,
        communication=max(x.communication for x in layer.values()) / GIB,
        update=(update + offload_optimizer * master) / GIB,
        workspace=WORKSPACE_GIB,
        reserve=0.0,
        host=(moved + offload_optimizer * master) / GIB,
    )
    return Memory(**{**asdict(allocated), "reserve": c.reserve_gib + c.fragmentation * allocated.peak})


def chunk_tokens(rows: int, trainer: Trainer = TRAINER) -> int:
    """Tokens whose logits exist together, for a head of ``rows`` rows."""
    return max(trainer.fewest_tokens, trainer.logits_at_once // rows // 256 * 256)


def _head_bytes(m: ModelConfig, layout: Layout, t: float, size: int, trainer: Trainer) -> float:
    rows = m.padded_vocab_size // layout.tensor
    chunk = min(t, chunk_tokens(rows, trainer))
    hidden = 2 * t * m.hidden_size * size  # gathered input and its gradient
    return chunk * rows * (4 + size) + rows * m.hidden_size * (4 + size) + hidden
