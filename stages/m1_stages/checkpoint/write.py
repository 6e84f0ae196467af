"""Writes Megatron's distributed checkpoint inside this process.

Megatron forks a writer per file and collects results through a spawned manager process: seconds per save, a hang when a
writer is killed, and a re-import of ``__main__``. Training waits for the save either way, so it is written here, by the
same function the writers run.
"""

from __future__ import annotations

import queue
from functools import partial
from pathlib import Path
from typing import Any


def save_in_process(sharded_state_dict: dict[str, Any], directory: Path) -> None:
    """``dist_checkpointing.save`` in torch_dist format, one file per rank, flushed to disk."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class InProcess(TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            filesystem_async._results_queue = queue.Queue()
            request = self.async_save(sharded_state_dict, checkpoint_dir)
            if request.async_fn:
                transforms = request.async_fn.args[0]
                write = partial(filesystem_async.FileSystemWriterAsync.write_preloaded_data, transforms)
                request = request._replace(async_fn=partial(_write, write))
            request.execute_sync()

    dist_checkpointing.save(
        sharded_state_dict, str(directory), sharded_strategy=InProcess("torch_dist", 1, thread_count=1)
    )


def _write(write_bucket: Any, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """What Megatron's ``write_preloaded_data_multiproc`` does, without the processes."""
    done: queue.Queue[Any] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    for index, bucket in enumerate(buckets):
        pending.put(index)
        write_bucket(index, bucket, done, pending, use_fsync=True)
    written: dict[int, Any] = {}
    for _ in buckets:
        index, outcome = done.get_nowait()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[index] = outcome
    results.put(written)
