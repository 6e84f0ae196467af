"""Selection of conversations: patterns of reflection counted by hand, weights, what is held out, and what a pass then holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer
from support.sft_data import open_samples, sft_dataset

from m1_data.errors import DataError
from m1_data.sft.choice import Selection, choose
from m1_data.sft.reflection import PatternCounter

PATTERNS = ("wait", "let me check", "check", "however")
COUNTED = [
    # times, domain, reasoning, answer, matches of the four patterns, counted by hand
    (10, "math", "Wait, let me check. WAIT", "It is four.", (2, 1, 0, 0)),
    (8, "math", "Two and two. However, no wait", "Let  me\ncheck: four, however.", (1, 1, 0, 2)),
    (12, "code", "The waiter awaits a recheck", "checks", (0, 0, 0, 0)),
    (6, "code", "", "Check it, however: check, let me check", (0, 1, 2, 1)),
    (9, "chat", "", "Hello.", (0, 0, 0, 0)),
    (5, "", "wait wait-and-see", "however however", (2, 0, 0, 2)),
]
"""50 conversations."""
FIRST_TURN = "an answer without training says wait, however"


def counted(folder: Path) -> Path:
    """The 50 conversations. What the user says, and what is not trained, does not count."""
    rows = []
    for times, domain, reasoning, answer, _ in COUNTED:
        for number in range(times):
            turns = [
                {"role": "user", "content": f"wait, however: {domain} {number}"},
                {"role": "assistant", "content": FIRST_TURN, "train": False},
                {"role": "user", "content": "check"},
                {"role": "assistant", "content": answer, "reasoning_content": reasoning},
            ]
            rows.append({"messages": turns} | ({"domain": domain} if domain else {}))
    path = folder / "counted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def matches(rows: list[int]) -> dict[str, int]:
    return {
        name: sum(times * COUNTED[row][4][n] for row, times in Counter(rows).items()) for n, name in enumerate(PATTERNS)
    }


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("selection")
    return {
        "paths": [counted(folder)],
        "tokenizer_dir": write_tokenizer(folder, chat_template=SOURCE),
        "patterns": PATTERNS,
        "seq_len": 1024,
        "seed": 1,
    }


ALL = [row for row, (times, *_) in enumerate(COUNTED) for _ in range(times)]


def test_fifty_conversations_counted_by_hand(settings: dict[str, Any]) -> None:
    stats = sft_dataset(**settings).stats
    found = stats.before_selection
    assert found.matches == {"wait": 38, "let me check": 24, "check": 12, "however": 32} == matches(ALL)
    assert (found.conversations, found.reflective) == (50, 29)
    assert stats.after_selection == found
    assert [(d.domain, d.conversations) for d in stats.domains] == [("math", 18), ("code", 18), ("chat", 9), ("", 5)]
    assert (stats.core_share, stats.without_domain) == (36 / 45, 5)
    assert found.trained_tokens == stats.trained_tokens == sum(d.trained_tokens for d in stats.domains)


def test_too_few_patterns_leave_a_conversation_out(settings: dict[str, Any]) -> None:
    """The tokenizer has a token for each byte: matches in 1,000 trained tokens follow from the lengths of the texts."""
    densities = []
    for _, _, reasoning, answer, found in COUNTED:
        text = f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning else answer
        control = text.count("think>") * (len("</think>") - 1) - text.count("<think>")
        densities.append(1000 * sum(found) / (len(text) - control + 1))
    bound = sorted(set(densities))[2]
    kept = [row for row in ALL if densities[row] >= bound]
    assert 0 < len(kept) < 29
    stats = sft_dataset(**settings, min_per_1k=bound - 1e-6).stats
    assert (stats.conversations, stats.left_out) == (len(kept), 50 - len(kept))
    assert stats.after_selection.matches == matches(kept)
    assert stats.before_selection.matches == matches(ALL)
    with pytest.raises(DataError, match="no conversation of 50 is left to train") as caught:
        sft_dataset(**settings, min_per_1k=1000)
    assert "50 with fewer than 1000 matches in 1,000 trained tokens" in caught.value.where


def test_reflective_conversations_are_drawn_as_often_as_asked(settings: dict[str, Any]) -> None:
    twice = sft_dataset(**settings, reflection_weight=2.0)
    assert twice.stats.conversations == 50 + 29
    assert twice.stats.after_selection.reflective == 2 * 29
    assert twice.stats.after_selection.matches == {name: 2 * n for name, n in matches(ALL).items()}
    numbers = Counter(number for row in range(len(twice)) for number in twice.numbers(row))
    assert numbers == {n: 2 if any(COUNTED[row][4]) else 1 for n, row in enumerate(ALL)}
    none = sft_dataset(**settings, reflection_weight=0.0)
    assert (none.stats.conversations, none.stats.after_selection.reflective) == (21, 0)


def test_weights_of_files_change_the_drawn_shares(settings: dict[str, Any], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "domain": "chat"}
    more = tmp_path / "more.jsonl"
    rows = [chat | {"messages": [{"role": "user", "content": str(n)}, chat["messages"][1]]} for n in range(400)]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = settings | {"paths": [*settings["paths"], more]}
    stats = sft_dataset(**both, weights=(3.0, 0.25)).stats
    first, second = stats.files
    assert (first.rows, first.weight, first.drawn) == (50, 3.0, 150)
    assert (second.rows, second.weight) == (400, 0.25)
    assert 70 < second.drawn < 130
    assert stats.conversations == 150 + second.drawn
    assert [d.conversations for d in stats.domains if d.domain == "chat"] == [27 + second.drawn]
    other = sft_dataset(**both | {"seed": 2}, weights=(3.0, 0.25)).stats
    assert other.files[1].drawn != second.drawn
    assert sft_dataset(**both, weights=(0.0, 1.0)).stats.conversations == 400


def test_equal_conversations_are_held_out_together_whatever_the_order(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = settings["paths"][0].read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join([*reversed(lines), *lines]))
    turned = {k: v for k, v in settings.items() if k not in ("paths", "seq_len", "seed")}
    texts = []
    for path in (settings["paths"][0], tmp_path / "turned.jsonl"):
        store = open_samples([path], **turned)
        choice = choose(store, Selection(seq_len=1024, seed=1, held_out=0.3))
        assert choice.counts["held_out"] == len(choice.held_out)
        assert not set(choice.held_out.tolist()) & set(choice.drawn.tolist())
        assert len(choice.held_out) + len(choice.drawn) == len(store.samples)
        texts.append(Counter(store.tokens(n).ids.tobytes() for n in choice.held_out.tolist()))
    assert 5 < len(texts[0]) < 25
    assert texts[1] == {text: 2 * times for text, times in texts[0].items()}
    more = choose(store, Selection(seq_len=1024, seed=1, held_out=0.5)).held_out
    assert set(choice.held_out.tolist()) < set(more.tolist()), "a larger share holds the same ones out, and others"


def test_samples_of_one_conversation_are_held_out_together(settings: dict[str, Any], tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": f"{role} {n}", **({"reasoning_content": "r"} if role == "assistant" else {})}
        for n in range(3)
        for role in ("user", "assistant")
    ]
    path = tmp_path / "rounds.jsonl"
    rows = [{"messages": [{"role": "system", "content": str(n)}, *turns]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_samples([path], tokenizer_dir=settings["tokenizer_dir"], earlier_reasoning="split")
    held_out = choose(store, Selection(seq_len=1024, seed=1, held_out=0.5)).held_out
    assert len(store.samples) == 120
    assert 0 < len(held_out) < 120
    assert set(np.bincount(held_out // 3, minlength=40).tolist()) == {0, 3}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("wait", 1), ("Wait! WAIT?", 2), ("awaits waiter await wait_for", 0), ("that’s not  right", 1),
        ("that's not\nright", 1), ("let me check, check", 2), ("", 0),
    ],
)  # fmt: skip
def test_whole_words_in_any_case_count_once(text: str, found: int) -> None:
    patterns = ("wait", "that's not right", "let me check", "check")
    assert PatternCounter(patterns).count([text]).sum() == found
    assert PatternCounter(()).count([text]).sum() == 0
