"""Reads the rows of files of conversations: JSON Lines, JSON arrays, Parquet, Arrow, and folders that ``datasets`` saved."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from m1_data.chat.conversations import BadRow, Conversation, decoded
from m1_data.chat.dialects import conversation_in, dialect_of
from m1_data.errors import DataError, shown
from m1_data.storage.streams import open_lines

BadRows = Literal["error", "skip"]


class Row(NamedTuple):
    """A row of a file of conversations, of which nothing has been made yet."""

    file: int
    """The number of its file among those that are read."""
    where: str
    value: Any
    """A ``BadRow`` in place of a line that is not JSON."""
    dialect: str
    """Its file's; empty until a row told it."""


@dataclass(slots=True)
class FileTally:
    """What was read of one file."""

    file: str
    dialect: str = ""
    """Empty until a row told it."""
    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that are no conversation, by reason."""
    first_bad: BadRow | None = None


def rows_of(paths: Iterable[Path], *, dialect: str = "", ignored_keys: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of files; blank lines are skipped.

    Args:
        paths: files, and folders that ``datasets`` saved.
        dialect: of all rows; empty takes, for each file, that of its first row that has one.
        ignored_keys: keys of the rows that say nothing about the dialect.

    Raises:
        DataError: a missing or damaged file.
    """
    for number, path in enumerate(paths):
        told = dialect
        for where, value in read_rows(path):
            if not told and not isinstance(value, BadRow):
                with suppress(BadRow):
                    told = dialect_of(value, where, ignored_keys)
            yield Row(number, where, value, told)


def conversations_in(
    rows: Iterable[Row], files: Sequence[FileTally], *, ignored_keys: Collection[str] = (), bad_rows: BadRows = "error"
) -> Iterator[Conversation]:
    """Yield the conversations of rows.

    Args:
        files: one for each file, counted up.
        ignored_keys: keys of the rows that are taken out.
        bad_rows: ``skip`` counts rows that are no conversation and goes on.

    Raises:
        BadRow: a row is not a conversation.
    """
    for row in rows:
        tally = files[row.file]
        tally.rows += 1
        tally.dialect = row.dialect
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            dialect = row.dialect or dialect_of(row.value, row.where, ignored_keys)
            conversation = conversation_in(dialect, row.value, row.where, ignored_keys)
        except BadRow as bad:
            if bad_rows == "error":
                bad.fix = f'{bad.fix or "mend it"}; or set sft.bad_rows = "skip" to leave such rows out and count them'
                raise
            tally.first_bad = tally.first_bad or bad
            tally.bad[bad.reason] += 1
        else:
            yield replace(conversation, file=row.file)


def refuse_files_of_bad_rows(files: Iterable[FileTally]) -> None:
    """Refuse files that have rows, and not one that is a conversation.

    Raises:
        BadRow: the first row of such a file.
    """
    for tally in files:
        if tally.first_bad and tally.rows == tally.bad.total():
            raise tally.first_bad


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a file is, and its value; a ``BadRow`` in place of a line that is not JSON.

    Raises:
        DataError: a missing or damaged file, or a folder that ``datasets`` did not save.
    """
    if path.is_dir():
        yield from _saved_folder(path)
        return
    if not path.is_file():
        raise DataError("there is no such file of conversations", where=shown(path), fix="check the paths in sft.data")
    with path.open("rb") as file:
        head = file.read(6)
    if head[:4] == b"PAR1":
        yield from _table(path, _parquet_batches)
    elif head == b"ARROW1" or path.suffix == ".arrow":
        yield from _table(path, _arrow_file if head == b"ARROW1" else _arrow_stream)
    else:
        yield from _json(path)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    lines = open_lines(path)
    first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
    if first.lstrip().startswith(b"["):
        rest = list(lines)
        rows = _array(path, first, rest)
        if rows is not None:
            yield from ((f"{shown(path)}, item {number}", row) for number, row in enumerate(rows, 1))
            return
        lines = iter(rest)
    for number, line in enumerate(chain([first], lines), 1):
        if line.strip():
            where = f"{shown(path)}:{number}"
            try:
                yield where, decoded(line, where)
            except BadRow as bad:
                yield where, bad


def _array(path: Path, first: bytes, rest: list[bytes]) -> list[Any] | None:
    """The rows of a file that is one JSON array; None for JSON Lines whose first line is a list."""
    try:
        return list(orjson.loads(b"\n".join([first, *rest])))
    except orjson.JSONDecodeError as error:
        with suppress(orjson.JSONDecodeError):
            orjson.loads(first)
            return None
        raise DataError(
            f"the file begins as a JSON array and is not JSON: {error}", where=shown(path), fix="mend it"
        ) from error


def _saved_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a folder that ``datasets.save_to_disk`` wrote: Arrow files that its ``state.json`` names in order."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        raise DataError(
            f"the folder holds the splits {', '.join(splits)}",
            where=shown(path),
            fix=f'name one of them: sft.data = ["{shown(path / (splits or ["train"])[0])}"]',
        )
    try:
        names = [str(file["filename"]) for file in orjson.loads((path / "state.json").read_bytes())["_data_files"]]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            "a folder of conversations has to be one that datasets saved to disk, with a state.json",
            where=shown(path),
            fix="name the files in sft.data",
        ) from error
    for name in names:
        yield from read_rows(path / Path(name).name)


def _table(path: Path, batches: Any) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches(path):
            for row in batch.to_pylist():
                number += 1
                yield f"{shown(path)}, row {number}", _without_nulls(row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"not a readable table: {error}; {number} complete rows came before",
            where=shown(path),
            fix="copy or download it again",
        ) from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as parquet:
        yield from parquet.iter_batches(batch_size=64)


def _arrow_stream(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        yield from batches


def _arrow_file(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as batches:
        yield from map(batches.get_batch, range(batches.num_record_batches))


def _without_nulls(value: Any) -> Any:
    """Tables give every object of a column the keys of all of them, with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
