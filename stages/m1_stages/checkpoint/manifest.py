"""The manifest of a committed checkpoint: what it says about itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m1_stages.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 2
_READABLE = (1, 2)
"""1: saved with Megatron-Core 0.16, which cannot load 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeta:
    """The position of a run when it was saved."""

    stage: str
    stage_step: int
    global_step: int
    stage_final: bool
    config_sha256: str
    data_fingerprint: str
    topology: dict[str, int]
    decay: dict[str, Any]
    """Policy and the slopes of the last step."""
    parent: str = ""
    """Name of the checkpoint before this one."""
    versions: dict[str, str] = field(
        default_factory=lambda: {n: version(n) for n in ("m1cli", "torch", "megatron-core")}
    )
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint directory with a valid manifest; its files are not verified yet."""

    path: Path
    meta: CheckpointMeta
    files: dict[str, tuple[int, str]]
    """Relative path to size and SHA-256."""
    sha256: str
    """Hash of the manifest; names the checkpoint's content."""


class OtherFormat(CheckpointError):
    """Written by a version whose manifests are not the ones this version reads; not damaged, and left where it is."""


def manifest_text(meta: CheckpointMeta, files: dict[str, tuple[int, str]]) -> str:
    """The manifest with its own hash."""
    return _text(
        {"format": FORMAT, "meta": dataclasses.asdict(meta), "files": {k: list(v) for k, v in sorted(files.items())}}
    )


def read_manifest(directory: Path) -> Committed:
    """Read and check the manifest of ``directory``; every byte of it counts.

    Raises:
        OtherFormat: of another format, which is named, with the version that wrote it.
        CheckpointError: missing or damaged.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        body = {key: value for key, value in values.items() if key != "sha256"}
        if text != _text(body):
            raise ValueError("its own hash does not match")
        if body["format"] not in _READABLE:
            raise OtherFormat(
                f"the checkpoint has manifest format {body['format']}, "
                f"written by m1cli {body.get('meta', {}).get('versions', {}).get('m1cli', 'of another version')}; "
                f"this is m1cli {version('m1cli')}, which reads formats {_READABLE[0]} to {_READABLE[-1]}",
                where=str(path),
                fix="use the version that wrote it, or another run.dir",
            )
        files = {name: (int(size), str(sha)) for name, (size, sha) in body["files"].items()}
        return Committed(directory, CheckpointMeta(**body["meta"]), files, values["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint manifest is missing or damaged: {error}",
            where=str(path),
            fix="use a folder step_... of a run's checkpoints, or copy this one again",
        ) from error


def _text(body: dict[str, Any]) -> str:
    sha256 = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha256}, indent=1) + "\n"
