"""Exports a run for ``m1 export``: chooses a checkpoint, writes the export, compares it with the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import STAGE_NAMES, ModelConfig, Resolved
from m1_stages.curriculum import SFT, train_command
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.hf.checkpoint_tensors import CheckpointSource
from m1_stages.hf.config_json import DTYPES, Lineage
from m1_stages.hf.export import ExportReport, export
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.verify import trained_logits, verify
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.run_dir import CHECKPOINTS

VERIFY_TOKENS = 2 * PREFILL_BLOCK + 88
"""Tokens of a verification: two full blocks of transformers' prefill and a partial one."""
TOLERANCE = 1e-3
"""Permitted logit difference relative to the largest logit; fp32 against fp32 stays near 1e-6."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a verification."""

    max_difference: float
    largest_logit: float
    positions: int


def choose_checkpoint(resolved: Resolved, *, stage: str | None, checkpoint: Path | None) -> Committed:
    """Return the given checkpoint, else the newest stage-final one (of ``stage`` when given).

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
        ConfigError: ``stage`` is unknown.
    """
    if checkpoint is not None:
        return read_manifest(checkpoint)
    if stage is not None and stage not in (*STAGE_NAMES, SFT):
        raise ConfigError(f"there is no stage {stage!r}", fix=f"choose one of {', '.join((*STAGE_NAMES, SFT))}")
    store = CheckpointStore(resolved.run_dir / CHECKPOINTS)
    final = [c for c in store.committed() if c.meta.stage_final]
    for committed in final:
        if stage in (None, committed.meta.stage):
            return committed
    finished = ", ".join(sorted({c.meta.stage for c in final})) or "none"
    raise CheckpointError(
        f"there is no final checkpoint of {f'stage {stage}' if stage else 'any stage'} (finished stages: {finished})",
        where=str(store.root),
        fix=f"run first: {train_command(stage or 'all')}   (or name one with --checkpoint)",
    )


class Export:
    """One checkpoint of a run, with all that its export needs.

    Raises:
        CheckpointError: a file of the checkpoint is not what was written.
        ConfigError: it was trained with another tokenizer than that of the prepared data.
        DataError: there is no prepared data, or its manifest or tokenizer is damaged.
    """

    def __init__(self, resolved: Resolved, committed: Committed) -> None:
        config, meta = resolved.config, committed.meta
        tokenizer = open_tokenizer(resolved)
        refuse_other_tokenizer(committed, tokenizer.tokenizer_sha256, resolved.path(config.data.out))
        self._resolved, self.committed = resolved, committed
        pretrained = meta.stage if meta.stage in STAGE_NAMES else config.sft.base_stage
        self._pretraining = STAGE_NAMES[: STAGE_NAMES.index(pretrained) + 1]
        self.source = CheckpointSource(committed)
        self.model = ModelConfig(**meta.extra["model"])
        self.slopes: Slopes = meta.decay["slopes"]
        self.rope_base = float(meta.extra["rope_base"])
        self.configuration_changed = meta.config_sha256 != resolved.sha256

    @property
    def lineage(self) -> Lineage:
        """The origin of the weights: checkpoint, stages, tokens, decay policy."""
        meta = self.committed.meta
        return Lineage(
            checkpoint=self.committed.path.name,
            checkpoint_sha256=self.committed.sha256,
            stages=tuple(dict.fromkeys((*self._pretraining, meta.stage))),
            tokens_seen=meta.extra["tokens_seen"],
            global_step=meta.global_step,
            decay_policy=meta.decay["policy"],
            config_sha256=meta.config_sha256,
            data_fingerprint=meta.data_fingerprint,
            versions=meta.versions,
        )

    def write(self, out: Path, *, overwrite: bool) -> ExportReport:
        """Write the export to ``out``.

        Raises:
            M1Error: what ``hf.export.export`` raises.
        """
        config = self._resolved.config
        template = config.sft.chat_template
        return export(
            self.source,
            out,
            model=self.model,
            slopes=self.slopes,
            rope_base=self.rope_base,
            max_positions=max(config.seq_len(stage) for stage in self._pretraining),
            tokenizer_dir=self._resolved.path(config.data.out) / "tokenizer",
            dtype=config.export.dtype,
            shard_bytes=round(config.export.shard_gib * 2**30),
            lineage=self.lineage,
            chat_template=self._resolved.path(template).read_text(encoding="utf-8") if template else None,
            overwrite=overwrite,
        )

    def compare(self, out: Path) -> Comparison:
        """Compare transformers' logits of ``out`` with the Megatron model's, from the same checkpoint.

        Raises:
            CheckpointError: the logits differ by more than rounding.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.model.vocab_size, (1, VERIFY_TOKENS), generator=generator)
        reference = trained_logits(
            self.source,
            self.model,
            slopes=self.slopes,
            rope_base=self.rope_base,
            tokens=tokens,
            rounded_to=DTYPES[self._resolved.config.export.dtype],
        )
        result = Comparison(verify(out, reference, tokens), float(reference.abs().max()), VERIFY_TOKENS)
        if result.max_difference > TOLERANCE * max(1.0, result.largest_logit):
            raise CheckpointError(
                f"transformers' logits differ from the trained model's by {result.max_difference:.3g} "
                f"(largest logit {result.largest_logit:.3g})",
                where=str(out),
                fix="do not use this export",
            )
        return result
