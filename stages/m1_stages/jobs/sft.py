"""``m1 sft``: chain-of-thought fine-tuning of a final checkpoint, on the same loop as pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from m1_data.sft.dataset import SFTDataset
from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint.imported import imported_checkpoint, starting_point, with_imported_base
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.sft_runs import IMPORT, SFT, stage_of_base, stage_of_run
from m1_stages.curriculum import plan_sft, train_command
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.events import Sink
from m1_stages.jobs.evaluate import measure_held_out
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.jobs.sft_data import open_samples, selection
from m1_stages.run_dir import CHECKPOINTS
from m1_stages.training.loop import train_stage
from m1_stages.training.micro_batches import refuse_uneven_pipeline
from m1_stages.training.objective import NextTokenCrossEntropy
from m1_stages.training.recompute_choice import out_of_memory_explained
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.stage_start import announce_stage, restore_stage, start_over_from


def run(resolved: Resolved, sinks: Sequence[Sink], *, fresh: bool = False) -> None:
    """Fine-tune what ``sft.base_stage`` names; ``config.sft_runs.for_run`` puts the values of a named run into that section.

    Args:
        fresh: rename the checkpoints of this fine-tuning and of those made from it, and start it over; all others stay.

    Raises:
        M1Error: no conversations, a broken line, no base checkpoint, or what ``pretrain.run`` raises.
    """
    manifest = open_tokenizer(resolved)
    resolved = with_vocab(resolved, manifest.vocab_size)
    base = _base(resolved, fresh=fresh)
    rows = SFTDataset(open_samples(resolved, manifest), selection(resolved))
    plan = with_imported_base(plan_sft(resolved, rows.rows_per_epoch, base), imported_checkpoint(resolved.run_dir))
    with open_session(resolved, sinks, rope_base=plan.rope_base, fresh=False, lora=plan.lora) as opened:
        opened.checkpointer.tokenizer_sha256 = manifest.tokenizer_sha256
        if fresh:
            start_over_from(opened, plan.stage)
        refuse_uneven_pipeline(resolved, [plan], opened.topology.dp_size)
        plan = starting_point(plan, opened.checkpointer.store.committed())
        state = restore_stage(opened, resolved, plan, rows)
        if state.ramp_from:
            plan = plan.starting_from(state.ramp_from)
        if state.stage_step < plan.num_steps:
            decision = announce_stage(opened, resolved, plan, rows.stats_dict(), state)
            with out_of_memory_explained(resolved.config, plan, opened.topology, decision):
                state = train_stage(opened, plan, rows, state, NextTokenCrossEntropy())
        measure_held_out(opened, plan, state, rows)


def evaluate(resolved: Resolved, sinks: Sequence[Sink]) -> None:
    """Measure the loss by domain of the conversations that a finished fine-tuning held out, whether that was done or not.

    Raises:
        ConfigError: it holds none out.
        CheckpointError: it is not finished.
        M1Error: as ``run``.
    """
    manifest = open_tokenizer(resolved)
    resolved = with_vocab(resolved, manifest.vocab_size)
    stage = stage_of_run(resolved.sft_run or SFT)
    if not resolved.config.sft.held_out:
        raise ConfigError(
            f"stage {stage} holds no conversations out, and there is nothing to measure",
            where="key sft.held_out",
            fix=f"for example sft.held_out = 0.02, and train anew: {train_command(stage)} --fresh",
        )
    base = _base(resolved, fresh=False)
    rows = SFTDataset(open_samples(resolved, manifest), selection(resolved))
    plan = with_imported_base(plan_sft(resolved, rows.rows_per_epoch, base), imported_checkpoint(resolved.run_dir))
    with open_session(resolved, sinks, rope_base=plan.rope_base, fresh=False, lora=plan.lora) as opened:
        opened.checkpointer.tokenizer_sha256 = manifest.tokenizer_sha256
        if not opened.checkpointer.finals(stage):
            raise CheckpointError(
                f"stage {stage} has no final checkpoint to evaluate",
                where=str(opened.checkpointer.store.root),
                fix=f"train it first: {train_command(stage)}",
            )
        plan = starting_point(plan, opened.checkpointer.store.committed())
        state = restore_stage(opened, resolved, plan, rows)
        measure_held_out(opened, plan, state, rows, again=True)


def _base(resolved: Resolved, *, fresh: bool) -> tuple[Slopes, float] | None:
    """Return decay rates and RoPE base of the import or fine-tuning that this one starts from; None for a stage of pretraining.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    base, stage = stage_of_base(resolved.config.sft.base_stage), stage_of_run(resolved.sft_run or SFT)
    if base in STAGE_NAMES:
        return None
    store = CheckpointStore(resolved.run_dir / CHECKPOINTS)
    committed = store.committed()
    own = [] if fresh else [c for c in committed if c.meta.stage == stage]
    found = [*own, *(c for c in committed if c.meta.stage == base and c.meta.stage_final)]
    if not found:
        raise CheckpointError(
            f"stage {stage} starts from an imported model, and there is none"
            if base == IMPORT
            else f"stage {stage} starts from the final checkpoint of stage {base}, and there is none",
            where=str(store.root),
            fix="run first: m1 import FOLDER" if base == IMPORT else f"run first: {train_command(base)}",
        )
    return found[0].meta.decay["slopes"], float(found[0].meta.extra["rope_base"])
