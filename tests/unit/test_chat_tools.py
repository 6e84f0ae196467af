"""Tool calls and their results: MiniMax-M1's format by its texts and masks, and what templates may do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer

from m1_data.chat.conversations import conversation_of
from m1_data.chat.encoder import ChatEncoder
from m1_data.errors import DataError

END, BEGIN = "<end_of_sentence>", "<beginning_of_sentence>"
TOOL = {"name": "add", "description": "Adds <numbers>.", "parameters": {"type": "object"}}
SETTING = (
    f"{BEGIN}system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
    '{"name": "add", "description": "Adds <numbers>.", "parameters": {"type": "object"}}\n</tools>\n\n'
    "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and "
    'json-object of arguments, following the format below:\n<tool_calls>\n{"name": <tool-name>, "arguments": '
    f"<args-json-object>}}\n...\n</tool_calls>{END}\n"
)
ASK = f"{BEGIN}user name=user\n1+1?{END}\n"
AI = f"{BEGIN}ai name=assistant\n"
RESULT = f"\n{BEGIN}tool name=tools\ntool name: add\ntool result: %s\n\n{END}\n"


def user(text: str = "1+1?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def ai(content: Any = None, *arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "add", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **more}


def result(text: str, call: str = "c0") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call}


def call(arguments: str) -> str:
    return f'{{"name": "add", "arguments": {arguments}}}\n'


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    return ChatEncoder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def talk(*messages: dict[str, Any], **more: Any) -> Any:
    return conversation_of(
        {"messages": list(messages), "tools": [{"type": "function", "function": TOOL}], **more}, "f:7"
    )


def spans(chat: ChatEncoder, *messages: dict[str, Any], **more: Any) -> list[str]:
    """The rendered text, cut where the mask changes: not trained, trained, and so on."""
    out = [""]
    for span in chat.spans(talk(*messages, **more)):
        if span.trained != (len(out) % 2 == 0):
            out.append("")
        out[-1] += span.text
    return out


def test_one_call(shipped: ChatEncoder) -> None:
    assert spans(shipped, user(), ai(None, {"a": 1, "b": "ü\n\"x\""}), result("2"), ai("It is 2.")) == [
        SETTING + ASK + AI,
        "<tool_calls>\n" + call('{"a": 1, "b": "ü\\n\\"x\\""}') + "</tool_calls>" + END,
        RESULT % "2" + AI,
        "It is 2." + END,
        "\n",
    ]  # fmt: skip


def test_two_parallel_calls(shipped: ChatEncoder) -> None:
    messages = [
        {"role": "system", "content": "S"},
        user(),
        ai("", {"a": 1}, {}),
        result("2"),
        result("3", "c1"),
        ai("5"),
    ]
    assert spans(shipped, *messages) == [
        f"{BEGIN}system ai_setting=assistant\nS{END}\n" + SETTING + ASK + AI,
        "<tool_calls>\n" + call('{"a": 1}') + call("{}") + "</tool_calls>" + END,
        RESULT % "2" + (RESULT % "3")[1:] + AI,
        "5" + END,
        "\n",
    ]  # fmt: skip


def test_content_and_reasoning_beside_calls(shipped: ChatEncoder) -> None:
    both = ai("I add.", {"a": 1}, reasoning_content="Add.")
    calls = "<tool_calls>\n" + call('{"a": 1}') + "</tool_calls>" + END
    assert spans(shipped, user(), both)[1] == "<think>\nAdd.\n</think>\n\nI add.\n" + calls
    assert spans(shipped, user(), ai("<think>Add.</think>", {"a": 1}))[1] == "<think>\nAdd.\n</think>\n" + calls
    assert spans(shipped, user(), both | {"train": False}) == ["".join(spans(shipped, user(), both))]


@pytest.mark.parametrize("place", ["result", "arguments", "name"])
def test_control_tokens_stay_text(shipped: ChatEncoder, place: str) -> None:
    """In what a tool says, in arguments and in names: only the template writes ids of control tokens."""
    turn = ai(None, {"a": END if place == "arguments" else "x"})
    turn["tool_calls"][0]["function"]["name"] = f"f{END}" if place == "name" else "fx"
    messages = [user(), turn, {"role": "tool", "content": END if place == "result" else "x", "name": "f"}, ai("2")]
    encoded = shipped.encode(talk(*messages))
    assert END * 2 not in "".join(spans(shipped, *messages))
    assert [(encoded.ids == 258).sum(), (encoded.ids[encoded.trained] == 258).sum()] == [5, 2]
    text = "".join(chr(i) for i in shipped._pieces.encode(END, "within"))
    assert text in "".join(chr(i) for i in encoded.ids)
    assert len(encoded.ids) == len(shipped.encode(talk(*json.loads(json.dumps(messages).replace(END, "x")))).ids) + 16


def test_string_and_object_arguments_are_the_same(shipped: ChatEncoder) -> None:
    arguments = {"b": [1.5, None, True, {"c": "d"}], "a": "x"}
    a, b = (shipped.encode(talk(user(), ai(None, form))) for form in (arguments, json.dumps(arguments, indent=3)))
    assert (a.ids.tolist(), a.trained.tolist()) == (b.ids.tolist(), b.trained.tolist())
    assert spans(shipped, user(), ai(None, ""))[1] == spans(shipped, user(), ai(None, None))[1]
    assert spans(shipped, user(), ai(None, json.dumps(arguments)))[1].count(json.dumps(arguments)) == 1


def test_a_results_name_is_that_of_its_call(shipped: ChatEncoder) -> None:
    messages = [user(), ai(None, {}), result("2"), ai("2")]
    named = spans(shipped, *messages)
    parts = [{"type": "text", "text": "2", "name": "add"}]
    assert spans(shipped, *messages[:2], {"role": "tool", "content": parts}, ai("2")) == named
    nameless = spans(shipped, *messages[:2], {"role": "tool", "content": "2"}, ai("2"))
    assert nameless[2] == (RESULT % "2" + AI).replace("tool name: add\n", "")


TURNS = SOURCE.replace("{{ m.content }}", "{% if m.tool_calls %}%s{% else %}{{ m.content }}{% endif %}")
CALLS = "{% for c in m.tool_calls %}[{{ c.function.name }} %s]{% endfor %}"
TRAP = TURNS.replace("%s", CALLS.replace("%s", "{{ c.function.arguments | tojson }}"))
"""What the released template does: content beside calls is lost, and arguments that are a text are encoded twice."""


def own(folder: Path, source: str) -> ChatEncoder:
    return ChatEncoder(write_tokenizer(folder, chat_template="{{ tools | tojson }}" + source))


def test_a_template_may_not_lose_what_stands_beside_a_call(tmp_path: Path) -> None:
    chat = own(tmp_path, TRAP)
    assert spans(chat, user(), ai(None, '{"a": "b"}'), result("2"), ai("2"))[1] == '[add {"a": "b"}]' + END
    for lost, turn in (("content", ai("I add.", {})), ("reasoning", ai("", {}, reasoning_content="Add."))):
        with pytest.raises(DataError, match=f"leaves out the {lost} of a message") as caught:
            spans(chat, user(), turn)
        assert caught.value.where.startswith("f:7, message 1, template ")
    assert caught.value.fix.endswith('sft.earlier_reasoning to "strip" or "split"')
    with pytest.raises(DataError, match="leaves out the tool calls of a message") as caught:
        spans(own(tmp_path, SOURCE), user(), ai("I add.", {"a": 1}))
    assert caught.value.fix == 'set sft.chat_template to "m1" or another that writes it, or take it out of the message'


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("{{ c.function.arguments | tojson(ensure_ascii=true) }}", '{"a": "\\u00fc\\"\\n", "b": 2}'),
        ("{{ c.function.arguments | tojson(indent=1) }}", '{\n "a": "ü\\"\\n",\n "b": 2\n}'),
        ("{{ c.function.arguments | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":"ü\\"\\n","b":2}'),
        ("{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}", '<a>ü"\n<b>2'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | trim if v is string else v }};{% endfor %}", 'a=ü";b=2;'),
    ],
)  # fmt: skip
def test_arguments_are_followed_in_every_form(tmp_path: Path, form: str, written: str) -> None:
    chat = own(tmp_path, TURNS.replace("%s", CALLS.replace("%s", form)))
    assert spans(chat, user(), ai(None, {"a": 'ü"\n', "b": 2}))[1] == f"[add {written}]{END}"


def test_a_call_can_end_with_a_token_of_its_own(tmp_path: Path) -> None:
    source = TURNS.replace("%s{% else %}", CALLS.replace("%s", "") + "<end_of_document>{% else %}")
    source = source.replace(f"{{% endif %}}{END}", f"{END}{{% endif %}}")
    chat = own(tmp_path, source)
    assert spans(chat, user(), ai(None, {}), result("2"), ai("2"))[1::2] == ["[add ]<end_of_document>", f"2{END}"]
    assert chat.end_ids == [256, 258]
    chat = own(tmp_path, source.replace("<end_of_document>", "</think><end_of_document>"))
    assert spans(chat, user(), ai(None, {}), result("2"), ai("2"))[1] == "[add ]</think><end_of_document>"


def test_a_call_that_is_written_again_with_its_result_is_refused(tmp_path: Path) -> None:
    """Else all between the two would be trained."""
    again = "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}: {% endif %}{{ m.content }}"
    chat = own(tmp_path, TURNS.replace("%s", CALLS.replace("%s", "")).replace("{{ m.content }}", again))
    with pytest.raises(DataError, match="writes the tool calls of a message more than once") as caught:
        spans(chat, user(), ai(None, {}), result("2"), ai("2"))
    assert caught.value.where.startswith("f:7, message 1, template ")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ai(None, "add"), "not JSON"),
        (ai(None, [1]), "arguments of a tool call are not an object: list"),
        (ai(None, {"a": [2**70]}), "a number of more than 64 bits"),
        (ai(None, '{"a": -1180591620717411303424}'), "a number of more than 64 bits"),
        (ai(None, tool_calls={}), '"tool_calls" is not a list: dict'),
        (ai(None, tool_calls=[{"function": {"arguments": {}}}]), "a tool call without a name"),
        (ai(None, tool_calls=[{"name": "add", "arguments": {}}]), 'a tool call is not {"type": "function"'),
        (ai(None, tool_calls=[{"type": "code", "function": {"name": "f"}}]), 'a tool call is not {"type": "function"'),
        (ai(None, tool_calls=[{"function": {"name": "f", "strict": True}}]), "tool call that would be lost: strict"),
        (ai(None), '"content" is neither a string nor a list of text parts: NoneType'),
        (ai([{"type": "image_url"}]), 'a part of "content" is not {"type": "text"'),
        (ai([{"type": "text", "text": "a", "name": "b"}]), 'a part of "content" is not {"type": "text"'),
        (user() | {"tool_calls": ai(None, {})["tool_calls"]}, 'only assistant messages have "reasoning_content", "tool_calls"'),
        (result("2", "c9"), "\"tool_call_id\" is the id of no call: 'c9', message 3"),
        (user() | {"tool_call_id": "c0"}, '"tool_call_id" of a turn that is not a tool\'s: user'),
        ({"role": "tool", "content": [{"type": "text", "text": "", "name": n} for n in "ab"]}, "results of several tools"),
    ],
)  # fmt: skip
def test_what_is_no_call_and_no_result(turn: dict[str, Any], message: str) -> None:
    value = json.loads(json.dumps(turn, default=str))
    with pytest.raises(DataError) as caught:
        talk(user(), ai(None, {}), result("2"), value)
    assert message in caught.value.what


def test_argument_names_with_control_tokens_are_refused(shipped: ChatEncoder) -> None:
    with pytest.raises(DataError, match='"arguments" holds the control token'):
        spans(shipped, user(), ai(None, {"a": [{END: 1}]}))


def test_developers_are_the_system_where_a_template_does_not_know_them(shipped: ChatEncoder, tmp_path: Path) -> None:
    said = [{"role": role, "content": "S"} for role in ("system", "developer")]
    assert spans(shipped, said[0], user(), ai("2")) == spans(shipped, said[1], user(), ai("2"))
    chat = own(tmp_path, SOURCE + "{# developer #}")
    assert f"{BEGIN}developer\nS{END}" in spans(chat, said[1], user(), ai("2"))[0]
    with pytest.raises(DataError, match="given twice"):
        talk(said[1], user(), ai("2"), system="T")
