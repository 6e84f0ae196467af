"""Implements ``m1 import``, which starts a run from a checkpoint of this family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from m1_stages.config import ModelConfig
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError
from m1cli.commands.config import toml_value
from m1cli.commands.plan import resolve
from m1cli.console import console
from m1cli.library_notes import hide_library_notes

if TYPE_CHECKING:
    from m1_stages.hf.source.config_json import SourceConfig


def import_command(
    source: Path,
    path: Path,
    overrides: list[str],
    *,
    dry_run: bool,
    print_config: bool,
    preset: str | None,
    fresh: bool,
) -> None:
    """Import ``source``, or only compare or describe it.

    Args:
        path: the configuration of the run.
        dry_run: compare names, shapes and bytes, and write nothing.
        print_config: print the sections of m1.toml that fit, and write nothing.
        preset: the model of an index that has no config.json beside it.
        fresh: rename what the run has, and start over.

    Raises:
        M1Error: what the job raises, or options that do not go together.
    """
    if preset is not None and not dry_run:
        raise ConfigError("--preset names the model of an index, for --dry-run", fix="leave it out, or add --dry-run")
    if print_config and (dry_run or fresh):
        raise ConfigError("--print-config only prints", fix="leave out --dry-run and --fresh")
    if not source.exists() or not (source.is_dir() or dry_run):
        raise ConfigError(
            "there is no such folder" if not source.exists() else "this is a file",
            where=str(source),
            fix="name a folder with config.json and safetensors files, as the Hub stores them",
        )
    if print_config:
        _print_config(_read(source), source)
    elif dry_run:
        _dry_run(source, preset)
    else:
        _import(source, path, overrides, fresh=fresh)


def _read(source: Path) -> SourceConfig:
    from m1_stages.hf.source.config_json import read_source_config

    config = read_source_config(source)
    for note in config.notes:
        _note(note)
    return config


def _print_config(config: SourceConfig, source: Path) -> None:
    console.print(f"\\[model]  # of {escape(str(source))}", highlight=False, soft_wrap=True)
    for line in model_lines(config.model):
        console.print(line, highlight=False)


def model_lines(model: ModelConfig) -> list[str]:
    """The keys of a model section as TOML, without those that are as in every model of the family or say nothing of weights."""
    usual = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.default is not dataclasses.MISSING}
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
    return [
        f"{key} = {toml_value(value)}"
        for key, value in values.items()
        if key not in ("aux_loss_coef", "init_std") and (key not in usual or usual[key] != value)
    ]


def _dry_run(source: Path, preset: str | None) -> None:
    from m1_stages.hf.safetensors_writer import INDEX
    from m1_stages.hf.source.config_json import CONFIG
    from m1_stages.hf.source.dry_run import check_folder, check_index, has_weights

    index = source / INDEX if source.is_dir() else source
    beside = index.parent / CONFIG
    if preset is None and not beside.is_file():
        raise ConfigError(
            "the model is not known: there is no config.json beside the index",
            where=str(beside),
            fix="put the model's config.json there, or name a preset: --preset m1-456b",
        )
    if source.is_dir() and preset is None and has_weights(source):
        seen = check_folder(source, _read(source))
    else:
        model = resolve(Path(), preset, []).config.model if preset is not None else _read(index.parent).model
        seen = check_index(index, model)
    size = "bytes not known" if seen.num_bytes is None else f"{seen.num_bytes:,} bytes"
    console.print(
        f"{seen.tensors:,} tensors in {seen.files:,} file{'s' if seen.files > 1 else ''}, {size} "
        f"({escape(seen.dtypes)}): none is missing, none is extra",
        highlight=False,
    )
    console.print(
        "names, shapes, dtypes and bytes were compared; values were not read"
        if seen.with_headers
        else "names and the sum of bytes were compared; there are no weight files here",
        highlight=False,
    )


def _import(source: Path, path: Path, overrides: list[str], *, fresh: bool) -> None:
    if not path.is_file():
        raise ConfigError(
            f"there is no configuration file {path}: it says where the run is, and repeats the model",
            fix=f"m1 init . --preset m1-456b (or the preset whose stages you want), then put what `m1 import {source} "
            "--print-config` shows into m1.toml",
        )
    resolved = load_config(path, overrides)
    hide_library_notes()
    from m1_stages.jobs import import_model

    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        report = import_model.run(
            resolved,
            source,
            fresh=fresh,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"imported {report.tensors:,} tensors, {report.num_bytes / 2**20:,.1f} MiB, RoPE base {report.rope_base / 1e6:g}M",
        highlight=False,
    )
    console.print(escape(f"  {report.checkpoint}"), highlight=False, soft_wrap=True)
    for note in report.notes:
        _note(note)
    if report.has_tokenizer:
        console.print(
            f"next: set tokenizer.path = {escape(toml_value(str(report.companions)))}, then  m1 prepare-data  and  "
            "m1 pretrain --stage 128k  (or any other stage, or m1 sft)",
            highlight=False,
            soft_wrap=True,
        )


def _note(text: str) -> None:
    console.print(f"[yellow]note[/] {escape(text)}", highlight=False)
