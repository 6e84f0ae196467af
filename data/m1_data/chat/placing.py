"""Messages as a template reads them, as they are or with placeholders, and where their texts stand in what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from m1_data.chat.conversations import Message
from m1_data.chat.template_form import placeholder


class Content(NamedTuple):
    """A text of a message that a placeholder stands for."""

    owner: int
    """The message."""
    text: str
    part: str
    """What it is of the message, in words."""
    in_json: bool = False
    """Whether a template may write it inside of a JSON string."""

    def forms(self) -> Iterator[str]:
        """Yield the forms in which templates write it, the likeliest first."""
        if self.in_json:
            yield from (json.dumps(self.text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        yield from (self.text, self.text.strip(), self.text.strip("\n"))
        yield from (self.text.lstrip(), self.text.rstrip(), self.text.lstrip("\n"), self.text.rstrip("\n"))


class Placing(NamedTuple):
    """How messages are given to one template."""

    lists: bool
    """Whether contents are lists of parts."""
    reasoning_key: bool
    """Whether it reads ``reasoning_content``; else the reasoning is written into the content."""
    developer_role: bool
    """Whether it knows the role ``developer``; else that is ``system``."""

    def as_dict(self, message: Message, owner: int, contents: list[Content] | None) -> dict[str, Any]:
        """Return a message for the template.

        Args:
            owner: the number of the message.
            contents: collects its texts, and placeholders are written for them; None writes the texts themselves.
        """

        def text(value: str, part: str, in_json: bool = False) -> str:
            if contents is None or not value:
                return value
            contents.append(Content(owner, value, part, in_json))
            return placeholder(len(contents) - 1)

        def argument(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: argument(item) for key, item in value.items()}
            if isinstance(value, list):
                return [argument(item) for item in value]
            return text(value, "tool calls", in_json=True) if isinstance(value, str) else value

        role = "system" if message.role == "developer" and not self.developer_role else message.role
        out: dict[str, Any] = {"role": role}
        if message.reasoning and self.reasoning_key:
            out["reasoning_content"] = text(message.reasoning, "reasoning")
        content = text(message.content, "content")
        if message.reasoning and not self.reasoning_key:
            content = f"<think>\n{text(message.reasoning, 'reasoning')}\n</think>\n\n{content}"
        if message.name:
            out["name"] = message.name
        out["content"] = content
        if self.lists:
            part = {"type": "text", "text": content}
            out["content"] = [part | {"name": message.name} if message.name else part]
        if message.tool_call_id:
            out["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            out["tool_calls"] = [
                ({"id": call.id} if call.id else {})
                | {
                    "type": "function",
                    "function": {"name": text(call.name, "tool calls", True), "arguments": argument(call.arguments)},
                }
                for call in message.tool_calls
            ]
        return out


def follow(texts: Sequence[str], contents: Sequence[Content], truth: str) -> list[str] | None:
    """Return the contents as they stand in a rendered text; None when they cannot be found in it.

    Args:
        texts: the template's own texts: before, between and behind the contents.
        contents: in the order in which they are written.
        truth: the rendered text.
    """
    at, values = len(texts[0]), []
    if not truth.startswith(texts[0]):
        return None
    for content, behind in zip(contents, texts[1:], strict=True):
        for form in content.forms():
            if truth.startswith(form, at) and truth.startswith(behind, at + len(form)):
                break
        else:
            return None
        values.append(form)
        at += len(form) + len(behind)
    return values if at == len(truth) else None


def argument_keys(value: Any) -> Iterator[str]:
    """Yield the keys of all objects inside a value."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from argument_keys(item)
