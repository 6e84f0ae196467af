"""The tokenizer of a preparation: loaded from where the configuration says, or trained on the sources."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from m1_data.prepare.clean import clean
from m1_data.prepare.filters import apply_filters
from m1_data.prepare.reader import read_source
from m1_data.prepare.tally import Progress, Tally
from m1_data.spec import SourceSpec, TokenizerSpec
from m1_data.storage.durable import write_atomically
from m1_data.tokenizer import LoadedTokenizer, load_tokenizer, train_tokenizer


def load_or_train_tokenizer(
    spec: TokenizerSpec, sources: Sequence[SourceSpec], *, base_dir: Path, trained: Path, progress: Progress
) -> LoadedTokenizer:
    """Load ``spec.path``, or without one train a tokenizer on the texts of ``sources``.

    Args:
        base_dir: where relative paths start.
        trained: file that keeps a trained tokenizer, with its SHA-256 beside it; an interrupted run finds it there and does not
            train again.
        progress: called with the phase train after each text.

    Raises:
        DataError: the tokenizer is missing or unusable, or a source cannot be read.
    """
    if spec.path:
        return load_tokenizer((base_dir / Path(spec.path).expanduser()).resolve(), spec.eod_token)
    written = trained.with_name(f"{trained.name}.sha256")
    if not (trained.is_file() and written.is_file() and written.read_text("ascii", "replace") == _sha256(trained)):
        fresh = train_tokenizer(_training_texts(spec, sources, base_dir, progress), spec)
        write_atomically(trained, fresh.json_bytes)
        write_atomically(written, _sha256(trained))
    return dataclasses.replace(load_tokenizer(trained, spec.eod_token), folder=None)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _training_texts(
    spec: TokenizerSpec, sources: Sequence[SourceSpec], base_dir: Path, progress: Progress
) -> Iterator[str]:
    """Yield texts of every source that is read, an equal number of characters of each."""
    read = [source for source in sources if source.format != "needles"]
    for source in read:
        budget = spec.train_bytes // len(read)
        size = 0
        for count, raw in enumerate(read_source(source, base_dir, Tally()), 1):
            cleaned = clean(raw, Tally())
            text = None if cleaned is None else apply_filters(cleaned, Tally())
            if text is None:
                continue
            text = text[: budget - size]
            size += len(text)
            yield text
            progress("train", source.name, count, size)
            if size >= budget:
                break
