"""Step 1, read: every record of a source becomes a raw text, or is counted with the reason why it does not."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import orjson

from m1_data.errors import DataError, EnvironmentProblem
from m1_data.prepare.tally import Tally
from m1_data.spec import SourceSpec
from m1_data.storage.streams import open_lines

_BOM = b"\xef\xbb\xbf"


def source_files(source: SourceSpec, base_dir: Path) -> list[Path]:
    """Return the files or folders that a source reads, sorted; none for the formats datasets and needles.

    Raises:
        DataError: no file matches the source's path.
    """
    if source.format in ("datasets", "needles"):
        return []
    pattern = str(base_dir / Path(source.path).expanduser())
    paths = sorted(Path(p) for p in glob(pattern, recursive=True)) if has_magic(pattern) else [Path(pattern)]
    suffixes = {"jsonl": (".jsonl", ".json", ".gz", ".zst"), "parquet": (".parquet",)}.get(source.format)
    found: list[Path] = []
    for path in paths:
        if suffixes and path.is_dir():
            found += sorted(p for p in path.iterdir() if p.name.endswith(suffixes))
        elif path.exists():
            found.append(path)
    if not found:
        raise DataError(
            f"source {source.name!r} has no files at {pattern}",
            where=f"[[data.sources]] {source.name}",
            fix="correct its path (relative paths start at the configuration file)",
        )
    return found


def read_source(source: SourceSpec, base_dir: Path, tally: Tally) -> Iterator[str]:
    """Yield the raw texts of a source in a fixed order.

    Every record is counted in ``tally.records``, and one that holds no text in ``tally.rejected`` with the reason. The
    generator stops after ``source.max_docs`` texts when that is not 0.

    Raises:
        DataError: a file is missing, cut, damaged or of another format.
        EnvironmentProblem: the source has the format datasets and that library is not installed.
    """
    files = source_files(source, base_dir)
    texts: Iterator[str]
    if source.format == "jsonl":
        texts = (text for path in files for text in _read_jsonl(path, source.text_field, tally))
    elif source.format == "parquet":
        texts = (text for path in files for text in _read_parquet(path, source.text_field, tally))
    elif source.format == "datasets":
        texts = _read_datasets(source, tally)
    elif source.format == "files":
        texts = (text for root in files for _, text in _read_tree(root, source, tally))
    else:
        texts = _read_packages(files, source, tally)
    for number, text in enumerate(texts):
        if source.max_docs and number >= source.max_docs:
            return
        yield text


def _read_jsonl(path: Path, field_name: str, tally: Tally) -> Iterator[str]:
    for line in open_lines(path):
        tally.records += 1
        if line.startswith(_BOM):
            tally.noted["byte-order mark"] += 1
            line = line[3:]
        if not line.strip():
            tally.rejected["blank line"] += 1
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            tally.rejected[_why_not_json(line, str(error))] += 1
            continue
        text = _text_of(record, field_name, tally)
        if text is not None:
            yield text


def _why_not_json(line: bytes, message: str) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid UTF-8"
    return "lone surrogate" if "surrogate" in message else "malformed JSON"


def _text_of(record: Any, field_name: str, tally: Tally) -> str | None:
    if not isinstance(record, dict):
        tally.rejected["not an object"] += 1
    elif field_name not in record:
        tally.rejected[f"no field {field_name!r}"] += 1
    elif record[field_name] is None:
        tally.rejected["null text"] += 1
    elif not isinstance(record[field_name], str):
        tally.rejected["text is not a string"] += 1
    else:
        return str(record[field_name])
    return None


def _read_parquet(path: Path, column: str, tally: Tally) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"there is no column {column!r}; the file has {', '.join(names)}",
                    where=str(path),
                    fix=f'set text_field = "{names[0] if len(names) == 1 else "…"}" on this source',
                )
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                values = batch.column(0)
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                yield from _parquet_texts(values.to_pylist(), tally)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", where=str(path), fix="copy or download it again"
        ) from error


def _parquet_texts(values: Iterable[Any], tally: Tally) -> Iterator[str]:
    for value in values:
        tally.records += 1
        if value is None:
            tally.rejected["null text"] += 1
        elif isinstance(value, bytes):
            try:
                yield value.decode("utf-8")
            except UnicodeDecodeError:
                tally.rejected["invalid UTF-8"] += 1
        elif isinstance(value, str):
            yield value
        else:
            tally.rejected["text is not a string"] += 1


def _read_datasets(source: SourceSpec, tally: Tally) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            "sources of format 'datasets' need the datasets library",
            where=f"source {source.name}",
            fix="pip install 'm1cli[hub]'",
        ) from error
    try:
        rows = load_dataset(source.path, split=source.split, streaming=True)
        for record in rows:
            tally.records += 1
            text = _text_of(record, source.text_field, tally)
            if text is not None:
                yield text
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"datasets cannot read {source.path!r}: {error}", where=f"source {source.name}") from error


def _read_tree(root: Path, source: SourceSpec, tally: Tally) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every matching file below ``root``, in path order."""
    for path in tree_files(root, source):
        tally.records += 1
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            tally.rejected["invalid UTF-8"] += 1
        except OSError as error:
            raise DataError(f"cannot read a file: {error}", where=str(path)) from error
        else:
            yield path.relative_to(root.parent).as_posix(), text


def tree_files(root: Path, source: SourceSpec) -> list[Path]:
    """Return the files below ``root``, or ``root`` itself, that a source of format files or packages reads, in path order."""
    if root.is_file():
        return [root]
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in source.include) and not any(
                fnmatch.fnmatch(relative, pattern) for pattern in source.exclude
            ):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_packages(roots: list[Path], source: SourceSpec, tally: Tally) -> Iterator[str]:
    """Yield one text per folder: its files in path order, each under a line with its path."""
    for root in roots:
        parts = [f"# file: {name}\n{text}" for name, text in _read_tree(root, source, tally)]
        if parts:
            yield "\n\n".join(parts)
