"""Raw text in, Megatron-ready shards out. ``prepare`` shows the pipeline from top to bottom:

=======================  ==================  ==============================================================
step                     module              from, to
=======================  ==================  ==============================================================
read                     ``reader``          files of a source, raw texts
clean                    ``clean``           raw texts, cleaned texts
filter                   ``filters``         cleaned texts, wanted texts; **add a data filter there**
deduplicate              ``deduplicate``     texts, texts not seen before in any source
tokenize and verify      ``encode``          texts, batches of token ids
bucket and write         ``shards``          token ids, shards by document length, some held out
account                  ``account``         counts and shards, entries of the manifest
=======================  ==================  ==============================================================

The steps are generators, so one batch of documents is in memory at a time. A few documents of each source and length
bucket are held out: written to shards of their own, which training never opens.

Everything is written to ``<out>.partial`` and renamed at the end. A source that is complete there is not read again, so
an interrupted run continues; the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.prepare.account import SourceRecord, account_for_source, build_manifest
from m1_data.prepare.choose_tokenizer import load_or_train_tokenizer
from m1_data.prepare.clean import clean_texts
from m1_data.prepare.deduplicate import ExactDedup, deduplicate
from m1_data.prepare.encode import Encoder, tokenize_and_verify
from m1_data.prepare.filters import filter_texts
from m1_data.prepare.generate import generate_needles
from m1_data.prepare.inputs import describe_inputs, find_up_to_date, fingerprint_of
from m1_data.prepare.reader import read_source
from m1_data.prepare.shards import ShardTarget, bucket_and_write
from m1_data.prepare.tally import Progress, Tally
from m1_data.prepare.work_folder import WorkFolder, refuse_foreign_folders
from m1_data.spec import BUCKET_EDGES_TOKENS, PrepareSpec, StageMix, TokenizerSpec
from m1_data.storage.lock import lock_of, writing
from m1_data.storage.manifest import Manifest
from m1_data.tokenizer import save_tokenizer


def prepare(
    spec: PrepareSpec,
    tokenizer_spec: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    *,
    base_dir: Path,
    length_scale: float,
    progress: Progress = lambda phase, source, documents, size: None,
    notice: Callable[[str], None] = lambda sentence: None,
) -> tuple[Manifest, bool]:
    """Prepare ``spec.sources`` into ``spec.out``.

    Args:
        mixes: every stage's mix and its tokens, for the report of what the data can and cannot give.
        base_dir: where relative paths start.
        length_scale: multiplies the bucket edges.
        progress: called as the work goes on.
        notice: called with the reason when data that is there is prepared again.

    Returns:
        The manifest, and whether anything had to be done: finished data of the same inputs is verified and left as it is.

    Raises:
        ConfigError: ``spec.out`` holds what m1 did not write, or a source lies inside it.
        DataError: no sources, no usable documents, broken files, too many unusable records, a wrong tokenizer.
        InUse: another preparation works there, or a run reads the data that would be replaced.
        EnvironmentProblem: an engine or library that is not installed.
        OSError: the disk is full or failing.
    """
    if not spec.sources:
        raise DataError(
            "there are no data sources",
            where="key data.sources",
            fix="add a [[data.sources]] table to the configuration",
        )
    out = (base_dir / Path(spec.out).expanduser()).resolve()
    inputs = describe_inputs(spec, tokenizer_spec, mixes, base_dir, length_scale)
    fingerprint = fingerprint_of(inputs)
    if (up_to_date := find_up_to_date(out, inputs, notice)) is not None:
        return up_to_date, False
    refuse_foreign_folders(out, spec.sources, base_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(lock_of(out), f"the data folder {out}"):
        return _prepare_anew(
            spec,
            tokenizer_spec,
            mixes,
            out=out,
            inputs=inputs,
            fingerprint=fingerprint,
            base_dir=base_dir,
            length_scale=length_scale,
            progress=progress,
        ), True


def _prepare_anew(
    spec: PrepareSpec,
    tokenizer_spec: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    *,
    out: Path,
    inputs: dict[str, Any],
    fingerprint: str,
    base_dir: Path,
    length_scale: float,
    progress: Progress,
) -> Manifest:
    work = WorkFolder(out, fingerprint)
    tokenizer = load_or_train_tokenizer(
        tokenizer_spec, spec.sources, base_dir=base_dir, trained=work.trained_tokenizer, progress=progress
    )
    tokenizer_files = save_tokenizer(tokenizer, work.path / "tokenizer")
    edges = tuple(round(edge * length_scale) for edge in BUCKET_EDGES_TOKENS)
    target = ShardTarget(folder=work.path, tokenizer=tokenizer, edges=edges)
    encoder: Encoder | None = None
    seen = ExactDedup()
    records: list[SourceRecord] = []
    # Needle sources come last: their documents are hidden in the text of the others.
    for source in sorted(spec.sources, key=lambda s: s.format == "needles"):
        record = work.load_finished(source, seen)
        if record is not None:
            progress("reuse", source.name, record.source.documents, record.source.utf8_bytes)
        elif source.format == "needles":
            text_shards = [shard for earlier in records for shard in earlier.shards]
            contexts = [mix.seq_len_tokens for mix, _ in mixes]
            record = generate_needles(source, text_shards, target, context_tokens=contexts, progress=progress)
            work.save_finished(record, digests=b"")
        else:
            encoder = encoder or Encoder(tokenizer, spec.engine)
            tally = Tally()
            texts = read_source(source, base_dir, tally)
            texts = clean_texts(texts, tally)
            texts = filter_texts(texts, tally)
            if spec.dedup == "exact":
                texts = deduplicate(texts, seen, tally)
            batches = tokenize_and_verify(texts, encoder, verify_docs=spec.verify_docs)
            # Without deduplication nothing is held out: a copy of the document could be trained on.
            most_held_out = spec.held_out if spec.dedup == "exact" else 0
            written = bucket_and_write(batches, source, target, most_held_out=most_held_out, progress=progress)
            record = account_for_source(source, tally, written, base_dir=base_dir, max_bad_share=spec.max_bad_share)
            work.save_finished(record, digests=seen.take_new_digests())
        records.append(record)

    manifest = build_manifest(
        records,
        mixes,
        inputs=inputs,
        fingerprint=fingerprint,
        engine=spec.engine,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        length_scale=length_scale,
        edges=edges,
    )
    work.publish(manifest)
    progress("done", "", sum(s.documents for s in manifest.sources), sum(s.utf8_bytes for s in manifest.sources))
    return manifest
