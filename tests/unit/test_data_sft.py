"""Fine-tuning data: the rendered text, the mask and the rows, with transformers as the judge of the template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sft_data import sft_dataset, spans_of

from m1_data.chat.conversations import parse_conversation
from m1_data.chat.encoder import ChatEncoder, default_template
from m1_data.chat.template import ChatTemplate
from m1_data.storage.text_digest import text_digest
from m1_stages.errors import DataError

CONTROL = ["<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<think>", "</think>", "<pad>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with control tokens, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    out = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["What is two plus two? It is four. user ai name=assistant\n\n"] * 5
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<beginning_of_sentence>",
        "eos_token": "<end_of_sentence>",
        "pad_token": "<pad>",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def talk(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ai(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CASES = [
    [user("What is 2+2?"), ai("It is four.", reasoning_content="Two and two.\nWait, let me check.")],
    [{"role": "system", "content": "Be brief."}, user("Hi\n"), ai("\nHello"), user(" Bye "), ai("Bye.")],
    [user("Run"), ai("Calling"), {"role": "tool", "content": "4"}, ai("The tool says four ümlaut 数学.")],
]


@pytest.mark.parametrize("messages", CASES)
def test_text_and_ids_equal_transformers(folder: Path, messages: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = ChatEncoder(folder)
    conversation = parse_conversation(talk(*messages), "test")
    text = oracle.apply_chat_template(messages, tokenize=False, chat_template=default_template())
    assert "".join(s.text for s in encoder.spans(conversation)) == text
    encoded = encoder.encode(conversation)
    assert oracle.decode(encoded.ids.tolist()) == text
    # Apart from the place where the mask changes, where generation starts anew, ids are transformers' own.
    runs = np.split(encoded.ids, np.flatnonzero(np.diff(encoded.trained)) + 1)
    for run in runs:
        piece = oracle.decode(run.tolist())
        assert run.tolist() == oracle(piece, add_special_tokens=False)["input_ids"]


def test_the_mask_is_what_the_model_writes_after_the_generation_prompt(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = ChatEncoder(folder)
    for messages in CASES:
        spans = encoder.spans(parse_conversation(talk(*messages), "test"))
        trained = [t for t in _merge(spans) if t[1]]
        expected = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                render = {"tokenize": False, "chat_template": default_template()}
                prompt = oracle.apply_chat_template(messages[:i], add_generation_prompt=True, **render)
                whole = oracle.apply_chat_template(messages[: i + 1], **render)
                expected.append((whole.removeprefix(prompt).removesuffix("\n"), True))
        assert trained == expected
        assert all(text.endswith("<end_of_sentence>") for text, _ in trained)


def _merge(spans: list[Any]) -> list[tuple[str, bool]]:
    out: list[tuple[str, bool]] = []
    for span in spans:
        if out and out[-1][1] == span.trained:
            out[-1] = (out[-1][0] + span.text, span.trained)
        else:
            out.append((span.text, span.trained))
    return out


def test_control_tokens_in_contents_stay_text(folder: Path) -> None:
    encoder = ChatEncoder(folder)
    evil = "<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n</think> \ue0000\ue001"
    encoded = encoder.encode(parse_conversation(talk(user(evil), ai("No. " + evil)), "test"))
    ids = encoded.ids.tolist()
    assert ids.count(CONTROL.index("<beginning_of_sentence>")) == 2
    assert ids.count(CONTROL.index("<end_of_sentence>")) == 2
    assert ids.count(CONTROL.index("</think>")) == 0
    last = max(i for i, t in enumerate(ids) if t == CONTROL.index("<end_of_sentence>"))
    assert encoded.trained[last]
    assert not encoded.trained[: ids.index(CONTROL.index("<end_of_sentence>")) + 1].any()


def test_inline_thinking_equals_the_field_and_untrained_turns_are_honoured(folder: Path) -> None:
    encoder = ChatEncoder(folder)
    a = encoder.encode(parse_conversation(talk(user("q"), ai("<think>\nhm\n</think>\n\nfour")), "t"))
    b = encoder.encode(parse_conversation(talk(user("q"), ai("four", reasoning_content="hm")), "t"))
    assert a.ids.tolist() == b.ids.tolist()
    assert a.ids.tolist().count(CONTROL.index("<think>")) == 1
    both = parse_conversation(talk(user("q"), ai("one", train=False), user("r"), ai("two")), "t")
    assert [s for s in _merge(encoder.spans(both)) if s[1]] == [("two<end_of_sentence>", True)]


def test_the_tokenizers_own_template_wins_and_may_strip_or_inline(folder: Path, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<beginning_of_sentence>{{ m.role }}\n{{ m.content | trim }}"
        "<end_of_sentence>\n{% endfor %}"
        "{% if add_generation_prompt %}<beginning_of_sentence>assistant\n{% endif %}"
    )
    own = tmp_path / "own.jinja"
    own.write_text(source)
    spans = ChatEncoder(folder, own).spans(parse_conversation(talk(user(" q "), ai("a", reasoning_content="r")), "t"))
    assert _merge(spans) == [
        ("<beginning_of_sentence>user\nq<end_of_sentence>\n<beginning_of_sentence>assistant\n", False),
        ("<think>\nr\n</think>\n\na<end_of_sentence>", True),
        ("\n", False),
    ]
    own.write_text(source.replace("m.content | trim", "m.content | upper"))
    with pytest.raises(DataError, match="rewrites the contents"):
        ChatEncoder(folder, own).spans(parse_conversation(talk(user("q"), ai("a")), "t"))
    own.write_text(source.replace("for m in messages", "for m in messages if m.role != 'system'"))
    with pytest.raises(DataError, match=r"leaves out the content of a message \| t, message 0"):
        ChatEncoder(folder, own).spans(
            parse_conversation(talk({"role": "system", "content": "s"}, user("q"), ai("a")), "t")
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}", "more than 1,000,000 steps"),
        ("{{ 'x' * 1000000000 }}", "1,000,000,000 elements"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for m in messages", "unexpected|expected"),
        ("{{ raise_exception('only users') }}", "only users"),
    ],
)
def test_hostile_templates_are_stopped(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, {}, "here").render([user("q")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "not an object: list"),
        (b'{"messages": []}', "not a list with messages"),
        (talk(user("q")), "no assistant message"),
        (talk({"role": "human", "content": "q"}), "unknown role: 'human'"),
        (talk(user("q"), ai("<think>never ends")), "never closed"),
        (talk(user("q"), ai("<think>a</think>b", reasoning_content="c")), "given twice"),
        (talk(user("q"), ai("a", audio={})), "keys of a message that would be lost: audio"),
        (
            talk(user("q"), {"role": "assistant", "content": None}),
            "neither a string nor a list of text parts: NoneType",
        ),
        (talk(user("q"), ai("")), "is empty"),
        (talk(user("q"), ai("a", train="no")), '"train" is neither'),
    ],
)
def test_bad_lines_name_file_and_line(folder: Path, tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(talk(*CASES[0]) + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        sft_dataset([path], tokenizer_dir=folder, seq_len=512, seed=1)
    assert f"{path}:3" in caught.value.where


def chats(tmp_path: Path, count: int = 60) -> Path:
    path = tmp_path / "many.jsonl"
    rng = np.random.default_rng(0)
    lines = [
        talk(
            user(f"number {i}?"),
            ai("four " * int(rng.integers(1, 40)), reasoning_content="Wait, let me check."),
            domain="math" if i % 2 else "chat",
        )
        for i in range(count)
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def test_epochs_hold_every_conversation_once_with_labels_shifted_once(folder: Path, tmp_path: Path) -> None:
    data = sft_dataset([chats(tmp_path)], tokenizer_dir=folder, seq_len=512, seed=1)
    epochs = []
    for epoch in range(2):
        rows = range(epoch * len(data), (epoch + 1) * len(data))
        epochs.append([s for i in rows for s in data.row(i)])
    texts = [sorted(s.tokens.tolist() for s in segments) for segments in epochs]
    assert len(texts[0]) == 60
    assert texts[0] == texts[1]
    assert [s.tokens.tolist() for s in epochs[0]] != [s.tokens.tolist() for s in epochs[1]]
    mates = [
        {frozenset(s.tokens.tobytes() for s in data.row(e * len(data) + i)) for i in range(len(data))} for e in (0, 1)
    ]
    assert mates[0] != mates[1]
    for s in epochs[0]:
        assert s.labels[:-1].tolist() == s.tokens[1:].tolist()
        assert not s.trained[-1]
        assert s.labels[s.trained][-1] == CONTROL.index("<end_of_sentence>")
    again = sft_dataset([chats(tmp_path)], tokenizer_dir=folder, seq_len=512, seed=1)
    assert again.fingerprint == data.fingerprint
    assert again.batch([len(data) + 1]).tokens.tolist() == data.batch([len(data) + 1]).tokens.tolist()
    assert sft_dataset([chats(tmp_path)], tokenizer_dir=folder, seq_len=512, seed=2).fingerprint != data.fingerprint
    batch = data.batch(list(range(len(data))))
    assert batch.trained_tokens == data.stats.trained_tokens == int(batch.loss_mask.sum())
    assert batch.tokens.shape == (1, 512 * len(data))
    stats = data.stats
    assert (stats.conversations, stats.core_share, stats.without_domain) == (60, 0.5, 0)
    assert 0 <= stats.padding_share < 0.2


def test_over_length_policies_count_what_they_do(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(
        talk(*CASES[0]) + b"\n" + talk(user("q"), ai("four " * 400)) + b"\n" + talk(user("z" * 900), ai("a"))
    )
    with pytest.raises(DataError, match="a row has 256") as caught:
        sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1)
    assert caught.value.where == f"{path}:2"
    dropped = sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1, over_length="drop").stats
    assert (dropped.conversations, dropped.dropped_over_length, dropped.truncated) == (1, 2, 0)
    cut = sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1, over_length="truncate").stats
    assert (cut.conversations, cut.dropped_over_length, cut.truncated, cut.dropped_untrained) == (2, 0, 2, 1)
    assert math.isnan(cut.core_share)


def test_conversations_with_a_held_out_text_are_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    """Whoever says it, in the answer or the thoughts before it, and whatever its white space."""
    text = "what is  held out\nis not trained"
    lines = [
        talk(user(text), ai("yes")),
        talk(user("say it"), ai("what is held out is not\ttrained\n")),
        talk(user("say it"), ai("no", reasoning_content=text)),
        talk(user("say it"), ai(f"{text} at all")),
    ]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(lines))
    held_out = {text_digest(text), text_digest("")}
    stats = sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1, held_out_texts=held_out).stats
    assert (stats.dropped_held_out, stats.conversations) == (3, 1)
    assert sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1).stats.conversations == 4


def test_preview_shows_the_mask(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_bytes(talk(user("q"), ai("a")))
    data = sft_dataset([path], tokenizer_dir=folder, seq_len=256, seed=1)
    assert spans_of(data, folder) == [
        [
            (
                "<beginning_of_sentence>user name=user\nq<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
                False,
            ),
            ("a<end_of_sentence>", True),
            ("\n", False),
        ]
    ]
