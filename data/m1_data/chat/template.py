"""Renders untrusted Jinja chat templates in a sandbox that limits their steps and their output."""

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

from m1_data.errors import DataError

MAX_STEPS = 1_000_000
MAX_OUTPUT_CHARS = 1 << 28


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

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
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


class ChatTemplate:
    """A compiled chat template that renders in the sandbox.

    Args:
        source: Jinja source, as transformers' ``apply_chat_template`` takes it.
        variables: ``bos_token`` and the like.
        where: where the source came from, for messages.

    Raises:
        DataError: the source is not Jinja.
    """

    def __init__(self, source: str, variables: dict[str, Any], where: str) -> None:
        self.source, self.where, self._variables = source, where, variables
        self._env = _Sandbox()
        try:
            self._template = self._env.from_string(source)
        except TemplateError as error:
            raise self._failed(error) from error

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Render a conversation and return its text.

        Raises:
            DataError: the template refuses the conversation, or exceeds its limits.
        """
        self._env.steps = 0
        out, size = [], 0
        try:
            for chunk in self._template.generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, **self._variables
            ):
                size += len(chunk)
                if size > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"the template writes more than {MAX_OUTPUT_CHARS:,} characters")
                out.append(chunk)
        except (TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise self._failed(error) from error
        return "".join(out)

    def _failed(self, error: Exception) -> DataError:
        return DataError(f"the chat template fails: {error}", where=self.where, fix="set sft.chat_template to another")


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
