"""The forms in which people keep conversations, each turned into the first of them, OpenAI's messages.

Of a row every key is used, or known to say nothing about the conversation, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from m1_data.chat.conversations import (
    KEYS,
    BadRow,
    Conversation,
    conversation_of,
    decoded,
    trainable,
    without_nulls,
)

Record = dict[str, Any]

KNOWN_KEYS = frozenset({
    "id", "ids", "idx", "index", "uuid", "uid", "hash", "_id", "__index_level_0__", "row_id", "doc_id", "sample_id",
    "conversation_id", "conversation_hash", "prompt_id", "question_id", "problem_id", "message_id", "source",
    "data_source", "dataset", "dataset_name", "dataset_source", "origin", "url", "title", "author", "license", "split",
    "category", "categories", "subject", "topic", "tag", "tags", "task", "type", "kind", "level", "difficulty", "lang",
    "language", "model", "generator", "model_name", "teacher", "created", "created_at", "date", "timestamp", "version",
    "metadata", "meta", "info", "extra_info", "score", "scores", "rating", "quality", "num_turns", "turns", "turn",
    "num_tokens", "n_tokens", "token_count", "length", "correct", "is_correct", "verified",
})  # fmt: skip
"""Keys that say where a row comes from or what it is worth, and nothing that a model would read."""


class Dialect(NamedTuple):
    """How a dialect is told and read."""

    marks: frozenset[str]
    """Keys that every row of it has."""
    convert: Callable[[Record, str], list[Any]]
    """Takes a row, and where it is, and returns its messages in OpenAI's form."""
    more: frozenset[str] = frozenset()
    """Further keys that it uses."""
    unused: frozenset[str] = frozenset()
    """Keys that repeat what others say."""


def _openai(record: Record, where: str) -> list[Any]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow('"messages" is not a list with messages', type(messages).__name__, where=where)
    return messages


_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "developer": "developer", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


def _sharegpt(record: Record, where: str) -> list[Any]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadRow('"conversations" is not a list with turns', type(turns).__name__, where=where)
    return [_sharegpt_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(turns)]


def _sharegpt_turn(turn: Any, where: str) -> Record:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow('a turn is not {"from": ..., "value": ...}', ", ".join(map(str, turn or "nothing"))
                     if isinstance(turn, dict) else type(turn).__name__, where=where,
                     fix='rename "conversations" to "messages" where turns have "role" and "content"')  # fmt: skip
    speaker, value = turn["from"], turn["value"]
    if speaker not in _SPEAKERS:
        raise BadRow("unknown speaker", f"{speaker!r} is none of {', '.join(_SPEAKERS)}", where=where)
    if lost := sorted({"role", "content", "tool_calls"} & set(turn)):
        raise BadRow('keys beside "from" and "value" that say the same', ", ".join(lost), where=where)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": value, **rest}
    calls = decoded(value.encode(), where) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls], **rest}


def _alpaca(record: Record, where: str) -> list[Any]:
    history = record.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow('"history" is not a list of [instruction, output]', where=where)
    texts = [record["instruction"], record.get("input", "")]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow('"instruction" or "input" is not a string', where=where)
    pairs = [*history, ("\n".join(filter(None, texts)), record["output"])]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _prompt_completion(record: Record, where: str) -> list[Any]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow('"prompt" and "completion" are neither two strings nor two lists of messages', where=where)
    untrained = [
        {key: value for key, value in m.items() if key != "weight"} | {"train": False}
        if isinstance(m, dict) and m.get("role") == "assistant"
        else m
        for m in prompt
    ]
    return [*untrained, *completion]


DIALECTS = {
    "openai": Dialect(frozenset({"messages"}), _openai),
    "sharegpt": Dialect(frozenset({"conversations"}), _sharegpt),
    "alpaca": Dialect(
        frozenset({"instruction", "output"}), _alpaca, frozenset({"input", "history"}), frozenset({"text"})
    ),
    "prompt-completion": Dialect(frozenset({"prompt", "completion"}), _prompt_completion),
}
"""All dialects by the name that ``sft.dialect`` takes."""


def dialect_of(record: Any, where: str, ignored: Collection[str] = ()) -> str:
    """Return the name of the dialect that a row is written in.

    Raises:
        BadRow: it is in none, or in more than one.
    """
    found = _fitting(record, where, ignored)
    if len(found) == 1:
        return found[0]
    forms = "; ".join(f"{name}: {', '.join(sorted(d.marks))}" for name, d in DIALECTS.items())
    if found:
        raise BadRow(
            "a row of several dialects",
            " and ".join(found),
            where=where,
            fix=f'set sft.dialect to one, and sft.ignored_keys to the keys of the others ("{forms}")',
        )
    has = ", ".join(map(str, record)) or "nothing"
    raise BadRow(
        "a row of no known dialect",
        f"it has {has}",
        where=where,
        fix=f"write rows with the keys of a dialect ({forms})",
    )


def conversation_in(dialect: str, record: Any, where: str, ignored: Collection[str] = ()) -> Conversation:
    """Return the conversation of a row.

    Args:
        dialect: a name of ``DIALECTS``.
        ignored: keys of the row that are taken out of it.

    Raises:
        BadRow: the row is of another dialect, has a key that is neither used nor known, or is not a valid conversation.
    """
    found = _fitting(record, where, ignored)
    form = DIALECTS[dialect]
    if dialect not in found:
        detail = f"{found[0]} and not {dialect}" if found else f"{dialect} has {', '.join(sorted(form.marks))}"
        raise BadRow("a row of another dialect than its file", detail, where=where)
    record = without_nulls(record)
    mine = form.marks | form.more
    passed = {k: v for k, v in record.items() if k not in mine and k not in form.unused and k not in ignored}
    if unknown := sorted(set(passed) - KEYS - KNOWN_KEYS):
        raise BadRow(
            "keys that are neither used nor known",
            ", ".join(unknown),
            where=where,
            fix=f"take them out, or set sft.ignored_keys = {unknown}".replace("'", '"'),
        )
    return trainable(conversation_of({"messages": form.convert(record, where), **passed}, where))


def _fitting(record: Any, where: str, ignored: Collection[str]) -> list[str]:
    """The dialects whose marks a row has."""
    if not isinstance(record, dict):
        raise BadRow("not an object", type(record).__name__, where=where)
    keys = {key for key, value in record.items() if value is not None} - set(ignored)
    return [name for name, dialect in DIALECTS.items() if dialect.marks <= keys]
