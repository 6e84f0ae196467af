"""Megatron-Core's optimizer: stepped with a decision in between, offloaded, and gathered for checkpoints."""

from m1_stages.runtime.optimizer.adamw import Optimizer

__all__ = ["Optimizer"]
