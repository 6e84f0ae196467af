"""Conversations encoded by several processes: the same bytes, errors and counts, and nobody left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chat_tokenizer import SOURCE, write_tokenizer

from m1_data.errors import DataError, EnvironmentProblem
from m1_data.sft import encoding_processes
from m1_data.sft.encoding import RowEncoder
from m1_data.sft.samples import SampleSettings
from m1_data.sft.store import SampleStore, write_store

ROWS = 60


def row(number: int) -> str:
    """Of three domains, with a pattern of reflection, a key that nothing reads, and answers of many lengths."""
    turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "wait " * (number % 7 + 1)}]
    return json.dumps({"messages": turns, "domain": ("math", "code", "chat")[number % 3], "id": number})


@pytest.fixture
def settings(tmp_path: Path) -> SampleSettings:
    """Two files; the first begins with a row that tells no dialect, and both have bad ones."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    rows = [*map(row, range(ROWS))]
    rows[0], rows[41], rows[55] = "7", '{"messages": []}', row(55).replace("q55", "<end_of_sentence>")
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{')
    return SampleSettings(
        paths=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"),
        tokenizer_dir=write_tokenizer(tokenizer, chat_template=SOURCE),
        bad_rows="skip",
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_processes, "FIRST_ROWS", 5)
    monkeypatch.setattr(encoding_processes, "BATCH_ROWS", 8)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that encode; afterwards none is left."""
    children: list[subprocess.Popen[bytes]] = []
    start = encoding_processes.start_child

    def kept(module: str, purpose: str) -> subprocess.Popen[bytes]:
        children.append(start(module, purpose))
        return children[-1]

    monkeypatch.setattr(encoding_processes, "start_child", kept)
    yield children
    assert all(child.returncode is not None for child in children)


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    settings: SampleSettings, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    found = []
    for processes in (1, 2, 3):
        folder = tmp_path / f"store-{processes}"
        write_store(settings, folder, key="k", processes=processes)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert len(started) == 2 + 3
    store = SampleStore(folder)
    manifest = store.manifest
    assert (manifest.samples, manifest.counts) == (59, {"samples": 59})
    assert [(file.dialect, file.rows) for file in manifest.files] == [("openai", 60), ("prompt-completion", 2)]
    assert manifest.bad_rows == {
        "not an object": 1, '"messages" is not a list with messages': 1, "not JSON": 1,
    }  # fmt: skip
    assert manifest.unused_keys == {"id": 58}
    assert manifest.domains == ("code", "chat", "math", "")
    assert [manifest.domains[n] for n in store.samples["domain"][[0, 2, 57, 58]]] == ["code", "math", "chat", ""]
    assert store.where(57) == f"{settings.paths[0]}:60"
    wait = store.reflection[:, manifest.patterns.index("wait")].tolist()
    assert wait[:6] == [2, 3, 4, 5, 6, 7]
    assert sum(wait) == sum(n % 7 + 1 for n in range(ROWS) if n not in (0, 41))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_row_is_named_and_not_the_first_that_is_found(
    settings: SampleSettings, tmp_path: Path, processes: int, started: list[subprocess.Popen[bytes]]
) -> None:
    """A file that is missing is found by the process that reads, which is ahead of the others."""
    path = settings.paths[0]
    rows = [row(n) for n in range(ROWS)]
    rows[54] = rows[58] = '{"messages": []}'
    path.write_text("\n".join(rows))
    strict = SampleSettings(paths=(path, tmp_path / "missing"), tokenizer_dir=settings.tokenizer_dir)
    with pytest.raises(DataError, match="not a list with messages") as caught:
        write_store(strict, tmp_path / "store", key="k", processes=processes)
    assert caught.value.where == f"{path}:55"
    assert "sft.bad_rows" in caught.value.fix
    path.write_text("\n".join(map(row, range(ROWS))))
    with pytest.raises(DataError, match="there is no such file") as caught:
        write_store(strict, tmp_path / "store", key="k", processes=processes)
    assert not (tmp_path / "store").exists()


def test_few_rows_start_no_process(settings: SampleSettings, tmp_path: Path) -> None:
    settings.paths[0].write_text("\n".join(map(row, range(3))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_processes, "start_child", lambda *given: pytest.fail("not for so few"))
        write_store(settings, tmp_path / "store", key="k", processes=2)
    assert SampleStore(tmp_path / "store").manifest.samples == 4


def test_a_process_that_is_killed_is_told(settings: SampleSettings, started: list[subprocess.Popen[bytes]]) -> None:
    encoder, tally = RowEncoder(settings), settings.tally()
    pieces = encoding_processes.encode_in_order(settings, encoder, tally, processes=2)
    for _ in range(2):
        next(pieces)  # the first rows, and those of the first process
    started[1].kill()
    with pytest.raises(EnvironmentProblem, match="a process that encodes conversations ended: exit code -9") as caught:
        list(pieces)
    assert "sft.processes" in caught.value.fix
    encoder.close()


def test_nobody_outlives_a_command_that_is_killed(settings: SampleSettings, tmp_path: Path) -> None:
    code = (
        "import pickle, sys, time\n"
        "from m1_data.sft import encoding_processes as e\n"
        "from m1_data.sft.encoding import RowEncoder\n"
        "e.FIRST_ROWS, e.BATCH_ROWS = 5, 8\n"
        f"settings = pickle.loads(bytes.fromhex('{pickle.dumps(settings).hex()}'))\n"
        "pieces = e.encode_in_order(settings, RowEncoder(settings), settings.tally(), processes=2)\n"
        "next(pieces); next(pieces)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}, text=True
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while len(family := descendants(command.pid)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(family) == 5, "two processes that encode, and a renderer of each and of the command"
    command.send_signal(signal.SIGKILL)
    command.wait()
    command.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, family))


def descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_number_of_processes_follows_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    assert encoding_processes.processes_of_machine() == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(224)))
    assert encoding_processes.processes_of_machine() == 16
