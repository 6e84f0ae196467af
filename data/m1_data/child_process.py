"""Python programs of ours that run as processes beside this one, and the frames of bytes that they exchange with it.

They end with their input, so none is left when this process is killed.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress
from typing import IO, BinaryIO, cast

from m1_data.errors import EnvironmentProblem

FRAME = struct.Struct("<cI")
"""The head of a frame: its kind, and the number of bytes that follow."""

Child = subprocess.Popen[bytes]


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes]:
    """Read a frame and return its kind and contents.

    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        raise EOFError
    kind, size = FRAME.unpack(head)
    contents = stream.read(size)
    if len(contents) < size:
        raise EOFError
    return kind, contents


def write_frame(stream: BinaryIO, kind: bytes, contents: bytes) -> None:
    """Write a frame without flushing the stream."""
    stream.write(FRAME.pack(kind, len(contents)))
    stream.write(contents)


def start_child(module: str, purpose: str) -> Child:
    """Start ``python -m module`` and return it when its first frame, which is empty, has come.

    Args:
        purpose: what it is there for, in the words of an error: ``renders chat templates``.

    Raises:
        EnvironmentProblem: it does not start.
    """
    # The path is ours as it is, without the current folder; of the environment only what an interpreter may need to start.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environment |= {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
    }
    child = subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
    )
    try:
        receive(child)
    except EOFError:
        words = last_words(child)
        end_child(child)
        raise EnvironmentProblem(
            f"the process that {purpose} does not start: {words or 'no reason given'}", where=sys.executable
        ) from None
    return child


def send(child: Child, kind: bytes, contents: bytes) -> None:
    """Send a frame. A process that has ended is found out when its answer is read."""
    pipe = _pipe(child.stdin)
    with suppress(BrokenPipeError):
        write_frame(pipe, kind, contents)
        pipe.flush()


def receive(child: Child) -> tuple[bytes, bytes]:
    """Wait for a frame and return its kind and contents.

    Raises:
        EOFError: the process has ended.
    """
    return read_frame(_pipe(child.stdout))


def last_words(child: Child) -> str:
    """Return the last line that a process which has ended wrote on its standard error; empty without one."""
    return (_pipe(child.stderr).read().decode(errors="replace").strip().splitlines() or [""])[-1]


def end_child(child: Child) -> None:
    """Kill a process and wait for it."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        with suppress(BrokenPipeError):
            _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> BinaryIO:
    return cast(BinaryIO, pipe)
