"""What verifying prepared data costs: writing, opening, and reading one shard of 1 GB. Prints one line per measurement.

python benchmarks/verify_data.py [GB]
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from m1_data.storage.indexed import IndexedReader, IndexedWriter
from m1_data.storage.manifest import ShardEntry
from m1_data.storage.store import open_shard


def main(gigabytes: float) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60_000, round(gigabytes * 5e8), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "shard"
        began, at = time.process_time(), 0
        writer = IndexedWriter(prefix, 64_000, 0)
        while at < len(ids):
            length = int(rng.integers(200, 4_000))
            writer.add(ids[at : at + length])
            at += length
        entry = ShardEntry(source="s", domain="d", bucket="lt32k", prefix="shard", **writer.close())
        report("write", gigabytes, began)
        older = dataclasses.replace(entry, blocks_sha256="")
        for name, shard, whole in (
            ("open, blocks verified whole", entry, True),
            ("open, blocks verified when read", entry, False),
            ("open, SHA-256 of an older version", older, True),
        ):
            began = time.process_time()
            reader = open_shard(Path(folder), shard, whole=whole)
            report(name, gigabytes, began)
            if shard is entry and not whole:
                began = time.process_time()
                read(reader, 2**20)
                print(
                    f"a first row of 1M tokens from documents in random order: {time.process_time() - began:.3f} CPU s"
                )
                began = time.process_time()
                read(reader)
                report("all documents in random order, first time", gigabytes, began)
        began = time.process_time()
        read(IndexedReader(prefix))
        report("all documents in random order, not verified", gigabytes, began)


def read(reader: IndexedReader, most_tokens: int | None = None) -> None:
    tokens = 0
    for document in np.random.default_rng(1).permutation(len(reader)).tolist():
        tokens += len(reader.get(document))
        if most_tokens is not None and tokens > most_tokens:
            return


def report(name: str, gigabytes: float, began: float) -> None:
    seconds = time.process_time() - began
    print(f"{name}: {seconds:.3f} CPU s, {gigabytes / seconds:.2f} GB per CPU s")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
