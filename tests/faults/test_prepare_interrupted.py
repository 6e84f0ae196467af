"""Data preparation that is killed, finds a full disk, or runs twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1_data.prepare.run import prepare
from m1_data.spec import PrepareSpec, SourceSpec, TokenizerSpec
from m1_stages.errors import DataError

TOKENIZER = TokenizerSpec(vocab_size=600, train_bytes=200_000)


def corpus(folder: Path) -> PrepareSpec:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "c"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(600):
                file.write(json.dumps({"text": f"{name} document {n}: " + "words and more words " * (n % 40)}) + "\n")
            file.write(json.dumps({"text": "the same everywhere"}) + "\n")
    sources = tuple(
        SourceSpec(name=n, domain="code", format="jsonl", path=str(folder / f"{n}.jsonl")) for n in ("a", "b", "c")
    )
    return PrepareSpec(sources=sources)


def run(spec: PrepareSpec, base: Path) -> bool:
    return prepare(spec, TOKENIZER, [], base_dir=base, length_scale=1 / 1024)[1]


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


SLOW = """
import sys, time, pathlib
sys.path.insert(0, sys.argv[1])
from test_prepare_interrupted import TOKENIZER, corpus
from m1_data.prepare.run import prepare
base = pathlib.Path(sys.argv[2])
def progress(*seen):
    print(*seen, flush=True)
    time.sleep(0.25)
prepare(corpus(base / "corpus"), TOKENIZER, [], base_dir=base, length_scale=1 / 1024, progress=progress)
"""


@pytest.mark.parametrize("events", [1, 4, 5, 6])
def test_killed_and_started_again_gives_identical_bytes(tmp_path: Path, events: int) -> None:
    clean = tmp_path / "clean"
    spec = corpus(tmp_path / "killed" / "corpus")
    assert run(spec, clean)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(events):
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "data").exists(), "nothing unfinished is published"
    os.utime(tmp_path / "killed" / "corpus")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "corpus").iterdir()}
    assert run(spec, tmp_path / "killed")
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    expected, got = tree(clean / "data"), tree(tmp_path / "killed" / "data")
    # The killed run wrote its corpus anew, so only the inputs' time stamps, and with them the fingerprint, differ.
    varying = ("fingerprint", "inputs", "sha256")
    for files, folder in ((expected, clean), (got, tmp_path / "killed")):
        manifest = json.loads((folder / "data" / "manifest.json").read_text())
        files["manifest.json"] = {k: v for k, v in manifest.items() if k not in varying}  # type: ignore[assignment]
    assert got == expected


def test_second_run_does_nothing_and_changed_input_is_rebuilt(tmp_path: Path) -> None:
    spec = corpus(tmp_path / "corpus")
    assert run(spec, tmp_path)
    before = tree(tmp_path / "data")
    assert not run(spec, tmp_path)
    assert tree(tmp_path / "data") == before
    time.sleep(0.01)
    with (tmp_path / "corpus" / "c.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    assert run(spec, tmp_path)
    source = json.loads((tmp_path / "data" / "manifest.json").read_text())["sources"][2]
    assert source["documents"] + source["held_out"] == 601
    assert tree(tmp_path / "data.previous") == before


def test_duplicates_across_sources_stay_with_the_first(tmp_path: Path) -> None:
    run(corpus(tmp_path / "corpus"), tmp_path)
    sources = json.loads((tmp_path / "data" / "manifest.json").read_text())["sources"]
    assert [s["rejected"] for s in sources] == [{}, {"duplicate": 1}, {"duplicate": 1}]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_one_error_and_publishes_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            run(corpus(tmp_path / "corpus"), small)
        assert not (small / "data").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_useless_sources_are_named(tmp_path: Path) -> None:
    spec = corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "b.jsonl").write_text('{"body": "x"}\n' * 10)
    with pytest.raises(DataError, match=r"10 of 10 records of source 'b' are unusable: 10 no field 'text'"):
        run(spec, tmp_path)
    (tmp_path / "corpus" / "b.jsonl").unlink()
    with pytest.raises(DataError, match="source 'b' has no files"):
        run(spec, tmp_path)
    with pytest.raises(DataError, match="there are no data sources"):
        run(PrepareSpec(), tmp_path)


def test_wrong_tokenizers_are_one_clear_error(tmp_path: Path) -> None:
    spec = corpus(tmp_path / "corpus")
    (tmp_path / "broken.json").write_text("{}")
    for path, says in (("broken.json", "not a tokenizer"), ("nowhere.json", "cannot read the tokenizer")):
        with pytest.raises(DataError, match=says):
            prepare(spec, TokenizerSpec(path=path), [], base_dir=tmp_path, length_scale=1.0)
