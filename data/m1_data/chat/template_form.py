"""How a chat template writes: found out by rendering conversations whose contents are placeholders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from m1_data.chat.template import ChatTemplate, Job
from m1_data.errors import DataError

PLACEHOLDER = re.compile("(?:\ue000|\\\\ue000)(\\d+)(?:\ue001|\\\\ue001)")
"""Also as JSON writes it in ASCII."""


def placeholder(number: int) -> str:
    """Return what stands for content ``number``: characters for private use, so that no template looks into it."""
    return f"\ue000{number}\ue001"


class TemplateForm(NamedTuple):
    """What has to be known of a template to follow what it writes."""

    lists: bool
    """Whether it reads contents as lists of parts, ``[{"type": "text", "text": ...}]``, instead of plain texts."""
    prompt: str
    """The generation prompt: what it writes before an answer; the end of a question where that is followed by the answer."""
    ends: re.Pattern[str]
    """Finds the control token that ends an answer."""


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, and of two that begin at the same place the longer."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def find_form(template: ChatTemplate, controls: re.Pattern[str]) -> TemplateForm:
    """Return the form of ``template``.

    Args:
        controls: finds the control tokens in a text.

    Raises:
        DataError: the template fails, writes no contents, or has no generation prompt.
    """
    lists = _takes_lists(template)
    ask, turn, turns = (_talk(n, lists=lists) for n in (1, 2, 4))
    without, with_prompt, once = next(template.render_all([Job([ask, {**ask, "add_generation_prompt": True}, turn])]))
    first, *_, last = PLACEHOLDER.split(once)
    before_answer = _text_before(once, placeholder(1))
    asked = PLACEHOLDER.split(without)[-1]
    prompt = with_prompt[_shared_length(without, with_prompt, controls) :]
    if not prompt and before_answer.startswith(asked) and not before_answer[len(asked) :].strip():
        prompt = asked  # an answer follows what ends the question
    if not prompt or PLACEHOLDER.search(prompt):
        raise DataError(
            "the chat template has no generation prompt (add_generation_prompt), so the assistant's part of a turn "
            "cannot be told from the template's",
            where=template.where,
            fix="set sft.chat_template to another",
        )
    twice, called = template.try_all([Job([turns]), Job([_call(lists=lists)])])
    between = last if isinstance(twice, DataError) else PLACEHOLDER.split(twice[0])[4]
    openings = {*controls.findall(first), *controls.findall(prompt)}
    ends = _turn_ends(between, last, controls, openings)
    call = "" if isinstance(called, DataError) else called[0]
    behind_call = _text_before(call, placeholder(2)) if call.count(placeholder(1)) == 1 else ""
    if not any_of(ends).search(behind_call):
        # A call may end with a token of its own: one that opens no turn, with one behind it that does.
        pairs = pairwise(controls.findall(behind_call))
        ends += [token for token, behind in pairs if token not in openings and behind in openings][:1]
    return TemplateForm(lists, prompt, any_of(ends))


def _takes_lists(template: ChatTemplate) -> bool:
    """Some templates write nothing at all for a plain text, or fail."""
    answers = list(template.try_all(Job([_talk(2, lists=lists)]) for lists in (False, True)))
    for lists, answer in enumerate(answers):
        if not isinstance(answer, DataError) and {"0", "1"} <= set(PLACEHOLDER.findall(answer[0])):
            return bool(lists)
    if isinstance(answers[0], DataError):
        raise answers[0]
    raise DataError(
        "the chat template does not write the contents of messages, neither as texts nor as lists of parts",
        where=template.where,
        fix="set sft.chat_template to another",
    )


def _turn_ends(between: str, last: str, controls: re.Pattern[str], openings: set[str]) -> list[str]:
    """The control tokens that end an answer, by the texts behind one between two turns and behind the last one.

    A last answer can have more behind it: the end of the document. Both can begin with control tokens that belong to the
    answer; then what follows ends it, unless it is one of those that open a turn.
    """
    shared = [found for found in controls.finditer(last) if between.startswith(last[: found.end()])]
    rest = [token for token in controls.findall(between, shared[-1].end() if shared else 0) if token not in openings]
    if shared and not rest:
        return [shared[-1].group()]
    return [*(rest or controls.findall(between))[:1], *controls.findall(last)[-1:]]


def _shared_length(without: str, with_prompt: str, controls: re.Pattern[str]) -> int:
    """The characters before the generation prompt; in its place some templates write the end of the document."""
    pairs = enumerate(zip(without, with_prompt, strict=False))
    length = next((at for at, (a, b) in pairs if a != b), min(len(without), len(with_prompt)))
    return next((c.start() for c in controls.finditer(with_prompt) if c.start() < length < c.end()), length)


def _text_before(rendered: str, mark: str) -> str:
    """The text between a placeholder and the one before it; empty when it is not there."""
    before, found, _ = rendered.partition(mark)
    return PLACEHOLDER.split(before)[-1] if found else ""


def _call(*, lists: bool) -> dict[str, Any]:
    """A question, a call of a tool, its result and the answer; the texts are placeholders."""
    talk = _talk(4, lists=lists)
    call = {"name": placeholder(1), "arguments": {}}
    result = talk["messages"][2]["content"]
    talk["messages"][1] |= {"content": [] if lists else "", "tool_calls": [{"type": "function", "function": call}]}
    talk["messages"][2] |= {"role": "tool", "content": [result[0] | {"name": "tool"}] if lists else result}
    return talk


def _talk(turns: int, *, lists: bool) -> dict[str, Any]:
    """Turns of user and assistant whose contents are placeholders."""
    texts = [placeholder(n) for n in range(turns)]
    return {
        "messages": [
            {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": t}] if lists else t}
            for n, t in enumerate(texts)
        ]
    }
