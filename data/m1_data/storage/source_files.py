"""Which files a source reads, in which order, and which ones its folders hold besides: nothing is skipped without a word.

Folders are read with their sub-folders. Hidden files and folders are left out. Links are followed; a file or folder that is
met again under another name, also in a circle of links, is read once, under its own name rather than a link's.
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from m1_data.errors import DataError, shown
from m1_data.spec import SourceSpec
from m1_data.storage.content import foreign_ending, special_kind
from m1_data.storage.manifest import is_prepared

ENDINGS = {
    "jsonl": (".jsonl", ".ndjson", ".json", ".gz", ".zst", ".bz2"),
    "parquet": (".parquet",),
}
"""Endings, in lower case, of the files that a source of a format takes from a folder."""

_AGAIN = "met before under another name"
_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that a source reads."""

    path: Path
    root: Path
    """The file or folder, named by the source's path, that it was found in."""
    size: int
    """Bytes."""
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path from the root's name on, such as ``corpus/part/a.jsonl``, with ``/`` between the parts."""
        return self.path.relative_to(self.root.parent).as_posix()


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """What a source reads, and what it does not."""

    files: tuple[SourceFile, ...] = ()
    """The files in their order: by root, then by path."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of files and folders that are not read, by ending or by what they are."""


def find_files(source: SourceSpec, base_dir: Path) -> SourceFiles:
    """Return the files of a source; none for the format needles and for data sets of the Hub.

    Raises:
        DataError: nothing is there to read, a folder or file cannot be read, a link leads nowhere, or something is named
            that is no text: a FIFO, a device, an archive.
    """
    if source.format == "needles" or (source.format == "datasets" and is_on_hub(source, base_dir)):
        return SourceFiles()
    where = f"[[data.sources]] {source.name}"
    roots, by_name = _roots(source, base_dir)
    search = _Search(source)
    for root in roots:
        search.add(root, by_name=by_name)
    files, left_out = search.finish()
    if not files:
        listed = f"; left out there: {describe_left_out(left_out)}" if left_out else ""
        raise DataError(
            f"source {source.name!r} has no files at {shown(base_dir / source.path)}{listed}",
            where=where,
            fix="correct its path (relative paths start at the configuration file)"
            + (f"; a folder is read for {', '.join(ENDINGS.get(source.format, source.include))}" if left_out else ""),
        )
    return SourceFiles(files, left_out)


def is_on_hub(source: SourceSpec, base_dir: Path) -> bool:
    """Return whether a source of the format datasets names a data set of the Hub rather than a file or folder."""
    return not source.path.startswith(("/", ".", "~")) and not os.path.lexists(base_dir / source.path)


def describe_left_out(left_out: dict[str, int], most: int = 8) -> str:
    """Return the counts of ``SourceFiles.left_out`` as words, the largest first, such as ``3 .md, 1 hidden``."""
    counts = Counter(left_out).most_common()
    words = [f"{count:,} {kind}" for kind, count in counts[:most]]
    if len(counts) > most:
        words.append(f"{sum(count for _, count in counts[most:]):,} of {len(counts) - most} other kinds")
    return ", ".join(words)


def _roots(source: SourceSpec, base_dir: Path) -> tuple[list[Path], bool]:
    """Return what the source's path stands for, and whether by name: ``*`` and ``**`` take what is there, as folders do."""
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"source {source.name!r} has no usable path: {error}",
            where=f"[[data.sources]] {source.name}",
            fix="write the whole path",
        ) from error
    whole = base_dir / path
    if os.path.lexists(whole):
        return [whole], True
    start, parts = (Path(path.anchor), path.parts[1:]) if path.is_absolute() else (base_dir, path.parts)
    return sorted(set(_expand(start, parts))), parts[-1:] not in (("*",), ("**",))


def _expand(folder: Path, parts: Sequence[str], above: tuple[_Identity, ...] = ()) -> Iterator[Path]:
    """Yield what a pattern stands for below ``folder``. A part that exists is taken literally, also with brackets.

    Unlike ``glob``, this refuses a folder that it cannot read, and ends in a circle of links.
    """
    if not parts or parts[0] == "**" == parts[-1]:
        yield folder  # the folder with all that is in it
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        identity = _identity(folder.stat())
        if identity not in above:
            yield from _expand(folder, rest)
            for entry in _entries(folder):
                if _is_folder(entry) and not entry.name.startswith("."):
                    yield from _expand(Path(entry.path), parts, (*above, identity))
    elif has_magic(part) and not os.path.lexists(folder / part):
        for entry in _entries(folder) if folder.is_dir() else ():
            visible = not entry.name.startswith(".") or part.startswith(".")
            if visible and fnmatch.fnmatchcase(entry.name, part) and (not rest or _is_folder(entry)):
                yield from _expand(Path(entry.path), rest)
    elif os.path.lexists(folder / part):
        yield from _expand(folder / part, rest)


class _Search:
    """Collects the files of one source."""

    def __init__(self, source: SourceSpec) -> None:
        self._source = source
        self._found: dict[Path, tuple[bool, SourceFile, _Identity]] = {}
        """Whether a link led to a file, the file, and what tells it from all others, by path."""
        self._left_out: dict[Path, str] = {}

    def add(self, root: Path, *, by_name: bool) -> None:
        if not root.is_dir():
            self._add_file(root, root, linked=root.is_symlink(), by_name=by_name)
            return
        for path, linked in self._tree(root):
            self._add_file(path, root, linked=linked, by_name=False)

    def finish(self) -> tuple[tuple[SourceFile, ...], dict[str, int]]:
        """Return the files, each once, and the number of those left out by kind."""
        seen: set[_Identity] = set()
        files = []
        for _, file, identity in sorted(
            self._found.values(), key=lambda found: (found[0], found[1].root, found[1].name)
        ):
            if identity in seen:
                self._left_out[file.path] = _AGAIN
            else:
                seen.add(identity)
                files.append(file)
        left_out = Counter(kind for path, kind in self._left_out.items() if path not in self._found or kind == _AGAIN)
        return tuple(sorted(files, key=lambda file: (file.root, file.name))), dict(sorted(left_out.items()))

    def _tree(self, root: Path) -> Iterator[tuple[Path, bool]]:
        """Yield every visible file below ``root`` and whether a link leads to it: real folders first, then linked ones."""
        folders = [(root, False)]
        linked_folders: list[tuple[Path, bool]] = []
        seen: set[_Identity] = set()
        while folders or linked_folders:
            folder, linked = folders.pop() if folders else linked_folders.pop(0)
            entries = _entries(folder)
            identity = _identity(folder.stat())
            if identity in seen:
                self._left_out[folder] = _AGAIN
                continue
            seen.add(identity)
            if folder != root and is_prepared(folder):
                self._left_out[folder] = "prepared data of m1"
                continue
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith("."):
                    self._left_out[path] = "hidden"
                elif not _is_folder(entry):
                    yield path, linked or entry.is_symlink()
                elif entry.is_symlink():
                    linked_folders.append((path, True))
                else:
                    folders.append((path, linked))

    def _add_file(self, path: Path, root: Path, *, linked: bool, by_name: bool) -> None:
        if not by_name and not self._is_wanted(path, root):
            self._left_out[path] = shown(path.suffix.lower()) or "without an ending"
            return
        try:
            status = path.stat()
        except OSError as error:
            what = "a link leads nowhere" if path.is_symlink() else f"cannot read a file: {error.strerror}"
            raise DataError(what, where=shown(path), fix="mend it, or take it out of the source") from error
        if kind := special_kind(status.st_mode):
            if by_name:
                raise DataError(
                    f"source {self._source.name!r} names a {kind}, and reads regular files only",
                    where=shown(path),
                    fix="write its text to a file first",
                )
            self._left_out[path] = f"{kind} ({shown(path.name)})"
            return
        if not os.access(path, os.R_OK):
            raise DataError("cannot read a file: no permission", where=shown(path), fix="chmod, or take it out")
        file = SourceFile(path, root, status.st_size, status.st_mtime_ns)
        self._found[path] = linked, file, _identity(status)

    def _is_wanted(self, path: Path, root: Path) -> bool:
        """Whether the source takes this file from a folder.

        Raises:
            DataError: an archive lies where data is read from: its text would be missing.
        """
        source = self._source
        if source.format == "datasets":
            return True  # that library chooses
        if source.format in ENDINGS:
            if foreign := foreign_ending(path.name):
                raise DataError(
                    f"{foreign.what} is among the files of source {source.name!r}, and archives are not read",
                    where=shown(path),
                    fix=f"{foreign.fix}; or name the files to read, such as path = "
                    f'"{shown(root)}/**/*{ENDINGS[source.format][0]}"',
                )
            return path.name.lower().endswith(ENDINGS[source.format])
        relative = path.relative_to(root).as_posix()
        return any(fnmatch.fnmatch(path.name, pattern) for pattern in source.include) and not any(
            fnmatch.fnmatch(relative, pattern) for pattern in source.exclude
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, by name.

    Raises:
        DataError: the folder cannot be read; its files would be missing.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"cannot read a folder: {error.strerror}", where=shown(folder), fix="chmod, or take it out of the source"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
