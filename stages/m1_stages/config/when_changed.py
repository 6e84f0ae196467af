"""What becomes of a key that is changed while a run exists: the schema says it beside each key, or for a whole section.

Checkpoints record the configuration they were made with (``recorded_values``); ``changed_keys`` compares it with the present
one. Who refuses and who reports is decided in ``checkpoint.changed_settings``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from m1_stages.config.change_rule import WhenChanged
from m1_stages.config.schema import Config, Resolved

_FILES = ("curriculum.custom_table",)
"""Keys that name a file whose content counts, and is in nothing else that is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyChange:
    """A key whose present value is not the one that a checkpoint was made with."""

    key: str
    old: Any
    new: Any
    rule: WhenChanged

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.old)} -> {json.dumps(self.new)}"


def rules() -> dict[str, WhenChanged]:
    """Return the rule of every key, like ``optim.beta1`` or ``stages.*.tokens``.

    Raises:
        TypeError: a key without a rule, of its own or of its section.
    """
    return dict(_rules(Config, "", None))


def _rules(kind: Any, prefix: str, inherited: WhenChanged | None) -> Iterator[tuple[str, WhenChanged]]:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        plain, rule = hint, inherited
        if get_origin(hint) is Annotated:
            plain, *marks = get_args(hint)
            rule = next((mark for mark in marks if isinstance(mark, WhenChanged)), inherited)
        arguments = get_args(plain)
        if get_origin(plain) is dict and dataclasses.is_dataclass(arguments[1]):
            yield from _rules(arguments[1], f"{prefix}{name}.*.", rule)
        elif isinstance(plain, type) and dataclasses.is_dataclass(plain):
            yield from _rules(plain, f"{prefix}{name}.", rule)
        elif rule is None:
            raise TypeError(f"{prefix}{name} does not say what becomes of it when it is changed")
        else:
            yield f"{prefix}{name}", rule


def recorded_values(resolved: Resolved) -> dict[str, Any]:
    """Return the values of all keys as plain JSON values, by dotted key; a file that a key names counts with its hash."""
    values = dict(_flat(json.loads(json.dumps(resolved.as_dict())), ""))
    for key in _FILES:
        if values[key]:
            content = resolved.path(values[key]).read_bytes()
            values[key] = f"{values[key]} (SHA-256 {hashlib.sha256(content).hexdigest()[:16]})"
    return values


def changed_keys(recorded: Mapping[str, Any], resolved: Resolved) -> list[KeyChange]:
    """Return the keys whose value differs from the recorded one; keys that one of the two versions lacks are left out."""
    now, rule_of = recorded_values(resolved), rules()
    return [
        KeyChange(key=key, old=recorded[key], new=value, rule=rule_of[_pattern(key)])
        for key, value in now.items()
        if key in recorded and recorded[key] != value
    ]


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the schema; a table that is a value, like ``domains``, is one of them."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and _pattern(key) not in _KEYS:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _pattern(key: str) -> str:
    """Return the key as ``rules`` names it: with ``*`` for the stage."""
    first, *rest = key.split(".")
    return ".".join([first, "*", *rest[1:]]) if first == "stages" and rest else key


_KEYS = frozenset(rules())
