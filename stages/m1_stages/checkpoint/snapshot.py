"""Writes Megatron's distributed checkpoint inside this process, in three parts: plan and copy, write, finish.

Megatron's own asynchronous save forks a writer per file and collects results through a spawned manager process: seconds per
save, a hang for ever when a writer is killed or psutil is missing, and a re-import of ``__main__``. Here a thread writes a
copy in host memory, and the parts that need the other ranks stay on the main thread.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from m1_stages.checkpoint.files import HashedFile, in_threads
from m1_stages.checkpoint.host_copy import HostCopy
from m1_stages.checkpoint.single_process import without_collectives
from m1_stages.runtime.collectives import barrier, world

Files = dict[str, tuple[int, str]]
"""Relative path to size in bytes and SHA-256."""

ReadPart = Callable[[str, tuple[int, ...]], Any]
"""Gives the values of a part of a tensor, on the CPU: by the tensor's global key and the part's offset in it."""


Gather = Callable[[list[tuple[Any, Any]]], Iterable[tuple[Any, Any]]]
"""Takes meta tensors and memory of their shape on the CPU; gives values and where in that memory they belong. Collective."""

FILE_BYTES = 256 << 20
"""A rank writes as many files as it has bytes of these, side by side, and at most as many as it has threads."""


class Snapshot:
    """This rank's part of a checkpoint in torch_dist format, in one or several files.

    Constructing it plans with the other ranks; the directory exists and is empty.

    Args:
        sharded_state_dict: as ``dist_checkpointing.save`` takes it; it belongs to Megatron afterwards.
        read: gives the values of tensors that are on the meta device, when they are written: one of them is in memory at a time.
        files: to write, of about the same size; default: by ``FILE_BYTES``.
        host: where a GPU's tensors are copied to; default: memory of its own.
        gather: gives the values of tensors that are on the meta device, when the state is copied.
    """

    def __init__(
        self,
        sharded_state_dict: dict[str, Any],
        directory: Path,
        *,
        read: ReadPart | None = None,
        files: int | None = None,
        host: HostCopy | None = None,
        gather: Gather | None = None,
    ) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        filesystem_async._results_queue = queue.Queue()
        strategy: Any = TorchDistSaveShardedStrategy(thread_count=files or _files_for(sharded_state_dict))
        if world() > 1:  # what several ranks hold, each of them writes a part of
            strategy = FullyParallelSaveStrategyWrapper(strategy)
        with without_collectives(world()):
            request = dist_checkpointing.save(
                sharded_state_dict,
                str(directory),
                sharded_strategy=strategy,
                async_sharded_save=True,
                async_strategy="mcore",
            )
        self._host, self._gather = host or HostCopy(), gather
        self._wanted: list[tuple[Any, Any]] = []
        self._read, self._finish = read, request.finalize_fns
        self._transforms: Any = None
        self._files: list[Any] = []
        self._results: queue.Queue[Any] | None = None
        if request.async_fn:
            (self._transforms,) = request.async_fn.args[0]
            _, self._files, self._results = request.async_fn_args

    def copy(self) -> None:
        """Copy this rank's tensors to host memory; with ``gather`` on all ranks, training may change them."""
        import torch

        def is_copied(tensor: Any) -> bool:
            return self._gather is not None or not tensor.is_meta

        tensors = [tensor for _, _, (_, values) in self._files for _, tensor in values if is_copied(tensor)]
        if torch.cuda.is_initialized():
            copied = self._host.of(tensors)
        else:
            copied = [torch.empty_like(x, device="cpu") if x.is_meta else x.clone() for x in tensors]
        self._wanted = [(tensor, copy) for tensor, copy in zip(tensors, copied, strict=True) if tensor.is_meta]
        copies = iter(copied)
        self._files = [
            (path, key, (data, [(item, next(copies) if is_copied(tensor) else tensor) for item, tensor in values]))
            for path, key, (data, values) in self._files
        ]

    def gather(self) -> None:
        """After ``copy`` on all ranks: copy what the ranks hold parts of; collective."""
        if self._gather is not None:
            self._host.transfer(self._gather(self._wanted))
        self._wanted = []

    def write(self, report_progress: Callable[[], None]) -> Files:
        """Write this rank's files to the disk; no collectives, so any thread may do it, and again after a failure.

        Args:
            report_progress: called after every piece, from which others see that the writer is not stuck.

        Raises:
            OSError: the file system failed.
        """
        import torch

        torch.serialization.set_crc32_options(False)  # one thread's work inside of torch.save; SHA-256 says more
        one_tensor_at_a_time = self._read is not None
        parts = in_threads(
            [partial(self._write_file, file, report_progress) for file in self._files],
            threads=1 if one_tensor_at_a_time else len(self._files),
        )
        if self._results is not None:
            while not self._results.empty():  # of an attempt that failed on another rank
                self._results.get()
            self._results.put({number: items for number, (items, _) in enumerate(parts)})
        return {key: committed for (_, key, _), (_, committed) in zip(self._files, parts, strict=True)}

    def _write_file(
        self, planned: tuple[str, str, tuple[Any, Any]], report_progress: Callable[[], None]
    ) -> tuple[list[Any], tuple[int, str]]:
        from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

        path, key, (data, tensors) = planned
        file: Any
        with HashedFile(Path(path), report_progress) as file:
            written = [
                _write_item(
                    self._transforms, file, self._values(item, value), item, key, SerializationFormat.TORCH_SAVE
                )
                for item, value in [*data, *tensors]
            ]
            return written, file.commit()

    def _values(self, item: Any, value: Any) -> Any:
        if not getattr(value, "is_meta", False):
            return value
        assert self._read is not None, f"{item.index.fqn} is on the meta device"
        read = self._read(item.index.fqn, tuple(item.index.offset or ()))
        assert (read.shape, read.dtype) == (value.shape, value.dtype), f"{item.index.fqn} is not what was planned"
        return read

    def finish(self) -> None:
        """After ``write`` on all ranks: rank 0 writes ``.metadata`` and ``metadata.json``; collective, once a ``write``."""
        for function in self._finish:
            function()


def _files_for(sharded_state_dict: dict[str, Any]) -> int:
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = (v.data for v in nested_values(sharded_state_dict) if isinstance(v, ShardedTensor))
    num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return max(1, min(num_bytes // FILE_BYTES, torch.get_num_threads()))


def save_in_process(sharded_state_dict: dict[str, Any], directory: Path) -> None:
    """``dist_checkpointing.save`` in torch_dist format, flushed to disk; collective."""
    snapshot = Snapshot(sharded_state_dict, directory)
    snapshot.copy()
    snapshot.gather()
    snapshot.write(lambda: None)
    barrier()
    snapshot.finish()
