"""The kinds of exports: what each can hold, what loaders compute from them, and that every byte of them is verified."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
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
from support.importing import RELEASED
from support.released_reference import source_logits
from torch import Tensor

from m1_stages.config.load import load_config
from m1_stages.decay import released_slopes
from m1_stages.errors import CheckpointError, ConfigError, EnvironmentProblem
from m1_stages.hf.checkpoint_tensors import MemorySource
from m1_stages.hf.read_back import compare_files
from m1_stages.hf.targets import TARGETS, Target, obstacles, refuse_inexact, target_of
from m1_stages.hf.verification import child
from m1_stages.hf.verification.comparison import FP32, compare
from m1_stages.hf.verification.released_forward import released_logits
from m1_stages.hf.verification.trained import trained_reference
from m1_stages.jobs.export import Export, checkpoint_of, stored_architecture, stored_dtype
from m1_stages.jobs.export_verification import verify_export

TOKENS = torch.randint(0, 300, (1, 300), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """One model of the released kind, half of its channels rotated, for transformers and in the released dialect."""
    root = tmp_path_factory.mktemp("exports")
    for target in ("hf", "text01"):
        write(root / target, tokenizer_dir, RELEASED, target=target)
    return root


@pytest.fixture(scope="module")
def expected(exports: Path) -> Tensor:
    """[1, 300, vocab] float64 logits of that model, by a recurrence over the released names."""
    return source_logits(exports / "text01", TOKENS[0])[None]


OBSTACLES: list[tuple[dict[str, Any], bool, dict[str, str]]] = [
    ({}, False, {}),
    ({"rotary_dim": 16}, False, {}),
    ({}, True, {"text01": "curriculum.decay", "gguf": "curriculum.decay"}),
    ({"num_heads": 6, "num_kv_heads": 2}, False, {"text01": "model.num_heads"}),
    ({"softmax_every": 4}, False, {"gguf": "model.softmax_every"}),
    ({"beta": 0.5}, False, {"gguf": "model.beta"}),
    ({"lightning_norm_eps": 1e-5}, False, {"hf": "model.lightning_norm_eps", "text01": "model.lightning_norm_eps"}),
    ({"lightning_norm_eps": 3e-6}, False, dict.fromkeys(TARGETS, "model.lightning_norm_eps")),
]


@pytest.mark.parametrize(("change", "own_rates", "refused"), OBSTACLES)
def test_a_target_that_cannot_hold_the_model_is_refused_with_one_that_can(
    change: dict[str, Any], own_rates: bool, refused: dict[str, str]
) -> None:
    model = dataclasses.replace(RELEASED, **change)
    slopes = relaxed(model) if own_rates else released_slopes(model.num_layers, model.num_heads)
    assert {t: o[0].key for t in TARGETS if (o := obstacles(t, model, slopes))} == refused
    able = [target for target in TARGETS if target not in refused]
    for target in TARGETS:
        if target in able:
            refuse_inexact(target, model, slopes)
            continue
        with pytest.raises(ConfigError, match=f"target {target} cannot hold this model") as caught:
            refuse_inexact(target, model, slopes)
        assert caught.value.fix.startswith(f"m1 export --target {able[0]}" if able else "no target can")


def test_the_released_dialect_computes_the_same(exports: Path, expected: Tensor, tokenizer_dir: Path) -> None:
    assert expected.abs().max() > 2.5
    assert (released_logits(exports / "text01", TOKENS) - expected).abs().max() < 1e-5
    source, slopes = MemorySource(weights(RELEASED)), released_slopes(8, 4)
    reference = trained_reference(source, RELEASED, slopes=slopes, rope_base=5e4, tokens=TOKENS)
    found = compare(reference, expected, rounding=FP32, loader="the reference")
    assert found.largest < 1e-5
    config = json.loads((exports / "text01" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MiniMaxText01ForCausalLM"], "minimax_text_01")
    assert (config["rotary_dim"], config["rope_theta"], config["attn_type_list"]) == (8, 5e4, [0] * 7 + [1])
    assert not {"layer_types", "rope_parameters", "block_size", "full_attn_alpha_factor"} & config.keys()
    what = contents(tokenizer_dir, RELEASED, target="text01", architecture="MiniMaxM1ForCausalLM")
    assert (what.config()["architectures"], what.config()["model_type"]) == (["MiniMaxM1ForCausalLM"], "minimax_m1")


def test_what_transformers_is_told_it_computes(exports: Path, expected: Tensor) -> None:
    """``AutoModelForCausalLM`` and ``pipeline``, without a line of ours, on a model whose RoPE is partial."""
    from transformers import AutoModelForCausalLM, pipeline

    model = AutoModelForCausalLM.from_pretrained(exports / "hf", dtype="float32").eval()
    assert type(model).__name__ == "MiniMaxForCausalLM"
    with torch.inference_mode():
        assert (model(TOKENS).logits.double() - expected).abs().max() < 1e-4
    made = pipeline("text-generation", model=str(exports / "hf"), dtype="float32", device="cpu")
    settings = {"max_new_tokens": 12, "do_sample": False, "return_tensors": True}
    found = made("one two three", **settings)[0]["generated_token_ids"]
    prompt = made.tokenizer("one two three", add_special_tokens=False)["input_ids"]
    assert len(found) == len(prompt) + 12
    logits = source_logits(exports / "text01", torch.tensor(found))
    assert found[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    with pytest.raises(ValueError, match="minimax_text_01"):  # and does not compute another function in silence
        AutoModelForCausalLM.from_pretrained(exports / "text01")


def places(folder: Path) -> dict[str, tuple[Path, int]]:
    """File and offset of a byte of one tensor of each kind, in turn the first, one inside and the last of the tensor."""
    found: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                kind, (begin, end) = re.sub(r"\.\d+\.", ".N.", name), entry["data_offsets"]
                at = (begin, (begin + end) // 2, end - 1)[len(found) % 3]
                found.setdefault(kind, (path, 8 + length + at))
    return found


@pytest.mark.parametrize(("target", "own_rates", "kinds"), [("hf", True, 21), ("text01", False, 17)])
def test_a_changed_byte_anywhere_is_found(
    tmp_path: Path, tokenizer_dir: Path, target: Target, own_rates: bool, kinds: int
) -> None:
    model = dataclasses.replace(MODEL, rotary_dim=8)
    out, source = tmp_path / "out", MemorySource(weights(model))
    values: dict[str, Any] = {"target": target, "slopes": relaxed(model) if own_rates else None}
    write(out, tokenizer_dir, model, source=source, **values)
    what = contents(tokenizer_dir, model, **values)
    compare_files(source, out, what)
    tensors = places(out)
    assert len(tensors) == kinds, sorted(tensors)
    shard = sorted(out.glob("*.safetensors"))[1]
    others = [(path, size * part // 11) for path in sorted(out.iterdir()) if (size := path.stat().st_size)
              for part in ((0, 5, 10) if path.suffix != ".safetensors" else (0,))]  # fmt: skip
    others += [(shard, 8), (shard, 60), (shard, shard.stat().st_size - 1)]
    assert len({path for path, _ in others}) == len(list(out.iterdir())) > 8
    for kind, (path, at) in [*tensors.items(), *(("", place) for place in others)]:
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            compare_files(source, out, what)
        if kind:
            assert re.sub(r"\.\d+\.", ".N.", re.split(r"[ \[]", caught.value.what.split(": ")[1])[0]) == kind
        data[at] ^= 4
        path.write_bytes(data)
    compare_files(source, out, what)


def test_a_text01_export_is_recognised_and_verified(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in_this_process(monkeypatch)
    committed, _ = make_checkpoint(tmp_path / "run", contexts={"32k": 640})
    (tmp_path / "m1.toml").write_text('preset = "tiny"\nexport.target = "text01"\n')
    resolved = load_config(tmp_path / "m1.toml", ['export.architecture="MiniMaxM1ForCausalLM"'])
    prepare_tokenizer(resolved.path(resolved.config.data.out), tokenizer_dir)
    Export(resolved, committed).write(tmp_path / "x", overwrite=False)
    assert (target_of(tmp_path / "x"), stored_architecture(tmp_path / "x")) == ("text01", "MiniMaxM1ForCausalLM")
    assert checkpoint_of(resolved, tmp_path / "x", stage=None, checkpoint=None).sha256 == committed.sha256
    job = Export(resolved, committed, target="text01", dtype=stored_dtype(tmp_path / "x", "text01"))
    with pytest.raises(CheckpointError, match=r"architectures is .*M1.*, of the checkpoint it is .*Text01"):
        verify_export(changed(job, architecture="MiniMaxText01ForCausalLM"), tmp_path / "x")
    seen = verify_export(job, tmp_path / "x")
    assert (seen.tensors, seen.sentences, seen.difference.positions) == (79, 4, 1800)
    assert seen.difference.largest < 1e-5 < 0.1 < seen.difference.largest_logit
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        target_of(tmp_path / "x")


def changed(job: Export, **changes: Any) -> Export:
    """The same job with other contents."""
    copy = object.__new__(Export)
    copy.__dict__ |= job.__dict__ | {"contents": dataclasses.replace(job.contents, **changes)}
    return copy


def test_a_child_hands_its_error_over_and_a_killed_one_is_named(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exports / "text01", tmp_path / "x")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be computed: KeyError") as caught:
        child.loader_logits("released", folder, TOKENS, "cpu")
    assert caught.value.where == str(folder)
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(EnvironmentProblem, match="logits of released was killed by signal 9"):
        child.loader_logits("released", folder, TOKENS, "cpu")
