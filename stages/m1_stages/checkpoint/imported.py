"""The checkpoint of an imported model: what training starts from in place of random weights.

``m1 import`` commits it as step 0, with weights and no optimizer state, and it is kept for ever. Importing this module imports
no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1_stages.checkpoint.manifest import Committed
from m1_stages.checkpoint.store import CheckpointStore
from m1_stages.config import STAGE_NAMES
from m1_stages.config.sft_runs import IMPORT, SFT, is_sft
from m1_stages.curriculum import StagePlan, train_command
from m1_stages.errors import CheckpointError
from m1_stages.run_dir import CHECKPOINTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from m1_stages.model import ModelChunks


def imported_checkpoint(run_dir: Path) -> Committed | None:
    """The run's imported model; None when there is none."""
    return _imported(CheckpointStore(run_dir / CHECKPOINTS).committed())


def with_imported_base(plan: StagePlan, imported: Committed | None) -> StagePlan:
    """The same plan with a RoPE base that is not below that of the imported model.

    The released models end on a base of 10M; going back to the lower base of a short stage would undo what they learned of
    long contexts.
    """
    if imported is None:
        return plan
    return dataclasses.replace(plan, rope_base=max(plan.rope_base, float(imported.meta.extra["rope_base"])))


def starting_point(plan: StagePlan, committed: Sequence[Committed]) -> StagePlan:
    """The same plan, starting from the imported model where there is one and the stage before was not trained.

    Fine-tuning keeps the decay rates of what it starts from. One that starts from another fine-tuning needs that one.
    """
    imported = _imported(committed)
    if plan.starts_from is not None and is_sft(plan.starts_from):
        return plan
    if imported is None or any(c.meta.stage == plan.starts_from and c.meta.stage_final for c in committed):
        return plan
    plan = dataclasses.replace(plan, starts_from=IMPORT)
    if is_sft(plan.stage):
        slopes = imported.meta.decay["slopes"]
        plan = dataclasses.replace(plan, slopes_old=slopes, slopes_new=slopes)
    return plan


def refuse_beside_import(plan: StagePlan, committed: Sequence[Committed]) -> None:
    """Refuse a stage that would start from the imported model when another stage has started from it.

    Raises:
        CheckpointError: the message names the stage that goes on from what was trained.
    """
    if plan.starts_from != IMPORT or any(c.meta.stage == plan.stage for c in committed):
        return
    order = (*STAGE_NAMES, SFT)
    trained = [c.meta.stage for c in committed if c.meta.stage in order]
    if not trained:
        return
    last = max(trained, key=order.index)
    finished = any(c.meta.stage == last and c.meta.stage_final for c in committed)
    command = _going_on(plan.stage, last, finished=finished)
    raise CheckpointError(
        f"{plan.title} would start from the imported model again, beside what was trained from it already (stage {last})",
        where=str(committed[0].path.parent),
        fix=f"{command}   (or use another run.dir)" if command else "use another run.dir",
    )


def _going_on(wanted: str, last: str, *, finished: bool) -> str:
    """The command that goes on from ``last``, the furthest that was trained; empty when nothing comes after it."""
    if not finished:
        return f"go on with: {train_command(last)}"
    if last == SFT:
        return ""
    if is_sft(wanted):
        return f"go on with: {train_command(wanted)} --set sft.base_stage={last}"
    following = STAGE_NAMES[STAGE_NAMES.index(last) :][1:2]
    return f"go on with: m1 pretrain --stage {following[0]}" if following else ""


def weights_to_load(state: dict[str, Any], committed: Committed) -> dict[str, Any]:
    """Prepare a model's sharded state dict for the weights of ``committed``, whose files are verified.

    What is stored in fp32 and is less exact in the model, as the released routers in a bf16 run, is loaded in fp32.
    """
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(committed.path).read_metadata().state_dict_metadata
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.data is not None and part.key in entries:
            stored = entries[part.key].properties.dtype  # type: ignore[union-attr]
            if stored == torch.float32 != part.data.dtype:
                part.data, part.dtype = torch.empty_like(part.data, dtype=stored), stored
    return state


def unrounded(model: ModelChunks, loaded: dict[str, Any]) -> dict[nn.Parameter, Tensor]:
    """The values in ``loaded`` that are rounded in the parameters of ``model``, by parameter."""
    return {
        param: loaded[f"chunk_{number}"][name]
        for number, chunk in enumerate(model)
        for name, param in chunk.named_parameters()
        if loaded[f"chunk_{number}"][name].dtype != param.dtype
    }


def _imported(committed: Sequence[Committed]) -> Committed | None:
    return next((c for c in committed if c.meta.stage == IMPORT), None)
