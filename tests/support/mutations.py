"""Random damage of the text files that people and programs write: bytes, lines, keys and values, each from a seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

_BYTES = (b"\x1b[31m", b"\0", b"\xff\xfe", b"\n", b'"', b"}", b"[", b"9" * 400, "\u202e".encode())
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 10**400, 2**63, -(2**70), 1e300, float("nan"), float("inf"), "", "\x1b[31mred", "\ud800",
    "../../x", "x" * 300, [], [None], [[1], [[]]], {}, {"\x1b": 1}, [0] * 70,
)  # fmt: skip
_TOML_VALUES = (
    "nan", "-inf", "-1", "0", "1", "2", "64", "4096", "0.25", "999999999999999999", "9" * 400, "9" * 5000, "0x" + "f" * 5000,
    "1e300", "1e-300", '""', '"\\u001b[31mred"', '"\x1b[31m"', "[[1]]", "[]", "{}", "[" * 3000, "1979-05-27", "true", "",
    "'''", '["", -1]', "{ a = 1 }", '"' + "x" * 300 + '"', '"/dev/null"', '"a\\u0000b"',
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data``, the content of a TOML, JSON or JSON Lines file, with one thing changed."""
    of_the_format = _toml_value if b"preset = " in data else _json_value
    while True:
        change: Callable[[bytes, random.Random], bytes] = rng.choice([_bytes, _lines, of_the_format, of_the_format])
        if (changed := change(data, rng)) != data:
            return changed


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    if kind == 2:
        return data[:at] + rng.choice(_BYTES) + data[at:]
    return (
        data[:at] if kind == 3 else rng.choice([b"", b"\n", b"[" * 100_000, b"\xff\xfe", b"null", b"{}", b"[7]\n[7]\n"])
    )


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        lines.insert(other, lines[one])
    elif kind == 2:
        del lines[one]
    else:
        lines[one] = lines[one][: len(lines[one]) // 2] + b"\n"
    return b"".join(lines)


def _toml_value(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    at = rng.choice(keys)
    key, _, value = lines[at].partition(" = ")
    kind = rng.randrange(8)
    lines[at] = f"{key}_x = {value}" if kind == 0 else f"{key} = {rng.choice(_TOML_VALUES)}"
    if kind == 1:
        lines[at] = f"{rng.choice(lines).partition(' = ')[0]} = {value}"
    return "\n".join([*lines, ""]).encode()


def _json_value(data: bytes, rng: random.Random) -> bytes:
    """Another value, name or number of one item, at any depth; of JSON Lines, in one line."""
    lines = data.splitlines(keepends=True)
    try:
        json.loads(data)
        at, document = None, data
    except ValueError:
        at = rng.randrange(len(lines))
        document = lines[at]
    values = json.loads(document)
    holder = values
    while True:
        items: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not items:
            return data
        key = rng.choice(items)
        if not isinstance(holder[key], (dict, list)) or rng.random() < 0.3:
            break
        holder = holder[key]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_x"] = holder.pop(key)
    elif kind == 1:
        holder.append(holder[key])
    else:
        holder[key] = rng.choice(_VALUES)
    if at is None:
        return json.dumps(values, indent=1).encode() + b"\n"
    lines[at] = json.dumps(values).encode() + b"\n"
    return b"".join(lines)
