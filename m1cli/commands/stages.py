"""``m1 stages``: the chain, what each stage changes, and how far the run is."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from m1_stages.checkpoint import CheckpointStore
from m1_stages.config import CHECKPOINTS, STAGE_NAMES, Resolved
from m1_stages.configload import load_config
from m1_stages.curriculum import plan_stage
from m1_stages.decay import half_life_tokens, is_released
from m1cli.console import console


def stages_command(path: Path, overrides: list[str]) -> None:
    """Print one row per stage."""
    resolved = load_config(path, overrides)
    state = _states(resolved)
    model = resolved.config.model
    rows: dict[str, list[str]] = {}
    for name in STAGE_NAMES:
        plan, stage = plan_stage(resolved, name), resolved.config.stages[name]
        rates = [s for layer in range(model.num_layers) if not model.is_softmax(layer) for s in plan.slopes_new[layer]]
        column = {
            "tokens per row": f"{plan.seq_len:,}",
            "RoPE base": f"{plan.rope_base / 1e6:g}M",
            "short %": f"{stage.short:.0%}",
            "medium %": f"{stage.medium:.0%}",
            "long %": f"{stage.long:.0%}",
            "rows per step": f"{plan.global_batch_rows:,}",
            "steps": f"{plan.num_steps:,}",
            "tokens": _short(plan.tokens),
            "lr from": f"{plan.lr.peak:g}",
            "lr to": f"{plan.lr.final:g}",
            "half-life from": f"{half_life_tokens(max(rates)):.1f}",
            "half-life to": f"{half_life_tokens(min(rates)):,.0f}",
            "state": state.get(name, "to do"),
        }
        for key, value in column.items():
            rows.setdefault(key, []).append(value)
    table = Table(
        title=f"{resolved.config.preset}: decay policy {resolved.config.curriculum.decay}", title_justify="left"
    )
    for column_name in ("", *STAGE_NAMES):
        table.add_column(column_name, justify="right" if column_name else "left", no_wrap=True)
    for key, values in rows.items():
        table.add_row(f"[dim]{key}[/]", *values)
    console.print(table)
    final = plan_stage(resolved, STAGE_NAMES[-1])
    if is_released(final.slopes_new, resolved.config.model):
        console.print(
            "[dim]The final model ends on the released decay rates: it loads in every loader of the family.[/]"
        )
    else:
        console.print("[yellow]The final decay rates are not the released ones: the export carries them as buffers, "
                      "which only transformers reads.[/]")  # fmt: skip


def _states(resolved: Resolved) -> dict[str, str]:
    states: dict[str, str] = {}
    for committed in CheckpointStore(resolved.run_dir / CHECKPOINTS).committed():
        meta = committed.meta
        word = "done" if meta.stage_final else f"step {meta.stage_step}"
        states.setdefault(meta.stage, word)
    return states


def _short(count: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
