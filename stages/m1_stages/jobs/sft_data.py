"""The conversations of ``m1 sft``: tokenized once below the run directory, shared by ranks and restarts. No torch."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m1_data.sft.choice import Selection
from m1_data.sft.encoding_processes import processes_of_machine
from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import SampleStore, read_manifest, write_store
from m1_data.storage.lock import lock_of, refuse_while_written, writing
from m1_data.storage.manifest import Manifest
from m1_stages.config import Resolved
from m1_stages.errors import ConfigError, EnvironmentProblem, InUse
from m1_stages.jobs.prepared import chat_template
from m1_stages.run_dir import SFT_DATA

_POLL_S = 0.2
_PATIENCE_S = 120.0
"""Seconds without a sign of the first rank after which the others stop waiting for the tokenized conversations."""


def sample_settings(resolved: Resolved, manifest: Manifest) -> SampleSettings:
    """Return what the samples of the configured conversations depend on.

    Raises:
        ConfigError: no files are configured.
    """
    config, x = resolved.config, resolved.config.sft
    if not x.data:
        raise ConfigError(
            "there are no conversations to fine-tune on" + (f" in run {resolved.sft_run}" if resolved.sft_run else ""),
            where="key sft.data",
            fix='list files of conversations: [sft] data = ["chats.jsonl"]',
        )
    return SampleSettings(
        paths=tuple(Path(resolved.path(name)) for name in x.data),
        tokenizer_dir=resolved.path(config.data.out) / "tokenizer",
        chat_template=chat_template(resolved),
        date=x.date,
        held_out=frozenset(manifest.held_out_digests),
        dialect=x.dialect,
        ignored_keys=x.ignored_keys,
        bad_rows=x.bad_rows,
        earlier_reasoning=x.earlier_reasoning,
        patterns=x.reflection_patterns,
    )


def samples_folder(resolved: Resolved) -> Path:
    """The folder of tokenized conversations; each named run has its own."""
    return resolved.run_dir / (f"{SFT_DATA}-{resolved.sft_run}" if resolved.sft_run else SFT_DATA)


def selection(resolved: Resolved) -> Selection:
    """Return what of the samples is trained."""
    config, x = resolved.config, resolved.config.sft
    return Selection(
        seq_len=config.sft_seq_len,
        seed=config.run.seed,
        over_length=x.over_length,
        max_dropped_share=x.max_dropped_share,
        held_out=x.held_out,
        weights=tuple(x.weights.get(name, 1.0) for name in x.data),
        min_per_1k=x.reflection_min_per_1k_tokens,
        reflection_weight=x.reflection_weight,
    )


def open_samples(resolved: Resolved, manifest: Manifest) -> SampleStore:
    """Open the tokenized conversations of the run. The first rank writes them when they are missing or of other files.

    Every rank looks at the files itself, so nothing has to be told. The others wait for the first one.

    Raises:
        DataError: see ``samples_in`` and ``SampleStore``.
        InUse: another command writes them.
        EnvironmentProblem: the first rank does not write them.
    """
    settings, folder = sample_settings(resolved, manifest), samples_folder(resolved)
    key = settings.key()
    if not _is_there(folder, key):
        if int(os.environ.get("RANK", "0")):
            _wait(folder, key)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with writing(lock_of(folder), f"the folder of tokenized conversations {folder}"):
                write_store(settings, folder, key=key, processes=_processes(resolved))
    return SampleStore(folder)


@contextmanager
def opened_for_preview(resolved: Resolved, manifest: Manifest) -> Iterator[SampleStore]:
    """Open the tokenized conversations of the run, or make them in a temporary folder: the run directory stays as it is.

    Raises:
        DataError: as ``open_samples``.
    """
    settings, folder = sample_settings(resolved, manifest), samples_folder(resolved)
    key = settings.key()
    with tempfile.TemporaryDirectory(prefix="m1-sft-") as temporary:
        if not _is_there(folder, key):
            folder = Path(temporary) / SFT_DATA
            write_store(settings, folder, key=key, processes=_processes(resolved))
        yield SampleStore(folder)


def _processes(resolved: Resolved) -> int:
    return resolved.config.sft.processes or processes_of_machine()


def _is_there(folder: Path, key: str) -> bool:
    found = read_manifest(folder)
    return found is not None and found.key == key


def _wait(folder: Path, key: str) -> None:
    """Wait until the first rank has written the folder; its lock says that it is at work."""
    seen = time.monotonic()
    while not _is_there(folder, key):
        time.sleep(_POLL_S)
        try:
            refuse_while_written(lock_of(folder), str(folder))
        except InUse:
            seen = time.monotonic()
        if time.monotonic() - seen > _PATIENCE_S:
            raise EnvironmentProblem(
                f"rank 0 did not write the tokenized conversations, and has not been at work on them for {_PATIENCE_S:.0f} s",
                where=str(folder),
                fix="run.dir and the files of sft.data have to be the same on every machine; what rank 0 said is above",
            )
