"""``m1 pretrain``: the stages of the curriculum, each from the last one's final checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from m1_data.sampling.loader import PackedDataset
from m1_data.sampling.stage_draw import document_lengths
from m1_data.storage.store import Store
from m1_stages.checkpoint.imported import imported_checkpoint, starting_point, with_imported_base
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.events import Sink, StageDrawn
from m1_stages.jobs.evaluate import evaluate_finished
from m1_stages.jobs.prepared import described, open_for_training
from m1_stages.stage_data import refuse_impossible_stages, stage_draw
from m1_stages.training.loop import train_stage
from m1_stages.training.micro_batches import refuse_uneven_pipeline
from m1_stages.training.objective import NextTokenCrossEntropy
from m1_stages.training.recompute_choice import out_of_memory_explained
from m1_stages.training.run import Run
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.stage_start import announce_stage, pass_gate, restore_stage, start_over_from
from m1_stages.training.step_events import step_samples
from m1_stages.training.train_state import TrainState


def run(
    resolved: Resolved, stages: list[str], sinks: Sequence[Sink], *, fresh: bool = False, force: bool = False
) -> None:
    """Train and evaluate ``stages`` in order; finished ones are skipped, an interrupted one is continued.

    Args:
        fresh: start over from the first of ``stages``: its checkpoints and those of all that came after it are renamed.
        force: start a stage although the one before it recalls less than ``evaluate.gate``.

    Raises:
        M1Error: no data, damaged data or data made from something else, no checkpoint to start from, nothing usable among
            the checkpoints, numbers out of range, a stage before that recalls too little, or stopped on request after saving
            (``Preempted``).
    """
    data, notes = open_for_training(resolved)
    resolved = with_vocab(resolved, data.manifest.vocab_size)
    refuse_impossible_stages(resolved, stages, document_lengths(data.training))
    imported = imported_checkpoint(resolved.run_dir)
    plans = [with_imported_base(plan_stage(resolved, stage), imported) for stage in stages]
    with open_session(
        resolved,
        sinks,
        rope_base=plans[0].rope_base,
        fresh=fresh and plans[0].starts_from is None and imported is None,
        data=described(data, notes),
    ) as opened:
        opened.checkpointer.tokenizer_sha256 = data.manifest.tokenizer_sha256
        if fresh:
            start_over_from(opened, plans[0].stage)
        refuse_uneven_pipeline(resolved, plans, opened.topology.dp_size)
        ended: TrainState | None = None
        for number, plan in enumerate(plans):
            if ended is None:
                plan = starting_point(plan, opened.checkpointer.store.committed())
            rows = stage_rows(resolved, plan, data.training)
            state = restore_stage(opened, resolved, plan, rows, ended=ended)
            ended = None
            if state.stage_step == 0:
                pass_gate(opened, resolved, plan, force=force)
            if state.ramp_from:
                plan = plan.starting_from(state.ramp_from)
            if state.stage_step < plan.num_steps:
                mix = rows.forecast(data.manifest.mixes) if opened.topology.rank == 0 else {}
                later = [x for x in plans[number + 1 :] if not opened.checkpointer.finals(x.stage)]
                decision = announce_stage(opened, resolved, plan, mix, state, later=later)
                with out_of_memory_explained(resolved.config, plan, opened.topology, decision):
                    state = ended = train_stage(opened, plan, rows, state, NextTokenCrossEntropy())
                _report_drawn(opened, plan, rows, state)
            evaluate_finished(opened, resolved, plan, state, data)


def _report_drawn(opened: Run, plan: StagePlan, rows: PackedDataset, state: TrainState) -> None:
    """Report what the rows of the finished stage held; only rank 0 counts."""
    if opened.topology.rank == 0:
        without = [row for step in state.excluded_steps for row in step_samples(plan, step)]
        opened.emit(StageDrawn(stage=plan.stage, mix=rows.drawn(without=without).as_dict()))


def stage_rows(resolved: Resolved, plan: StagePlan, store: Store) -> PackedDataset:
    """The packed rows of a stage, in an order fixed by seed and stage."""
    draw = stage_draw(resolved, plan.stage)
    return PackedDataset(store, draw.mix, draw.previous, seed=draw.seed, seq_len=draw.seq_len, num_rows=draw.num_rows)
