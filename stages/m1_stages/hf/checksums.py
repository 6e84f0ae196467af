"""``SHA256SUMS`` of an export, as ``sha256sum`` writes and checks it: every byte of every file of the export counts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from m1_data.storage.durable import flush
from m1_stages.checkpoint.files import sha256_of
from m1_stages.errors import CheckpointError

SUMS = "SHA256SUMS"
FIX = "do not use this export; write it again with --overwrite"


def write_sums(folder: Path) -> None:
    """Write the hashes of all files that are in ``folder`` by now.

    Raises:
        OSError: the disk is full or failing.
    """
    lines = (_line(folder, path.name) for path in sorted(folder.iterdir()))
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    flush(folder / SUMS)


def refuse_changed(folder: Path, names: Iterable[str]) -> None:
    """Compare ``SHA256SUMS`` with the files ``names`` in ``folder``, which are all that an export has besides it.

    Raises:
        CheckpointError: names the first file that is changed or missing, or that ``SHA256SUMS`` itself is damaged.
    """
    path = folder / SUMS
    try:
        written = path.read_bytes()
    except OSError as error:
        what = f"the hashes of the export's files cannot be read: {error.strerror} (versions up to 0.1 wrote none)"
        raise CheckpointError(what, where=str(path), fix=FIX) from error
    lines = written.splitlines(keepends=True)
    for name in sorted(names):
        try:
            line = _line(folder, name).encode()
        except OSError as error:
            raise CheckpointError(
                f"a file of the export cannot be read: {error.strerror}", where=str(folder / name), fix=FIX
            ) from error
        if line not in lines:
            what = f"the file is not what was written: {SUMS} does not have its SHA-256, {line.decode().split()[0]}"
            raise CheckpointError(what, where=str(folder / name), fix=FIX)
        lines.remove(line)
    if lines:
        raise CheckpointError(f"the file is damaged: it has the line {lines[0]!r} too much", where=str(path), fix=FIX)


def _line(folder: Path, name: str) -> str:
    return f"{sha256_of(folder / name)}  {name}\n"
