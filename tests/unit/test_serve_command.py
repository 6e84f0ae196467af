"""``m1 generate --serve`` as a person starts and ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.exporting import make_checkpoint, make_tokenizer, prepare_tokenizer
from typer.testing import CliRunner

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from m1_stages import packages
from m1_stages.errors import CheckpointError
from m1_stages.jobs.serving import run as serving_run
from m1cli.app import app as m1_app


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    make_checkpoint(root / "run", contexts={"128k": 160})
    prepare_tokenizer(root / "data", make_tokenizer(root / "tokenizer", "one two three four <think> five"))
    (root / "m1.toml").write_text('preset = "tiny"\n[run]\ndir = "run"\nthreads = 1\n[data]\nout = "data"\n')
    return root / "m1.toml"


def test_the_command_serves_until_ctrl_c(config: Path) -> None:
    command = [sys.executable, "-m", "m1cli", "generate", "-c", str(config), "--serve", "--port", "0", "--slots", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    ) as m1:
        assert m1.stdout is not None
        lines = [next(m1.stdout) for _ in range(2)]
        assert "step_00000010 (stage 128k), context 160, 2 answers at a time" in lines[0]
        address = lines[1].split("/v1")[0]
        assert address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps({"checkpoint": "newest"}).encode()
        loading = urllib.request.Request(f"{address}/v1/weights", body, {"content-type": "application/json"})
        assert json.load(opener.open(loading, timeout=30))["step"] == 10
        body = json.dumps(
            {"messages": [{"role": "user", "content": "two"}], "max_tokens": 4, "temperature": 0}
        ).encode()
        asking = urllib.request.Request(f"{address}/v1/chat/completions", body, {"content-type": "application/json"})
        assert json.load(opener.open(asking, timeout=30))["usage"]["completion_tokens"] == 4
        m1.send_signal(signal.SIGINT)
        rest = m1.stdout.read()
        assert (m1.wait(20), rest) == (130, "stopped\n")


def test_options_that_would_do_nothing_are_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (
        (["--serve", "--temperature", "0.5"], "--temperature has no effect with --serve"),
        (["--serve", "text"], "a prompt has no effect with --serve"),
        (["text", "--port", "9"], "--port needs --serve"),
    ):
        done = CliRunner().invoke(m1_app, ["generate", "-c", str(config), *given])
        assert (done.exit_code, message in " ".join(done.output.split())) == (2, True), done.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(m1_app, ["generate", "-c", str(config), "--serve", "--port", str(port)])
    message = f"no server can listen at 127.0.0.1:{port}: Address already in use"
    assert (done.exit_code, message in " ".join(done.output.split())) == (3, True), done.output
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    done = CliRunner().invoke(m1_app, ["generate", "-c", str(config), "--serve"])
    assert done.exit_code == 3
    assert "--serve needs starlette and uvicorn, not installed here" in " ".join(done.output.split())
    assert 'pip install "m1cli[serve]"' in done.output


def test_a_step_names_a_checkpoint_if_it_has_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = [
        SimpleNamespace(
            path=Path(name), meta=SimpleNamespace(global_step=step, extra={"model": name == "step_00000003"})
        )
        for name, step in (("step_00000012", 12), ("step_00000009-sft", 9), ("step_00000009", 9), ("step_00000003", 3))
    ]
    monkeypatch.setattr(serving_run, "CheckpointStore", lambda root: SimpleNamespace(committed=lambda: there))
    run: Any = SimpleNamespace(run_dir=Path("run"))
    for name, place in (("newest", 0), (12, 0), ("step_00000009", 2), ("step_00000009-sft", 1)):
        assert serving_run._named(run, name, there[0]) is there[place]
    for name, message in (
        (9, "step_00000009-sft, step_00000009; name one"),
        (7, "no checkpoint 7"),
        (3, "another shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            serving_run._named(run, name, there[0])
