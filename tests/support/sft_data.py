"""A fine-tuning dataset straight from files."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from m1_data.sft.choice import Selection
from m1_data.sft.dataset import SFTDataset
from m1_data.sft.preview import Preview
from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import SampleStore, write_store

_TUPLES = ("ignored_keys", "patterns", "weights")


def open_samples(paths: Sequence[Path], *, folder: Path | None = None, **settings: Any) -> SampleStore:
    """The store of some files, written into ``folder``, or into one of its own, which is gone when this returns."""
    held_out: Collection[bytes] = settings.pop("held_out_texts", ())
    given = SampleSettings(paths=tuple(paths), held_out=frozenset(held_out), **settings)
    kept = None if folder else tempfile.TemporaryDirectory()
    out = folder or Path(kept.name if kept else "") / "store"
    write_store(given, out, key=given.key())
    store = SampleStore(out)
    vars(store)["kept"] = kept  # it is removed with the store
    return store


def sft_dataset(paths: Sequence[Path], **settings: Any) -> SFTDataset:
    """The dataset of some files; ``held_out_texts`` are the digests that pretraining holds out."""
    named = {f.name for f in fields(Selection)}
    plain = {k: tuple(v) if k in _TUPLES else v for k, v in settings.items()}
    selection = Selection(**{k: v for k, v in plain.items() if k in named})
    return SFTDataset(open_samples(paths, **{k: v for k, v in plain.items() if k not in named}), selection)


def spans_of(data: SFTDataset, tokenizer_dir: Path) -> list[list[tuple[str, bool]]]:
    """The samples of a dataset as text, cut where the mask changes."""
    preview = Preview(data.store, tokenizer_dir)
    return [[tuple(span) for span in preview.spans(n, 10**9)] for n in range(len(data.store.samples))]
