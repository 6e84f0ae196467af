"""What ``m1 import`` refuses, by key or tensor, before anything of the run changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.importing import RELEASED, configure, released_config, released_tensors, write_source
from support.trees import tree
from torch import Tensor

from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint.imported import refuse_beside_import
from m1_stages.errors import CheckpointError, ConfigError, DataError, M1Error
from m1_stages.hf.source.config_json import parse_source_config
from m1_stages.hf.source.folder import Index
from m1_stages.jobs import import_model

HYBRID = [0, 0, 0, 0, 0, 0, 0, 1]
REFUSED: list[tuple[str, Any, str]] = [
    ("model_type", "minimax_m2", "must be one of minimax, minimax_text_01, minimax_m1"),
    ("postnorm", False, "the residual is taken after the norm here"),
    ("postnorm", None, "missing: the released code then takes the residual before the norm"),
    ("tie_word_embeddings", True, "two tensors"),
    ("sliding_window", 4096, "see the whole text"),
    ("shared_intermediate_size", 512, "no shared experts"),
    ("shared_intermediate_size", [512], "no shared experts"),
    ("hidden_act", "gelu", "SwiGLU"),
    ("quantization_config", {"bits": 4}, "bf16, fp16 or fp32"),
    ("num_attention_heads", 6, "not a power of two"),
    ("num_key_value_heads", 3, "does not divide num_attention_heads = 4"),
    ("num_experts_per_tok", 5, "there are 4 experts"),
    ("hidden_size", 0, "a whole number above 0"),
    ("num_hidden_layers", "8", "a whole number above 0"),
    ("vocab_size", None, "missing: it must be a whole number"),
    ("rms_norm_eps", True, "a number above 0"),
    ("layernorm_mlp_alpha", 3.0, "has one alpha for all sublayers"),
    ("layernorm_linear_attention_beta", 0.5, "has one beta for all sublayers"),
    ("attn_type_list", None, "neither it nor layer_types"),
    ("attn_type_list", [0] * 8, "at equal distances"),
    ("attn_type_list", [1, *HYBRID[:-1]], "at equal distances"),
    ("attn_type_list", [0, 0, 1, 0, 0, 1, 0, 0], "at equal distances"),
    ("attn_type_list", HYBRID[:-1], "a list of 8"),
    ("attn_type_list", [2, *HYBRID[1:]], "entry 0 is 2"),
    ("layer_types", ["full_attention"] * 8, "it contradicts attn_type_list"),
    ("rope_theta", None, "the RoPE base is not known"),
    ("rope_theta", 0.5, "a number above 1"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, "positions are not scaled here"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e7}, "positions are not scaled here"),
    ("rope_parameters", {"rope_theta": 1e7, "factor": 2.0}, "unknown: factor"),
    ("rope_parameters", {"rope_theta": 1e6}, "rope_parameters says 1000000.0"),
    ("partial_rotary_factor", 1.0, "16 rotated channels of 16, and rotary_dim 8"),
    ("rotary_dim", 7, "must be even"),
    ("rotary_dim", 32, "at most head_dim = 16"),
]


@pytest.mark.parametrize(("key", "value", "reason"), REFUSED, ids=[f"{k}={v}"[:40] for k, v, _ in REFUSED])
def test_another_model_is_refused_by_key_value_and_reason(key: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_source_config(released_config(RELEASED, **{key: value}), "hf/config.json")
    message = f"{refused.value.what} {refused.value.where}"
    assert reason in message
    assert key in message or key in ("rope_theta", "partial_rotary_factor")
    assert refused.value.exit_code == 2


def test_every_key_is_used_known_or_named() -> None:
    assert parse_source_config(released_config(RELEASED), "x").notes == ()
    values = released_config(RELEASED, attention_dropout=0.1, num_nextn_predict_layers=2, mtp=[1])
    notes = parse_source_config(values, "x").notes
    assert any("mtp = [1], num_nextn_predict_layers = 2" in note for note in notes)
    assert any("attention_dropout is 0.1" in note for note in notes)


def test_keys_that_say_the_same_in_other_words() -> None:
    plain = parse_source_config(released_config(RELEASED), "x")
    kinds = ["linear_attention"] * 7 + ["full_attention"]
    for changes in (
        {"layer_types": kinds, "attn_type_list": None},
        {"rotary_dim": None, "partial_rotary_factor": 0.5},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
        {"model_type": "minimax_text_01", "shared_intermediate_size": [0]},
        {f"{kind}_alpha_factor": RELEASED.residual_alpha for kind in ("full_attn", "linear_attn", "mlp")},
    ):
        parsed = parse_source_config(released_config(RELEASED, **changes), "x")
        assert (parsed.model, parsed.rope_base, parsed.proportional) == (plain.model, 1e7, False), changes
    assert plain.model == RELEASED
    theirs = {"model_type": "minimax", "rope_theta": None, "rope_parameters": {
        "rope_type": "proportional", "rope_theta": 1e14, "partial_rotary_factor": 0.5}}  # fmt: skip
    permuted = parse_source_config(released_config(RELEASED, **theirs), "x")
    assert (permuted.model, permuted.rope_base, permuted.proportional) == (RELEASED, 1e7, True)


Damage = Callable[[Path, dict[str, Tensor]], object]
"""Spoils a source folder; gets its tensors."""


def rewritten(**changes: Any) -> Damage:
    """Write the last shard with other tensors; None takes one out. Names have / in place of dots."""

    def damage(folder: Path, tensors: dict[str, Tensor]) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {k: tensors[k] for k, file in index["weight_map"].items() if file == path.name}
        for name, change in changes.items():
            held[name] = change(held.get(name))
        held = {name: tensor for name, tensor in held.items() if tensor is not None}
        index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != path.name} | dict.fromkeys(
            held, path.name
        )
        index["metadata"] = {}
        save_file(held, path)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def index_changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path, _: dict[str, Tensor]) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


HEAD, NORM = "lm_head.weight", "model.norm.weight"
DAMAGES: dict[str, tuple[Damage, type[M1Error], str]] = {
    "cut shard": (lambda f, _: shard(f).write_bytes(shard(f).read_bytes()[:-1000]), CheckpointError, "damaged or cut"),
    "empty shard": (lambda f, _: shard(f).write_bytes(b""), CheckpointError, "damaged or cut"),
    "no safetensors": (lambda f, _: shard(f).write_bytes(b"x" * 4096), CheckpointError, "damaged or cut"),
    "missing shard": (lambda f, _: shard(f).unlink(), CheckpointError, "1 of 3 weight files are missing, model-00001"),
    "torn index": (lambda f, _: (f / "model.safetensors.index.json").write_text('{"wei'), CheckpointError, "index is damaged"),
    "index leads elsewhere": (index_changed(lambda v: v["weight_map"].update({NORM: "../x.safetensors"})), CheckpointError,
                              "no safetensors file of the folder"),
    "index names another shard": (index_changed(lambda v: v["weight_map"].update({NORM: "model-00000-of-00003.safetensors"})),
                                  CheckpointError, f"says that {NORM} is in this file, and it is not"),
    "index leaves one out": (index_changed(lambda v: v["weight_map"].pop(NORM)), CheckpointError, "does not say so"),
    "no weight_map": (index_changed(lambda v: v.pop("weight_map")), CheckpointError, "it has no weight_map"),
    "half a byte": (index_changed(lambda v: v["metadata"].update(total_size=7.5)), CheckpointError, "its total_size is 7.5"),
    "other total_size": (index_changed(lambda v: v["metadata"].update(total_size=7)), CheckpointError, "its total_size is 7"),
    "missing tensor": (rewritten(**{NORM: lambda _: None}), CheckpointError, f"missing tensors: 1, {NORM} first"),
    "extra tensor": (rewritten(**{"model.mtp.weight": lambda _: torch.ones(3)}), CheckpointError,
                     "tensors that the model does not have: 1, model.mtp.weight first"),
    "other shape": (rewritten(**{NORM: lambda _: torch.ones(47)}), CheckpointError, "shape [47], and config.json needs [48]"),
    "other dtype": (rewritten(**{NORM: lambda _: torch.ones(48, dtype=torch.int8)}), CheckpointError, "is I8"),
    "NaN": (rewritten(**{HEAD: spoilt(float("nan"))}), CheckpointError, f"{HEAD}: it has values that are not finite"),
    "infinity": (rewritten(**{NORM: spoilt(float("-inf"))}), CheckpointError, f"{NORM}: it has values that are not finite"),
    "one decay buffer": (rewritten(**{"model.layers.0.self_attn.slope_rate": lambda _: torch.ones(4, 1, 1)}), CheckpointError,
                         "1 of 28 decay buffers are there"),
    "no config": (lambda f, _: (f / "config.json").unlink(), ConfigError, "cannot read the source's configuration"),
    "torn config": (lambda f, _: (f / "config.json").write_text("[1"), ConfigError, "cannot read the source's configuration"),
    "config is a FIFO": (lambda f, _: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), ConfigError, "it is no file"),
    "template leads nowhere": (lambda f, _: (f / "chat_template.jinja").symlink_to("../blobs/1"), DataError, "a link to nothing"),
    "torn tokenizer": (lambda f, _: (f / "tokenizer.json").write_text("{}"), DataError, "cannot read the source's tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    spoil, kind, message = DAMAGES[damage]
    tensors = released_tensors(RELEASED)
    source = write_source(tmp_path / "hf", tensors=tensors)
    spoil(source, tensors)
    with pytest.raises(kind) as refused:
        import_model.run(configure(tmp_path / "r"), source)
    assert message in f"{refused.value.what} {refused.value.where}"
    assert str(source) in refused.value.where
    left = sorted(path.name for path in (tmp_path / "r" / "run").iterdir()) if (tmp_path / "r" / "run").exists() else []
    assert left in ([], ["run.lock"])


def test_messages_say_what_to_do_with_a_run_and_with_quantized_weights(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf")
    rewritten(**{NORM: lambda _: torch.ones(48, dtype=torch.int8)})(source, released_tensors(RELEASED))
    with pytest.raises(CheckpointError) as quantized:
        import_model.run(configure(tmp_path / "r"), source)
    assert quantized.value.fix.startswith("convert the weights to bf16")
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError) as a_run:
        import_model.run(configure(tmp_path / "r"), tmp_path / "mine")
    assert "m1 export" in a_run.value.fix


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    kept = write_source(tmp_path / "blobs")
    source = tmp_path / "models--MiniMaxAI--MiniMax-M1-80k" / "snapshots" / "1f3c"
    source.mkdir(parents=True)
    for path in kept.iterdir():
        (source / path.name).symlink_to(path)
    report = import_model.run(configure(tmp_path / "r"), source)
    record = json.loads((report.companions / "IMPORT.json").read_text())
    assert record["source"] == "MiniMaxAI/MiniMax-M1-80k@1f3c"
    assert not [path for path in report.companions.iterdir() if path.is_symlink()]


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf")
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model.bin\)"):
        import_model.run(configure(tmp_path / "r"), source)


def test_decay_buffers_that_contradict_each_other(tmp_path: Path) -> None:
    from m1_stages.decay import released_slopes
    from m1_stages.hf.tensor_names import decay_buffers

    slopes = [[1.5 * s for s in row] for row in released_slopes(8, 4)]
    tensors = released_tensors(RELEASED) | dict(decay_buffers(RELEASED, slopes))
    tensors["model.layers.3.self_attn.query_decay"] = tensors["model.layers.2.self_attn.query_decay"].clone()
    source = write_source(tmp_path / "hf", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"model.layers.3.self_attn.query_decay: it contradicts slope_rate"):
        import_model.run(configure(tmp_path / "r"), source)
    tensors |= {n: t.bfloat16() for n, t in decay_buffers(RELEASED, slopes)}
    source = write_source(tmp_path / "rounded", tensors=tensors)
    with pytest.raises(CheckpointError, match="it is bfloat16, which rounds decay rates"):
        import_model.run(configure(tmp_path / "r"), source)


def test_another_model_section_is_refused_with_both_values(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf")
    with pytest.raises(ConfigError) as refused:
        import_model.run(configure(tmp_path / "r", RELEASED, "model.hidden_size=64", "model.vocab_size=0"), source)
    assert (
        "model.hidden_size is 64 and the source's 48, model.vocab_size is 0 and the source's 300" in refused.value.what
    )
    assert "--print-config" in refused.value.fix
    import_model.run(configure(tmp_path / "r", RELEASED, "model.init_std=0.1", "model.aux_loss_coef=0.5"), source)


def test_a_second_import_replaces_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf", shards=1)
    resolved = configure(tmp_path / "r")
    import_model.run(resolved, source)
    run_dir = tmp_path / "r" / "run"
    (run_dir / "metrics.jsonl").write_text('{"event":"RunStopped"}\n')
    before = tree(run_dir)
    other = write_source(tmp_path / "other", tensors=released_tensors(RELEASED, seed=4))
    with pytest.raises(ConfigError, match="the run has checkpoints already"):
        import_model.run(resolved, other)
    spoil, *_ = DAMAGES["NaN"]
    spoil(other, released_tensors(RELEASED, seed=4))
    with pytest.raises(CheckpointError, match="not finite"):
        import_model.run(resolved, other, fresh=True)
    assert tree(run_dir) == before
    write_source(tmp_path / "other", tensors=released_tensors(RELEASED, seed=4))
    import_model.run(resolved, other, fresh=True)
    (now,) = CheckpointStore(run_dir / "checkpoints").committed()
    assert now.meta.extra["import"]["source"] == "other"
    (aside,) = run_dir.glob("checkpoints.before-*")
    assert (aside / "step_00000000" / "MANIFEST.json").is_file()
    assert json.loads((run_dir / "imported" / "IMPORT.json").read_text())["source"] == "other"


def test_somebody_elses_folder_is_not_replaced(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf", shards=1)
    mine = tmp_path / "r" / "run" / "imported"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that m1 did not write \(notes.txt\)"):
        import_model.run(configure(tmp_path / "r"), source)
    assert [path.name for path in (tmp_path / "r" / "run").iterdir()] == ["imported"]


def test_a_tokenizer_with_more_ids_than_rows(tmp_path: Path) -> None:
    import dataclasses

    small = dataclasses.replace(RELEASED, vocab_size=100)
    source = write_source(tmp_path / "hf", small)
    with pytest.raises(DataError, match="the source's vocab_size is 100: some have no embedding"):
        import_model.run(configure(tmp_path / "r", small), source)


@pytest.mark.parametrize(
    "wrong", ["model-00009-of-00003.safetensors", "model-00001-of-00004.safetensors", "x.safetensors"]
)
def test_an_index_alone_with_a_file_of_another_set(tmp_path: Path, wrong: str) -> None:
    from m1_stages.hf.source.dry_run import check_index

    path = write_source(tmp_path / "hf") / "model.safetensors.index.json"
    assert check_index(path, RELEASED).files == 3
    index_changed(lambda v: v["weight_map"].update({NORM: wrong}))(path.parent, {})
    with pytest.raises(CheckpointError, match=f"says that {NORM} is in {wrong}"):
        check_index(path, RELEASED)
    index_changed(lambda v: v.update(weight_map=dict.fromkeys(v["weight_map"], "x.safetensors")))(path.parent, {})
    assert check_index(path, RELEASED).files == 1


@pytest.mark.parametrize(
    ("trained", "wanted", "command"),
    [
        ([("256k", False)], "512k", "m1 pretrain --stage 256k "),
        ([("256k", True)], "128k", "m1 pretrain --stage 512k "),
        ([("128k", True)], "sft", "m1 sft --set sft.base_stage=128k "),
        ([("sft", False)], "128k", "m1 sft "),
        ([("sft", True)], "128k", "use another run.dir"),
        ([("1m", True)], "128k", "use another run.dir"),
    ],
)
def test_beside_an_import_the_message_names_a_command_that_works(
    trained: list[tuple[str, bool]], wanted: str, command: str
) -> None:
    committed: Any = [
        SimpleNamespace(meta=SimpleNamespace(stage=stage, stage_final=final), path=Path("run/checkpoints/x"))
        for stage, final in [("import", True), *trained]
    ]
    plan: Any = SimpleNamespace(stage=wanted, title=wanted, starts_from="import")
    with pytest.raises(CheckpointError) as refused:
        refuse_beside_import(plan, committed)
    assert command in f"{refused.value.fix} "
    assert (refused.value.fix == command) == (command == "use another run.dir")
    refuse_beside_import(SimpleNamespace(stage=trained[0][0], title="", starts_from="import"), committed)  # type: ignore[arg-type]


def test_a_total_size_that_is_written_as_a_float_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata": {"total_size": 912210767872.0}, "weight_map": {"a": "a.safetensors"}}')
    assert Index.read(path).total_size == 912_210_767_872
