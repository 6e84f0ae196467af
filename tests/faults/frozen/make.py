"""Writes the frozen checkpoint of this version: ``python tests/faults/frozen/make.py``; it is kept, and must always load.

Every tensor of the model and both moments of the optimizer hold values that their names determine (``expected``).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m1_stages.config.load import load_config
from m1_stages.training.run import Run
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.train_state import TrainState

HERE = Path(__file__).parent
CHECKPOINT = HERE / "step_00000007"
CONFIG = """
preset = "tiny"
[model]
hidden_size = 16
num_layers = 2
softmax_every = 2
num_heads = 2
head_dim = 8
rotary_dim = 8
num_kv_heads = 1
num_experts = 2
expert_hidden_size = 16
[run]
device = "cpu"
threads = 1
"""


def expected(name: str, like: torch.Tensor) -> torch.Tensor:
    """Small numbers that fp32 holds exactly, another sequence for each name."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
    return ((torch.arange(like.numel()) * 7 + start) % 1009 / 1024).to(like.dtype).reshape(like.shape)


@contextmanager
def session(folder: Path) -> Iterator[Run]:
    """A session whose run directory is ``folder/run``."""
    config = folder / "m1.toml"
    config.write_text(CONFIG)
    with open_session(with_vocab(load_config(config), 100), [], rope_base=1e4, fresh=False) as opened:
        yield opened


def tensors(opened: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and both moments by name, in the order of parameters."""
    names = {id(parameter): name for name, parameter in opened.model[0].named_parameters()}
    for part in opened.optimizer.parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                yield name, parameter.data
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in part.optimizer.state[parameter]:
                        part.optimizer.state[parameter][moment] = torch.zeros_like(parameter)
                        part.optimizer.state[parameter]["step"] = torch.tensor(7.0)
                    yield f"{name}.{moment}", part.optimizer.state[parameter][moment]


def position() -> TrainState:
    return TrainState(
        stage="32k", stage_step=7, global_step=7, tokens_seen=7168, slopes=[[0.5, 0.25], [0.125, 0.0625]],
        data_fingerprint="frozen", ramp_progress=0.75, first_loss=4.5,
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, session(Path(folder)) as opened:
        for name, tensor in tensors(opened):
            tensor.copy_(expected(name, tensor))
        path: Any = opened.checkpointer.save_now(position())
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(path, CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main())
