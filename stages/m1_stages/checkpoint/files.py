"""Files that are hashed, flushed and written so that a crash leaves either the old or the new content."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_CHUNK = 8 << 20
_LOOK_S = 0.2


class HashedFile:
    """Append-only binary file that hashes what is written and reports its progress; a context manager.

    Raises:
        OSError: the file system failed, or gives back something else than was written.
    """

    def __init__(self, path: Path, report_progress: Callable[[], None]) -> None:
        self._path, self._report_progress, self._size = path, report_progress, 0
        self._file, self._sha = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 - closed in ``__exit__``

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # after a failure the buffer cannot be written either
            self._file.close()

    def write(self, data: Any) -> int:
        """Append ``data``."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._file.write(piece)
            self._sha.update(piece)
            self._report_progress()
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def flush(self) -> None:
        """Hand the buffer to the operating system."""
        self._file.flush()

    def commit(self) -> tuple[int, str]:
        """Bring it to the disk, read it back from there and compare; returns size and SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        self._report_progress()
        if sha256_of(self._path, self._report_progress) != self._sha.hexdigest():
            raise OSError(None, "the disk gives back something else than was written", str(self._path))
        return self._size, self._sha.hexdigest()


def sha256_of(path: Path, report_progress: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file, in pieces."""
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            sha.update(piece)
            report_progress()
    return sha.hexdigest()


def in_threads[T](
    actions: Sequence[Callable[[], T]], threads: int, on_waiting: Callable[[], None] = lambda: None
) -> list[T]:
    """Do ``actions``, up to ``threads`` at a time, and return what they return; hashing and writing run side by side.

    The threads are daemons, not those of ``concurrent.futures``, which the interpreter waits for when it ends: nothing can end
    a thread that waits inside the kernel.

    Args:
        on_waiting: called again and again by the calling thread until all are done.

    Raises:
        BaseException: the first failed action's, in their order, after all have ended.
    """
    results: list[Any] = [None] * len(actions)
    failures: dict[int, BaseException] = {}
    left = iter(range(len(actions)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                results[number] = actions[number]()
            except BaseException as error:
                failures[number] = error

    workers = [threading.Thread(target=work, name="checkpoint file", daemon=True) for _ in actions[: max(1, threads)]]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive():
            worker.join(_LOOK_S)
            on_waiting()
    if failures:
        raise failures[min(failures)]
    return results
