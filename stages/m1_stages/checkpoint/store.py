"""The checkpoints of one run: commit, find, verify, load, retain. All methods but the listing ones are collective."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from m1_data.storage.durable import flush, write_atomically
from m1_stages.checkpoint.directories import (
    directory_for,
    free_name,
    left_behind,
    replaced,
    step_directories,
    temporary_name,
)
from m1_stages.checkpoint.files import sha256_of
from m1_stages.checkpoint.host_copy import HostCopy
from m1_stages.checkpoint.loading import load_verified, verify_share
from m1_stages.checkpoint.manifest import (
    MANIFEST,
    CheckpointMeta,
    Committed,
    OtherFormat,
    manifest_text,
    read_manifest,
)
from m1_stages.checkpoint.snapshot import Files, Gather, ReadPart, Snapshot
from m1_stages.checkpoint.writer_thread import Progress, Writer
from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.runtime.collectives import agree_max, barrier, gather, rank, run_together

LATEST = "LATEST"
_LOOK_S = 0.2
"""Seconds between two looks at a writer that is waited for."""

OnRejected = Callable[[Path, str, Path], None]
"""Called on every rank with (checkpoint, reason, its new path)."""


@dataclass(slots=True)
class _Save:
    """A checkpoint that is being written."""

    snapshot: Snapshot
    writer: Writer
    meta: CheckpointMeta
    temporary: Path
    final: Path
    repeatable: bool


class CheckpointStore:
    """Checkpoints below ``root``.

    Args:
        keep_last: unfinished-stage checkpoints kept; the final ones of each stage are kept for ever.
        deadline_s: seconds without progress after which the writer of a checkpoint is abandoned as stuck.
        before_writing: called on rank 0 before a save begins and before it is committed; what it raises fails the save.
        on_rejected: called with every checkpoint that fails verification.
        on_waiting: called again and again while the store waits for a save.
        on_stuck: called on every rank with the reason when a writer makes no progress, before the save is abandoned.
        host: where a GPU's tensors are copied to.

    Raises:
        EnvironmentProblem: psutil is missing (Megatron's checkpointing needs it and does not say so).
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int = 2,
        deadline_s: float = 1800.0,
        before_writing: Callable[[], None] = lambda: None,
        on_rejected: OnRejected = lambda path, reason, moved: None,
        on_waiting: Callable[[], None] = lambda: None,
        on_stuck: Callable[[str], object] = lambda reason: None,
        host: HostCopy | None = None,
    ) -> None:
        try:
            import psutil  # noqa: F401
        except ImportError as error:
            raise EnvironmentProblem("checkpoints need psutil", fix="pip install psutil") from error
        self.root, self._keep_last, self._deadline_s = root, max(2, keep_last), deadline_s
        self._before_writing = before_writing
        self._on_rejected, self._on_waiting, self._on_stuck = on_rejected, on_waiting, on_stuck
        self._saving: _Save | None = None
        self._failed: _Save | None = None
        """The save that failed last, if ``write_again`` may be asked for: it holds its copy of the state."""
        self.write_s = 0.0
        """Seconds in which the slowest rank wrote its files of the last committed checkpoint, read back and compared."""
        self._host = host or HostCopy()
        self._abandoned: list[Writer] = []
        self._verified: set[Path] = set()
        """Checkpoints whose files this process has read and found to be what the manifest says."""

    def committed(self) -> list[Committed]:
        """Checkpoints with a valid manifest, newest first.

        Raises:
            OtherFormat: there is one of another version, which is neither damaged nor to be skipped.
        """
        found = []
        for path in step_directories(self.root):
            try:
                found.append(read_manifest(path))
            except OtherFormat:
                raise
            except CheckpointError:
                continue
        return sorted(found, key=lambda c: c.meta.global_step, reverse=True)

    def latest(self) -> Committed | None:
        """The newest checkpoint with a valid manifest; works without ``LATEST``, which is there for people."""
        return next(iter(self.committed()), None)

    def save(
        self,
        sharded_state_dict: dict[str, Any],
        meta: CheckpointMeta,
        *,
        read: ReadPart | None = None,
        files: int | None = None,
    ) -> Path:
        """Write and commit one checkpoint, and wait for it.

        Args:
            read: gives the values of tensors that are on the meta device (``Snapshot``).
            files: that each rank writes; default: by their size (``Snapshot``).

        Raises:
            CheckpointError: the step is committed already, or it could not be written; older ones are untouched.
        """
        self.begin(sharded_state_dict, meta, read=read, files=files)
        path = self.poll(wait=True)
        assert path is not None
        return path

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._saving is not None

    def begin(
        self,
        sharded_state_dict: dict[str, Any],
        meta: CheckpointMeta,
        *,
        read: ReadPart | None = None,
        files: int | None = None,
        gathered: Gather | None = None,
        repeatable: bool = False,
    ) -> None:
        """Copy the state and start to write it; training may go on, and ``poll`` commits it.

        Args: those of ``save``, and
            gathered: gives the values of tensors that several ranks hold parts of (``Snapshot``).
            repeatable: keep the copy if it cannot be written, for ``write_again``.

        Raises:
            CheckpointError: the step is committed already, the writer of an earlier save is still stuck, or there is no room.
        """
        assert self._saving is None, "one save at a time: poll(wait=True) first"
        self._failed = None
        committed = self.committed()
        newest = next(iter(committed), None)
        final = directory_for(self.root, meta, committed)
        if final.exists():
            raise CheckpointError("this step is committed already", where=str(final), fix="use another run.dir")
        temporary = gather(temporary_name(final))[0]
        meta = dataclasses.replace(meta, parent=newest.path.name if newest else "")
        with self._failing(temporary, final):
            run_together(self._refuse_while_stuck)
            self.sweep()
            run_together(lambda: self._make(temporary) if rank() == 0 else None)
            planned: list[Snapshot] = []
            plan = partial(
                Snapshot, sharded_state_dict, temporary, read=read, files=files, host=self._host, gather=gathered
            )
            run_together(lambda: planned.append(plan()))
            (snapshot,) = planned
            run_together(snapshot.copy)
            snapshot.gather()
            self._saving = _Save(snapshot, self._write(snapshot), meta, temporary, final, repeatable)

    def write_again(self) -> None:
        """Start to write the copy of a save that failed, once more: what was copied may have changed since.

        Raises:
            CheckpointError: the writer that failed is still stuck, or there is no room.
        """
        assert self._failed is not None, "nothing was begun as repeatable and failed"
        save = self._failed
        with self._failing(save.temporary, save.final, keep=True):  # the directory may be that of the stuck writer
            run_together(self._refuse_while_stuck)
            self.sweep()
            run_together(lambda: self._make(save.temporary) if rank() == 0 else None)
        self._saving = dataclasses.replace(save, writer=self._write(save.snapshot))
        self._failed = None

    def _write(self, snapshot: Snapshot) -> Writer:
        return Writer(snapshot.write, deadline_s=self._deadline_s)

    def _make(self, temporary: Path) -> None:
        self._before_writing()
        temporary.mkdir(parents=True)

    def poll(self, *, wait: bool = False) -> Path | None:
        """Commit the checkpoint that is being written if all ranks have written it, and say where it is.

        Args:
            wait: until it is committed.

        Returns:
            None when there is nothing to commit yet.

        Raises:
            CheckpointError: it could not be written, or a writer is stuck; the save is abandoned, older ones are untouched.
        """
        if self._saving is None:
            return None
        mine, progress = self._progress(wait)
        if progress == Progress.WRITING:
            return None
        save, self._saving = self._saving, None
        self._failed = save if save.repeatable else None
        with self._failing(save.temporary, save.final, keep=progress == Progress.STUCK):
            if progress != Progress.DONE:
                run_together(lambda: self._abandon(save.writer, mine))
            run_together(save.snapshot.finish)
            parts = gather((save.writer.files, save.writer.seconds))
            files = {name: value for part, _ in parts for name, value in part.items()}
            run_together(lambda: self._commit(save, files) if rank() == 0 else None)
        self._failed = None
        self.write_s = max(seconds for _, seconds in parts)
        self._verified.add(save.final)
        if rank() == 0:
            self._retain()
        return save.final

    def _progress(self, wait: bool) -> tuple[Progress, Progress]:
        """Progress of this rank's writer, and of all ranks' together."""
        assert self._saving is not None
        while True:
            mine = self._saving.writer.progress(_LOOK_S if wait else 0.0)
            progress = Progress(agree_max(mine))
            if progress != Progress.WRITING or not wait:
                return mine, progress
            self._on_waiting()

    def _abandon(self, writer: Writer, mine: Progress) -> None:
        """Called on every rank when the save failed on any: raises this rank's reason, if it has one."""
        if mine == Progress.STUCK:
            reason = f"its writer has not moved for {writer.stuck_for():.0f} s"
            self._on_stuck(reason)
        self._abandoned.append(writer)
        if mine == Progress.STUCK:
            raise CheckpointError(reason)
        if mine == Progress.FAILED:
            raise CheckpointError(writer.reason)

    def _refuse_while_stuck(self) -> None:
        """Refuse a second writer beside a stuck one, which cannot be ended and keeps its copy of the state in memory."""
        self._abandoned = [writer for writer in self._abandoned if writer.alive]
        if self._abandoned:
            raise CheckpointError("the writer of an earlier checkpoint is still stuck in the file system")

    @contextmanager
    def _failing(self, temporary: Path, final: Path, *, keep: bool = False) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            free = shutil.disk_usage(self.root if self.root.is_dir() else self.root.parent).free >> 20
            if rank() == 0 and not keep:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint could not be written: {error.what} ({free:,} MiB are free there)",
                where=f"{final}, {error.where}",
                fix="free some space or repair the file system; older checkpoints are untouched",
            ) from error

    def load_first_verified(
        self, candidates: Sequence[Committed], build: Callable[[Committed], dict[str, Any]]
    ) -> tuple[Committed, dict[str, Any]] | None:
        """Load the first candidate whose every file is what the manifest says; quarantine the ones before it.

        Args:
            build: makes the sharded state dict to load a candidate into, anew for every attempt.

        Returns:
            The checkpoint and its state, or None when there never was one.

        Raises:
            CheckpointError: there are checkpoints, and none can be used. What a verified checkpoint raises while it is
                loaded (no memory, another shape) is not its fault and passes through.
        """
        reasons = self._quarantine_broken_manifests()
        for candidate in candidates:
            try:
                self.verify(candidate)
                return candidate, load_verified(candidate.path, partial(build, candidate))
            except CheckpointError as error:
                reasons.append(f"{candidate.path.name}: {error.what}")
                self._quarantine(candidate.path, error.what)
        quarantined = sorted(self.root.glob("step_*.quarantined-*")) if self.root.is_dir() else []
        if not reasons and not quarantined:
            return None
        raise CheckpointError(
            "there are checkpoints, and none can be used" + (f" ({'; '.join(reasons)})" if reasons else ""),
            where=", ".join(path.name for path in quarantined) or str(self.root),
            fix="restore one from a copy, or start over with --fresh",
        )

    def verify(self, committed: Committed) -> None:
        """Check size and SHA-256 of every file (shared among the ranks) and that the metadata is harmless.

        Raises:
            CheckpointError: on every rank, naming the first file that differs.
        """
        run_together(lambda: verify_share(committed, self._on_waiting))
        self._verified.add(committed.path)

    def _commit(self, save: _Save, files: Files) -> None:
        """Commit on rank 0. Files rank 0 wrote in addition are flushed and hashed here; those of the ranks are already."""
        temporary = save.temporary
        present = {p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file()}
        for name in sorted(files):
            if name not in present or (temporary / name).stat().st_size != files[name][0]:
                raise CheckpointError(f"{name} was written, and is not there")
        for name in sorted(present - files.keys()):
            flush(temporary / name)
            files[name] = (temporary / name).stat().st_size, sha256_of(temporary / name)
        write_atomically(temporary / MANIFEST, manifest_text(save.meta, files))
        self._before_writing()
        temporary.rename(save.final)
        flush(self.root)
        self._name_latest(save.final)

    def _name_latest(self, path: Path) -> None:
        with suppress(OSError):  # a full disk: ``LATEST`` is there for people, and the next save corrects it
            write_atomically(self.root / LATEST, f"{path.name}\n")

    def _retain(self) -> None:
        """Remove old checkpoints, as long as two newer ones are known to be good."""
        for old in replaced(self.committed(), self._verified, self._keep_last):
            removed = old.path.with_name(f"{old.path.name}.tmp-removed")  # at once, then file by file
            old.path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what interrupted saves and removals left behind; only the command that holds the run's lock may call it."""
        if rank() == 0:
            for path in left_behind(self.root):
                shutil.rmtree(path, ignore_errors=True)

    def rename_newer(self, committed: Committed, stage: str) -> None:
        """Rename the checkpoints of ``stage`` after ``committed``: training diverges from it. Every rank calls it."""
        later = [c for c in self.committed() if c.meta.global_step > committed.meta.global_step]
        newer = [c.path for c in later if c.meta.stage == stage]
        barrier()
        for path in newer if rank() == 0 else ():
            path.rename(free_name(path, "rolled-back"))
        barrier()

    def rename_stage(self, stage: str) -> None:
        """Rename the checkpoints of ``stage``, so that it starts again; those of other stages stay. Every rank calls it."""
        paths = [c.path for c in self.committed() if c.meta.stage == stage]
        barrier()
        for path in paths if rank() == 0 else ():
            path.rename(free_name(path, "before"))
        barrier()

    def _quarantine_broken_manifests(self) -> list[str]:
        reasons = []
        for path in step_directories(self.root):
            try:
                read_manifest(path)
            except OtherFormat:
                raise
            except CheckpointError as error:
                reasons.append(f"{path.name}: {error.what}")
                self._quarantine(path, error.what)
        return reasons

    def _quarantine(self, path: Path, reason: str) -> None:
        barrier()
        moved = free_name(path, "quarantined")
        barrier()
        if rank() == 0:
            path.rename(moved)
        barrier()
        self._on_rejected(path, reason, moved)
