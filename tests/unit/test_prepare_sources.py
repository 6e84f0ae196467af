"""What prepare-data says of its sources, what it refuses, and what it encodes again when something changes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1_data.errors import DataError
from m1_data.prepare.run import prepare
from m1_data.spec import PrepareSpec, SourceSpec, StageMix, TokenizerSpec
from m1_data.storage.manifest import Manifest, load_manifest
from m1_data.storage.store import open_prepared, open_store
from m1_data.tokenizer import save_tokenizer, train_tokenizer

MIX = StageMix(stage="32k", seq_len_tokens=128, short=1.0, medium=0.0, long=0.0)


def lines(start: int, count: int) -> str:
    return "".join(json.dumps({"text": f"document {n} has its own words"}) + "\n" for n in range(start, start + count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = iter([f"document {n} has its own words" for n in range(50)])
    save_tokenizer(train_tokenizer(texts, TokenizerSpec(vocab_size=300)), tmp_path / "tokenizer")
    for n, name in enumerate("abc"):
        (tmp_path / f"{name}.jsonl").write_text(lines(100 * n, 60))
    return tmp_path


def sources(*names: str) -> tuple[SourceSpec, ...]:
    return tuple(SourceSpec(name=n, domain="code", format="jsonl", path=f"{n}.jsonl") for n in names)


def run(folder: Path, spec: PrepareSpec, mix: StageMix = MIX) -> tuple[Manifest, list[str]]:
    """Prepare, and return the manifest and what was done for each source."""
    did: list[str] = []

    def progress(phase: str, source: str, documents: int, size: int) -> None:
        if f"{phase} {source}" not in did:
            did.append(f"{phase} {source}")

    manifest, _ = prepare(
        spec, TokenizerSpec(path="tokenizer"), [(mix, 1_000)], base_dir=folder, length_scale=1.0, progress=progress
    )
    return manifest, did


def stored(folder: Path) -> dict[str, int]:
    return {cell.source: len(reader.lengths) for cell, reader in open_store(folder / "data").readers.items()}


def test_only_what_changed_is_encoded_again(folder: Path) -> None:
    spec = PrepareSpec(sources=sources("a", "b"), held_out=0)
    assert run(folder, spec)[1] == ["encode a", "encode b", "done "]
    first = open_prepared(folder / "data").manifest
    mixed, did = run(folder, spec, dataclasses.replace(MIX, core_share=0.5))
    assert did == ["reuse a", "reuse b", "done "]
    assert (mixed.shards, mixed.sources) == (first.shards, first.sources)
    assert mixed.mixes["32k"]["core"]["wanted"] == 0.5
    more, did = run(folder, dataclasses.replace(spec, sources=sources("a", "b", "c")))
    assert did == ["reuse a", "reuse b", "encode c", "done "]
    (folder / "b.jsonl").write_text(lines(100, 61))
    fewer, did = run(folder, dataclasses.replace(spec, sources=sources("a", "b")))
    assert did == ["reuse a", "encode b", "done "]
    assert open_prepared(folder / "data").manifest == fewer
    assert stored(folder) == {"a": 60, "b": 61}
    assert sorted(p.name for p in (folder / "data" / "shards").iterdir()) == ["a", "b"]
    assert not list((folder / "data").glob("c.*")), "a source that is gone leaves nothing"
    assert open_prepared(folder / "data.previous").manifest == more, "linked shards are not written into"


def test_a_text_that_moved_to_an_earlier_source_is_kept_once(folder: Path) -> None:
    """Deduplication ties a source to those before it: a change in one encodes all after it again."""
    spec = PrepareSpec(sources=sources("a", "b"), held_out=0)
    run(folder, spec)
    (folder / "a.jsonl").write_text(lines(0, 60) + lines(100, 10))
    manifest, did = run(folder, spec)
    assert did == ["encode a", "encode b", "done "]
    assert [(s.documents, s.rejected) for s in manifest.sources] == [(70, {}), (50, {"duplicate": 10})]
    (folder / "c.jsonl").write_text(lines(155, 10))
    manifest, did = run(folder, dataclasses.replace(spec, sources=sources("a", "b", "c")))
    assert did == ["reuse a", "reuse b", "encode c", "done "]
    assert manifest.sources[2].rejected == {"duplicate": 5}, "the texts of sources used again are remembered"


def test_settings_and_damage_encode_again(folder: Path) -> None:
    spec = PrepareSpec(sources=sources("a", "b"), held_out=0)
    run(folder, spec)
    assert run(folder, dataclasses.replace(spec, dedup="none"))[1] == ["encode a", "encode b", "done "]
    shard = next((folder / "data" / "shards" / "b").glob("*.bin"))
    damaged = bytearray(shard.read_bytes())
    damaged[7] ^= 1
    shard.write_bytes(damaged)
    more = dataclasses.replace(spec, dedup="none", sources=sources("a", "b", "c"))
    assert run(folder, more)[1] == ["reuse a", "encode b", "encode c", "done "], "a damaged shard is not used again"
    assert open_prepared(folder / "data").manifest.sources[1].documents == 60


def test_an_interrupted_run_with_another_source_keeps_what_is_done(folder: Path) -> None:
    (folder / "b.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError):
        run(folder, PrepareSpec(sources=sources("a", "c", "b"), held_out=0))
    (folder / "b.jsonl").write_text(lines(100, 5))
    assert run(folder, PrepareSpec(sources=sources("a", "b"), held_out=0))[1] == ["reuse a", "encode b", "done "]
    assert not list((folder / "data").rglob("c*")), "a source that is gone leaves nothing"


def test_too_many_bad_records_are_refused_with_a_change_that_works(folder: Path) -> None:
    (folder / "a.jsonl").write_text(lines(0, 97) + "{cut\n" + '{"body": 1}\n' + "{cut\n")
    spec = PrepareSpec(sources=sources("a"))
    assert spec.max_bad_share == 0.01
    with pytest.raises(DataError) as caught:
        run(folder, spec)
    assert caught.value.what.startswith(
        "3 of 100 records of source 'a' are unusable: 2 malformed JSON, first at a.jsonl:98"
    )
    assert "1 no field 'text', first at a.jsonl:99 (it has body)" in caught.value.what
    assert "--set data.max_bad_share=0.03 (now 0.01)" in caught.value.fix
    manifest, _ = run(folder, dataclasses.replace(spec, max_bad_share=0.03))
    assert manifest.sources[0].rejected == {"malformed JSON": 2, "no field 'text'": 1}
    assert set(manifest.sources[0].first_places) == {"malformed JSON", "no field 'text'"}


def test_one_bad_record_in_a_hundred_passes_and_is_shown(folder: Path) -> None:
    (folder / "f").mkdir()
    (folder / "f" / "a.jsonl").write_text(lines(0, 99) + "{cut\n")
    (folder / "f" / os.fsdecode(b"\xe9t\xe9.jsonl")).write_text(lines(200, 100))
    (folder / "f" / "read\x1b[31mme.md").write_text("x")
    (folder / "m1.toml").write_text(
        'preset = "tiny"\n[tokenizer]\npath = "tokenizer"\n[data]\n[[data.sources]]\nname = "s"\n'
        'domain = "code"\nformat = "jsonl"\npath = "f"\n'
    )
    command = [sys.executable, "-m", "m1cli", "prepare-data"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert any("s: 1 of 200 records are lost: malformed JSON, first at f/a.jsonl:100" in line for line in shown)
    assert "s: not read from its folders: 1 .md" in shown
    assert "\x1b" not in done.stdout
    source = load_manifest(folder / "data").sources[0]
    assert source.files == ("f/a.jsonl", "f/\\udce9t\\udce9.jsonl")
    assert source.left_out == {".md": 1}


def test_a_changed_folder_of_data_sets_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    (folder / "ds").mkdir()
    (folder / "ds" / "train.jsonl").write_text(lines(0, 5))
    spec = PrepareSpec(sources=(SourceSpec(name="d", domain="code", format="datasets", path="ds"),))
    assert run(folder, spec)[0].sources[0].documents == 5, "a relative path starts at the configuration"
    (folder / "ds" / "train.jsonl").write_text(lines(0, 8))
    manifest, did = run(folder, spec)
    assert did == ["encode d", "done "]
    assert manifest.sources[0].documents == 8
    assert manifest.sources[0].files == ("ds/train.jsonl",)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_long_document_takes_a_few_times_its_size(folder: Path) -> None:
    """Resident memory of a whole process with a document of 40 MB, beside one of a short document."""
    words = "the quick brown fox jumps over the lazy dog and runs into the wide green forest again "
    (folder / "long.jsonl").write_text(json.dumps({"text": words * (40_000_000 // len(words))}) + "\n")
    (folder / "short.jsonl").write_text(lines(0, 10))
    script = (
        "import sys; from pathlib import Path; from test_prepare_sources import PrepareSpec, run, sources\n"
        "run(Path(sys.argv[1]), PrepareSpec(out=sys.argv[2] + '-data', sources=sources(sys.argv[2])))\n"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    )
    peaks = []
    for name in ("short", "long"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), name],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) * 1024)
    times = (peaks[1] - peaks[0]) / 40_000_000
    assert 1 < times < 5.5, f"{times:.1f} times its size"
