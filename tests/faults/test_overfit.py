"""Twenty conversations learnt by heart through the command line, then asked for: of ``m1 generate`` and of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_run import make_run

pytestmark = pytest.mark.faults

THINGS = "apple river stone cloud paper lamp bird horse wheel glass tree boat shoe clock bread salt wind coin door rope"
SAID = "red blue green seven nine cold warm north south tall"
SFT = """
[sft]
data = ["chats.jsonl"]
base_stage = "32k"
context_tokens = 65536
epochs = 160
global_batch_tokens = 512
lr_peak = 5e-3
lr_final = 3e-4
"""


def answer(number: int) -> dict[str, str]:
    words = SAID.split()
    said = f"It is {words[number % 10]} and {words[(3 * number + number // 10 + 1) % 10]}."
    return {"role": "assistant", "reasoning_content": f"Wait, {THINGS.split()[number]}: let me check.", "content": said}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt them, half a minute on one core."""
    folder = tmp_path_factory.mktemp("overfit")
    make_run(folder, SFT)
    asked = [[{"role": "user", "content": f"What is {thing}?"}] for thing in THINGS.split()]
    talks = [{"messages": [*turns, answer(number)]} for number, turns in enumerate(asked)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (folder / "asked.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in asked))
    m1(folder, "pretrain", "--stage", "32k")
    m1(folder, "sft")
    return folder


def m1(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "m1cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


EXPECTED = [
    f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"
    for turn in map(answer, range(len(THINGS.split())))
]


def test_generate_says_all_twenty(folder: Path) -> None:
    assert len(set(EXPECTED)) == 20
    greedy = ("--temperature", "0", "--max-tokens", "100")
    m1(folder, "generate", "--stage", "sft", "--prompts", "asked.jsonl", *greedy, "--out", "said.jsonl")
    said = {row["prompt"]: row for row in map(json.loads, (folder / "said.jsonl").read_text().splitlines())}
    assert [said[number]["text"] for number in range(20)] == EXPECTED
    assert {row["finish_reason"] for row in said.values()} == {"stop"}


def test_transformers_says_them_from_the_export(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    m1(folder, "export", "--stage", "sft", "--out", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    said = []
    for row in map(json.loads, (folder / "asked.jsonl").read_text().splitlines()):
        inputs = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(inputs["input_ids"], max_new_tokens=100, do_sample=False)
        said.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    assert said == [text + "<end_of_sentence>" for text in EXPECTED]
