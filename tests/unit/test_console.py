"""What is printed can neither command a terminal nor end a command: control characters, closed pipes, full disks."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from m1_stages.errors import ConfigError
from m1cli import console as module
from m1cli.console import Stream, _SafeConsole, visible
from m1cli.errors import show
from m1cli.library_notes import hide_library_notes

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\rd\x9b31me\u202ef\x00g\x7fh\udcff"
SHOWN = r"a\x1b]0;title\x07b\x1b[2Jc\x0dd\x9b31me\u202ef\x00g\x7fh\xff"
COMMAND = re.compile("\x1b\\[[0-9;]*m")
"""The colours of Rich itself."""


def printed(*what: object, terminal: bool = False) -> str:
    file = io.StringIO()
    console = _SafeConsole(
        Stream("stdout"), width=300, force_terminal=terminal, color_system="standard", no_color=not terminal
    )
    console.file = file
    console.print(*what)
    return file.getvalue()


def test_control_characters_are_shown_as_escapes() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("two\nlines\tand 日本語 é") == "two\nlines\tand 日本語 é"
    assert visible(os.fsdecode(b"nonutf\xff8")) == r"nonutf\xff8"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_way_of_printing_lets_one_through(terminal: bool) -> None:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for what in (
        HOSTILE,
        escape(HOSTILE),
        Text(HOSTILE),
        table,
        Panel(HOSTILE, title=HOSTILE),
        f"[bold]{escape(HOSTILE)}[/]",
    ):
        text = COMMAND.sub("", printed(what, terminal=terminal))
        assert r"\x1b]0;title" in text
        assert visible(text) == text


@given(st.text(alphabet=st.characters(), max_size=40))
def test_whatever_a_name_holds(name: str) -> None:
    text = printed(escape(name))
    assert visible(text) == text


def test_errors_are_shown_in_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    show(ConfigError(f"no {HOSTILE}", where=HOSTILE, fix=HOSTILE))
    shown = capsys.readouterr().err
    assert shown.count(SHOWN) == 3
    assert visible(shown) == shown


def test_names_are_not_turned_into_pictures() -> None:
    assert printed("a :smile: b") == "a :smile: b\n"


def test_an_encoding_without_a_character_shows_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    Stream("stdout").write("é ✓ a")
    assert raw.getvalue() == rb"\xe9 \u2713 a"


def test_a_stream_that_fails_is_remembered_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        stream = Stream("stdout")
        stream.write("a")
        stream.flush()
        assert stream.failure is not None
        assert stream.failure.strerror == "No space left on device"
        stream.write("b")
    assert module.console.stream.failure is None


def test_a_live_panel_on_a_terminal_writes_to_the_terminal() -> None:
    code = (
        "from rich.live import Live\nfrom m1cli.console import console\n"
        "with Live('panel', console=console, refresh_per_second=50):\n"
        "    console.print('line')\n    print('of a library')\n"
    )
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=end, stderr=end, env={**os.environ, "TERM": "xterm"}
    )
    os.close(end)
    assert process.wait(timeout=30) == 0
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert all(text in shown for text in ("panel", "line", "of a library"))


def command(arguments: str, folder: Path, redirect: str) -> subprocess.CompletedProcess[str]:
    (folder / "m1.toml").write_text('preset = "tiny"\n')
    line = f"{sys.executable} -m m1cli {arguments} {redirect}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [("| head -1", 0, ""), ("> /dev/full", 3, "standard output cannot be written: No space left"), (">&-", 0, ""),
     ("2>&- >&-", 0, ""), ("<&- >&- 2>&-", 0, "")],
)  # fmt: skip
def test_a_reader_that_left_is_no_error_and_a_full_disk_one_line(
    redirect: str, code: int, says: str, tmp_path: Path
) -> None:
    done = command("config show", tmp_path, redirect)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) <= 2 * bool(says), done.stderr


def test_the_command_line_is_repeated_in_escapes(tmp_path: Path) -> None:
    for arguments in ("pretrain $'--bad\\x1b[31m'", "$'bad\\x1b[31m'", "pretrain --stage $'x\\x1b[31m'"):
        done = command(arguments, tmp_path, "")
        assert done.returncode == 2
        assert r"\x1b[31m" in done.stderr
        assert "\x1b" not in done.stderr


STOPPED = """
import sys, time
import typer
from m1_stages.runtime.signals import leaving_with_its_own_exit_code
from m1cli.errors import reported
with leaving_with_its_own_exit_code():
    try:
        with reported(debug=False):
            try:
                print("ready", flush=True)
                time.sleep(60)
            except Exception:
                print("swallowed")
            finally:
                print("cleaned up", flush=True)
    except typer.Exit as left:
        sys.exit(left.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_command_cleans_up_and_says_one_line(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.send_signal(number)  # the group and the process, as batch systems do
    out, err = process.communicate(timeout=20)
    assert out == "cleaned up\n"
    assert f"stopped on {number.name}" in err
    assert "run the same command again" in err
    assert process.returncode == 75
    assert "Traceback" not in err


def test_a_signal_while_python_leaves_changes_nothing() -> None:
    code = "import atexit, os, signal, sys\nfrom m1_stages.runtime.signals import leaving_with_its_own_exit_code\n" \
        "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n        kill(pid, 15)\n" \
        "sys.late = Late()\n" \
        "with leaving_with_its_own_exit_code():\n    sys.exit(75)\n"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 75
    without = code.replace("with leaving_with_its_own_exit_code():\n    ", "")
    assert subprocess.run([sys.executable, "-c", without], timeout=60).returncode == -15


def test_nohup_lets_a_command_outlive_its_terminal() -> None:
    code = "import signal\nfrom m1_stages.runtime.signals import StopRequest\n" \
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" \
        "with StopRequest() as stop:\n    signal.raise_signal(signal.SIGHUP)\n    assert not stop.received\n" \
        "    signal.raise_signal(signal.SIGTERM)\n    assert stop.received == 'SIGTERM'\n"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_notes_of_libraries_are_hidden_and_their_errors_are_not() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_library_notes()
        for module in ("megatron.core.models.backends", "m1_stages.model"):
            warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module=module)
        for package in ("megatron", "m1_stages"):
            compile("'\\-'", f"/site/{package}/core/file.py", "eval")
    assert [str(warning.message) for warning in seen[:1]] == ["from m1_stages.model"]
    assert [warning.filename for warning in seen[1:]] == ["/site/m1_stages/core/file.py"]
    for name in ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension"):
        shown = [logging.getLogger(name).isEnabledFor(level) for level in (logging.WARNING, logging.ERROR)]
        assert shown == [False, True], name
