"""One rank that saves a model in one layout, or takes an imported one over in another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from distributed.reshard_worker import restored, train

from m1_stages.checkpoint import CheckpointStore
from m1_stages.config.load import load_config
from m1_stages.decay import released_slopes
from m1_stages.runtime import device
from m1_stages.training.run import Run
from m1_stages.training.session import open_session
from m1_stages.training.train_state import TrainState


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load ``job["load"]`` if there is one, make a step that changes nothing, and save; then train, load and train again.

    In the first step the learning rate is 0: moments come into being, masters are written back, and all values stay.
    """
    torch.set_num_threads(1)
    device.use("cpu")
    folder = Path(job["folder"])
    overrides = [*job["set"], f"run.dir={folder / job['name']}", f"run.seed={job['seed']}"]
    with open_session(load_config(folder / "m1.toml", overrides), [], rope_base=1e4, fresh=False) as run:
        model = run.model.model_config
        state = TrainState(stage="32k", slopes=released_slopes(model.num_layers, model.num_heads))
        if job["load"]:
            run.checkpointer.tokenizer_sha256 = _tokenizer_of(folder / job["load"])
            state = restored(run, folder / job["load"])
            state.stage = "32k"
        loss = train(run, state, 0.0)
        run.checkpointer.save_final(state, lambda path: None)
        return {
            "loss": loss,
            "twice": [trained_anew(run, folder / job["load"]) for _ in range(2)] if job["load"] else [],
        }


def trained_anew(run: Run, other: Path) -> str:
    """A hash of this rank's weights two steps after the import was loaded, as when a run is rolled back to it."""
    state = restored(run, other)
    for _ in range(2):
        train(run, state)
    values = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in run.model.parameters())
    return hashlib.sha256(values).hexdigest()


def _tokenizer_of(run_dir: Path) -> str:
    (committed,) = CheckpointStore(run_dir / "checkpoints").committed()
    return str(committed.meta.extra["tokenizer_sha256"])
