"""The command line as a new user meets it: instant help, one clear message for every mistake, documented exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_run import make_run

from m1_stages.config import PRESETS
from m1_stages.config.load import load_config
from m1cli.pace import wall_time


def m1(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m1cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=200,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip


HEAVY = ("torch", "megatron", "transformers", "numpy", "pyarrow", "datasets")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["pretrain", "--help"], ["prepare-data", "--help"], ["sft", "--help"], ["export", "--help"], ["demo", "--help"],
     ["init", "{tmp}/new"], ["config", "show", "--config", "{tmp}/m1.toml"]],
    ids=lambda a: a[0] if len(a) == 1 else " ".join(a[:2]),
)  # fmt: skip
def test_answers_without_heavy_imports(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n')
    code = (
        "import sys; from m1cli.app import app\n"
        f"try: app({[a.format(tmp=tmp_path) for a in arguments]!r})\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-500:] + done.stderr[-500:]


@pytest.mark.parametrize("preset", PRESETS)
def test_init_writes_a_file_that_changes_nothing(preset: str, tmp_path: Path) -> None:
    done = m1("init", str(tmp_path / "run"), "--preset", preset)
    assert done.returncode == 0, done.stderr
    (tmp_path / "bare.toml").write_text(f'preset = "{preset}"\n')
    written = tmp_path / "run" / "m1.toml"
    assert load_config(written).sha256 == load_config(tmp_path / "bare.toml").sha256
    assert m1("init", str(tmp_path / "run")).returncode == 2, "an existing file is not replaced"
    # Every commented key, uncommented, is still valid and still changes nothing.
    text = written.read_text().replace("# [[data.sources]]", "")
    lines = [
        line[2:] if line.startswith("# ") and " = " in line and not _is_example(line) else line
        for line in text.splitlines()
    ]
    written.write_text("\n".join(lines))
    assert load_config(written).sha256 == load_config(tmp_path / "bare.toml").sha256


def _is_example(line: str) -> bool:
    return line[2:].split(" = ")[0] in (
        "name", "domain", "format", "path", "text_field", "include", "exclude", "split", "max_docs",
    ) and not line.startswith('# path = ""')  # fmt: skip


def test_config_show_names_the_origin(tmp_path: Path) -> None:
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n[run]\nseed = 7\n')
    done = m1("config", "show", "--set", "optim.grad_clip=0.5", cwd=tmp_path)
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines() if " = " in line}
    assert lines["run.seed"].split() == ["run.seed", "=", "7", "m1.toml:3"]
    assert lines["optim.grad_clip"].endswith("--set optim.grad_clip=0.5")
    assert lines["model.hidden_size"].endswith("preset tiny")
    values = json.loads(m1("config", "show", "--json", cwd=tmp_path).stdout)
    assert values["config"]["run"]["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "toml", "code", "says"),
    [
        (["pretrain", "--stage", "all"], None, 2, ["there is no configuration file", "m1 init"]),
        (["pretrain", "--stage", "all"], 'preset = "tiny"\n[run]\nsede = 3', 2, ["m1.toml:3", "run.sede", "did you mean seed?"]),
        (["pretrain", "--stage", "64k"], 'preset = "tiny"', 2, ["there is no stage '64k'", "32k, 128k"]),
        (["pretrain", "--stage", "all"], 'preset = "tiny"', 4, ["there is no prepared data", "m1 prepare-data"]),
        (["prepare-data"], 'preset = "tiny"', 4, ["there are no data sources", "[[data.sources]]"]),
        (["prepare-data"], 'preset = "tiny"\n[[data.sources]]\nname="a"\ndomain="code"\nformat="jsonl"\npath="nowhere.jsonl"',
         4, ["source 'a' has no files", "nowhere.jsonl"]),
        (["report"], 'preset = "tiny"', 4, ["this run has reported nothing yet"]),
        (["sft"], 'preset = "tiny"', 4, ["there is no prepared data"]),
        (["export"], 'preset = "tiny"', 5, ["there is no final checkpoint"]),
        (["export", "--verify-only", "nowhere"], 'preset = "tiny"', 2, ["there is no such folder", "nowhere"]),
        (["export", "--verify-only", ".", "--overwrite"], 'preset = "tiny"', 2, ["--verify-only writes nothing"]),
        (["pretrain", "--stage", "32k", "--set", "run.device=cuda"], "RUN", 3, ["torch sees no CUDA device"]),
        (["pretrain", "--stage", "256k"], "RUN", 5, ["starts from the final checkpoint of stage 128k", "--stage 128k"]),
        (["pretrain", "--stage", "32k", "--set", "curriculum.length_scale=0.01"], "RUN", 4, ["length_scale was 0.00390625"]),
        (["pretrain", "--stage", "32k", "--set", "model.vocab_size=100"], "RUN", 2, ["has 400 ids", "model.vocab_size"]),
        (["sft"], "RUN", 2, ["there are no conversations", "sft.data"]),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message(
    arguments: list[str], toml: str | None, code: int, says: list[str], tmp_path: Path, prepared: Path
) -> None:
    folder = prepared if toml == "RUN" else tmp_path
    if toml and toml != "RUN":
        (tmp_path / "m1.toml").write_text(toml)
    done = m1(*arguments, cwd=folder, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for part in says:
        assert part in done.stderr, done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_run(folder)
    return folder


def test_unwritable_run_directory(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = m1("pretrain", "--stage", "32k", "--set", f"run.dir={tmp_path}/file/run", cwd=prepared)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "run.dir cannot be used: not a directory" in done.stderr.lower()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_stop_saves_exits_75_and_the_same_command_continues(
    prepared: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "m1cli", "pretrain", "--stage", "32k", "--set", f"run.dir={tmp_path}/run",
               "--set", "stages.32k.tokens=16_384"]  # fmt: skip
    process = subprocess.Popen(command, cwd=prepared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "StepDone" in metrics.read_text()):
        assert time.monotonic() < deadline, "no step was made"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    done = subprocess.run(command, cwd=prepared, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "starts from its own step" in done.stdout
    assert "activations kept: recomputation is off on CPU" in done.stdout
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "StepDone"] == list(range(16))


def test_two_processes_are_started_and_train(prepared: Path, tmp_path: Path) -> None:
    done = m1(
        "pretrain", "--stage", "32k", "--set", "parallel.processes=2", "--set", "parallel.expert=2",
        "--set", f"run.dir={tmp_path}/run", "--set", "stages.32k.tokens=2048", cwd=prepared,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "starting 2 processes" in done.stdout
    started = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (started["world_size"], started["topology"]["ep"]) == (2, 2)
    assert started["saves"].startswith("while training waits: a copy of ")
    assert f"checkpoints are written {started['saves']}" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    stopped, steps_s = json.loads(lines[-1]), sum(json.loads(x)["step_s"] for x in lines if '"StepDone"' in x)
    assert stopped["event"] == "RunStopped"
    assert stopped["wall_s"].keys() == {"start", "join", "build", "data", "train", "save"}, "nothing was loaded"
    assert stopped["wall_s"]["train"] == pytest.approx(steps_s, rel=0.25, abs=0.3)
    assert f"wall time {wall_time(stopped['wall_s'])}" in " ".join(done.stdout.split())
    bad = m1("pretrain", "--stage", "32k", "--set", "parallel.processes=2", "--set", "parallel.expert=4", cwd=prepared)
    assert bad.returncode == 2
    assert "does not divide the 2 processes" in bad.stderr


def test_fine_tuning_starts_from_a_stage_and_says_so(prepared: Path, tmp_path: Path) -> None:
    """The tokenizer of the test data knows no chat; the shipped template is used."""
    chats = [
        {"messages": [{"role": "user", "content": f"{n} + 1 ?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(40)
    ]
    chats[7]["messages"][0]["content"] *= 1_000
    chats[8]["weight"] = 0  # type: ignore[assignment]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    options = ["--set", f"run.dir={tmp_path}/run", "--set", "stages.32k.tokens=2048", "--set", "sft.base_stage=32k",
               "--set", f'sft.data=["{tmp_path}/chats.jsonl"]', "--set", "sft.global_batch_tokens=1024",
               "--set", "sft.over_length=drop"]  # fmt: skip
    assert m1("pretrain", "--stage", "32k", *options, cwd=prepared).returncode == 0
    done = m1("sft", *options, cwd=prepared)
    assert done.returncode == 0, done.stderr
    assert "fine-tuning starts from weights and optimizer of the final 32k checkpoint" in done.stdout
    assert "38 of 40 conversations in" in done.stdout
    assert "1 ask for no training (weight 0, train false)" in done.stdout
    assert "1 of 40 conversations dropped: longer than a row (sft.over_length is drop)" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["event"] == "StepDone" and r["stage"] == "sft"]
    assert steps
    assert records[-1]["wall_s"]["load"] > 0, "the base's checkpoint"
    assert all(0 < r["trained_tokens"] < 1024 for r in steps), "only the assistant's tokens carry loss"
    checkpoints = tmp_path / "run" / "checkpoints"
    base = {path.name for path in checkpoints.iterdir() if (path / "MANIFEST.json").is_file() and _stage(path) == "32k"}
    assert base
    (tmp_path / "others.jsonl").write_text((tmp_path / "chats.jsonl").read_text().replace("+ 1 ?", "plus 1?"))
    saved = sorted(path.name for path in checkpoints.iterdir())
    for other, code, what in (
        (f'sft.data=["{tmp_path}/others.jsonl"]', 2, "sft.data"),
        ("sft.lr_peak=0.5", 2, "sft.lr_peak 0.001 -> 0.5: too late: fine-tuning is finished"),
    ):
        refused = m1("sft", *options, "--set", other, cwd=prepared)
        assert (refused.returncode, what in refused.stderr, "m1 sft --fresh" in refused.stderr) == (code, True, True), (
            refused.stderr
        )
    (tmp_path / "chats.jsonl").write_text((tmp_path / "others.jsonl").read_text())
    refused = m1("sft", *options, cwd=prepared)
    assert refused.returncode == 4
    assert "the conversations changed since fine-tuning was finished" in refused.stderr
    assert saved == sorted(path.name for path in checkpoints.iterdir())
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    again = m1("sft", "--fresh", *options, cwd=prepared)
    assert again.returncode == 0, again.stderr
    assert "fine-tuning starts from weights and optimizer of the final 32k checkpoint" in again.stdout
    assert base <= {path.name for path in checkpoints.iterdir()}, "pretraining is not put at risk"
    assert list(checkpoints.glob("step_*.before-1")), "the first fine-tuning is kept under another name"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["event"] == "StepDone" and r["stage"] == "sft"]
    assert losses == [r["loss"] for r in steps] * 2, "it was trained again, from the same weights"


def test_conversations_that_cannot_be_trained_end_with_exit_code_4(prepared: Path, tmp_path: Path) -> None:
    """Before a model is made."""
    turns = [{"role": "user", "content": "1 + 1 ?"}, {"role": "assistant", "content": "2"}]
    long = [{"role": "user", "content": "1" * 2_000}, turns[1]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, long, turns)))
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "hostile.jinja").write_text("{{ '%999999999d' % 1 }}")
    data = ["--set", f"run.dir={tmp_path}/run", "--set", f'sft.data=["{tmp_path}/chats.jsonl"]']
    for more, words in (
        (["sft.over_length=drop"], ("1 of 3 conversations would be dropped", "sft.max_dropped_share (now 0.1)")),
        (["sft.over_length=drop", "sft.max_dropped_share=0.4", f"sft.chat_template={tmp_path}/dated.jinja"],
         ("writes the present time", f"{tmp_path}/dated.jinja", "set sft.date")),
        ([f"sft.chat_template={tmp_path}/dated.jinja", 'sft.date="2026-01-31"'], ("no generation prompt",)),
        ([f"sft.chat_template={tmp_path}/hostile.jinja"], ("needs more than", f"{tmp_path}/hostile.jinja")),
    ):  # fmt: skip
        done = m1("sft", *data, *(part for key in more for part in ("--set", key)), cwd=prepared)
        assert done.returncode == 4, done.stderr
        for part in words:
            assert part in done.stderr.replace("\n", " "), (part, done.stderr)


def _stage(checkpoint: Path) -> str:
    return str(json.loads((checkpoint / "MANIFEST.json").read_text())["meta"]["stage"])
