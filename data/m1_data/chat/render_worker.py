"""The process that renders chat templates for ``template``: ``python -m m1_data.chat.render_worker``.

It writes an empty frame when it is ready, then reads frames from its standard input and answers on its standard output. The
first frame is a template; every other one is a list of jobs, and a job a list of renderings, all in JSON. A job is answered by
one ``TEXT`` frame per rendering, or by a single frame that says why there is none. The kernel ends the process when a job takes
too long, so nobody has to watch it; it also ends with its input.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import orjson
from jinja2 import TemplateError

from m1_data.chat.sandbox import AsksForTime, SandboxedTemplate
from m1_data.child_process import read_frame, write_frame

MAX_SECONDS = 1.5
"""Seconds of processor time that a job may take: on a busy machine the clock runs on while the process waits for its turn."""

MAX_MIB = 400
"""MiB of address space that the renderings may take beside the interpreter."""

TEXT, ERROR, CLOCK = b"t", b"e", b"c"
"""Kinds of answers: a text, a reason in words, and a reason that a date would mend."""

_MAX_REASON_CHARS = 300


def main() -> None:
    """Serve until the input ends."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the process that asks
        signal.signal(stop, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _limit_memory()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        write_frame(answers, TEXT, b"")
        answers.flush()
        serve(requests, answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is left to flush to


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests.

    Raises:
        EOFError: there are no more.
    """
    template: SandboxedTemplate | None = None

    def compile_template() -> list[str]:
        nonlocal template
        template = SandboxedTemplate(**orjson.loads(start))
        return [""]

    def render(job: list[dict[str, Any]]) -> list[str]:
        assert template is not None
        return [template.render(**rendering) for rendering in job]

    _, start = read_frame(requests)
    _answer(answers, compile_template)
    while True:
        _, batch = read_frame(requests)
        for job in orjson.loads(batch):
            _answer(answers, partial(render, job))


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        base = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = base + (MAX_MIB << 20)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _answer(answers: BinaryIO, work: Callable[[], list[str]]) -> None:
    kind, contents = ERROR, []
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        contents = [text.encode() for text in work()]
        kind = TEXT
    except MemoryError:
        contents = [b"it needs more than %d MiB of memory" % MAX_MIB]
    except Exception as error:  # of every kind: whatever code in the template raises, it is told to the parent
        kind = CLOCK if isinstance(error, AsksForTime) else ERROR
        contents = [_reason(error).encode()]
    signal.setitimer(signal.ITIMER_PROF, 0)
    for part in contents:
        write_frame(answers, kind, part)
    answers.flush()  # so that the job that ends the process is the first without an answer


def _reason(error: Exception) -> str:
    """The error in words: printable, and short also when the template writes it."""
    words = str(error)[:_MAX_REASON_CHARS]
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return words if isinstance(error, TemplateError) else f"{type(error).__name__}: {words}"


if __name__ == "__main__":
    main()
