"""The checkpoints of one run: commit, find, verify, load, retain. All methods but the listing ones are collective."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m1_data.errors import CheckpointError, EnvironmentProblem
from m1_stages.checkpoint.alone import without_collectives
from m1_stages.checkpoint.manifest import MANIFEST, CheckpointMeta, Committed, manifest_text, read_manifest
from m1_stages.checkpoint.unpickle import check_metadata
from m1_stages.checkpoint.write import save_in_process

LATEST = "LATEST"
_STEP = re.compile(r"step_(\d{8,})$")

OnRejected = Callable[[Path, str, Path], None]
"""Called on every rank with (checkpoint, reason, where it was put)."""


class CheckpointStore:
    """Checkpoints below ``root``.

    Args:
        keep_last: unfinished-stage checkpoints kept; the final ones of each stage are kept for ever.
        on_rejected: told about every checkpoint that fails verification.

    Raises:
        EnvironmentProblem: psutil is missing (Megatron's writer needs it and does not say so).
    """

    def __init__(
        self, root: Path, *, keep_last: int = 2, on_rejected: OnRejected = lambda path, reason, moved: None
    ) -> None:
        try:
            import psutil  # noqa: F401
        except ImportError as error:
            raise EnvironmentProblem("checkpoints need psutil", fix="pip install psutil") from error
        self.root, self._keep_last, self._on_rejected = root, max(2, keep_last), on_rejected

    def committed(self) -> list[Committed]:
        """Checkpoints with a valid manifest, newest first."""
        found = []
        for path in self._step_dirs():
            try:
                found.append(read_manifest(path))
            except CheckpointError:
                continue
        return sorted(found, key=lambda c: c.meta.global_step, reverse=True)

    def latest(self) -> Committed | None:
        """The newest checkpoint with a valid manifest; works without ``LATEST``, which is there for people."""
        return next(iter(self.committed()), None)

    def save(self, sharded_state_dict: dict[str, Any], meta: CheckpointMeta) -> Path:
        """Write and commit one checkpoint.

        Raises:
            CheckpointError: the step is committed already, or it could not be written; older ones are untouched.
        """
        final = self.root / f"step_{meta.global_step:08d}"
        newest = self.latest()
        if final.exists():
            raise CheckpointError("this step is committed already", where=str(final), fix="use another run.dir")
        temporary = Path(_from_rank_0(str(final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"))))
        self._sweep()
        meta = dataclasses.replace(meta, parent=newest.path.name if newest else "")
        try:
            _together(lambda: temporary.mkdir(parents=True) if _rank() == 0 else None)
            with without_collectives(_world()):
                _together(lambda: save_in_process(sharded_state_dict, temporary))
            files = self._hash_files(temporary)
            _together(lambda: self._commit(temporary, final, meta, files) if _rank() == 0 else None)
        except CheckpointError as error:
            free = shutil.disk_usage(self.root if self.root.is_dir() else self.root.parent).free >> 20
            if _rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint could not be written: {error.what} ({free:,} MiB are free there)",
                where=f"{final}, {error.where}",
                fix="free some space or repair the file system; older checkpoints are untouched",
            ) from error
        if _rank() == 0:
            self._retain()
        return final

    def load_first_verified(
        self, candidates: Sequence[Committed], build: Callable[[], dict[str, Any]]
    ) -> tuple[Committed, dict[str, Any]] | None:
        """Load the first candidate whose every file is what the manifest says; put aside the ones before it.

        Args:
            build: makes the sharded state dict to load into, anew for every attempt.

        Returns:
            The checkpoint and its state, or None when there never was one.

        Raises:
            CheckpointError: there are checkpoints, and none can be used. What a verified checkpoint raises while it is
                loaded (no memory, another shape) is not its fault and passes through.
        """
        from megatron.core import dist_checkpointing

        reasons = self._put_aside_broken_manifests()
        for candidate in candidates:
            try:
                self.verify(candidate)
                try:
                    with without_collectives(_world()):
                        return candidate, dist_checkpointing.load(build(), str(candidate.path))
                except pickle.UnpicklingError as error:
                    raise CheckpointError(f"refused to unpickle it: {str(error).splitlines()[0]}") from error
            except CheckpointError as error:
                reasons.append(f"{candidate.path.name}: {error.what}")
                self._put_aside(candidate.path, error.what)
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
        _together(lambda: self._verify_share(committed))

    def _verify_share(self, committed: Committed) -> None:
        present = {p.relative_to(committed.path).as_posix() for p in committed.path.rglob("*") if p.is_file()}
        for name in sorted(present - committed.files.keys() - {MANIFEST}):
            raise CheckpointError(f"{name} does not belong to the checkpoint", where=str(committed.path))
        names = sorted(committed.files)
        for name in names[_rank() :: _world()]:
            size, expected = committed.files[name]
            path = committed.path / name
            if name not in present:
                raise CheckpointError(f"{name} is missing", where=str(committed.path))
            if path.stat().st_size != size or _sha256(path) != expected:
                raise CheckpointError(f"{name} is not what was written", where=str(committed.path))
            if name == ".metadata":
                check_metadata(path)

    def _hash_files(self, directory: Path) -> dict[str, tuple[int, str]]:
        names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
        mine = {
            name: ((directory / name).stat().st_size, _sha256(directory / name)) for name in names[_rank() :: _world()]
        }
        return {name: value for part in _gather(mine) for name, value in part.items()}

    def _commit(self, temporary: Path, final: Path, meta: CheckpointMeta, files: dict[str, tuple[int, str]]) -> None:
        for name in files:
            _fsync(temporary / name)
        text = manifest_text(meta, files)
        _write(temporary / MANIFEST, text)
        _fsync(temporary)
        temporary.rename(final)
        _fsync(self.root)
        _write(self.root / f"{LATEST}.tmp", f"{final.name}\n")
        (self.root / f"{LATEST}.tmp").rename(self.root / LATEST)
        _fsync(self.root)

    def _retain(self) -> None:
        passing = [c for c in self.committed() if not c.meta.stage_final]
        newest_two = {c.path for c in self.committed()[:2]}
        for old in passing[self._keep_last :]:
            if old.path not in newest_two:
                shutil.rmtree(old.path, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what an interrupted save left behind."""
        if _rank() == 0 and self.root.is_dir():
            for path in self.root.glob("step_*.tmp-*"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside_newer(self, committed: Committed) -> None:
        """Rename the checkpoints after ``committed``: the run goes another way from there. Every rank calls it."""
        newer = [c.path for c in self.committed() if c.meta.global_step > committed.meta.global_step]
        _barrier()
        for path in newer if _rank() == 0 else ():
            number = 1
            while (moved := path.with_name(f"{path.name}.rolled-back-{number}")).exists():
                number += 1
            path.rename(moved)
        _barrier()

    def _put_aside_broken_manifests(self) -> list[str]:
        reasons = []
        for path in self._step_dirs():
            try:
                read_manifest(path)
            except CheckpointError as error:
                reasons.append(f"{path.name}: {error.what}")
                self._put_aside(path, error.what)
        return reasons

    def _put_aside(self, path: Path, reason: str) -> None:
        _barrier()
        number = 1
        while (moved := path.with_name(f"{path.name}.quarantined-{number}")).exists():
            number += 1
        _barrier()
        if _rank() == 0:
            path.rename(moved)
        _barrier()
        self._on_rejected(path, reason, moved)

    def _step_dirs(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if path.is_dir() and _STEP.match(path.name))


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if _world() > 1:
        import torch.distributed as dist

        dist.barrier()


def _gather(value: Any) -> list[Any]:
    if _world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(value: Any) -> Any:
    return _gather(value)[0]


def _together(action: Callable[[], Any]) -> None:
    """Run ``action`` on every rank; when it fails on any, fail on all with the first rank's reason."""
    from torch.distributed.checkpoint.api import CheckpointException

    failure = ""
    try:
        action()
    except CheckpointError as error:
        failure = error.what
    except (Exception, CheckpointException) as error:  # torch's is no Exception; no other rank may go on
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                failure = f"{cause.strerror or cause}: {cause.filename or ''}".rstrip(": ")
                break
            cause = cause.__cause__ or cause.__context__
    for rank, text in enumerate(_gather(failure)):
        if text:
            raise CheckpointError(text, where=f"rank {rank}", fix="")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
