"""Parallel layouts: which the trainer accepts for a model, a micro-batch and a number of GPUs.

The rules are those of ``m1_stages.config.check`` (divisors), ``m1_stages.runtime.parallel.start`` (processes),
``m1_data.sampling.loader`` (rows of a step, zig-zag shards) and Megatron's sequence parallelism (tokens of a rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from shlex import quote
from typing import Any, Literal

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.plan.stage_workload import StageWorkload


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The sizes of all parallel axes, and how experts and the optimizer are distributed."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each chunk; empty: as even as possible."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    """Ranks that see different rows."""
    distributed_optimizer: bool = False
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"

    @property
    def gpus(self) -> int:
        """Number of ranks, one per GPU."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def dense_replicas(self) -> int:
        """Number of ranks that hold the same attention, embedding and head."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.gpus // (self.expert * self.expert_tensor * self.pipeline)

    def settings(self) -> dict[str, Any]:
        """Return the keys of ``[parallel]`` and their values."""
        names = (
            "tensor",
            "pipeline",
            "virtual_pipeline",
            "pipeline_layers",
            "context",
            "expert",
            "expert_tensor",
            "dispatcher",
            "distributed_optimizer",
        )
        return {name: getattr(self, name) for name in names}

    def arguments(self, base: ParallelConfig | None = None) -> str:
        """Return the ``--set`` arguments that choose this layout, without those that ``base`` has already."""
        return " ".join(
            f"--set {quote(f'parallel.{name}={_toml(value)}')}"
            for name, value in self.settings().items()
            if base is None or getattr(base, name) != value
        )


def layout_from_sizes(parallel: ParallelConfig, sizes: Mapping[str, int]) -> Layout:
    """Return the layout of a run with axis ``sizes``; the settings that are no sizes come from ``parallel``.

    Args:
        parallel: its ``pipeline_layers`` are used when they describe as many chunks as ``sizes`` say, else layers are
            spread evenly.
        sizes: by short axis name, as ``Topology.sizes`` returns them: tp, pp, cp, ep, etp, dp, and vpp if it is not 1.
    """
    pipeline, virtual_pipeline = sizes["pp"], sizes.get("vpp", 1)
    layers = parallel.pipeline_layers
    return Layout(
        tensor=sizes["tp"],
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        pipeline_layers=layers if len(layers) == pipeline * virtual_pipeline else (),
        context=sizes["cp"],
        expert=sizes["ep"],
        expert_tensor=sizes["etp"],
        data=sizes["dp"],
        distributed_optimizer=parallel.distributed_optimizer,
        dispatcher=parallel.dispatcher,
    )


def fewest_gpus(parallel: ParallelConfig) -> int:
    """Return the smallest number of GPUs that the configured layout and the configured processes divide."""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    return lcm(model_ranks, expert_ranks, parallel.processes or 1)


def configured_layout(parallel: ParallelConfig, gpus: int) -> Layout | None:
    """Return the configured layout on ``gpus`` GPUs; None when the sizes do not divide them."""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if gpus % model_ranks or gpus % expert_ranks:
        return None
    sizes = {
        "tp": parallel.tensor,
        "pp": parallel.pipeline,
        "vpp": parallel.virtual_pipeline,
        "cp": parallel.context,
        "ep": parallel.expert,
        "etp": parallel.expert_tensor,
        "dp": gpus // model_ranks,
    }
    return layout_from_sizes(parallel, sizes)


def _toml(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()


def divisors(n: int, most: int) -> list[int]:
    """Return the divisors of ``n`` up to ``most``, ascending."""
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def accepts(m: ModelConfig, layout: Layout, workload: StageWorkload) -> bool:
    """Return whether the trainer runs ``layout`` on the rows of ``workload``."""
    micro_batch_rows = workload.micro_batch_rows_per_rank(layout.data)
    if not micro_batch_rows or layout.pipeline * layout.virtual_pipeline > m.num_layers:
        return False
    if layout.virtual_pipeline > 1 and workload.rows // (layout.data * micro_batch_rows) % layout.pipeline:
        return False
    micro_tokens = workload.seq_len * micro_batch_rows
    expert_ranks = layout.expert * layout.expert_tensor * layout.pipeline
    divides = (
        (m.num_kv_heads, layout.tensor),
        (m.num_experts, layout.expert),
        (m.expert_hidden_size, layout.expert_tensor),
        (layout.gpus, expert_ranks),
        # Two zig-zag shards for each context rank; sequence parallelism cuts what a context rank holds once more.
        (micro_tokens, 2 * layout.context * layout.tensor if layout.context > 1 else layout.tensor),
    )
    return all(n % d == 0 for n, d in divides)


FEWEST_TOKENS_PER_RANK = 1024
"""The search excludes layouts with fewer tokens per context rank: their products are too small to be fast."""


def enumerate_layouts(
    m: ModelConfig, workload: StageWorkload, *, gpus: int, gpus_per_node: int, distributed_optimizer: bool
) -> Iterator[Layout]:
    """Yield the layouts of exactly ``gpus`` GPUs that the trainer accepts.

    Tensor parallelism stays within a machine; pipelines are even and not interleaved.
    """
    most_context = max(1, workload.seq_len * workload.micro_batch_rows // FEWEST_TOKENS_PER_RANK)
    for tensor in divisors(m.num_kv_heads, min(gpus, gpus_per_node)):
        for pipeline in divisors(m.num_layers, gpus // tensor):
            if gpus % (tensor * pipeline):
                continue
            for context in divisors(gpus // (tensor * pipeline), most_context):
                data = gpus // (tensor * pipeline * context)
                if workload.rows % data:
                    continue
                for expert, expert_tensor in _expert_sizes(m, gpus // pipeline, tensor):
                    layout = Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        expert=expert,
                        expert_tensor=expert_tensor,
                        data=data,
                        distributed_optimizer=distributed_optimizer,
                    )
                    if accepts(m, layout, workload):
                        yield layout


def _expert_sizes(m: ModelConfig, ranks: int, tensor: int) -> Iterator[tuple[int, int]]:
    """Yield expert-parallel and expert-tensor-parallel sizes; experts are cut as the attention is, or not at all."""
    for expert in divisors(m.num_experts, ranks):
        for expert_tensor in sorted({1, tensor}):
            if ranks % (expert * expert_tensor) == 0 and m.expert_hidden_size % expert_tensor == 0:
                yield expert, expert_tensor
