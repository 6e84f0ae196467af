"""Draws the figures of the report with Plotly; the title of each figure says what it shows."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from m1_stages.decay import half_life_tokens
from m1cli.report.read import History, Record

COLOURS = ("#4c78a8", "#54a24b", "#eeca3b", "#f58518", "#e45756", "#b279a2")
_BANDS = "rgba(127,127,127,0.08)"


def over_tokens(history: History, key: str, title: str, *, log: bool = False, smooth: bool = False) -> go.Figure:
    """Draw one measured value over the tokens trained, with a band per stage."""
    figure = go.Figure()
    for index, (stage, steps) in enumerate(history.steps.items()):
        x, y = [s["tokens_seen"] for s in steps], [s[key] for s in steps]
        colour = COLOURS[index % len(COLOURS)]
        if smooth:
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": colour, "width": 1},
                opacity=0.35,
                showlegend=False,
                hoverinfo="skip",
            )
            y = _smoothed(y)
        figure.add_scatter(
            x=x, y=y, name=stage, mode="lines", line={"color": colour, "width": 2.5},
            customdata=[[s["step"], s["loss"]] for s in steps],
            hovertemplate="step %{customdata[0]}, loss %{customdata[1]:.4f}<br>%{y:.4g}<extra>" + stage + "</extra>",
        )  # fmt: skip
        if index % 2:
            figure.add_vrect(x0=x[0], x1=x[-1], fillcolor=_BANDS, line_width=0, layer="below")
    figure.update_yaxes(type="log" if log else "linear")
    figure.update_xaxes(title="tokens trained")
    return _styled(figure, title)


def layer_norms(history: History) -> go.Figure:
    """Draw the gradient norm of every layer over steps."""
    steps = [s for rows in history.steps.values() for s in rows if s["layer_grad_norms"]]
    figure = go.Figure(
        go.Heatmap(
            x=[s["global_step"] for s in steps],
            z=[[_log10(s["layer_grad_norms"][n : n + 1]) for s in steps] for n in range(_layers(steps))],
            colorscale="Viridis",
            colorbar={"title": "log10"},
            hovertemplate="step %{x}, layer %{y}: 10^%{z:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1)
    return _styled(figure, "Gradient norm by layer")


def half_lives(history: History) -> go.Figure:
    """Draw the half-life of every lightning head, one map per stage."""
    stages = list(history.stages.values())
    columns = min(3, len(stages))
    rows = -(-len(stages) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=[_stage_title(s) for s in stages],
        horizontal_spacing=0.06, vertical_spacing=0.32 / rows,
    )  # fmt: skip
    for index, stage in enumerate(stages):
        skip = set(stage["softmax_layers"])
        lives = [
            [None if layer in skip else math.log10(half_life_tokens(s)) for s in row]
            for layer, row in enumerate(stage["slopes_new"])
        ]
        figure.add_trace(
            go.Heatmap(
                z=lives,
                coloraxis="coloraxis",
                text=[["softmax" if v is None else f"{10**v:,.1f} tokens" for v in row] for row in lives],
                hovertemplate="layer %{y}, head %{x}: %{text}<extra></extra>",
            ),
            row=index // columns + 1,
            col=index % columns + 1,
        )
    figure.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": {"title": "log10<br>tokens"}})
    figure.update_yaxes(autorange="reversed", title="layer", dtick=1 if _rows(stages) <= 24 else None)
    figure.update_xaxes(title="head")
    return _styled(figure, "How long each head remembers: decay half-life", height=300 * rows + 80)


def expert_load(history: History) -> go.Figure:
    """Draw the share of each expert per layer, averaged over the last 20 steps of the run."""
    rows = [s["expert_load"] for steps in history.steps.values() for s in steps if s["expert_load"]][-20:]
    rows = [
        row for row in rows if _shape(row) == _shape(rows[-1])
    ]  # a run that was started over may have another model
    load = [
        [sum(r[layer][e] for r in rows) / len(rows) for e in range(experts)]
        for layer, experts in enumerate(_shape(rows[-1]) if rows else [])
    ]
    figure = go.Figure(
        go.Heatmap(
            z=[[share * len(row) for share in row] for row in load],
            colorscale="RdBu_r",
            zmid=1.0,
            zmin=0.0,
            zmax=2.0,
            colorbar={"title": "x even"},
            hovertemplate="layer %{y}, expert %{x}: %{z:.2f} of an even share<extra></extra>",
        )
    )
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="layer", autorange="reversed")
    return _styled(figure, "Expert load, last 20 steps (1 = even)")


def data_mix(history: History) -> go.Figure:
    """Draw the domain shares of each stage and the target share of STEM, code, books and reasoning."""
    stages = history.mixes()
    domains = sorted({d for mix in stages.values() for d in mix["domains"]}, key=lambda d: (d == "general", d))
    figure = go.Figure()
    for index, domain in enumerate(domains):
        figure.add_bar(
            x=list(stages),
            y=[100 * mix["domains"].get(domain, {"reached": 0.0})["reached"] for mix in stages.values()],
            name=domain,
            marker_color=COLOURS[index % len(COLOURS)] if domain != "general" else "#9aa0a6",
            hovertemplate="%{y:.1f} %<extra>" + domain + "</extra>",
        )
    if stages:
        target = 100 * next(iter(stages.values()))["core"]["wanted"]
        figure.add_hline(
            y=target,
            line={"dash": "dash", "color": "#e45756"},
            annotation_text=f"target {target:.0f} % STEM, code, book, reasoning",
            annotation_bgcolor="#ffffff",
            annotation_font_color="#e45756",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="% of tokens", range=[0, 105])
    return _styled(figure, "What each stage reads")


def length_mix(history: History) -> go.Figure:
    """Draw the token shares of short, medium and long documents in each stage."""
    stages = history.mixes()
    figure = go.Figure()
    for index, name in enumerate(("short", "medium", "long")):
        figure.add_bar(
            x=list(stages),
            y=[100 * mix["length_classes"].get(name, {"reached": 0.0})["reached"] for mix in stages.values()],
            name=name,
            marker_color=("#9ecae9", "#4c78a8", "#1f3b5c")[index],
            hovertemplate="%{y:.1f} %<extra>" + name + "</extra>",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="% of tokens", range=[0, 105])
    return _styled(figure, "Length of the documents")


def needle_maps(history: History) -> go.Figure:
    """Draw the needle recall of each stage by depth and length."""
    maps = {stage: r["needles"] for stage, r in history.evaluated.items() if r["needles"]}
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, horizontal_spacing=0.08, vertical_spacing=0.36 / rows,
        subplot_titles=[f"{stage}: mean {100 * _mean(m['recall']):.0f} %" for stage, m in maps.items()],
    )  # fmt: skip
    for index, needles in enumerate(maps.values()):
        recall = [[100 * row[depth] for row in needles["recall"]] for depth in range(len(needles["depths"]))]
        facts = [
            [
                f"loss {loss[depth]:.3f}, {control:.3f} with nothing hidden"
                for loss, control in zip(needles["loss"], needles["control_loss"], strict=True)
            ]
            for depth in range(len(needles["depths"]))
        ]
        figure.add_trace(
            go.Heatmap(
                x=[f"{length:,}" for length in needles["lengths"]],
                y=[f"{depth:.0%}" for depth in needles["depths"]],
                z=recall,
                coloraxis="coloraxis",
                texttemplate="%{z:.0f}",
                customdata=facts,
                hovertemplate="%{x} tokens, hidden at %{y}: %{z:.1f} %<br>%{customdata}<extra></extra>",
            ),
            row=index // columns + 1,
            col=index % columns + 1,
        )
    figure.update_layout(coloraxis={"colorscale": "RdYlGn", "cmin": 0, "cmax": 100, "colorbar": {"title": "recall %"}})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_yaxes(title="hidden at", col=1)
    figure.update_xaxes(title="tokens", type="category")
    return _styled(figure, "Needles found, by length and depth", height=300 * rows + 80)


def position_losses(history: History) -> go.Figure:
    """Draw the loss of held-out documents by position; the dotted line is the loss without the far context."""
    figure = go.Figure()
    for index, (stage, record) in enumerate(history.evaluated.items()):
        if positions := record["positions"]:
            colour = COLOURS[index % len(COLOURS)]
            near = f"{stage}, seeing at most {positions['near_tokens']:,}"
            for name, key, dash in ((stage, "loss", "solid"), (near, "near_loss", "dot")):
                figure.add_scatter(
                    x=positions["first"], y=positions[key], name=name, mode="lines+markers",
                    line={"color": colour, "width": 2, "dash": dash}, showlegend=key == "loss",
                    customdata=positions["documents"],
                    hovertemplate="from %{x} tokens on: %{y:.4f} (%{customdata} documents)<extra>" + name + "</extra>",
                )  # fmt: skip
    figure.update_xaxes(title="tokens before, from", type="log")
    figure.update_yaxes(title="loss")
    return _styled(figure, "Loss by position; dotted: the same tokens without the far context")


def _mean(grid: list[list[float]]) -> float:
    return sum(sum(row) for row in grid) / sum(len(row) for row in grid)


def _styled(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "x": 0.0, "xanchor": "left", "font": {"size": 16}},
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7a7f87"},
        legend={"orientation": "h", "y": 1.08, "x": 1.0, "xanchor": "right"},
        hovermode="closest",
    ).update_xaxes(gridcolor="rgba(127,127,127,0.2)", zeroline=False).update_yaxes(
        gridcolor="rgba(127,127,127,0.2)", zeroline=False
    )  # fmt: skip


def _smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Return the exponential moving average; a value that is not finite is a gap and does not count."""
    smooth, scale, out = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            out.append(math.nan)
            continue
        smooth, scale = weight * smooth + (1 - weight) * value, weight * scale + 1 - weight
        out.append(smooth / scale)
    return out


def _log10(norm: list[float]) -> float:
    """Return the logarithm of the one norm in the list, NaN where there is none."""
    return math.log10(max(norm[0], 1e-12)) if norm else math.nan


def _shape(load: list[list[float]]) -> list[int]:
    return [len(row) for row in load]


def _stage_title(stage: dict[str, Any]) -> str:
    return f"{stage['stage']} ({stage['seq_len']:,} tokens)"


def _layers(steps: list[Record]) -> int:
    return max((len(s["layer_grad_norms"]) for s in steps), default=0)


def _rows(stages: list[Record]) -> int:
    return len(stages[0]["slopes_new"]) if stages else 0
