"""Files that people and programs wrote, damaged in one place: every command that reads them works, or says which file and why."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.mutations import mutated
from support.tiny_run import make_run
from support.trees import tree
from typer.testing import CliRunner

from m1_stages.checkpoint.manifest import MANIFEST, read_manifest
from m1_stages.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_ENVIRONMENT
from m1cli.app import app

PRETRAIN, REPORT, STAGES = ("pretrain", "--stage", "32k"), ("report",), ("stages", "--json")
SHOW, PLAN = ("config", "show"), ("plan",)
COMMANDS = (SHOW, STAGES, PLAN, REPORT, PRETRAIN)
CHECKPOINT = "run/checkpoints/step_00000004"
FILES = {
    "m1.toml": COMMANDS,
    "run/metrics.jsonl": (PLAN, REPORT),
    "run/rollbacks.json": (PRETRAIN,),
    "run/evaluation/32k.json": (STAGES, PRETRAIN),
    f"{CHECKPOINT}/{MANIFEST}": (STAGES, PRETRAIN),
    "data/manifest.json": (REPORT, PRETRAIN),
}
"""The files, and the commands that read each of them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with a finished stage that was evaluated and rolled back; its events say that it ran on a GPU."""
    folder, threads = tmp_path_factory.mktemp("finished"), torch.get_num_threads()
    config = make_run(folder)
    text = config.read_text().replace("[model]", "[model]\nnum_layers = 2\nsoftmax_every = 2")
    text = text.replace("enabled = false", "samples = 1\ndocuments = 1\nlengths = [0.5]\ndepths = [0.5]").replace(
        "tokens = 6144", "tokens = 4096", 1
    )
    config.write_text(text.replace("[data]", "[data]\nheld_out = 2"))
    for command in (("prepare-data",), PRETRAIN):
        done = CliRunner().invoke(app, [*command, "-c", str(config)])
        assert done.exit_code == 0, done.output
    rolled_back = {
        "stage": "32k", "data_fingerprint": read_manifest(folder / CHECKPOINT).meta.data_fingerprint, "to_global_step": 2,
        "excluded_steps": [2, 3], "reason": "spike", "ramp_progress": 0.5,
    }  # fmt: skip
    (folder / "run" / "rollbacks.json").write_text(json.dumps([rolled_back, rolled_back], indent=1))
    metrics = folder / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"device":"cpu"', '"device":"cuda"'))
    yield folder
    torch.set_num_threads(threads)


def outcome(project: Path, name: str, command: tuple[str, ...]) -> int:
    """The exit code of ``command`` with ``name`` damaged; what it prints and what it leaves is checked."""
    before, damaged = tree(project / "run" / "checkpoints"), (project / name).read_bytes()
    done = CliRunner().invoke(app, [*command, "-c", str(project / "m1.toml")])
    context = f"{command} with {name}: {damaged[:3000]!r}\n{done.output}\n{done.exception!r}"
    assert done.exit_code in (0, EXIT_CONFIG, EXIT_ENVIRONMENT, EXIT_DATA, EXIT_CHECKPOINT), context
    assert "\x1b" not in done.output, context
    assert "Traceback" not in done.output, context
    if done.exit_code:
        said = done.output.replace("\n", "")
        assert Path(name).name in said or ", key " in said or "where: key " in said or Path(CHECKPOINT).name in said, (
            context
        )
        assert "to do: " in said, context
    after = tree(project / "run" / "checkpoints")
    if name.endswith(MANIFEST):  # renamed as unusable, and otherwise left as it is
        before, after = ({str(n): v for n, v in enumerate(sorted(t.values()))} for t in (before, after))
    assert after == before, context
    return done.exit_code


def outcomes(
    finished: Path, project: Path, name: str, commands: tuple[tuple[str, ...], ...], count: int
) -> Counter[int]:
    """The exit codes of ``commands`` with ``count`` mutations of one file, each in an otherwise whole project."""
    codes: Counter[int] = Counter()
    whole = tree(finished)
    shutil.copytree(finished, project)
    for seed in range(count):
        for command in commands:
            (project / name).write_bytes(mutated((finished / name).read_bytes(), random.Random(seed)))
            codes[outcome(project, name, command)] += 1
            if {n: v for n, v in tree(project).items() if n != name} != {n: v for n, v in whole.items() if n != name}:
                shutil.rmtree(project)
                shutil.copytree(finished, project)
    return codes


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, finished: Path, tmp_path: Path) -> None:
    codes = outcomes(finished, tmp_path / "project", name, FILES[name], 8)
    assert sum(codes.values()) - codes[0] > 0, "some damage is refused"


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_three_hundred_mutations_through_every_command(name: str, finished: Path, tmp_path: Path) -> None:
    codes = outcomes(finished, tmp_path / "project", name, COMMANDS, 60)
    assert sum(codes.values()) == 300
    assert 0 < codes[0] < 300
