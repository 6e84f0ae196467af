"""Writes the HTML page around the figures."""

from __future__ import annotations

from html import escape
from pathlib import Path

from m1_data.storage.manifest import load_manifest
from m1_data.storage.ownership import refuse_to_overwrite, write_whole
from m1_stages.config.sft_runs import SFT, run_of_stage
from m1_stages.errors import DataError, EnvironmentProblem
from m1cli.pace import wall_time
from m1cli.report.read import History, Record, read_history
from m1cli.sft.lines import held_out_lines, sft_data_lines

_STYLE = """
:root { color-scheme: light dark; --fg: #1d2126; --soft: #69707a; --bg: #ffffff; --card: #f6f7f9; --line: #e2e5ea; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e8eaed; --soft: #9aa0a8; --bg: #15181c; --card: #1c2026; --line: #2c323a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); margin: 0 auto; max-width: 1180px;
       padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p, li { color: var(--soft); } .facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .55rem .9rem; }
.fact b { display: block; font-size: 1.05rem; } .fact span { color: var(--soft); font-size: .8rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .4rem .6rem; margin: 1rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } @media (max-width: 900px) { .pair { display: block; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; } code { font-size: .85em; }
"""
_BEGINNING = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>m1 run "
)
"""How every report of ours begins: a file that does not is not overwritten."""


def write_report(run_dir: Path, data_manifest: Path | None, out: Path) -> Path:
    """Write the page about ``run_dir`` to ``out``. The page needs no network and no other file.

    Raises:
        ConfigError: ``out`` is there, and is no report of ours.
        DataError: the run has no events.
        EnvironmentProblem: plotly is not installed.
    """
    refuse_to_overwrite(out, what="the report (--out)", is_ours=_is_report, fix="give another --out")
    history = read_history(run_dir)
    try:
        from m1cli.report import figures
    except ImportError as error:
        raise EnvironmentProblem("the report needs plotly", fix="pip install 'm1cli[report]'") from error
    singles = [
        figures.over_tokens(history, "loss", "Loss over tokens, stage by stage", smooth=True),
        figures.half_lives(history),
    ]
    pairs = [
        (figures.over_tokens(history, "grad_norm", "Gradient norm", log=True), figures.layer_norms(history)),
        (figures.data_mix(history), figures.length_mix(history)),
        (figures.expert_load(history), figures.over_tokens(history, "aux_loss", "Balance loss")),
        (
            figures.over_tokens(history, "tokens_per_s", "Tokens per second in the steps, without saves and waiting"),
            figures.over_tokens(history, "lr", "Learning rate"),
        ),
    ]
    drawn = [_draw(figure, inline=index == 0) for index, figure in enumerate(singles)]
    sides = [f'<div class="pair">{_draw(a)}{_draw(b)}</div>' for a, b in pairs]
    body = [
        _head(history),
        "<h2>Training</h2>",
        drawn[0],
        _stage_table(history),
        "<h2>Memory of the lightning layers</h2>",
        "<p>A head has forgotten half after ln 2 / slope tokens. Empty rows are softmax layers, which do not decay.</p>",
        drawn[1],
        *_long_range(history),
        "<h2>Gradients</h2>",
        sides[0],
        "<h2>Data</h2>",
        _data(data_manifest),
        *(_sft_data(name, stage["mix"]) for name, stage in history.stages.items()),
        *(_lines(name, held_out_lines(measured)) for name, measured in history.held_out.items()),
        sides[1],
        _passes(history),
        "<h2>Experts</h2>",
        sides[2],
        "<h2>Speed and schedule</h2>",
        sides[3],
        _events(history),
    ]
    page = (
        f"{_BEGINNING}{escape(run_dir.name)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    write_whole(out, page)
    return out


def _is_report(text: str) -> bool:
    return text.startswith(_BEGINNING)


def _long_range(history: History) -> list[str]:
    """Return the needle maps and the loss by position of the stages that were evaluated."""
    from m1cli.report import figures

    parts = ["<h2>Learning at long range</h2>"]
    if not history.evaluated:
        return [*parts, "<p>No stage was evaluated.</p>"]
    records = history.evaluated.values()
    if any(r["needles"] for r in records):
        guessed = max(max(r["needles"]["control_recall"]) for r in records if r["needles"])
        parts += [
            "<p>A key and its value are hidden in a text, and the key is repeated at its end. Recall is the share of the value's "
            f"tokens that the model then predicts. With nothing hidden it predicts at most {guessed:.0%} of them.</p>",
            _draw(figures.needle_maps(history)),
        ]
    if any(r["positions"] for r in records):
        parts.append(_draw(figures.position_losses(history)))
    for reason in sorted({f"{r['stage']}: not measured: {reason}" for r in records for reason in r["skipped"]}):
        parts.append(f"<p>{escape(reason)}</p>")
    return parts


def _draw(figure: object, *, inline: bool = False) -> str:
    html = figure.to_html(  # type: ignore[attr-defined]
        full_html=False, include_plotlyjs=inline, config={"displayModeBar": False, "responsive": True}
    )
    return f'<div class="figure">{html}</div>'


def _head(history: History) -> str:
    start = history.starts[-1]
    steps = [s for rows in history.steps.values() for s in rows]
    facts = {
        "model": start["preset"],
        "parameters": f"{start['parameters'] / 1e6:,.1f}M",
        "active": f"{start['active_parameters'] / 1e6:,.1f}M",
        "device": f"{start['world_size']} x {start['device']} {start['precision']}",
        "tokens trained": f"{steps[-1]['tokens_seen']:,}",
        "steps": f"{len(steps):,}",
        "time in steps": f"{sum(s['step_s'] for s in steps):,.0f} s",
        "torch": start["versions"].get("torch", "?"),
        "megatron-core": start["versions"].get("megatron-core", "?"),
    }
    boxes = "".join(
        f'<div class="fact"><b>{escape(str(v))}</b><span>{escape(k)}</span></div>' for k, v in facts.items()
    )
    spent = f"<p>Wall time of the processes that said so at their end: {escape(wall_time(history.wall_s))}.</p>"
    return (
        f"<h1>m1 run</h1><p><code>{escape(start['run_dir'])}</code></p><div class='facts'>{boxes}</div>"
        f"{spent if history.wall_s else ''}"
    )


def _stage_table(history: History) -> str:
    rows = []
    for name, stage in history.stages.items():
        steps, done = history.steps.get(name, []), history.finished.get(name)
        cells = [
            name,
            f"{stage['seq_len']:,}",
            f"{stage['rope_base'] / 1e6:g}M",
            f"{stage['global_batch_rows']}",
            f"{len(steps)} / {stage['num_steps']}",
            f"{stage['tokens']:,}",
            f"{_mean(steps[:5]):.3f}" if steps else "",
            f"{_mean(steps[-5:]):.3f}" if steps else "",
            f"{sum(s['step_s'] for s in steps):,.0f} s",
            f"{history.clock_s.get(name, 0.0):,.0f} s",
            "done" if done else "unfinished",
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = (
        "stage",
        "context",
        "RoPE base",
        "rows/step",
        "steps",
        "tokens",
        "loss, first 5",
        "loss, last 5",
        "time in steps",
        "by the clock",
        "",
    )
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{''.join(rows)}</table>"


def _mean(steps: list[Record]) -> float:
    return sum(float(s["loss"]) for s in steps) / len(steps)


def _data(path: Path | None) -> str:
    if path is None:
        return "<p>No data manifest was found beside this run.</p>"
    try:
        manifest = load_manifest(path.parent)
    except DataError as error:
        return f"<p>The prepared data is not described here: {escape(error.what)}.</p>"
    documents = sum(s.documents for s in manifest.sources)
    tokens = sum(s.tokens for s in manifest.shards)
    rejected: dict[str, int] = {}
    for source in manifest.sources:
        for reason, count in source.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    excluded = ", ".join(f"{count:,} {escape(reason)}" for reason, count in rejected.items()) or "none"
    return (
        f"<p>{documents:,} documents, {tokens:,} tokens, vocabulary {manifest.vocab_size:,}; STEM, code, book and "
        f"reasoning are {manifest.core_share:.1%} of all tokens. Excluded: {excluded}.</p>"
    )


def _heading(stage: str) -> str:
    return "Fine-tuning" if stage == SFT else f"Fine-tuning {escape(run_of_stage(stage))}"


def _lines(name: str, lines: list[str]) -> str:
    text = "; ".join(escape(line.strip()) for line in lines)
    return f"<p>{_heading(name)}, {text}.</p>"


def _sft_data(name: str, mix: Record) -> str:
    data, lost = sft_data_lines(mix)
    parts = [*map(escape, data), *(f"<b>{escape(line)}</b>" for line in lost)]
    return f"<p>{_heading(name)}: {'; '.join(parts)}.</p>" if parts else ""


def _passes(history: History) -> str:
    """Return a table of the passes over each cell in each stage; a cell is a source and a length bucket."""
    mixes = history.mixes()
    passes: dict[tuple[str, str], dict[str, float]] = {}
    for stage, mix in mixes.items():
        for cell in mix.get("epochs", []):
            passes.setdefault((cell["source"], cell["bucket"]), {})[stage] = cell["epochs"]
    if not passes:
        return ""
    rows = [
        f"<tr><td>{escape(source)} {escape(bucket)}</td>"
        + "".join(f"<td>{of[stage]:.2f}</td>" if stage in of else "<td></td>" for stage in mixes)
        + "</tr>"
        for (source, bucket), of in sorted(passes.items())
    ]
    head = "".join(f"<th>{escape(stage)}</th>" for stage in mixes)
    return f"<table><tr><th>passes over</th>{head}</tr>{''.join(rows)}</table>"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if numbers[8:] else "")


def _events(history: History) -> str:
    lines = []
    for record in history.other:
        kind = record["event"]
        text = {
            "StageStarted": lambda r: f"continued stage {r['stage']} at step {r['step']}",
            "CheckpointRejected": lambda r: f"checkpoint {r['path']} rejected: {r['reason']}",
            "GateForced": lambda r: (
                f"stage {r['stage']} was forced: recall of stage {r['before']} is "
                f"{'not known' if r['recall'] is None else format(r['recall'], '.1%')}, the gate {r['gate']:.1%}"
            ),
            "GuardNoticed": lambda r: (
                f"{r['stage']} step {r['step']}: {r['reason']} in {r['series']}, {r['value']:.4g}, median "
                f"{r['median']:.4g}: {r['action'].replace('_', ' ')}, decay ramp {r['ramp']}; samples {_few(r['sample_ids'])}"
            ),
            "StepRepeated": lambda r: f"{r['stage']} step {r['step']} was not finite; repeated: {r['verdict']}",
            "RolledBack": lambda r: (
                f"{r['stage']} rolled back from step {r['from_step']} to {r['to_step']}, without steps "
                f"{_few(r['excluded_steps'])}"
            ),
            "StragglerNoticed": lambda r: (
                f"rank {r['rank']} kept the others waiting: {r['seconds']:.2f} s instead of {r['median']:.2f} s"
            ),
            "SaveFailed": lambda r: f"checkpoint at step {r['step']} not written: {r['reason']}",
            "EventsDelayed": lambda r: f"events could not be written for a while: {r['reason']}",
            "RunStopped": lambda r: f"stopped: {r['reason']}",
        }[kind](record)
        lines.append(f"<li>{escape(text)}</li>")
    for stage, steps in history.held.items():
        lines.append(f"<li>the guard held the decay ramp of stage {escape(stage)} in {steps} steps</li>")
    return f"<h2>Events</h2><ul>{''.join(lines) or '<li>none: the run was never interrupted</li>'}</ul>"
