"""What a checkpoint records of the model in it and of the way to it, for an export; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1_data.plain_values import from_plain
from m1_stages.checkpoint import Committed
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.sft_runs import IMPORT, for_stage, is_sft
from m1_stages.curriculum import config_section
from m1_stages.errors import DataError
from m1_stages.evaluation.results import read_held_out, read_result, result_path
from m1_stages.hf.model_card import Lineage, StageFacts


def contexts_of(committed: Committed, resolved: Resolved) -> tuple[dict[str, int], list[str]]:
    """Return the tokens per row of every stage on the way to the checkpoint, in order, and a note when they are not recorded."""
    meta, config = committed.meta, resolved.config
    if recorded := meta.extra.get("contexts"):
        return dict(recorded), []
    last = meta.stage if meta.stage in STAGE_NAMES else config.sft.base_stage
    contexts = {stage: config.seq_len(stage) for stage in STAGE_NAMES[: STAGE_NAMES.index(last) + 1]}
    if is_sft(meta.stage):
        contexts[meta.stage] = config.sft_seq_len
    note = (
        "the checkpoint does not record its stages and their context lengths (an older version wrote it): "
        f"{' -> '.join(contexts)} and at most {max(contexts.values()):,} tokens come from the configuration"
    )
    return contexts, [note]


def changes_since(committed: Committed, resolved: Resolved, contexts: Mapping[str, int]) -> list[str]:
    """Name every key that describes the exported model and has another value in the configuration by now."""
    config, meta = resolved.config, committed.meta
    now = {f"model.{key}": value for key, value in resolved.as_dict()["model"].items()}
    then = {f"model.{key}": value for key, value in meta.extra["model"].items()}
    if not now["model.vocab_size"]:
        now["model.vocab_size"] = then["model.vocab_size"]  # comes from the data
    base = (
        meta.stage
        if meta.stage in STAGE_NAMES
        else next((s for s in reversed(list(contexts)) if s in STAGE_NAMES), None)
    )
    then["curriculum.decay"], now["curriculum.decay"] = meta.decay["policy"], config.curriculum.decay
    if base is not None:
        then[f"stages.{base}.rope_base"] = meta.extra["rope_base"]
        now[f"stages.{base}.rope_base"] = config.stages[base].rope_base
    for stage, length in contexts.items():
        if stage in STAGE_NAMES:
            name = f"row length of {config_section(stage)}"
            then[name], now[name] = length, config.seq_len(stage)
        elif stage == meta.stage and is_sft(stage):
            name = f"row length of {stage}"
            then[name], now[name] = length, for_stage(resolved, stage).config.sft_seq_len
    return [
        f"{key} was {then.get(key)!r} in training and is {now.get(key)!r} in the configuration: the export says "
        f"{then.get(key)!r}"
        for key in (*then, *(key for key in now if key not in then))
        if then.get(key) != now.get(key)
    ]


def lineage_of(committed: Committed, contexts: Mapping[str, int], license_id: str) -> Lineage:
    """Return the origin of the weights: checkpoint, stages with their data, tokens, decay policy, evaluation.

    Raises:
        DataError: the run's evaluation of the stage is damaged.
    """
    meta = committed.meta
    return Lineage(
        checkpoint=committed.path.name,
        checkpoint_sha256=committed.sha256,
        stages=tuple(_facts(name, tokens, committed) for name, tokens in contexts.items()),
        tokens_seen=meta.extra["tokens_seen"],
        global_step=meta.global_step,
        decay_policy=meta.decay["policy"],
        config_sha256=meta.config_sha256,
        data_fingerprint=meta.data_fingerprint,
        versions=meta.versions,
        evaluation=_evaluation(committed),
        license=license_id,
    )


def _facts(stage: str, row_tokens: int, committed: Committed) -> StageFacts:
    """What the checkpoint's recorded configuration says of a stage; of an import, what is recorded of its source."""
    recorded, imported = committed.meta.extra.get("config", {}), committed.meta.extra.get("import", {})
    section, base = config_section(stage), imported.get("rope_base")

    def value(key: str) -> Any:
        return recorded.get(f"{section}.{key}")

    if stage == IMPORT:
        return StageFacts(name=stage, row_tokens=row_tokens, rope_base=base, mix=f"imported: {imported.get('source')}")
    rope_base = value("rope_base")
    if stage == committed.meta.stage or is_sft(stage):  # fine-tuning after fine-tuning keeps the base
        rope_base = committed.meta.extra["rope_base"]
    elif rope_base is not None and base is not None:
        rope_base = max(rope_base, base)  # no stage of a run has a base below the imported one
    if is_sft(stage):
        tokens = _tokens_of(stage, committed)
        return StageFacts(name=stage, row_tokens=row_tokens, rope_base=rope_base, tokens=tokens, mix="conversations")
    if value("short") is None:
        return StageFacts(name=stage, row_tokens=row_tokens, rope_base=rope_base)
    domains = ", ".join(f"{name} {weight:g}" for name, weight in (value("domains") or {}).items())
    mix = (
        f"{value('short'):.0%} short, {value('medium'):.0%} medium, {value('long'):.0%} long documents; "
        f"{value('core_share'):.0%} STEM, code, books and reasoning; {value('long_qa_share'):.0%} long question-answer data "
        "in the last fifth"
    )
    return StageFacts(
        name=stage,
        row_tokens=row_tokens,
        rope_base=rope_base,
        tokens=value("tokens"),
        mix=mix + (f"; domains {domains}" if domains else ""),
    )


def _tokens_of(stage: str, committed: Committed) -> int | None:
    """Tokens in the rows that were trained in ``stage``; None when an older version trained it."""
    extra = committed.meta.extra
    entered_at, way = extra.get("entered_at", {}), list(extra.get("contexts", {}))
    if stage not in entered_at:
        return None
    following = way[way.index(stage) + 1 :][:1]
    end = entered_at[following[0]] if following else extra["tokens_seen"]
    return int(end - entered_at[stage])


def _evaluation(committed: Committed) -> tuple[tuple[str, str], ...]:
    """The results that the checkpoint's run holds for exactly this checkpoint."""
    run_dir, stage = committed.path.parent.parent, committed.meta.stage
    if is_sft(stage):
        return _held_out(run_dir, stage, committed.sha256)
    result = read_result(run_dir, stage, committed.sha256)
    if result is None or result["recall"] is None:
        return ()
    rows = [("needles found, mean over lengths and depths", f"{result['recall']:.1%}")]
    try:
        lengths = from_plain(tuple[int, ...], result["needles"]["lengths"], "lengths")
        recall = from_plain(tuple[tuple[float, ...], ...], result["needles"]["recall"], "recall")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the result of an evaluation is damaged: {error}",
            where=str(result_path(run_dir, stage)),
            fix=f"write it anew: m1 evaluate --stage {stage}",
        ) from error
    for length, shares in zip(lengths, recall, strict=False):
        rows.append((f"needles found in {length:,} tokens", f"{sum(shares) / max(len(shares), 1):.1%}"))
    return tuple(rows)


def _held_out(run_dir: Path, stage: str, sha256: str) -> tuple[tuple[str, str], ...]:
    """The loss of the conversations that fine-tuning held out, by domain."""
    result = read_held_out(run_dir, stage, sha256)
    if result is None:
        return ()
    rows = [("held-out conversations, loss of trained tokens", f"{result['loss']:.4f}")]
    each = [
        (f"held-out conversations, {d['domain'] or 'no domain named'}", f"{d['loss']:.4f}") for d in result["domains"]
    ]
    return (*rows, *each)
