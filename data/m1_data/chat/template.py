"""Chat templates, which are untrusted programs: a process of their own renders them, with little memory and time."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import finalize

import orjson

from m1_data.chat.render_worker import CLOCK, MAX_MIB, MAX_SECONDS, TEXT
from m1_data.child_process import Child, end_child, receive, send, start_child
from m1_data.errors import DataError

BATCH_JOBS = 64
BATCH_CHARS = 4_000_000
"""Jobs and characters of JSON that are sent at once; a larger job goes alone."""

Rendering = dict[str, Any]
"""``messages``, and where needed ``tools`` and ``add_generation_prompt``, for the template."""


class Job(NamedTuple):
    """Renderings that together may take ``render_worker.MAX_SECONDS``, and what they are of, for messages."""

    renderings: Sequence[Rendering]
    where: str = ""


class ChatTemplate:
    """A chat template. Its process starts when it is first needed and ends with ``close``, or with this object.

    Args:
        source: Jinja source, as transformers' ``apply_chat_template`` takes it.
        variables: ``bos_token`` and the like.
        where: where the source came from, for messages.
        date: ISO date that the template's ``strftime_now`` formats; empty refuses templates that call it.

    Raises:
        DataError: the source is not Jinja.
        EnvironmentProblem: the process does not start.
    """

    def __init__(self, source: str, variables: dict[str, Any], where: str, *, date: str = "") -> None:
        self.source, self.where = source, where
        self._start = orjson.dumps({"source": source, "variables": variables, "date": date})
        self._process: Child | None = None
        self._finalize: Any = None
        self._worker()

    def render(self, messages: Sequence[dict[str, Any]], **more: Any) -> str:
        """Render one conversation and return its text; ``more`` as in ``Rendering``.

        Raises:
            DataError: the template refuses the conversation, or exceeds its limits.
        """
        (text,) = next(self.render_all([Job([{"messages": list(messages), **more}])]))
        return text

    def render_all(self, jobs: Iterable[Job]) -> Iterator[list[str]]:
        """Yield the texts of each job, one per rendering. The process works on a batch while the one before it is used.

        Raises:
            DataError: the template refuses a job, or exceeds its limits; the error names the job.
        """
        for answer in self.try_all(jobs):
            if isinstance(answer, DataError):
                raise answer
            yield answer

    def try_all(self, jobs: Iterable[Job]) -> Iterator[list[str] | DataError]:
        """Yield what ``render_all`` yields, and in place of a job that it would refuse the error."""
        asked: list[Job] = []
        try:
            for batch in chain(_batches(jobs), [([], b"")]):
                while True:
                    answers = self._answers(asked)
                    rest = asked[len(answers) :]
                    asked = self._ask(next(_batches(rest)) if rest else batch)
                    yield from answers
                    if not rest:
                        break
        finally:
            if asked:  # nobody reads those answers any more
                self.close()

    def close(self) -> None:
        """End the process; a later rendering starts it again."""
        if self._finalize is not None:
            self._finalize()
        self._process = self._finalize = None

    def _worker(self) -> Child:
        if self._process is None:
            self._process = start_child("m1_data.chat.render_worker", "renders chat templates")
            self._finalize = finalize(self, end_child, self._process)
            send(self._process, TEXT, self._start)
            if isinstance(answer := self._answer(Job([{}])), DataError):
                self.close()
                raise answer
        return self._process

    def _ask(self, batch: tuple[list[Job], bytes]) -> list[Job]:
        jobs, request = batch
        if jobs:
            send(self._worker(), TEXT, request)
        return jobs

    def _answers(self, jobs: Sequence[Job]) -> list[list[str] | DataError]:
        """Read the answers to jobs, up to one that ended the process: those behind it have to be asked again."""
        answers: list[list[str] | DataError] = []
        for job in jobs:
            answers.append(self._answer(job))
            if self._process is None:
                break
        return answers

    def _answer(self, job: Job) -> list[str] | DataError:
        """Read the answer to a job; without one the process has ended."""
        assert self._process is not None
        texts: list[str] = []
        try:
            for _ in job.renderings:
                kind, contents = receive(self._process)
                if kind != TEXT:
                    return self._failed(contents.decode(), job, needs_date=kind == CLOCK)
                texts.append(contents.decode())
        except EOFError:
            reason = _why_ended(self._process)
            self.close()
            return self._failed(reason, job)
        return texts

    def _failed(self, reason: str, job: Job, *, needs_date: bool = False) -> DataError:
        return DataError(
            f"the chat template fails: {reason}",
            where=f"{job.where}, template {self.where}" if job.where else self.where,
            fix='set sft.date to the day that the template shall write, for example sft.date = "2026-01-31"'
            if needs_date
            else "set sft.chat_template to another",
        )


def _batches(jobs: Iterable[Job]) -> Iterator[tuple[list[Job], bytes]]:
    """Yield lists of jobs, each with the JSON that asks for it."""
    batch: list[Job] = []
    parts: list[bytes] = []
    for job in jobs:
        part = orjson.dumps(job.renderings)
        if batch and (len(batch) == BATCH_JOBS or sum(map(len, parts)) + len(part) > BATCH_CHARS):
            yield batch, b"[" + b",".join(parts) + b"]"
            batch, parts = [], []
        batch.append(job)
        parts.append(part)
    if batch:
        yield batch, b"[" + b",".join(parts) + b"]"


def _why_ended(process: Child) -> str:
    code = process.wait()
    if code == -signal.SIGPROF:
        return f"it takes more than {MAX_SECONDS} s"
    return f"it needs more than {MAX_MIB} MiB of memory, or breaks the interpreter (exit code {code})"
