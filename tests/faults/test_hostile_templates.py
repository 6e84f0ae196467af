"""Hostile chat templates: each is rendered or refused in little time and memory, and the command that reads it ends with exit 4."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from m1_data.chat.render_worker import MAX_MIB, MAX_SECONDS
from m1_data.chat.template import ChatTemplate, Job
from m1_data.errors import EXIT_DATA, DataError

MOST_SECONDS, MOST_MIB = 2.0, 512
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
    "list and join": '{{ ("ab"*9000000)|list|join(",")|length }}',
    "wordwrap": '{{ ("a"*2000000)|wordwrap(1)|length }}',
    "urlize": '{{ ("a.de "*4000000)|title|urlize|length }}',
    "namespace doubles": '{% set n=namespace(x="ab") %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}',
    "namespace nests": "{% set n=namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(400) }}",
    "sum of lists": "{{ [[1]*3000]*3000|length }}{{ ([[1]*3000]*3000)|sum(start=[])|length }}",
    "long format of time": '{{ strftime_now("%Y"*300000)|length }}',
    "indented json": "{{ messages|tojson(indent=900000000) }}",
    "nested json": "{% set n=namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}",
    "sort and unique": "{% set a=range(99999)|list %}{% for i in a %}{% set b=a|sort|unique|list %}{% endfor %}ok",
    "group and batch": "{% for i in range(99999) %}{% set b=(range(99999)|batch(1)|list)|groupby(0)|list %}{% endfor %}",
    "range": "{{ range(999999999999)|list|length }}",
    "200 MB of output": "{% for i in range(200) %}{{ 'x'*1000000 }}{% endfor %}",
    "large numbers": "{% set n=namespace(x=99999999999) %}{% for i in range(60) %}{% set n.x = n.x*n.x %}{% endfor %}{{ n.x > 1 }}",
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
RENDERED = {"attributes by a filter", "many brackets"}


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_each_is_rendered_or_refused_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    try:
        text = ChatTemplate(source, {}, "/here/hostile.jinja").render([{"role": "user", "content": "hi"}])
        print("rendered", len(text), text[:60], time.monotonic()-began)
    except DataError as error:
        print(error, time.monotonic()-began)
