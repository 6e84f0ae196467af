"""fp32 master weights and Adam's moments in host memory while forward and backward run.

Megatron-Core's own way (``HybridDeviceOptimizer``) updates on the CPU; here the update stays on the GPU, so every number is
the one without it: the state comes before the gradients are looked at and leaves when the next step begins. Checkpoints are
written and read in between, on the GPU as ever. Twelve bytes a parameter cross the link in each direction and are waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostState:
    """Of one Megatron optimizer. What lies in the model's own memory (fp32 parameters, shards of them) stays."""

    def __init__(self, optimizer: Any, chunks: Sequence[Any]) -> None:
        parameters = [param for chunk in chunks for param in chunk.parameters()]
        self._optimizer, self._device = optimizer, parameters[0].device
        self._model = {param.untyped_storage().data_ptr() for param in parameters}
        self._away = False

    def send_away(self) -> None:
        """To pinned host memory; the device's memory is free for what is launched next."""
        if not self._away:
            for tensor in self._tensors():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                tensor.data = host.copy_(tensor.data, non_blocking=True)
            self._away = True

    def bring_back(self) -> None:
        """To the device."""
        if self._away:
            for tensor in self._tensors():
                here = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                tensor.data = here.copy_(tensor.data, non_blocking=True)
            self._away = False

    def _tensors(self) -> Iterator[Tensor]:
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    state = part.optimizer.state.get(param, {})
                    for tensor in (param, state.get("exp_avg"), state.get("exp_avg_sq")):
                        if tensor is not None and tensor.untyped_storage().data_ptr() not in self._model:
                            yield tensor
