"""``m1 generate`` as a person uses it: answers on the terminal and in files, and one clear message for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.exporting import make_checkpoint, make_tokenizer, prepare_tokenizer
from typer.testing import CliRunner, Result

from m1_stages.generation import Engine
from m1cli.app import app
from m1cli.console import console

CONTEXT = 160


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a final checkpoint of stage 128k, and prepared data with its tokenizer."""
    root = tmp_path_factory.mktemp("generate")
    make_checkpoint(root / "run", contexts={"32k": 80, "128k": CONTEXT})
    prepare_tokenizer(root / "data", make_tokenizer(root / "tokenizer", "one two three four <think> five"))
    (root / "m1.toml").write_text('preset = "tiny"\n[run]\ndir = "run"\nthreads = 1\n[data]\nout = "data"\n')
    return root / "m1.toml"


def m1(config: Path, *arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", "-c", str(config), *map(str, arguments)], input=stdin)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_go_to_a_file_and_do_not_depend_on_the_slots(config: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "one two", "id": "a"}\n{"messages": [{"role": "user", "content": "<think> four"}]}\n{"prompt": "three"}\n'
    )
    more = ["--prompts", tmp_path / "p.jsonl", "--max-tokens", 20, "-n", 2, "--top-p", 0.9, "--seed", 4]
    found = []
    for slots in (6, 1):
        out = tmp_path / f"{slots}.jsonl"
        done = m1(config, *more, "--out", out, "--slots", slots)
        assert done.exit_code == 0, done.output
        assert f"6 of 6 answers in {out}" in done.output.replace("\n", "")
        found.append(sorted(lines(out), key=lambda line: (line["prompt"], line["sample"])))
    for a, b in zip(*found, strict=True):
        assert a["logprobs"] == pytest.approx(b.pop("logprobs"), abs=1e-4)
        assert {**a, "logprobs": 0} == {**b, "logprobs": 0}
    first, second, chat, *_ = found[0]
    assert (first["id"], first["sample"], second["sample"], first["checkpoint"]) == ("a", 0, 1, "step_00000010")
    assert first["tokens"] != second["tokens"]
    assert first["completion_tokens"] == len(first["tokens"]) == len(first["logprobs"]) <= 20
    assert "id" not in chat
    assert chat["prompt_tokens"] > 20, "the template is around it"
    assert m1(config, *more, "--out", tmp_path / "6.jsonl").exit_code == 2, "an existing file is not replaced"
    assert m1(config, *more[:2], "--max-tokens", 1, "--out", tmp_path / "6.jsonl", "--overwrite").exit_code == 0
    assert len(lines(tmp_path / "6.jsonl")) == 3


def test_one_answer_is_streamed(config: Path, tmp_path: Path) -> None:
    asked = ["one two three", "--max-tokens", 30, "--temperature", 0]
    assert m1(config, *asked, "--out", tmp_path / "a.jsonl").exit_code == 0
    (written,) = lines(tmp_path / "a.jsonl")
    done = m1(config, *asked)
    assert done.exit_code == 0
    shown = done.stdout.removesuffix("\n")
    assert shown == "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in written["text"]
    )
    assert m1(config, "-", *asked[1:], stdin="one two three\n").stdout == done.stdout
    several = m1(config, "one two three", "four", *asked[1:], "--samples", 2).stdout
    assert several.count("sample 2") == 2
    assert several.count(shown) == 2


def test_a_thinking_budget_and_stop_strings(config: Path, tmp_path: Path) -> None:
    asked = ["one two", "--max-tokens", 40, "--temperature", 0, "--min-tokens", 40]
    m1(config, *asked, "--out", tmp_path / "a.jsonl")
    (free,) = lines(tmp_path / "a.jsonl")
    assert (free["finish_reason"], free["forced_tokens"]) == ("length", [0, 0])
    end = free["text"][12:15]
    m1(config, *asked[:-2], "--stop", end, "--out", tmp_path / "b.jsonl")
    (stopped,) = lines(tmp_path / "b.jsonl")
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", free["text"][: free["text"].index(end)])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "--stage", "2m"], 2, "there is no stage '2m'"),
        (["x", "--stage", "1m"], 5, "no final checkpoint of stage 1m (finished stages: 128k)"),
        (["x", "--checkpoint", "{tmp}/none"], 5, "{tmp}/none"),
        (["one", "--max-tokens", "500"], 2, "the answer up to 500, together more than the 160 of the context"),
        (["one", "--context", "20"], 2, "set --max-tokens 1"),
        (["x", "--prompts", "{tmp}/p.txt"], 2, "prompts on the command line and --prompts"),
        (["--prompts", "{tmp}/p.txt"], 4, "the file has no prompt"),
        (["--prompts", "{tmp}/p.jsonl"], 4, "{tmp}/p.jsonl:2"),
        ([""], 4, "the prompt is empty"),
        (["a\udcff"], 4, "not UTF-8"),
        (["x", "--context", "0"], 2, "'--context'"),
        (["x", "--out", "{tmp}"], 2, "this is a folder"),
        (["--prompts", "{tmp}/p.jsonl", "--out", "{tmp}/../{name}/p.jsonl", "--overwrite"], 2, "would replace the prompts"),
        (["x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["x", "--gpus", "2", "--prompts", "-"], 2, "prompts on the command line and --prompts"),
        (["-", "--gpus", "2"], 2, "several processes cannot share standard input"),
    ],
)  # fmt: skip
def test_mistakes(config: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "p.txt").write_text("\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": }\n')
    done = m1(config, *(a.format(tmp=tmp_path, name=tmp_path.name) for a in arguments))
    assert done.exit_code == code, done.output
    assert message.format(tmp=tmp_path) in done.output.replace("\n", " ").replace("  ", " ")


def test_a_damaged_checkpoint_is_named(config: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(config.parent / "run" / "checkpoints" / "step_00000010", tmp_path / "step_00000010")
    file = max(copied.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = m1(config, "x", "--checkpoint", copied, "--max-tokens", 1)
    assert done.exit_code == 5, done.output
    for text in (f"{file.name} is not what was written", str(copied), "use another checkpoint"):
        assert text in done.output.replace("\n", "")


def test_a_mistake_in_the_options_needs_no_torch(config: Path) -> None:
    code = (
        "import sys; from m1cli.app import app\n"
        f"try: app(['generate', '-c', {str(config)!r}, 'x', '--top-p', '2'])\n"
        "except SystemExit as e: assert e.code == 2, e.code\n"
        "print('LOADED', [m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("LOADED []"), done.stdout + done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_keeps_what_was_finished(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    whole, steps = Engine.step, []

    def step(engine: Engine) -> Any:
        steps.append(1)
        if len(steps) == 6:  # an answer takes four: its first step also reads the prompt
            os.kill(os.getpid(), number)
        return whole(engine)

    monkeypatch.setattr(Engine, "step", step)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    done = m1(config, "--prompts", tmp_path / "p.txt", "--max-tokens", 5, "--slots", 1, "--out", tmp_path / "a.jsonl")
    assert done.exit_code == code, done.output
    assert "1 of 3 answers" in done.output.replace("\n", " ")
    (kept,) = lines(tmp_path / "a.jsonl")
    assert kept["completion_tokens"] == 5


def test_no_byte_reaches_the_terminal_as_a_command(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "m1_stages.generation.prompts.PromptEncoder.decode", lambda self, ids: "\x1b[2J\u202e[bold]\\[\\" * len(ids)
    )
    shown = "\\x1b[2J\\u202e[bold]\\[\\" * 2 + "\n"
    assert m1(config, "one", "--max-tokens", 2).stdout == shown
    assert m1(config, r"\[on[e]", "one", "--max-tokens", 2).stdout == f"1 \\[on[e]\n{shown}2 one\n{shown}"


def test_it_ends_when_the_reader_of_its_answers_has_gone(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, steps = Engine.step, []
    monkeypatch.setattr(Engine, "step", lambda engine: steps.append(1) or whole(engine))
    broken = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(console.stream, "failure", broken)
    assert m1(config, "one", "--max-tokens", 50).exit_code == 0
    assert len(steps) == 1
