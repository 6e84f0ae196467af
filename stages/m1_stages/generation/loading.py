"""Opens an engine on a committed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.loading import load_verified
from m1_stages.config import ModelConfig, Resolved
from m1_stages.config.lora import recorded_lora
from m1_stages.errors import EnvironmentProblem
from m1_stages.generation.request import Decode
from m1_stages.runtime import device as device_module
from m1_stages.runtime import parallel

if TYPE_CHECKING:  # these import Megatron-Core, and the device is chosen first
    from m1_stages.generation.engine import Engine, EngineOptions
    from m1_stages.model import ModelChunks


@contextmanager
def open_engine(
    resolved: Resolved, committed: Committed, options: EngineOptions, *, decode: Decode | None = None
) -> Iterator[Engine]:
    """Start the process group, build the model of ``committed`` with its weights, and yield an engine; collective.

    The layout is the configuration's without pipeline and context parallelism (``generation_layout``); the precision is
    ``run.precision``.

    Raises:
        CheckpointError: a file of the checkpoint is not what was written.
        ConfigError: the number of processes does not fit the layout.
        EnvironmentProblem: the device has no room.
    """
    config = resolved.config
    device = device_module.use(config.run.device, local_rank=parallel.local_rank())
    from m1_stages.generation.replica import generation_layout

    layout = generation_layout(config.parallel)
    topology = parallel.start(layout, device=device, seed=config.run.seed)
    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // topology.local_world))
    try:
        from m1_stages.generation.engine import Engine
        from m1_stages.generation.replica import Replica
        from m1_stages.model import build_model

        model = build_model(
            ModelConfig(**committed.meta.extra["model"]),
            parallel=layout,
            precision=config.run.precision,
            rope_base=float(committed.meta.extra["rope_base"]),
            device=device.name,
        )
        load_weights(model, committed)
        yield Engine(model[0], options, replica=Replica.of(layout), decode=decode, weights=committed.path.name)
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"out of memory: {str(error).splitlines()[0][:200]}",
            where=f"device {device.name}",
            fix="more processes with a larger parallel.tensor or parallel.expert divide the weights; fewer slots need less",
        ) from error
    finally:
        parallel.stop()


def load_weights(model: ModelChunks, committed: Committed) -> None:
    """Load weights, decay rates and RoPE base of ``committed`` into a model in place; collective.

    The checkpoint's adapters, if it has any, are merged into the weights.
    Nothing of the checkpoint is changed or renamed. An engine on the model needs ``weights_changed`` afterwards.

    Raises:
        CheckpointError: a file is not what was written.
    """
    from m1_stages.model.lora import adapters_of, merge

    CheckpointStore(committed.path.parent).verify(committed)
    metadata: dict[str, Any] = {"non_homogeneous_layers": True}
    with adapters_of(model, recorded_lora(committed.meta.extra)):
        state = load_verified(committed.path, lambda: {"model": model.sharded_state_dict(metadata=metadata)})
        model.load_state_dict(state["model"])
        merge(model)
    model.set_rope_base(float(committed.meta.extra["rope_base"]))
    model.set_slopes(committed.meta.decay["slopes"])


def replace_weights(engine: Engine, committed: Committed, name: str) -> None:
    """Give the engine's model the weights of another checkpoint of the same shape; answers under way go on with them.

    Raises:
        CheckpointError: a file is not what was written; the engine keeps its weights.
    """
    from m1_stages.model.chunks import ModelChunks

    model = engine.model.model
    load_weights(ModelChunks(model.model_config, [model]), committed)
    engine.weights_changed(name)
