"""Offloading: inputs of recomputed layers are kept in host memory between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostInputs:
    """Offloads the layer inputs of one model to pinned host memory on a side stream, and reloads them one layer ahead.

    At most two inputs are on the device at a time: in the forward pass the one that is being offloaded and the next, in the
    backward pass the one in use and the one before it. The device waits for a copy only when the copy is slower than a layer.
    Copies are exact, so results are bit-identical to those without offloading. Inputs on a CPU are copied at once.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Input | None = None

    def begin(self) -> None:
        """Start the forward pass of a micro-batch: its first layer has no layer before it."""
        if self._last is not None:
            self._last.release()  # in a pipeline its backward pass may be far away
        self._last = None

    def saving(self) -> saved_tensors_hooks:
        """Return the context in which autograd offloads the tensors that it saves."""
        return saved_tensors_hooks(self._save, self._restore)

    def _save(self, x: Tensor) -> Any:
        if x.numel() == 0:  # checkpointing saves an empty tensor in addition to its inputs
            return x
        if self._stream is None and x.is_cuda:
            self._stream = torch.cuda.Stream(x.device)
        if self._last is not None:
            self._last.release()
        self._last = _Input(x, self._last, self._stream)
        return self._last

    def _restore(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        assert isinstance(saved, _Input)
        x = saved.wait()
        if saved.before is not None:
            saved.before.reload()
            saved.before = None
        return x


class _Input:
    def __init__(self, x: Tensor, before: _Input | None, stream: torch.cuda.Stream | None) -> None:
        self.before, self.stream, self.device = before, stream, x.device
        self.on_device: Tensor | None = x.detach()
        """The input on the device: until ``release``, and again from ``reload`` to ``wait``. None in between."""
        if stream is None:
            self.host, self.on_device = x.detach().clone(), None
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(self.on_device, non_blocking=True)
        self.copied = stream.record_event()

    def release(self) -> None:
        """Free the device's memory. Its next user waits for the copy, because this stream does."""
        if self.on_device is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.on_device = None

    def reload(self) -> None:
        """Start the copy back to the device."""
        if self.stream is None or self.on_device is not None:
            return
        self.on_device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may still be in use
        with torch.cuda.stream(self.stream):
            self.on_device.copy_(self.host, non_blocking=True)
        self.copied = self.stream.record_event()

    def wait(self) -> Tensor:
        """Return the input on the device, once it is there. This can be called once."""
        if self.stream is None:
            return self.host
        self.reload()
        assert self.on_device is not None
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        x, self.on_device = self.on_device, None
        return x
