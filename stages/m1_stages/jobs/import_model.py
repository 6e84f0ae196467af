"""``m1 import``: take a checkpoint of this family over, as the first checkpoint of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.storage.durable import flush
from m1_data.storage.lock import writing
from m1_data.storage.ownership import refuse_to_replace, sweep_siblings, temporary_sibling
from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.checkpoint.files import sha256_of
from m1_stages.config import ModelConfig, Resolved
from m1_stages.config.sft_runs import IMPORT
from m1_stages.config.when_changed import recorded_values
from m1_stages.decay import is_released
from m1_stages.errors import ConfigError, DataError, EnvironmentProblem
from m1_stages.hf.source.commit import commit_source
from m1_stages.hf.source.config_json import CONFIG, SourceConfig, read_source_config
from m1_stages.hf.source.folder import SourceFolder
from m1_stages.hf.source.tensors import SourceTensors
from m1_stages.run_dir import CHECKPOINTS, IMPORTED, LOCK, refuse_foreign_run_dir
from m1_stages.training.session import put_aside
from m1_stages.training.train_state import TrainState

MARK = "IMPORT.json"
"""Says what the folder of an imported model's companions was taken from; the folder is recognised by it."""
TOKENIZER = "tokenizer.json"
_COMPANIONS = (CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
_OF_TRAINING = ("aux_loss_coef", "init_std")
"""Keys of the model section that say nothing of imported weights."""
OnProgress = Callable[[int, int], None]
"""Called with the bytes that were read, and those of all tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """An imported model."""

    checkpoint: Path
    companions: Path
    """The folder of its tokenizer, template and configurations."""
    tensors: int
    num_bytes: int
    rope_base: float
    has_tokenizer: bool
    notes: tuple[str, ...]


def run(
    resolved: Resolved, source: Path, *, fresh: bool = False, on_progress: OnProgress = lambda done, total: None
) -> ImportReport:
    """Import the checkpoint in the folder ``source`` as step 0 of the run.

    Nothing of the run changes before all tensors are read, written and verified. Then checkpoint and companions appear, each by
    one rename.

    Args:
        fresh: when the run has checkpoints, rename them, the metrics and the roll backs, and start over.

    Raises:
        ConfigError: ``source`` is no checkpoint of this family, the configuration has another model, or the run has checkpoints.
        DataError: the tokenizer cannot be read, or has more ids than the embedding rows.
        CheckpointError: the source's weights are damaged or not complete, or the checkpoint could not be written.
        EnvironmentProblem: the disk has no room.
        InUse: another command writes to the run directory.
    """
    config = read_source_config(source)
    refuse_other_model(resolved, config)
    run_dir = resolved.run_dir
    refuse_foreign_run_dir(run_dir)
    _refuse_replacing(run_dir, fresh=fresh)
    with ExitStack() as stack:
        folder = SourceFolder(source)
        stack.callback(folder.close)
        tensors = SourceTensors(folder, config)
        _refuse_unreadable(source)
        notes = [*config.notes, *_tokenizer_notes(source, config.model)]
        run_dir.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(run_dir, folder.num_bytes)
        stack.enter_context(writing(run_dir / LOCK, f"the run directory {run_dir}"))
        _refuse_replacing(run_dir, fresh=fresh)
        companions = stack.enter_context(_temporary(run_dir / IMPORTED))
        checkpoints = stack.enter_context(_temporary(run_dir / CHECKPOINTS))
        record = _copy_companions(source, companions, folder, config)
        commit_source(
            CheckpointStore(checkpoints),
            tensors,
            _meta(resolved, config, tensors.slopes(), record),
            TrainState(stage=IMPORT, slopes=tensors.slopes(), contexts={IMPORT: config.max_positions}).as_dict(),
            _counted(folder.num_bytes, on_progress),
        )
        if fresh:
            put_aside(run_dir)
        _put_in_place(companions, run_dir / IMPORTED)
        _put_in_place(checkpoints, run_dir / CHECKPOINTS)
    return ImportReport(
        checkpoint=CheckpointStore(run_dir / CHECKPOINTS).committed()[0].path,
        companions=run_dir / IMPORTED,
        tensors=len(folder.entries),
        num_bytes=folder.num_bytes,
        rope_base=config.rope_base,
        has_tokenizer=TOKENIZER in record["files"],
        notes=tuple(notes),
    )


def refuse_other_model(resolved: Resolved, config: SourceConfig) -> None:
    """Refuse a configuration whose model section is not the source's; what only training reads may differ.

    Raises:
        ConfigError: the message names every key with both values.
    """
    other = []
    for key, theirs in dataclasses.asdict(config.model).items():
        ours = getattr(resolved.config.model, key)
        if key == "alpha":
            same = math.isclose(resolved.config.model.residual_alpha, config.model.residual_alpha, rel_tol=1e-12)
        else:
            same = ours == theirs or key in _OF_TRAINING
        if not same:
            other.append((key, ours, theirs))
    if other:
        shown = ", ".join(f"model.{key} is {ours!r} and the source's {theirs!r}" for key, ours, theirs in other)
        raise ConfigError(
            f"the configuration has another model: {shown}",
            where=f"{resolved.origins.get(f'model.{other[0][0]}', '')}, key model.{other[0][0]}",
            fix="put the [model] section that `m1 import SOURCE --print-config` shows into m1.toml",
        )


def _refuse_replacing(run_dir: Path, *, fresh: bool) -> None:
    entries = sorted((run_dir / CHECKPOINTS).iterdir()) if (run_dir / CHECKPOINTS).is_dir() else []
    if entries and not fresh:
        steps = [entry.name for entry in entries if entry.name.startswith("step_")] or [entries[0].name]
        raise ConfigError(
            f"the run has checkpoints already ({steps[-1]} is the newest), and an import starts a run",
            where=str(run_dir / CHECKPOINTS),
            fix="use another run.dir, or --fresh, which renames them and starts over",
        )
    refuse_to_replace(
        run_dir / IMPORTED,
        what="the folder of the imported tokenizer",
        marked=(run_dir / IMPORTED / MARK).is_file(),
        ours=(MARK, *_COMPANIONS),
        fix="use another run.dir",
    )


def _refuse_full_disk(run_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise EnvironmentProblem(
            f"the checkpoint needs {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free",
            where=str(run_dir),
            fix="free some space, or use another run.dir",
        )


def _refuse_unreadable(source: Path) -> None:
    """Refuse a file beside the weights that is there and cannot be copied: leaving it out would not be noticed."""
    for name in _COMPANIONS:
        path = source / name
        if (path.is_symlink() or path.exists()) and not path.is_file():
            what = "is a link to nothing: the download is not complete" if path.is_symlink() else "is no file"
            raise DataError(f"the source's {name} {what}", where=str(path), fix="mend it, or remove it from the source")


def _tokenizer_notes(source: Path, model: ModelConfig) -> list[str]:
    """Check that every id has an embedding row, and say what a person should know of the tokenizer."""
    path = source / TOKENIZER
    if not path.is_file():
        return [f"the source has no {TOKENIZER}: set tokenizer.path to the tokenizer of this model yourself"]
    from tokenizers import Tokenizer

    try:
        ids = 1 + max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"cannot read the source's tokenizer: {error}", where=str(path), fix="mend the file") from error
    if ids > model.vocab_size:
        raise DataError(
            f"the tokenizer has {ids:,} ids and the source's vocab_size is {model.vocab_size:,}: some have no embedding",
            where=str(path),
            fix="put the tokenizer of this model into the source folder",
        )
    if ids < model.vocab_size:
        return [f"the tokenizer has {ids:,} ids, the embedding {model.vocab_size:,} rows: the others stay unused"]
    return []


def _copy_companions(source: Path, out: Path, folder: SourceFolder, config: SourceConfig) -> dict[str, Any]:
    """Copy the files beside the weights, and return the record of the source for the checkpoint."""
    out.mkdir()
    hashes = {}
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            hashes[name] = sha256_of(out / name)
            flush(out / name)
    record = {
        "source": _name(source),
        "index_sha256": folder.sha256,
        "rope_base": config.rope_base,
        "model_type": config.model_type,
        "architectures": list(config.architectures),
        "tensors": len(folder.entries),
        "bytes": folder.num_bytes,
        "files": hashes,
    }
    (out / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    flush(out / MARK)
    return record


def _name(source: Path) -> str:
    """What the checkpoint calls the source: the folder's name, or model and commit of a folder in the Hub's cache."""
    path = source.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return f"{path.parent.parent.name.removeprefix('models--').replace('--', '/')}@{path.name}"
    return path.name


def _meta(
    resolved: Resolved, config: SourceConfig, slopes: list[list[float]], record: dict[str, Any]
) -> CheckpointMeta:
    released = is_released(slopes, config.model)
    of_model = {key: value for key, value in recorded_values(resolved).items() if key.startswith("model.")}
    return CheckpointMeta(
        stage=IMPORT,
        stage_step=0,
        global_step=0,
        stage_final=True,
        config_sha256=resolved.sha256,
        data_fingerprint="",
        topology={"world": 1},
        decay={"policy": "fixed" if released else "imported", "slopes": slopes},
        extra={
            "tokens_seen": 0,
            "config": of_model,  # nothing was trained with the other keys
            "model": dict(resolved.as_dict()["model"]),
            "rope_base": config.rope_base,
            "contexts": {IMPORT: config.max_positions},
            "forced_gates": [],
            "tokenizer_sha256": record["files"].get(TOKENIZER, ""),
            "import": record,
        },
    )


def _counted(total: int, on_progress: OnProgress) -> Callable[[int], None]:
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(min(done, total), total)

    return count


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for what is renamed to it when it is complete; what is left of it at the end is removed."""
    sweep_siblings(path)
    temporary = temporary_sibling(path)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; one of ours that is there is removed."""
    if path.exists():
        old = temporary_sibling(path)
        path.rename(old)
        shutil.rmtree(old)
    temporary.rename(path)
    flush(path.parent)
