"""Exports a run for ``m1 export``: chooses a checkpoint, writes the export, compares it with the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import STAGE_NAMES, ModelConfig, Resolved
from m1_stages.curriculum import IMPORT, SFT, config_section, train_command
from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.hf.checkpoint_tensors import CheckpointSource
from m1_stages.hf.config_json import DTYPE_NAMES, DTYPES, Lineage, checkpoint_of_card
from m1_stages.hf.contents import CARD, CONFIG, Contents
from m1_stages.hf.export import ExportReport, export
from m1_stages.hf.read_back import compare_files, read_json
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.tokenizer_files import TokenizerFiles
from m1_stages.hf.verify import compare_tokenizer, trained_logits, verify
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.run_dir import CHECKPOINTS

VERIFY_TOKENS = 2 * PREFILL_BLOCK + 88
"""Tokens of a verification: two full blocks of transformers' prefill and a partial one."""
TOLERANCE = 1e-4
"""Largest permitted difference of a logit; fp32 against fp32 stays near 1e-6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The result of a verification."""

    tensors: int
    """Tensors that were read back, all of them equal bit by bit."""
    sentences: int
    """Sentences that transformers' tokenizer splits as ``tokenizer.json`` does."""
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


def checkpoint_of(resolved: Resolved, folder: Path, *, stage: str | None, checkpoint: Path | None) -> Committed:
    """Return the checkpoint that an existing export was made of: the SHA-256 in its model card names it.

    Args:
        stage: expect the final checkpoint of this stage.
        checkpoint: expect this checkpoint.

    Raises:
        ConfigError: ``folder`` is no export.
        CheckpointError: the run has no such checkpoint, or another one is expected.
    """
    sha256 = checkpoint_of_card(folder)
    if stage is not None or checkpoint is not None:
        expected = choose_checkpoint(resolved, stage=stage, checkpoint=checkpoint)
        if sha256 not in (None, expected.sha256):
            raise CheckpointError(
                f"the export was made of the checkpoint with SHA-256 {sha256}, and {expected.path.name} has {expected.sha256}",
                where=str(folder / CARD),
                fix="leave out --stage and --checkpoint: the model card names the checkpoint",
            )
        return expected
    if sha256 is None:
        raise ConfigError(
            "this is no export of m1: there is no model card that names a checkpoint",
            where=str(folder / CARD),
            fix="name a folder that m1 export wrote, or its checkpoint with --checkpoint",
        )
    store = CheckpointStore(resolved.run_dir / CHECKPOINTS)
    for committed in store.committed():
        if committed.sha256 == sha256:
            return committed
    raise CheckpointError(
        f"the export was made of the checkpoint with SHA-256 {sha256}, and the run has none like it",
        where=str(store.root),
        fix="name the checkpoint with --checkpoint, or its run with --set run.dir=...",
    )


def stored_dtype(folder: Path) -> str:
    """Return the dtype of an existing export, ``fp32`` or ``bf16``, as its ``config.json`` says.

    Raises:
        CheckpointError: it does not say one of them.
    """
    name = read_json(folder / CONFIG).get("dtype")
    for dtype, known in DTYPE_NAMES.items():
        if name == known:
            return dtype
    raise CheckpointError(
        f"dtype is {name!r}, and m1 exports {' or '.join(DTYPE_NAMES.values())}",
        where=str(folder / CONFIG),
        fix="do not use this export; write it again with --overwrite",
    )


class Export:
    """One checkpoint of a run, with all that its export needs.

    What the export says of the model comes from the checkpoint. ``notes`` names what the configuration says otherwise by now.

    Args:
        dtype: ``fp32`` or ``bf16``; None takes ``export.dtype``.

    Raises:
        CheckpointError: a file of the checkpoint is not what was written.
        ConfigError: it was trained with another tokenizer than that of the prepared data.
        DataError: there is no prepared data, or its manifest or tokenizer is damaged.
    """

    def __init__(self, resolved: Resolved, committed: Committed, dtype: str | None = None) -> None:
        config, meta = resolved.config, committed.meta
        tokenizer = open_tokenizer(resolved)
        refuse_other_tokenizer(committed, tokenizer.tokenizer_sha256, resolved.path(config.data.out))
        self._resolved, self.committed = resolved, committed
        self.notes: list[str] = []
        self.source = CheckpointSource(committed)
        template = config.sft.chat_template
        contexts = self._contexts()
        self.contents = Contents(
            model=ModelConfig(**meta.extra["model"]),
            slopes=meta.decay["slopes"],
            rope_base=float(meta.extra["rope_base"]),
            max_positions=max(contexts.values()),
            dtype=dtype or config.export.dtype,
            lineage=_lineage(committed, tuple(contexts)),
            tokenizer=TokenizerFiles.of(
                resolved.path(config.data.out) / "tokenizer",
                resolved.path(template) if template else None,
            ),
        )
        self._note_changes(contexts)

    def write(self, out: Path, *, overwrite: bool) -> ExportReport:
        """Write the export to ``out``.

        Raises:
            M1Error: what ``hf.export.export`` raises.
        """
        shard_bytes = round(self._resolved.config.export.shard_gib * 2**30)
        return export(self.source, out, self.contents, shard_bytes=shard_bytes, overwrite=overwrite)

    def verify(self, out: Path) -> Comparison:
        """Compare every file of ``out`` with the checkpoint, then transformers' logits with the Megatron model's.

        Raises:
            CheckpointError: a value differs, or logits differ by more than rounding.
            EnvironmentProblem: transformers is not installed, or a GPU has no room.
        """
        tensors = compare_files(self.source, out, self.contents)
        sentences = compare_tokenizer(out)
        model = self.contents.model
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.vocab_size, (1, VERIFY_TOKENS), generator=generator)
        reference = trained_logits(
            self.source,
            model,
            slopes=self.contents.slopes,
            rope_base=self.contents.rope_base,
            tokens=tokens,
            rounded_to=DTYPES[self.contents.dtype],
        )
        largest, difference = float(reference.abs().max()), verify(out, reference, tokens)
        if difference > TOLERANCE:
            raise CheckpointError(
                f"transformers' logits differ from the trained model's by {difference:.3g} (largest logit {largest:.3g})",
                where=str(out),
                fix="do not use this export, and report this with the configuration",
            )
        return Comparison(
            tensors=tensors,
            sentences=sentences,
            max_difference=difference,
            largest_logit=largest,
            positions=VERIFY_TOKENS,
        )

    def _contexts(self) -> dict[str, int]:
        """Tokens per row of every stage on the way to the checkpoint, in order."""
        meta, config = self.committed.meta, self._resolved.config
        if recorded := meta.extra.get("contexts"):
            return dict(recorded)
        last = meta.stage if meta.stage in STAGE_NAMES else config.sft.base_stage
        stages = STAGE_NAMES[: STAGE_NAMES.index(last) + 1]
        contexts = {stage: config.seq_len(stage) for stage in stages}
        if meta.stage == SFT:
            contexts[SFT] = config.sft_seq_len
        self.notes.append(
            "the checkpoint does not record its stages and their context lengths (an older version wrote it): "
            f"{' -> '.join(contexts)} and at most {max(contexts.values()):,} tokens come from the configuration"
        )
        return contexts

    def _note_changes(self, contexts: dict[str, int]) -> None:
        """Name every key that describes the exported model and has another value in the configuration by now."""
        config, meta = self._resolved.config, self.committed.meta
        now = {f"model.{key}": value for key, value in self._resolved.as_dict()["model"].items()}
        then = {f"model.{key}": value for key, value in meta.extra["model"].items()}
        if not now["model.vocab_size"]:
            now["model.vocab_size"] = then["model.vocab_size"]  # comes from the data
        base = (
            meta.stage if meta.stage in STAGE_NAMES else next((s for s in reversed(contexts) if s in STAGE_NAMES), None)
        )
        imported = IMPORT in contexts  # its base and rates may be those of no stage
        if base is not None and not imported:
            then |= {f"stages.{base}.rope_base": meta.extra["rope_base"], "curriculum.decay": meta.decay["policy"]}
            now |= {
                f"stages.{base}.rope_base": config.stages[base].rope_base,
                "curriculum.decay": config.curriculum.decay,
            }
        for stage, length in contexts.items():
            if stage == IMPORT:
                continue
            name = f"row length of {config_section(stage)}"
            then[name], now[name] = length, config.sft_seq_len if stage == SFT else config.seq_len(stage)
        self.notes += [
            f"{key} was {then.get(key)!r} in training and is {now.get(key)!r} in the configuration: the export says "
            f"{then.get(key)!r}"
            for key in (*then, *(key for key in now if key not in then))
            if then.get(key) != now.get(key)
        ]


def _lineage(committed: Committed, stages: tuple[str, ...]) -> Lineage:
    """Return the origin of the weights: checkpoint, stages, tokens, decay policy."""
    meta = committed.meta
    return Lineage(
        checkpoint=committed.path.name,
        checkpoint_sha256=committed.sha256,
        stages=stages,
        tokens_seen=meta.extra["tokens_seen"],
        global_step=meta.global_step,
        decay_policy=meta.decay["policy"],
        config_sha256=meta.config_sha256,
        data_fingerprint=meta.data_fingerprint,
        versions=meta.versions,
    )
