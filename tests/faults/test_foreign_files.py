"""Nothing of the user's is removed, renamed or overwritten: what m1 did not write is refused before the first byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.trees import tree

from m1_data.prepare.work_folder import refuse_foreign_folders
from m1_data.spec import SourceSpec
from m1_data.storage.ownership import refuse_to_replace, why_not_a_name
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError

SOURCE = '[[data.sources]]\nname = {name}\ndomain = "code"\nformat = "jsonl"\npath = {path}\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A person's folder: a project with its configuration, text, notes, links and other people's work beside it."""
    project = tmp_path / "project"
    for folder in ("data", "notes", "a/b", "empty"):
        (project / folder).mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("precious")
    texts = "".join(json.dumps({"text": f"document {n} " + "word " * 30}) + "\n" for n in range(200))
    (project / "data" / "raw.jsonl").write_text(texts)
    (project / "t.jsonl").write_text(texts)
    (project / "notes" / "plan.md").write_text("mine")
    (project / "notes" / "manifest.json").write_text("{}")
    (project / "a" / "b" / "deep.txt").write_text("mine too")
    (project / "file.txt").write_text("hi")
    (project / "link").symlink_to(tmp_path / "victim")
    return tmp_path


def configure(project: Path, *, name: str = "texts", out: str = "prepared", path: str = "t.jsonl") -> Path:
    config = project / "m1.toml"
    source = SOURCE.format(name=json.dumps(name), path=json.dumps(path))
    config.write_text(f'preset = "tiny"\n[tokenizer]\nvocab_size = 300\n[data]\nout = {json.dumps(out)}\n{source}')
    return config


def m1(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "m1cli", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)


NAMES = [
    "/etc/victim", "../../../victim", "..", ".", "a/b", "a\\b", "", "  ", ".hidden", "nul\x00here", "esc\x1b[31m", "x" * 300,
    "line\nbreak", "del\x7f",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[repr(name)[:24] for name in NAMES])
def test_a_source_has_a_plain_name(name: str, home: Path) -> None:
    assert why_not_a_name(name)
    config = configure(home / "project", name=name)
    before = tree(home)
    with pytest.raises(ConfigError, match="cannot be the name of a source") as caught:
        load_config(config)
    assert "data.sources.0.name" in caught.value.where
    assert tree(home) == before


@pytest.mark.parametrize("name", ["web-2024", "Wikipedia (en)", "a.b", "python_stdlib", "日本語"])
def test_ordinary_names_are_fine(name: str, home: Path) -> None:
    assert why_not_a_name(name) is None
    load_config(configure(home / "project", name=name))


OUTS = [
    "data",
    ".",
    "..",
    "notes",
    "a",
    "file.txt",
    "link",
    "../victim",
    "{home}",
    "x" * 300,
    "a/b",
    "notes/manifest.json",
]


@pytest.mark.parametrize("out", OUTS)
def test_data_is_not_prepared_into_a_folder_of_the_users(out: str, home: Path) -> None:
    project = home / "project"
    configure(project, out=out.format(home=home))
    before = tree(home)
    done = m1(project, "prepare-data")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "data.out" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(home) == before


def test_prepared_data_is_replaced_only_while_it_holds_nothing_else(home: Path) -> None:
    project = home / "project"
    configure(project)
    assert m1(project, "prepare-data").returncode == 0
    assert m1(project, "prepare-data", "--set", "data.verify_docs=3").returncode == 0, "ours is replaced"
    assert (project / "prepared.previous" / "manifest.json").is_file()
    (project / "prepared.previous" / "notes.txt").write_text("mine")
    before = tree(home)
    refused = m1(project, "prepare-data", "--set", "data.verify_docs=4")
    assert refused.returncode == 2
    assert "notes.txt" in refused.stderr
    assert tree(home) == before
    source = SourceSpec(name="s", domain="code", format="jsonl", path="prepared.previous/raw.jsonl")
    (project / "prepared.previous" / "raw.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match="read from inside the folder"):
        refuse_foreign_folders(project / "prepared", [source], project)


def test_an_empty_folder_may_be_used(home: Path) -> None:
    refuse_to_replace(home / "project" / "empty", what="out", marked=False, ours=(), fix="")
    refuse_to_replace(home / "project" / "missing", what="out", marked=False, ours=(), fix="")
