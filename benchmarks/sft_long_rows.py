"""Seconds and memory of the data side of rows of a million tokens: conversations tokenized, packed into a row, and its batch.

``python benchmarks/sft_long_rows.py --tokenizer DATA/tokenizer --dir FOLDER [--tokens 125000] [--conversations 8] [--turns 1]``.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from pathlib import Path

import orjson

from m1_data.sft.choice import Selection
from m1_data.sft.dataset import SFTDataset
from m1_data.sft.preview import Preview
from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import SampleStore, write_store
from m1_data.tokenizer import encode_text, text_tokenizer

WORDS = "wait let me check the sum of two numbers however it is four count them again so that it holds"


def write_conversations(path: Path, count: int, words: int, turns: int) -> None:
    """Write conversations of two turns for each of ``turns``, with ``words`` words together."""
    draw = random.Random(0)
    vocabulary = WORDS.split()
    with path.open("wb") as file:
        for number in range(count):
            messages = []
            for _ in range(turns):
                messages.append({"role": "user", "content": f"go on with {number}"})
                answer = " ".join(draw.choices(vocabulary, k=words // turns))
                messages.append({"role": "assistant", "content": answer})
            file.write(orjson.dumps({"messages": messages}) + b"\n")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=125_000)
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    chats, store = given.dir / "long.jsonl", given.dir / "long-store"
    tokenizer = text_tokenizer((given.tokenizer / "tokenizer.json").read_bytes())
    words = int(given.tokens * 10_000 / len(encode_text(tokenizer, "wait let me check the sum of two numbers " * 1111)))
    write_conversations(chats, given.conversations, words, given.turns)
    settings = SampleSettings(paths=(chats,), tokenizer_dir=given.tokenizer)
    began = time.perf_counter()

    def say(what: str) -> None:
        nonlocal began
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{what}: {time.perf_counter() - began:.2f} s; {most:,.0f} MiB at most so far", flush=True)
        began = time.perf_counter()

    say("before")
    write_store(settings, store, key=settings.key())
    say("tokenized")
    data = SFTDataset(SampleStore(store), Selection(seq_len=1 << 20, seed=1))
    lengths = data.store.samples["length"].tolist()
    say(f"opened and packed: {lengths} tokens in {len(data)} rows")
    batch = data.batch([0])
    say(
        f"batch of {batch.tokens.numel():,} tokens, {batch.trained_tokens:,} trained, {len(batch.doc_lengths)} documents"
    )
    spans = Preview(data.store, given.tokenizer).spans(0, 1 << 20)
    say(f"preview of one conversation in {len(spans)} parts")


if __name__ == "__main__":
    main()
