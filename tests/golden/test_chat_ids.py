"""Shapes of chat templates with every kind of tokenizer: transformers' ids, and masks checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.sft_data import sft_dataset, spans_of

from m1_data.chat.conversations import conversation_of
from m1_data.chat.encoder import ChatEncoder, default_template
from m1_data.tokenizer import text_tokenizer

CONTROLS = [
    "<s>", "</s>", "<pad>", "<beginning_of_sentence>", "<end_of_sentence>", "<begin_of_document>", "<end_of_document>",
    "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<start_of_turn>", "<end_of_turn>", "</answer>", "</think>", "<think>", "[INST]", "[/INST]",
]  # fmt: skip
LAST = "{% if add_generation_prompt %}"


class Shape(NamedTuple):
    """A template, and what of it is trained: the texts around an answer, between turns and at the end."""

    source: str
    end: str
    last: str = ""
    """What ends the last answer, where that differs."""
    before: str = ""
    strip: bool = False
    system: bool = True

    @property
    def tokens(self) -> set[str]:
        """The control tokens at the end of answers."""
        return {token for token in CONTROLS for end in (self.end, self.last) if end.endswith(token)}


def each(user: str, assistant: str, prompt: str, *, first: str = "", behind: str = "", system: str = "") -> str:
    return (
        first + "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% elif m.role == 'system' %}" + system
        + "{% else %}" + assistant + "{% endif %}{% endfor %}" + behind + LAST + prompt + "{% endif %}"
    )  # fmt: skip


SHAPES = {
    "shipped": Shape(default_template(), "<end_of_sentence>"),
    "chatml": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + LAST + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "instructions in brackets": Shape(
        each("<s>[INST] {{ m.content | trim }} [/INST]", " {{ m.content | trim }} </s>", "", system="<s>{{ m.content }}"),
        " </s>", strip=True, before=" ",
    ),
    "strict alternation": Shape(
        each("[INST]{{ m.content }}[/INST]", "{{ m.content }}</s>", "", first="<s>",
             system="{{ raise_exception('no system') }}"),
        "</s>", system=False,
    ),
    "headers": Shape(
        "{% for m in messages %}{{ '<s>' if loop.first }}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}" + LAST + "<|header|>assistant<|/header|>\n\n{% endif %}",
        "<|eot|>", strip=True,
    ),
    "turns of a model": Shape(
        each("<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n",
             "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n", "<start_of_turn>model\n", first="<s>",
             system="<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n"),
        "<end_of_turn>", strip=True,
    ),
    "roles are tokens": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}" + LAST + "<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "roles are words": Shape(
        each("USER: {{ m.content }}", " ASSISTANT: {{ m.content }}</s>", " ASSISTANT:", first="A chat. ",
             system="{{ m.content }} "),
        "</s>", before=" ",
    ),
    "no white space": Shape(
        each("<|user|>{{ m.content }}", "<|assistant|>{{ m.content }}</s>", "<|assistant|>", first="<s>",
             system="{{ m.content }}"),
        "</s>",
    ),
    "a document's end behind all": Shape(
        each("<|user|>\n{{ m.content }}<|im_end|>\n", "<|assistant|>\n{{ m.content }}<|im_end|>\n", "<|assistant|>\n",
             behind="{% if messages[-1].role == 'assistant' %}<end_of_document>{% endif %}",
             system="<|system|>\n{{ m.content }}<|im_end|>\n"),
        "<|im_end|>",
    ),
    "a document's end in place of the prompt": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + LAST + "<|assistant|>\n{% else %}<|im_start|>{% endif %}",
        "<|im_end|>",
    ),
    "a tail of tokens, and another end of the last": Shape(
        each("<|user|>{{ m.content }}\n",
             "<|assistant|>{{ m.content }}</answer>{{ '<end_of_document>' if loop.last else '<|eot|>' }}\n", "<|assistant|>",
             system="<|system|>{{ m.content }}\n"),
        "</answer><|eot|>", last="</answer><end_of_document>",
    ),
    "contents are lists": Shape(
        each("<beginning_of_sentence>user name=user\n{{ m.content[0]['text'] }}<end_of_sentence>\n",
             "<beginning_of_sentence>ai name=assistant\n{% for c in m.content %}{{ c.text }}{% endfor %}<end_of_sentence>\n",
             "<beginning_of_sentence>ai name=assistant\n", first="<begin_of_document>",
             system="<beginning_of_sentence>system ai_setting=assistant\n{{ m.content[0]['text'] }}<end_of_sentence>\n"),
        "<end_of_sentence>",
    ),
}  # fmt: skip

KINDS = ("bytes", "bytes with a space before", "space before the first", "space before each", "space by normalizer")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tokenizers: byte-level BPE, and BPE of the SentencePiece type with bytes for unknown characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    kind: str = request.param
    alphabet: list[str] = []
    if kind.startswith("bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in kind)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no learned token has a space within
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *CONTROLS]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["assistant user Wait, let me check. It is 4. USER: ASSISTANT: name=user name=assistant model\n"] * 3, trainer
    )
    if kind == "space by normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    elif kind.startswith("space"):
        scheme = "first" if kind.endswith("first") else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    out = tmp_path_factory.mktemp("tokenizer")
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in CONTROLS]
    (out / "tokenizer.json").write_text(json.dumps(raw))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return out


QUESTIONS, ANSWERS = ("What is 2+2? ", "Sure?"), (" Wait, let me check.\nIt is 4. ", "Ja, über 数学.")


def talk(*, system: bool) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def test_ids_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for name, shape in SHAPES.items():
        (folder / "chat_template.jinja").write_text(shape.source)
        encoder = ChatEncoder(folder)
        for messages in (talk(system=False), talk(system=True))[: 1 + shape.system]:
            encoded = encoder.encode(conversation_of({"messages": messages}, name))
            if name == "contents are lists":
                messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
            theirs = oracle.apply_chat_template(messages, chat_template=shape.source, return_dict=True)["input_ids"]
            assert encoded.ids.tolist() == theirs, name
            ends = {oracle.convert_tokens_to_ids(token) for token in shape.tokens}
            assert np.isin(encoded.ids[encoded.trained], list(ends)).sum() == len(ANSWERS), name
        encoder.close()


def test_the_preview_shows_the_text_that_is_trained(folder: Path, tmp_path: Path) -> None:
    """Its parts together are what the tokenizer decodes at once, whatever it writes before a text; cut, they are as decoded
    from the beginning."""
    (folder / "chat_template.jinja").write_text(SHAPES["headers"].source)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": talk(system=True)}) + "\n")
    data = sft_dataset([path], tokenizer_dir=folder, seq_len=512, seed=1)
    tokenizer = text_tokenizer((folder / "tokenizer.json").read_bytes())
    ids, trained = data.store.tokens(0)
    (parts,) = spans_of(data, folder)
    assert [is_trained for _, is_trained in parts] == [False, True, False, True]
    said = ""
    for edge, (text, _) in zip([*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)], parts, strict=True):
        said += text
        assert said == tokenizer.decode(ids[:edge].tolist(), skip_special_tokens=False)


def test_masks_are_what_the_model_has_to_write(folder: Path) -> None:
    for name, shape in SHAPES.items():
        (folder / "chat_template.jinja").write_text(shape.source)
        encoder = ChatEncoder(folder)
        conversation = conversation_of({"messages": talk(system=shape.system)}, name)
        encoded = encoder.encode(conversation)
        asked = encoder.encode_prompt(replace(conversation, messages=conversation.messages[:-1])).tolist()
        assert asked == encoded.ids[: len(asked)].tolist(), f"{name}: the model is asked as it was trained"
        assert np.flatnonzero(np.diff(encoded.trained.astype(int)) == 1)[-1] + 1 == len(asked), name
        parts: list[str] = []
        mask = False
        for span in encoder.spans(conversation):
            if span.trained and not mask:
                parts.append("")
            if span.trained:
                parts[-1] += span.text
            mask = span.trained
        answers = [answer.strip() if shape.strip else answer for answer in ANSWERS]
        ends = (shape.end, shape.last or shape.end)
        assert parts == [shape.before + answer + end for answer, end in zip(answers, ends, strict=True)], name
        encoder.close()
