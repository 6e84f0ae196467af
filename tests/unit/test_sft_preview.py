"""``m1 sft --dry-run``: samples with their mask, lengths, domains and reflection, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer
from typer.testing import CliRunner

from m1_stages.jobs import sft_data, sft_preview
from m1_stages.run_dir import SFT_DATA
from m1cli.app import app


class _Manifest:
    """What a preview needs of the prepared data's manifest."""

    held_out_digests: tuple[bytes, ...] = ()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four conversations, one of them short of reflection, and a tokenizer; the data's manifest is not looked at."""
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    write_tokenizer(tmp_path / "data" / "tokenizer", chat_template=SOURCE)
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": answer}],
            "domain": domain,
        }
        for n, (answer, domain) in enumerate(
            [("wait a", "math"), ("however b", "math"), ("recheck c", "code"), ("d" * 200, "chat")]
        )
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m1.toml").write_text(
        'preset = "tiny"\n[curriculum]\nlength_scale = 0.0625\n[sft]\ndata = ["chats.jsonl"]\ncontext_tokens = 8192\n'
    )
    monkeypatch.setattr(sft_preview, "open_tokenizer", lambda resolved: _Manifest())
    return tmp_path / "m1.toml"


def dry_run(config: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["sft", "--dry-run", "-c", str(config), *words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_samples_show_their_mask_and_tables_their_counts(config: Path) -> None:
    text = dry_run(config, "--samples", "2")
    assert "q0<end_of_sentence> <beginning_of_sentence>assistant ⟦wait a<end_of_sentence>⟧" in text
    assert f"{config.parent / 'chats.jsonl'}:1, 29 tokens, domain math ⟦trained⟧ not trained" in text
    assert text.count("⟧ ") >= 2
    assert "q1" not in text, "two samples: the first and the last"
    for bucket in ("16 to 31 1 █", "32 to 63 2 █", "64 to 127 0 128", "128 to 255 1 █"):
        assert bucket in text
    assert "math 2 50.0%" in text
    assert "math and code: 75.0% of the conversations that name a domain, MiniMax-M1 has 60%" in text
    assert "all 3 13.16 3 13.16" in text, "three matches in 7 + 10 + 10 + 201 trained tokens"
    assert "conversations 3 of 4 75.0% 3 of 4 75.0%" in text
    assert "4 of 4 conversations in 1 rows" in text
    assert {entry.name for entry in config.parent.iterdir()} == {"data", "chats.jsonl", "m1.toml"}


def test_selection_is_shown_before_and_after(config: Path) -> None:
    text = dry_run(config, "--set", "sft.reflection_min_per_1k_tokens=1", "--set", "sft.reflection_weight=2")
    assert "all 3 13.16 6 111.11" in text
    assert "conversations 3 of 4 75.0% 6 of 6 100.0%" in text
    assert "1 left out: too few patterns of reflection" in text
    assert "6 samples in a pass of 4 conversations" in text
    assert (
        "patterns of reflection: 3 in 75.0% of 4 conversations, 13.16 in 1,000 trained tokens; after selection: 6"
        in text
    )


def test_what_the_run_has_tokenized_is_used(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m1_stages.config.load import load_config

    sft_data.open_samples(load_config(config), _Manifest())  # type: ignore[arg-type]
    assert (config.parent / "run" / SFT_DATA / "manifest.json").is_file()
    monkeypatch.setattr(sft_data, "write_store", lambda *given, **more: pytest.fail("it is there"))
    assert "4 of 4 conversations" in dry_run(config)
    sft_data.open_samples(load_config(config), _Manifest())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sft.held_out=1.0", "held_out 1 is not in [0, 1)"),
        ('sft.weights={"other.jsonl"=1}', "'other.jsonl' has a weight and is not in sft.data"),
        ('sft.weights={"chats.jsonl"=-1}', "the weight of 'chats.jsonl' is -1"),
        ('sft.reflection_patterns=["wait", "Wait "]', "a pattern is empty or there twice"),
        ("sft.reflection_weight=-1", "sft.reflection_weight is -1"),
        ("sft.lora_rank=-1", "lora_rank is -1"),
        ("sft.lora_alpha=0", "sft.lora_alpha is 0"),
        ('sft.lora_targets=["experts"]', "there are no matrices called experts"),
        ("sft.lora_targets=[]", "is empty, or names one twice"),
        ("sft.held_out=0.999999", "no conversation of 4 is left to train"),
        ("sft.context_tokens=512", "the conversation has"),
    ],
)
def test_what_cannot_work_is_refused(config: Path, setting: str, message: str) -> None:
    done = CliRunner().invoke(app, ["sft", "--dry-run", "-c", str(config), "--set", setting])
    assert done.exit_code in (2, 4)
    assert message in " ".join(done.output.split())
