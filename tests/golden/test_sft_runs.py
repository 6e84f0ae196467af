"""Named fine-tunings through the command line: a chain is bit for bit what the same fine-tunings are one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

from m1_stages.checkpoint import CheckpointStore, Committed

CHAT = 'data = ["chat.jsonl"]\nheld_out = 0.3\nlr_peak = 2e-3\nepochs = 2'
RUNS = f"""
[sft]
base_stage = "32k"
data = ["math.jsonl"]
global_batch_tokens = 1024
lr_warmup_share = 0
epochs = 1
[[sft.runs]]
name = "chat"
base_stage = "math"
{CHAT}
[[sft.runs]]
name = "math"
[[sft.runs]]
name = "by-hand"
base_stage = "sft"
{CHAT}
[[sft.runs]]
name = "cut"
base_stage = "math"
{CHAT.replace("chat.jsonl", "cut.jsonl")}
"""
"""A chain math, chat; beside it the same by the plain section and ``by-hand``, and a copy of chat that is stopped once."""


def talks(path: Path, factor: int) -> None:
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{n} * {factor}"}, {"role": "assistant", "content": str(factor * n)}],
        "domain": ("math", "chat")[n % 2]}) + "\n" for n in range(40)))  # fmt: skip


@dataclass
class Ran:
    """A finished scenario: the folder, and every command's exit code and output, by name."""

    folder: Path
    outputs: dict[str, tuple[int, str]]

    def finals(self, folder: str = "before-fresh") -> dict[str, Committed]:
        """The final checkpoint of each stage."""
        found = CheckpointStore(self.folder / folder / "checkpoints").committed()
        return {c.meta.stage: c for c in found if c.meta.stage_final}

    def tensors(self, stage: str) -> dict[str, torch.Tensor]:
        return tensors_of(self.finals()[stage].path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("sft-runs")
    config = make_run(folder, RUNS)
    config.write_text(config.read_text().replace("[run]", '[run]\ndevice = "cpu"'))
    talks(folder / "math.jsonl", 2)
    talks(folder / "chat.jsonl", 3)
    talks(folder / "cut.jsonl", 3)
    talks(folder / "other.jsonl", 5)

    def m1(*words: str) -> list[str]:
        return [words[0], *words[1:], "-c", str(config)]

    def copy(source: str, target: str) -> dict[str, Any]:
        return {"copy": [str(folder / source), str(folder / target)]}

    scenario: dict[str, Any] = {
        "pretrain": m1("pretrain", "--stage", "32k"),
        "no base": m1("sft", "--name", "chat"),
        "math": m1("sft", "--name", "math"),
        "chat": m1("sft", "--name", "chat"),
        "plain": m1("sft", "--name", "sft"),
        "by hand": m1("sft", "--name", "by-hand"),
        "stopped": {"config": str(config), "name": "cut", "steps": 1},
        "others": copy("other.jsonl", "cut.jsonl"),
        "changed": m1("sft", "--name", "cut"),
        "back": copy("chat.jsonl", "cut.jsonl"),
        "continued": m1("sft", "--name", "cut"),
        "rate": m1("sft", "--name", "math", "--set", "sft.lr_peak=3e-3"),
        "base": m1("sft", "--name", "by-hand", "--set", "sft.base_stage=32k"),
        "data": m1("sft", "--name", "math", "--set", 'sft.data=["other.jsonl"]'),
        "stages": m1("stages", "--json"),
        "generate": m1(
            "generate", "2 * 2", "--stage", "sft-chat", "--max-tokens", "1", "--out", str(folder / "answers.jsonl")
        ),
        "export": m1("export", "--stage", "sft-chat", "--out", str(folder / "export")),
        "evaluate": m1("evaluate", "--stage", "sft-chat"),
        "report": m1("report"),
        "kept": copy("run", "before-fresh"),
        "fresh": m1("sft", "--name", "math", "--fresh"),
    }
    (ended,) = run_on_ranks(
        1, "golden.sft_runs_worker:commands", {"commands": list(scenario.values())}, fresh=True, timeout_s=240
    )
    return Ran(
        folder, {name: (code, " ".join(text.split())) for name, (code, text) in zip(scenario, ended, strict=True)}
    )


def test_every_command_ended_as_it_should(ran: Ran) -> None:
    codes = {name: code for name, (code, _) in ran.outputs.items()}
    expected = {"no base": 5, "stopped": 75, "changed": 4, "rate": 2, "base": 2, "data": 2}
    assert codes == {name: expected.get(name, 0) for name in codes}, [
        (name, text[-600:]) for name, (code, text) in ran.outputs.items() if code != expected.get(name, 0)
    ]


def test_a_chain_is_bit_for_bit_what_its_links_are_by_hand(ran: Ran) -> None:
    finals = ran.finals()
    assert set(finals) == {"32k", "sft-math", "sft-chat", "sft", "sft-by-hand", "sft-cut"}
    assert finals["sft-chat"].meta.extra["contexts"] == {"32k": 128, "sft-math": 1024, "sft-chat": 1024}
    for one, other in (("sft-math", "sft"), ("sft-chat", "sft-by-hand"), ("sft-chat", "sft-cut")):
        first, second = ran.tensors(one), ran.tensors(other)
        assert first.keys() == second.keys()
        assert len(first) > 100
        assert all(torch.equal(first[key], second[key]) for key in first), (one, other)
        assert finals[one].meta.global_step == finals[other].meta.global_step
    math, chat = ran.tensors("sft-math"), ran.tensors("sft-chat")
    assert not any(torch.equal(math[key], chat[key]) for key in math if "word_embeddings" in key)


def test_a_finished_run_is_refused_with_other_settings(ran: Ran) -> None:
    assert (
        "stage sft-chat starts from the final checkpoint of stage sft-math, and there is none"
        in ran.outputs["no base"][1]
    )
    assert "run first: m1 sft --name math" in ran.outputs["no base"][1]
    assert "sft.lr_peak 0.001 -> 0.003: too late: fine-tuning math is finished" in ran.outputs["rate"][1]
    assert "start fine-tuning math over: m1 sft --name math --fresh" in ran.outputs["rate"][1]
    assert 'sft.base_stage "sft" -> "32k": fixed within fine-tuning by-hand' in ran.outputs["base"][1]
    assert 'sft.data ["math.jsonl"] -> ["other.jsonl"]: fixed within fine-tuning math' in ran.outputs["data"][1]


def test_a_run_changes_no_settings_of_what_it_starts_from(ran: Ran) -> None:
    assert events_of(ran.folder / "before-fresh" / "metrics.jsonl", "SettingsChanged") == []


def test_an_interrupted_run_waits_for_its_conversations(ran: Ran) -> None:
    """The tokens of other conversations were written meanwhile: they are refused, and those of the old ones come again."""
    assert "conversations changed since fine-tuning cut was interrupted at step 2" in ran.outputs["changed"][1]
    assert "fine-tuning cut starts from its own step 2" in ran.outputs["continued"][1]
    folders = {path.name for path in (ran.folder / "before-fresh").glob("sft-data*") if path.is_dir()}
    assert folders == {"sft-data", "sft-data-math", "sft-data-chat", "sft-data-by-hand", "sft-data-cut"}


def test_starting_over_renames_a_run_and_what_was_made_from_it(ran: Ran) -> None:
    old, new = ran.finals(), ran.finals("run")
    assert {s for s in old if s in new and old[s].sha256 == new[s].sha256} == {"32k", "sft", "sft-by-hand"}
    assert set(new) == {"32k", "sft", "sft-by-hand", "sft-math"}
    renamed = [path.name for path in (ran.folder / "run" / "checkpoints").iterdir() if path.name.endswith("before-1")]
    assert len(renamed) == 3 + 1, "math, chat, cut, and the checkpoint at which cut was stopped"


def test_every_command_knows_the_runs(ran: Ran) -> None:
    finals = ran.finals()
    told = {s["stage"]: s for s in json.loads(ran.outputs["stages"][1]) if s["stage"].startswith("sft")}
    assert list(told) == ["sft", "sft-math", "sft-chat", "sft-by-hand", "sft-cut"]
    assert {(s["state"], s["starts_from"]) for s in told.values()} == {
        ("done", "32k"),
        ("done", "sft-math"),
        ("done", "sft"),
    }
    assert told["sft-chat"]["starts_from_sha256"] == finals["sft-math"].sha256
    card = (ran.folder / "export" / "README.md").read_text()
    assert "| Stages | 32k -> sft-math -> sft-chat |" in card
    trained = {c.meta.stage: c.meta.stage_step * 1024 for c in finals.values()}
    for stage in ("sft-math", "sft-chat"):
        assert f"| {stage} | 1,024 | 1e+06 | {trained[stage]:,} | conversations |" in card
    answer = json.loads((ran.folder / "answers.jsonl").read_text())
    assert answer["prompt_tokens"] > 20, "through the chat template"
    last = events_of(ran.folder / "before-fresh" / "metrics.jsonl", "HeldOutMeasured")
    chat = [e for e in last if e["stage"] == "sft-chat"]
    assert len(chat) == 2, "once after training, once by m1 evaluate"
    assert chat[0]["domains"] == chat[1]["domains"]
    assert [d["domain"] for d in chat[0]["domains"]] == ["math", "chat"]
    assert f"| held-out conversations, loss of trained tokens | {chat[0]['loss']:.4f} |" in card
    report = (ran.folder / "before-fresh" / "report.html").read_text()
    for stage, checkpoint in finals.items():
        if stage.startswith("sft"):
            steps_done = checkpoint.meta.stage_step
            assert f"<td>{steps_done} / {steps_done}</td>" in report.split(f"<td>{stage}</td>")[1].split("</tr>")[0]
