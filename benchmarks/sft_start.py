"""Seconds and memory of the start of ``m1 sft`` on many short conversations: tokenized the first time, opened the next.

``python benchmarks/sft_start.py --tokenizer DATA/tokenizer --dir FOLDER [--conversations 1000000] [--processes 2]``. Each
part runs in a process of its own and prints its seconds, and its memory at the end and at most.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

WORDS = "wait let me check the sum of two numbers however it is four recheck alternatively count them again so it holds"


def write_conversations(path: Path, count: int) -> None:
    """Write conversations of some 140 tokens, no two the same."""
    draw, words = random.Random(0), WORDS.split()

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    with path.open("wb") as file:
        for number in range(count):
            answer = {"role": "assistant", "reasoning_content": text(draw.randint(10, 60)), "content": text(12)}
            messages = [{"role": "user", "content": f"number {number}: {text(12)}"}, answer]
            file.write(orjson.dumps({"messages": messages, "domain": draw.choice(["math", "code", "chat"])}) + b"\n")


def tokenize(chats: Path, tokenizer: Path, store: Path, processes: int) -> None:
    """Do what the first start does."""
    from m1_data.sft.samples import SampleSettings
    from m1_data.sft.store import write_store

    settings = SampleSettings(paths=(chats,), tokenizer_dir=tokenizer)
    write_store(settings, store, key=settings.key(), processes=processes)


def first_batch(chats: Path, tokenizer: Path, store: Path, processes: int) -> None:
    """Do what every rank does at a restart: look at the files, open, choose, pack, and make a batch."""
    from m1_data.sft.choice import Selection
    from m1_data.sft.dataset import SFTDataset
    from m1_data.sft.samples import SampleSettings
    from m1_data.sft.store import SampleStore, read_manifest

    key = SampleSettings(paths=(chats,), tokenizer_dir=tokenizer).key()
    found = read_manifest(store)
    assert found is not None
    assert found.key == key
    rows = SFTDataset(SampleStore(store), Selection(seq_len=32_768, seed=1, held_out=0.01))
    for row in range(64):
        rows.batch([row])


def measured(name: str, work: Callable[[Path, Path, Path, int], None], *given: Any) -> None:
    """Run in a process of its own and print what it took."""
    import torch  # noqa: F401 - so that the memory before the work holds it

    before, began, ran = _rss_mib(), time.perf_counter(), time.process_time()
    work(*given)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name}: {time.perf_counter() - began:.1f} s by the clock, {time.process_time() - ran:.1f} s of this process; memory "
        f"{before:,.0f} MiB before, {_rss_mib():,.0f} at the end, {most:,.0f} at most with shared libraries",
        flush=True,
    )


def _rss_mib() -> float:
    fields = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    chats = given.dir / f"{given.conversations}.jsonl"
    store = given.dir / f"{given.conversations}-store-{given.processes}"
    given.dir.mkdir(parents=True, exist_ok=True)
    if not chats.is_file():
        write_conversations(chats, given.conversations)
    print(f"{given.conversations:,} conversations, {chats.stat().st_size / 1e6:,.0f} MB")
    for name, work in (("tokenize", tokenize), ("restart", first_batch)):
        if work is tokenize and store.is_dir():
            continue
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(name, work, chats, given.tokenizer, store, given.processes)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
