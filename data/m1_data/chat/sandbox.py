"""The sandbox of untrusted Jinja chat templates: no attributes of Python, no clock, no chance, counted steps and output.

It runs in the process of ``render_worker``, which limits memory and time: a single filter can take any amount of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000
MAX_OUTPUT_CHARS = 1 << 25


class AsksForTime(TemplateError):
    """The template asks for the time, and no date is given."""


class _Counting(CodeGenerator):
    """Emits one ``environment.spend()`` per executed block, so that nested loops run into the limit."""

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        self.writeline("environment.spend()")
        super().blockvisit(nodes, frame)


class _Generation(Extension):
    """``{% generation %}`` marks assistant text for transformers; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Counting
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self, date: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._date = date
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now
        # The same conversation has to give the same tokens each time.
        del self.filters["random"], self.globals["lipsum"]
        self.steps = 0

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"the template ran more than {MAX_STEPS:,} steps")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else None for x in (left, right)]
        size = sum(s or 0 for s in sizes)
        if operator == "*" and any(s is not None for s in sizes):
            size = max(s or 0 for s in sizes) * max(x for x in (left, right, 0) if isinstance(x, int))
        if operator == "**" or size > MAX_OUTPUT_CHARS:
            raise SecurityError(f"the template builds a value of {size:,} elements with {operator!r}")
        return super().call_binop(context, operator, left, right)

    def _strftime_now(self, form: str) -> str:
        if not self._date:
            raise AsksForTime("the template writes the present time, so a conversation has other tokens tomorrow")
        return datetime.fromisoformat(self._date).strftime(form)


class SandboxedTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source, as transformers' ``apply_chat_template`` takes it.
        variables: ``bos_token`` and the like.
        date: ISO date that ``strftime_now`` formats; empty refuses templates that call it.

    Raises:
        TemplateError: the source is not Jinja.
    """

    def __init__(self, source: str, variables: dict[str, Any], date: str = "") -> None:
        self._variables = variables
        self._env = _Sandbox(date)
        self._template = self._env.from_string(source)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render a conversation and return its text.

        Raises:
            SecurityError: the template exceeds its limits.
            Exception: whatever the template's expressions raise.
        """
        self._env.steps = 0
        out, size = [], 0
        for chunk in self._template.generate(
            messages=list(messages), tools=tools, add_generation_prompt=add_generation_prompt, **self._variables
        ):
            size += len(chunk)
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError(f"the template writes more than {MAX_OUTPUT_CHARS:,} characters")
            out.append(chunk)
        return "".join(out)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter with the arguments that it has in transformers, in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
