"""Implements ``m1 init`` and ``m1 config show``, which explain the configuration by its own annotations."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.markup import escape

from m1_data.spec import SourceSpec
from m1_data.storage.ownership import refuse_to_overwrite, write_whole
from m1_stages.config import PRESETS, STAGE_NAMES, Config, Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_section import SftRun
from m1_stages.errors import ConfigError
from m1cli.console import console

_SECTIONS = (
    "run",
    "model",
    "tokenizer",
    "data",
    "curriculum",
    "guard",
    "optim",
    "parallel",
    "sft",
    "evaluate",
    "export",
)


_RUNS = (
    "# Named fine-tunings are tables [[sft.runs]]: each has a name, and the keys that are another for it. m1 sft --name NAME "
    "trains one; its base_stage may name another."
)


def init_command(folder: Path, preset: str) -> None:
    """Write ``folder/m1.toml``.

    Raises:
        ConfigError: the preset is unknown, the file exists already, or nothing can be written there.
    """
    if preset not in PRESETS:
        hint = difflib.get_close_matches(preset, PRESETS, n=1)
        raise ConfigError(
            f"there is no preset {preset!r}",
            fix=f"did you mean {hint[0]}?" if hint else f"choose one of {', '.join(PRESETS)}",
        )
    path = folder / "m1.toml"
    fix = "edit it, or choose another folder"
    refuse_to_overwrite(path, what="the new m1.toml (FOLDER)", is_ours=lambda text: False, fix=fix)
    write_whole(path, template(preset))
    load_config(path)
    console.print(f"wrote [bold]{escape(str(path))}[/] (preset {preset})")
    console.print(
        "next: name your text under \\[\\[data.sources]], then  m1 prepare-data  and  m1 pretrain --stage all"
    )


def template(preset: str) -> str:
    """Return a commented ``m1.toml`` that resolves to exactly the bare preset."""
    bare = _bare(preset)
    lines = [
        f"# m1 configuration, preset {preset}. Every line that is commented out shows the value in force.",
        "# Try `m1 config show` for the resolved values and where each comes from, `m1 stages` for the curriculum.",
        f'preset = "{preset}"',
        "",
        "# Where the text comes from: one table per source; uncomment and edit.",
        "# [[data.sources]]",
    ]
    examples = {"name": "my-code", "domain": "code", "format": "jsonl", "path": "corpus/*.jsonl.zst"}
    for name, kind in get_type_hints(SourceSpec, include_extras=True).items():
        default = next(f.default for f in dataclasses.fields(SourceSpec) if f.name == name)
        value = examples.get(name, default)
        lines.append(f"# {name} = {toml_value(value)}  # {_doc(kind)}")
    for section in _SECTIONS:
        value = getattr(bare, section)
        lines += ["", f"[{section}]"]
        lines += [f"# {line}" for line in _keys(value) if not line.startswith(("sources =", "runs ="))]
        if section == "sft":
            lines.append(_RUNS)
    for stage in STAGE_NAMES:
        lines += ["", f"[stages.{stage}]"]
        lines += [f"# {line}" for line in _keys(bare.stages[stage])]
    return "\n".join(lines) + "\n"


def show_command(path: Path, overrides: list[str], *, as_json: bool) -> None:
    """Print the resolved configuration."""
    resolved = load_config(path, overrides)
    if as_json:
        console.print_json(json.dumps({"sha256": resolved.sha256, "config": resolved.as_dict()}))
        return
    for key, value in _flat(resolved):
        origin = resolved.origins.get(key, "default")
        style = "dim" if origin == "default" else "cyan" if origin.startswith(("preset", "recipe")) else "bold green"
        console.print(
            f"[{style}]{escape(f'{key} = {toml_value(value)}'):<60}[/]  [dim]{escape(origin)}[/]", soft_wrap=True
        )
    console.print(f"\n[dim]sha256 {resolved.sha256}[/]")


def _bare(preset: str) -> Config:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m1.toml"
        path.write_text(f'preset = "{preset}"\n', encoding="utf-8")
        return load_config(path).config


def _keys(section: Any) -> Iterator[str]:
    for name, kind in get_type_hints(type(section), include_extras=True).items():
        yield f"{name} = {toml_value(getattr(section, name))}  # {_doc(kind)}"


def _flat(resolved: Resolved) -> Iterator[tuple[str, Any]]:
    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        for name in get_type_hints(type(value), include_extras=True):
            item, key = getattr(value, name), f"{prefix}{name}"
            if dataclasses.is_dataclass(item):
                yield from walk(f"{key}.", item)
            elif name == "stages":
                for stage, table in item.items():
                    yield from walk(f"{key}.{stage}.", table)
            elif item and isinstance(item, tuple) and dataclasses.is_dataclass(item[0]):
                for index, entry in enumerate(item):
                    yield from walk(f"{key}.{index}.", entry)
            elif isinstance(value, SftRun) and name == "overrides":
                yield from ((f"{prefix}{own}", given) for own, given in item.items())
            else:
                yield key, item

    yield from walk("", resolved.config)


def _doc(kind: Any) -> str:
    arguments = get_args(kind)
    return str(arguments[1]) if len(arguments) > 1 and isinstance(arguments[1], str) else ""


def toml_value(value: Any) -> str:
    """Return ``value`` as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int):
        return f"{value:_}"
    return repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
