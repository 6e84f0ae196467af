"""Which files a source reads: folders whole, links once, and nothing left out without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from m1_data.errors import DataError
from m1_data.spec import SourceSpec
from m1_data.storage.source_files import SourceFiles, describe_left_out, find_files


def source(path: str, kind: str = "jsonl", **more: object) -> SourceSpec:
    return SourceSpec(**{"name": "s", "domain": "code", "format": kind, "path": path} | more)  # type: ignore[arg-type]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n')


def names(found: SourceFiles) -> list[str]:
    return [file.name for file in found.files]


def test_a_folder_is_read_with_its_sub_folders_and_every_ending(tmp_path: Path) -> None:
    fill(
        tmp_path / "f",
        "b.ndjson",
        "E.JSONL",
        "c.jsonl.bz2",
        "a.json.gz",
        "z/d.jsonl.zst",
        "lang=de/x.jsonl",
        "notes.MD",
    )
    fill(tmp_path / "f", "tool.py", "Makefile", ".hidden.jsonl", ".git/config.json")
    found = find_files(source("f"), tmp_path)
    assert names(found) == [
        "f/E.JSONL", "f/a.json.gz", "f/b.ndjson", "f/c.jsonl.bz2", "f/lang=de/x.jsonl", "f/z/d.jsonl.zst",
    ]  # fmt: skip
    assert found.left_out == {".md": 1, ".py": 1, "without an ending": 1, "hidden": 2}
    assert describe_left_out(found.left_out) == "2 hidden, 1 .md, 1 .py, 1 without an ending"


def test_trees_take_their_patterns_and_count_the_rest(tmp_path: Path) -> None:
    fill(tmp_path / "t", "a.py", "b.txt", "c.png", "tests/x.py", ".venv/lib.py")
    found = find_files(source("t", "files", exclude=("tests/*",)), tmp_path)
    assert names(found) == ["t/a.py", "t/b.txt"]
    assert found.left_out == {".png": 1, ".py": 1, "hidden": 1}


@pytest.mark.parametrize("pattern", ["f", "f/**", "f/*", "f/**/*", "f/**/*.jsonl", "**/*.jsonl", "f/../f"])
def test_no_pattern_reads_a_file_twice(pattern: str, tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl")
    if "*.jsonl" in pattern:
        fill(tmp_path / "f", ".hidden/d.jsonl", "sub/.e.jsonl")
    found = find_files(source(pattern), tmp_path)
    assert sorted(file.path.name for file in found.files) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert found.left_out == {}


def test_linked_files_and_folders_are_followed_and_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "f/real/a.jsonl", "elsewhere/b.jsonl", "blobs/1")
    links = {"f/0": "real", "f/linked": "../elsewhere", "f/again": "../elsewhere", "f/here": ".", "f/real/up": ".."}
    links |= {"f/c.jsonl": "../blobs/1", "f/0.jsonl": "real/a.jsonl"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    found = find_files(source("f"), tmp_path)
    assert names(found) == ["f/again/b.jsonl", "f/c.jsonl", "f/real/a.jsonl"], "its own name, rather than a link's"
    assert found.left_out == {"met before under another name": 5}
    assert names(find_files(source("f/**/a.jsonl"), tmp_path)) == ["a.jsonl"], "a circle of links ends"


def test_one_file_behind_two_hard_links_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.jsonl")
    os.link(tmp_path / "f" / "a.jsonl", tmp_path / "f" / "b.jsonl")
    found = find_files(source("f"), tmp_path)
    assert names(found) == ["f/a.jsonl"]
    assert found.left_out == {"met before under another name": 1}


def test_what_is_no_regular_file_is_refused_by_name_and_listed_in_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.txt")
    os.mkfifo(tmp_path / "f" / "pipe.txt")
    for path, kind in (("f/pipe.txt", "FIFO"), ("/dev/null", "device")):
        with pytest.raises(DataError, match=f"names a {kind}, and reads regular files only"):
            find_files(source(path), tmp_path)
    found = find_files(source("f", "files"), tmp_path)
    assert names(found) == ["f/a.txt"]
    assert found.left_out == {"FIFO (pipe.txt)": 1}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("x.tar.gz", "a tar archive"),
        ("x.TGZ", "a tar archive"),
        ("x.zip", "a zip archive"),
        ("x.7z", "a 7z archive"),
        ("a.jsonl.xz", "an xz file"),
        ("a.jsonl.lz4", "an lz4 file"),
    ],
)
def test_archives_in_a_folder_of_data_are_refused(name: str, what: str, tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.jsonl", f"sub/{name}")
    with pytest.raises(DataError, match=what) as caught:
        find_files(source("f"), tmp_path)
    assert caught.value.where.endswith(f"sub/{name}")
    assert names(find_files(source("f/**/*.jsonl"), tmp_path)) == ["a.jsonl"], "the change that the message names works"
    assert f'"{tmp_path}/f/**/*.jsonl"' in caught.value.fix
    assert names(find_files(source("f", "files", include=("*.jsonl",)), tmp_path)) == ["f/a.jsonl"]


def test_brackets_in_a_path_that_exists_are_no_pattern(tmp_path: Path) -> None:
    base = tmp_path / "run[1]"
    fill(base, "a[2].jsonl", "x[3]/b.jsonl", "x[3]/c.jsonl", "y1/d.jsonl")
    assert names(find_files(source("a[2].jsonl"), base)) == ["a[2].jsonl"]
    assert names(find_files(source("x[3]/*.jsonl"), base)) == ["b.jsonl", "c.jsonl"]
    assert names(find_files(source("y[12]"), base)) == ["y1/d.jsonl"], "any other bracket is one"
    assert names(find_files(source(str(base / "x[3]" / "[bc].jsonl")), tmp_path)) == ["b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("path", ["gone", "gone/*.jsonl", "~nobody-has-this-name/x", "nul\0byte", "bad\udce9name"])
def test_a_path_without_files_is_one_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no") as caught:
        find_files(source(path), tmp_path)
    str(caught.value).encode()


def test_a_folder_without_a_readable_file_names_what_it_has(tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.csv", "b.csv")
    with pytest.raises(DataError, match=r"left out there: 2 \.csv") as caught:
        find_files(source("f"), tmp_path)
    assert ".ndjson" in caught.value.fix


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "f", "a.jsonl")
    (tmp_path / "f" / "notes.md").symlink_to("nowhere")
    assert names(find_files(source("f"), tmp_path)) == ["f/a.jsonl"], "nobody asked for it"
    for target in ("nowhere", "b.jsonl"):
        (tmp_path / "f" / "b.jsonl").symlink_to(target)
        with pytest.raises(DataError, match="a link leads nowhere") as caught:
            find_files(source("f"), tmp_path)
        assert caught.value.where.endswith("f/b.jsonl")
        (tmp_path / "f" / "b.jsonl").unlink()


@pytest.mark.parametrize("pattern", ["f", "f/**/*.jsonl", "f/*/*.jsonl"])
def test_what_cannot_be_read_is_refused_by_name(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "f", "a.jsonl", "closed/b.jsonl", "open/c.jsonl")
    scandir, access = os.scandir, os.access

    def refuse(path: Path) -> object:  # root may read everything, so permissions are played
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot read a folder: Permission denied") as caught:
        find_files(source(pattern), tmp_path)
    assert caught.value.where == str(tmp_path / "f" / "closed")
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "c.jsonl" and access(path, mode))
    with pytest.raises(DataError, match="cannot read a file: no permission") as caught:
        find_files(source(pattern), tmp_path)
    assert caught.value.where == str(tmp_path / "f" / "open" / "c.jsonl")


def test_prepared_data_inside_a_source_is_not_text(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "data.partial/tokenizer.json", "data/tokenizer/tokenizer.json", "mine/manifest.json")
    (tmp_path / "data" / "manifest.json").write_text('{"fingerprint": "1", "bucket_edges_tokens": []}')
    (tmp_path / "data.partial" / "fingerprint").write_text("1")
    found = find_files(source("."), tmp_path)
    assert [file.path.relative_to(tmp_path).as_posix() for file in found.files] == ["a.jsonl", "mine/manifest.json"]
    assert found.left_out == {"prepared data of m1": 2}


def test_a_data_set_is_a_folder_at_the_configuration_or_a_name_of_the_hub(tmp_path: Path) -> None:
    fill(tmp_path / "ds", "train.jsonl", "more.arrow")
    assert names(find_files(source("ds", "datasets"), tmp_path)) == ["ds/more.arrow", "ds/train.jsonl"]
    assert find_files(source("org/name", "datasets"), tmp_path) == SourceFiles()
    with pytest.raises(DataError, match="has no files"):
        find_files(source("./gone", "datasets"), tmp_path)
