"""What prepared data is made from, by key: the manifest records it, and ``m1 prepare-data`` and ``m1 pretrain`` compare it.

Both ask ``differences``. Any difference makes ``m1 prepare-data`` prepare again. Those of ``TOKENS_STAY`` change no token, only
what is proved or reported: training goes on with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.prepare.reader import source_files, tree_files
from m1_data.prepare.work_folder import FORMAT_VERSION, is_prepared
from m1_data.spec import PrepareSpec, SourceSpec, StageMix, TokenizerSpec
from m1_data.storage.manifest import Manifest, load_manifest
from m1_data.storage.plain_values import shown
from m1_data.storage.store import open_prepared
from m1_data.tokenizer import COMPANION_FILES

_MODIFIED = "modification times of the files"
_COMPANIONS = "tokenizer.path, files beside tokenizer.json"
_FORMAT = "version of the preparation"
_MIXES = "mixes of the stages"
TOKENS_STAY = (_FORMAT, _MIXES, _COMPANIONS, "data.engine", "data.verify_docs", "data.max_bad_share")
"""Keys, besides modification times, of which no token depends."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An input that is not what it was; a value is None where the input does not exist."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        if isinstance(self.old, dict) and isinstance(self.new, dict) and "bytes" in self.old:
            old, new = ("{files:,} with {bytes:,} bytes".format(**value) for value in (self.old, self.new))
            return f"{self.key}: {old} then, {new} now" + (" under other names or sizes" if old == new else "")
        if self.key in (_MIXES, _COMPANIONS) or self.key.endswith(_MODIFIED):
            return f"{self.key} changed"
        return f"{self.key} was {shown(self.old)}, and is {shown(self.new)} now"


def describe_inputs(
    spec: PrepareSpec,
    tokenizer: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    base_dir: Path,
    length_scale: float,
    *,
    missing_files: bool = False,
) -> dict[str, Any]:
    """Return plain values that determine the output: settings, the tokenizer's content, and names, sizes and times of files.

    Args:
        missing_files: the raw text or the tokenizer may be absent, as on a cluster that only has the prepared data; they are
            None then, and not compared.

    Raises:
        DataError: a source has no files.
    """
    inputs: dict[str, Any] = {
        _FORMAT: FORMAT_VERSION,
        "curriculum.length_scale": length_scale,
        **{
            f"data.{f.name}": getattr(spec, f.name)
            for f in dataclasses.fields(spec)
            if f.name not in ("out", "sources")
        },
        "tokenizer.eod_token": tokenizer.eod_token,
        **_tokenizer_inputs(tokenizer, base_dir),
        "data.sources": [source.name for source in spec.sources],
    }
    for source in spec.sources:
        inputs |= {
            f"data.sources.{source.name}.{f.name}": getattr(source, f.name)
            for f in dataclasses.fields(source)
            if f.name != "name"
        }
        inputs |= _files(source, base_dir, missing_files)
    if any(source.format == "needles" for source in spec.sources):
        inputs["context_tokens of the stages"] = [mix.seq_len_tokens for mix, _ in mixes]
    inputs[_MIXES] = [[dataclasses.asdict(mix), tokens] for mix, tokens in mixes]
    plain: dict[str, Any] = json.loads(json.dumps(inputs))
    return plain


def fingerprint_of(inputs: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Return the inputs that are not what was recorded. Files that are not there now are not compared."""
    keys = dict.fromkeys((*present, *recorded))
    unknown = {key for key in present if present[key] is None}
    pairs = (Difference(key, recorded.get(key), present.get(key)) for key in keys if key not in unknown)
    return [pair for pair in pairs if pair.old != pair.new]


def find_up_to_date(out: Path, inputs: Mapping[str, Any], notice: Callable[[str], None]) -> Manifest | None:
    """Return the manifest of the data in ``out`` if it was made from these inputs and every byte of it is what was written.

    Else return None and call ``notice`` with the reason.
    """
    if not is_prepared(out):
        return None
    try:
        manifest = load_manifest(out)
        if not manifest.inputs:
            notice(
                "the data is prepared again: it is from an older version, which did not record what it was made from"
            )
        elif changed := differences(manifest.inputs, inputs):
            notice(f"the data is prepared again: {_listed(changed)}")
        else:
            open_prepared(out, whole_bytes=sys.maxsize)
            return manifest
    except DataError as error:
        notice(f"the data is prepared again, because what is there is damaged: {error.where}: {error.what}")
    return None


def refuse_changed_inputs(
    manifest: Manifest, present: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> list[str]:
    """Refuse to train on data that was made from other inputs, and return what is worth saying although no token depends on it.

    Args:
        present: of ``describe_inputs``.
        origins: where each key of the configuration comes from, for the message.

    Raises:
        DataError: an input that determines the tokens is not what it was; key, old and new value are named.
    """
    if not manifest.inputs:
        recorded: dict[str, Any] = {
            "curriculum.length_scale": manifest.length_scale
        }  # all that older versions recorded
        present = {key: present[key] for key in recorded}
    else:
        recorded = manifest.inputs
    changed = differences(recorded, present)
    times = [d for d in changed if d.key.endswith(_MODIFIED)]
    fatal = [d for d in changed if d not in times and d.key not in TOKENS_STAY]
    if fatal:
        raise DataError(
            f"the data was prepared from something else: {_listed(fatal)}",
            where=f"{(origins or {}).get(fatal[0].key, '')}, key {fatal[0].key}".removeprefix(", "),
            fix="run m1 prepare-data (another data.out keeps the data that is there), or set the key back",
        )
    return [f"{d.key} changed, names and sizes did not: m1 prepare-data reads them again" for d in times]


def _listed(changed: Sequence[Difference]) -> str:
    more = len(changed) - 3
    return "; ".join(map(str, changed[:3])) + (f"; and {more} more" if more > 0 else "")


def _tokenizer_inputs(spec: TokenizerSpec, base_dir: Path) -> dict[str, Any]:
    if not spec.path:
        return {"tokenizer.vocab_size": spec.vocab_size, "tokenizer.train_bytes": spec.train_bytes}
    path = (base_dir / Path(spec.path).expanduser()).resolve()
    file = path / "tokenizer.json" if path.is_dir() else path
    beside = {name: _sha256(file.with_name(name)) for name in COMPANION_FILES}
    return {"SHA-256 of tokenizer.path": _sha256(file), _COMPANIONS: beside if file.is_file() else None}


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _files(source: SourceSpec, base_dir: Path, missing: bool) -> dict[str, Any]:
    """Number, bytes, and hashes of names and sizes and of times of the files that a source reads."""
    names, times = f"data.sources.{source.name}, files", f"data.sources.{source.name}, {_MODIFIED}"
    try:
        roots = source_files(source, base_dir)
    except DataError:
        if not missing:
            raise
        return {names: None, times: None}
    is_tree = source.format in ("files", "packages")
    found = [(root, file) for root in roots for file in (tree_files(root, source) if is_tree else [root])]
    stats = [(file.relative_to(root.parent).as_posix(), file.stat()) for root, file in found]
    sizes = [(name, stat.st_size) for name, stat in stats]
    return {
        names: {"files": len(sizes), "bytes": sum(size for _, size in sizes), "sha256": _hash(sizes)},
        times: _hash([stat.st_mtime_ns for _, stat in stats]),
    }


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
