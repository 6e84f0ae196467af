"""Checks that the values of a reported event have the types that its dataclass declares, before anything counts on them."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from m1_data.plain_values import shown_value


def check_types(kind: type, record: dict[str, Any]) -> None:
    """Check the values of ``record`` that ``kind``, a dataclass of ``m1_stages.events``, declares; others are not looked at.

    A number that is null is accepted, but in a measurement: JSON has no other way to write one that is not finite.

    Raises:
        ValueError: a value has another type; it is named and shown, escaped.
    """
    for name, hint in _hints(kind).items():
        if name in record:
            _check(hint, record[name], name)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check(hint: Any, value: Any, where: str, *, finite: bool = False) -> None:
    items = get_args(hint)
    if hint is Any:
        return
    if get_origin(hint) is UnionType:
        if value is not None or NoneType not in items:
            _check(items[0], value, where, finite=finite)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        if missing := [field.name for field in dataclasses.fields(hint) if field.name not in value]:
            raise ValueError(f"{where}.{missing[0]} is missing")
        for name, inner in _hints(hint).items():
            _check(inner, value[name], f"{where}.{name}", finite=True)
    elif get_origin(hint) is list and isinstance(value, list):
        for n, item in enumerate(value):
            _check(items[0], item, f"{where}[{n}]", finite=finite)
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, item in value.items():
            _check(items[1], item, f"{where}[{shown_value(key)}]", finite=finite)
    elif not _fits(hint, value) or (finite and value is None):
        raise ValueError(f"{where} is {shown_value(value)}, which is not {getattr(hint, '__name__', hint)}")


def _fits(hint: Any, value: Any) -> bool:
    if hint is float:
        return value is None or type(value) in (int, float)
    return hint in (int, bool, str) and type(value) is hint
