"""Whether prepared data can feed the stages, and what to change where it cannot: one answer for every command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from m1_data.sampling.mix import TooLittleData
from m1_data.sampling.stage_draw import Lengths, StageDraw, rebucketed, refusals
from m1_data.spec import BUCKET_EDGES_TOKENS, LENGTH_CLASSES, StageMix
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.check import check
from m1_stages.curriculum import plan_stage
from m1_stages.errors import ConfigError, DataError

_SHORTEST_ROW = 32
"""Rows of fewer tokens are not proposed."""


def stage_draw(resolved: Resolved, stage: str) -> StageDraw:
    """Return what ``stage`` draws from the prepared data."""
    config, plan = resolved.config, plan_stage(resolved, stage)
    return StageDraw(
        mix=config.mix(stage),
        previous=config.mix(plan.starts_from) if plan.starts_from else None,
        seq_len=plan.seq_len,
        num_rows=plan.num_steps * plan.global_batch_rows,
        seed=config.run.seed,
    )


def stage_mixes(resolved: Resolved) -> list[tuple[StageMix, int]]:
    """Return the mix of each stage and the tokens it draws, in the order of the stages."""
    return [(resolved.config.mix(stage), stage_draw(resolved, stage).tokens) for stage in STAGE_NAMES]


def impossible_stages(resolved: Resolved, stages: Sequence[str], lengths: Lengths) -> dict[str, TooLittleData]:
    """Return why each of ``stages`` that cannot run on documents of these lengths cannot, by name; empty when all can."""
    return refusals([stage_draw(resolved, stage) for stage in stages], lengths)


def refuse_impossible_stages(resolved: Resolved, stages: Sequence[str], lengths: Lengths) -> None:
    """Refuse ``stages`` before anything is trained when one of them could not run later.

    Raises:
        DataError: what is missing, what there is, and what works instead.
    """
    if refused := impossible_stages(resolved, stages, lengths):
        raise explain(resolved, stages, lengths, refused)


def explain(
    resolved: Resolved, stages: Sequence[str], lengths: Lengths, refused: Mapping[str, TooLittleData]
) -> DataError:
    """Return the error for ``refused``, a part of ``stages``: what is missing, what there is, and what works instead."""
    names = f"stage {', '.join(refused)}" if len(refused) == 1 else f"stages {', '.join(refused)}"
    changes = working_changes(resolved, stages, lengths)
    if changes:
        sets = " ".join(f"--set {key}={value}" for key, value in changes.items())
        fix = f"this works, with the same --set for m1 pretrain (or in the configuration): m1 prepare-data {sets}"
    else:
        fix = _needs(resolved, refused, lengths)
        possible = [stage for stage in stages if stage not in refused]
        if possible and stages.index(possible[0]) == 0:
            fix += f"; what can run now: m1 pretrain --stage {possible[0]}"
    return DataError(
        f"{names} cannot run on this data: {'; '.join(error.what for error in refused.values())}",
        where=f"at hand: {_at_hand(lengths)}",
        fix=fix,
    )


def working_changes(resolved: Resolved, stages: Sequence[str], lengths: Lengths) -> dict[str, str]:
    """Return the keys, with values, under which ``stages`` can run on the same text; empty when none were found.

    The largest ``curriculum.length_scale`` that works is the present one divided by a power of two; ``stages.NAME.tokens`` is
    lowered where passes over the data are too few tokens.
    """
    scale = resolved.config.curriculum.length_scale
    if not lengths:
        return {}
    while True:
        trial = _with(resolved, length_scale=scale)
        if min(trial.config.seq_len(stage) for stage in stages) < _SHORTEST_ROW:
            return {}
        changed = scale != resolved.config.curriculum.length_scale
        documents = rebucketed(lengths, scale) if changed else lengths
        tokens = _fewer_tokens(trial, stages, documents) if _valid(trial) else None
        if tokens is not None:
            changes = {"curriculum.length_scale": repr(scale)} if changed else {}
            return changes | {f"stages.{stage}.tokens": str(count) for stage, count in tokens.items()}
        scale /= 2


def _fewer_tokens(resolved: Resolved, stages: Sequence[str], lengths: Lengths) -> dict[str, int] | None:
    """Return the tokens that stages with too few documents can train; None when a stage cannot run at all."""
    found = {}
    for stage, error in impossible_stages(resolved, stages, lengths).items():
        step = resolved.config.global_batch_rows(stage) * resolved.config.seq_len(stage)
        most = error.tokens_of_passes // step * step
        if not most:
            return None
        if impossible_stages(_with(resolved, tokens={stage: most}), [stage], lengths):
            return None
        found[stage] = most
    return found


def _with(resolved: Resolved, *, length_scale: float = 0.0, tokens: Mapping[str, int] | None = None) -> Resolved:
    config = resolved.config
    curriculum = dataclasses.replace(config.curriculum, length_scale=length_scale or config.curriculum.length_scale)
    stages = {
        name: dataclasses.replace(stage, tokens=(tokens or {}).get(name, stage.tokens))
        for name, stage in config.stages.items()
    }
    return dataclasses.replace(resolved, config=dataclasses.replace(config, curriculum=curriculum, stages=stages))


def _valid(resolved: Resolved) -> bool:
    try:
        check(resolved)
    except ConfigError:
        return False
    return True


def _needs(resolved: Resolved, refused: Mapping[str, TooLittleData], lengths: Lengths) -> str:
    """Say which documents, and how many tokens of them, the refused stages need."""
    parts = []
    for stage, error in refused.items():
        draw = stage_draw(resolved, stage)
        if error.missing_classes:
            for name in error.missing_classes:
                need = math.ceil(getattr(draw.mix, name) * draw.tokens / draw.mix.max_epochs)
                parts.append(f"stage {stage} needs {need:,} tokens in documents of {_range(resolved, name)}")
        else:
            need = math.ceil((draw.tokens - error.tokens_of_passes) / draw.mix.max_epochs)
            parts.append(f"stage {stage} needs {need:,} tokens more")
    return f"add sources: {'; '.join(parts)}"


def _range(resolved: Resolved, length_class: str) -> str:
    scale = resolved.config.curriculum.length_scale
    short, medium = (round(edge * scale) for edge in BUCKET_EDGES_TOKENS[:2])
    return {"short": f"under {short:,} tokens", "medium": f"{short:,} to {medium - 1:,} tokens"}.get(
        length_class, f"{medium:,} tokens or more"
    )


def _at_hand(lengths: Lengths) -> str:
    tokens = dict.fromkeys(LENGTH_CLASSES, 0)
    for cell, counts in lengths.items():
        tokens[cell.length_class] += int(counts.sum())
    longest = max((int(counts.max(initial=0)) for counts in lengths.values()), default=0)
    each = ", ".join(f"{count:,} tokens of {name} documents" for name, count in tokens.items())
    return f"{each}; the longest document has {longest:,} tokens"
