"""Writes and verifies a checkpoint of random tensors with 1, 2 and more threads, as ``CheckpointStore`` does in a run.

    python benchmarks/checkpoint_files.py [--gib 1.5] [--threads 1 2 4] [--dir /dev/shm]

Written means: serialized, hashed, flushed, read back, compared and committed. The folder is a new one below ``--dir``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.config import ParallelConfig
from m1_stages.runtime import device, parallel

TENSOR = 16 << 20
"""Values of each tensor, fp32."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    parallel.start(ParallelConfig(), device=device.use("cpu"), seed=1)
    from megatron.core.dist_checkpointing import ShardedTensor

    tensors = [torch.randn(TENSOR) for _ in range(max(1, round(args.gib * 2**30 / (4 * TENSOR))))]
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    meta = CheckpointMeta(
        stage="32k", stage_step=1, global_step=1, stage_final=False, config_sha256="", data_fingerprint="",
        topology={"world": 1}, decay={"policy": "fixed", "slopes": [[0.5]]},
    )  # fmt: skip
    for threads in args.threads:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            state: dict[str, Any] = {
                f"tensor{n}": ShardedTensor.from_rank_offsets(f"tensor{n}", tensor, replica_id=0)
                for n, tensor in enumerate(tensors)
            }
            store = CheckpointStore(Path(folder) / "checkpoints")
            store.begin({"model": state}, meta)
            began = time.perf_counter()
            store.poll(wait=True)
            written = time.perf_counter()
            store.verify(store.committed()[0])
            verified = time.perf_counter()
        print(
            f"{threads} threads: written at {gigabytes / (written - began):.2f} GB/s, "
            f"verified at {gigabytes / (verified - written):.2f} GB/s",
            flush=True,
        )
    parallel.stop()


if __name__ == "__main__":
    main()
