"""Encodes conversations to token ids with an exact assistant-only loss mask.

The template is rendered twice: with the true contents, and with placeholders for them. The second says which parts
of the text are the template's and which are contents, so that control tokens in contents stay text, and which part of a
turn the model has to write itself: all that follows the generation prompt, up to and including the token that ends the
turn. Where the mask changes the text is encoded separately, as it is when the model generates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m1_data.chat.conversations import Conversation, Message
from m1_data.chat.template import ChatTemplate
from m1_data.errors import DataError

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


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

    Raises:
        DataError: no usable tokenizer, or a control token of the shipped template is not in it.
    """

    def __init__(self, tokenizer_dir: Path, template: Path | None = None) -> None:
        from tokenizers import Tokenizer

        try:
            raw = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
            config = _read_json(tokenizer_dir / "tokenizer_config.json")
            added = {t["content"]: int(t["id"]) for t in raw.get("added_tokens", [])}
            # Without its added tokens and post-processor the tokenizer knows plain text only.
            self._plain = Tokenizer.from_str(json.dumps(raw | {"added_tokens": [], "post_processor": None}))
        except OSError as error:
            raise DataError(
                f"there is no tokenizer: {error.strerror}", where=str(tokenizer_dir), fix="run m1 prepare-data first"
            ) from error
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"unusable tokenizer: {error}", where=str(tokenizer_dir)) from error
        self._control = added
        self._controls = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"(?!)")
        names = {k: _token(v) for k, v in config.items() if k.endswith("_token") and _token(v)}
        self.template = _find_template(tokenizer_dir, config, template, names)
        for token in self._controls_needed():
            if token not in added:
                raise DataError(
                    f"the chat template writes {token}, and the tokenizer has no such control token",
                    where=str(tokenizer_dir),
                    fix="set sft.chat_template to a template that fits this tokenizer",
                )
        self.vocab_size = max(self._plain.get_vocab_size() - 1, *added.values(), 0) + 1
        pad = names.get("pad_token") or names.get("eos_token")
        if pad not in added:
            raise DataError(
                f"the tokenizer names no pad_token or eos_token among its control tokens (found {pad!r})",
                where=str(tokenizer_dir / "tokenizer_config.json"),
                fix="add eos_token to the tokenizer_config.json beside tokenizer.path, and run m1 prepare-data",
            )
        self.pad_id: int = added[pad]
        self._prompt = self._generation_prompt()

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the token ids and the loss mask of one conversation.

        Raises:
            DataError: the template drops or rewrites contents, or a turn's beginning or end cannot be found in it.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in self._runs(self.spans(conversation)):
            encoded = [text] if isinstance(text, int) else self._plain.encode(text, add_special_tokens=False).ids
            ids.extend(encoded)
            trained.extend([is_trained] * len(encoded))
        return Encoded(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def spans(self, conversation: Conversation) -> list[Span]:
        """Return the rendered conversation, cut where the mask or the kind of text changes, without empty spans."""
        contents: list[tuple[int, str]] = []
        placed = [self._as_dict(m, i, contents) for i, m in enumerate(conversation.messages)]
        parts = _PLACEHOLDER.split(self.template.render(placed))
        template_texts, numbers = parts[::2], [int(n) for n in parts[1::2]]
        truth = self.template.render([self._as_dict(m, i, None) for i, m in enumerate(conversation.messages)])
        values = self._as_rendered(template_texts, numbers, contents, truth, conversation)
        spans: list[Span] = []
        owners = [contents[n][0] for n in numbers]
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

    def _as_dict(self, message: Message, owner: int, contents: list[tuple[int, str]] | None) -> dict[str, Any]:
        """A message for the template; with ``contents`` its texts are collected there and placeholders written."""

        def text(value: str) -> str:
            if contents is None or not value:
                return value
            contents.append((owner, value))
            return f"\ue000{len(contents) - 1}\ue001"

        out: dict[str, Any] = {"role": message.role}
        if message.reasoning and "reasoning_content" in self.template.source:
            out["reasoning_content"] = text(message.reasoning)
            out["content"] = text(message.content)
        elif message.reasoning:
            out["content"] = f"<think>\n{text(message.reasoning)}\n</think>\n\n{text(message.content)}"
        else:
            out["content"] = text(message.content)
        return out

    def _as_rendered(
        self, texts: list[str], numbers: list[int], contents: list[tuple[int, str]], truth: str, where: Conversation
    ) -> list[str]:
        """The contents as the template writes them: as they are, or stripped."""
        for change in (str, str.strip):
            values = [change(contents[n][1]) for n in numbers]
            if "".join(a + b for a, b in zip(texts, [*values, ""], strict=True)) == truth:
                if missing := {i for i, _ in contents} - {contents[n][0] for n in numbers}:
                    raise self._lost(f"message {min(missing)} is not in the rendered text", where)
                return values
        raise self._lost("the chat template rewrites the contents in a way that cannot be followed", where)

    def _turn_begin(self, text: str, start: int, where: Conversation) -> int:
        at = text.rfind(self._prompt, start)
        if at < 0:
            raise self._lost(f"no generation prompt {self._prompt!r} before an assistant's text", where)
        return at + len(self._prompt)

    def _turn_end(self, text: str, where: Conversation) -> int:
        found = self._controls.search(text)
        if not found:
            raise self._lost("no control token ends the assistant's turn", where)
        return found.end()

    def _generation_prompt(self) -> str:
        ask = [{"role": "user", "content": "?"}]
        without, with_prompt = self.template.render(ask), self.template.render(ask, add_generation_prompt=True)
        prompt = with_prompt.removeprefix(without)
        if not with_prompt.startswith(without) or not prompt:
            raise DataError(
                "the chat template has no generation prompt (add_generation_prompt), so the assistant's part of a turn "
                "cannot be told from the template's",
                where=self.template.where,
                fix="set sft.chat_template to another",
            )
        return prompt

    def _controls_needed(self) -> list[str]:
        return re.findall(r"<(?:beginning|end)_of_sentence>", self.template.source)

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
                yield self._control[found.group()], mask
                text, at = "", found.end()
            text += span.text[at:]
        if text:
            yield text, mask

    def _lost(self, what: str, conversation: Conversation) -> DataError:
        return DataError(
            what, where=f"{conversation.where}, template {self.template.where}", fix="set sft.chat_template"
        )


def _find_template(folder: Path, config: dict[str, Any], given: Path | None, names: dict[str, str]) -> ChatTemplate:
    own = folder / "chat_template.jinja"
    for path in (given, own if own.is_file() else None):
        if path is not None:
            try:
                return ChatTemplate(path.read_text(encoding="utf-8"), names, str(path))
            except OSError as error:
                raise DataError(f"cannot read the chat template: {error.strerror}", where=str(path)) from error
    if isinstance(config.get("chat_template"), str):
        return ChatTemplate(config["chat_template"], names, str(folder / "tokenizer_config.json"))
    return ChatTemplate(default_template(), names, "the template shipped with m1")


def default_template() -> str:
    """Return the Jinja source of the template used when the tokenizer has none."""
    return resources.files("m1_data.chat").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _token(value: Any) -> str:
    return value if isinstance(value, str) else value.get("content", "") if isinstance(value, dict) else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
