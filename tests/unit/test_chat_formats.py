"""What a line of conversations says is honoured or refused, and what a template does with it is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_tokenizer import CONTROL, SOURCE, write_tokenizer
from support.sft_data import sft_dataset

from m1_data.chat.conversations import parse_conversation
from m1_data.chat.encoder import ChatEncoder
from m1_data.errors import DataError
from m1_data.sft.dataset import SFTDataset

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + SOURCE
WITH_REASONING = SOURCE.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}",
)
LISTS = SOURCE.replace(
    "{{ m.content }}", "{% for c in m.content if c.type == 'text' %}{{ c.name }}{{ c.text }}{% endfor %}"
)


def line(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": list(messages or (ASK, ANSWER)), **more}).encode()


def encoder(folder: Path, source: str = SOURCE, control: list[str] = CONTROL, **more: Any) -> ChatEncoder:
    return ChatEncoder(write_tokenizer(folder, control, chat_template=source), **more)


def spans(chat: ChatEncoder, text: bytes) -> list[tuple[str, bool]]:
    """The rendered text, joined where the mask is the same."""
    out: list[tuple[str, bool]] = []
    for span in chat.spans(parse_conversation(text, "chats.jsonl:7")):
        before = out.pop()[0] if out and out[-1][1] == span.trained else ""
        out.append((before + span.text, span.trained))
    return out


def trained(chat: ChatEncoder, text: bytes) -> list[str]:
    return [part for part, mask in spans(chat, text) if mask]


def test_tools_are_given_to_the_template(tmp_path: Path) -> None:
    text = "".join(part for part, _ in spans(encoder(tmp_path, WITH_TOOLS), line(tools=[TOOL])))
    assert text.startswith(json.dumps([TOOL]) + "<beginning_of_sentence>user\nq")
    assert "".join(part for part, _ in spans(encoder(tmp_path, WITH_TOOLS), line(tools=[]))).startswith("<begin")
    with pytest.raises(DataError, match='does not write the "tools"') as caught:
        spans(encoder(tmp_path), line(tools=[TOOL]))
    assert caught.value.where.startswith("chats.jsonl:7, template ")


@pytest.mark.parametrize("text", ["<end_of_sentence>", "\ue0000\ue001"])
def test_tools_and_names_cannot_hold_control_tokens(tmp_path: Path, text: str) -> None:
    """They are woven into the template's text, where a control token would be one."""
    chat = encoder(tmp_path, WITH_TOOLS)
    for more in (line(tools=[{"name": f"a{text}"}]), line({**ASK, "name": f"a{text}"}, ANSWER)):
        with pytest.raises(DataError, match="holds the control token"):
            spans(chat, more)


def test_a_template_cannot_make_up_contents(tmp_path: Path) -> None:
    """It writes what stands for a tenth content."""
    with pytest.raises(DataError, match="writes more contents than there are"):
        spans(encoder(tmp_path, "{{ '\ue0009\ue001' }}" + SOURCE), line())


def test_a_system_key_is_the_first_message(tmp_path: Path) -> None:
    chat = encoder(tmp_path)
    system = {"role": "system", "content": "Be brief."}
    assert spans(chat, line(system="Be brief.")) == spans(chat, line(system, ASK, ANSWER))
    assert spans(chat, line(system="")) == spans(chat, line(system=None)) == spans(chat, line())


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_weights_and_train_take_turns_out_of_the_loss(tmp_path: Path, key: dict[str, Any]) -> None:
    chat = encoder(tmp_path)
    assert trained(chat, line(ASK, ANSWER | key, ASK, ANSWER | {"weight": 1})) == ["a<end_of_sentence>"]
    assert trained(chat, line(**key)) == []
    assert trained(chat, line(ASK | {"weight": 0}, ANSWER, weight=1)) == ["a<end_of_sentence>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(weight=0.5), '"weight" is neither 0 nor 1, and there is nothing between: 0\\.5'),
        (line(ASK, ANSWER | {"weight": 2}), '"weight" is neither 0 nor 1.*: 2'),
        (line(train="no"), "\"train\" is neither true nor false: 'no'"),
        (line(weight=1, train=False), '"train" and "weight" say two things: False and 1'),
        (line(ASK | {"weight": 1}, ANSWER), 'only assistant messages have .*"weight": 1'),
        (line(tools={"name": "f"}), '"tools" is not a list of objects'),
        (line(tools=["f"]), '"tools" is not a list of objects'),
        (line(system=["s"]), '"system" is not a string: list'),
        (line({"role": "system", "content": "s"}, ANSWER, system="t"), "system prompt is given twice"),
        (line(functions=[TOOL]), "keys that would be lost: functions"),
        (line(chat_template_kwargs={}, images=[]), "keys that would be lost: chat_template_kwargs, images"),
        (line(ASK | {"name": 3}, ANSWER), '"name" or "tool_call_id" is not a string'),
    ],
)
def test_what_cannot_be_honoured_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_conversation(text, "chats.jsonl:7")
    assert caught.value.where.startswith("chats.jsonl:7")


def test_other_keys_are_counted(tmp_path: Path) -> None:
    assert parse_conversation(line(id=3, domain="math", source="web"), "f:1").unused_keys == ("id", "source")
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([line(id=1), line(id=2, source="web"), line(weight=0)]))
    data = sft_dataset([path], tokenizer_dir=write_tokenizer(tmp_path), seq_len=64, seed=1)
    assert data.stats.unused_keys == {"id": 2, "source": 1}
    assert (data.stats.read, data.stats.conversations, data.stats.unwanted) == (3, 2, 1)


THINKS = {"role": "assistant", "content": "", "reasoning_content": "x"}


@pytest.mark.parametrize("source", [SOURCE, WITH_REASONING], ids=["in the content", "by the template"])
def test_a_turn_of_reasoning_alone_trains_its_end(tmp_path: Path, source: str) -> None:
    chat = encoder(tmp_path, source)
    turns = trained(chat, line(ASK, THINKS, ASK, ANSWER))
    assert len(turns) == 2
    assert turns[0].startswith("<think>")
    assert turns[0].endswith("<end_of_sentence>")
    assert turns[1] == "a<end_of_sentence>"
    assert trained(chat, line(ASK, {"role": "assistant", "content": "<think>x</think>"})) == turns[:1]
    ids = chat.encode(parse_conversation(line(ASK, THINKS, ASK, THINKS), "f:1"))
    assert (ids.ids[ids.trained] == 258).sum() == 2, "two trained ends of a sentence"


@pytest.mark.parametrize("behind", ["", "<end_of_document>"])
@pytest.mark.parametrize("tail", ["</think><end_of_sentence>", " </think>\n<end_of_sentence>", "<end_of_sentence>"])
def test_the_end_of_a_turn_is_what_ends_a_plain_answer(tmp_path: Path, tail: str, behind: str) -> None:
    """A control token before it belongs to the answer; one behind the whole conversation does not."""
    answer = "{% if m.role == 'assistant' %}" + tail + "{% else %}<end_of_sentence>{% endif %}"
    end = "{% if messages[-1].role == 'assistant' %}" + behind + "{% endif %}"
    source = SOURCE.replace("<end_of_sentence>\n", answer).replace("{% if add", end + "{% if add")
    assert trained(encoder(tmp_path, source), line(ASK, ANSWER, ASK, ANSWER)) == ["a" + tail] * 2


def test_one_end_between_turns_and_another_behind_the_last(tmp_path: Path) -> None:
    tail = "{% if loop.last %}<end_of_document>{% else %}<end_of_sentence>{% endif %}"
    chat = encoder(tmp_path, SOURCE.replace("<end_of_sentence>\n", tail))
    assert trained(chat, line(ASK, ANSWER, ASK, ANSWER)) == ["a<end_of_sentence>", "a<end_of_document>"]


def test_templates_that_read_lists_of_parts_get_them(tmp_path: Path) -> None:
    """The released template of this family does, and writes nothing for a text."""
    tool = {"role": "tool", "content": "7", "name": "weather"}
    text = line(ASK, ANSWER, tool, ANSWER)
    assert spans(encoder(tmp_path, LISTS), text) == [
        ("<beginning_of_sentence>user\nq<end_of_sentence>\n<beginning_of_sentence>assistant\n", False),
        ("a<end_of_sentence>", True),
        ("\n<beginning_of_sentence>tool\nweather7<end_of_sentence>\n<beginning_of_sentence>assistant\n", False),
        ("a<end_of_sentence>", True),
        ("\n", False),
    ]
    assert trained(encoder(tmp_path, LISTS), line(ASK, THINKS)) == ["<think>\nx\n</think>\n\n<end_of_sentence>"]
    with pytest.raises(DataError, match="neither as texts nor as lists of parts"):
        encoder(tmp_path, SOURCE.replace("m.content", "m.text"))


DATED = "{{ strftime_now('%d %b %Y') }}\n" + SOURCE


def test_a_template_with_a_clock_needs_a_day(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="writes the present time") as caught:
        encoder(tmp_path, DATED)
    assert caught.value.fix.startswith("set sft.date to the day")
    assert caught.value.where == str(tmp_path / "tokenizer_config.json")
    assert spans(encoder(tmp_path, DATED, date="2026-01-31"), line())[0][0].startswith("31 Jan 2026\n")
    with pytest.raises(DataError, match="random"):
        encoder(tmp_path, "{{ [1, 2] | random }}" + SOURCE)


def test_added_tokens_of_the_vocabulary_are_found_in_contents(tmp_path: Path) -> None:
    """As in documents: what a text becomes does not depend on where it stands."""
    from m1_data.tokenizer import load_tokenizer

    write_tokenizer(tmp_path, chat_template=SOURCE)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"].append({"id": 262, "content": "    ", **flags})
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "x    y<think>" * 3
    ids = ChatEncoder(tmp_path).encode(parse_conversation(line(ASK, ANSWER | {"content": text}), "f:1"))
    alone = load_tokenizer(tmp_path, "").reference.encode(text, add_special_tokens=False).ids
    assert ids.ids[ids.trained].tolist() == [*alone, 258]
    assert alone.count(262) == 3


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_control_tokens_that_depend_on_their_neighbours_are_refused(tmp_path: Path, flag: str) -> None:
    write_tokenizer(tmp_path, chat_template=SOURCE)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token[flag] = token["content"] == "<end_of_sentence>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="writes <end_of_sentence>, which takes white space beside it"):
        ChatEncoder(tmp_path).encode(parse_conversation(line(), "f:1"))


def test_losing_many_conversations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    long = ANSWER | {"content": "z" * 200}
    path.write_bytes(b"\n".join([line()] * 18 + [line(ASK, long)] * 2 + [line(weight=0)] * 5))
    folder = write_tokenizer(tmp_path, chat_template=SOURCE)

    def load(most: float, **more: Any) -> SFTDataset:
        return sft_dataset(
            [path], tokenizer_dir=folder, seq_len=64, seed=1, over_length="drop", max_dropped_share=most, **more
        )

    stats = load(0.08).stats
    assert (stats.read, stats.conversations, stats.dropped_over_length, stats.unwanted) == (25, 18, 2, 5)
    with pytest.raises(DataError, match="2 of 25 conversations would be dropped") as caught:
        load(0.079)
    assert "2 longer than a row of 64 tokens (the longest has 2" in caught.value.where
    assert caught.value.fix == "raise sft.context_tokens, or set sft.max_dropped_share (now 0.079) if this is wanted"
    path.write_bytes(line(weight=0))
    with pytest.raises(DataError, match="no conversation of 1 is left to train") as caught:
        load(1.0)
    assert "1 that ask for no training" in caught.value.where


BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}%s{{ m.content }}<end_of_sentence>"
    "{% endif %}{% endfor %}"
)


def test_an_answer_can_follow_the_end_of_a_question(tmp_path: Path) -> None:
    """Then there is no generation prompt; what a template writes as the head of an answer is none of the model's."""
    assert trained(encoder(tmp_path, BRACKETS.replace("%s", "")), line(ASK, ANSWER)) == ["a<end_of_sentence>"]
    assert trained(encoder(tmp_path, BRACKETS.replace("%s", " ")), line(ASK, ANSWER)) == [" a<end_of_sentence>"]
    for head in ("AI: ", "<beginning_of_sentence>"):
        with pytest.raises(DataError, match="no generation prompt"):
            encoder(tmp_path, BRACKETS.replace("%s", head))


def test_the_prompt_can_stand_where_else_the_document_ends(tmp_path: Path) -> None:
    chat = encoder(tmp_path, SOURCE.replace("{% endif %}", "{% else %}<end_of_document>{% endif %}"))
    assert chat._form.prompt == "<beginning_of_sentence>assistant\n"
    assert trained(chat, line(ASK, ANSWER)) == ["a<end_of_sentence>"]
