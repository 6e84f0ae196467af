"""Defines the consoles of the process. Only rank 0 prints; Rich respects NO_COLOR and non-terminals.

What is printed may hold names, values and text of other people's files. Their control characters are shown as escapes, so that
none reaches the terminal as a command. A terminal that is gone or a disk that is full never ends a command that still works.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

is_rank_0 = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and line feed, those that change the direction of writing, and what is not text."""


def visible(text: str) -> str:
    r"""Return ``text`` with its control characters as escapes: ``\x1b`` for ESC, ``\xff`` for a byte that is not UTF-8."""
    return _INVISIBLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps the bytes of a name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Stream:
    """A standard stream whose failure is remembered instead of raised; what comes after it is dropped.

    Args:
        name: of the stream in ``sys``: tests and libraries replace it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``; characters that the encoding does not have are written as escapes."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.failure is None and self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def _stream(self) -> IO[str]:
        stream: IO[str] = getattr(sys, self._name)
        return stream

    def _try(self, action: Any) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except OSError as error:
            self.failure = error
            self._discard_what_follows()
        except ValueError as error:  # it is closed
            self.failure = OSError(errno.EBADF, str(error))

    def _discard_what_follows(self) -> None:
        """Point the descriptor at nothing: Python writes its buffer once more when it ends, and libraries print, too."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass  # no descriptor: a test's or a library's own stream


class _SafeConsole(Console):
    """Shows text as it is: no control characters, and no names turned into pictures."""

    def __init__(self, stream: Stream, **how: Any) -> None:
        super().__init__(file=stream, highlight=False, emoji=False, **how)  # type: ignore[arg-type]
        self.stream = stream

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


console = _SafeConsole(Stream("stdout"), quiet=not is_rank_0)
errors = _SafeConsole(Stream("stderr"), soft_wrap=True)


def open_closed_streams() -> None:
    """Open the standard streams that the caller closed onto nothing, so that no file of ours gets their descriptors."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - lives as long as the process
