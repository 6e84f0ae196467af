"""Shows training: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m1_stages.decay import half_life_tokens
from m1_stages.events import (
    CheckpointRejected,
    CheckpointSaved,
    Event,
    EventsDelayed,
    GateForced,
    GuardNoticed,
    HeldOutMeasured,
    RolledBack,
    RunStarted,
    RunStopped,
    SaveFailed,
    SettingsChanged,
    StageEvaluated,
    StageFinished,
    StageStarted,
    StepDone,
    StepRepeated,
    StragglerNoticed,
)
from m1cli.console import console
from m1cli.evaluation import evaluation_view
from m1cli.pace import Left, Pace, wall_time
from m1cli.sft.lines import held_out_lines, sft_data_lines

_BARS = "▁▂▃▄▅▆▇█"


class TrainingDisplay:
    """Shows a run's events. Use it as a context manager so that the live panel is always closed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._stage: StageStarted | None = None
        self._losses: deque[float] = deque(maxlen=400)
        self._pace = Pace(clock)
        self._last_line = 0.0

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, StageStarted):
            self._stage = event
            self._losses.clear()
            self._pace.stage_started(event)
            _stage_started(event)
        elif isinstance(event, RunStarted):
            _run_started(event)
        elif isinstance(event, SettingsChanged):
            _settings_changed(event)
        elif isinstance(event, CheckpointSaved) and not event.stage_final:
            console.print(f"[dim]saved {escape(event.path)} in {event.seconds:.1f} s[/]", soft_wrap=True)
        elif isinstance(event, (GuardNoticed, StepRepeated, RolledBack)):
            _guard(event)
        elif isinstance(event, StragglerNoticed):
            console.print(
                f"[bold yellow]rank {event.rank} keeps the others waiting:[/] {event.seconds:.2f} s of a step, "
                f"{event.median:.2f} s on the others",
                soft_wrap=True,
            )
        elif isinstance(event, StageFinished):
            if event.ramp_progress < 0.999:
                console.print(
                    f"[bold yellow]the decay rates of stage {event.stage} got {event.ramp_progress:.0%} of the way:[/] "
                    "the guard held the ramp; the next stage starts from where they are",
                    soft_wrap=True,
                )
            since = f" since step {event.since_step}" if event.since_step else ""
            console.print(
                f"[green]stage {event.stage} done[/] in {event.seconds:.0f} s{since}: loss {event.first_loss:.3f} → "
                f"{event.last_loss:.3f}; checkpoint {escape(event.checkpoint)}",
                soft_wrap=True,
            )
        elif isinstance(event, StageEvaluated):
            console.print(evaluation_view(event))
        elif isinstance(event, HeldOutMeasured):
            for line in held_out_lines(dataclasses.asdict(event)):
                console.print(escape(line), soft_wrap=True)
        elif isinstance(event, GateForced):
            known = "is not known" if event.recall is None else f"is {event.recall:.1%}"
            console.print(
                f"[bold yellow]stage {event.stage} is forced:[/] the recall of stage {event.before} {known}, "
                f"evaluate.gate asks for {event.gate:.1%}; this is recorded in its checkpoints",
                soft_wrap=True,
            )
        elif isinstance(event, CheckpointRejected):
            console.print(f"[bold red]checkpoint {escape(event.path)} is not usable:[/] {escape(event.reason)}")
            console.print(f"  quarantined as {escape(event.quarantined_as)}; trying the one before it")
        elif isinstance(event, SaveFailed):
            console.print(
                f"[bold red]checkpoint not written:[/] {escape(event.reason)}; the previous one stands", soft_wrap=True
            )
        elif isinstance(event, EventsDelayed):
            console.print(
                f"[bold red]events cannot be written now:[/] {escape(event.reason)} ({escape(event.path)}); the run goes on, "
                "and they are written when there is room again",
                soft_wrap=True,
            )
        elif isinstance(event, RunStopped):
            if event.wall_s:
                console.print(f"[dim]wall time {wall_time(event.wall_s)}[/]", highlight=False)
            if event.exit_code == 0:
                console.print("[green]done[/]")

    def _step(self, step: StepDone) -> None:
        self._losses.append(step.loss)
        self._pace.step_done()
        if self._live:
            self._live.update(self._panel(step))
            return
        assert self._stage is not None
        last = step.step == self._stage.num_steps - 1
        if step.step == 0 or last or self._clock() - self._last_line > 5.0:
            self._last_line = self._clock()
            console.print(
                f"{step.stage} step {step.step + 1}/{self._stage.num_steps} loss {step.loss:.4f} "
                f"grad {step.grad_norm:.3f} lr {step.lr:.2e} "
                f"tok/s {self._pace.tokens_per_s():,.0f} ({step.tokens_per_s:,.0f} in the step) "
                f"context {self._stage.seq_len:,} ramp {step.ramp_progress:.0%} peak mem {step.peak_gib:.1f} GiB "
                f"eta {_eta(self._pace.left(step))}",
                soft_wrap=True,
            )

    def _panel(self, step: StepDone) -> Panel:
        assert self._stage is not None
        grid = Table.grid(padding=(0, 3))
        for row in (
            (f"loss [bold]{step.loss:.4f}[/]", f"grad norm {step.grad_norm:.3f}", f"lr {step.lr:.2e}"),
            (
                f"{self._pace.tokens_per_s():,.0f} tokens/s",
                f"{step.step_s:.2f} s in the step: {step.tokens_per_s:,.0f} tokens/s",
                f"peak {step.peak_gib:.1f} GiB",
            ),
            (
                f"context {self._stage.seq_len:,}",
                f"decay ramp {step.ramp_progress:.0%}",
                f"eta {_eta(self._pace.left(step))}",
            ),
        ):
            grid.add_row(*row)
        return Panel(
            Group(
                grid,
                Text(_sparkline(list(self._losses), max(20, min(100, console.width - 6))), style="cyan"),
                ProgressBar(total=self._stage.num_steps, completed=step.step + 1),
            ),
            title=f"{step.stage}  step {step.step + 1:,} of {self._stage.num_steps:,}",
            title_align="left",
        )


def _eta(left: Left | None) -> str:
    """``~1:02:03 (stage ~0:12) + 5 stage ends``: of the command, of the stage if others follow, and what is not counted."""
    if left is None:
        return "not known yet"
    stage, command = _clock(left.stage_s), _clock(left.command_s)
    ends = f" + {left.ends} stage end{'s' * (left.ends > 1)}" if left.ends else ""
    return f"~{command}{ends}" if stage == command else f"~{command} (stage ~{stage}){ends}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _settings_changed(event: SettingsChanged) -> None:
    when = f"from stage {event.stage} step {event.step} on"
    for change in event.changes:
        console.print(
            f"[bold yellow]changed:[/] {escape(change['key'])} {escape(str(change['old']))} -> "
            f"{escape(str(change['new']))}, {when}",
            soft_wrap=True,
        )
    if event.note:
        console.print(f"[dim]{escape(event.note)}[/]", soft_wrap=True)


def _run_started(event: RunStarted) -> None:
    axes = " ".join(f"{name.upper()}{size}" for name, size in event.topology.items() if size > 1 and name != "world")
    console.print(
        f"[bold]{event.preset}[/]: {event.parameters / 1e6:,.1f}M parameters, {event.active_parameters / 1e6:,.1f}M active; "
        f"{event.world_size} x {event.device} {event.precision} {axes}".rstrip()
    )
    for number, line in enumerate(event.data):
        console.print(f"[{'yellow' if number else 'dim'}]{escape(line)}[/]", soft_wrap=True)
    for operator, choice in event.backends.items():
        console.print(f"  [dim]{escape(operator)}: {escape(choice)}[/]", soft_wrap=True)
    if event.saves:
        console.print(f"  [dim]checkpoints are written {escape(event.saves)}[/]", soft_wrap=True)
    if event.resumed_from:
        console.print(f"[dim]newest checkpoint {escape(event.resumed_from)}[/]", soft_wrap=True)


def _stage_started(event: StageStarted) -> None:
    console.print(f"\n[bold cyan]{event.title}[/] starts from {escape(event.starts_from)}", soft_wrap=True)
    rates, old = (
        [half_life_tokens(s) for layer, row in enumerate(slopes) if layer not in event.softmax_layers for s in row]
        for slopes in (event.slopes_new, event.slopes_old)
    )
    lines = [
        f"context {event.seq_len:,} tokens ({event.context_tokens:,} at full scale), RoPE base {event.rope_base / 1e6:g}M",
        f"{event.num_steps:,} steps of {event.global_batch_rows:,} rows = {event.tokens:,} tokens, "
        f"lr {event.lr_peak:g} → {event.lr_final:g}",
        f"decay {event.decay_policy}: half-lives {min(rates):.1f} to {max(rates):,.0f} tokens"
        + (f", from {min(old):.1f} to {max(old):,.0f} over {event.ramp_steps} steps" if event.ramp_steps else ""),
    ]
    lines.append(f"activations {event.activations}")
    if event.later:
        lines.append(
            f"eta counts {', '.join(event.later.stages)} in: {event.later.cost_in_steps:,.0f} steps of this stage by "
            f"{event.later.basis}"
        )
    core = event.mix.get("core")
    if core:
        classes = event.mix.get("length_classes", {})
        shares = "/".join(f"{classes[name]['reached']:.0%}" for name in classes)
        lines.append(
            f"mix: short/medium/long {shares}, STEM+code+book+reasoning {core['reached']:.0%} of {core['wanted']:.0%}"
        )
        lines += [f"[yellow]{escape(reason)}[/]" for reason in event.mix.get("reasons", [])]
    data, lost = sft_data_lines(event.mix)
    lines += [*map(escape, data), *(f"[bold yellow]{escape(line)}[/]" for line in lost)]
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def _guard(event: GuardNoticed | StepRepeated | RolledBack) -> None:
    if isinstance(event, RolledBack):
        console.print(
            f"[bold red]rolled back[/] from step {event.from_step} to {event.to_step} of {event.stage}: "
            f"{escape(event.reason)}; steps excluded: {', '.join(map(str, event.excluded_steps))}",
            soft_wrap=True,
        )
        return
    if isinstance(event, StepRepeated):
        end = "finite this time: a passing fault" if event.verdict == "transient" else "not finite again"
        console.print(
            f"[bold yellow]{event.stage} step {event.step} was not finite; repeated, {end}[/]", soft_wrap=True
        )
        return
    if event.action == "apply" and event.ramp == "hold":
        return  # in metrics.jsonl; too frequent for a terminal
    what = {"skip": "update dropped", "roll_back": "rolling back", "stop": "stopping"}.get(event.action, "applied")
    console.print(
        f"[bold yellow]{event.stage} step {event.step}: {escape(event.reason)}[/] in {event.series}: {event.value:.4g}, "
        f"median {event.median:.4g}; {what}, decay ramp {event.ramp}",
        soft_wrap=True,
    )


def _sparkline(values: list[float], width: int) -> str:
    values = values[-width:]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(_BARS[int((v - low) / span * (len(_BARS) - 1))] if math.isfinite(v) else "!" for v in values)
