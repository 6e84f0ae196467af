"""Opens plain, gzip, bzip2 and zstandard files by their content, and refuses the ones that are cut or damaged.

A zstandard frame that is cut exactly at a line border decodes without any error in common readers; here the frame and
block headers (RFC 8878) are walked before the first byte is decoded, so a cut file is never taken for a short one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from m1_data.errors import DataError, shown
from m1_data.storage.content import HEAD_BYTES, foreign_content

MAX_LINE_BYTES = 2**30
_ZSTD = b"\x28\xb5\x2f\xfd"
_READ = 1 << 20


def compression_of(path: Path) -> str:
    """Return ``zstd``, ``gzip``, ``bzip2`` or ``plain``, judged by the first bytes.

    Raises:
        DataError: the file is empty and its name says that it is compressed.
    """
    with path.open("rb") as file:
        head = file.read(4)
    suffix = path.suffix.lower()
    if not head and suffix in (".zst", ".gz", ".bz2"):
        raise DataError(
            f"the file is empty: not even a {suffix} frame", where=shown(path), fix="copy or download it again"
        )
    if head == _ZSTD or _is_skippable(head):
        return "zstd"
    if head[:3] == b"BZh":
        return "bzip2"
    return "gzip" if head[:2] == b"\x1f\x8b" else "plain"


def open_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of ``path``, decompressed and without their line ends, in bounded memory.

    A line may be a document of hundreds of megabytes, so nothing here keeps one that has been handed out.

    Raises:
        DataError: a file that cannot be read, is cut or damaged (with the number of complete lines before the damage), is
            no UTF-8 text but an archive, another encoding or binary, or has a line over ``MAX_LINE_BYTES``.
    """
    count = 0
    try:
        kind = compression_of(path)
        with path.open("rb", buffering=_READ) as raw:
            if foreign := foreign_content(_decompressed(raw, kind).read(HEAD_BYTES)):
                raise DataError(f"the file is {foreign.what}; it is not read", where=shown(path), fix=foreign.fix)
            raw.seek(0)
            stream = _decompressed(raw, kind)
            while stream.peek(1):
                yield _next_line(stream, f"{shown(path)}:{count + 1}", frames_of=path if kind == "zstd" else None)
                count += 1
        if kind == "zstd":
            check_zstd_frames(path)
    except (zstandard.ZstdError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read a file: {error.strerror}", where=shown(path), fix="mend it") from error
        raise DataError(
            f"the file is damaged or cut: {error}; {count} complete lines came before",
            where=shown(path),
            fix="copy or download it again, or take it out of the sources",
        ) from error


def _next_line(stream: io.BufferedReader, where: str, *, frames_of: Path | None) -> bytes:
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"the line is longer than {MAX_LINE_BYTES >> 20} MiB",
            where=where,
            fix="split the document, or check that the file is JSON Lines",
        )
    if frames_of and not line.endswith(b"\n"):
        check_zstd_frames(frames_of)
    return line.rstrip(b"\r\n")


def _decompressed(raw: IO[bytes], kind: str) -> io.BufferedReader:
    stream: Any = raw
    if kind == "zstd":
        decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
        stream = decoder.stream_reader(raw, read_size=_READ, read_across_frames=True, closefd=False)
    elif kind == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif kind == "bzip2":
        stream = _Bzip2(raw)
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, _READ)


class _Bzip2(io.RawIOBase):
    """The bytes of all streams of a bzip2 file. The standard library's reader takes a damaged second stream for the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._decoder = raw, bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            rest = b""
            if self._decoder.eof:
                rest = self._decoder.unused_data or self._raw.read(_READ)
                if not rest:
                    return 0
                self._decoder = bz2.BZ2Decompressor()
            elif self._decoder.needs_input:
                rest = self._raw.read(_READ)
                if not rest:
                    raise EOFError("the last bzip2 stream is incomplete")
            data = self._decoder.decompress(rest, len(buffer))
        buffer[: len(data)] = data
        return len(data)


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
