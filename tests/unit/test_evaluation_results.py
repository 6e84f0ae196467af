"""The result of an evaluation on the disk: that of the right checkpoint, or one clear error."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from support.tiny_checkpoint import meta
from typer.testing import CliRunner

from m1_stages.checkpoint.manifest import MANIFEST, manifest_text, read_manifest
from m1_stages.decay import released_slopes
from m1_stages.errors import DataError
from m1_stages.evaluation.results import read_result, result_path, write_result
from m1_stages.events import StageEvaluated
from m1cli.app import app

RESULT = StageEvaluated(
    stage="32k", checkpoint="step_00000001", checkpoint_sha256="ab" * 32, global_step=1, seq_len=128, recall=0.25,
    needles=None, positions=None, skipped=["loss by position: evaluate.documents is 0"], seconds=1.5,
)  # fmt: skip


def test_a_result_belongs_to_one_checkpoint(tmp_path: Path) -> None:
    assert read_result(tmp_path, "32k", "ab" * 32) is None
    write_result(tmp_path, RESULT)
    assert read_result(tmp_path, "32k", "ab" * 32) == dataclasses.asdict(RESULT)
    assert read_result(tmp_path, "32k", "cd" * 32) is None
    write_result(tmp_path, dataclasses.replace(RESULT, recall=None))
    found = read_result(tmp_path, "32k", "ab" * 32)
    assert found is not None
    assert found["recall"] is None


SHA = '"checkpoint_sha256": "' + "ab" * 32 + '"'
DAMAGED = {
    b"": "damaged", b"\x00" * 40: "damaged", b"\xff\xfe{}": "damaged", b"[" * 100_000: "damaged",
    b"[]": r"the file is \[\], which is not an object", b"null": "not an object", b"7": "not an object",
    b"{}": "checkpoint_sha256 is missing", b'{"checkpoint_sha256": 7, "recall": 0.5}': "checkpoint_sha256 is 7",
    b"{%s}": "recall is missing", b'{%s, "recall": "\\u001b[31m"}': r"recall is '\\x1b\[31m', which is not a number",
    b'{%s, "recall": true}': "recall is True", b'{%s, "recall": 1.5}': "not between 0 and 1",
    b'{%s, "recall": -0.1}': "not between 0 and 1", b'{%s, "recall": [0.5]}': "not a number",
    b'{%s, "recall": 1' + b"0" * 400 + b"}": "damaged", b'{%s, "recall": NaN}': "damaged",
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), DAMAGED.items(), ids=range(len(DAMAGED)))
def test_damage_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = result_path(tmp_path, "32k")
    path.parent.mkdir()
    path.write_bytes(content.replace(b"%s", SHA.encode()))
    with pytest.raises(DataError, match=message) as caught:
        read_result(tmp_path, "32k", "ab" * 32)
    assert caught.value.where == str(path)
    assert "m1 evaluate --stage 32k" in caught.value.fix
    assert str(caught.value).isprintable()


def test_mutations_through_the_command_line(tmp_path: Path) -> None:
    """``m1 stages`` shows the recall of an undamaged file, or exits with code 4; never with a traceback."""
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n')
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    decay = {"policy": "fixed", "slopes": released_slopes(8, 4)}
    (checkpoint / MANIFEST).write_text(manifest_text(dataclasses.replace(meta(1, final=True), decay=decay), {}))
    sha256 = read_manifest(checkpoint).sha256
    write_result(tmp_path / "run", dataclasses.replace(RESULT, checkpoint_sha256=sha256))
    path = result_path(tmp_path / "run", "32k")
    whole, rng, codes = path.read_bytes(), random.Random(0), set()
    for _ in range(60):
        data = bytearray(whole)
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        data[at : at + 1] = (b"\x1b", b"\x00", bytes([data[at] ^ 1 << rng.randrange(8)]), b"9" * 400)[kind]
        path.write_bytes(data if kind or at % 2 else data[:at])
        done = CliRunner().invoke(app, ["stages", "-c", str(tmp_path / "m1.toml"), "--json"])
        assert done.exit_code in (0, 4), (bytes(data), done.output, done.exception)
        assert "\x1b" not in done.output
        if done.exit_code == 0:
            shown = json.loads(done.output)[0]["needle_recall"]
            assert shown is None or shown == json.loads(path.read_bytes())["recall"]
        codes.add(done.exit_code)
    assert codes == {0, 4}
