"""``m1 sft``: chain-of-thought fine-tuning of a stage's final checkpoint, on the same loop as pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m1_data.errors import ConfigError
from m1_data.manifest import load_manifest
from m1_data.sft import SFTDataset
from m1_stages.config import Resolved
from m1_stages.curriculum import plan_sft, softmax_layers
from m1_stages.engine.events import Sink, StageStarted
from m1_stages.engine.loop import train_stage
from m1_stages.engine.pretrain import start_stage
from m1_stages.engine.session import open_session, with_vocab


def run(resolved: Resolved, sinks: Sequence[Sink], *, fresh: bool = False) -> None:
    """Fine-tune the final checkpoint of ``sft.base_stage``.

    Raises:
        M1Error: no conversations, a broken line, no base checkpoint, or what ``pretrain.run`` raises.
    """
    manifest = load_manifest(resolved.path(resolved.config.data.out))
    resolved = with_vocab(resolved, manifest.vocab_size)
    rows = conversations(resolved)
    plan = plan_sft(resolved, rows.rows_per_epoch)
    with open_session(
        resolved, sinks, vocab_size=manifest.vocab_size, rope_base=plan.rope_base, fresh=fresh
    ) as session:
        state = start_stage(session, plan, rows)
        if state.stage_step == plan.num_steps:
            return
        session.run.emit(
            StageStarted(
                stage=plan.stage,
                step=state.stage_step,
                num_steps=plan.num_steps,
                seq_len=plan.seq_len,
                context_tokens=plan.context_tokens,
                rope_base=plan.rope_base,
                global_batch_rows=plan.global_batch_rows,
                tokens=plan.tokens,
                lr_peak=plan.lr.peak,
                lr_final=plan.lr.final,
                decay_policy=resolved.config.curriculum.decay,
                ramp_steps=0,
                slopes_old=plan.slopes_old,
                slopes_new=plan.slopes_new,
                softmax_layers=softmax_layers(resolved),
                mix=rows.stats_dict(),
                takes_over=f"weights and optimizer of the final {plan.starts_from} checkpoint",
            )
        )
        train_stage(session.run, plan, rows, state)


def conversations(resolved: Resolved) -> SFTDataset:
    """Read, render and pack the configured conversations.

    Raises:
        ConfigError: no files are configured.
    """
    config = resolved.config
    if not config.sft.data:
        raise ConfigError(
            "there are no conversations to fine-tune on",
            where="key sft.data",
            fix='list OpenAI-messages JSON Lines files: [sft] data = ["chats.jsonl"]',
        )
    template = resolved.path(config.sft.chat_template) if config.sft.chat_template else None
    return SFTDataset(
        [Path(resolved.path(name)) for name in config.sft.data],
        tokenizer_dir=resolved.path(config.data.out) / "tokenizer",
        seq_len=config.sft_seq_len,
        seed=config.run.seed,
        over_length=config.sft.over_length,
        chat_template=template,
    )
