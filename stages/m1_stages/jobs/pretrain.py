"""``m1 pretrain``: the stages of the curriculum, each from the last one's final checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from m1_data.sampling.loader import PackedDataset
from m1_data.storage.store import PreparedData
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.events import Sink
from m1_stages.jobs.evaluate import evaluate_finished
from m1_stages.jobs.prepared import data_verified, open_for_training
from m1_stages.training.loop import train_stage
from m1_stages.training.micro_batches import refuse_uneven_pipeline
from m1_stages.training.objective import NextTokenCrossEntropy
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.stage_start import announce_stage, pass_gate, restore_stage


def run(
    resolved: Resolved, stages: list[str], sinks: Sequence[Sink], *, fresh: bool = False, force: bool = False
) -> None:
    """Train and evaluate ``stages`` in order; finished ones are skipped, an interrupted one is continued.

    Args:
        fresh: rename existing checkpoints and metrics, and start over.
        force: start a stage although the one before it recalls less than ``evaluate.gate``.

    Raises:
        M1Error: no data, damaged data or data made from something else, no checkpoint to start from, nothing usable among
            the checkpoints, numbers out of range, a stage before that recalls too little, or stopped on request after saving
            (``Preempted``).
    """
    data, notes = open_for_training(resolved)
    resolved = with_vocab(resolved, data.manifest.vocab_size)
    plans = [plan_stage(resolved, stage) for stage in stages]
    with open_session(resolved, sinks, rope_base=plans[0].rope_base, fresh=fresh) as opened:
        opened.checkpointer.tokenizer_sha256 = data.manifest.tokenizer_sha256
        opened.emit(data_verified(data, notes))
        refuse_uneven_pipeline(resolved, plans, opened.topology.dp_size)
        for plan in plans:
            rows = stage_rows(resolved, plan, data)
            state = restore_stage(opened, plan, rows)
            if state.stage_step == 0:
                pass_gate(opened, resolved, plan, force=force)
            if state.ramp_from:
                plan = plan.starting_from(state.ramp_from)
            if state.stage_step < plan.num_steps:
                announce_stage(opened, resolved, plan, rows.mix_plan.as_dict(), state)
                state = train_stage(opened, plan, rows, state, NextTokenCrossEntropy())
            evaluate_finished(opened, resolved, plan, state.slopes, data)


def stage_rows(resolved: Resolved, plan: StagePlan, data: PreparedData) -> PackedDataset:
    """The packed rows of a stage, in an order fixed by seed and stage."""
    config = resolved.config
    return PackedDataset(
        data.training,
        config.mix(plan.stage),
        config.mix(plan.starts_from) if plan.starts_from else None,
        seed=config.run.seed,
        seq_len=plan.seq_len,
        num_rows=plan.num_steps * plan.global_batch_rows,
    )
