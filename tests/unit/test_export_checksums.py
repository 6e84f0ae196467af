"""``SHA256SUMS`` of an export: sha256sum reads it, and every change of a listed file or of the list is found."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from m1_stages.errors import CheckpointError
from m1_stages.hf.checksums import SUMS, refuse_changed, write_sums


def test_every_change_is_found(tmp_path: Path) -> None:
    for name in ("a", "b.json"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    names = ["a", "b.json"]
    refuse_changed(tmp_path, names)
    if tool := shutil.which("sha256sum"):
        assert subprocess.run([tool, "--check", "--strict", SUMS], cwd=tmp_path, capture_output=True).returncode == 0
    sums = (tmp_path / SUMS).read_bytes()
    assert len(sums.splitlines()) == 2

    def refused(message: str, where: str) -> None:
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            refuse_changed(tmp_path, names)
        assert caught.value.where == str(tmp_path / where)

    (tmp_path / "a").write_text("b")
    refused("the file is not what was written: SHA256SUMS does not have its SHA-256, 3e23e816", "a")
    (tmp_path / "a").write_text("a")
    for at in (0, 70, len(sums) - 1):
        (tmp_path / SUMS).write_bytes(sums[:at] + bytes([sums[at] ^ 1]) + sums[at + 1 :])
        refused("", "a" if at == 0 else "b.json")
    (tmp_path / SUMS).write_bytes(sums + sums[:1])
    refused("it has the line", SUMS)
    (tmp_path / SUMS).unlink()
    refused("cannot be read", SUMS)
    (tmp_path / SUMS).write_bytes(sums)
    (tmp_path / "b.json").unlink()
    refused("a file of the export cannot be read: No such file", "b.json")
