"""Conversations and their checks. Nothing that a row says about its conversation is ignored: it is honoured or refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import orjson

from m1_data.errors import DataError
from m1_data.storage.text_digest import text_digest

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = frozenset({"tools", "system", "domain", "train", "weight"})
"""Keys beside the turns that are honoured, whatever dialect the row is in."""
_MESSAGE_KEYS = {
    "role", "content", "reasoning_content", "train", "weight", "name", "tool_calls", "tool_call_id",
}  # fmt: skip
_KEYS_WITH_MEANING = {
    "functions", "function_call", "tool_choice", "parallel_tool_calls", "chat_template", "chat_template_kwargs",
    "enable_thinking", "thinking", "reasoning", "reasoning_content", "documents", "developer", "system_prompt",
    "system_message", "weights", "loss_weight", "loss_mask", "mask", "masks", "labels", "chosen", "rejected",
    "images", "image", "audio", "audios", "video", "videos",
}  # fmt: skip
"""Keys beside the messages that change what is said or trained, and that nothing here honours."""
_LARGEST = 2**63


class BadRow(DataError):
    """A row that is not a conversation.

    Args:
        reason: what is wrong, in words that are the same for all such rows, so that they can be counted.
        detail: what this row has.
    """

    def __init__(
        self, reason: str, detail: str = "", *, where: str = "", fix: str = ""
    ) -> None:  # pickle gives no where
        super().__init__(f"{reason}: {detail}" if detail else reason, where=where, fix=fix)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's turn makes."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str = ""
    train: bool = True
    """Whether an assistant turn is trained."""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """The call that a tool's turn answers."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one row, where they came from, and the optional ``domain`` field."""

    messages: tuple[Message, ...]
    where: str
    domain: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of tools, as they are given to the template."""
    unused_keys: tuple[str, ...] = ()
    """Keys of the row that nothing reads: an id, a source."""
    file: int = 0
    """The number of its file among those that are read."""
    digest: bytes = b""
    """128 bits of what the row says; samples of one row have the same."""

    @property
    def wanted(self) -> bool:
        """Whether the row asks that at least one turn is trained."""
        return any(m.role == "assistant" and m.train for m in self.messages)

    def repeats(self, texts: Collection[bytes]) -> bool:
        """Return whether a turn, or its reasoning, is one of ``texts``, given by their ``text_digest``."""
        return bool(texts) and any(
            text_digest(text) in texts for m in self.messages for text in (m.content, m.reasoning) if text
        )


def parse_conversation(line: bytes, where: str) -> Conversation:
    """Decode one line of OpenAI messages and return its conversation.

    Raises:
        BadRow: the line is not a valid conversation; the error names ``where``.
    """
    return trainable(conversation_of(decoded(line, where), where))


def decoded(line: bytes, where: str) -> Any:
    """Return the JSON value of a line.

    Raises:
        BadRow: it is not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRow("not JSON", str(error), where=where) from error


def trainable(conversation: Conversation) -> Conversation:
    """Return a conversation that has an answer.

    Raises:
        BadRow: it has none.
    """
    if not any(m.role == "assistant" for m in conversation.messages):
        raise BadRow("no assistant message, so there is nothing to train", where=conversation.where)
    return conversation


def conversation_of(record: Any, where: str) -> Conversation:
    """Check a row of OpenAI messages and return its conversation, which may end with any turn. A null is no value.

    Raises:
        BadRow: it is not a valid conversation; the error names ``where``.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise BadRow('no object with a non-empty list under "messages"', where=where)
    record = without_nulls(record)
    if lost := sorted(_KEYS_WITH_MEANING & set(record)):
        raise BadRow("keys that would be lost", ", ".join(lost), where=where)
    domain = record.get("domain", "")
    if not isinstance(domain, str):
        raise BadRow('"domain" is not a string', type(domain).__name__, where=where)
    messages = tuple(_message(m, f"{where}, message {i}") for i, m in enumerate(record["messages"]))
    if not _is_trained(record, where):
        messages = tuple(replace(m, train=False) for m in messages)
    messages = _named_results(_system(record, messages, where), where)
    unused = tuple(key for key in record if key not in KEYS and key != "messages")
    return Conversation(messages, where, domain, _tools(record, where), unused)


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the keys whose value is null: tables write one where there is no value."""
    return {key: value for key, value in record.items() if value is not None}


def _system(record: dict[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages, with a ``system`` key of the row before them."""
    system = record.get("system", "")
    if not isinstance(system, str):
        raise BadRow('"system" is not a string', type(system).__name__, where=where)
    if system and any(m.role in ("system", "developer") for m in messages):
        raise BadRow('the system prompt is given twice: in "system" and as a message', where=where)
    return (Message("system", system), *messages) if system else messages


def _tools(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or []
    if isinstance(tools, str):  # tables hold what differs from row to row as a text
        tools = decoded(tools.encode(), f'{where}, "tools"')
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('"tools" is not a list of objects, one for each tool', where=where)
    _refuse_unwritable(tools, where)
    return tuple(tools)


def _is_trained(raw: dict[str, Any], where: str) -> bool:
    """What ``train`` and ``weight`` of a row or a message say."""
    train, weight = raw.get("train", True), raw.get("weight", 1)
    if not isinstance(train, bool):
        raise BadRow('"train" is neither true nor false', repr(train), where=where)
    if weight not in (0, 1):
        raise BadRow('"weight" is neither 0 nor 1, and there is nothing between', repr(weight), where=where)
    if "train" in raw and "weight" in raw and train != bool(weight):
        raise BadRow('"train" and "weight" say two things', f"{train!r} and {weight!r}", where=where)
    return train and bool(weight)


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise BadRow("a message is not an object", type(raw).__name__, where=where)
    raw = without_nulls(raw)
    role, reasoning, name = raw.get("role"), raw.get("reasoning_content", ""), raw.get("name", "")
    if role not in ROLES:
        raise BadRow("unknown role", f"{role!r} is none of {', '.join(ROLES)}", where=where)
    if unknown := sorted(set(raw) - _MESSAGE_KEYS):
        raise BadRow("keys of a message that would be lost", ", ".join(unknown), where=where)
    calls, call_id = _calls(raw.get("tool_calls", []), where), raw.get("tool_call_id", "")
    content, part_name = _content(raw.get("content", "" if calls else None), role, where)
    name = name or part_name
    if not all(isinstance(text, str) for text in (reasoning, name, call_id)):
        raise BadRow('"reasoning_content", "name" or "tool_call_id" is not a string', where=where)
    train = _is_trained(raw, where)
    if call_id and role != "tool":
        raise BadRow('"tool_call_id" of a turn that is not a tool\'s', role, where=where)
    if role != "assistant":
        if reasoning or calls or raw.get("train") or raw.get("weight"):
            raise BadRow(
                'only assistant messages have "reasoning_content", "tool_calls", "train": true or "weight": 1',
                role,
                where=where,
            )
        return Message(role, content, name=name, tool_call_id=call_id)
    inline, content = _split_thinking(content, where)
    if inline and reasoning:
        raise BadRow('reasoning is given twice: in "reasoning_content" and inside <think>', where=where)
    if train and not (content or reasoning or inline or calls):
        raise BadRow("an assistant message is empty", where=where)
    return Message(role, content, reasoning or inline, train, name, calls)


def _content(raw: Any, role: str, where: str) -> tuple[str, str]:
    """The text of a message, and the name that a tool's parts give: a string, or a list of parts that are joined."""
    if isinstance(raw, str):
        return raw, ""
    if not isinstance(raw, list):
        raise BadRow('"content" is neither a string nor a list of text parts', type(raw).__name__, where=where)
    known = {"type", "text", "name"} if role == "tool" else {"type", "text"}
    parts = [without_nulls(part) if isinstance(part, dict) else {} for part in raw]
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str) or set(part) - known:
            raise BadRow('a part of "content" is not {"type": "text", "text": ...}', where=where)
    names = {part.get("name", "") for part in parts}
    if len(names) > 1 or not all(isinstance(name, str) for name in names):
        raise BadRow("a tool message holds results of several tools", where=where, fix="give each a message of its own")
    return "".join(part["text"] for part in parts), next(iter(names), "")


def _calls(raw: Any, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(raw, list):
        raise BadRow('"tool_calls" is not a list', type(raw).__name__, where=where)
    return tuple(_call(call, f"{where}, tool call {i}") for i, call in enumerate(raw))


def _call(raw: Any, where: str) -> ToolCall:
    raw = without_nulls(raw) if isinstance(raw, dict) else {}
    function = raw.get("function")
    if raw.get("type", "function") != "function" or not isinstance(function, dict):
        raise BadRow(
            'a tool call is not {"type": "function", "function": {"name": ..., "arguments": ...}}', where=where
        )
    if unknown := sorted((set(raw) - {"id", "type", "function", "index"}) | (set(function) - {"name", "arguments"})):
        raise BadRow("keys of a tool call that would be lost", ", ".join(unknown), where=where)
    name, arguments, call_id = function.get("name"), function.get("arguments"), raw.get("id", "")
    if not isinstance(name, str) or not name or not isinstance(call_id, str):
        raise BadRow("a tool call without a name, or its id is not a string", where=where)
    if isinstance(arguments, str):
        arguments = decoded(arguments.encode(), f"{where}, arguments") if arguments else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRow("the arguments of a tool call are not an object", type(arguments).__name__, where=where)
    _refuse_unwritable(arguments, where)
    return ToolCall(name, arguments, call_id)


def _refuse_unwritable(value: Any, where: str) -> None:
    """Refuse what JSON does not have, and numbers that may have lost digits: a parser makes large integers rounded floats."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_unwritable(item, where)
    elif isinstance(value, int | float) and value == value // 1 and abs(value) >= _LARGEST:
        raise BadRow("a number of more than 64 bits in tools or tool calls", where=where)
    elif not isinstance(value, str | int | float | None):
        raise BadRow("a value that JSON does not have in tools or tool calls", type(value).__name__, where=where)


def _named_results(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages, with the name of its tool in each result that has only the id of the call."""
    names = {call.id: call.name for m in messages for call in m.tool_calls if call.id}
    for i, m in enumerate(messages):
        if m.tool_call_id and names and m.tool_call_id not in names:
            raise BadRow('"tool_call_id" is the id of no call', f"{m.tool_call_id!r}, message {i}", where=where)
    return tuple(
        replace(m, name=names[m.tool_call_id]) if m.tool_call_id in names and not m.name else m for m in messages
    )


def _split_thinking(content: str, where: str) -> tuple[str, str]:
    """Take a leading ``<think>...</think>`` off an answer; text later in the answer is left as it is."""
    text = content.lstrip()
    if not text.startswith("<think>"):
        return "", content
    thinking, closed, answer = text.removeprefix("<think>").partition("</think>")
    if not closed:
        raise BadRow("<think> is opened and never closed", where=where)
    return thinking.strip("\n"), answer.lstrip("\n")
