"""Files that survive a crash: after one, a file holds either its old content or its new content, never a part of it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

FULL_DISK_S = 60.0
"""Seconds that a run waits for room before a file that it cannot do without counts as not written."""
_RETRY_S = 1.0


def write_when_there_is_room(path: Path, data: bytes | str, *, patience_s: float = FULL_DISK_S) -> None:
    """Write as ``write_atomically``; while the disk is full, try again for ``patience_s`` seconds.

    Raises:
        OSError: the disk stayed full, or is failing.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return write_atomically(path, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace the content of ``path`` with ``data``; a ``str`` is written as UTF-8.

    The data goes to ``<path>.tmp`` in the same folder, is flushed to disk, and takes the name ``path`` in one rename; then
    the folder is flushed, so that the new name survives a power failure as well.

    Raises:
        OSError: the disk is full or failing. The temporary file is removed. ``path`` keeps its old content, unless only
            the flush of the folder failed: then it has the new one.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says what went wrong
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk: then renames inside the folder survive a power failure.

    Raises:
        OSError: there is no such path, or the disk is failing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
