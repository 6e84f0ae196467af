"""Keeps fp32 master weights and Adam's moments in host memory while forward and backward run.

Megatron-Core's own way (``HybridDeviceOptimizer``) updates on the CPU. Here the update stays on the GPU, so every number is
the one without offloading: the state is reloaded before the gradients are read and offloaded when the next step begins.
Checkpoints are written and read in between, on the GPU. Twelve bytes a parameter cross the link in each direction, and the
step waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostState:
    """The state of an optimizer that moves. What lies in the model's own memory (fp32 parameters, shards of them) stays.

    Args:
        parts: Megatron's optimizers, one for each kind of parameter.
        chunks: this rank's chunks of the model.
    """

    def __init__(self, parts: Sequence[Any], chunks: Sequence[Any]) -> None:
        parameters = [param for chunk in chunks for param in chunk.parameters()]
        self._parts, self._device = parts, parameters[0].device
        self._model = {param.untyped_storage().data_ptr() for param in parameters}
        self._offloaded = False

    def offload(self) -> None:
        """Copy the state to pinned host memory; the device's memory is free for what is launched next."""
        if not self._offloaded:
            for tensor in self._tensors():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                tensor.data = host.copy_(tensor.data, non_blocking=True)
            self._offloaded = True

    def reload(self) -> None:
        """Copy the state back to the device."""
        if self._offloaded:
            for tensor in self._tensors():
                here = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                tensor.data = here.copy_(tensor.data, non_blocking=True)
            self._offloaded = False

    def _tensors(self) -> Iterator[Tensor]:
        for part in self._parts:
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    state = part.optimizer.state.get(param, {})
                    for tensor in (param, state.get("exp_avg"), state.get("exp_avg_sq")):
                        if tensor is not None and tensor.untyped_storage().data_ptr() not in self._model:
                            yield tensor
