"""Inputs of recomputed layers wait in host memory between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostInputs:
    """The layer inputs of one model: copied to pinned host memory on a stream of their own, and back one layer ahead.

    At most two are on the device at a time: in the forward pass the one that is leaving and the next, in the backward the
    one in use and the one before it. The device waits for a copy only when it is slower than a layer. Copies are exact, so
    results are those without it, bit for bit. Inputs on a CPU are copied at once.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Input | None = None

    def begin(self) -> None:
        """A forward pass of a micro-batch starts: its first layer has none before it."""
        if self._last is not None:
            self._last.leave()  # in a pipeline its backward may be far
        self._last = None

    def saving(self) -> saved_tensors_hooks:
        """Context in which autograd hands over what it saves."""
        return saved_tensors_hooks(self._save, self._restore)

    def _save(self, x: Tensor) -> Any:
        if x.numel() == 0:  # checkpointing saves an empty tensor beside its inputs
            return x
        if self._stream is None and x.is_cuda:
            self._stream = torch.cuda.Stream(x.device)
        if self._last is not None:
            self._last.leave()
        self._last = _Input(x, self._last, self._stream)
        return self._last

    def _restore(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        assert isinstance(saved, _Input)
        x = saved.take()
        if saved.before is not None:
            saved.before.fetch()
            saved.before = None
        return x


class _Input:
    def __init__(self, x: Tensor, before: _Input | None, stream: torch.cuda.Stream | None) -> None:
        self.before, self.stream, self.device = before, stream, x.device
        self.here: Tensor | None = x.detach()
        """On the device: until it has left, and again from ``fetch`` to ``take``."""
        if stream is None:
            self.host, self.here = x.detach().clone(), None
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(self.here, non_blocking=True)
        self.copied = stream.record_event()

    def leave(self) -> None:
        """Give the device's memory back. Its next user waits for the copy because this stream does."""
        if self.here is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.here = None

    def fetch(self) -> None:
        """Start the copy back."""
        if self.stream is None or self.here is not None:
            return
        self.here = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have a user still
        with torch.cuda.stream(self.stream):
            self.here.copy_(self.host, non_blocking=True)
        self.copied = self.stream.record_event()

    def take(self) -> Tensor:
        """On the device, once."""
        if self.stream is None:
            return self.host
        self.fetch()
        assert self.here is not None
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        x, self.here = self.here, None
        return x
