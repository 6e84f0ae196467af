"""What a file is, by its first bytes: text that can be read, or something else that is then named as what it is."""

from __future__ import annotations

import codecs
import stat
from dataclasses import dataclass

HEAD_BYTES = 4096
"""Bytes that ``foreign_content`` needs to see."""

_UNPACK = "unpack it, and name the files that hold the text"
_DECOMPRESS = "decompress it, or compress it again as .zst, .gz or .bz2"
_ELSEWHERE = "name the files that hold the text in the source's path"

_MAGICS: tuple[tuple[bytes, int, str, str], ...] = (
    (b"ustar", 257, "a tar archive", _UNPACK),
    (b"PK\x03\x04", 0, "a zip archive", _UNPACK),
    (b"PK\x05\x06", 0, "an empty zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", 0, "a rar archive", _UNPACK),
    (b"\xfd7zXZ\x00", 0, "an xz file", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", 0, "an lz4 file", _DECOMPRESS),
    (b"LZIP", 0, "an lzip file", _DECOMPRESS),
    (b"\x1f\x9d", 0, "a file of the old Unix compress", _DECOMPRESS),
    (b"PAR1", 0, "a Parquet file", 'set format = "parquet" on this source'),
    (b"ARROW1\x00\x00", 0, "an Arrow file", 'set format = "datasets" on this source, or write it as Parquet'),
    (b"SQLite format 3\x00", 0, "an SQLite database", _ELSEWHERE),
    (b"%PDF-", 0, "a PDF document", _ELSEWHERE),
)
_ARCHIVE_ENDINGS = {
    ".tar": "a tar archive", ".tgz": "a tar archive", ".tbz2": "a tar archive", ".txz": "a tar archive",
    ".zip": "a zip archive", ".7z": "a 7z archive", ".rar": "a rar archive", ".xz": "an xz file", ".lzma": "an lzma file",
    ".lz4": "an lz4 file", ".br": "a brotli file", ".lz": "an lzip file",
}  # fmt: skip
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_ZEROS = {
    "x000": "UTF-32LE",
    "000x": "UTF-32BE",
    "x0x0": "UTF-16LE",
    "0x0x": "UTF-16BE",
}
"""Which of the first four bytes are zero when ASCII characters are written in an encoding without a byte-order mark."""
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


@dataclass(frozen=True, slots=True)
class Foreign:
    """Content that is not read, and what to do about it."""

    what: str
    """A noun with its article, as in "a tar archive"."""
    fix: str


def foreign_content(head: bytes) -> Foreign | None:
    """Return what the file is whose first ``HEAD_BYTES`` bytes are ``head``; None when it may be UTF-8 text."""
    for magic, offset, what, fix in _MAGICS:
        if head.startswith(magic, offset):
            return Foreign(what, fix)
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    encoding = encoding or _ZEROS.get("".join("0" if byte == 0 else "x" for byte in head[:4]))
    if encoding:
        return Foreign(f"{encoding} text, not UTF-8", f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")
    if head.count(0) > len(head) // 10 or (_not_utf8(head) and _share_of_controls(head) > 0.05):
        return Foreign("binary data, not text", _ELSEWHERE)
    return None


def foreign_ending(name: str) -> Foreign | None:
    """Return what a file called ``name`` is when its ending says that it is an archive or compressed in a way not read."""
    endings = name.lower().split(".")[1:]
    if "tar" in endings[-2:]:
        return Foreign("a tar archive", _UNPACK)
    what = _ARCHIVE_ENDINGS.get(f".{endings[-1]}" if endings else "")
    return Foreign(what, _UNPACK if what.endswith("archive") else _DECOMPRESS) if what else None


def special_kind(mode: int) -> str | None:
    """Return what a file of this ``st_mode`` is when it is neither a regular file nor a folder."""
    kinds = ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
    return next((name for is_kind, name in kinds if is_kind(mode)), None)


def _not_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return False


def _share_of_controls(head: bytes) -> float:
    return 1 - len(head.translate(None, _CONTROLS)) / len(head)
