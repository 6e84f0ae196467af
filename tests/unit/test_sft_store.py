"""Tokenized conversations on the disk: written once, whole or not at all, found again by what they were made of, and verified."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer
from support.sft_data import open_samples

from m1_data.chat.conversations import parse_conversation
from m1_data.chat.encoder import ChatEncoder
from m1_data.errors import ConfigError, DataError
from m1_data.sft import store
from m1_data.sft.choice import Selection
from m1_data.sft.dataset import SFTDataset
from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import SampleStore, read_manifest, write_store
from m1_data.storage.lock import lock_of, writing
from m1_stages.errors import EnvironmentProblem
from m1_stages.jobs import sft_data


def chats(path: Path, count: int = 9, answer: str = "four") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": answer * (n + 1)}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> SampleSettings:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, chat_template=SOURCE)
    return SampleSettings(paths=(chats(tmp_path / "chats.jsonl"),), tokenizer_dir=folder)


def store_of(settings: SampleSettings, folder: Path) -> SampleStore:
    write_store(settings, folder, key=settings.key())
    return SampleStore(folder)


def test_what_is_read_back_is_what_was_encoded(settings: SampleSettings, tmp_path: Path) -> None:
    store = store_of(settings, tmp_path / "store")
    encoder = ChatEncoder(settings.tokenizer_dir)
    lines = settings.paths[0].read_bytes().splitlines()
    assert len(store.samples) == len(lines) == 9
    for number, line in enumerate(lines):
        expected, found = encoder.encode(parse_conversation(line, "t")), store.tokens(number)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.trained.tolist() == expected.trained.tolist()
        sample = store.samples[number]
        assert (sample["length"], sample["trained"]) == (len(expected.ids), expected.trained.sum())
        assert expected.trained.argmax() == sample["first_trained"]
        assert store.where(number) == f"{settings.paths[0]}:{number + 1}"


def test_the_key_is_of_the_contents_and_of_every_setting(settings: SampleSettings, tmp_path: Path) -> None:
    key, (path,) = settings.key(), settings.paths
    before = path.stat()
    text = path.read_bytes()
    path.touch()
    assert settings.key() == key, "the time of a file is not what it says"
    changes = [
        replace(settings, date="2026-01-31"),
        replace(settings, held_out=frozenset({b"x" * 16})),
        replace(settings, dialect="openai"),
        replace(settings, ignored_keys=("id",)),
        replace(settings, bad_rows="skip"),
        replace(settings, earlier_reasoning="strip"),
        replace(settings, patterns=("wait",)),
        replace(settings, paths=(path, path)),
        replace(settings, chat_template=Path(__file__)),
    ]
    keys = [changed.key() for changed in changes]
    path.write_bytes(text.replace(b"q0", b"q9"))
    assert path.stat().st_size == before.st_size
    keys.append(settings.key())
    path.write_bytes(text)
    config = settings.tokenizer_dir / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    keys.append(settings.key())
    assert len({key, *keys}) == len(changes) + 3


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.blocks", "samples.bin", "reflection.bin", "where.bin"])
def test_a_changed_byte_is_found_before_it_is_trained(settings: SampleSettings, tmp_path: Path, name: str) -> None:
    store_of(settings, tmp_path / "store")
    path = tmp_path / "store" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged") as caught:
        SFTDataset(SampleStore(tmp_path / "store"), Selection(seq_len=512, seed=1)).batch([0])
    assert str(path) in caught.value.where
    assert caught.value.fix.startswith(f"remove it: rm -r {tmp_path / 'store'}")


def test_a_store_is_replaced_whole_or_stays(settings: SampleSettings, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = store_of(settings, folder)
    first = SFTDataset(store, Selection(seq_len=512, seed=1)).fingerprint
    settings.paths[0].write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        write_store(settings, folder, key=settings.key())
    assert SFTDataset(SampleStore(folder), Selection(seq_len=512, seed=1)).fingerprint == first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chats.jsonl", "store", "tokenizer"]
    chats(settings.paths[0], answer="five")
    assert SFTDataset(store_of(settings, folder), Selection(seq_len=512, seed=1)).fingerprint != first


def test_the_fingerprint_is_of_what_is_trained(settings: SampleSettings, tmp_path: Path) -> None:
    store = store_of(settings, tmp_path / "store")
    base = Selection(seq_len=512, seed=1)

    def fingerprint(selection: Selection, of: SampleStore = store) -> str:
        return SFTDataset(of, selection).fingerprint

    shutil.copy(settings.paths[0], tmp_path / "moved.jsonl")
    moved = open_samples([tmp_path / "moved.jsonl"], tokenizer_dir=settings.tokenizer_dir)
    assert fingerprint(base, moved) == fingerprint(base)
    others = [
        replace(base, seed=2),
        replace(base, seq_len=256),
        replace(base, held_out=0.5),
        replace(base, weights=(2.0,)),
    ]
    assert len({fingerprint(selection) for selection in (base, *others)}) == 5


@pytest.mark.parametrize("content", ["file", "folder", "stray"])
def test_what_is_not_ours_is_not_replaced(settings: SampleSettings, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "store"
    if content == "file":
        folder.write_text("mine")
    elif content == "folder":
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    else:
        store_of(settings, folder)
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not replaced"):
        write_store(settings, folder, key="k")
    kept = folder if content == "file" else folder / ("manifest.json" if content == "folder" else "notes.txt")
    assert kept.read_text() in ("mine", "{}")


def test_a_store_of_another_version_is_written_again(settings: SampleSettings, tmp_path: Path) -> None:
    store_of(settings, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(path.read_text().replace("m1 sft 1", "m1 sft 0"))
    assert read_manifest(tmp_path / "store") is None
    assert len(store_of(settings, tmp_path / "store").samples) == 9


def test_other_ranks_wait_for_the_first(
    settings: SampleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = tmp_path / "store", settings.key()
    monkeypatch.setattr(sft_data, "_POLL_S", 0.02)
    monkeypatch.setattr(sft_data, "_PATIENCE_S", 0.3)
    ended: list[float] = []
    waiter = threading.Thread(target=lambda: (sft_data._wait(folder, key), ended.append(time.monotonic())))
    with writing(lock_of(folder), "the store"):
        waiter.start()
        time.sleep(0.8)  # longer than the patience: the lock says that the first rank is at work
        assert waiter.is_alive()
        write_store(settings, folder, key=key)
        written = time.monotonic()
    waiter.join(10)
    assert ended
    assert ended[0] >= written - 0.5
    with pytest.raises(EnvironmentProblem, match="rank 0 did not write the tokenized conversations"):
        sft_data._wait(folder, "another key")


def test_the_dry_run_imports_no_torch() -> None:
    code = "import sys, m1_stages.jobs.sft_preview, m1cli.sft.preview; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "False"


def test_what_appears_in_the_folder_while_it_is_encoded_is_not_removed(
    settings: SampleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    before = store_of(settings, folder).manifest.key
    written = store._write

    def meanwhile(*args: object) -> object:
        (folder / "notes.txt").write_text("mine")
        return written(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_write", meanwhile)
    with pytest.raises(ConfigError):
        write_store(settings, folder, key="another")
    assert (folder / "notes.txt").read_text() == "mine"
    assert SampleStore(folder).manifest.key == before
    assert [path.name for path in tmp_path.glob("*store*")] == ["store"], "and nothing is left beside it"
