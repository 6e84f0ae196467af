"""Shows errors and stop requests to a person: three lines (what, where, how to fix it) and a documented exit code."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.markup import escape

from m1_stages.errors import EXIT_PREEMPTED, EnvironmentProblem, M1Error, Preempted
from m1_stages.runtime.signals import STOP_SIGNALS, StopRequest
from m1cli.console import console, errors

EXIT_CODES = """\
Exit codes: 0 done, 1 internal error, 2 configuration or command line, 3 environment, 4 data, 5 checkpoint,
6 numbers out of range, 7 a rank was killed or stopped answering (run the same command again), 8 in use by another command,
75 stopped on request after saving (requeue, or run the same command again), 130 interrupted.
"""

_RANK_0_FIRST_S = 8.0

_OS_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again; nothing finished is lost",
    errno.EDQUOT: "raise the quota or free some space, then run the same command again",
    errno.EROFS: "the file system is read-only: choose another run.dir or data.out",
    errno.EACCES: "change the permissions, or choose another run.dir or data.out",
    errno.EPERM: "change the permissions, or choose another run.dir or data.out",
}


class _Stopped(KeyboardInterrupt):
    """A stop was requested; libraries clean up and do not catch it, as for the interrupt of the keyboard."""


def _stop(name: str) -> None:
    raise _Stopped(name)


@contextmanager
def reported(debug: bool, *, prints_result: bool = False) -> Iterator[None]:
    """Turn exceptions and stop requests into a message and an exit code; commands that train save first, by their own means.

    Args:
        debug: raise the exception itself, with its traceback.
        prints_result: the command is for what it prints, so it has failed when that could not be written.
    """
    signals = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    with StopRequest(signals, on_first=_stop), _shown(debug):
        yield
    failure = console.stream.failure
    if failure is not None and failure.errno != errno.EPIPE:  # who closes a pipe has seen enough
        reason = failure.strerror or str(failure)
        show(
            EnvironmentProblem(
                f"standard output cannot be written: {reason}", fix="send it elsewhere, or free some space"
            )
        )
        if prints_result:
            raise typer.Exit(EnvironmentProblem.exit_code)


@contextmanager
def _shown(debug: bool) -> Iterator[None]:
    try:
        yield
    except M1Error as error:
        if debug and error.exit_code != EXIT_PREEMPTED:
            raise
        if _should_report(error):
            show(error)
        raise typer.Exit(error.exit_code) from None
    except _Stopped as stop:
        show(
            Preempted(
                f"stopped on {stop}; nothing unfinished was published", fix="run the same command again to continue"
            )
        )
        raise typer.Exit(EXIT_PREEMPTED) from None
    except KeyboardInterrupt:
        errors.print("[yellow]interrupted[/]; unfinished output was not published")
        raise typer.Exit(130) from None
    except OSError as error:
        if debug or error.errno is None:
            raise
        advice = _OS_ADVICE.get(error.errno, "check the path; --debug shows where it happened")
        show(EnvironmentProblem(os.strerror(error.errno), where=str(error.filename or ""), fix=advice))
        raise typer.Exit(EnvironmentProblem.exit_code) from None


def _should_report(error: M1Error) -> bool:
    """Return whether this rank reports ``error``.

    Most errors stop all ranks with the same message. Rank 0 reports at once; the launcher ends the other ranks while these wait.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        return True
    if error.exit_code == EXIT_PREEMPTED:
        return False
    time.sleep(_RANK_0_FIRST_S)
    return True


def show(error: M1Error) -> None:
    """Print an error in up to three lines."""
    colour, word = ("yellow", "stopped") if error.exit_code == EXIT_PREEMPTED else ("bold red", "error")
    if rank := int(os.environ.get("RANK", "0")):
        word += f" on rank {rank}"
    errors.print(f"[{colour}]{word}:[/] {escape(error.what)}")
    if error.where:
        errors.print(f"  [dim]where:[/] {escape(error.where)}")
    if error.fix:
        errors.print(f"  [dim]to do:[/] {escape(error.fix)}")
