"""Encodes conversations to token ids with an exact assistant-only loss mask.

The template is rendered twice: with the true contents, and with placeholders for them. The second says which parts
of the text are the template's and which are contents, so that control tokens in contents stay text, and which part of a
turn the model has to write itself: all that follows the generation prompt, up to and including the token that ends the
turn: content, reasoning, tool calls. That token is the one that the template writes behind the answers of a conversation made for
the purpose: other control tokens, as the end of a turn's reasoning, come before it. Where the mask changes the text is encoded
separately, as it is when the model generates.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m1_data.chat.conversations import Conversation
from m1_data.chat.pieces import PieceEncoder, Place
from m1_data.chat.placing import Content, Placing, argument_keys, follow
from m1_data.chat.template import ChatTemplate, Job
from m1_data.chat.template_form import PLACEHOLDER, any_of, find_form
from m1_data.errors import DataError

SHIPPED_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""The template used when the tokenizer has none, and when ``sft.chat_template`` is ``m1``. It writes MiniMax-M1's tool format."""


class Span(NamedTuple):
    """A part of rendered text with one mask value."""

    text: str
    trained: bool
    is_content: bool


class Encoded(NamedTuple):
    """The int64 token ids ``[n]`` of a conversation, and whether each is a training target, bool ``[n]``."""

    ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


class ChatEncoder:
    """Encodes conversations with a tokenizer folder and a chat template.

    Args:
        tokenizer_dir: folder with ``tokenizer.json`` and ``tokenizer_config.json``.
        template: Jinja file; None takes the folder's own, else the one shipped here.
        date: ISO date for templates that write the present day; without one they are refused.

    Raises:
        DataError: no usable tokenizer, a control token of the shipped template is not in it, or an unusable template.
    """

    def __init__(self, tokenizer_dir: Path, template: Path | None = None, *, date: str = "") -> None:
        try:
            data = (tokenizer_dir / "tokenizer.json").read_bytes()
            config = _read_json(tokenizer_dir / "tokenizer_config.json")
            tokens = json.loads(data).get("added_tokens", [])
            added = {t["content"]: int(t["id"]) for t in tokens}
            self._pieces = PieceEncoder(data)
        except OSError as error:
            raise DataError(
                f"there is no tokenizer: {error.strerror}", where=str(tokenizer_dir), fix="run m1 prepare-data first"
            ) from error
        except DataError as error:
            error.where = str(tokenizer_dir / "tokenizer.json")
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"unusable tokenizer: {error}", where=str(tokenizer_dir)) from error
        self._control = added
        self._controls = any_of(added)
        flags = ("lstrip", "rstrip", "single_word")
        self._takes_neighbours = {t["content"] for t in tokens if any(t.get(flag) for flag in flags)}
        self._special = any_of([t["content"] for t in tokens if t.get("special")] or added)
        names = {k: _token(v) for k, v in config.items() if k.endswith("_token") and _token(v)}
        self.template = _find_template(tokenizer_dir, config, template, names, date)
        for token in self._controls_needed():
            if token not in added:
                raise DataError(
                    f"the chat template writes {token}, and the tokenizer has no such control token",
                    where=str(tokenizer_dir),
                    fix="set sft.chat_template to a template that fits this tokenizer",
                )
        self.vocab_size = max(self._pieces.plain.get_vocab_size(with_added_tokens=False) - 1, *added.values(), 0) + 1
        pad = names.get("pad_token") or names.get("eos_token")
        if pad not in added:
            raise DataError(
                f"the tokenizer names no pad_token or eos_token among its control tokens (found {pad!r})",
                where=str(tokenizer_dir / "tokenizer_config.json"),
                fix="add eos_token to the tokenizer_config.json beside tokenizer.path, and run m1 prepare-data",
            )
        self.pad_id: int = added[pad]
        self._form = find_form(self.template, self._special)
        source = self.template.source
        self._placing = Placing(self._form.lists, "reasoning_content" in source, "developer" in source)

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the token ids and the loss mask of one conversation.

        Raises:
            DataError: the template drops or rewrites contents, or a turn's beginning or end cannot be found in it.
        """
        ((_, encoded),) = self.encode_all([conversation])
        return encoded

    def encode_all(
        self, conversations: Iterable[Conversation], refused: Callable[[DataError], None] | None = None
    ) -> Iterator[tuple[Conversation, Encoded]]:
        """Yield each conversation with its token ids and its loss mask.

        Args:
            refused: is called with the error of each conversation that cannot be encoded, which is then left out; without
                it that error is raised.

        Raises:
            DataError: as ``encode``.
        """
        for conversation, spans in self._all_spans(conversations, refused=refused):
            yield conversation, self._encoded(spans)

    def encode_prompt(self, conversation: Conversation) -> npt.NDArray[np.int64]:
        """Return the token ids of a conversation that the model is to answer: with the generation prompt, int64 ``[n]``.

        Control tokens in contents stay text, as in training.

        Raises:
            DataError: as ``encode``.
        """
        ((_, spans),) = self._all_spans([conversation], add_generation_prompt=True)
        return self._encoded(spans).ids

    def _encoded(self, spans: list[Span]) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        place: Place = "first"
        for text, is_trained in self._runs(spans):
            ids.extend([text] if isinstance(text, int) else self._pieces.encode(text, place))
            trained.extend([is_trained] * (len(ids) - len(trained)))
            place = "behind" if isinstance(text, int) else "within"
        return Encoded(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    @property
    def end_ids(self) -> list[int]:
        """The control tokens that end an answer."""
        return sorted(index for token, index in self._control.items() if self._form.ends.fullmatch(token))

    def spans(self, conversation: Conversation) -> list[Span]:
        """Return the rendered conversation, cut where the mask or the kind of text changes, without empty spans."""
        ((_, spans),) = self._all_spans([conversation])
        return spans

    def close(self) -> None:
        """End the process that renders the template; it starts again when it is needed."""
        self.template.close()

    def _all_spans(
        self,
        conversations: Iterable[Conversation],
        *,
        add_generation_prompt: bool = False,
        refused: Callable[[DataError], None] | None = None,
    ) -> Iterator[tuple[Conversation, list[Span]]]:
        asked: deque[tuple[Conversation, list[Content]]] = deque()

        def jobs() -> Iterator[Job]:
            for conversation in conversations:
                try:
                    self._refuse_controls(conversation)
                except DataError as error:
                    if refused is None:
                        raise
                    refused(error)
                    continue
                contents: list[Content] = []
                placed = [self._placing.as_dict(m, i, contents) for i, m in enumerate(conversation.messages)]
                true = [self._placing.as_dict(m, i, None) for i, m in enumerate(conversation.messages)]
                asked.append((conversation, contents))
                tools = conversation.tools or None
                more = {"add_generation_prompt": True} if add_generation_prompt else {}
                renderings = [{"messages": placed, "tools": tools} | more, {"messages": true, "tools": tools} | more]
                yield Job([*renderings, {"messages": true} | more] if tools else renderings, conversation.where)

        for answer in self.template.try_all(jobs()):
            conversation, contents = asked.popleft()
            try:
                if isinstance(answer, DataError):
                    raise answer
                placed, truth, *without_tools = answer
                if truth in without_tools:
                    raise self._lost(
                        'the chat template does not write the "tools"',
                        conversation,
                        '"m1" or another that does, or take them out',
                    )
                spans = self._cut(placed, truth, contents, conversation)
            except DataError as error:
                if refused is None:
                    raise
                refused(error)
                continue
            yield conversation, spans

    def _cut(self, placed: str, truth: str, contents: list[Content], conversation: Conversation) -> list[Span]:
        parts = PLACEHOLDER.split(placed)
        template_texts, numbers = parts[::2], [int(n) for n in parts[1::2]]
        self._refuse_changes(numbers, contents, conversation)
        values = follow(template_texts, [contents[n] for n in numbers], truth)
        if values is None:
            raise self._lost("the chat template rewrites the contents in a way that cannot be followed", conversation)
        spans: list[Span] = []
        owners = [contents[n].owner for n in numbers]
        trained_owner = {i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.train}
        for k, text in enumerate(template_texts):
            before = owners[k - 1] if k else -1
            after = owners[k] if k < len(owners) else -1
            if before == after and before >= 0:
                spans.append(Span(text, before in trained_owner, False))
            else:
                end = self._turn_end(text, conversation) if before in trained_owner else 0
                begin = self._turn_begin(text, end, conversation) if after in trained_owner else len(text)
                spans += [Span(text[:end], True, False), Span(text[end:begin], False, False)]
                spans.append(Span(text[begin:], True, False))
            if k < len(owners):
                spans.append(Span(values[k], owners[k] in trained_owner, True))
        return [s for s in spans if s.text]

    def _refuse_controls(self, conversation: Conversation) -> None:
        """What the template weaves into its own text must not hold its control tokens: there they would not stay text."""
        arguments = (call.arguments for m in conversation.messages for call in m.tool_calls)
        for what, text in (
            ("tools", json.dumps(conversation.tools, ensure_ascii=False)),
            *(("name", m.name) for m in conversation.messages),
            *(("tool_call_id", m.tool_call_id) for m in conversation.messages),
            *(("id", call.id) for m in conversation.messages for call in m.tool_calls),
            *(("arguments", key) for value in arguments for key in argument_keys(value)),
        ):
            if found := self._special.search(text) or PLACEHOLDER.search(text):
                raise DataError(
                    f'"{what}" holds the control token {found.group()!r}', where=conversation.where, fix="take it out"
                )

    def _refuse_changes(self, numbers: list[int], contents: list[Content], conversation: Conversation) -> None:
        """A template may leave nothing out, make nothing up, and write a call in one place only."""
        if max(numbers, default=-1) >= len(contents):
            raise self._lost("the chat template writes more contents than there are", conversation)
        written = Counter(numbers)
        for number, content in enumerate(contents):
            # A call that is written again with its result would make one trained turn of all between.
            if written[number] > 1 and content.part == "tool calls":
                raise self._lost(
                    "the chat template writes the tool calls of a message more than once",
                    replace(conversation, where=f"{conversation.where}, message {content.owner}"),
                )
            if not written[number]:
                raise self._lost(
                    f"the chat template leaves out the {content.part} of a message",
                    replace(conversation, where=f"{conversation.where}, message {content.owner}"),
                    'another, or sft.earlier_reasoning to "strip" or "split"'
                    if content.part == "reasoning"
                    else '"m1" or another that writes it, or take it out of the message',
                )

    def _turn_begin(self, text: str, start: int, where: Conversation) -> int:
        at = text.rfind(self._form.prompt, start)
        if at < 0:
            raise self._lost(f"no generation prompt {self._form.prompt!r} before an assistant's text", where)
        return at + len(self._form.prompt)

    def _turn_end(self, text: str, where: Conversation) -> int:
        """The place behind the token that ends a turn, in the template's text behind the turn's last content."""
        found = self._form.ends.search(text)
        if not found:
            raise self._lost("no control token ends the assistant's turn", where)
        return found.end()

    def _controls_needed(self) -> list[str]:
        return re.findall(r"<(?:beginning|end)_of_sentence>|<begin_of_document>", self.template.source)

    def _runs(self, spans: list[Span]) -> Iterator[tuple[str | int, bool]]:
        """Plain text to encode in one go, and ids of the template's control tokens."""
        text, mask = "", False
        for span in spans:
            at = 0
            if span.trained != mask:
                if text:
                    yield text, mask
                text, mask = "", span.trained
            for found in () if span.is_content else self._controls.finditer(span.text):
                if text + span.text[at : found.start()]:
                    yield text + span.text[at : found.start()], mask
                if found.group() in self._takes_neighbours:
                    raise DataError(
                        f"the chat template writes {found.group()}, which takes white space beside it or stands only between "
                        "words (lstrip, rstrip, single_word): the text would get other ids than when it is generated",
                        where=self.template.where,
                        fix="set these three to false for it under added_tokens in tokenizer.json",
                    )
                yield self._control[found.group()], mask
                text, at = "", found.end()
            text += span.text[at:]
        if text:
            yield text, mask

    def _lost(self, what: str, conversation: Conversation, other: str = "another") -> DataError:
        where = f"{conversation.where}, template {self.template.where}"
        return DataError(what, where=where, fix=f"set sft.chat_template to {other}")


def _find_template(
    folder: Path, config: dict[str, Any], given: Path | None, names: dict[str, str], date: str
) -> ChatTemplate:
    own = folder / "chat_template.jinja"
    for path in (given, own if own.is_file() else None):
        if path is not None:
            try:
                return ChatTemplate(path.read_text(encoding="utf-8"), names, str(path), date=date)
            except OSError as error:
                raise DataError(f"cannot read the chat template: {error.strerror}", where=str(path)) from error
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default", source)
    if isinstance(source, str):
        return ChatTemplate(source, names, str(folder / "tokenizer_config.json"), date=date)
    if source:
        raise DataError(
            '"chat_template" is neither a text nor a list with a template named default',
            where=str(folder / "tokenizer_config.json"),
            fix="set sft.chat_template to a Jinja file",
        )
    return ChatTemplate(default_template(), names, "the template shipped with m1", date=date)


def default_template() -> str:
    """Return the Jinja source of the template used when the tokenizer has none."""
    return SHIPPED_TEMPLATE.read_text(encoding="utf-8")


def _token(value: Any) -> str:
    return value if isinstance(value, str) else value.get("content", "") if isinstance(value, dict) else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
