"""Measures how long a rank computes between two waits for the others. A slow GPU shows there, not in a whole step's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class LayerTimer:
    """Times the attention of a rank's first layer on its GPU, by forward hooks that wait for nothing."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        self._layers, self._passes = len(layers), 0
        if not (torch.cuda.is_available() and layers):
            return
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        module: nn.Module = layers[0].self_attention
        module.register_forward_pre_hook(lambda *_: self._events[0].record())
        module.register_forward_hook(self._done)

    def _done(self, *_: object) -> None:
        self._events[1].record()
        self._passes += 1

    def seconds(self) -> float:
        """Seconds of as many such passes as this rank has layers, from the step before; 0 on a CPU, where ranks share cores."""
        return self._layers * self._events[0].elapsed_time(self._events[1]) / 1e3 if self._passes else 0.0
