"""Atomic writes: the content arrives whole, and a failing disk leaves the old file and no temporary one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from m1_data.storage.durable import flush, write_atomically


def test_bytes_and_text_replace_the_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "grün\n")
    assert path.read_bytes() == b"gr\xc3\xbcn\n"
    write_atomically(path, b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"
    write_atomically(path, "")
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["state.json"]


def test_failing_disk_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    error = OSError(5, "Input/output error")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(path, "new")
    assert caught.value is error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "fresh.json", "new")
    assert os.listdir(tmp_path) == ["state.json"]


def test_file_is_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    flushed = []

    def record(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        flushed.append((kind, path.read_text()))

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(path, "new")
    assert flushed == [("file", "old"), ("folder", "new")]


def test_error_of_the_folder_flush_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def fail_on_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_flush_of_a_missing_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nowhere")
