"""``m1 sft``: chain-of-thought fine-tuning of a stage's final checkpoint, on the same loop as pretraining."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from m1_data.chat.dataset import SFTDataset
from m1_stages.checkpoint.imported import imported_checkpoint, starting_point, with_imported_base
from m1_stages.config import Resolved
from m1_stages.curriculum import plan_sft
from m1_stages.errors import ConfigError
from m1_stages.events import Sink
from m1_stages.jobs.prepared import chat_template, open_tokenizer
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
    rows = conversations(resolved, held_out=manifest.held_out_digests)
    plan = with_imported_base(plan_sft(resolved, rows.rows_per_epoch), imported_checkpoint(resolved.run_dir))
    with open_session(resolved, sinks, rope_base=plan.rope_base, fresh=False) as opened:
        opened.checkpointer.tokenizer_sha256 = manifest.tokenizer_sha256
        if fresh:
            start_over_from(opened, plan.stage)
        refuse_uneven_pipeline(resolved, [plan], opened.topology.dp_size)
        plan = starting_point(plan, opened.checkpointer.store.committed())
        state = restore_stage(opened, resolved, plan, rows)
        if state.stage_step == plan.num_steps:
            return
        if state.ramp_from:
            plan = plan.starting_from(state.ramp_from)
        decision = announce_stage(opened, resolved, plan, rows.stats_dict(), state)
        with out_of_memory_explained(resolved.config, plan, opened.topology, decision):
            train_stage(opened, plan, rows, state, NextTokenCrossEntropy())


def conversations(resolved: Resolved, *, held_out: Collection[bytes]) -> SFTDataset:
    """Read, render and pack the configured conversations, without those that hold a text of ``held_out``.

    Raises:
        ConfigError: no files are configured.
    """
    config = resolved.config
    if not config.sft.data:
        raise ConfigError(
            "there are no conversations to fine-tune on",
            where="key sft.data",
            fix='list files of conversations: [sft] data = ["chats.jsonl"]',
        )
    return SFTDataset(
        [Path(resolved.path(name)) for name in config.sft.data],
        tokenizer_dir=resolved.path(config.data.out) / "tokenizer",
        seq_len=config.sft_seq_len,
        seed=config.run.seed,
        over_length=config.sft.over_length,
        chat_template=chat_template(resolved),
        max_dropped_share=config.sft.max_dropped_share,
        date=config.sft.date,
        held_out=held_out,
        dialect=config.sft.dialect,
        ignored_keys=config.sft.ignored_keys,
        bad_rows=config.sft.bad_rows,
        earlier_reasoning=config.sft.earlier_reasoning,
    )
