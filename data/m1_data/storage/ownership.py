"""Which files and folders may be written, replaced or removed: new ones, and those that carry our own mark.

Ask before the first byte is written. What belongs to somebody else is refused, never moved out of the way.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from m1_data.errors import ConfigError
from m1_data.storage.process import ProcessId, is_running, this_process

_MOST_CHARACTERS = 100
_FORGOTTEN_S = 24 * 3600.0
"""Seconds without a change after which a temporary sibling of another machine's process counts as left behind."""


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside ``path`` for a file or folder that is renamed to ``path`` when it is complete.

    The name says which process works there, so that ``sweep_siblings`` finds what a killed one left behind.
    """
    return path.with_name(f"{_sibling_prefix(path)}{this_process()}-{uuid.uuid4().hex[:8]}")


def sweep_siblings(path: Path) -> None:
    """Remove the temporary siblings of ``path`` whose process is gone; those of a running one, and all else, are not touched.

    What a process of another machine left behind is removed when it has not changed for a day.
    """
    prefix = _sibling_prefix(path)
    with suppress(OSError):  # no such folder, or not ours to remove: nothing depends on it
        for sibling in path.parent.iterdir():
            owner, _, unique = sibling.name.removeprefix(prefix).rpartition("-")
            process = ProcessId.parse(owner)
            if not sibling.name.startswith(prefix) or process is None or not re.fullmatch("[0-9a-f]{8}", unique):
                continue
            running = is_running(process)
            if running is False or (running is None and time.time() - sibling.lstat().st_mtime > _FORGOTTEN_S):
                if sibling.is_dir() and not sibling.is_symlink():
                    shutil.rmtree(sibling, ignore_errors=True)
                else:
                    sibling.unlink(missing_ok=True)


def _sibling_prefix(path: Path) -> str:
    return f".{path.name}.tmp-"


def why_not_a_name(name: str) -> str | None:
    """Return why ``name`` cannot become the name of a file or folder of ours; None when it can.

    A name is one part of a path: no separator, no control character, not hidden, not ``..``, at most 100 characters.
    """
    if not name.strip():
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it has a path separator: a source's name becomes a folder inside data.out"
    if name.startswith("."):
        return "it begins with a dot"
    if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name):
        return "it has characters that no file name should have"
    return f"it is longer than {_MOST_CHARACTERS} characters" if len(name) > _MOST_CHARACTERS else None


def refuse_unusable(path: Path, *, what: str, fix: str) -> None:
    """Refuse a path at which nothing can be created, whether there is something or not.

    Raises:
        ConfigError: it has a control character, a part is too long, or it leads through something that is no folder.
    """
    if re.search(r"[\x00-\x1f\x7f-\x9f]", str(path)):
        raise ConfigError(f"{what} has characters that no path should have", where=repr(str(path)), fix=fix)
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # NotADirectoryError: a file on the way; a name that is too long
        raise ConfigError(f"{what} cannot be used: {error.strerror}", where=str(path), fix=fix) from error


def refuse_to_overwrite(path: Path, *, what: str, is_ours: Callable[[str], bool], fix: str) -> None:
    """Refuse to write the file ``path`` unless there is none, or one of ours.

    Args:
        what: names the file in the message, as in "the report (--out)".
        is_ours: whether a file with this text was written by us.
        fix: one change that works.

    Raises:
        ConfigError: a folder, a link or a file of somebody else's is there, or nothing can be; nothing was written.
    """
    refuse_unusable(path, what=what, fix=fix)
    try:
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "not a file"
            raise ConfigError(f"{what} is {kind}, and is not replaced", where=str(path), fix=fix)
        ours = is_ours(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"{what} cannot be used: {error.strerror}", where=str(path), fix=fix) from error
    if not ours:
        raise ConfigError(
            f"{what}: there is another file of this name, and it is not replaced", where=str(path), fix=fix
        )


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all, creating its folder; no other name in that folder is touched.

    Raises:
        OSError: the disk is full or failing; ``path`` keeps its old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_siblings(path)
    temporary = temporary_sibling(path)
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_to_replace(folder: Path, *, what: str, marked: bool, ours: Iterable[str], fix: str) -> None:
    """Refuse to replace ``folder`` unless it is missing, empty, or marked and made of our own entries alone.

    Args:
        what: names the folder in the message, as in "data.out".
        marked: whether the folder carries our mark.
        ours: glob patterns of the entries that we write into such a folder.
        fix: one change that works.

    Raises:
        ConfigError: the folder, a file or a link there belongs to somebody else; nothing was written.
    """
    refuse_unusable(folder, what=what, fix=fix)
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "a link" if folder.is_symlink() else "not a folder"
            raise ConfigError(f"{what} is {kind}, and is not replaced", where=str(folder), fix=fix)
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be used: {error}", where=repr(str(folder)), fix=fix) from error
    foreign = [entry.name for entry in entries if not any(entry.match(pattern) for pattern in ours)]
    if entries and not marked:
        raise ConfigError(
            f"{what} has files that m1 did not write ({', '.join((foreign or [e.name for e in entries])[:3])}), and is not "
            "replaced",
            where=str(folder),
            fix=fix,
        )
    if foreign:
        raise ConfigError(
            f"{what} also has what m1 did not write ({', '.join(foreign[:3])}), and is not replaced",
            where=str(folder),
            fix=f"move it elsewhere, or {fix}",
        )
