"""Whether data can feed the stages: one answer for all commands, before anything is trained, and a proposal that works."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from m1_data.sampling.stage_draw import document_lengths
from m1_data.storage.cell import Cell
from m1_data.storage.manifest import load_manifest
from m1_data.storage.store import open_store
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import DataError
from m1_stages.events import Event
from m1_stages.jobs import pretrain
from m1_stages.stage_data import impossible_stages, refuse_impossible_stages, stage_draw, working_changes
from m1cli.app import app

SHORT, MEDIUM, LONG = (Cell("texts", "code", bucket) for bucket in ("lt32k", "32k-128k", "128k-256k"))


def resolved(tmp_path: Path, *overrides: str) -> Resolved:
    path = tmp_path / "m1.toml"
    path.write_text('preset = "tiny"\n')
    return load_config(path, list(overrides))


def documents(count: int, tokens: int) -> np.ndarray:
    return np.full(count, tokens, dtype=np.int64)


ENOUGH = {SHORT: documents(6_000, 100), MEDIUM: documents(400, 300), LONG: documents(100, 800)}


def test_a_draw_is_what_the_stage_trains(tmp_path: Path) -> None:
    config = resolved(tmp_path)
    draw = stage_draw(config, "128k")
    assert (draw.seq_len, draw.num_rows, draw.tokens) == (512, 480, 245_760)
    assert (draw.mix.stage, draw.previous.stage if draw.previous else "", draw.seed) == ("128k", "32k", 1234)
    assert stage_draw(config, "32k").previous is None


def test_stages_that_can_run_are_not_refused(tmp_path: Path) -> None:
    assert impossible_stages(resolved(tmp_path), STAGE_NAMES, ENOUGH) == {}
    refuse_impossible_stages(resolved(tmp_path), STAGE_NAMES, ENOUGH)


def test_a_missing_length_class_says_what_there_is_and_what_is_needed(tmp_path: Path) -> None:
    """Equal documents are of one class whatever the scale: nothing but other documents, or fewer stages, help."""
    config = resolved(tmp_path)
    with pytest.raises(DataError) as caught:
        refuse_impossible_stages(config, STAGE_NAMES, {SHORT: documents(8_000, 60)})
    assert caught.value.what.startswith(
        "stages 128k, 256k, 512k, 1m cannot run on this data: stage 128k draws 70% of its tokens from medium documents and "
        "there are none; stage 256k draws 45% of its tokens from medium documents, 20% of its tokens from long documents"
    )
    assert caught.value.where == (
        "at hand: 480,000 tokens of short documents, 0 tokens of medium documents, 0 tokens of long documents; the longest "
        "document has 60 tokens"
    )
    assert "stage 128k needs 43,008 tokens in documents of 128 to 511 tokens" in caught.value.fix
    assert "stage 1m needs 24,576 tokens in documents of 512 tokens or more" in caught.value.fix
    assert caught.value.fix.endswith("; what can run now: m1 pretrain --stage 32k")
    refuse_impossible_stages(config, ["32k"], {SHORT: documents(8_000, 60)})
    with pytest.raises(DataError) as only:
        refuse_impossible_stages(config, ["128k"], {SHORT: documents(8_000, 60)})
    assert "what can run now" not in only.value.fix


def test_too_few_tokens_propose_as_many_as_there_are(tmp_path: Path) -> None:
    """Four passes over 60,000 tokens are 29 steps of 8,192 tokens."""
    config, lengths = resolved(tmp_path), {SHORT: documents(1_000, 60)}
    with pytest.raises(DataError, match="the usable data has 60,000, 4 passes are 240,000") as caught:
        refuse_impossible_stages(config, ["32k"], lengths)
    assert caught.value.fix.endswith(": m1 prepare-data --set stages.32k.tokens=237568")
    refuse_impossible_stages(resolved(tmp_path, "stages.32k.tokens=237568"), ["32k"], lengths)
    with pytest.raises(DataError):
        refuse_impossible_stages(resolved(tmp_path, "stages.32k.tokens=245760"), ["32k"], lengths)


def test_less_than_a_step_of_tokens_says_how_many_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        refuse_impossible_stages(resolved(tmp_path), ["32k"], {SHORT: documents(10, 60)})
    assert caught.value.fix == "add sources: stage 32k needs 142,760 tokens more"


def test_the_largest_scale_that_works_is_proposed(tmp_path: Path) -> None:
    """Half of it makes 300 tokens a long document (256 or more) and 100 a medium one."""
    short = np.concatenate([documents(30_000, 20), documents(2_000, 60), documents(2_000, 100)])
    lengths = {SHORT: short, MEDIUM: documents(800, 300)}
    changes = working_changes(resolved(tmp_path), STAGE_NAMES, lengths)
    assert list(changes) == ["curriculum.length_scale"]
    assert float(changes["curriculum.length_scale"]) == 1 / 512


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text whose longest documents have about 230 tokens: no long ones, and too few tokens of short ones."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    words = [f"{a}{b}" for a in "bdgklmnprst" for b in ("an", "er", "ist", "ong", "ulo")]
    for name in ("a", "b"):
        texts = [" ".join(rng.choices(words, k=rng.choice((6, 12, 25, 60, 230)))) for _ in range(2_500)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = "".join(
        f'[[data.sources]]\nname = "{name}"\ndomain = "{domain}"\nformat = "jsonl"\npath = "{name}.jsonl"\n'
        for name, domain in (("a", "code"), ("b", "general"))
    )
    (folder / "m1.toml").write_text(f'preset = "tiny"\n[tokenizer]\nvocab_size = 400\n{sources}')
    return folder


def test_prepare_data_says_what_will_be_refused_and_its_proposal_works(prepared: Path) -> None:
    config = prepared / "m1.toml"
    shown = CliRunner().invoke(app, ["prepare-data", "--config", str(config)])
    assert shown.exit_code == 0, "the data is complete: some stages can run on it"
    assert "cannot run: stage 256k draws 20% of its tokens from long documents and there are none" in shown.output
    assert "stage 128k: STEM, code, book and reasoning" in shown.output
    last = shown.output[
        shown.output.index("m1 pretrain will refuse: stages 32k, 256k, 512k, 1m cannot run on this data") :
    ]
    proposal = re.search(r"this works, .*: m1 prepare-data((?: --set \S+=\S+)+)", last)
    assert proposal, last
    assert "curriculum.length_scale=0.0009765625" in proposal[1]
    assert "stages.32k.tokens=" in proposal[1]
    overrides = proposal[1].replace(" --set ", " ").split()
    again = CliRunner().invoke(
        app, ["prepare-data", "--config", str(config), *[x for o in overrides for x in ("--set", o)]]
    )
    assert (again.exit_code, "refuse" in again.output) == (0, False), again.output
    lengths = document_lengths(open_store(prepared / "data"))
    assert impossible_stages(load_config(config, overrides), STAGE_NAMES, lengths) == {}
    assert all(mix["possible"] for mix in load_manifest(prepared / "data").mixes.values())


def test_pretrain_refuses_before_it_begins_what_it_would_refuse_later(prepared: Path) -> None:
    config = prepared / "m1.toml"
    overrides = ["data.out=other", "run.dir=never"]
    ready = CliRunner().invoke(app, ["prepare-data", "--config", str(config), "--set", overrides[0]])
    assert ready.exit_code == 0
    events: list[Event] = []
    with pytest.raises(DataError, match="stages 32k, 256k, 512k, 1m cannot run on this data"):
        pretrain.run(load_config(config, overrides), list(STAGE_NAMES), [events.append])
    assert not events
    assert not (prepared / "never").exists()
