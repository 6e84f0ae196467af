"""The model card: what the checkpoint records, and nothing of the present configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.exporting import LINEAGE, MODEL, contents, make_tokenizer, relaxed
from support.importing import RELEASED

from m1_stages.checkpoint import CheckpointMeta, Committed
from m1_stages.decay import released_slopes
from m1_stages.errors import DataError
from m1_stages.evaluation.results import result_path
from m1_stages.hf.model_card import CARD, checkpoint_of_card
from m1_stages.hf.targets import Target
from m1_stages.jobs.export_facts import lineage_of

RECORDED = {
    "stages.32k.rope_base": 1e4, "stages.32k.tokens": 7_000_000, "stages.32k.short": 0.9, "stages.32k.medium": 0.1,
    "stages.32k.long": 0.0, "stages.32k.core_share": 0.7, "stages.32k.long_qa_share": 0.1,
    "stages.32k.domains": {"code": 0.25, "stem": 0.75},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def committed(run: Path, stage: str = "sft", **extra: Any) -> Committed:
    values: dict[str, Any] = {"tokens_seen": 9_000, "rope_base": 5e6, "model": dataclasses.asdict(MODEL)}
    meta = CheckpointMeta(
        stage=stage, stage_step=1, global_step=12, stage_final=True, config_sha256="c1", data_fingerprint="d1",
        topology={}, decay={"policy": "relax", "slopes": released_slopes(4, 4)},
        extra=values | {"config": RECORDED} | extra, versions={"torch": "2.15"},
    )  # fmt: skip
    return Committed(path=run / "checkpoints" / "step_00000012", meta=meta, files={}, sha256="ab" * 32)


def test_the_lineage_is_what_the_checkpoint_records(tmp_path: Path) -> None:
    source = {"source": "MiniMax-M1-40k", "rope_base": 1e6}
    found = lineage_of(committed(tmp_path, **{"import": source}), {"import": 4096, "32k": 640, "sft": 320}, "mit")
    first, second, last = found.stages
    assert (first.name, first.row_tokens, first.rope_base, first.mix) == (
        "import",
        4096,
        1e6,
        "imported: MiniMax-M1-40k",
    )
    assert (second.rope_base, second.tokens) == (1e6, 7_000_000), "no base below the imported one"
    assert second.mix == (
        "90% short, 10% medium, 0% long documents; 70% STEM, code, books and reasoning; 10% long question-answer data in the "
        "last fifth; domains code 0.25, stem 0.75"
    )
    assert (last.rope_base, last.tokens, last.mix) == (5e6, None, "conversations")
    assert (found.license, found.tokens_seen, found.global_step, found.evaluation) == ("mit", 9_000, 12, ())
    (older,) = lineage_of(committed(tmp_path, "128k", config={}), {"32k": 640}, "").stages
    assert (older.rope_base, older.tokens, older.mix) == (None, None, "")


def test_each_link_of_a_chain_is_told_with_its_tokens(tmp_path: Path) -> None:
    way = {"32k": 640, "sft": 320, "sft-math": 160, "sft-chat": 320}
    chat = committed(tmp_path, "sft-chat", contexts=way, entered_at={"sft-math": 5_000, "sft-chat": 7_500})
    _, older, math, last = lineage_of(chat, way, "").stages
    assert (older.name, older.tokens) == ("sft", None), "an older version trained it"
    assert (math.name, math.tokens, math.row_tokens, math.rope_base, math.mix) == (
        "sft-math",
        2_500,
        160,
        5e6,
        "conversations",
    )
    assert (last.name, last.tokens, last.row_tokens, last.rope_base) == ("sft-chat", 1_500, 320, 5e6)


def test_held_out_conversations_of_this_checkpoint_are_told(tmp_path: Path) -> None:
    path = result_path(tmp_path, "sft-chat")
    path.parent.mkdir(parents=True)
    domain = {"domain": "math", "conversations": 2, "trained_tokens": 9, "loss": 1.25}
    result = {"stage": "sft-chat", "checkpoint": "x", "checkpoint_sha256": "ab" * 32, "global_step": 12, "loss": 1.5,
              "domains": [domain, domain | {"domain": "", "loss": 2}], "seconds": 0.5}  # fmt: skip
    path.write_text(json.dumps(result))
    chat = committed(tmp_path, "sft-chat")
    assert lineage_of(chat, {"sft-chat": 320}, "").evaluation == (
        ("held-out conversations, loss of trained tokens", "1.5000"),
        ("held-out conversations, math", "1.2500"),
        ("held-out conversations, no domain named", "2.0000"),
    )
    assert lineage_of(dataclasses.replace(chat, sha256="cd" * 32), {"sft-chat": 320}, "").evaluation == ()
    path.write_text(json.dumps(result | {"loss": "much"}))
    with pytest.raises(DataError, match="result of an evaluation is damaged: loss is 'much'"):
        lineage_of(chat, {"sft-chat": 320}, "")


def test_an_evaluation_of_this_checkpoint_alone_is_told(tmp_path: Path) -> None:
    path = result_path(tmp_path, "32k")
    path.parent.mkdir(parents=True)
    result = {"stage": "32k", "checkpoint_sha256": "ab" * 32, "recall": 0.625,
              "needles": {"lengths": [640, 1280], "recall": [[1.0, 0.5], [0.75, 0.25]]}}  # fmt: skip
    path.write_text(json.dumps(result))
    this = committed(tmp_path, "32k")
    assert lineage_of(this, {"32k": 640}, "").evaluation == (
        ("needles found, mean over lengths and depths", "62.5%"),
        ("needles found in 640 tokens", "75.0%"),
        ("needles found in 1,280 tokens", "50.0%"),
    )
    assert lineage_of(dataclasses.replace(this, sha256="cd" * 32), {"32k": 640}, "").evaluation == ()
    path.write_text(json.dumps(result | {"needles": {"lengths": "x"}}))
    with pytest.raises(DataError, match="result of an evaluation is damaged"):
        lineage_of(this, {"32k": 640}, "")


def test_the_card_says_what_the_lineage_says(tokenizer_dir: Path, tmp_path: Path) -> None:
    lineage = dataclasses.replace(LINEAGE, license="apache-2.0", evaluation=(("needles found", "62.5%"),))
    card = contents(tokenizer_dir, slopes=relaxed(MODEL), lineage=lineage).card().decode()
    assert card.startswith(
        '---\nlibrary_name: transformers\nlicense: "apache-2.0"\npipeline_tag: text-generation\n---\n'
    )
    for row in (
        "| 32k | 1,024 | not recorded | not recorded | not recorded |",
        "| 128k | 4,096 | 5e+06 | 9 | x |",
        "| needles found | 62.5% |",
        "| Licence | apache-2.0 |",
        "| Epsilon | 1e-05; lightning output norm 1e-06 |",
        "| Layers | 3 lightning attention, 1 softmax attention |",
        "| Decay policy | relax; half-lives of the heads 1.63 to 104 tokens in layer 0, 4.89 to 313 tokens in layer 2 |",
    ):
        assert f"\n{row}\n" in card, row
    (tmp_path / CARD).write_text(card)
    assert checkpoint_of_card(tmp_path) == "ab" * 32
    bare = contents(tokenizer_dir).card().decode()
    assert "license:" not in bare
    assert "| Licence | not stated |" in bare
    assert "This checkpoint was not evaluated." in bare


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("hf", ["left-padded", "its bf16 decoding rounds decay", "8 of 16 channels", "They read the targets text01 and gguf"]),
        ("text01", ["transformers itself does not load it", "Its lightning norm uses epsilon 1e-05, this model 1e-06"]),
        ("gguf", ["from build b10437 on", "with epsilon 1e-05, this model was trained with 1e-06"]),
    ],
)  # fmt: skip
def test_every_loader_s_known_defects_are_told(tokenizer_dir: Path, target: Target, says: list[str]) -> None:
    notes = contents(tokenizer_dir, RELEASED, target=target).notes
    card = contents(tokenizer_dir, RELEASED, target=target).card().decode()
    for text in says:
        assert any(text in note for note in notes), text
        assert text in card
    large = dataclasses.replace(RELEASED, vocab_size=200_064)
    assert any("never sample" in n for n in contents(tokenizer_dir, large, target=target).notes) is (target == "gguf")
    small = dataclasses.replace(RELEASED, softmax_every=4)
    assert any(n.startswith("Not for llama.cpp") for n in contents(tokenizer_dir, small, target=target).notes) is (
        target == "text01"
    )
