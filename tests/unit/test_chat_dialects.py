"""Files of conversations in every dialect and container: told by themselves, read strictly, the ids of their OpenAI form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import zstandard
from support.chat_tokenizer import SOURCE, write_tokenizer
from support.sft_data import sft_dataset

from m1_data.chat.conversations import Conversation
from m1_data.chat.dialects import DIALECTS, conversation_in, dialect_of
from m1_data.chat.render_worker import MAX_SECONDS
from m1_data.chat.rows import FileTally, conversations_in, read_rows, rows_of
from m1_data.errors import DataError
from m1_data.sft.dataset import SFTDataset

CALL = {"name": "add", "arguments": {"a": 1, "b": "<end_of_sentence>"}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ai(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TOOL_TALK = {"messages": [user("1+1?"), CALLED, {"role": "tool", "content": "2"}, ai("It is 2.")], "tools": TOOLS}


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def array(path: Path, rows: list[Any]) -> None:
    path.write_text("\ufeff" + json.dumps(rows, indent=1))


def zst(path: Path, rows: list[Any]) -> None:
    path.write_bytes(zstandard.compress("\n\n".join(map(json.dumps, rows)).encode()))


def gz(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow_file(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def saved(path: Path, rows: list[Any]) -> None:
    """As ``datasets.save_to_disk`` writes it: Arrow streams, in the order that ``state.json`` gives."""
    import pyarrow as pa

    path.mkdir()
    table = pa.Table.from_pylist(rows)
    names = ["data-00001.arrow", "data-00000.arrow"]
    for name, part in zip(names, (table[:1], table[1:]), strict=True):
        with pa.ipc.new_stream(path / name, table.schema) as file:
            file.write_table(part)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


TWO = {"messages": [user("q"), ai("a")]}, {"messages": [{"role": "system", "content": "s"}, user("r"), ai("b")]}
FILES: dict[str, tuple[str, Callable[[Path, list[Any]], None], list[Any], list[Any]]] = {
    "openai.jsonl": ("openai", lines, [*TWO], [*TWO]),
    "parts.jsonl.zst": (
        "openai",
        zst,
        [{"messages": [user([{"type": "text", "text": "q"}]), ai([{"type": "text", "text": x} for x in "ab"])], "id": 1}],
        [{"messages": [user("q"), ai("ab")]}],
    ),
    "tools.parquet": ("openai", parquet, [TOOL_TALK | {"split": "train"}, {"messages": TWO[1]["messages"]}], [TOOL_TALK, TWO[1]]),
    "sharegpt.json": (
        "sharegpt",
        array,
        [
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"conversations": [{"from": "user", "value": "r"}, {"from": "assistant", "value": "b"}], "system": "s"},
        ],
        [*TWO],
    ),
    "sharegpt-tools.jsonl.gz": (
        "sharegpt",
        gz,
        [
            {
                "conversations": [
                    {"from": "human", "value": "1+1?"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "It is 2."},
                ],
                "tools": json.dumps(TOOLS),
            }
        ],
        [TOOL_TALK],
    ),
    "sharegpt-weights.arrow": (
        "sharegpt",
        arrow_file,
        [
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "r"},
                    {"from": "gpt", "value": "b", "weight": 0},
                    {"from": "human", "value": "r"},
                    {"from": "gpt", "value": "b", "weight": 1},
                ]
            }
        ],
        [{"messages": [*TWO[1]["messages"][:2], ai("b", train=False), user("r"), ai("b")]}],
    ),
    "alpaca.json": (
        "alpaca",
        array,
        [
            {"instruction": "q", "input": "", "output": "a", "text": "all of it"},
            {"instruction": "r", "input": None, "output": "b", "system": "s"},
        ],
        [*TWO],
    ),
    "alpaca-history.jsonl": (
        "alpaca",
        lines,
        [{"instruction": "Add", "input": "1 and 1", "output": "2", "history": [["q", "a"]]}],
        [{"messages": [user("q"), ai("a"), user("Add\n1 and 1"), ai("2")]}],
    ),
    "prompts.jsonl": (
        "prompt-completion",
        lines,
        [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b", "system": "s"}],
        [*TWO],
    ),
    "prompts-messages.parquet": (
        "prompt-completion",
        parquet,
        [{"prompt": [user("q"), ai("a"), user("r")], "completion": [ai("b")]}],
        [{"messages": [user("q"), ai("a", train=False), user("r"), ai("b")]}],
    ),
    "saved": ("openai", saved, [*TWO, *TWO], [*TWO, *TWO]),
    "saved-thinking": (
        "sharegpt",
        saved,
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>\nt\n</think>\na"}]}] * 2,
        [{"messages": [user("q"), ai("a", reasoning_content="t")]}] * 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(folder: Path, *paths: Path, **more: Any) -> SFTDataset:
    return sft_dataset(list(paths), tokenizer_dir=folder, seq_len=1024, seed=1, **more)


def read(path: Path, *ignored: str) -> list[Conversation]:
    return list(conversations_in(rows_of([path], ignored_keys=ignored), [FileTally("f")], ignored_keys=ignored))


def encoded(data: SFTDataset) -> list[tuple[list[int], list[bool]]]:
    return [(e.ids.tolist(), e.trained.tolist()) for e in map(data.store.tokens, range(len(data.store.samples)))]


@pytest.mark.parametrize("name", FILES)
def test_each_dialect_is_told_and_gives_the_ids_of_its_openai_form(folder: Path, tmp_path: Path, name: str) -> None:
    dialect, write, rows, same = FILES[name]
    write(tmp_path / name, rows)
    lines(tmp_path / "same.jsonl", same)
    data = load(folder, tmp_path / name)
    assert encoded(data) == encoded(load(folder, tmp_path / "same.jsonl"))
    (read,) = data.stats.files
    assert (read.file, read.dialect, read.rows) == (str(tmp_path / name), dialect, len(rows))
    assert encoded(load(folder, tmp_path / name, dialect=dialect)) == encoded(data)


def test_files_of_several_dialects_are_read_together(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("openai.jsonl", "sharegpt.json", "alpaca.json")]
    for path in paths:
        FILES[path.name][1](path, FILES[path.name][2])
    data = load(folder, *paths)
    assert [(file.dialect, file.rows) for file in data.stats.files] == [
        ("openai", 2),
        ("sharegpt", 2),
        ("alpaca", 2),
    ]
    assert encoded(data) == encoded(load(folder, *paths[:1])) * 3


def test_what_datasets_saves_is_read_as_it_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [TOOL_TALK, *TWO]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "one")
    assert [row for _, row in read_rows(tmp_path / "one")] == rows
    table.select([2, 0]).save_to_disk(tmp_path / "two")
    assert [row for _, row in read_rows(tmp_path / "two")] == [rows[2], rows[0]]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="holds the splits test, train") as caught:
        list(read_rows(tmp_path / "both"))
    assert caught.value.fix == f'name one of them: sft.data = ["{tmp_path / "both" / "test"}"]'


BAIT = "columns: action: string, datetime: timestamp[s]\u2028<think>00123"


@pytest.mark.parametrize("write", [lines, array, gz, zst, parquet, arrow_file])
def test_texts_stay_as_they_are(tmp_path: Path, write: Callable[[Path, list[Any]], None]) -> None:
    write(tmp_path / "f", [{"messages": [user(BAIT), ai("00123")]}])
    (found,) = read(tmp_path / "f")
    assert [m.content for m in found.messages] == [BAIT, "00123"]


OPENAI = {"messages": [user("q"), ai("a")]}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "message", "fix"),
    [
        (OPENAI | {"mood": "good", "id": 1, "k": 2}, "neither used nor known: k, mood", 'sft.ignored_keys = ["k", "mood"]'),
        (SHAREGPT, "another dialect than its file: sharegpt and not openai", ""),
        ({"text": "t"}, "another dialect than its file: openai has messages", ""),
        (OPENAI | {"text": "t"}, "neither used nor known: text", ""),
        (42, "not an object: int", ""),
    ],
)  # fmt: skip
def test_every_row_is_read_strictly(tmp_path: Path, row: Any, message: str, fix: str) -> None:
    lines(tmp_path / "f.jsonl", [OPENAI, row])
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "f.jsonl")
    assert caught.value.where == f"{tmp_path / 'f.jsonl'}:2"
    assert fix in caught.value.fix
    assert 'sft.bad_rows = "skip"' in caught.value.fix


def test_keys_can_be_ignored_by_name(tmp_path: Path) -> None:
    lines(tmp_path / "f.jsonl", [OPENAI | {"mood": "good", "conversations": 3, "images": []}])
    (found,) = read(tmp_path / "f.jsonl", "mood", "conversations", "images")
    assert (len(found.messages), found.unused_keys) == (2, ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "answer": "a"}, "no known dialect: it has prompt, answer"),
        (OPENAI | SHAREGPT, "several dialects: openai and sharegpt"),
        ("text", "not an object: str"),
    ],
)
def test_the_first_row_has_to_tell_the_dialect(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        dialect_of(row, "f:1")
    assert "sharegpt: conversations" in caught.value.fix or row == "text"
    assert dialect_of(OPENAI | {"conversations": None}, "f:1") == "openai", "a null is no value"


@pytest.mark.parametrize(
    ("dialect", "row", "message"),
    [
        ("sharegpt", {"conversations": [{"from": "robot", "value": "q"}]}, "unknown speaker: 'robot'"),
        ("sharegpt", {"conversations": [user("q")]}, 'a turn is not {"from": ..., "value": ...}: role, content'),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "say the same: content"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "a", "mood": "b"}]},
            "message that would be lost: mood",
        ),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1, 1)"}]}, "not JSON"),
        ("sharegpt", {"conversations": "q"}, "not a list with turns: str"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, '"history" is not'),
        ("alpaca", {"instruction": ["q"], "output": "a"}, '"instruction" or "input" is not a string'),
        ("alpaca", {"instruction": "q", "output": ""}, "an assistant message is empty"),
        ("prompt-completion", {"prompt": "q", "completion": [ai("a")]}, "neither two strings nor two lists"),
        ("openai", {"messages": [user("q")]}, "no assistant message"),
    ],
)
def test_rows_that_are_no_conversation_of_their_dialect(dialect: str, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        conversation_in(dialect, row, "f:7")
    assert message in caught.value.what
    assert caught.value.where.startswith("f:7")


def test_bad_rows_are_counted_by_reason(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    odd = [
        "nonsense",
        42,
        ["text"],
        {"text": "t"},
        OPENAI,
        SHAREGPT,
        {"messages": []},
        OPENAI | {"mood": 1},
        OPENAI | {"mad": 1},
    ]
    refused = {"messages": [user("q"), {"role": "user", "content": "r", "name": "<think>"}, ai("a")]}
    path.write_text("\n".join(['["a", "list"]', "{", *map(json.dumps, [*odd, refused, OPENAI]), "", " "]))
    with pytest.raises(DataError, match="not an object: list"):
        load(folder, path)
    data = load(folder, path, bad_rows="skip")
    assert data.stats.bad_rows == {
        "not an object": 4,
        "a row of another dialect than its file": 1,
        "keys that are neither used nor known": 2,
        '"messages" is not a list with messages': 1,
        "a row of no known dialect": 1,
        "not JSON": 1,
        "\"name\" holds the control token '<think>'": 1,
    }
    assert (data.stats.read, data.stats.samples, data.stats.conversations) == (13, 2, 2)
    with pytest.raises(DataError, match="11 of 13 conversations would be dropped") as caught:
        load(folder, path, bad_rows="skip", max_dropped_share=0.5)
    assert "11 that are bad rows (" in caught.value.where
    path.write_text("42\n43\n")
    with pytest.raises(DataError, match="not an object: int") as caught:
        load(folder, path, bad_rows="skip")
    assert caught.value.where == f"{path}:1"


def test_a_row_that_the_template_cannot_write_takes_no_other_along(tmp_path: Path) -> None:
    """It ends the process that renders, and those behind it in the batch are asked again."""
    path = tmp_path / "f.jsonl"
    lines(path, [OPENAI] * 3 + [{"messages": [user("q"), ai("a", name="slow")]}] + [OPENAI] * 70)
    forever = (
        "{% if m.name %}{% for i in range(99999) %}{% set b = range(99999) | sort | list %}{% endfor %}{% endif %}"
    )
    folder = write_tokenizer(tmp_path, chat_template=SOURCE.replace("{{ m.content }}", forever + "{{ m.content }}"))
    data = load(folder, path, bad_rows="skip")
    assert data.stats.bad_rows == {f"the chat template fails: it takes more than {MAX_SECONDS} s": 1}
    assert (data.stats.samples, data.stats.conversations) == (73, 73)
    with pytest.raises(DataError, match="it takes more than") as caught:
        load(folder, path)
    assert caught.value.where.startswith(f"{path}:4, template ")


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        return caught.value.what

    assert problem(tmp_path / "none") == "there is no such file of conversations"
    assert problem(tmp_path).startswith("a folder of conversations has to be one that datasets saved")
    (tmp_path / "cut.json").write_text('[{"messages": [')
    assert problem(tmp_path / "cut.json").startswith("the file begins as a JSON array and is not JSON")
    parquet(tmp_path / "f.parquet", [OPENAI])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    assert problem(tmp_path / "cut.parquet").startswith("not a readable table")
    saved(tmp_path / "saved", [OPENAI] * 3)
    (tmp_path / "saved" / "data-00000.arrow").unlink()
    assert problem(tmp_path / "saved") == "there is no such file of conversations"


def test_the_configuration_knows_the_dialects() -> None:
    from m1_stages.config import SftConfig

    assert {"auto", *DIALECTS} == set(get_args(get_type_hints(SftConfig)["dialect"]))
