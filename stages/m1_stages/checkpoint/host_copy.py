"""Copies a GPU's tensors to host memory that is kept and used again for every checkpoint.

Pinning as much memory as a state has took 7.6 s for 10 GB (docs/LOG.md). Here the values pass through two small pinned buffers
into ordinary memory, whose pages are made once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SLOT_BYTES = 64 << 20
_ALIGNMENT = 64


@dataclass(slots=True)
class _Slot:
    """A pinned buffer, and where what it holds belongs."""

    memory: Tensor
    filled: Any
    """CUDA event after which it holds what it should; None without a GPU."""
    used: int = 0
    targets: list[tuple[int, Tensor]] = field(default_factory=list)
    """Start in the buffer, and the bytes in host memory."""


class HostCopy:
    """Host memory for one copy of a state. The copy before is overwritten.

    Args:
        slot_bytes: of each of the two buffers between.
        cpu_too: tensors on the CPU pass through the buffers, too, as tests without a GPU want it.
    """

    def __init__(self, slot_bytes: int = SLOT_BYTES, *, cpu_too: bool = False) -> None:
        self._slot_bytes, self._cpu_too = slot_bytes, cpu_too
        self._memory: mmap.mmap | None = None
        self._preparation: threading.Thread | None = None
        self._slots: list[_Slot] = []

    def prepare(self, num_bytes: int) -> None:
        """Make the pages of so much memory in a thread: the first copy then takes no longer than later ones.

        It is a guess: a larger copy gets other memory.
        """
        self._memory = _memory(num_bytes)
        pages = np.frombuffer(self._memory, dtype=np.uint8)
        self._preparation = threading.Thread(target=_touch, args=(pages,), name="memory of checkpoints", daemon=True)
        self._preparation.start()

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return complete copies of ``tensors`` on the CPU, each a storage of its own bytes alone, as ``torch.save`` needs it.

        For a tensor on the meta device it is memory without values, for ``transfer``.
        """
        copies = self._views(tensors)
        pairs = zip(tensors, copies, strict=True)
        self.transfer((source, target) for source, target in pairs if not source.is_meta)
        return copies

    def transfer(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy each first tensor to the second, which is in host memory."""
        filling: _Slot | None = None
        for source, target in pairs:
            if not source.is_cuda and not self._cpu_too:  # an optimizer that waits in host memory
                target.copy_(source)
                continue
            if filling is None:
                self._slots = self._slots or self._new_slots(source.is_cuda)
                filling, full = self._slots
            for piece, place in self._pieces(source, target):
                if filling.used + piece.numel() > self._slot_bytes:
                    _record(filling)
                    _empty(full)
                    filling, full = full, filling
                filling.memory[filling.used : filling.used + piece.numel()].copy_(piece, non_blocking=True)
                filling.targets.append((filling.used, place))
                filling.used += piece.numel()
        if filling is not None:
            _record(filling)
            _empty(full)
            _empty(filling)

    def _pieces(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        values, places = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (source, target))
        for start in range(0, values.numel(), self._slot_bytes):
            yield values[start : start + self._slot_bytes], places[start : start + self._slot_bytes]

    def _views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same shapes and dtypes in the memory that is kept."""
        import torch

        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None
        if self._memory is None or len(self._memory) < sum(sizes):
            self._memory = _memory(sum(sizes))
        views, start = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            if tensor.nbytes:
                place = np.frombuffer(self._memory, dtype=np.uint8, count=tensor.nbytes, offset=start)
                views.append(torch.from_numpy(place).view(tensor.dtype).view(tensor.shape))
            else:
                views.append(torch.empty(tensor.shape, dtype=tensor.dtype))
            start += size
        return views

    def _new_slots(self, on_gpu: bool) -> list[_Slot]:
        import torch

        return [
            _Slot(
                memory=torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=on_gpu),
                filled=torch.cuda.Event() if on_gpu else None,
            )
            for _ in range(2)
        ]


def _memory(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, max(1, num_bytes))
    with suppress(AttributeError, OSError):  # without large pages it works, too
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _touch(pages: Any) -> None:
    for start in range(0, len(pages), SLOT_BYTES):
        pages[start : start + SLOT_BYTES : mmap.PAGESIZE] = 0


def _record(slot: _Slot) -> None:
    if slot.filled is not None:
        slot.filled.record()


def _empty(slot: _Slot) -> None:
    """Wait until ``slot`` is filled, and put what it holds in its place."""
    if slot.filled is not None and slot.targets:
        slot.filled.synchronize()
    for start, place in slot.targets:
        place.copy_(slot.memory[start : start + place.numel()])
    slot.used, slot.targets = 0, []
