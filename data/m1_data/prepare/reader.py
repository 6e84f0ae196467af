"""Step 1, read: every record of a source becomes a raw text, or is counted with the reason why it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import orjson

from m1_data.errors import DataError, EnvironmentProblem, shown
from m1_data.prepare.tally import Tally
from m1_data.spec import SourceSpec
from m1_data.storage.content import HEAD_BYTES, foreign_content
from m1_data.storage.source_files import SourceFile, find_files, is_on_hub
from m1_data.storage.streams import MAX_LINE_BYTES, open_lines

_BOM = b"\xef\xbb\xbf"
_MISSING = object()
_JSON_NAMES = {
    dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null",
}  # fmt: skip


def read_source(source: SourceSpec, base_dir: Path, tally: Tally) -> Iterator[str]:
    """Yield the raw texts of a source in a fixed order.

    Every record is counted in ``tally.records``, and one that holds no text in ``tally.rejected`` with the reason and the
    first place. ``tally.files`` and ``tally.left_out`` say what is read and what is not. The generator stops after
    ``source.max_docs`` texts when that is not 0.

    Raises:
        DataError: a file is missing, cut, damaged or of another format.
        EnvironmentProblem: the source has the format datasets and that library is not installed.
    """
    found = find_files(source, base_dir)
    tally.left_out = found.left_out
    in_trees = source.format in ("files", "packages")
    tally.files = tuple(dict.fromkeys(shown(f.root.name if in_trees else f.name) for f in found.files))
    texts: Iterator[str]
    if source.format == "jsonl":
        texts = (text for file in found.files for text in _read_jsonl(file, source.text_field, tally))
    elif source.format == "parquet":
        texts = (text for file in found.files for text in _read_parquet(file, source.text_field, tally))
    elif source.format == "datasets":
        texts = _read_datasets(source, base_dir, tally)
    elif source.format == "files":
        texts = (text for file in found.files if (text := _read_file(file, tally)) is not None)
    else:
        texts = _read_packages(found.files, tally)
    yield from islice(texts, source.max_docs or None)


def _read_jsonl(file: SourceFile, field_name: str, tally: Tally) -> Iterator[str]:
    name, number = shown(file.name), 0
    for line in open_lines(file.path):
        number += 1  # noqa: SIM113 - enumerate would keep the line that it gave last
        tally.begin(f"{name}:{number}")
        if line.startswith(_BOM):
            tally.noted["byte-order mark"] += 1
            line = line[3:]
        if number == 1:
            _refuse_whole_json(line, file.path)
        text = _text_of_line(line, field_name, tally)
        del line  # it may be as large as the text, which others work on now
        if text is not None:
            yield text


def _refuse_whole_json(first_line: bytes, path: Path) -> None:
    """Refuse a file that is one JSON value over many lines, or one array of records."""
    start = first_line.strip()
    if start.startswith(b"["):
        what, command = "a JSON array", "jq -c '.[]'"
    elif start == b"{":
        what, command = "JSON with line breaks inside its objects", "jq -c ."
    else:
        return
    raise DataError(
        f"the file is {what}, not JSON Lines (one object a line)",
        where=f"{shown(path)}:1",
        fix=f"convert it: {command} FILE > NEW.jsonl",
    )


def _text_of_line(line: bytes, field_name: str, tally: Tally) -> str | None:
    if not line.strip():
        tally.rejected["blank line"] += 1
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            record = _parse_leniently(line)
        except UnicodeDecodeError as wrong:
            tally.reject("invalid UTF-8", f"byte {wrong.start + 1} of the line")
            return None
        except (ValueError, RecursionError):
            tally.reject("malformed JSON", _why_malformed(str(error)))
            return None
        tally.noted["not strict JSON (NaN, Infinity, a huge number or half a character)"] += 1
    return _text_of(record, field_name, tally)


def _parse_leniently(line: bytes) -> Any:
    """Parse what Python's and pandas' writers make and JSON does not allow, in fields that may have nothing to do with text.

    Raises:
        UnicodeDecodeError: the line is not UTF-8.
        ValueError: it is malformed all the same.
        RecursionError: it is nested thousands of levels deep.
    """
    return json.loads(line.decode("utf-8"), parse_int=float, parse_constant=float)


def _why_malformed(message: str) -> str:
    """Return the parser's message without the line number, which is 1 for every line."""
    return message.partition(": line 1 ")[0]


def _text_of(record: Any, field_name: str, tally: Tally) -> str | None:
    if not isinstance(record, dict):
        tally.reject("not an object", f"it is {_JSON_NAMES.get(type(record), 'a number')}")
        return None
    value = record.get(field_name, _MISSING)
    if value is _MISSING and "." in field_name:  # a field of an object inside the record
        value = record
        for part in field_name.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    if isinstance(value, str):
        return value
    if value is _MISSING:
        tally.reject(f"no field {field_name!r}", f"it has {', '.join(list(map(shown, record))[:8]) or 'no field'}")
    elif value is None:
        tally.reject("null text")
    else:
        tally.reject("text is not a string", f"it is {_JSON_NAMES.get(type(value), 'a number')}")
    return None


def _read_parquet(file: SourceFile, column: str, tally: Tally) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, rows = shown(file.name), 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            _require_text_column(parquet.schema_arrow, column, file.path)
            for batch in parquet.iter_batches(batch_size=64, columns=[column]):
                values = batch.column(0)
                while pa.types.is_struct(values.type):  # the one field that was asked for, inside its structs
                    values = values.flatten()[0]
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                for row, value in enumerate(values.to_pylist(), rows + 1):
                    tally.begin(f"{name}, row {row}")
                    text = _text_of_cell(value, tally)
                    if text is not None:
                        yield text
                rows += len(values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", where=shown(file.path), fix="copy or download it again"
        ) from error


def _require_text_column(schema: Any, column: str, path: Path) -> None:
    """Refuse a column that is missing or holds no text, and name those that do."""
    kinds = _leaf_types(schema, "")
    texts = [name for name, kind in kinds.items() if _holds_text(kind)]
    fix = (
        f'set text_field = "{texts[0] if len(texts) == 1 else "…"}" on this source' if texts else "choose another file"
    )
    holding = f"; text is in {', '.join(texts[:8])}" if texts else "; no column holds text"
    if column in kinds and column not in texts:
        raise DataError(f"the column {column!r} holds {kinds[column]}, not text{holding}", where=shown(path), fix=fix)
    if column not in kinds:
        names = ", ".join(schema.names[:20])
        if column in schema.names:
            raise DataError(f"the column {column!r} is a struct{holding}", where=shown(path), fix=fix)
        raise DataError(f"there is no column {column!r}; the file has {names}{holding}", where=shown(path), fix=fix)


def _leaf_types(fields: Any, prefix: str) -> dict[str, Any]:
    """Return the Arrow type of every column, those inside structs under names such as ``meta.text``."""
    import pyarrow as pa

    found: dict[str, Any] = {}
    for arrow_field in fields:
        name = prefix + arrow_field.name
        if pa.types.is_struct(arrow_field.type):
            inside = [arrow_field.type.field(n) for n in range(arrow_field.type.num_fields)]
            found |= _leaf_types(inside, f"{name}.")
        else:
            found[name] = arrow_field.type
    return found


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind) or types.is_null(kind)
    )  # fmt: skip


def _text_of_cell(value: Any, tally: Tally) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as wrong:
            tally.reject("invalid UTF-8", f"byte {wrong.start + 1} of the text")
            return None
    if value is None:
        tally.reject("null text")
        return None
    return str(value)


def _read_datasets(source: SourceSpec, base_dir: Path, tally: Tally) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            "sources of format 'datasets' need the datasets library",
            where=f"source {source.name}",
            fix="pip install 'm1cli[hub]'",
        ) from error
    on_hub = is_on_hub(source, base_dir)
    path = source.path if on_hub else str((base_dir / Path(source.path).expanduser()).resolve())
    try:
        if not on_hub and Path(path, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[source.split]
        elif not on_hub and Path(path, "state.json").is_file():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, split=source.split, streaming=True)
        for number, record in enumerate(rows, 1):
            tally.begin(f"{shown(source.path)}, row {number}")
            text = _text_of(record, source.text_field, tally)
            if text is not None:
                yield text
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"datasets cannot read {shown(source.path)!r}: {error}",
            where=f"source {source.name}, {shown(path)}",
            fix="a local path starts at the configuration file; else it is the name of a data set of the Hub",
        ) from error


def _read_file(file: SourceFile, tally: Tally) -> str | None:
    """Return the text of a whole file, or None after counting why it has none."""
    tally.begin(shown(file.name))
    if file.size > MAX_LINE_BYTES:
        raise DataError(
            f"the file is longer than {MAX_LINE_BYTES >> 20} MiB, too long for one document",
            where=shown(file.path),
            fix="split it, or leave it out with the source's exclude patterns",
        )
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read a file: {error.strerror}", where=shown(file.path), fix="mend it") from error
    if foreign := foreign_content(data[:HEAD_BYTES]):
        tally.reject(f"{foreign.what}")
        return None
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as wrong:
        tally.reject("invalid UTF-8", f"line {data.count(10, 0, wrong.start) + 1}")
        return None


def _read_packages(files: Sequence[SourceFile], tally: Tally) -> Iterator[str]:
    """Yield one text per folder: its files in path order, each under a line with its path."""
    for _, package in groupby(files, key=lambda file: file.root):
        parts = [
            f"# file: {shown(file.name)}\n{text}" for file in package if (text := _read_file(file, tally)) is not None
        ]
        if parts:
            yield "\n\n".join(parts)
