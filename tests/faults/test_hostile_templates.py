"""Hostile chat templates: each is rendered or refused in little time and memory, with a reason that names the template."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from m1_data.chat.render_worker import MAX_MIB, MAX_SECONDS
from m1_data.chat.template import ChatTemplate, Job
from m1_data.errors import EXIT_DATA, DataError

MOST_SECONDS, MOST_MIB = 2.0, 512
START_SECONDS = 3.0
"""What the start of a process may take on a machine that has much else to do."""

HOSTILE = {
    "nested loops": "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}",
    "loops in filters": "{% for a in range(9) %}{% set b = range(99999)|map('string')|map('upper')|sort|list %}{% endfor %}" * 9,
    "centred": '{% set x = "a"|center(1500000000) %}ok',
    "percent format": '{{ "%999999999d" % 1 }}',
    "percent filter": '{{ "%999999999d"|format(1) }}',
    "brace format": '{{ "{:>999999999}".format(1) }}',
    "replace": '{% set x = "a"*30000000 %}{{ x|replace("a", "bbbbbbbbbbbbbbbbbbbbbbbb")|length }}',
    "lipsum": "{{ lipsum(n=3000) }}",
    "join": '{{ (["a"]*20000000)|join("b"*50)|length }}',
    "list and join": '{{ ("ab"*30000000)|list|join(",")|length }}',
    "wordwrap": '{{ ("a"*2000000)|wordwrap(1)|length }}',
    "urlize": '{{ ("a.de "*4000000)|title|urlize|length }}',
    "namespace doubles": '{% set n=namespace(x="ab") %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}',
    "namespace nests": "{% set n=namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(400) }}",
    "sum of lists": "{{ ([[1]*3000]*3000)|sum(start=[])|length }}",
    "long format of time": '{{ strftime_now("%Y"*300000)|length }}',
    "indented json": "{{ messages|tojson(indent=900000000) }}",
    "nested json": "{% set n=namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}",
    "sort and unique": "{% set a=range(99999)|list %}{% for i in a %}{% set b=a|sort|unique|list %}{% endfor %}ok",
    "group and batch": "{% for i in range(99999) %}{% set b=(range(99999)|batch(1)|list)|groupby(0)|list %}{% endfor %}",
    "range": "{{ range(999999999999)|list|length }}",
    "200 MB of output": "{% for i in range(200) %}{{ 'x'*1000000 }}{% endfor %}",
    "large numbers": "{% set n=namespace(x=99999999999) %}{% for i in range(60) %}{% set n.x = n.x*n.x %}{% endfor %}ok",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by a filter": "{{ messages|map(attribute='__class__')|list }}{{ (''|attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "another file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "reason of 200 MB": "{{ raise_exception('\\x1b[2J' ~ 'x'*30000000) }}",
    "deep brackets": "{{ " + "(" * 90_000 + "1" + ")" * 90_000 + " }}",
    "many brackets": "{{ " + "[" * 150 + "1" + "]" * 150 + " }}",
    "truncated block": "{% for m in messages",
}  # fmt: skip
SLOW = {
    "loops in filters", "join", "list and join", "wordwrap", "urlize", "namespace doubles", "replace", "sort and unique",
    "group and batch", "large numbers",
}  # fmt: skip
"""Those that need time or memory; which of the two ends first depends on the machine."""
RENDERED = {"long format of time"}
MEMORY = {"centred", "percent format", "percent filter", "brace format", "indented json"}


class Outcome(NamedTuple):
    error: DataError | None
    seconds: float


def attempt(source: str) -> Outcome:
    began = time.monotonic()
    try:
        ChatTemplate(source, {}, "hostile.jinja", date="2026-01-31").render([{"role": "user", "content": "hi"}])
    except DataError as error:
        return Outcome(error, time.monotonic() - began)
    return Outcome(None, time.monotonic() - began)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Four at once: each has a process and a clock of its own."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(HOSTILE, pool.map(attempt, HOSTILE.values()), strict=True))


def test_hostile_templates_are_refused_and_named(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) >= 25
    for name, (error, _) in outcomes.items():
        if name in RENDERED:
            assert error is None, name
            continue
        assert error is not None, name
        assert (error.exit_code, error.where) == (EXIT_DATA, "hostile.jinja"), name
        assert error.what.startswith("the chat template fails: "), name
        assert error.what.isprintable(), name
        assert len(error.what) < 400, name
    for name in SLOW | MEMORY:
        reason = str(outcomes[name].error)
        assert f"more than {MAX_SECONDS} s" in reason or f"more than {MAX_MIB} MiB" in reason or "elements" in reason, (
            reason
        )
    assert "33,554,432 characters" in str(outcomes["200 MB of output"].error)
    assert "unsafe" in str(outcomes["attributes"].error)


def test_one_alone_ends_in_two_seconds() -> None:
    assert MAX_SECONDS <= 0.75 * MOST_SECONDS, "the rest is for the start of the process"
    before = processor_seconds()
    error, _ = attempt(HOSTILE["wordwrap"])
    assert f"more than {MAX_SECONDS} s" in str(error)
    assert 0.9 * MAX_SECONDS < processor_seconds() - before < MOST_SECONDS, "the kernel counts in ticks"


def processor_seconds() -> float:
    """What processes that have ended used: on a busy machine the clock says more of the machine than of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def limits(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[0] for line in lines}


def test_the_process_is_small_poor_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M1_SECRET", "of the user")
    template = ChatTemplate("{{ messages[0].content }}", {}, "here")
    process = template._process
    assert process is not None
    held = limits(process.pid)
    assert int(held["Max address space"]) <= MOST_MIB << 20
    assert (held["Max file size"], held["Max core file size"]) == ("0", "0")
    assert b"M1_SECRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
    template.close()
    assert process.returncode == -signal.SIGKILL
    assert template.render([{"content": "again"}]) == "again", "it starts again when it is needed"


def test_stop_signals_are_for_the_program_that_asks(tmp_path: Path) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "here")
    assert template._process is not None
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        template._process.send_signal(stop)
    assert template.render([{"content": "still here"}]) == "still here"


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent is killed while a template renders for ever."""
    script = (
        "import json, os, sys\n"
        "from m1_data.chat.template import ChatTemplate, Job, _batches\n"
        "from m1_data.child_process import send\n"
        "t = ChatTemplate(sys.argv[1], {}, 'here')\n"
        "(_, request), = _batches([Job([{'messages': []}])])\n"
        "send(t._process, b't', request)\n"
        "print(t._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for source in ("ok", HOSTILE["sort and unique"]):
        command = [sys.executable, "-c", script, source]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, check=False
        )
        assert done.returncode == -signal.SIGKILL
        pid, until = int(done.stdout), time.monotonic() + 20 * MAX_SECONDS  # of the processor
        while is_running(pid):
            assert time.monotonic() < until, source
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_job_that_fails_names_its_line_and_leaves_the_others_right() -> None:
    source = (
        "{% if messages[0].content == '70' %}{{ raise_exception('not this one') }}{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, {}, "t.jinja")
    jobs = [Job([{"messages": [{"content": str(n)}]}] * 2, f"chats.jsonl:{n}") for n in range(200)]
    texts = []
    with pytest.raises(DataError, match="fails: not this one") as caught:
        texts.extend(template.render_all(jobs))
    assert caught.value.where == "chats.jsonl:70, template t.jinja"
    answers = list(template.try_all(jobs))
    assert [n for n, answer in enumerate(answers) if isinstance(answer, DataError)] == [70]
    assert [answer for answer in answers if not isinstance(answer, DataError)] == [
        [str(n)] * 2 for n in range(200) if n != 70
    ]
    assert next(template.render_all(jobs)) == ["0", "0"], "and leaves the rest unread"
    assert template.render([{"content": "x"}]) == "x"
    process = template._process
    assert template.render([{"content": "y"}]) == "y"
    assert template._process is process, "one process for all"


def test_one_that_never_ends_is_named_with_its_line() -> None:
    source = "{% if messages[0].content == '3' %}" + HOSTILE["wordwrap"] + "{% endif %}{{ messages[0].content }}"
    jobs = [Job([{"messages": [{"content": str(n)}]}], f"chats.jsonl:{n}") for n in range(6)]
    template = ChatTemplate(source, {}, "t.jinja")
    answers = list(template.try_all(jobs))
    assert answers[:3] == [["0"], ["1"], ["2"]]
    assert f"takes more than {MAX_SECONDS} s | chats.jsonl:3" in str(answers[3])
    assert answers[4:] == [["4"], ["5"]], "asked again"
    assert template.render([{"content": "x"}]) == "x"
