"""Commands and odd output paths: a new place, or exit code 2 with the option; never a changed byte of what was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trees import tree

from m1_data.prepare.work_folder import refuse_foreign_folders
from m1_data.storage.ownership import write_whole
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError, DataError
from m1_stages.run_dir import refuse_foreign_run_dir
from m1cli import demo_corpus
from m1cli.commands import demo
from m1cli.commands.config import init_command
from m1cli.commands.launch import slurm_command
from m1cli.report.html import write_report

RUN = '{"event":"RunStopped","time":1.0,"reason":"done","exit_code":0}\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder: a project with a run, notes and links; other people's work beside it."""
    project = tmp_path / "project"
    for folder in ("data/raw", "a", "empty", "run/checkpoints/step_00000001"):
        (project / folder).mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (project / "m1.toml").write_text('preset = "tiny"\n')
    (project / "run" / "metrics.jsonl").write_text(RUN)
    (project / "run" / "checkpoints" / "step_00000001" / "weights").write_text("long trained")
    for name in ("data/raw/text.jsonl", "file", "a/deep.txt", "metrics.jsonl", "../victim/thesis.txt"):
        (project / name).write_text("precious")
    (project / "link").symlink_to(tmp_path / "victim")
    (project / "filelink").symlink_to(tmp_path / "victim" / "thesis.txt")
    (project / "lost").symlink_to(tmp_path / "victim" / "nothing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(project)
    return tmp_path


def _init(path: str) -> None:
    init_command(Path(path), "tiny")


def _launch(path: str) -> None:
    sizes = {"nodes": 1, "gpus_per_node": 1, "save_before_s": 60}
    slurm_command(["sft"], **sizes, out=Path(path), container=None, options={}, extra=[])  # type: ignore[arg-type]


def _report(path: str) -> None:
    """The page itself needs a run with steps; only where it goes matters here."""
    try:
        write_report(Path("nowhere"), None, Path(path))
    except DataError:
        write_whole(Path(path), "page")


def _demo(path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_run", lambda folder, arguments: None)
        patch.setattr(demo_corpus, "write_demo", lambda folder: write_whole(folder / "m1.toml", "demo"))
        demo.demo_command(Path(path))


def _data_out(path: str) -> None:
    out = load_config(Path("m1.toml"), [f"data.out={json.dumps(path)}"])
    folder = out.path(out.config.data.out)
    refuse_foreign_folders(folder, (), out.base_dir)
    write_whole(folder / "manifest.json", "data")


def _run_dir(path: str) -> None:
    resolved = load_config(Path("m1.toml"), [f"run.dir={json.dumps(path)}"])
    refuse_foreign_run_dir(resolved.run_dir)
    resolved.run_dir.mkdir(parents=True, exist_ok=True)
    (resolved.run_dir / "checkpoints").mkdir(exist_ok=True)
    if not (resolved.run_dir / "metrics.jsonl").exists():
        (resolved.run_dir / "metrics.jsonl").write_text(RUN)


COMMANDS: dict[Callable[[str], None], str] = {
    _init: "FOLDER", _launch: "--out", _report: "--out", _demo: "--dir", _data_out: "data.out", _run_dir: "run.dir",
}  # fmt: skip
NEW = {"new", "new/deep/er", "empty"}
PATHS = [
    *sorted(NEW), "{home}/project/a", "..", ".", "a/b", "link", "link/new", "filelink", "lost", "lost/new", "file", "file/new",
    "run", "run/checkpoints", "{home}", "~", "data", "nul\x00here", "esc\x1b[31m", "x" * 300, "line\nbreak", "",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=[repr(path)[:20] for path in PATHS])
@pytest.mark.parametrize("command", COMMANDS, ids=[command.__name__[1:] for command in COMMANDS])
def test_a_new_place_or_a_refusal(command: Callable[[str], None], path: str, home: Path) -> None:
    place = path.format(home=home)
    before = tree(home)
    if refused := _refusal(command, place):
        assert refused.exit_code == 2
        assert COMMANDS[command] in f"{refused.what} {refused.where}", "the option or key is named"
        assert path not in NEW or (command in (_launch, _report) and path == "empty"), "a new place is fine"
        assert tree(home) == before
        return
    after = tree(home)
    assert {name: after[name] for name in before} == before, "nothing that was there changed"
    inside = Path(os.path.abspath(Path(place).expanduser() if command in (_data_out, _run_dir) else place)).resolve()
    made = [(home / name).resolve() for name in after.keys() - before.keys()]
    assert [name for name in made if not (inside == name or inside in name.parents or name in inside.parents)] == []
    assert not any("\x1b" in str(name) for name in made)


def _refusal(command: Callable[[str], None], path: str) -> ConfigError | None:
    try:
        command(path)
    except ConfigError as error:
        return error
    return None


def test_what_we_wrote_is_written_again(home: Path) -> None:
    _launch("m1.sbatch")
    _launch("m1.sbatch")
    Path("linked.sbatch").symlink_to("m1.sbatch")
    with pytest.raises(ConfigError, match="is a link"):
        _launch("linked.sbatch")
    for _ in range(2):
        _run_dir("run")
    with pytest.raises(ConfigError, match="another file of this name"):
        slurm_command(["pretrain", "--stage", "all"], nodes=2, gpus_per_node=1, save_before_s=60, out=Path("m1.sbatch"),
                      container=None, options={}, extra=[])  # fmt: skip
    Path("old.html").write_text('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
                                'content="width=device-width"><title>m1 run run</title>')  # fmt: skip
    _report("old.html")
    assert Path("old.html").read_text() == "page"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "rollbacks.json", "evaluation", "ranks"])
def test_a_run_directory_with_a_name_of_ours_that_is_not_ours_is_refused(name: str, home: Path) -> None:
    folder = home / "mixed"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    refuse_foreign_run_dir(folder)
    if name in ("checkpoints", "rollbacks.json"):
        (folder / name).mkdir()
        (folder / name / "photo.jpg").write_text("mine")
    else:
        (folder / name).write_text("mine\n")
    with pytest.raises(ConfigError, match=name):
        refuse_foreign_run_dir(folder)
