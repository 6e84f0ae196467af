"""Fine-tuning on packed conversations: the same losses and gradients as on each alone, and in every split of the rows."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer
from support.layouts import relative, worst
from support.ranks import run_on_ranks

from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import write_store

BOUND = 1e-6
SHORT, LONG = 128, 4096


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """By the length of a row: conversations that fill four rows of the short ones, and one long row."""
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder, chat_template=SOURCE)
    draw = random.Random(0)
    found = {}
    for seq_len, lengths in ((SHORT, [10, 34, 60, 22, 60, 15, 40, 5]), (LONG, [1700, 300, 1900])):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"q{n}"},
                    {"role": "assistant", "content": "".join(draw.choices("abcdefgh ", k=length)).strip() + "."},
                ]
            }
            for n, length in enumerate(lengths)
        ]
        path = folder / f"{seq_len}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = SampleSettings(paths=(path,), tokenizer_dir=folder)
        write_store(settings, folder / str(seq_len), key=settings.key())
        found[seq_len] = str(folder / str(seq_len))
    return found


def trained(stores: dict[int, str], seq_len: int, world: int = 1, steps: int = 3, **job: Any) -> list[dict[str, Any]]:
    parallel = {"context": job.pop("context", 1)}
    return run_on_ranks(
        world,
        "distributed.sft_rows_worker:train",
        {"store": stores[seq_len], "seq_len": seq_len, "parallel": parallel, "steps": steps, **job},
    )


def assert_same(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in found:
        assert worst(rank["losses"], alone["losses"]) < BOUND
        assert relative(rank["grad_norms"], alone["grad_norms"]) < 10 * BOUND
        assert rank["trained_tokens"] == alone["trained_tokens"]


def test_packed_equals_unpacked(stores: dict[int, str]) -> None:
    (packed,) = trained(stores, SHORT)
    alone = trained(stores, SHORT, alone=True)
    assert (packed["rows"], alone[0]["rows"], packed["samples"]) == (4, 8, 8)
    assert packed["losses"][0] - packed["losses"][-1] > 0.05, "it learns, or equality says little"
    assert_same(alone, packed)


@pytest.mark.parametrize(
    ("world", "split"), [(1, {"micro_batch": 1}), (2, {}), (2, {"micro_batch": 1})], ids=["micro", "DP2", "DP2 micro"]
)
def test_every_split_of_the_rows_is_the_same_step(stores: dict[int, str], world: int, split: dict[str, Any]) -> None:
    found = trained(stores, SHORT, world, **split)
    assert {rank["world"] for rank in found} == {world}
    assert_same(found, trained(stores, SHORT)[0])


def test_a_long_row_over_two_ranks_is_the_same_step(stores: dict[int, str]) -> None:
    (alone,) = trained(stores, LONG, steps=2)
    assert (alone["rows"], alone["samples"]) == (1, 3)
    assert_same(trained(stores, LONG, 2, steps=2, context=2), alone)
