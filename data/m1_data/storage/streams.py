"""Opens plain, gzip and zstandard files by their content, and refuses the ones that are cut or damaged.

A zstandard frame that is cut exactly at a line border decodes without any error in common readers; here the frame and
block headers (RFC 8878) are walked before the first byte is decoded, so a cut file is never taken for a short one.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from m1_data.errors import DataError

MAX_LINE_BYTES = 256 * 2**20
_ZSTD = b"\x28\xb5\x2f\xfd"
_READ = 1 << 20


def compression_of(path: Path) -> str:
    """Return ``zstd``, ``gzip`` or ``plain``, judged by the first bytes.

    Raises:
        DataError: the file is empty and its name says that it is compressed.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if not head and path.suffix in (".zst", ".gz"):
        raise DataError(
            f"the file is empty: not even a {path.suffix} frame", where=str(path), fix="copy or download it again"
        )
    if head == _ZSTD or _is_skippable(head):
        return "zstd"
    return "gzip" if head[:2] == b"\x1f\x8b" else "plain"


def open_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of ``path``, decompressed and without their line ends, in bounded memory.

    Raises:
        DataError: a cut or damaged file (with the number of complete lines before the damage), or a line over
            ``MAX_LINE_BYTES``.
    """
    count = 0
    try:
        for line in _lines(path):
            count += 1
            yield line
        kind = compression_of(path)
        if kind == "zstd":
            check_zstd_frames(path)
    except (zstandard.ZstdError, EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(
            f"the file is damaged or cut: {error}; {count} complete lines came before",
            where=str(path),
            fix="copy or download it again, or take it out of the sources",
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    kind = compression_of(path)
    with path.open("rb") as raw:
        stream: IO[bytes]
        if kind == "zstd":
            decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
            stream = io.BufferedReader(decoder.stream_reader(raw, read_size=_READ, read_across_frames=True), _READ)
        else:
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ) if kind == "gzip" else raw
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB",
                    where=f"{path}:{number}",
                    fix="split the document, or check that the file is JSON Lines",
                )
            if not line.endswith(b"\n") and kind == "zstd":
                check_zstd_frames(path)
            yield line.rstrip(b"\r\n")


def check_zstd_frames(path: Path) -> None:
    """Walk all frames and blocks of a zstandard file without decoding.

    Raises:
        EOFError: a frame is incomplete, or something that is no frame follows the last one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            start = file.tell()
            magic = file.read(4)
            if _is_skippable(magic):
                file.seek(int.from_bytes(file.read(4), "little"), io.SEEK_CUR)
            elif magic == _ZSTD:
                _walk_frame(file)
            else:
                raise EOFError(f"no zstandard frame at byte {start}")
            if file.tell() > size:
                raise EOFError(f"the zstandard frame at byte {start} is incomplete")


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and 0x184D2A50 <= int.from_bytes(magic, "little") <= 0x184D2A5F


def _walk_frame(file: IO[bytes]) -> None:
    descriptor = _take(file, 1)[0]
    single_segment = descriptor >> 5 & 1
    has_checksum = descriptor >> 2 & 1
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    _take(file, (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes)
    last = 0
    while not last:
        header = int.from_bytes(_take(file, 3), "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        file.seek(1 if kind == 1 else size, io.SEEK_CUR)
    file.seek(4 * has_checksum, io.SEEK_CUR)


def _take(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError("the last zstandard frame is incomplete")
    return data
