"""Prompts of people: files are read strictly, templates write the generation prompt, and text never becomes a control token."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chat_tokenizer import CONTROL, SOURCE, write_tokenizer

from m1_data.chat.conversations import conversation_of, parse_conversation
from m1_data.errors import DataError
from m1_stages.errors import ConfigError
from m1_stages.generation.prompts import Prompt, PromptEncoder, read_prompts

FIRST = 256
"""Id of the first control token; those below are bytes."""
EOD, BEGIN, END, OPEN, CLOSE, _PAD = range(FIRST, FIRST + 6)


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    return PromptEncoder(write_tokenizer(tmp_path, chat_template=SOURCE), "<end_of_document>", None)


def with_names(encoder: PromptEncoder, ids: list[int]) -> str:
    """The text, with control tokens in braces."""
    return "".join("{" + CONTROL[i - FIRST].strip("<>") + "}" if i >= FIRST else encoder.decode([i]) for i in ids)


def test_a_text_is_continued_and_a_chat_is_answered(encoder: PromptEncoder) -> None:
    asked = Prompt(where="here", text="2 + 2<end_of_sentence>")
    assert with_names(encoder, encoder.encode(asked, chat=False)) == "2 + 2<end_of_sentence>"
    assert with_names(encoder, encoder.encode(asked, chat=True)) == (
        "{beginning_of_sentence}user\n2 + 2<end_of_sentence>{end_of_sentence}\n{beginning_of_sentence}assistant\n"
    )
    assert encoder.stop_ids(chat=False) == {EOD}
    assert encoder.stop_ids(chat=True) == {EOD, END}
    for chat in (False, True):
        with pytest.raises(DataError, match="the prompt is empty") as caught:
            encoder.encode(Prompt(where="p.txt:3"), chat=chat)
        assert caught.value.where == "p.txt:3"
    silent = Prompt(where="here", conversation=conversation_of({"messages": [{"role": "user", "content": ""}]}, "here"))
    assert with_names(encoder, encoder.encode(silent, chat=True)) == (
        "{beginning_of_sentence}user\n{end_of_sentence}\n{beginning_of_sentence}assistant\n"
    )


def test_a_prompt_begins_like_the_conversation_that_was_trained(encoder: PromptEncoder, tmp_path: Path) -> None:
    turns = [("system", "be short"), ("user", "<think>a"), ("assistant", "b"), ("user", "c")]
    messages = ", ".join(f'{{"role": "{role}", "content": "{text}"}}' for role, text in turns)
    (tmp_path / "p.jsonl").write_text(f'{{"messages": [{messages}], "id": 7}}\n')
    (asked,) = read_prompts(tmp_path / "p.jsonl")
    ids = encoder.encode(asked, chat=False)
    trained = parse_conversation(f'{{"messages": [{messages}, {{"role": "assistant", "content": "d"}}]}}'.encode(), "x")
    whole = encoder._chat().encode(trained)
    assert ids == whole.ids[: len(ids)].tolist()
    assert whole.trained[: len(ids)].sum() == 2, "the answer b and its end"
    assert encoder.decode(whole.ids[len(ids) :]).startswith("d<end_of_sentence>")
    assert asked.id == 7


def test_a_thinking_budget_writes_control_tokens(encoder: PromptEncoder, tmp_path: Path) -> None:
    budget = encoder.thinking(5, [1, 2])
    assert (budget.budget, budget.opening, budget.closing, budget.is_open) == (5, (OPEN,), (CLOSE,), False)
    assert with_names(encoder, list(budget.forced)) == "\n{/think}\n\n"
    assert encoder.thinking(5, [1, OPEN, 2]).is_open
    assert not encoder.thinking(5, [OPEN, CLOSE, 2]).is_open
    (tmp_path / "plain").mkdir()
    control = [name for name in CONTROL if "think" not in name]
    plain = PromptEncoder(write_tokenizer(tmp_path / "plain", control), "<end_of_document>", None)
    with pytest.raises(ConfigError, match="which the tokenizer does not have"):
        plain.thinking(5, [1])


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('\ufeffone\r\n\n{"prompt": 2}\n')
    texts = [(p.text, p.where) for p in read_prompts(tmp_path / "p.txt")]
    assert texts == [("one", f"{tmp_path}/p.txt:1"), ('{"prompt": 2}', f"{tmp_path}/p.txt:3")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "x", "id": "b"}\n')
    assert [(p.text, p.id) for p in read_prompts(tmp_path / "p.jsonl")] == [("one\ntwo", None), ("x", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b"[1]", 'either "prompt" or "messages"'),
        (b'{"text": "a"}', 'either "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        (b'{"prompt": 3}', '"prompt" must be a string, not int'),
        (b'{"messages": []}', "non-empty list"),
        (b'{"prompt": "a", "n": 3, "max_tokens": 2}', "options of its own: max_tokens, n"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "nothing to answer",
        ),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "unknown role: 'robot'"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert caught.value.where.startswith(f"{tmp_path}/p.jsonl:2")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(DataError, match="the file has no prompt"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(DataError, match="no such file of prompts"):
        read_prompts(tmp_path / "q.txt")
