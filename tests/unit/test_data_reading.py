"""What a record must be to give a text: everything else is counted with reason and place, or refused as what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from m1_data.errors import DataError
from m1_data.prepare.reader import read_source
from m1_data.prepare.tally import Tally
from m1_data.spec import SourceSpec
from m1_data.storage import streams
from m1_data.storage.streams import open_lines

GOOD = [json.dumps({"text": f"document {n}"}) for n in range(20)]
LINES = "".join(f"{line}\n" for line in GOOD).encode()


def read(folder: Path, name: str, data: bytes, **more: object) -> tuple[list[str], Tally]:
    (folder / name).write_bytes(data)
    tally = Tally()
    spec = SourceSpec(**{"name": "s", "domain": "code", "format": "jsonl", "path": name} | more)  # type: ignore[arg-type]
    return list(read_source(spec, folder, tally)), tally


@pytest.mark.parametrize(
    ("value", "noted"),
    [("NaN", 1), ("-Infinity", 1), ("9" * 400, 1), ("9" * 5000, 1), ("1e999", 1), ('"\\ud800"', 1), ("[0]", 0)],
    ids=["NaN", "infinity", "400 digits", "5,000 digits", "exponent", "half a character", "plain"],
)
def test_another_field_does_not_lose_the_text(value: str, noted: int, tmp_path: Path) -> None:
    texts, tally = read(tmp_path, "a.jsonl", f'{{"score": {value}, "text": "kept"}}\n'.encode())
    assert texts == ["kept"]
    assert (tally.bad, sum(tally.noted.values())) == (0, noted)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (
            b'{"text": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "malformed JSON",
            "",
        ),  # each orjson has its own words
        (b'{"text": "cut', "malformed JSON", "unexpected end of data"),
        ('{"text": "café"}'.encode("latin-1"), "invalid UTF-8", "byte 14 of the line"),
        (b'{"text": NaN}', "text is not a string", "it is a number"),
        (b'{"text": 5}', "text is not a string", "it is a number"),
        (b'{"text": null}', "null text", ""),
        (b'["text"]', "not an object", "it is an array"),
        (b'{"body": 1, "title": 2}', "no field 'text'", "it has body, title"),
    ],
    ids=["too deep", "cut", "latin-1", "NaN", "number", "null", "array", "other fields"],
)
def test_an_unusable_record_has_a_reason_and_a_first_place(
    line: bytes, reason: str, detail: str, tmp_path: Path
) -> None:
    texts, tally = read(tmp_path, "a.jsonl", LINES + line + b"\n" + b"\n" + line + b"\n" + LINES)
    assert len(texts) == 40
    assert tally.rejected == {reason: 2, "blank line": 1}
    assert (tally.records, tally.bad) == (43, 2)
    assert set(tally.first_places) == {reason}
    place, _, rest = tally.first_places[reason].partition(" (")
    assert place == "a.jsonl:21"
    assert rest.startswith(detail)


def test_half_a_character_in_the_text_is_left_to_cleaning(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", b'{"text": "x \\ud800"}\n')[0] == ["x \ud800"]


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.jsonl", data)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


TEXT = LINES.decode()
FOREIGN: list[tuple[str, bytes, str]] = [
    ("UTF-16", TEXT.encode("utf-16"), "UTF-16 text, not UTF-8"),
    ("UTF-16 without a mark", TEXT.encode("utf-16-le"), "UTF-16LE text, not UTF-8"),
    ("UTF-16BE without a mark", TEXT.encode("utf-16-be"), "UTF-16BE text, not UTF-8"),
    ("UTF-32", TEXT.encode("utf-32"), "UTF-32 text, not UTF-8"),
    ("array", f"[{','.join(GOOD)}]".encode(), "a JSON array, not JSON Lines"),
    ("array over lines", json.dumps(GOOD, indent=1).encode(), "a JSON array, not JSON Lines"),
    ("object over lines", json.dumps({"text": "x"}, indent=1).encode(), "JSON with line breaks inside its objects"),
    ("random", random.Random(1).randbytes(50_000), "binary data"),
    ("zeros", bytes(9_000), "binary data"),
    ("zip", zipped(LINES), "a zip archive"),
    ("tar", tarred(LINES), "a tar archive"),
    ("tar.gz", gzip.compress(tarred(LINES)), "a tar archive"),
    ("tar.zst", zstandard.compress(tarred(LINES)), "a tar archive"),
    ("tar.bz2", bz2.compress(tarred(LINES)), "a tar archive"),
    ("xz", lzma.compress(LINES), "an xz file"),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive"),
    ("parquet", b"PAR1" + bytes(50), "a Parquet file"),
]


@pytest.mark.parametrize(("data", "what"), [x[1:] for x in FOREIGN], ids=[x[0] for x in FOREIGN])
def test_a_file_of_something_else_is_refused_as_what_it_is(data: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path, "a.jsonl", data)
    assert str(tmp_path / "a.jsonl") in caught.value.where
    assert caught.value.fix


def test_text_that_only_looks_odd_is_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, "bom.jsonl", b"\xef\xbb\xbf" + LINES)[0]) == 20
    assert len(read(tmp_path, "one-bad.jsonl", b'{"text": "\xe9' + b"\x01" * 40 + b'"}\n' + LINES * 20)[0]) == 400


def test_a_file_that_is_one_document_is_judged_by_its_content_too(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfgood")
    (folder / "b.txt").write_bytes("ascii in UTF-16".encode("utf-16-le"))
    (folder / "c.txt").write_bytes("one\ntwo é".encode("latin-1"))
    separated = "x" + "日本語\x01" * 2_000  # control characters, and a character across the end of the head
    (folder / "d.txt").write_text(separated, encoding="utf-8")
    tally = Tally()
    spec = SourceSpec(name="s", domain="code", format="files", path="tree")
    assert list(read_source(spec, tmp_path, tally)) == ["good", separated]
    assert tally.rejected == {"UTF-16LE text, not UTF-8": 1, "invalid UTF-8": 1}
    assert tally.first_places["invalid UTF-8"] == "tree/c.txt (line 2)"


PACKED: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, zstandard.compress]


@pytest.mark.parametrize("pack", PACKED, ids=["gzip", "bzip2", "zstandard"])
def test_compressed_files_are_read_whole_and_refused_when_damaged(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    whole = pack(LINES * 50) + pack(b'{"text": "from a second stream"}\n')
    texts, _ = read(tmp_path, "a.data", whole)
    assert texts == [f"document {n}" for n in range(20)] * 50 + ["from a second stream"]
    rng = random.Random(3)
    for end in (*rng.sample(range(1, len(whole)), 10), len(whole) - 1):
        if end == len(pack(LINES * 50)):
            continue  # a border of streams
        with pytest.raises(DataError) as caught:
            read(tmp_path, "a.data", whole[:end])
        assert str(tmp_path / "a.data") in caught.value.where
    with pytest.raises(DataError, match="damaged or cut"):
        read(tmp_path, "a.data", whole + b"garbage")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
def test_a_flipped_bit_is_never_read_as_another_text(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Both carry checksums of their content; a header's time stamp and name may differ without any harm."""
    whole, rng = pack(LINES * 50), random.Random(4)
    for _ in range(60):
        place = rng.randrange(10, len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        with pytest.raises(DataError, match="damaged or cut"):
            read(tmp_path, "a.data", bytes(damaged))


def test_an_error_of_the_disk_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read a file: No such file"):
        list(open_lines(tmp_path / "gone.jsonl"))


def test_a_line_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(LINES + b"x" * (2**20 + 1))
    with pytest.raises(DataError, match="the line is longer than 1 MiB") as caught:
        list(open_lines(tmp_path / "a.jsonl"))
    assert caught.value.where.endswith("a.jsonl:21")


def test_text_inside_an_object_is_named_with_a_dot(tmp_path: Path) -> None:
    record = b'{"meta": {"text": "inside"}, "meta.text": "outside"}\n'
    assert read(tmp_path, "a.jsonl", record, text_field="meta.text")[0] == ["outside"]
    assert read(tmp_path, "a.jsonl", b'{"meta": {"text": "inside"}}\n', text_field="meta.text")[0] == ["inside"]
    _, tally = read(tmp_path, "a.jsonl", b'{"meta": "x"}\n', text_field="meta.text")
    assert tally.rejected == {"no field 'meta.text'": 1}


def test_parquet_names_the_columns_that_hold_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [1, 2], "meta": [{"text": "inside", "n": 1}, {"text": None, "n": 2}]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    texts, tally = read(tmp_path, "a.parquet", data, format="parquet", text_field="meta.text")
    assert texts == ["inside"]
    assert tally.first_places == {"null text": "a.parquet, row 2"}
    for column, says in (
        ("meta", "is a struct"),
        ("id", "holds int64, not text"),
        ("text", "there is no column 'text'"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            read(tmp_path, "a.parquet", data, format="parquet", text_field=column)
        assert caught.value.fix == 'set text_field = "meta.text" on this source'


def test_max_docs_reads_no_record_more(tmp_path: Path) -> None:
    texts, tally = read(tmp_path, "a.jsonl", LINES, max_docs=3)
    assert (len(texts), tally.records) == (3, 3)
