"""Runs that start from an imported model, through the command line: what they start from, and that they continue bit-equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.exporting import stored
from support.importing import released_tensors, write_source
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.released_reference import source_logits
from support.tiny_checkpoint import contents_of, tensors_of
from support.tiny_run import make_run

from m1_data.sampling.loader import PackedBatch, collate
from m1_data.sft.dataset import SFTDataset
from m1_data.storage.store import open_prepared
from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.config.load import load_config
from m1_stages.curriculum import plan_stage
from m1_stages.decay import released_slopes
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.jobs.pretrain import stage_rows
from m1_stages.jobs.sft_data import open_samples, selection

SETTINGS = ["model.vocab_size=400", "model.rotary_dim=8", "sft.global_batch_tokens=1024", 'run.device="cpu"',
            "sft.lr_warmup_share=0", 'sft.data=["chats.jsonl"]']  # fmt: skip

AGAIN = 'sft.runs=[{name="again", base_stage="import"}]'
"""A fine-tuning that is told to start from the import, beside what was trained from it."""
HELD_OUT = [
    "--set",
    "sft.held_out=0.4",
    "--set",
    "sft.lr_peak=1e-12",
    "--set",
    "sft.lr_final=1e-12",
    "--set",
    "sft.epochs=1",
]
"""Fine-tuning that changes nothing, so that the source's own forward pass gives the loss at its end."""


@dataclass
class Ran:
    """A finished scenario: every command's exit code and output, by name."""

    config: Path
    source: Path
    outputs: dict[str, tuple[int, str]]

    def checkpoints(self, run: str) -> dict[str, Committed]:
        """The newest checkpoint of each stage of a run, and of "import"."""
        found: dict[str, Committed] = {}
        for committed in CheckpointStore(self.config.parent / run / "checkpoints").committed():
            found.setdefault(committed.meta.stage, committed)
        return found

    def events(self, run: str, name: str) -> list[dict[str, Any]]:
        return events_of(self.config.parent / run / "metrics.jsonl", name)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("import-run")
    config = make_run(folder)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{n} + {n}"}, {"role": "assistant", "content": f"<think>double</think>{2 * n}"}],
        "domain": ("math", "chat", "")[n % 3]}) + "\n"
        for n in range(40)))  # fmt: skip
    model = load_config(config, SETTINGS).config.model
    source = write_source(
        folder / "hf", model, tensors=released_tensors(model, dtype=torch.float32), with_tokenizer=False
    )
    for path in (folder / "data" / "tokenizer").iterdir():
        shutil.copy(path, source)
    shutil.copytree(source, folder / "other-tokenizer")
    text = (source / "tokenizer.json").read_text()
    (folder / "other-tokenizer" / "tokenizer.json").write_text(text.replace("{", "{ ", 1))

    def options(run: str) -> list[str]:
        return [word for value in (f"run.dir={run}", *SETTINGS) for word in ("--set", value)]

    def m1(run: str, *words: str) -> list[str]:
        return [words[0], "-c", str(config), *words[1:], *options(run)]

    def cut(run: str, at: int) -> dict[str, Any]:
        return {"config": str(config), "stages": "128k", "stop_at": at, "set": [f"run.dir={run}", *SETTINGS]}

    scenario: dict[str, Any] = {
        "import": m1("run", "import", str(source)),
        "stages": m1("run", "stages"),
        "pretrain": m1("run", "pretrain", "--stage", "128k"),
        "stages after": m1("run", "stages", "--json"),
        "beside": m1("run", "pretrain", "--stage", "512k"),
        "back": m1("run", "pretrain", "--stage", "32k"),
        "evaluate": m1("run", "evaluate", "--stage", "128k"),
        "next": m1("run", "pretrain", "--stage", "256k"),
        "export": m1("run", "export", "--out", str(folder / "export-256k")),
        "export import": m1(
            "run", "export", "--target", "text01", "--checkpoint", str(folder / "run" / "checkpoints" / "step_00000000")
        ),
        "import again": m1("run", "import", str(source)),
        "import for cuts": m1("cut", "import", str(source)),
        "cut": cut("cut", 2),
        "cut again": cut("cut", 4),
        "continued": m1("cut", "pretrain", "--stage", "128k"),
        "import for sft": m1("tuned", "import", str(source)),
        "sft": m1("tuned", "sft"),
        "sft from the import": m1("tuned", "sft", "--name", "again", "--set", AGAIN),
        "export sft": m1("tuned", "export", "--stage", "sft"),
        "import for held out": m1("still", "import", str(source)),
        "held out": m1("still", "sft", *HELD_OUT),
        "held out again": m1("still", "sft", *HELD_OUT),
        "import with another tokenizer": m1("strange", "import", str(folder / "other-tokenizer")),
        "refused": m1("strange", "pretrain", "--stage", "128k"),
        "fresh": m1("cut", "pretrain", "--stage", "32k", "--fresh"),
    }
    job = {"commands": list(scenario.values())}
    (ended,) = run_on_ranks(1, "golden.import_run_worker:commands", job, fresh=True, timeout_s=240)
    return Ran(
        config,
        source,
        {name: (code, " ".join(text.split())) for name, (code, text) in zip(scenario, ended, strict=True)},
    )


def reference_loss(source: Path, batch: PackedBatch) -> float:
    """Cross-entropy of the source's own forward pass, each document alone."""
    edges, total = batch.cu_seqlens.tolist(), 0.0
    for start, end in pairwise(edges):
        logits = source_logits(source, batch.tokens[0, start:end])
        loss = F.cross_entropy(logits, batch.labels[0, start:end], reduction="none")
        total += float((loss * batch.loss_mask[0, start:end]).sum())
    return total / batch.trained_tokens


def test_every_command_ended_as_it_should(ran: Ran) -> None:
    codes = {name: code for name, (code, _) in ran.outputs.items()}
    expected = {"cut": 75, "cut again": 75, "beside": 5, "back": 5, "import again": 2, "refused": 2}
    assert codes == {name: expected.get(name, 0) for name in codes}, [
        (name, text[-600:]) for name, (code, text) in ran.outputs.items() if code != expected.get(name, 0)
    ]


def test_pretraining_starts_from_it_and_says_so(ran: Ran) -> None:
    said = "the imported hf: its weights, with a fresh optimizer; the RoPE base stays 10M, the decay rates move from its own"
    assert said in ran.outputs["pretrain"][1]
    first, *later = ran.events("run", "StageStarted")
    assert (first["stage"], first["starts_from"], first["rope_base"]) == ("128k", said, 1e7)
    slopes = released_slopes(8, 2)
    assert first["slopes_old"] == slopes, "the policy's own slopes of stage 32k are others"
    assert first["slopes_new"] != slopes
    assert later[0]["starts_from"] == "weights and optimizer of the final 128k checkpoint"
    resolved = load_config(ran.config, [*SETTINGS, "run.dir=run"])
    rows = stage_rows(resolved, plan_stage(resolved, "128k"), open_prepared(ran.config.parent / "data").training)
    step = ran.events("run", "StepDone")[0]
    batch = rows.batch(step["sample_ids"])
    assert len(batch.doc_lengths) > 2
    assert step["loss"] == pytest.approx(reference_loss(ran.source, batch), abs=2e-5)


def test_exports_of_it_name_the_source_and_hold_its_weights(ran: Ran) -> None:
    folder = ran.config.parent
    for export in (folder / "export-256k", folder / "run" / "export-import-text01", folder / "tuned" / "export-sft"):
        assert "imported: hf" in (export / "README.md").read_text(), export
    source, again = stored(ran.source), stored(folder / "run" / "export-import-text01")
    assert source.keys() <= again.keys()
    assert all(torch.equal(again[name], tensor.to(again[name].dtype)) for name, tensor in source.items())


def test_checkpoints_carry_the_base_and_the_lineage(ran: Ran) -> None:
    found = ran.checkpoints("run")
    assert found.keys() == {"import", "128k", "256k"}
    record = found["import"].meta.extra["import"]
    for stage in ("128k", "256k"):
        extra = found[stage].meta.extra
        assert extra["rope_base"] == 1e7
        assert extra["import"] == record
        assert list(extra["contexts"]) == ["import", "128k", "256k"][: 2 if stage == "128k" else 3]
    state = contents_of(found["128k"].path)["common"]["train_state"]
    assert (state["global_step"], state["tokens_seen"]) == (6, 6144)


def test_a_cut_run_continues_bit_equal(ran: Ran) -> None:
    (final,) = (ran.config.parent / "cut" / "checkpoints").glob("step_00000006.before-*")  # put aside by "fresh"
    mine, theirs = tensors_of(final), tensors_of(ran.checkpoints("run")["128k"].path)
    assert len(theirs) > 100
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_stages_show_it(ran: Ran) -> None:
    shown = ran.outputs["stages"][1]
    assert "Imported: hf (index " in shown
    assert "no RoPE base goes below its 10M" in shown
    chain = {row["stage"]: row for row in json.loads(ran.outputs["stages after"][1])}
    assert [row["starts_from"] for row in chain.values()] == [None, "import", "128k", "256k", "512k", "import"]
    assert [row["state"] for row in chain.values()] == ["skipped", "done", "to do", "to do", "to do", "to do"]
    assert {row["rope_base"] for row in list(chain.values())[:5]} == {1e7}
    assert chain["128k"]["starts_from_sha256"] == ran.checkpoints("run")["import"].sha256


def test_stages_that_would_begin_beside_it_are_refused(ran: Ran) -> None:
    assert "stage 512k would start from the imported model again" in ran.outputs["beside"][1]
    assert "m1 pretrain --stage 256k" in ran.outputs["beside"][1]
    assert "stage 32k would start from the imported model again" in ran.outputs["back"][1]
    assert "the run has checkpoints already (step_00000010 is the newest)" in ran.outputs["import again"][1]


def test_starting_over_keeps_the_import(ran: Ran) -> None:
    assert "starts from the imported hf" in ran.outputs["fresh"][1]
    assert ran.checkpoints("cut").keys() == {"import", "32k"}
    assert ran.checkpoints("cut")["32k"].meta.extra["rope_base"] == 1e7


def test_fine_tuning_starts_from_it(ran: Ran) -> None:
    started, again = ran.events("tuned", "StageStarted")
    assert started["starts_from"].endswith("the RoPE base stays 10M, the decay rates stay its own")
    assert (again["stage"], again["starts_from"]) == ("sft-again", started["starts_from"])
    plain, named = (tensors_of(ran.checkpoints("tuned")[stage].path) for stage in ("sft", "sft-again"))
    assert all(torch.equal(plain[key], named[key]) for key in plain), (
        "asked for, it starts from the import as the first did"
    )
    tuned = ran.checkpoints("tuned")["sft"].meta
    assert (tuned.extra["rope_base"], tuned.decay["slopes"]) == (1e7, released_slopes(8, 2))
    resolved = load_config(ran.config, SETTINGS)
    step = ran.events("tuned", "StepDone")[0]
    rows = SFTDataset(open_samples(resolved, open_tokenizer(resolved)), selection(resolved))
    batch = rows.batch(step["sample_ids"])
    assert 0 < batch.loss_mask.mean() < 0.9
    assert step["loss"] == pytest.approx(reference_loss(ran.source, batch), abs=2e-5)


def test_held_out_conversations_are_not_trained_and_measured_by_domain(ran: Ran) -> None:
    resolved = load_config(ran.config, [*SETTINGS, "run.dir=still", *HELD_OUT[1::2]])
    rows = SFTDataset(open_samples(resolved, open_tokenizer(resolved)), selection(resolved))
    held_out = {number for row in rows.held_out for number in row}
    drawn = [number for index in range(len(rows)) for number in rows.numbers(index)]
    assert sorted([*drawn, *held_out]) == list(range(40))
    (measured,) = ran.events("still", "HeldOutMeasured")
    names = rows.store.manifest.domains
    assert [d["domain"] for d in measured["domains"]] == list(names)
    for number, found in enumerate(measured["domains"]):
        samples = [[rows.segment(n)] for n in sorted(held_out) if rows.store.samples["domain"][n] == number]
        batch = collate(samples, range(len(samples)), seq_len=rows.seq_len, pad_id=rows.pad_id)
        assert (found["conversations"], found["trained_tokens"]) == (len(samples), batch.trained_tokens)
        assert found["loss"] == pytest.approx(reference_loss(ran.source, batch), abs=2e-5), found["domain"]
    result = json.loads((ran.config.parent / "still" / "evaluation" / "sft.json").read_text())
    assert result["loss"] == measured["loss"]
    assert f"held-out conversations: loss {measured['loss']:.4f}" in ran.outputs["held out"][1]


def test_another_tokenizer_is_refused(ran: Ran) -> None:
    assert "the checkpoint was trained with another tokenizer" in ran.outputs["refused"][1]
