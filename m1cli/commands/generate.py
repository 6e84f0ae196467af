"""Implements ``m1 generate``: reads prompts, starts the processes, streams one answer or lists many, writes JSON Lines."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

import orjson
import typer
from rich.markup import escape

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import refuse_unknown_stage
from m1_stages.errors import ConfigError, DataError, Preempted
from m1_stages.generation.prompts import Prompt, numbered, read_prompts
from m1cli.console import console, is_rank_0
from m1cli.launch import adopt_slurm, die_with_launcher, is_worker, num_processes, run_ranks
from m1cli.library_notes import hide_library_notes

if TYPE_CHECKING:
    from m1_stages.generation import Update
    from m1_stages.jobs.generate import Answer, GenerateOptions, Task

_SHOWN = 60
"""Characters of a prompt in the heading of its answer."""


def collect_prompts(texts: list[str], file: Path | None) -> list[Prompt]:
    """Return the prompts of the command line, of a file, or of standard input.

    Raises:
        ConfigError: none, or both.
        DataError: what ``read_prompts`` raises.
    """
    if texts and file is not None:
        raise ConfigError("there are prompts on the command line and --prompts", fix="give one of them")
    if file is not None:
        return read_prompts(file)
    if texts and texts != ["-"]:
        return list(numbered(texts))
    if sys.stdin.isatty() and not texts:
        raise ConfigError(
            "there is no prompt", fix='m1 generate "Once upon a time", --prompts FILE, or text on standard input'
        )
    text = sys.stdin.buffer.read()
    try:
        return [Prompt(where="standard input", text=text.decode().removesuffix("\n"))]
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where="standard input") from error


def generate_command(
    path: Path,
    overrides: list[str],
    options: GenerateOptions,
    texts: list[str],
    file: Path | None,
    *,
    gpus: int | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Answer prompts with a checkpoint of the run.

    Args:
        texts: prompts of the command line; empty or ``-``: standard input.
        file: a file of prompts in place of them.
        gpus: number of processes; None: ``parallel.processes``, or all GPUs.
        out: JSON Lines file for the answers; None prints them.
        overwrite: replace ``out``.

    Raises:
        ConfigError: options that cannot be used.
        Preempted: a stop was requested; the answers that were finished are kept.
        M1Error: what ``plan`` and ``run`` raise.
    """
    resolved = load_config(path, [*overrides, *([] if gpus is None else [f"parallel.processes={gpus}"])])
    refuse_unknown_stage(resolved.config.sft, options.stage)
    if out is not None and is_rank_0:  # the launcher, and of ranks that another one started, the one that will write
        _refuse_out(out, file, overwrite=overwrite)
    starts_ranks = not is_worker() and num_processes(resolved) > 1
    if (starts_ranks or is_worker()) and file is None and (not texts or texts == ["-"]):
        raise ConfigError("several processes cannot share standard input", fix="put the prompts into a file: --prompts")
    prompts = collect_prompts(texts, file)
    if is_worker():
        adopt_slurm()
        die_with_launcher()
    elif starts_ranks:
        raise typer.Exit(run_ranks(sys.argv[1:], num_processes(resolved), resolved.run_dir))
    _generate(resolved, options, prompts, out)


def _refuse_out(out: Path, prompts: Path | None, *, overwrite: bool) -> None:
    if out.is_dir():
        raise ConfigError("this is a folder", where=str(out), fix="give --out the name of a file in it")
    if prompts is not None and prompts.exists() and out.exists() and out.samefile(prompts):
        raise ConfigError("--out would replace the prompts", where=str(out), fix="choose another --out")
    if out.exists() and not overwrite:
        raise ConfigError("the file exists already", where=str(out), fix="choose another --out, or --overwrite")


def _generate(resolved: Resolved, options: GenerateOptions, prompts: list[Prompt], out: Path | None) -> None:
    from m1_stages.jobs.generate import plan, run

    hide_library_notes()
    task, encoder = plan(resolved, prompts, options)
    with ExitStack() as closing:
        closing.callback(encoder.close)
        show = _Answers(task, prompts, options, out, closing)
        stopped = run(
            resolved, task, encoder, options, on_update=show.update, on_answer=show.answer, is_wanted=show.is_wanted
        )
    if stopped in ("", signal.SIGINT.name):
        show.summary(interrupted=bool(stopped))
        if stopped:
            raise typer.Exit(130)
    else:
        raise Preempted(
            f"stopped on {stopped}; {show.finished} of {show.total} answers were finished"
            + (f" and are in {out}" if out else ""),
            fix="run the same command again for all answers" + (" (--overwrite)" if out else ""),
        )


class _Answers:
    """Shows answers on the terminal, or writes them as lines to a file."""

    def __init__(
        self, task: Task, prompts: list[Prompt], options: GenerateOptions, out: Path | None, closing: ExitStack
    ) -> None:
        self._task, self._prompts, self._options, self._out = task, prompts, options, out
        self.total = sum(request.samples for request in task.requests)
        self.finished = self._tokens = 0
        self._streams = out is None and self.total == 1
        self._begun = time.perf_counter()
        self._file: IO[bytes] | None = None
        meta = task.committed.meta
        how = "chat" if task.chat else "raw text"
        if out is not None or console.is_terminal:
            console.print(
                f"[dim]{escape(task.committed.path.name)} (stage {meta.stage}), {how}, {self.total} "
                f"answer{'s' if self.total > 1 else ''} of up to {options.max_tokens:,} tokens, context {task.context:,}[/]"
            )
        if out is not None and is_rank_0:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = closing.enter_context(out.open("wb"))

    def update(self, prompt: int, update: Update) -> None:
        """Print new text of the only answer."""
        if self._streams and update.text:
            console.print(update.text, end="", soft_wrap=True, markup=False)

    def answer(self, answer: Answer) -> None:
        """Show or write a finished answer."""
        from m1_stages.jobs.generate import as_line

        self.finished += 1
        self._tokens += len(answer.completion.tokens)
        prompt = self._prompts[answer.prompt]
        if self._file is not None:
            line = as_line(answer, prompt, self._task, self._options)
            self._file.write(orjson.dumps(line) + b"\n")
            self._file.flush()
        elif self._out is None and self._streams:
            console.print()
        elif self._out is None:
            text = prompt.conversation.messages[-1].content if prompt.conversation else prompt.text
            short = " ".join(text.split())
            short = short if len(short) <= _SHOWN else f"{short[: _SHOWN - 1]}…"
            sample = f", sample {answer.sample + 1}" if self._options.samples > 1 else ""
            console.print(f"[bold]{answer.prompt + 1}{sample}[/] ", end="")
            console.print(short, style="dim", soft_wrap=True, markup=False)
            console.print(answer.completion.text, soft_wrap=True, markup=False)

    def is_wanted(self) -> bool:
        """Whether somebody takes the answers: not when standard output is a pipe that its reader closed, or a full disk."""
        return self._out is not None or console.stream.failure is None

    def summary(self, *, interrupted: bool) -> None:
        """Say what was done, on a terminal or beside a file."""
        seconds = time.perf_counter() - self._begun
        if interrupted and self._streams:
            console.print()
        if self._out is None and not console.is_terminal and not interrupted:
            return
        where = f" in {escape(str(self._out))}" if self._out is not None else ""
        console.print(
            f"[{'yellow' if interrupted else 'dim'}]{'interrupted: ' if interrupted else ''}{self.finished} of {self.total} "
            f"answers{where}, {self._tokens:,} tokens, {self._tokens / max(seconds, 1e-9):,.0f} tokens/s with loading[/]",
            soft_wrap=True,
        )
