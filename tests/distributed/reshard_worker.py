"""One rank that trains, saves and loads the tiny model in one layout after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from distributed.parity_worker import ROWS, packed

from m1_data.sampling.loader import batch_rows
from m1_stages.checkpoint import CheckpointStore
from m1_stages.config.load import load_config
from m1_stages.decay import released_slopes
from m1_stages.runtime import device
from m1_stages.training.run import Run
from m1_stages.training.session import open_session
from m1_stages.training.train_state import TrainState

LEARNING_RATE, FACTOR = 3e-3, 1.1


def work(job: dict[str, Any]) -> None:
    """Load (or train three steps), save, and only then train on, so that the checkpoint is what the load gave."""
    torch.set_num_threads(1)
    device.use("cpu")
    folder = Path(job["folder"])
    home = folder / job["name"]
    overrides = [*job["set"], f"run.dir={home}", f"run.seed={job['seed']}"]
    with open_session(load_config(folder / "m1.toml", overrides), [], rope_base=1e4, fresh=False) as run:
        before = [param.detach().clone() for param in run.model.parameters()]
        state = restored(run, folder / job["load"]) if job["load"] else begun(run)
        same = [i for i, param in enumerate(run.model.parameters()) if torch.equal(param, before[i])]
        mutate(job.get("mutation", ""), run)
        run.checkpointer.save_now(state)
        record = {
            "unchanged": same,
            "losses": [train(run, state), train(run, state)],
            "decay": {layer.layer_number: rates(layer) for layer in run.model.layers},
            "adam_steps": sorted({float(s["step"]) for s in adam(run.optimizer)}),
            "weights": sum(p.numel() for p in run.model.parameters()),
            "moments": sum(s["exp_avg"].numel() for s in adam(run.optimizer)),
        }
        if run.topology.rank == run.topology.world_size - 1:
            (home / "record.json").write_text(json.dumps(record))


def restored(run: Run, other: Path) -> TrainState:
    found = run.checkpointer.restore(CheckpointStore(other / "checkpoints").committed())
    assert found is not None
    return found[1]


def begun(run: Run) -> TrainState:
    """Three steps with decay rates that no policy gives, so that they can only come from the checkpoint."""
    model = run.model.model_config
    slopes = [[rate * FACTOR for rate in row] for row in released_slopes(model.num_layers, model.num_heads)]
    state = TrainState(stage="32k", slopes=slopes)
    state.first_loss = train(run, state)
    for _ in range(2):
        train(run, state)
    return state


def train(run: Run, state: TrainState, learning_rate: float = LEARNING_RATE) -> float:
    from m1_stages.training.objective import NextTokenCrossEntropy
    from m1_stages.training.step import train_step

    place = run.topology
    run.model.set_slopes(state.slopes)
    run.optimizer.set_learning_rate(learning_rate)
    rows = batch_rows(
        state.global_step,
        global_batch=2 * ROWS,  # two micro-batches, as an interleaved pipeline of two needs
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        micro_batch=ROWS // place.dp_size,
    )
    batches = [packed(ids).zigzag(place.cp_rank, place.cp_size) for ids in rows]
    result = train_step(run.trainable, run.optimizer, batches, NextTokenCrossEntropy())
    result.apply(max_norm=run.max_grad_norm)
    state.stage_step += 1
    state.global_step += 1
    return result.loss


def rates(layer: Any) -> list[float]:
    """Decay rates that a layer's heads on this rank used; none in a softmax layer."""
    log_decay = getattr(layer.self_attention, "log_decay", None)
    return [] if log_decay is None else (-log_decay).tolist()


def adam(optimizer: Any) -> list[dict[str, Any]]:
    """State of every parameter, or shard of one, that this rank's optimizer updates."""
    return [s for part in optimizer.parts for s in part.optimizer.state.values()]


@torch.no_grad()
def mutate(mutation: str, run: Run) -> None:
    """Spoil something between load and save, as a wrong load would."""
    if mutation == "weight":
        _next_float(run.model[0].decoder.layers[3].mlp.router.weight)
    elif mutation == "moment":
        _next_float(adam(run.optimizer)[0]["exp_avg_sq"])
    elif mutation == "shared step":
        step = adam(run.optimizer)[0]["step"]
        for state in adam(run.optimizer):
            state["step"] = step
    elif mutation == "moments forgotten":
        for state in adam(run.optimizer):
            state["exp_avg"].zero_()
    elif mutation:
        raise ValueError(mutation)


def _next_float(values: torch.Tensor) -> None:
    """Raise the largest element to the next fp32 number."""
    flat = values.view(-1)
    flat[flat.argmax()] = torch.nextafter(flat.max(), torch.tensor(torch.inf))


def gathered(job: dict[str, Any]) -> dict[str, Any]:
    """What of the optimizer's state differs from Megatron's own way into a checkpoint; pieces are small and end anywhere."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from m1_stages.runtime.optimizer import gather

    def tensors(state: dict[str, Any]) -> dict[Any, torch.Tensor]:
        found = [value for value in nested_values(state["optimizer"]) if isinstance(value, ShardedTensor)]
        return {(value.key, value.global_offset): value.data for value in found}

    torch.set_num_threads(1)
    device.use("cpu")
    gather.PIECE_BYTES = 4 * 1000
    folder = Path(job["folder"])
    with open_session(load_config(folder / "m1.toml", job["set"]), [], rope_base=1e4, fresh=True) as run:
        state = begun(run)
        expected = tensors(run.checkpointer._sharded_state(state, is_loading=False))
        planned, gather_now = run.checkpointer._state_to_save(state)
        assert gather_now is not None
        meta = tensors(planned)
        memory = {key: torch.full(tensor.shape, float("nan")) for key, tensor in meta.items()}
        pieces = 0
        for values, place in gather_now([(meta[key], memory[key]) for key in meta]):
            place.copy_(values)
            pieces += 1
        again = tensors(run.checkpointer._sharded_state(state, is_loading=False))
        return {
            "meta": all(tensor.is_meta for tensor in meta.values()),
            "same keys": memory.keys() == expected.keys() == again.keys(),
            "different": [key for key in expected if not torch.equal(memory[key], expected[key])],
            "numbers": sum(tensor.numel() for tensor in memory.values()),
            "pieces": pieces,
            "Megatron's way is back": not any(tensor.is_meta for tensor in again.values()),
        }
