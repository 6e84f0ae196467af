"""Implements ``m1 stages``: the chain of stages, what each stage changes and takes over, and the progress of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.imported import imported_checkpoint, with_imported_base
from m1_stages.config import STAGE_NAMES, ParallelConfig, Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import IMPORT, SFT, configured_runs, for_run, stage_of_base, stage_of_run
from m1_stages.curriculum import plan_stage, previous_stage
from m1_stages.decay import half_life_tokens, is_released
from m1_stages.evaluation.results import read_result
from m1_stages.run_dir import CHECKPOINTS
from m1cli.console import console
from m1cli.evaluation import recall_text

_SHORT_HASH = 8
TAKES_OVER = "weights, optimizer moments, decay rates (moved by a ramp) and the token count"


def stages_command(path: Path, overrides: list[str], *, as_json: bool) -> None:
    """Print one column per stage, or all values as JSON."""
    resolved = load_config(path, overrides)
    chain, tunings = stage_chain(resolved), fine_tunings(resolved)
    if as_json:
        console.print_json(json.dumps([*chain, *tunings]))
        return
    console.print(_table(resolved, chain))
    console.print(f"[dim]A stage takes over {TAKES_OVER}; data order and learning rates are its own.[/]")
    if tunings:
        console.print(_tunings_table(tunings))
    if (imported := imported_checkpoint(resolved.run_dir)) is not None:
        record = imported.meta.extra["import"]
        index = record["index_sha256"][:_SHORT_HASH]
        console.print(f"Imported: {escape(record['source'])} (index {index}). The first stage that is trained starts from it; "
                      f"no RoPE base goes below its {record['rope_base'] / 1e6:g}M.", highlight=False)  # fmt: skip
    for stage in chain:
        for gate in stage["forced_gates"]:
            if gate["stage"] == stage["stage"]:
                known = "unknown" if gate["recall"] is None else f"{gate['recall']:.1%}"
                console.print(f"[yellow]Stage {gate['stage']} was forced: the recall of stage {gate['before']} was {known}, "
                              f"the gate {gate['gate']:.1%}.[/]")  # fmt: skip
    final = plan_stage(resolved, STAGE_NAMES[-1])
    if is_released(final.slopes_new, resolved.config.model):
        console.print(
            "[dim]The final model ends on the released decay rates: it loads in every loader of the family.[/]"
        )
    else:
        console.print("[yellow]The final decay rates are not the released ones: the export carries them as buffers, "
                      "which only transformers reads.[/]")  # fmt: skip


def stage_chain(resolved: Resolved) -> list[dict[str, Any]]:
    """Describe each stage by its configuration, newest checkpoint and evaluation, in plain values ready for JSON."""
    newest: dict[str, Committed] = {}
    for committed in CheckpointStore(resolved.run_dir / CHECKPOINTS).committed():
        newest.setdefault(committed.meta.stage, committed)
    imported = newest.get(IMPORT)
    first = next((name for name in STAGE_NAMES if name in newest), STAGE_NAMES[0])
    finals = {stage: c for stage, c in newest.items() if c.meta.stage_final}
    model = resolved.config.model
    chain = []
    for name in STAGE_NAMES:
        plan = with_imported_base(plan_stage(resolved, name), imported)
        stage, checkpoint = resolved.config.stages[name], newest.get(name)
        slopes = checkpoint.meta.decay["slopes"] if checkpoint else plan.slopes_new
        rates = [s for layer in range(model.num_layers) if not model.is_softmax(layer) for s in slopes[layer]]
        skipped = imported is not None and STAGE_NAMES.index(name) < STAGE_NAMES.index(first)
        before = IMPORT if imported is not None and name == first else None if skipped else previous_stage(name)
        result = read_result(resolved.run_dir, name, finals[name].sha256) if name in finals else None
        chain.append(
            {
                "stage": name,
                "state": "skipped"
                if skipped
                else "to do"
                if checkpoint is None
                else "done"
                if name in finals
                else "started",
                "steps_done": checkpoint.meta.stage_step if checkpoint else 0,
                "steps": plan.num_steps,
                "tokens": plan.tokens,
                "seq_len": plan.seq_len,
                "context_tokens": plan.context_tokens,
                "rope_base": plan.rope_base,
                "rows_per_step": plan.global_batch_rows,
                "mix": {"short": stage.short, "medium": stage.medium, "long": stage.long, "core": stage.core_share},
                "lr_peak": plan.lr.peak,
                "lr_final": plan.lr.final,
                "half_life_tokens": [half_life_tokens(max(rates)), half_life_tokens(min(rates))],
                "layout": checkpoint.meta.topology if checkpoint else _planned(resolved.config.parallel),
                "checkpoint": checkpoint.path.name if checkpoint else None,
                "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
                "starts_from": before,
                "starts_from_sha256": finals[before].sha256 if before in finals else None,
                "takes_over": _takes_over(before, skipped=skipped),
                "needle_recall": result["recall"] if result else None,
                "forced_gates": checkpoint.meta.extra.get("forced_gates", []) if checkpoint else [],
            }
        )
    return chain


def fine_tunings(resolved: Resolved) -> list[dict[str, Any]]:
    """Describe each fine-tuning that is configured or begun, bases first, in plain values ready for JSON."""
    newest: dict[str, Committed] = {}
    for committed in CheckpointStore(resolved.run_dir / CHECKPOINTS).committed():
        newest.setdefault(committed.meta.stage, committed)
    names = configured_runs(resolved.config.sft)
    found = []
    for name in names if SFT in names else [SFT, *names]:
        stage, sft = stage_of_run(name), for_run(resolved, name).config.sft
        checkpoint, before = newest.get(stage), stage_of_base(sft.base_stage)
        if name == SFT and checkpoint is None and (not sft.data or SFT not in names):
            continue  # with runs, the section is what they share
        if before in STAGE_NAMES and before not in newest and IMPORT in newest:
            before = IMPORT
        base = newest.get(before)
        found.append(
            {
                "stage": stage,
                "state": "to do" if checkpoint is None else "done" if checkpoint.meta.stage_final else "started",
                "steps_done": checkpoint.meta.stage_step if checkpoint else 0,
                "seq_len": for_run(resolved, name).config.sft_seq_len,
                "lr_peak": sft.lr_peak,
                "lr_final": sft.lr_final,
                "epochs": sft.epochs,
                "data": list(sft.data),
                "starts_from": before,
                "starts_from_sha256": base.sha256 if base and base.meta.stage_final else None,
                "checkpoint": checkpoint.path.name if checkpoint else None,
                "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
            }
        )
    return found


def _tunings_table(tunings: list[dict[str, Any]]) -> Table:
    table = Table(title="fine-tuning", title_justify="left")
    for name in ("", "state", "starts from", "tokens per row", "epochs", "lr from", "lr to", "saved as"):
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=name == "saved as")
    for t in tunings:
        state = {"started": f"[yellow]step {t['steps_done']}[/]", "done": "[green]done[/]"}.get(t["state"], t["state"])
        table.add_row(
            t["stage"],
            state,
            f"{t['starts_from']} {(t['starts_from_sha256'] or '')[:_SHORT_HASH]}".strip(),
            f"{t['seq_len']:,}",
            f"{t['epochs']:g}",
            f"{t['lr_peak']:g}",
            f"{t['lr_final']:g}",
            (t["checkpoint_sha256"] or "")[:_SHORT_HASH],
        )
    return table


def _takes_over(before: str | None, *, skipped: bool) -> str:
    if before == IMPORT:
        return "weights, and decay rates (moved by a ramp); the optimizer is fresh"
    return TAKES_OVER if before else "nothing" if skipped else "nothing: it starts from random weights"


def _planned(p: ParallelConfig) -> dict[str, int]:
    return {"tp": p.tensor, "pp": p.pipeline, "cp": p.context, "ep": p.expert, "etp": p.expert_tensor}


def _table(resolved: Resolved, chain: list[dict[str, Any]]) -> Table:
    config = resolved.config
    table = Table(title=f"{config.preset}: decay policy {config.curriculum.decay}", title_justify="left")
    for name in ("", *STAGE_NAMES):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name, overflow="fold")
    columns = [_column(stage) for stage in chain]
    for label in columns[0]:
        table.add_row(f"[dim]{label}[/]", *(column[label] for column in columns))
    return table


def _column(s: dict[str, Any]) -> dict[str, Any]:
    mix, lives, recall = s["mix"], s["half_life_tokens"], s["needle_recall"]
    return {
        "state": {"started": f"[yellow]step {s['steps_done']}[/]", "done": "[green]done[/]"}.get(
            s["state"], s["state"]
        ),
        "tokens per row": f"{s['seq_len']:,}",
        "RoPE base": f"{s['rope_base'] / 1e6:g}M",
        "short/med/long": "/".join(f"{100 * mix[k]:.0f}" for k in ("short", "medium", "long")),
        "rows per step": f"{s['rows_per_step']:,}",
        "steps": f"{s['steps']:,}",
        "tokens": _short(s["tokens"]),
        "lr from": f"{s['lr_peak']:g}",
        "lr to": f"{s['lr_final']:g}",
        "half-life from": f"{lives[0]:.1f}",
        "half-life to": f"{lives[1]:,.0f}",
        "layout": " ".join(f"{k.upper()}{n}" for k, n in s["layout"].items() if n > 1 and k != "world") or "alone",
        "starts from": f"{s['starts_from']} {(s['starts_from_sha256'] or '')[:_SHORT_HASH]}".strip()
        if s["starts_from"]
        else ("" if s["state"] == "skipped" else "random"),
        "checkpoint": (s["checkpoint_sha256"] or "")[:_SHORT_HASH],
        "needle recall %": "" if recall is None else recall_text(recall),
    }


def _short(count: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
