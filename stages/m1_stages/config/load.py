"""Loads TOML files and ``--set`` values into a ``Resolved`` configuration; every refusal names file, line and key.

Layers, later ones win: dataclass defaults, ``recipes/curriculum/released.toml``, ``recipes/models/<preset>.toml``, the
user's file, ``--set``. Only the standard library is used, so the command line can refuse a bad configuration before
torch is imported or a process is started.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from m1_stages.config import PRESETS, STAGE_NAMES, Config, Resolved
from m1_stages.config.check import check
from m1_stages.config.sft_section import SftConfig, SftRun
from m1_stages.errors import ConfigError

RENAMED = {
    "guard.calm_steps": "guard.in_band_steps",
    "guard.skips_in_a_row": "guard.max_consecutive_skips",
    "guard.leave_out_before": "guard.exclude_before",
}
"""Keys of earlier versions, ``section.key``, and those that replace them; an old key is refused with its new name."""

_DEEPEST = 16
"""Levels of tables and lists; the schema has four."""
_MOST_CHARACTERS = 60
"""Of a key in a message."""

_HEADER = re.compile(r"^\s*\[(\[)?\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*")(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read ``path`` (an ``m1.toml``) with ``key.path=value`` overrides.

    Raises:
        ConfigError: missing file, bad TOML, unknown or renamed key, wrong type, or sizes that cannot work together.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no configuration file {path}",
            fix="create one with: m1 init DIR --preset tiny   (then run inside DIR, or pass --config DIR/m1.toml)",
        )
    user = _Layer.read(path)
    set_layers = [_override(text) for text in overrides]
    preset = next((s.values["preset"] for s in reversed(set_layers) if "preset" in s.values), None)
    preset = preset if preset is not None else user.values.get("preset")
    if preset not in PRESETS:
        hint = difflib.get_close_matches(str(preset), PRESETS, n=1)
        raise ConfigError(
            f"preset is {preset!r}, which is not one of {', '.join(PRESETS)}" if preset else "there is no preset",
            where=f"{user.origin('preset')}, key preset",
            fix=f'set preset = "{hint[0] if hint else "tiny"}"',
        )
    recipes = resources.files("m1_stages") / "recipes"
    layers = [
        _Layer.of_recipe(recipes / "curriculum" / "released.toml", "recipe curriculum/released.toml"),
        _Layer.of_recipe(recipes / "models" / f"{preset}.toml", f"preset {preset}"),
        user,
        *set_layers,
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _merge(values, layer.values, layer, "", origins)
    config: Config = _decode(Config, values, "", origins)
    resolved = Resolved(
        config=config,
        origins=origins,
        base_dir=path.resolve().parent,
        sha256=_sha256(config),
    )
    check(resolved)
    return resolved


def _sha256(config: Config) -> str:
    """Hash all values. Renamed keys count under their old names, so that the hashes in older checkpoints still compare equal."""
    values = dataclasses.asdict(config)
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        values[section][old_key] = values[section].pop(new_key)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _Layer:
    """One source of values, with the line of each key."""

    def __init__(self, name: str, values: dict[str, Any], lines: dict[str, int]) -> None:
        self.name, self.values, self.lines = name, values, lines
        self._refuse_immense(values, "", 0)

    @classmethod
    def read(cls, path: Path) -> _Layer:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration: {error}", where=str(path)) from error
        return cls._parse(str(path), text)

    @classmethod
    def of_recipe(cls, path: Traversable, name: str) -> _Layer:
        layer = cls._parse(name, path.read_text(encoding="utf-8"))
        return cls(name, layer.values, {})

    @classmethod
    def _parse(cls, name: str, text: str) -> _Layer:
        try:
            return cls(name, _toml(text), _key_lines(text))
        except ValueError as error:
            line = re.search(r"line (\d+)", str(error))
            where = f"{name}:{line[1]}" if line else name
            raise ConfigError(f"not valid TOML: {error}", where=where, fix="correct that line") from error

    def _refuse_immense(self, value: Any, key: str, depth: int) -> None:
        """Refuse what no key takes and no message could show."""
        what = ""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            what = "is an integer of more than 64 bits"
        elif depth > _DEEPEST:
            what = f"is nested more than {_DEEPEST} levels deep"
        if what:
            shown = key[:_MOST_CHARACTERS]
            raise ConfigError(f"{shown} {what}", where=f"{self.origin(key)}, key {shown}", fix="correct that line")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, item in items:
            self._refuse_immense(item, f"{key}.{name}" if key else str(name), depth + 1)

    def origin(self, key: str) -> str:
        """Return ``file:line`` of ``key``, or of its nearest parent table, or the file."""
        parts = key.split(".")
        while parts:
            if (line := self.lines.get(".".join(parts))) is not None:
                return f"{self.name}:{line}"
            parts.pop()
        return self.name


def _toml(text: str) -> dict[str, Any]:
    """Parse ``text``.

    Raises:
        ValueError: it is no TOML, or nested more deeply than the parser follows.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _key_lines(text: str) -> dict[str, int]:
    """Return the line of every table header and key; tables of arrays are numbered ``sources.0``, ``sources.1``."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = header[2].replace('"', "").replace(" ", "")
            if header[1]:
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, number)
                table = f"{table}.{counts[table]}"
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            name = re.sub(r'[\s"]', "", key[1])
            lines.setdefault(f"{table}.{name}" if table else name, number)
    return lines


def _override(text: str) -> _Layer:
    """Parse ``a.b=value`` into a layer; a value that is not TOML is taken as a string."""
    key, equals, raw = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r} is not of the form key.path=value", fix="for example: --set run.seed=7")
    try:
        value = _toml(f"value = {raw}")["value"]
    except ValueError:
        value = raw.strip()
    values: Any = value
    for part in reversed(parts):
        values = {part: values}
    return _Layer(f"--set {text}", values, {})


def _merge(into: dict[str, Any], new: dict[str, Any], layer: _Layer, prefix: str, origins: dict[str, str]) -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, layer, f"{path}.", origins)
            origins.setdefault(path, layer.origin(path))
            continue
        into[key] = value
        origins[path] = layer.origin(path)
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    origins[f"{path}.{index}"] = layer.origin(f"{path}.{index}")
                    origins.update({f"{path}.{index}.{k}": layer.origin(f"{path}.{index}.{k}") for k in item})


def _where(path: str, origins: dict[str, str]) -> str:
    parts = path.split(".")
    while parts and ".".join(parts) not in origins:
        parts.pop()
    origin = origins.get(".".join(parts), "")
    return f"{origin}, key {path}" if origin else f"key {path}"


def _decode(kind: Any, value: Any, path: str, origins: dict[str, str]) -> Any:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is SftRun:
        return _decode_sft_run(value, path, origins)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, path, origins)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        hint = difflib.get_close_matches(str(value), args, n=1)
        raise ConfigError(
            f"{path} is {value!r}; it must be one of {', '.join(args)}",
            where=_where(path, origins),
            fix=f'did you mean "{hint[0]}"?' if hint else f"choose one of {', '.join(args)}",
        )
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_decode(args[0], item, f"{path}.{i}", origins) for i, item in enumerate(value))
        raise _wrong_type(path, value, "a list", origins)
    if origin is dict:
        if isinstance(value, dict):
            return {key: _decode(args[1], item, f"{path}.{key}", origins) for key, item in value.items()}
        raise _wrong_type(path, value, "a table", origins)
    return _decode_scalar(kind, value, path, origins)


def _decode_scalar(kind: type, value: Any, path: str, origins: dict[str, str]) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path} is {value}; it must be finite", where=_where(path, origins))
        if kind is float:
            return float(value)
        if float(value).is_integer():
            return int(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string in quotes"}
    raise _wrong_type(path, value, names[kind], origins)


def _wrong_type(path: str, value: Any, wanted: str, origins: dict[str, str]) -> ConfigError:
    fix = f"write {path.rsplit('.', 1)[-1]} = {value}" if isinstance(value, str) and _is_number(value) else ""
    return ConfigError(
        f"{path} must be {wanted}, not {value!r}", where=_where(path, origins), fix=fix or f"give {wanted}"
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _decode_dataclass(kind: type, value: Any, path: str, origins: dict[str, str]) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(path, value, "a table", origins)
    hints = get_type_hints(kind, include_extras=True)
    dot = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            _refuse_unknown(key, f"{dot}{key}", list(hints), origins)
    if kind is Config and isinstance(value.get("stages"), dict):
        for name in value["stages"]:
            if name not in STAGE_NAMES:
                _refuse_unknown(name, f"stages.{name}", list(STAGE_NAMES), origins)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        key = f"{dot}{item.name}"
        if item.name in value:
            arguments[item.name] = _decode(hints[item.name], value[item.name], key, origins)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key} is missing", where=_where(path or key, origins), fix=f"add {item.name} = …")
        else:
            _default_origins(hints[item.name], key, origins)
    return kind(**arguments)


def _decode_sft_run(value: Any, path: str, origins: dict[str, str]) -> SftRun:
    """Decode a table of ``[[sft.runs]]``; where ``--set`` gives a key of the section, that value is the later one, and wins."""
    if not isinstance(value, dict):
        raise _wrong_type(path, value, "a table", origins)
    hints = get_type_hints(SftConfig, include_extras=True)
    known = ["name", *(key for key in hints if key != "runs")]
    for key in value:
        if key not in known:
            _refuse_unknown(key, f"{path}.{key}", known, origins)
    if "name" not in value:
        raise ConfigError(f"{path}.name is missing", where=_where(path, origins), fix='add name = "…"')
    values = {key: _decode(hints.get(key, str), item, f"{path}.{key}", origins) for key, item in value.items()}
    is_set = {
        key.split(".")[1] for key, where in origins.items() if key.startswith("sft.") and where.startswith("--set ")
    }
    return SftRun(name=values.pop("name"), overrides={k: v for k, v in values.items() if k not in is_set})


def _default_origins(kind: Any, key: str, origins: dict[str, str]) -> None:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(plain, type) and dataclasses.is_dataclass(plain):
        for item in dataclasses.fields(plain):
            origins.setdefault(f"{key}.{item.name}", "default")
    else:
        origins.setdefault(key, "default")


def _refuse_unknown(key: str, path: str, known: list[str], origins: dict[str, str]) -> NoReturn:
    """Refuse a key that the schema does not have; a renamed key is refused with its new name."""
    if (new := RENAMED.get(path)) is not None:
        raise ConfigError(
            f"{path} was renamed: write {new}",
            where=_where(path, origins),
            fix=f"replace {path} by {new}; its value keeps its meaning",
        )
    hint = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise ConfigError(
        f"unknown key {path}",
        where=_where(path, origins),
        fix=f"did you mean {hint[0]}?" if hint else f"known keys here: {', '.join(known)}",
    )
