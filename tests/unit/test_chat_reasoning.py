"""Earlier reasoning: kept, taken out, or split into a sample of each round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer
from support.sft_data import sft_dataset, spans_of

from m1_data.chat.conversations import conversation_of
from m1_data.chat.reasoning import EarlierReasoning, samples_of
from m1_data.errors import DataError
from m1_data.sft.dataset import SFTDataset


def ai(content: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "2", "name": "f"}
SYSTEM = {"role": "system", "content": "s"}
THREE = [SYSTEM, user("p"), ai("a", "x"), user("q"), ai("", "y", **CALL), RESULT, ai("b", "z"), user("r"), ai("c", "w")]


def texts(earlier: EarlierReasoning, *messages: dict[str, Any]) -> list[str]:
    """Each sample in one line: the reasoning in brackets, trained turns in capitals."""
    out = []
    for sample in samples_of(conversation_of({"messages": list(messages)}, "f:1"), earlier):
        turns = [
            (f"[{m.reasoning}]" if m.reasoning else "") + m.content + ("!" if m.tool_calls else "")
            for m in sample.messages
        ]
        trained = [m.role == "assistant" and m.train for m in sample.messages]
        out.append(" ".join(t.upper() if up else t for t, up in zip(turns, trained, strict=True)))
    return out


def test_three_rounds() -> None:
    assert texts("keep", *THREE) == ["s p [X]A q [Y]! 2 [Z]B r [W]C"]
    assert texts("strip", *THREE) == ["s p A q ! 2 B r [W]C"]
    assert texts("split", *THREE) == ["s p [X]A", "s p a q [Y]! 2 [Z]B", "s p a q ! 2 b r [W]C"]


def test_without_earlier_reasoning_nothing_changes() -> None:
    for one in (
        [user("p"), ai("a", "x")],
        [user("p"), ai("a"), user("q"), ai("b", "y")],
        [ai("hi", "x"), user("p"), ai("a")],
    ):
        assert texts("keep", *one) == texts("split", *one) == texts("strip", *one)


def test_turns_that_are_not_trained_make_no_sample() -> None:
    first = ai("a", "x", train=False)
    assert texts("split", user("p"), first, user("q"), ai("b", "y")) == ["p a q [Y]B"]
    assert texts("split", user("p"), ai("a", "x"), user("q"), ai("b", "y", train=False), user("r")) == ["p [X]A"]
    assert texts("split", user("p"), first, user("q"), first) == ["p [x]a q [x]a"], (
        "one that is then counted as unwanted"
    )


def test_a_turn_of_reasoning_alone_is_not_trained_without_it() -> None:
    assert texts("strip", user("p"), ai("", "x"), user("q"), ai("b", "y")) == ["p  q [Y]B"]
    (sample,) = samples_of(conversation_of({"messages": [user("p"), ai("", "x"), user("q"), ai("b")]}, "f"), "strip")
    assert [m.train for m in sample.messages] == [True, False, True, True]


def test_an_answer_before_the_first_question_belongs_to_the_first_round() -> None:
    assert texts("split", ai("hi"), user("p"), ai("a", "x"), user("q"), ai("b")) == ["HI p [X]A", "hi p a q B"]


FORGETS = SOURCE.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)
"""Writes the reasoning of the last turn only."""


def load(tmp_path: Path, **more: Any) -> SFTDataset:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [m for m in THREE if m not in (THREE[4], RESULT)]}))
    folder = write_tokenizer(tmp_path, chat_template=FORGETS)
    return sft_dataset([path], tokenizer_dir=folder, seq_len=512, seed=1, **more)


def test_a_template_that_forgets_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves out the reasoning of a message") as caught:
        load(tmp_path)
    assert "chats.jsonl:1, message 2, template " in caught.value.where
    assert 'sft.earlier_reasoning to "strip" or "split"' in caught.value.fix
    (whole,) = spans_of(load(tmp_path, earlier_reasoning="strip"), tmp_path)
    assert [t for t, trained in whole if trained] == [
        "a<end_of_sentence>",
        "b<end_of_sentence>",
        "<think>w</think>c<end_of_sentence>",
    ]


def test_split_trains_every_turn_as_it_is_asked_for(tmp_path: Path) -> None:
    data = load(tmp_path, earlier_reasoning="split")
    trained = [[t for t, is_trained in sample if is_trained] for sample in spans_of(data, tmp_path)]
    assert trained == [[f"<think>{r}</think>{a}<end_of_sentence>"] for r, a in ("xa", "zb", "wc")]
    assert (data.stats.read, data.stats.samples, data.stats.conversations) == (1, 3, 3)
    last = "".join(t for t, _ in spans_of(data, tmp_path)[2])
    assert "assistant\na<end_of_sentence>" in last
