"""Configurations to plan, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from m1_stages.config import ModelConfig, Resolved
from m1_stages.config.load import load_config

TINY = ModelConfig(
    hidden_size=8, num_layers=4, num_heads=2, head_dim=4, num_kv_heads=1, rotary_dim=4, num_experts=4,
    expert_hidden_size=16, vocab_size=128, softmax_every=4,
)  # fmt: skip


def resolved(folder: Path, preset: str, *overrides: str) -> Resolved:
    (folder / "m1.toml").write_text(f'preset = "{preset}"\n')
    return load_config(folder / "m1.toml", overrides)


def m1_plan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m1cli", "plan", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
