"""Reads conversations from OpenAI-messages JSON Lines, strictly: every refusal names file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from m1_data.errors import DataError
from m1_data.storage.streams import open_lines
from m1_data.storage.text_digest import text_digest

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "reasoning_content", "train", "weight", "name"}
_KEYS = {"messages", "tools", "system", "domain", "train", "weight"}
_KEYS_WITH_MEANING = {
    "functions", "function_call", "tool_choice", "parallel_tool_calls", "chat_template", "chat_template_kwargs",
    "enable_thinking", "thinking", "reasoning", "reasoning_content", "documents", "developer", "system_prompt",
    "system_message", "weights", "loss_weight", "loss_mask", "mask", "masks", "labels", "chosen", "rejected",
    "images", "image", "audio", "audios", "video", "videos",
}  # fmt: skip
"""Keys beside the messages that change what is said or trained, and that nothing here honours."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str = ""
    train: bool = True
    """Whether an assistant turn is trained."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one line, where they came from, and the optional ``domain`` field."""

    messages: tuple[Message, ...]
    where: str
    domain: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of tools, as they are given to the template."""
    unused_keys: tuple[str, ...] = ()
    """Keys of the line that nothing reads: an id, a source."""

    @property
    def wanted(self) -> bool:
        """Whether the line asks that at least one turn is trained."""
        return any(m.role == "assistant" and m.train for m in self.messages)

    def repeats(self, texts: Collection[bytes]) -> bool:
        """Return whether a turn, or its reasoning, is one of ``texts``, given by their ``text_digest``."""
        return bool(texts) and any(
            text_digest(text) in texts for m in self.messages for text in (m.content, m.reasoning) if text
        )


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yield the conversations of a .jsonl, .jsonl.gz or .jsonl.zst file; blank lines are skipped.

    Raises:
        DataError: a missing or damaged file, or a line that is not a conversation.
    """
    if not path.is_file():
        raise DataError("there is no such file of conversations", where=str(path), fix="check the paths in sft.data")
    for number, line in enumerate(open_lines(path), 1):
        if line.strip():
            yield parse_conversation(line, f"{path}:{number}")


def parse_conversation(line: bytes, where: str) -> Conversation:
    """Decode and check one line and return its conversation. Nothing that it says about the conversation is ignored.

    Raises:
        DataError: the line is not a valid conversation; the error names ``where``.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _bad(f"not JSON: {error}", where) from error
    conversation = conversation_of(record, where)
    if not any(m.role == "assistant" for m in conversation.messages):
        raise _bad("the conversation has no assistant message, so there is nothing to train", where)
    return conversation


def conversation_of(record: Any, where: str) -> Conversation:
    """Check a decoded line and return its conversation, which may end with any turn.

    Raises:
        DataError: it is not a valid conversation; the error names ``where``.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise _bad('expected an object with a non-empty list under "messages"', where)
    if lost := sorted(_KEYS_WITH_MEANING & set(record)):
        raise _bad(f"keys that would be lost: {', '.join(lost)}", where)
    domain = record.get("domain", "")
    if not isinstance(domain, str):
        raise _bad(f'"domain" must be a string, not {type(domain).__name__}', where)
    messages = tuple(_message(m, f"{where}, message {i}") for i, m in enumerate(record["messages"]))
    if not _is_trained(record, where):
        messages = tuple(replace(m, train=False) for m in messages)
    unused = tuple(key for key in record if key not in _KEYS)
    return Conversation(_system(record, messages, where), where, domain, _tools(record, where), unused)


def _system(record: dict[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages, with a ``system`` key of the line before them."""
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise _bad(f'"system" must be a string, not {type(system).__name__}', where)
    if system and any(m.role == "system" for m in messages):
        raise _bad('the system prompt is given twice: in "system" and as a message', where)
    return (Message("system", system), *messages) if system else messages


def _tools(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _bad('"tools" must be a list of objects, one for each tool', where)
    return tuple(tools)


def _is_trained(raw: dict[str, Any], where: str) -> bool:
    """What ``train`` and ``weight`` of a line or a message say."""
    train, weight = raw.get("train", True), raw.get("weight", 1)
    if not isinstance(train, bool):
        raise _bad(f'"train" must be true or false, not {train!r}', where)
    if weight not in (0, 1):
        raise _bad(f'"weight" is {weight!r}: a token is trained (1) or not (0), with nothing between', where)
    if "train" in raw and "weight" in raw and train != bool(weight):
        raise _bad(f'"train" is {train!r} and "weight" is {weight!r}', where)
    return train and bool(weight)


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise _bad(f"a message must be an object, not {type(raw).__name__}", where)
    role, content, reasoning = raw.get("role"), raw.get("content"), raw.get("reasoning_content") or ""
    if role not in ROLES:
        raise _bad(f"role {role!r} is none of {', '.join(ROLES)}", where)
    if unknown := sorted(set(raw) - _MESSAGE_KEYS):
        raise _bad(f"keys that would be lost: {', '.join(unknown)}", where)
    name = raw.get("name") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str) or not isinstance(name, str):
        raise _bad('"content", "reasoning_content" and "name" must be strings', where)
    train = _is_trained(raw, where)
    if role != "assistant":
        if reasoning or raw.get("train") or raw.get("weight"):
            raise _bad('only assistant messages can have "reasoning_content", "train": true or "weight": 1', where)
        return Message(role, content, name=name)
    inline, content = _split_thinking(content, where)
    if inline and reasoning:
        raise _bad('reasoning is given twice: in "reasoning_content" and inside <think>', where)
    if train and not content and not (reasoning or inline):
        raise _bad("the assistant message is empty", where)
    return Message(role, content, reasoning or inline, train, name)


def _split_thinking(content: str, where: str) -> tuple[str, str]:
    """Take a leading ``<think>...</think>`` off an answer; text later in the answer is left as it is."""
    text = content.lstrip()
    if not text.startswith("<think>"):
        return "", content
    thinking, closed, answer = text.removeprefix("<think>").partition("</think>")
    if not closed:
        raise _bad("<think> is opened and never closed", where)
    return thinking.strip("\n"), answer.lstrip("\n")


def _bad(what: str, where: str) -> DataError:
    return DataError(what, where=where, fix='one object a line: {"messages": [{"role": ..., "content": ...}, ...]}')
