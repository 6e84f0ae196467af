"""``m1 sft``: chain-of-thought fine-tuning of a stage's final checkpoint, on the same loop as pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from m1_data.sft.dataset import SFTDataset
from m1_stages.checkpoint.imported import imported_checkpoint, starting_point, with_imported_base
from m1_stages.config import Resolved
from m1_stages.curriculum import plan_sft
from m1_stages.events import Sink
from m1_stages.jobs.evaluate import measure_held_out
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.jobs.sft_data import open_samples, selection
from m1_stages.training.loop import train_stage
from m1_stages.training.micro_batches import refuse_uneven_pipeline
from m1_stages.training.objective import NextTokenCrossEntropy
from m1_stages.training.recompute_choice import out_of_memory_explained
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.stage_start import announce_stage, restore_stage, start_over_from


def run(resolved: Resolved, sinks: Sequence[Sink], *, fresh: bool = False) -> None:
    """Fine-tune the final checkpoint of ``sft.base_stage``.

    Args:
        fresh: rename the checkpoints of fine-tuning and start it over; those of pretraining stay.

    Raises:
        M1Error: no conversations, a broken line, no base checkpoint, or what ``pretrain.run`` raises.
    """
    manifest = open_tokenizer(resolved)
    resolved = with_vocab(resolved, manifest.vocab_size)
    rows = SFTDataset(open_samples(resolved, manifest), selection(resolved))
    plan = with_imported_base(plan_sft(resolved, rows.rows_per_epoch), imported_checkpoint(resolved.run_dir))
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
