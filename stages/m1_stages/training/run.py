"""The ``Run`` that one process trains with. ``training.session`` builds it once, complete."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import GuardConfig
from m1_stages.events import Sink
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.device import Device
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.runtime.parallel import Topology
from m1_stages.runtime.signals import StopRequest
from m1_stages.training.checkpointer import Checkpointer

if TYPE_CHECKING:
    from m1_stages.model import ModelChunks  # it imports Megatron-Core, and the device is chosen first


class Rows(Protocol):
    """Packed rows in a fixed order: pretraining and fine-tuning data alike."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def batch(self, row_ids: list[int]) -> PackedBatch: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run holds everything that one process trains with."""

    run_dir: Path
    device: Device
    topology: Topology
    model: ModelChunks
    """This rank's part of the bare model."""
    trainable: TrainableModel
    """The chunks of ``model``, each wrapped for data parallelism."""
    optimizer: Optimizer
    checkpointer: Checkpointer
    emit: Sink
    stop: StopRequest
    guard: GuardConfig
    max_grad_norm: float
    """Gradients are clipped to this norm; 0 switches clipping off."""
    save_every_steps: int
    check_replicas_every: int
    guess_loss: float = math.inf
    """Loss of guessing uniformly, nats."""
