"""Reads conversations from OpenAI-messages JSON Lines, strictly: every refusal names file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from m1_data.errors import DataError
from m1_data.storage.streams import open_lines
from m1_data.storage.text_digest import text_digest

ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", "reasoning_content", "train", "name"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str = ""
    train: bool = True
    """Whether an assistant turn is trained."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one line, where they came from, and the optional ``domain`` field."""

    messages: tuple[Message, ...]
    where: str
    domain: str = ""

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
    """Decode and check one line and return its conversation.

    Raises:
        DataError: the line is not a valid conversation; the error names ``where``.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _bad(f"not JSON: {error}", where) from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise _bad('expected an object with a non-empty list under "messages"', where)
    domain = record.get("domain", "")
    if not isinstance(domain, str):
        raise _bad(f'"domain" must be a string, not {type(domain).__name__}', where)
    messages = tuple(_message(m, f"{where}, message {i}") for i, m in enumerate(record["messages"]))
    if not any(m.role == "assistant" for m in messages):
        raise _bad("the conversation has no assistant message, so there is nothing to train", where)
    return Conversation(messages, where, domain)


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise _bad(f"a message must be an object, not {type(raw).__name__}", where)
    role, content, reasoning = raw.get("role"), raw.get("content"), raw.get("reasoning_content") or ""
    if role not in ROLES:
        raise _bad(f"role {role!r} is none of {', '.join(ROLES)}", where)
    if unknown := sorted(set(raw) - _KEYS):
        raise _bad(f"keys that would be lost: {', '.join(unknown)}", where)
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise _bad('"content" and "reasoning_content" must be strings', where)
    train = raw.get("train", True)
    if not isinstance(train, bool):
        raise _bad(f'"train" must be true or false, not {train!r}', where)
    if role != "assistant":
        if reasoning or raw.get("train"):
            raise _bad('only assistant messages can have "reasoning_content" or "train": true', where)
        return Message(role, content)
    inline, content = _split_thinking(content, where)
    if inline and reasoning:
        raise _bad('reasoning is given twice: in "reasoning_content" and inside <think>', where)
    if train and not content and not (reasoning or inline):
        raise _bad("the assistant message is empty", where)
    return Message(role, content, reasoning or inline, train)


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
