"""Rows encoded by several processes, in the order of the rows.

The process that asks reads the rows and hands them out in turn; the others encode what they get, each with a renderer of its own.
They run ``python -m m1_data.sft.encoding_processes``: an empty frame says that it is ready; it reads the settings, then lists of
rows, and answers each with its pieces and what became of the rows, or with the error that stopped it. Frames are pickles.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

from m1_data.chat.rows import Row
from m1_data.child_process import Child, end_child, last_words, read_frame, receive, send, start_child, write_frame
from m1_data.errors import DataError, EnvironmentProblem, M1Error
from m1_data.sft.encoding import Piece, RowEncoder
from m1_data.sft.samples import SampleSettings, SampleTally

FIRST_ROWS = 4096
"""Rows that this process encodes itself before it starts others: a second of work, and they take as long to start."""
BATCH_ROWS = 512
BATCH_BYTES = 4 << 20
"""Rows, and bytes of their pickles, that a process gets at once; a larger row goes alone."""
MOST_PROCESSES = 16
"""Reading the rows takes a process about as long as it takes so many to encode them; each needs some 300 MB."""

_ROWS, _PIECES, _ERROR = b"r", b"p", b"e"


def processes_of_machine() -> int:
    """Return the number of processes that encode when none is asked for: one per core that may be used."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def encode_in_order(
    settings: SampleSettings, encoder: RowEncoder, tally: SampleTally, *, processes: int
) -> Iterator[Piece]:
    """Yield the samples of all rows of the settings.

    Args:
        encoder: encodes the first rows, and all when one process is enough.
        tally: is counted up.
        processes: how many encode.

    Raises:
        DataError: see ``samples_in``; that of the first such row, whatever the number of processes.
        EnvironmentProblem: a process does not start, or is killed.
    """
    rows = settings.rows()
    yield from encoder.encode(islice(rows, FIRST_ROWS) if processes > 1 else rows, tally)
    if processes == 1:
        return
    waiting: deque[Child] = deque()
    with ExitStack() as stack:
        unreadable: DataError | None = None
        for batch in _batches(rows):
            if isinstance(batch, DataError):
                unreadable = batch
                break
            if len(waiting) == processes:
                child = waiting.popleft()
                pieces, counted = _answer(child)
            else:
                child = start_child("m1_data.sft.encoding_processes", "encodes conversations")
                stack.callback(end_child, child)
                send(child, _ROWS, pickle.dumps(settings))
                pieces, counted = [], settings.tally()
            send(child, _ROWS, batch)  # it is at work again while its pieces are written
            waiting.append(child)
            tally.add(counted)
            yield from pieces
        while waiting:
            pieces, counted = _answer(waiting.popleft())
            tally.add(counted)
            yield from pieces
        if unreadable:
            raise unreadable


def _batches(rows: Iterable[Row]) -> Iterator[bytes | DataError]:
    """Yield lists of pickled rows, pickled; last the error of a row that cannot be read: one before it may be bad."""
    batch: list[bytes] = []
    size = 0
    unreadable: DataError | None = None
    try:
        for row in rows:
            one = pickle.dumps(row)
            if batch and (len(batch) == BATCH_ROWS or size + len(one) > BATCH_BYTES):
                yield pickle.dumps(batch)
                batch, size = [], 0
            batch.append(one)
            size += len(one)
    except DataError as error:
        unreadable = error
    if batch:
        yield pickle.dumps(batch)
    if unreadable:
        yield unreadable


def _answer(child: Child) -> tuple[list[Piece], SampleTally]:
    try:
        kind, contents = receive(child)
    except EOFError:
        code, words = child.wait(), last_words(child)
        raise EnvironmentProblem(
            f"a process that encodes conversations ended: {words or f'exit code {code}'}",
            fix="if memory is short, set sft.processes to a smaller number",
        ) from None
    answer: Any = pickle.loads(contents)
    if kind == _ERROR:
        raise answer
    found: tuple[list[Piece], SampleTally] = answer
    return found


def main() -> None:
    """Serve until the input ends."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the process that asks
        signal.signal(stop, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        write_frame(answers, _PIECES, b"")
        answers.flush()
        settings: SampleSettings = pickle.loads(read_frame(requests)[1])
        encoder = RowEncoder(settings)
        while True:
            rows = map(pickle.loads, pickle.loads(read_frame(requests)[1]))
            tally = settings.tally()
            try:
                kind, answer = _PIECES, pickle.dumps((list(encoder.encode(rows, tally)), tally))
            except M1Error as error:
                kind, answer = _ERROR, pickle.dumps(error)
            write_frame(answers, kind, answer)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is left to flush to; the renderer ends with its input


if __name__ == "__main__":
    main()
