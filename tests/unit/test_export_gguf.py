"""Exports for llama.cpp without llama.cpp: the converter is found and asked, and its file is put in place.

A converter of a few lines stands for llama.cpp's; ``golden/test_llama_cpp`` runs the true one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.exporting import contents, make_tokenizer, weights, write
from support.importing import RELEASED

from m1_stages.errors import CheckpointError, ConfigError, M1Error
from m1_stages.hf.checkpoint_tensors import MemorySource
from m1_stages.hf.export import export
from m1_stages.hf.llama_cpp.convert import CONVERTER, find_converter
from m1_stages.hf.llama_cpp.read_back import expected_values, gguf_place
from m1_stages.hf.targets import target_of
from m1_stages.hf.tensor_names import to_released
from m1_stages.jobs.export import stored_dtype

LIST = (
    "class TextModel:\n def get_vocab_base_pre(self, tokenizer):\n  raise NotImplementedError('get_vocab_base_pre')\n"
)
WRITES = """
import json, sys
from pathlib import Path
from conversion.base import TextModel
def main():
    folder, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
    names = sorted(path.name for path in folder.iterdir())
    out.write_text(json.dumps([TextModel().get_vocab_base_pre(None), *sys.argv[4:], *names]))
"""


def sources(folder: Path, converter: str = WRITES) -> Path:
    (folder / "conversion").mkdir(parents=True)
    (folder / CONVERTER).write_text(converter)
    (folder / "conversion" / "base.py").write_text(LIST)
    (folder / "conversion" / "minimax.py").write_text("# MiniMaxText01ForCausalLM")
    return folder


def to_gguf(out: Path, tokenizer: Path, converter: Path, **changes: Any) -> None:
    what = contents(tokenizer, RELEASED, target="gguf", **changes)
    export(MemorySource(weights(RELEASED)), out, what, shard_bytes=1 << 40, llama_cpp=converter)


def test_the_converter_is_found_or_its_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs llama.cpp's sources") as caught:
        find_converter("", "key export.llama_cpp")
    assert "pip download --no-binary llama-cpp-python" in caught.value.fix
    with pytest.raises(ConfigError, match=rf"there is no {CONVERTER}"):
        find_converter(str(tmp_path), "key export.llama_cpp")
    found = sources(tmp_path / "llama.cpp")
    assert find_converter(str(found), "key export.llama_cpp") == found
    (found / "conversion" / "minimax.py").write_text("class MiniMaxM2ForCausalLM: ...")
    with pytest.raises(ConfigError, match=r"before it had the model family \(build b10437\)"):
        find_converter(str(found), "key export.llama_cpp")
    (found / CONVERTER).write_text("# MiniMaxText01ForCausalLM")  # in one file, as earlier versions have it
    assert find_converter(str(found), "key export.llama_cpp") == found


def test_what_the_converter_wrote_is_the_export(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    to_gguf(tmp_path / "x", tokenizer, sources(tmp_path / "llama.cpp"), dtype="bf16")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"README.md", "SHA256SUMS", "model-bf16.gguf"}
    split, *rest = json.loads((tmp_path / "x" / "model-bf16.gguf").read_text())
    assert split == "gpt-4o"
    assert rest[:4] == ["--outtype", "bf16", "--model-name", "128k-step_00000010"]
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < set(rest)
    assert (target_of(tmp_path / "x"), stored_dtype(tmp_path / "x", "gguf")) == ("gguf", "bf16")
    (tmp_path / "x" / "model-bf16.gguf").rename(tmp_path / "x" / "other.gguf")
    with pytest.raises(CheckpointError, match=r"the weight files are \['other.gguf'\]"):
        stored_dtype(tmp_path / "x", "gguf")


def test_a_tokenizer_that_splits_otherwise_is_not_passed_off_as_ours(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+|\S+"}
    (tokenizer / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="ended with 1: NotImplementedError") as caught:
        to_gguf(tmp_path / "x", tokenizer, sources(tmp_path / "llama.cpp"))
    assert "use a tokenizer that llama.cpp knows" in caught.value.fix
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("converter", "said", "fix"),
    [
        ("import a_package_that_is_missing", "a_package_that_is_missing", 'pip install "m1cli[gguf]"'),
        ("def main(): raise SystemExit('no')", "ended with 1: no", "--target text01"),
        ("def main(): pass", "ended with 0: it said nothing", "--target text01"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(tmp_path: Path, converter: str, said: str, fix: str) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(M1Error) as caught:
        to_gguf(tmp_path / "out" / "x", tokenizer, sources(tmp_path / "llama.cpp", converter))
    assert said in caught.value.what
    assert fix in caught.value.fix
    assert list((tmp_path / "out").iterdir()) == []


def test_every_released_tensor_has_a_place(tmp_path: Path) -> None:
    assert gguf_place("model.layers.3.block_sparse_moe.experts.12.w2.weight") == ("blk.3.ffn_down_exps.weight", 12)
    assert gguf_place("model.layers.7.self_attn.o_proj.weight") == ("blk.7.attn_output.weight", None)
    assert gguf_place("model.layers.0.self_attn.norm.weight") == ("blk.0.attn_norm_2.weight", None)
    assert gguf_place("lm_head.weight") == ("output.weight", None)
    released = [n for name, tensor in weights(RELEASED).items() for n, _ in to_released(name, tensor, RELEASED)]
    places = {gguf_place(name) for name in released}
    assert len(places) == len(released) == 3 + 8 * (2 + 1 + 3 * 4) + 7 * 4 + 4


def test_the_expected_keys_are_the_checkpoint_s(tmp_path: Path) -> None:
    values = expected_values(contents(make_tokenizer(tmp_path / "tokenizer"), RELEASED, target="gguf"))
    assert values["general.architecture"] == "minimax-01"
    expected = {
        "block_count": 8, "embedding_length": 48, "feed_forward_length": 40, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e4, "rope.dimension_count": 8, "expert_count": 4, "expert_used_count": 2,
        "residual_scale": 2.0, "context_length": 4096,
    }  # fmt: skip
    assert {key: values[f"minimax-01.{key}"] for key in expected} == expected
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert len(values["tokenizer.ggml.tokens"]) == 300
    assert values["tokenizer.ggml.tokens"][-1] == "[PAD299]"


@pytest.mark.parametrize("several", [False, True])
def test_a_template_that_is_no_file_is_given_to_the_converter_as_one(tmp_path: Path, several: bool) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    values = json.loads((tokenizer / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ x }}"}]
    values["chat_template"] = named if several else "{{ x }}"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(values))
    what = contents(tokenizer, RELEASED, target="gguf")
    assert what.files()["chat_template.jinja"] == b"{{ x }}"
    assert expected_values(what)["tokenizer.chat_template"] == "{{ x }}"
    assert "chat_template.jinja" not in contents(tokenizer, RELEASED, target="text01").files()


def test_a_model_that_llama_cpp_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every 4th layer is a softmax layer"):
        write(tmp_path / "x", make_tokenizer(tmp_path / "tokenizer"), target="gguf")
    assert not (tmp_path / "x").exists()
