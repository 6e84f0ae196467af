"""``m1 export --verify`` and ``--verify-only``: whatever is damaged in an export is found, and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import (
    MODEL,
    compute_in_this_process,
    contents,
    make_checkpoint,
    make_tokenizer,
    prepare_tokenizer,
    relaxed,
    weights,
    write,
)
from torch import Tensor
from typer.testing import CliRunner, Result

from m1_stages import packages
from m1_stages.checkpoint import Committed
from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import CheckpointError, ConfigError, DataError
from m1_stages.hf.checkpoint_tensors import MemorySource
from m1_stages.hf.read_back import compare_files
from m1_stages.hf.tokenizer_files import TokenizerFiles
from m1_stages.hf.verification.tokens import compare_tokenizer
from m1_stages.jobs.export import Export, checkpoint_of, stored_dtype
from m1_stages.jobs.export_verification import verify_export
from m1cli.app import app

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.2.block_sparse_moe.experts.{}.w2.weight"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """Exports in both dtypes with decay rates of their own, which are stored as well."""
    root = tmp_path_factory.mktemp("exports")
    for dtype in ("fp32", "bf16"):
        write(root / dtype, tokenizer_dir, slopes=relaxed(MODEL), dtype=dtype)
    return {dtype: root / dtype for dtype in ("fp32", "bf16")}


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """A corruption of stored values: the file is well-formed again afterwards."""

    def corrupt(folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            held = load_file(path)
            before = {name: tensor.clone() for name, tensor in held.items()}
            change(held)
            if any(held[name].dtype != t.dtype or not torch.equal(held[name], t) for name, t in before.items()):
                save_file(held, path, metadata={"format": "pt"})

    return corrupt


def element(name: str, place: tuple[int, ...], step: float = 2**-6) -> Callable[[Path], object]:
    def change(held: dict[str, Tensor]) -> None:
        if name in held:
            held[name][place] += step

    return tensors(change)


def swap(first: str, second: str) -> Callable[[Path], object]:
    """Exchange the values of two tensors, which may lie in different files."""

    def corrupt(folder: Path) -> None:
        place = json.loads((folder / INDEX).read_text())["weight_map"]
        held = {name: load_file(folder / place[name])[name] for name in (first, second)}
        tensors(lambda t: t.update({a: held[b] for a, b in ((first, second), (second, first)) if a in t}))(folder)

    return corrupt


def values(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A corruption of a JSON file, which stays JSON."""

    def corrupt(folder: Path) -> None:
        held = json.loads((folder / file).read_text())
        change(held)
        (folder / file).write_text(json.dumps(held, indent=2) + "\n")

    return corrupt


def flip(file: str, at: int) -> Callable[[Path], object]:
    def corrupt(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[at] ^= 1
        (folder / file).write_bytes(data)

    return corrupt


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-100])


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "embedding row 17": (element("model.embed_tokens.weight", (17, 3)), r"embed_tokens\.weight\[17, 3\] is .*1 of 14,400 values"),
    "one expert's weight": (element(EXPERT.format(3), (5, 7)), r"layers\.2.*experts\.3\.w2\.weight\[5, 7\]"),
    "norm": (element("model.layers.1.self_attn.norm.weight", (63,)), r"layers\.1\.self_attn\.norm\.weight\[63\]"),
    "final norm": (element("model.norm.weight", (0,)), r"model\.norm\.weight\[0\]"),
    "router": (element("model.layers.3.block_sparse_moe.gate.weight", (1, 40)), r"layers\.3\..*gate\.weight\[1, 40\]"),
    "head": (element("lm_head.weight", (299, 47)), r"lm_head\.weight\[299, 47\]"),
    "decay buffer": (element("model.layers.0.self_attn.slope_rate", (2, 0, 0)), r"slope_rate\[2, 0, 0\]"),
    "another shape": (
        tensors(lambda t: t.update({k: t[k].reshape(2, 24) for k in ("model.norm.weight",) if k in t})),
        r"model\.norm\.weight is \(2, 24\)",
    ),
    "another dtype": (
        tensors(lambda t: t.update({k: t[k].double() for k in ("model.norm.weight",) if k in t})),
        r"model\.norm\.weight is \(48,\) of torch\.float64",
    ),
    "experts exchanged": (swap(EXPERT.format(0), EXPERT.format(1)), r"experts\.0\.w2\.weight\[0, 0\]"),
    "rope_theta": (values("config.json", lambda v: v.update(rope_theta=10001.0)), "rope_theta is 10001.0, .* 50000.0"),
    "rope_parameters": (values("config.json", lambda v: v["rope_parameters"].update(rope_theta=1.0)), "rope_parameters"),
    "layer pattern": (values("config.json", lambda v: v["layer_types"].reverse()), "layer_types"),
    "a key more": (values("config.json", lambda v: v.update(auto_map={"AutoModel": "x.Y"})), "auto_map is .*missing"),
    "a key less": (values("config.json", lambda v: v.pop("rms_norm_eps")), "rms_norm_eps is missing"),
    "1 for true": (values("config.json", lambda v: v.update(postnorm=1)), "postnorm is 1, .* True"),
    "end of sequence": (values("generation_config.json", lambda v: v.update(eos_token_id=3)), "eos_token_id is 3"),
    "a byte of the tokenizer": (flip("tokenizer.json", 1500), "tokenizer.json"),
    "the chat template": (flip("chat_template.jinja", 9), "chat_template.jinja"),
    "the tokenizer's settings": (values("tokenizer_config.json", lambda v: v.pop("pad_token")), "tokenizer_config.json"),
    "index entry": (
        values(INDEX, lambda v: v["weight_map"].update({EXPERT.format(0): v["weight_map"]["lm_head.weight"]})),
        "is in this file|not in the file",
    ),
    "index entry missing": (values(INDEX, lambda v: v["weight_map"].pop("lm_head.weight")), "'lm_head.weight' is missing"),
    "index entry outside": (values(INDEX, lambda v: v["weight_map"].update({"lm_head.weight": "../x"})), "'../x'"),
    "size in the index": (values(INDEX, lambda v: v["metadata"].update(total_size=1)), "total_size is 1"),
    "no JSON": (flip(INDEX, 0), "damaged"),
    "cut weight file": (cut, "missing or damaged"),
    "missing weight file": (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "missing or damaged"),
    "a file that loaders prefer": (
        lambda folder: shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors"),
        "model.safetensors",
    ),
    "code": (lambda folder: (folder / "modeling.py").write_text("import os"), "modeling.py"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_single_corruption_is_found(
    exports: dict[str, Path], tokenizer_dir: Path, tmp_path: Path, dtype: str
) -> None:
    source, what = MemorySource(weights(MODEL)), contents(tokenizer_dir, slopes=relaxed(MODEL), dtype=dtype)
    assert compare_files(source, exports[dtype], what) == len(what.planned())
    for name, (corrupt, message) in CORRUPTIONS.items():
        folder = shutil.copytree(exports[dtype], tmp_path / re.sub(r"\W", "-", name))
        corrupt(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(CheckpointError) as caught:
            compare_files(source, folder, what)
        assert re.search(message, f"{caught.value.what} {caught.value.where}"), (name, str(caught.value))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, name


def test_every_bit_counts(tokenizer_dir: Path, tmp_path: Path) -> None:
    held = weights(MODEL)
    held["output_layer.weight"][4, 4] = float("nan")
    held["output_layer.weight"][5, 5] = 0.0
    write(tmp_path / "hf", tokenizer_dir, source=MemorySource(held))
    compare_files(MemorySource(held), tmp_path / "hf", contents(tokenizer_dir))
    held["output_layer.weight"][5, 5] = -0.0
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\[5, 5\] is 0\.0, of the checkpoint it is -0\.0"):
        compare_files(MemorySource(held), tmp_path / "hf", contents(tokenizer_dir))


def test_a_tokenizer_needs_no_code_of_its_own(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tokenizer_dir, tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    config = json.loads((source / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (source / "tokenizer_config.json").write_text(json.dumps(config | named))
    report = write(tmp_path / "hf", source)
    assert "evil.T" in report.notes[-1]
    assert "not part of the export" in report.notes[-1]
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()) == config | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    assert not (tmp_path / "hf" / "evil.py").exists()
    assert compare_tokenizer(tmp_path / "hf") == 4
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_transformers_sets_up_otherwise_is_found(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_tokenizer(tmp_path / "digits", "1024 1024"))
    assert compare_tokenizer(tmp_path / "hf") == 4
    for name, message in (
        ("BertTokenizer", "another tokenizer .* it fails on 'The lemma"),
        ("Qwen2Tokenizer", "another tokenizer .* it gives 'The lemma"),
        ("T5Tokenizer", "transformers does not load the tokenizer"),
    ):
        values("tokenizer_config.json", lambda v, name=name: v.update(tokenizer_class=name))(tmp_path / "hf")
        with pytest.raises(CheckpointError, match=message):
            compare_tokenizer(tmp_path / "hf")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> tuple[Resolved, Committed]:
    """A run that has finished 128k with other lengths than its configuration says by now."""
    root = tmp_path_factory.mktemp("finished")
    committed, _ = make_checkpoint(root / "run", contexts={"32k": 640, "128k": 1280})
    (root / "m1.toml").write_text('preset = "tiny"\n')
    resolved = load_config(root / "m1.toml")
    prepare_tokenizer(resolved.path(resolved.config.data.out), tokenizer_dir)
    return resolved, committed


def test_the_checkpoint_says_what_the_export_says(finished: tuple[Resolved, Committed], tmp_path: Path) -> None:
    job = Export(*finished)
    job.write(tmp_path / "hf", overwrite=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (1280, 5e6)
    assert "| Longest training context | 1,280 tokens |" in (tmp_path / "hf" / "README.md").read_text()
    notes = "\n".join(job.notes)
    assert "model.hidden_size was 48 in training and is 64 in the configuration: the export says 48" in notes
    assert "curriculum.decay was 'fixed' in training and is 'relax'" in notes
    assert "row length of stages.128k was 1280 in training and is 512" in notes
    assert "vocab_size" not in notes


@pytest.mark.usefixtures("here")
def test_an_existing_export_is_verified_against_the_checkpoint_of_its_card(
    finished: tuple[Resolved, Committed], tokenizer_dir: Path, tmp_path: Path
) -> None:
    resolved, committed = finished
    Export(resolved, committed, dtype="bf16").write(tmp_path / "hf", overwrite=False)
    assert stored_dtype(tmp_path / "hf", "hf") == "bf16" != resolved.config.export.dtype
    found = checkpoint_of(resolved, tmp_path / "hf", stage=None, checkpoint=None)
    assert found.path == committed.path
    job = Export(resolved, found, dtype=stored_dtype(tmp_path / "hf", "hf"))
    assert verify_export(job, tmp_path / "hf").difference.largest < 1e-5

    other = shutil.copytree(tokenizer_dir, tmp_path / "other")
    values("tokenizer_config.json", lambda v: v.update(tokenizer_class="T5Tokenizer"))(other)
    prepare_tokenizer(tmp_path / "data", other)
    job = Export(load_config(resolved.base_dir / "m1.toml", [f"data.out={tmp_path / 'data'}"]), committed)
    job.write(tmp_path / "hf2", overwrite=False)
    with pytest.raises(CheckpointError, match="does not load the tokenizer"):
        verify_export(job, tmp_path / "hf2")

    card = tmp_path / "hf" / "README.md"
    text = card.read_text()
    card.write_text(text.replace(committed.sha256, "ab" * 32))
    with pytest.raises(CheckpointError, match=r"SHA-256 abab.* the run has none like it"):
        checkpoint_of(resolved, tmp_path / "hf", stage=None, checkpoint=None)
    with pytest.raises(CheckpointError, match=r"SHA-256 abab.*step_00000010 has"):
        checkpoint_of(resolved, tmp_path / "hf", stage="128k", checkpoint=None)
    card.unlink()
    with pytest.raises(ConfigError, match="no model card"):
        checkpoint_of(resolved, tmp_path / "hf", stage=None, checkpoint=None)
    assert checkpoint_of(resolved, tmp_path / "hf", stage=None, checkpoint=committed.path).sha256 == committed.sha256
    values("config.json", lambda v: v.update(dtype="float16"))(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="dtype is 'float16'"):
        stored_dtype(tmp_path / "hf", "hf")


def test_the_command_verifies_an_existing_export_and_writes_nothing(
    finished: tuple[Resolved, Committed], tmp_path: Path
) -> None:
    resolved, committed = finished
    Export(resolved, committed).write(tmp_path / "hf", overwrite=False)

    def run() -> Result:
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
        config = str(resolved.base_dir / "m1.toml")
        done = CliRunner().invoke(app, ["export", "-c", config, "--verify-only", str(tmp_path / "hf")])
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
        return done

    files = [path for folder in (tmp_path, resolved.base_dir) for path in folder.rglob("*") if path.is_file()]
    done = run()
    assert done.exit_code == 0, done.output
    assert "tensors read back equal the checkpoint's bit by bit" in " ".join(done.output.split())
    element("model.embed_tokens.weight", (17, 3))(tmp_path / "hf")
    done = run()
    assert done.exit_code == 5, done.output
    assert "model.embed_tokens.weight[17, 3]" in done.output


@pytest.mark.parametrize(
    ("options", "needs"), [(["--verify"], "verifying an export for hf"), (["--prompt", "x"], "--prompt")]
)
def test_a_package_that_is_missing_is_asked_for_before_anything_is_written(
    finished: tuple[Resolved, Committed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    needs: str,
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    config, out = str(finished[0].base_dir / "m1.toml"), tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "-c", config, "--out", str(out), *options])
    assert done.exit_code == 3, done.output
    told = " ".join(done.output.split())
    assert f"{needs} needs transformers, not installed here" in told
    assert 'pip install "m1cli[hf]"' in told
    assert not out.exists()


def test_a_chat_template_that_is_no_text_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{{ x }}")
    for template in (tmp_path / "t.jinja", tmp_path / "none"):
        with pytest.raises(DataError, match="cannot read the chat template"):
            TokenizerFiles.of(tokenizer_dir, template)
