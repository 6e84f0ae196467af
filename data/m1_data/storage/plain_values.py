"""Dataclasses from plain JSON values, with every type checked: a damaged file is an error here and not a surprise later."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_origin, get_type_hints

_MOST_CHARACTERS = 60


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """Return ``value``, as ``json.loads`` gives it, as an instance of ``kind``.

    Args:
        kind: a dataclass, ``tuple[X, ...]`` (from a list), ``dict[str, X]``, ``int`` (from 0 to 2^63 - 1), ``float`` (finite),
            ``str`` or ``Any``.
        where: names the value in messages, as in "shards[2].tokens".

    Raises:
        ValueError: a value of another type or out of range, or a missing or unknown key; it is named and shown, escaped.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    items = get_args(kind)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_plain(items[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: from_plain(items[1], item, _join(where, key)) for key, item in value.items()}
    if kind is str and isinstance(value, str):
        return value
    if kind is int and type(value) is int and 0 <= value < 2**63:
        return value
    if kind is float and type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value):
        return float(value)
    raise ValueError(f"{where or 'the file'} is {shown(value)}, which is not {_name(kind)}")


def shown(value: Any) -> str:
    """Return a value for a message: on one line, control characters escaped, and short."""
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} is {shown(value)}, which is not an object")
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    if unknown := sorted(value.keys() - {field.name for field in fields}):
        raise ValueError(f"unknown key {shown(_join(where, unknown[0]))}")
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"{_join(where, missing[0])} is missing")
    return kind(**{name: from_plain(hints[name], item, _join(where, name)) for name, item in value.items()})


def _join(where: str, key: str) -> str:
    key = key if key.isidentifier() else shown(key)
    return f"{where}.{key}" if where else key


def _name(kind: Any) -> str:
    names = {int: "a count", float: "a number", str: "text", tuple: "a list", dict: "an object"}
    return names[get_origin(kind) or kind]
