"""Prompts of people: read from files, and turned into token ids as in training. No torch."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from m1_data.chat.conversations import Conversation, Message, conversation_of
from m1_data.chat.encoder import ChatEncoder
from m1_data.storage.streams import open_lines
from m1_data.tokenizer import encode_text, load_tokenizer
from m1_stages.errors import ConfigError, DataError
from m1_stages.generation.request import Thinking

OPENING, CLOSING = "<think>", "</think>"
FORCED_CLOSING = f"\n{CLOSING}\n\n"
"""What a thinking budget writes: as the chat template writes the end of the reasoning."""


_OPTIONS = {
    "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "n", "samples", "stop",
    "stop_id", "stop_ids", "thinking_budget", "model",
}  # fmt: skip
"""Keys of a line that would change its answer, and that hold for all prompts here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text that is to be continued, or a conversation that is to be answered."""

    where: str
    text: str = ""
    conversation: Conversation | None = None
    id: Any = None
    """The ``id`` of its line, which the answer repeats."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts: ``.jsonl`` has an object with "prompt" or "messages" on each line, any other file a text.

    Both may be compressed (gzip, bzip2, zstandard). Blank lines are skipped, and so is a byte order mark.

    Raises:
        DataError: the file is missing, damaged or empty, or a line is not a prompt; the error names file and line.
    """
    if not path.is_file():
        raise DataError("there is no such file of prompts", where=str(path), fix="check --prompts")
    is_json = ".jsonl" in path.suffixes
    prompts = []
    for number, line in enumerate(open_lines(path), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            where = f"{path}:{number}"
            prompts.append(_parsed(line, where) if is_json else Prompt(where=where, text=_decoded(line, where)))
    if not prompts:
        raise DataError("the file has no prompt", where=str(path), fix="one prompt on each line")
    return prompts


def _parsed(line: bytes, where: str) -> Prompt:
    fix = 'one object a line: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}", where=where, fix=fix) from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise DataError('expected an object with either "prompt" or "messages"', where=where, fix=fix)
    if lost := sorted(_OPTIONS & set(record)):
        raise DataError(
            f"a prompt cannot have options of its own: {', '.join(lost)}",
            where=where,
            fix="give them on the command line, for all prompts; m1 generate --help lists them",
        )
    if "messages" not in record:
        if not isinstance(record["prompt"], str):
            raise DataError(f'"prompt" must be a string, not {type(record["prompt"]).__name__}', where=where, fix=fix)
        return Prompt(where=where, text=record["prompt"], id=record.get("id"))
    conversation = conversation_of(record, where)
    if conversation.messages[-1].role == "assistant":
        raise DataError(
            "the conversation ends with the assistant's turn, so there is nothing to answer", where=where, fix=fix
        )
    return Prompt(where=where, conversation=conversation, id=record.get("id"))


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=where) from error


class PromptEncoder:
    """Turns prompts into token ids, and ids into text, with the tokenizer of the prepared data.

    Control tokens in a prompt's text stay text; only a chat template writes them.

    Args:
        tokenizer_dir: the prepared data's tokenizer.
        eod_token: the token that ends a document.
        template: Jinja file of the chat template; None takes the tokenizer's own, else the one shipped with m1.
        date: see ``ChatEncoder``.
    """

    def __init__(self, tokenizer_dir: Path, eod_token: str, template: Path | None, *, date: str = "") -> None:
        loaded = load_tokenizer(tokenizer_dir, eod_token)
        self._plain, self._eod_id = loaded.reference, loaded.eod_id
        self._where = tokenizer_dir
        self._template, self._date = template, date
        self._encoder: ChatEncoder | None = None

    def encode(self, prompt: Prompt, *, chat: bool) -> list[int]:
        """Return the token ids of ``prompt``; with ``chat`` a text is the only turn of a user, and the assistant answers.

        Raises:
            DataError: an empty prompt, or a conversation that the template refuses.
        """
        conversation = prompt.conversation
        if conversation is None and not prompt.text:
            raise DataError("the prompt is empty", where=prompt.where, fix="write at least one character")
        if conversation is None and chat:
            conversation = Conversation((Message("user", prompt.text),), prompt.where)
        if conversation is not None:
            return [int(token) for token in self._chat().encode_prompt(conversation)]
        return encode_text(self._plain, prompt.text)

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        """Return the tokens that end an answer: the end of a document, and in a chat the end of the assistant's turn."""
        return frozenset([self._eod_id, *(self._chat().end_ids if chat else ())])

    def thinking(self, budget: int, prompt: list[int]) -> Thinking:
        """Return a thinking budget for an answer to ``prompt``.

        Raises:
            ConfigError: the tokenizer has no control tokens around the reasoning.
        """
        opening, closing = (self._plain.token_to_id(name) for name in (OPENING, CLOSING))
        if opening is None or closing is None:
            raise ConfigError(
                f"a thinking budget needs the control tokens {OPENING} and {CLOSING}, which the tokenizer does not have",
                where=str(self._where),
                fix="leave out --thinking-budget",
            )
        before, after = FORCED_CLOSING.split(CLOSING)
        encode = self._plain.encode
        last = next((token for token in reversed(prompt) if token in (opening, closing)), closing)
        return Thinking(
            budget=budget,
            opening=(opening,),
            closing=(closing,),
            forced=(*encode(before).ids, closing, *encode(after).ids),
            is_open=last == opening,
        )

    def decode(self, ids: Any) -> str:
        """Return the text of token ids, control tokens included; bytes that are no UTF-8 become U+FFFD."""
        return str(self._plain.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        """End the process that renders the chat template, if one was started."""
        if self._encoder is not None:
            self._encoder.close()

    def _chat(self) -> ChatEncoder:
        if self._encoder is None:
            self._encoder = ChatEncoder(self._where, self._template, date=self._date)
        return self._encoder


def numbered(texts: list[str]) -> Iterator[Prompt]:
    """Yield the texts of the command line as prompts.

    Raises:
        DataError: one is not UTF-8.
    """
    for number, text in enumerate(texts, 1):
        where = f"prompt {number} of the command line"
        yield Prompt(where=where, text=_decoded(os.fsencode(text), where))
