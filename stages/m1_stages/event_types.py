"""Checks that a reported event has the fields, with the types, that its dataclass declares, before anything counts on them."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from m1_data.plain_values import shown_value


def checked(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    """Return ``record`` with the fields that ``kind``, a dataclass, declares checked; others are not looked at.

    A number that is null becomes NaN: JSON has no way to write one that is not finite, and the writer writes null.

    Raises:
        ValueError: a field is missing, or a value has another type; it is named and shown, escaped.
    """
    return _fields(kind, record, "")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fields(kind: type, record: dict[str, Any], prefix: str) -> dict[str, Any]:
    hints = _hints(kind)
    if missing := [name for name in hints if name not in record]:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return record | {name: _value(hint, record[name], f"{prefix}{name}") for name, hint in hints.items()}


def _value(hint: Any, value: Any, where: str) -> Any:
    items = get_args(hint)
    if hint is Any:
        return value
    if get_origin(hint) is UnionType:
        return value if value is None and NoneType in items else _value(items[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _fields(hint, value, f"{where}.")
    if get_origin(hint) is list and isinstance(value, list):
        return [_value(items[0], item, f"{where}[{n}]") for n, item in enumerate(value)]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _value(items[1], item, f"{where}[{shown_value(key)}]") for key, item in value.items()}
    if hint is float and value is None:
        return math.nan
    if not _fits(hint, value):
        raise ValueError(f"{where} is {shown_value(value)}, which is not {getattr(hint, '__name__', hint)}")
    return value


def _fits(hint: Any, value: Any) -> bool:
    if hint is float:
        return type(value) in (int, float)
    return hint in (int, bool, str) and type(value) is hint
