"""What becomes of the reasoning of earlier turns, which a model does not see again when it is asked on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from m1_data.chat.conversations import Conversation, Message

EarlierReasoning = Literal["keep", "strip", "split"]


def samples_of(conversation: Conversation, earlier: EarlierReasoning) -> Iterator[Conversation]:
    """Yield the conversations that are trained in place of one.

    A round is a user's message with all that follows it before the next: tool calls, results, the answer. Earlier reasoning
    is that of rounds before the last.

    Args:
        earlier: ``keep`` leaves it in. ``strip`` takes it out; the answers of those rounds are trained without it. ``split``
            makes a sample of each round that is trained: it ends there, its earlier reasoning is taken out, and only its
            last round is trained. A conversation without earlier reasoning stays as it is.
    """
    messages = conversation.messages
    begins = [0, *[i for i, m in enumerate(messages) if m.role == "user"][1:]]
    if earlier == "keep" or not any(m.reasoning for m in messages[: begins[-1]]):
        yield conversation
        return
    if earlier == "strip":
        yield replace(conversation, messages=(*map(_stripped, messages[: begins[-1]]), *messages[begins[-1] :]))
        return
    rounds = [(begin, end) for begin, end in zip(begins, [*begins[1:], len(messages)], strict=True)]
    wanted = [(begin, end) for begin, end in rounds if any(_is_trained(m) for m in messages[begin:end])]
    for begin, end in wanted:
        before = (replace(_stripped(m), train=False) for m in messages[:begin])
        yield replace(conversation, messages=(*before, *messages[begin:end]))
    if not wanted:
        yield conversation


def _stripped(message: Message) -> Message:
    if not message.reasoning:
        return message
    return replace(message, reasoning="", train=message.train and bool(message.content or message.tool_calls))


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.train
