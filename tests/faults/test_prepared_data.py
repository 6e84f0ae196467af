"""Prepared data that was damaged, or made from something else: nothing of it is trained on, tokenized with or exported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_run import make_run

from m1_data.prepare.run import prepare
from m1_data.storage.blocks import BlockHasher
from m1_data.storage.indexed import IndexedReader, IndexedWriter
from m1_data.storage.manifest import load_manifest
from m1_data.storage.store import open_prepared, open_shard
from m1_stages.config.load import load_config
from m1_stages.errors import DataError
from m1_stages.jobs.prepared import open_for_training, open_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data has shards, held-out shards and a tokenizer. Tests that change it put it back."""
    folder = tmp_path_factory.mktemp("prepared")
    make_run(folder)
    text = "".join(json.dumps({"text": f"{n} plus {n} is {2 * n} " * 4}) + "\n" for n in range(1500))
    (folder / "sums.jsonl").write_text(text)
    shutil.rmtree(folder / "data")
    assert prepare_again(folder) == (True, [])
    assert load_manifest(folder / "data").held_out
    return folder


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "project"))


def prepare_again(folder: Path, *stages: str, phases: list[str] | None = None) -> tuple[bool, list[str]]:
    """Whether ``m1 prepare-data`` had to do anything, and what it said; ``phases`` gets what it did."""
    said: list[str] = []
    resolved = load_config(folder / "m1.toml")
    _, did = prepare(
        resolved.config.data,
        resolved.config.tokenizer,
        [(resolved.config.mix(stage), 1000) for stage in stages],
        base_dir=folder,
        length_scale=resolved.config.curriculum.length_scale,
        notice=said.append,
        progress=lambda phase, source, *_: phases.append(f"{phase} {source}") if phases is not None else None,
    )
    return did, said


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file with one bit the other way round."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(before)


def files_of(folder: Path) -> list[Path]:
    """What is trained on, measured on, tokenized with or exported, and what describes it; not what a preparation keeps."""
    data = folder / "data"
    kept = [path for part in ("shards", "held_out", "tokenizer") for path in (data / part).rglob("*") if path.is_file()]
    return sorted([data / "manifest.json", *kept])


def test_two_hundred_flipped_bits_are_found_before_the_first_step(original: Path) -> None:
    rng, resolved = random.Random(1), load_config(original / "m1.toml")
    files = files_of(original)
    kinds = {(p.suffix, p.relative_to(original / "data").parts[0]) for p in files}
    assert {(".bin", "shards"), (".idx", "shards"), (".bin", "held_out"), (".idx", "held_out")} <= kinds
    assert {"manifest.json", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in files}
    open_for_training(resolved)
    for number in range(200):
        path = files[number % len(files)]
        with flipped(path, rng.randrange(8 * path.stat().st_size)):
            with pytest.raises(DataError) as caught:
                open_for_training(resolved)
            assert caught.value.where == str(path)
            assert "m1 prepare-data" in caught.value.fix
            if path.name == "manifest.json" or path.parent.name == "tokenizer":
                with pytest.raises(DataError, match="damaged"):  # what fine-tuning and export call
                    open_tokenizer(resolved)


def test_of_large_data_each_block_is_verified_when_it_is_first_read(original: Path) -> None:
    manifest = load_manifest(original / "data")
    shard = next(s for s in manifest.shards if s.source == "words" and s.documents > 40)
    path = original / "data" / f"{shard.prefix}.bin"
    hasher = BlockHasher(block_bytes=512)
    content = path.read_bytes()
    for start in range(0, len(content), 100):
        hasher.update(content[start : start + 100])
    blocks = path.with_suffix(".blocks")
    before = blocks.read_bytes()
    blocks.write_bytes(hasher.finish())
    entry = dataclasses.replace(shard, blocks_sha256=hashlib.sha256(blocks.read_bytes()).hexdigest())
    whole = open_shard(original / "data", entry, whole=True)
    documents = [whole.get(n) for n in range(len(whole))]
    ends = np.cumsum([len(d) for d in documents]) * 2
    for bit in (5, 8 * 512 * 7 + 3, 8 * (len(content) - 1)):
        with flipped(path, bit):
            with pytest.raises(DataError, match="are not what was written"):
                open_shard(original / "data", entry, whole=True)
            reader = open_shard(original / "data", entry, whole=False)
            damaged = bit // 8 // 512
            for n, (document, end) in enumerate(zip(documents, ends.tolist(), strict=True)):
                first, last = (end - 2 * len(document)) // 512, (end - 1) // 512
                if first <= damaged <= last:
                    with pytest.raises(DataError, match=f"block {damaged}\\)") as caught:
                        reader.get(n)
                    assert caught.value.where == str(path)
                else:
                    assert (reader.get(n) == document).all()
    lazy = open_prepared(original / "data", whole_bytes=0) if blocks.write_bytes(before) else None
    assert lazy is not None
    with flipped(path, 8 * 600):
        reader = open_prepared(original / "data", whole_bytes=0).training.readers[next(iter(lazy.training.readers))]
        cell = next(c for c in lazy.training.readers if (c.source, c.bucket) == (shard.source, shard.bucket))
        with pytest.raises(DataError, match="damaged"):
            lazy.training.readers[cell].get(0, 0, 5)
        reader.get(0, 0, 5)


def test_an_index_with_a_flipped_bit_is_never_read_from(tmp_path: Path) -> None:
    """Without any hash: lengths, pointers and sizes say the same thing, so none of them can be another."""
    writer = IndexedWriter(tmp_path / "s", 400, 0)
    for length in (3, 1, 70, 5):
        writer.add(np.arange(length))
    writer.close()
    assert [IndexedReader(tmp_path / "s").get(n).tolist() for n in (0, 3)] == [[0, 1, 2, 0], [0, 1, 2, 3, 4, 0]]
    for bit in range(8 * (tmp_path / "s.idx").stat().st_size):
        with flipped(tmp_path / "s.idx", bit), pytest.raises(DataError, match=r"index"):
            IndexedReader(tmp_path / "s")


@pytest.mark.parametrize(
    "name", ["shards/sums/lt32k.bin", "shards/words/lt32k.idx", "tokenizer/tokenizer.json", "manifest.json"]
)
def test_prepare_data_finds_damage_and_makes_the_same_data_again(name: str, project: Path) -> None:
    before = {p.relative_to(project): p.read_bytes() for p in files_of(project)}
    assert prepare_again(project) == (False, [])
    path = project / "data" / name
    path.write_bytes(path.read_bytes()[:-3] + b"\x01\x02\x03")
    did, (said,) = prepare_again(project)
    assert did
    assert "damaged" in said
    assert name in said
    assert {p.relative_to(project): p.read_bytes() for p in files_of(project)} == before
    assert prepare_again(project) == (False, [])


@pytest.mark.parametrize("name", ["sums.done", "sums.hashes", "trained.json", "trained.json.sha256"])
def test_what_a_preparation_keeps_for_the_next_one_is_compared_too(name: str, project: Path) -> None:
    before = {p: p.read_bytes() for p in files_of(project) if p.name != "manifest.json"}
    path = project / "data" / name
    with flipped(path, 8 * (path.stat().st_size // 2)):
        phases: list[str] = []
        expected = (True, ["the data is prepared again: mixes of the stages changed"])
        assert prepare_again(project, "32k", phases=phases) == expected
    assert ("reuse sums" in phases) == name.startswith("trained")
    assert "reuse words" in phases
    assert {p: p.read_bytes() for p in before} == before


def test_a_source_that_was_damaged_after_an_interruption_is_read_again(project: Path) -> None:
    """The bytes of a finished source are compared before an interrupted preparation goes on with them."""
    before = {p.relative_to(project): p.read_bytes() for p in files_of(project)}
    resolved = load_config(project / "m1.toml")
    shutil.rmtree(project / "data")

    def stop(phase: str, source: str, documents: int, size: int) -> None:
        if phase == "encode" and source == "words":
            raise KeyboardInterrupt

    arguments: Any = (resolved.config.data, resolved.config.tokenizer, [])
    scale = resolved.config.curriculum.length_scale
    with pytest.raises(KeyboardInterrupt):
        prepare(*arguments, base_dir=project, length_scale=scale, progress=stop)
    path = project / "data.partial" / "shards" / "sums" / "lt32k.bin"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    phases: list[tuple[str, str]] = []
    prepare(*arguments, base_dir=project, length_scale=scale, progress=lambda p, s, d, z: phases.append((p, s)))
    assert ("reuse", "sums") not in phases
    assert {p.relative_to(project): p.read_bytes() for p in files_of(project)} == before


def older(folder: Path) -> Path:
    """Make the data what version 0.1 would have written, and return the manifest's path."""
    path = folder / "data" / "manifest.json"
    values = json.loads(path.read_text())
    for key in ("sha256", "inputs", "tokenizer_files"):
        del values[key]
    for shard in (*values["shards"], *values["held_out"]):
        del shard["blocks_sha256"]
        (folder / "data" / f"{shard['prefix']}.blocks").unlink()
    path.write_text(json.dumps(values | {"schema": 1}, indent=1, ensure_ascii=False) + "\n")
    return path


def test_data_of_an_older_version_is_compared_whole_and_that_is_said(project: Path) -> None:
    manifest = older(project)
    resolved = load_config(project / "m1.toml")
    data, notes = open_for_training(resolved)
    assert notes == []
    assert "older version" in data.verified
    assert len(data.training.readers) == len(data.manifest.shards) > 3
    for path in files_of(project):
        if path.suffix in (".bin", ".idx") or path.name == "tokenizer.json":
            with flipped(path, 8 * (path.stat().st_size // 2)), pytest.raises(DataError, match="not what was written"):
                open_for_training(resolved)
    for key, value in (("eod_id", 1), ("vocab_size", 401), ("length_scale", 0.5)):
        values = json.loads(manifest.read_text())
        with replaced(manifest, json.dumps(values | {key: value})), pytest.raises(DataError, match=key):
            open_for_training(resolved)
    did, (said,) = prepare_again(project)
    assert did
    assert "older version" in said


@contextmanager
def replaced(path: Path, text: str) -> Iterator[None]:
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shard outside": _set("shards", 0, "prefix", to="../../etc/passwd"),
    "an absolute shard": _set("shards", 0, "prefix", to="/etc/passwd"),
    "escape in a shard's name": _set("shards", 0, "prefix", to="shards/\x1b[31mred"),
    "a shard of no source": _set("shards", 0, "source", to="\x1b[31mnobody"),
    "a domain of no source": _set("shards", 0, "domain", to="law"),
    "an unknown bucket": _set("shards", 0, "bucket", to="huge"),
    "documents are text": _set("shards", 0, "documents", to="\x1b[31m12"),
    "half a character": _set("eod_token", to="\ud800"),
    "documents are true": _set("shards", 0, "documents", to=True),
    "negative tokens": _set("shards", 0, "tokens", to=-1),
    "more tokens": _set("shards", 0, "tokens", to=5),
    "400 digits": _set("vocab_size", to=10**400),
    "no hash": _set("shards", 0, "bin_sha256", to="0"),
    "shards are an object": _set("shards", to={}),
    "a shard is null": _set("shards", 0, to=None),
    "sources are null": _set("sources", to=None),
    "an unknown key": _set("\x1b[31mkey", to=1),
    "infinite scale": _set("length_scale", to=float("inf")),
    "no scale": _set("length_scale", to=0),
    "edges out of order": _set("bucket_edges_tokens", to=[5, 3]),
    "end of document beyond the vocabulary": _set("eod_id", to=400),
    "no fingerprint": lambda values: values.pop("fingerprint") and None,
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_no_hash_protects_is_checked_value_by_value(
    change: Callable[[dict[str, Any]], Any], project: Path
) -> None:
    path = older(project)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="the manifest is damaged") as caught:
        load_manifest(project / "data")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"null", b"[]", b"7", b"{}", b'{"schema": 2}', b'{"sha256": 1}', b"[" * 100_000, b"\xff\xfe{}",
     b'{"a": "\x1b"}'],
    ids=["empty", "NUL", "null", "list", "number", "object", "no hash", "a hash alone", "deep", "no UTF-8", "raw escape"],
)  # fmt: skip
def test_a_manifest_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="the manifest is damaged") as caught:
        load_manifest(tmp_path)
    assert str(caught.value).isprintable()


def test_a_folder_in_the_manifests_place(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match="cannot read the manifest"):
        load_manifest(tmp_path)


def test_the_command_line_names_the_file_and_prepares_again(project: Path) -> None:
    def m1(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "m1cli", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)

    (project / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert m1("prepare-data").returncode == 0, "with the mixes of the command line"
    for arguments, name in (
        (["pretrain", "--stage", "32k"], "shards/words/lt32k.bin"),
        (["evaluate", "--stage", "32k"], "held_out/sums/lt32k.bin"),
        (["sft", "--set", 'sft.data=["chats.jsonl"]'], "tokenizer/tokenizer_config.json"),
    ):
        path = project / "data" / name
        with flipped(path, 99):
            done = m1(*arguments)
            assert done.returncode == 4, done.stdout + done.stderr
            assert name in done.stderr.replace("\n", "")
            assert not (project / "run").exists(), "nothing has begun"
    with flipped(path, 99):
        again = m1("prepare-data")
        assert again.returncode == 0, again.stderr
        assert "damaged" in again.stdout
    assert "up to date" in m1("prepare-data").stdout


def test_times_that_changed_are_a_note_and_missing_sources_are_nothing(project: Path) -> None:
    resolved = load_config(project / "m1.toml")
    os.utime(project / "sums.jsonl")
    _, (note,) = open_for_training(resolved)
    assert note.startswith("data.sources.sums, modification times of the files changed: trained is what was prepared")
    (project / "sums.jsonl").unlink()
    (project / "words.jsonl").unlink()
    assert open_for_training(resolved)[1] == []


CHANGES = {
    'dedup = "none"': ("data.dedup was 'exact', and is 'none' now", "[data]"),
    "held_out = 3": ("data.held_out was 16, and is 3 now", "[data]"),
    "train_bytes = 1000": ("tokenizer.train_bytes was 4000000, and is 1000 now", "[tokenizer]"),
    'eod_token = "<pad>"': ("tokenizer.eod_token was '', and is '<pad>' now", "[tokenizer]"),
    'path = "data/tokenizer/tokenizer.json"': ("SHA-256 of tokenizer.path was None", "[tokenizer]"),
    "max_docs = 7": ("data.sources.words.max_docs was 0, and is 7 now", "[[data.sources]]\nname = \"words\""),
}  # fmt: skip


@pytest.mark.parametrize("line", CHANGES)
def test_a_key_that_determines_the_tokens_is_not_changed_in_silence(line: str, original: Path) -> None:
    says, section = CHANGES[line]
    text = (original / "m1.toml").read_text()
    with replaced(original / "m1.toml", text.replace(section, f"{section}\n{line}", 1)):
        with pytest.raises(DataError) as caught:
            open_for_training(load_config(original / "m1.toml"))
        assert says in caught.value.what
        assert line.split(" = ")[0] in caught.value.where
        assert "m1 prepare-data" in caught.value.fix


def test_other_sources_are_refused_and_other_text_is_said(project: Path) -> None:
    text = (project / "m1.toml").read_text()
    with replaced(project / "m1.toml", text.replace('"words"', '"more"')), pytest.raises(DataError, match="more"):
        open_for_training(load_config(project / "m1.toml"))
    resolved = load_config(project / "m1.toml")
    lines = (project / "sums.jsonl").read_text()
    (project / "sums.jsonl").write_text(lines + '{"text": "one more"}\n')
    _, (note,) = open_for_training(resolved)
    assert re.match(
        r"data.sources.sums, files: 1 with [\d,]+ bytes then, 1 with [\d,]+ bytes now: trained is what was", note
    )
    did, (said,) = prepare_again(project)
    assert did
    assert "data.sources.sums, files: 1 with" in said
    assert open_for_training(resolved)[1] == []


@pytest.mark.parametrize("line", ["verify_docs = 3", 'engine = "tokenizers"', "max_bad_share = 0.4"])
def test_keys_of_which_no_token_depends_prepare_again_and_train_on(line: str, project: Path) -> None:
    text = (project / "m1.toml").read_text().replace("verify_docs = 4\n", "")
    (project / "m1.toml").write_text(text.replace("[data]", f"[data]\n{line}"))
    assert open_for_training(load_config(project / "m1.toml"))[1] == []
    did, (said,) = prepare_again(project)
    assert did
    assert line.split(" = ")[0] in said
