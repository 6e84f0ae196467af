"""Exports a run for ``m1 export``: chooses a checkpoint, and writes the export (``export_verification`` compares it)."""

from __future__ import annotations

from pathlib import Path

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import ModelConfig, Resolved
from m1_stages.config.sft_runs import for_stage, refuse_unknown_stage
from m1_stages.curriculum import train_command
from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.hf.checkpoint_tensors import CheckpointSource
from m1_stages.hf.checksums import FIX
from m1_stages.hf.config_json import DTYPE_NAMES
from m1_stages.hf.contents import CONFIG, Contents
from m1_stages.hf.export import ExportReport, export
from m1_stages.hf.llama_cpp.convert import find_converter
from m1_stages.hf.model_card import CARD, checkpoint_of_card
from m1_stages.hf.read_back import read_json
from m1_stages.hf.targets import Target, gguf_name
from m1_stages.hf.tokenizer_files import TokenizerFiles
from m1_stages.jobs.export_facts import changes_since, contexts_of, lineage_of
from m1_stages.jobs.prepared import chat_template, open_tokenizer
from m1_stages.run_dir import CHECKPOINTS


def choose_checkpoint(resolved: Resolved, *, stage: str | None, checkpoint: Path | None) -> Committed:
    """Return the given checkpoint, else the newest stage-final one (of ``stage`` when given).

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
        ConfigError: ``stage`` is unknown.
    """
    if checkpoint is not None:
        return read_manifest(checkpoint)
    refuse_unknown_stage(resolved.config.sft, stage)
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


def stored_dtype(folder: Path, target: Target) -> str:
    """Return the dtype of an existing export, ``fp32`` or ``bf16``, as its ``config.json`` or the name of its file says.

    Raises:
        CheckpointError: it does not say one of them.
    """
    if target == "gguf":
        names = [path.name for path in folder.glob("*.gguf")]
        for dtype in DTYPE_NAMES:
            if names == [gguf_name(dtype)]:
                return dtype
        what, where = (
            f"the weight files are {names}, and m1 writes one: {gguf_name('fp32')} or {gguf_name('bf16')}",
            folder,
        )
    else:
        config, where = read_json(folder / CONFIG), folder / CONFIG
        key = "dtype" if target == "hf" else "torch_dtype"
        for dtype, known in DTYPE_NAMES.items():
            if config.get(key) == known:
                return dtype
        what = f"{key} is {config.get(key)!r}, and m1 exports {' or '.join(DTYPE_NAMES.values())}"
    raise CheckpointError(what, where=str(where), fix=FIX)


def stored_architecture(folder: Path) -> str:
    """Return the class that ``config.json`` of an existing ``text01`` export names."""
    return str(read_json(folder / CONFIG)["architectures"][0])


class Export:
    """One checkpoint of a run, with all that its export needs.

    What the export says of the model comes from the checkpoint. ``notes`` names what the configuration says otherwise by now.

    Args:
        target: who reads the export; None takes ``export.target``.
        dtype: ``fp32`` or ``bf16``; None takes ``export.dtype``.
        architecture: the class that a ``text01`` export names; None takes ``export.architecture``.

    Raises:
        CheckpointError: a file of the checkpoint is not what was written.
        ConfigError: it was trained with another tokenizer than that of the prepared data.
        DataError: there is no prepared data, or its manifest or tokenizer, or an evaluation of the checkpoint, is damaged.
    """

    def __init__(
        self,
        resolved: Resolved,
        committed: Committed,
        *,
        target: Target | None = None,
        dtype: str | None = None,
        architecture: str | None = None,
    ) -> None:
        resolved = for_stage(resolved, committed.meta.stage)
        config, meta = resolved.config, committed.meta
        tokenizer = open_tokenizer(resolved)
        refuse_other_tokenizer(committed, tokenizer.tokenizer_sha256, resolved.path(config.data.out))
        self._resolved, self.committed = resolved, committed
        self.source = CheckpointSource(committed)
        contexts, self.notes = contexts_of(committed, resolved)
        self.contents = Contents(
            model=ModelConfig(**meta.extra["model"]),
            slopes=meta.decay["slopes"],
            rope_base=float(meta.extra["rope_base"]),
            max_positions=max(contexts.values()),
            dtype=dtype or config.export.dtype,
            lineage=lineage_of(committed, contexts, config.export.license),
            tokenizer=TokenizerFiles.of(
                resolved.path(config.data.out) / "tokenizer",
                chat_template(resolved),
            ),
            target=target or config.export.target,
            architecture=architecture or config.export.architecture,
        )
        self.notes += changes_since(committed, resolved, contexts)

    def write(self, out: Path, *, overwrite: bool) -> ExportReport:
        """Write the export to ``out``.

        Raises:
            M1Error: what ``hf.export.export`` and, for the target ``gguf``, ``find_converter`` raise.
        """
        config, llama_cpp = self._resolved.config.export, None
        if self.contents.target == "gguf":
            sources = str(self._resolved.path(config.llama_cpp)) if config.llama_cpp else ""
            llama_cpp = find_converter(sources, "key export.llama_cpp")
        return export(
            self.source,
            out,
            self.contents,
            shard_bytes=round(config.shard_gib * 2**30),
            overwrite=overwrite,
            llama_cpp=llama_cpp,
        )
