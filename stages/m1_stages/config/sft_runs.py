"""Names of fine-tunings: the plain section ``sft``, and the runs ``[[sft.runs]]``, which change some of its values. No torch.

A run is called by its name on the command line and in ``base_stage``. In checkpoints, events and file names its stage is called
``sft-NAME``, which no stage of pretraining can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m1_stages.config.schema import STAGE_NAMES, Config, Resolved
from m1_stages.config.sft_section import SftConfig, SftRun
from m1_stages.errors import ConfigError

SFT = "sft"
"""The plain section: its stage, and its name where a run has one."""
IMPORT = "import"
"""What the checkpoint of an imported model says in place of a stage."""
_PREFIX = f"{SFT}-"


def is_sft(stage: str) -> bool:
    """Whether ``stage`` is a fine-tuning: the plain one or a named run."""
    return stage == SFT or stage.startswith(_PREFIX)


def stage_of_run(name: str) -> str:
    """The stage of the run ``name``; that of the plain section is ``sft``."""
    return SFT if name == SFT else f"{_PREFIX}{name}"


def run_of_stage(stage: str) -> str:
    """The name of the run whose stage is ``stage``, a fine-tuning."""
    return stage.removeprefix(_PREFIX)


def stage_of_base(base: str) -> str:
    """The stage that a ``base_stage`` names: a stage of pretraining, ``import``, ``sft``, or that of a run."""
    return base if base in (*STAGE_NAMES, IMPORT) else stage_of_run(base)


def known_stages(sft: SftConfig) -> tuple[str, ...]:
    """Every stage that the configuration can train: those of pretraining, the plain fine-tuning, the named runs."""
    return (*STAGE_NAMES, SFT, *(stage_of_run(run.name) for run in sft.runs))


def refuse_unknown_stage(sft: SftConfig, stage: str | None) -> None:
    """Refuse a ``--stage`` that the configuration does not have; None is no stage.

    Raises:
        ConfigError: the message names those there are.
    """
    known = known_stages(sft)
    if stage is not None and stage not in known:
        raise ConfigError(f"there is no stage {stage!r}", fix=f"choose one of {', '.join(known)}")


def configured_runs(sft: SftConfig) -> list[str]:
    """Names of the fine-tunings that ``m1 sft`` does in order: the runs, bases first; the plain section when there are none."""
    bases = {run.name: run.overrides.get("base_stage", sft.base_stage) for run in sft.runs}
    order: list[str] = []

    def add(name: str) -> None:
        if name in bases and name not in order:
            add(bases[name])
            order.append(name)

    for name in bases:
        add(name)
    return order or [SFT]


def for_run(resolved: Resolved, name: str) -> Resolved:
    """Return the configuration in whose section ``sft`` the values are those of the run ``name``; ``sft`` is the plain section.

    Raises:
        ConfigError: there is no such run.
    """
    runs = resolved.config.sft.runs
    number = next((n for n, run in enumerate(runs) if run.name == name), None)
    if number is None and name != SFT:
        known = ", ".join(run.name for run in runs)
        raise ConfigError(
            f"there is no fine-tuning named {name!r}",
            where="key sft.runs",
            fix=f"choose one of {known}, or {SFT} for the section itself"
            if known
            else f'add it to m1.toml: [[sft.runs]] name = "{name}"   (without --name the section sft is trained)',
        )
    if number is None:
        return dataclasses.replace(resolved, config=_with_sft(resolved.config, {}))
    origins = dict(resolved.origins)
    for key in runs[number].overrides:
        origins[f"sft.{key}"] = origins.get(f"sft.runs.{number}.{key}", "")
    config = config_of_run(resolved.config, runs[number])
    return dataclasses.replace(resolved, config=config, origins=origins, sft_run=name)


def for_stage(resolved: Resolved, stage: str) -> Resolved:
    """Return the configuration for ``stage``: ``for_run`` of a fine-tuning that is configured, else as it is."""
    is_named = is_sft(stage) and run_of_stage(stage) in [run.name for run in resolved.config.sft.runs]
    return for_run(resolved, run_of_stage(stage)) if is_named else resolved


def config_of_run(config: Config, run: SftRun) -> Config:
    """Return ``config`` with the values of ``run`` in its section ``sft``, which has no runs then.

    Weights of the section belong to its files: a run with files of its own has those weights alone that name one of them.
    """
    values = dict(run.overrides)
    if "data" in values and "weights" not in values:
        values["weights"] = {file: weight for file, weight in config.sft.weights.items() if file in values["data"]}
    return _with_sft(config, values)


def _with_sft(config: Config, values: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, sft=dataclasses.replace(config.sft, runs=(), **values))
