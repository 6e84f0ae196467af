"""Chat encoding and templates by values: ids, the template that is taken, the limits, and what a broken tokenizer is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from support.chat_tokenizer import CONTROL, SOURCE, write_tokenizer

from m1_data.chat import sandbox
from m1_data.chat.conversations import parse_conversation
from m1_data.chat.encoder import ChatEncoder
from m1_data.chat.sandbox import SandboxedTemplate
from m1_data.errors import DataError


def talk(*messages: tuple[str, str]) -> Any:
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}).encode()
    return parse_conversation(line, "file:1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


def test_ids_and_mask_of_a_short_conversation(folder: Path) -> None:
    """Control tokens are 256 and on; every byte is an id of its own."""
    encoder = ChatEncoder(write_tokenizer(folder, chat_template=SOURCE))
    encoded = encoder.encode(talk(("user", "q<think>"), ("assistant", "ab")))
    plain = {text: encoder._pieces.plain.encode(text).ids for text in ("user\nq<think>", "\n", "assistant\n", "ab")}
    assert len(plain["user\nq<think>"]) == 13
    ids = [
        257,
        *plain["user\nq<think>"],
        258,
        *plain["\n"],
        257,
        *plain["assistant\n"],
        *plain["ab"],
        258,
        *plain["\n"],
    ]
    assert encoded.ids.tolist() == ids
    mask = [False] * (len(ids) - 4) + [True] * 3 + [False]
    assert encoded.trained.tolist() == mask, "the answer and the token that ends the turn"
    assert (encoded.ids.dtype.name, encoded.trained.dtype.name) == ("int64", "bool")


def test_vocabulary_and_padding(folder: Path) -> None:
    assert (ChatEncoder(folder).vocab_size, ChatEncoder(folder).pad_id) == (262, 261)
    write_tokenizer(folder, pad_token=None)
    assert ChatEncoder(folder).pad_id == 258, "the end of a sentence where there is no padding token"
    write_tokenizer(folder, pad_token={"content": "<end_of_document>"})
    assert ChatEncoder(folder).pad_id == 256
    write_tokenizer(folder, pad_token="nowhere")
    with pytest.raises(
        DataError, match=r"names no pad_token or eos_token among its control tokens \(found 'nowhere'\)"
    ):
        ChatEncoder(folder)


def test_the_given_template_comes_before_the_folders_and_the_shipped_one(folder: Path, tmp_path: Path) -> None:
    assert ChatEncoder(folder).template.where == "the template shipped with m1"
    write_tokenizer(folder, chat_template=SOURCE + "{# config #}")
    assert ChatEncoder(folder).template.source.endswith("{# config #}")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SOURCE + "{# default #}"}]
    write_tokenizer(folder, chat_template=named)
    assert ChatEncoder(folder).template.source.endswith("{# default #}")
    write_tokenizer(folder, chat_template=named[:1])
    with pytest.raises(DataError, match="neither a text nor a list with a template named default"):
        ChatEncoder(folder)
    (folder / "chat_template.jinja").write_text(SOURCE + "{# file #}")
    assert ChatEncoder(folder).template.source.endswith("{# file #}")
    given = tmp_path / "given.jinja"
    given.write_text(SOURCE)
    assert ChatEncoder(folder, given).template.where == str(given)
    with pytest.raises(DataError, match="cannot read the chat template"):
        ChatEncoder(folder, tmp_path / "absent.jinja")


def test_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        ChatEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(DataError, match="unusable tokenizer"):
        ChatEncoder(tmp_path)
    write_tokenizer(tmp_path, control=[token for token in CONTROL if token != "<end_of_sentence>"], eos_token="<pad>")
    with pytest.raises(DataError, match="writes <end_of_sentence>, and the tokenizer has no such control token"):
        ChatEncoder(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SOURCE.partition("{% if")[0], "no generation prompt"),
        (SOURCE.replace("<end_of_sentence>\n", "\n"), "no control token ends the assistant's turn"),
        (SOURCE.replace("{{ m.role }}\n", "{{ m.role }}:"), "before an assistant's text"),
        (SOURCE.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), ""),
        (SOURCE.replace("{{ m.content }}", "{{ m.content | upper }}"), "rewrites the contents"),
    ],
    ids=["no prompt", "no end", "another prompt", "contents twice", "contents rewritten"],
)
def test_templates_that_cannot_be_followed(folder: Path, source: str, message: str) -> None:
    write_tokenizer(folder, chat_template=source)
    if not message:
        spans = ChatEncoder(folder).spans(talk(("user", "q"), ("assistant", "a")))
        assert [(s.text, s.trained) for s in spans if s.is_content] == [("q", False)] * 2 + [("a", True)] * 2
        return
    with pytest.raises(DataError, match=message):
        ChatEncoder(folder).spans(talk(("user", "q"), ("assistant", "a")))


def test_spans_between_two_turns_of_the_assistant(folder: Path) -> None:
    write_tokenizer(folder, chat_template=SOURCE)
    spans = ChatEncoder(folder).spans(talk(("user", "q"), ("assistant", "a"), ("assistant", "b")))
    assert [tuple(span) for span in spans] == [
        ("<beginning_of_sentence>user\n", False, False),
        ("q", False, True),
        ("<end_of_sentence>\n<beginning_of_sentence>assistant\n", False, False),
        ("a", True, True),
        ("<end_of_sentence>", True, False),
        ("\n<beginning_of_sentence>assistant\n", False, False),
        ("b", True, True),
        ("<end_of_sentence>", True, False),
        ("\n", False, False),
    ]


def test_what_joins_reasoning_and_answer_is_trained_too(folder: Path) -> None:
    write_tokenizer(folder, chat_template=SOURCE)
    line = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    }
    spans = ChatEncoder(folder).spans(parse_conversation(json.dumps(line).encode(), "file:1"))
    assert [tuple(span) for span in spans][3:] == [
        ("<think>\n", True, False),
        ("r", True, True),
        ("\n</think>\n\n", True, False),
        ("a", True, True),
        ("<end_of_sentence>", True, False),
        ("\n", False, False),
    ]


def test_of_two_control_tokens_the_longer_is_meant(folder: Path) -> None:
    write_tokenizer(
        folder, [*CONTROL, "<end_of_sentence>!"], chat_template=SOURCE.replace("sentence>\n{% e", "sentence>!{% e")
    )
    ids = ChatEncoder(folder).encode(talk(("user", "q"), ("assistant", "a"))).ids.tolist()
    assert (ids.count(262), ids.count(258)) == (2, 0)


def render(source: str, **variables: Any) -> str:
    return SandboxedTemplate(source, variables, "2026-01-31").render([{"role": "user", "content": "q"}])


def test_templates_are_rendered_as_transformers_does() -> None:
    assert render("  {% if true %}\nx{% endif %}\n") == "x", (
        "blocks take the line break behind and the blanks before them"
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "q"
    assert render("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}") == "13"
    assert render("{{ 'ü' | tojson }} {{ 'ü' | tojson(ensure_ascii=true) }} {{ [1] | tojson(indent=1) }}") == (
        '"ü" "\\u00fc" [\n 1\n]'
    )
    assert render("{{ bos_token }}{{ tools is none }}{{ add_generation_prompt }}", bos_token="<s>") == "<s>TrueFalse"
    assert render("{{ strftime_now('%d %B %Y %H:%M') }}") == "31 January 2026 00:00", "the given day, not today"


def test_steps_are_counted_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template and each round of a loop are a step each."""
    assert (sandbox.MAX_STEPS, sandbox.MAX_OUTPUT_CHARS) == (1_000_000, 33_554_432)
    monkeypatch.setattr(sandbox, "MAX_STEPS", 41)
    template = SandboxedTemplate("{% for a in range(40) %}{{ a }}{% endfor %}", {})
    for _ in range(3):
        assert template.render([]).endswith("39")
    with pytest.raises(SecurityError, match="ran more than 41 steps"):
        SandboxedTemplate("{% for a in range(41) %}{{ a }}{% endfor %}", {}).render([])


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("{{ 'x' * 11 }}", "11 elements with '\\*'"),
        ("{{ 11 * 'x' }}", "11 elements with '\\*'"),
        ("{{ 'xxxx' * 3 }}", "12 elements with '\\*'"),
        ("{{ 'xxxxxx' + 'yyyyy' }}", "11 elements with '\\+'"),
        ("{{ 2 ** 2 }}", "0 elements with '\\*\\*'"),
        ("{% for a in range(11) %}x{% endfor %}", "writes more than 10 characters"),
    ],
)
def test_no_template_builds_or_writes_much(source: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_OUTPUT_CHARS", 10)
    with pytest.raises(SecurityError, match=size):
        render(source)


def test_what_just_fits_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_OUTPUT_CHARS", 10)
    assert render("{{ 'x' * 10 }}") == "x" * 10
    assert render("{{ 'xxxxx' + 'yyyyy' }}") == "xxxxxyyyyy"
    assert render("{{ 3 * 4 }} {{ 20 + 5 }}") == "12 25", "numbers are not counted"
    assert render("{{ 'x' * -1 }}{{ 'xxxxxxxxxxx' * 0 }}{{ '' * 11 }}") == ""
