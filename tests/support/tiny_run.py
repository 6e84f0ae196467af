"""A tiny prepared data folder and configuration for tests that train: seconds on one core."""

from __future__ import annotations

import json
import random
from pathlib import Path

from m1_data.prepare.run import prepare
from m1_data.storage.manifest import Manifest
from m1_stages.config.load import load_config

CONFIG = """
preset = "tiny"
[model]
hidden_size = 32
num_heads = 2
num_kv_heads = 1
num_experts = 4
expert_hidden_size = 32
[tokenizer]
vocab_size = 400
[data]
verify_docs = 4
[[data.sources]]
name = "sums"
domain = "stem"
format = "jsonl"
path = "sums.jsonl"
[[data.sources]]
name = "words"
domain = "general"
format = "jsonl"
path = "words.jsonl"
[evaluate]
enabled = false
[curriculum]
decay_ramp_share = 0.5
[run]
save_every_steps = 100
threads = 1
[stages.32k]
tokens = 6144
global_batch_tokens = 1024
[stages.128k]
tokens = 6144
global_batch_tokens = 1024
[stages.256k]
tokens = 4096
global_batch_tokens = 1024
[stages.512k]
tokens = 4096
global_batch_tokens = 2048
[stages.1m]
tokens = 8192
global_batch_tokens = 4096
"""


def make_run(folder: Path, extra: str = "") -> Path:
    """Write corpora, configuration and prepared data into ``folder``; returns the configuration's path."""
    rng = random.Random(0)
    with (folder / "sums.jsonl").open("w") as file:
        for lines in [4] * 60 + [25] * 20 + [80] * 10 + [400] * 4:
            sums = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(lines)]
            file.write(json.dumps({"text": "\n".join(f"{a} + {b} = {a + b}" for a, b in sums)}) + "\n")
    words = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ng", "lo")]
    with (folder / "words.jsonl").open("w") as file:
        for count in [20] * 60 + [120] * 20 + [400] * 10 + [2500] * 4:
            file.write(json.dumps({"text": " ".join(rng.choice(words) for _ in range(count))}) + "\n")
    path = folder / "m1.toml"
    path.write_text(CONFIG + extra)
    prepare_data(path)
    return path


def prepare_data(config: Path) -> Manifest:
    """Prepare the data of a configuration."""
    resolved = load_config(config)
    return prepare(
        resolved.config.data,
        resolved.config.tokenizer,
        [],
        base_dir=resolved.base_dir,
        length_scale=resolved.config.curriculum.length_scale,
    )[0]
