"""Compares the configuration with the one that a checkpoint was made with, before a stage continues it or starts from it.

The schema says of each key what becomes of a change (``WhenChanged``). Here the refusals and the report follow from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from m1_data.spec import StageMix
from m1_stages.checkpoint.manifest import Committed
from m1_stages.config import Resolved, WhenChanged
from m1_stages.config.lora import recorded_lora
from m1_stages.config.sft_runs import SFT, is_sft
from m1_stages.config.when_changed import KeyChange, changed_keys
from m1_stages.curriculum import StagePlan, train_command
from m1_stages.errors import ConfigError
from m1_stages.events import SettingsChanged

_MIX = frozenset(field.name for field in dataclasses.fields(StageMix))


def refuse_changes(candidates: Sequence[Committed], resolved: Resolved, plan: StagePlan) -> None:
    """Refuse a configuration that cannot continue one of ``candidates``, of the same stage or of the one it starts from.

    Raises:
        ConfigError: keys that are fixed for the run differ; or keys of the stage that are fixed within it, or any key of
            its own section when the stage is finished already.
    """
    for committed in candidates:
        changes = _changes(committed, resolved)
        run = [c for c in changes if c.rule is WhenChanged.FIXED_FOR_RUN]
        if run:
            raise _refusal(run, resolved, committed, "fixed for the run", start_over(plan, everything=True))
        if committed.meta.stage != plan.stage:
            continue
        stage = [c for c in changes if c.rule is WhenChanged.FIXED_IN_STAGE and _concerns(c.key, plan)]
        if stage:
            what = "finished" if committed.meta.stage_final else f"at step {committed.meta.stage_step}"
            raise _refusal(stage, resolved, committed, f"fixed within {plan.title}, which is {what}", start_over(plan))
        own = [c for c in changes if c.rule is WhenChanged.APPLIED and c.key.startswith(f"{plan.config_section}.")]
        if own and committed.meta.stage_final:
            reason = f"too late: {plan.title} is finished, and nothing would be trained with the new value"
            raise _refusal(own, resolved, committed, reason, start_over(plan))


def refuse_other_adapters(candidates: Sequence[Committed], plan: StagePlan) -> None:
    """Refuse to go on from a checkpoint of the stage that has other adapters, also one that does not record its settings.

    Raises:
        ConfigError: the adapters of one of ``candidates`` are not those of ``plan``.
    """
    for committed in candidates:
        if recorded_lora(committed.meta.extra) != plan.lora:
            trained = "adapters" if plan.lora is None else "all weights or other adapters"
            raise ConfigError(
                f"sft.lora_rank: {plan.title} trained {trained} up to its step {committed.meta.stage_step}",
                where=str(committed.path),
                fix=f"set sft.lora_* back, or {start_over(plan)}",
            )


def settings_changed(committed: Committed, resolved: Resolved, plan: StagePlan, step: int) -> SettingsChanged | None:
    """Return what to report of a stage that goes on from ``committed`` with another configuration; None for nothing.

    Args:
        step: the first step of the stage that is made with it.
    """
    if "config" not in committed.meta.extra:
        note = (
            f"{committed.path.name} does not record its configuration: only the model's shape and the data are compared"
        )
        return SettingsChanged(stage=plan.stage, step=step, changes=[], note=note)
    told = (WhenChanged.APPLIED, WhenChanged.FIXED_IN_STAGE)
    changes = [c for c in _changes(committed, resolved) if c.rule in told and _concerns(c.key, plan)]
    if committed.meta.stage != plan.stage and plan.stage != SFT:
        changes = [c for c in changes if not c.key.startswith("sft.")]  # those of what a named run starts from
    if not changes:
        return None
    return SettingsChanged(
        stage=plan.stage, step=step, changes=[{"key": c.key, "old": c.old, "new": c.new} for c in changes], note=""
    )


def _changes(committed: Committed, resolved: Resolved) -> list[KeyChange]:
    extra = committed.meta.extra
    # version 0.1.0 recorded the model's section alone
    recorded = extra.get("config") or {f"model.{key}": value for key, value in extra.get("model", {}).items()}
    return changed_keys(recorded, resolved)


def _concerns(key: str, plan: StagePlan) -> bool:
    """Whether what is trained in ``plan`` depends on ``key``."""
    section, _, name = key.rpartition(".")
    if section == "sft":
        return is_sft(plan.stage)
    if section == "evaluate":
        return not is_sft(plan.stage)
    if not section.startswith("stages.") or section == plan.config_section:
        return True
    if section != f"stages.{plan.starts_from}":
        return False
    # rows move from the mix of the stage before to the stage's own; fine-tuning keeps RoPE base and slopes of its base
    return name in _MIX if not is_sft(plan.stage) else name in ("rope_base", "context_tokens")


def start_over(plan: StagePlan, *, everything: bool = False) -> str:
    """Return in words how to train ``plan`` from its start, or ``everything`` before it as well."""
    if is_sft(plan.stage) and not everything:
        return f"start {plan.title} over: {train_command(plan.stage)} --fresh"
    return f"use another run.dir, or start over: {train_command('all' if is_sft(plan.stage) else plan.stage)} --fresh"


def _refusal(
    changes: Sequence[KeyChange], resolved: Resolved, committed: Committed, reason: str, start_over: str
) -> ConfigError:
    first = changes[0]
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    return ConfigError(
        f"{', '.join(map(str, changes[:4]))}{more}: {reason}",
        where=f"{resolved.origins.get(first.key, '')}, key {first.key}; {committed.path}".lstrip(", "),
        fix=f"set {first.key} back to {first.old!r}, or {start_over}"
        if len(changes) == 1
        else f"set them back, or {start_over}",
    )
