"""Exports against an independent float64 forward pass, transformers, and the Megatron model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.exporting import (
    MODEL,
    ROPE_BASE,
    compute_in_this_process,
    largest_difference,
    make_checkpoint,
    make_tokenizer,
    prepare_tokenizer,
    relaxed,
    stored,
    weights,
    write,
)
from torch import Tensor

from m1_stages.checkpoint import Committed
from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config import ModelConfig
from m1_stages.config.load import load_config
from m1_stages.decay import Slopes, released_slopes
from m1_stages.errors import CheckpointError, ConfigError
from m1_stages.hf.checkpoint_tensors import CheckpointSource, MemorySource
from m1_stages.hf.tensor_names import from_released, our_shapes, to_released
from m1_stages.hf.verification.trained import trained_logits
from m1_stages.hf.verification.transformers_loading import generate, transformers_logits
from m1_stages.jobs.export import Export, choose_checkpoint
from m1_stages.jobs.export_verification import verify_export

LENGTH = 600


def oracle(model: ModelConfig, w: dict[str, Tensor], slopes: Slopes, tokens: Tensor) -> Tensor:
    """Logits in float64 from our layout: quadratic lightning attention, explicit loops, no code of ours."""
    c, t = model, tokens.shape[1]
    w = {name: tensor.double() for name, tensor in w.items()}
    alpha = (2 * c.num_layers) ** 0.25
    position = torch.arange(t, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        half = c.rotary_dim // 2
        out = x.clone()
        for i in range(half):
            angle = position * ROPE_BASE ** (-2 * i / c.rotary_dim)
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * angle.cos()[:, None] - b * angle.sin()[:, None]
            out[..., i + half] = b * angle.cos()[:, None] + a * angle.sin()[:, None]
        return out

    def lightning(layer: int, x: Tensor) -> Tensor:
        p = f"decoder.layers.{layer}.self_attention."
        rows = w[p + "linear_in.weight"].view(c.num_heads, 4, c.head_dim, c.hidden_size)
        heads, gates = [], []
        for head in range(c.num_heads):
            q, k, v = (F.silu(x @ rows[head, i].T) for i in range(3))
            gates.append(torch.sigmoid(x @ rows[head, 3].T))
            decay = torch.exp(-slopes[layer][head] * (position[:, None] - position)).tril()
            heads.append((q @ k.T * decay) @ v)
        o = norm(torch.cat(heads, -1), w[p + "norm.weight"], 1e-6)
        return (torch.cat(gates, -1) * o) @ w[p + "linear_out.weight"].T

    def softmax(layer: int, x: Tensor) -> Tensor:
        p, per = f"decoder.layers.{layer}.self_attention.", c.num_heads // c.num_kv_heads
        rows = w[p + "linear_qkv.weight"].view(c.num_kv_heads, per + 2, c.head_dim, c.hidden_size)
        outs = []
        for group in range(c.num_kv_heads):
            q, k, v = rows[group, :per], rows[group, per], rows[group, per + 1]
            keys = rotate((x @ k.T)[:, None])[:, 0]
            for head in range(per):
                scores = rotate((x @ q[head].T)[:, None])[:, 0] @ keys.T / c.head_dim**0.5
                scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
                outs.append(scores.softmax(-1) @ (x @ v.T))
        return torch.cat(outs, -1) @ w[p + "linear_out.weight"].T

    def experts(layer: int, x: Tensor) -> Tensor:
        p = f"decoder.layers.{layer}.mlp."
        top, chosen = (x @ w[p + "router.weight"].T).softmax(-1).topk(c.experts_per_token)
        out = torch.zeros_like(x)
        for row in range(t):
            for share, e in zip(top[row] / top[row].sum(), chosen[row].tolist(), strict=True):
                gate, up = w[p + "experts.w13"][e]
                out[row] += share * (w[p + "experts.w2"][e] @ (F.silu(gate @ x[row]) * (up @ x[row])))
        return out

    h = w["embedding.word_embeddings.weight"][tokens[0]]
    for layer in range(c.num_layers):
        x = norm(h, w[f"decoder.layers.{layer}.attn_norm.weight"])
        h = alpha * x + (softmax if layer == c.num_layers - 1 else lightning)(layer, x)
        y = norm(h, w[f"decoder.layers.{layer}.mlp_norm.weight"])
        h = alpha * y + experts(layer, y)
    logits = norm(h, w["decoder.final_layernorm.weight"]) @ w["output_layer.weight"].T
    return logits[None, :, : c.vocab_size]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def test_names_round_trip_bit_exact() -> None:
    ours = weights(MODEL)
    released = {n: t for name, tensor in ours.items() for n, t in to_released(name, tensor, MODEL)}
    assert released["model.layers.0.self_attn.qkv_proj.weight"].shape == (4 * 3 * 16, 48)
    assert released["model.layers.3.self_attn.k_proj.weight"].shape == (2 * 16, 48)
    assert released["model.layers.2.block_sparse_moe.experts.3.w2.weight"].shape == (48, 40)
    assert len(released) == 3 + 4 * (2 + 1 + 4 * 3) + 3 * 4 + 4
    for name, tensor in ours.items():
        back = from_released(name, released.__getitem__, MODEL)
        rows = MODEL.vocab_size if "word_embeddings" in name or "output_layer" in name else None
        assert torch.equal(back[:rows], tensor[:rows]), name
        assert back.shape == tensor.shape
        assert rows is None or not back[rows:].any()
    with pytest.raises(KeyError):
        list(to_released("decoder.layers.0.self_attention.linear_qkv.bias", torch.zeros(1), MODEL))


@pytest.mark.parametrize(("rotary_dim", "custom", "portable"), [(16, False, True), (16, True, False), (8, True, False)])
def test_transformers_computes_the_same(
    tmp_path: Path, tokenizer_dir: Path, tokens: Tensor, rotary_dim: int, custom: bool, portable: bool
) -> None:
    model = dataclasses.replace(MODEL, rotary_dim=rotary_dim)
    slopes = relaxed(model) if custom else released_slopes(model.num_layers, model.num_heads)
    report = write(tmp_path / "hf", tokenizer_dir, model, slopes)
    expected = oracle(model, weights(model), slopes, tokens)
    assert largest_difference(tmp_path / "hf", expected, tokens) <= 1e-4
    assert expected.abs().max() > 2.0
    assert report.portable is portable
    assert any("transformers only" in note for note in report.notes) is not portable
    assert any(name.endswith("slope_rate") for name in stored(tmp_path / "hf")) is custom
    if custom:
        wrong = oracle(model, weights(model), released_slopes(model.num_layers, model.num_heads), tokens)
        assert largest_difference(tmp_path / "hf", wrong, tokens) > 0.1


def test_three_of_four_buffers_are_not_enough(tmp_path: Path, tokenizer_dir: Path, tokens: Tensor) -> None:
    out = tmp_path / "hf"
    slopes = relaxed(MODEL)
    write(out, tokenizer_dir, slopes=slopes, shard_bytes=1 << 40)
    expected = oracle(MODEL, weights(MODEL), slopes, tokens)
    for dropped in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        kept = {name: t for name, t in stored(out).items() if not name.endswith(dropped)}
        folder = tmp_path / dropped
        folder.mkdir()
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes((out / "config.json").read_bytes())
        assert largest_difference(folder, expected, tokens) > 1e-3, dropped


def test_the_megatron_model_agrees(tmp_path: Path, tokenizer_dir: Path, tokens: Tensor) -> None:
    source, slopes = MemorySource(weights(MODEL)), relaxed(MODEL)
    ours = trained_logits(source, MODEL, slopes=slopes, rope_base=ROPE_BASE, tokens=tokens)
    write(tmp_path / "hf", tokenizer_dir, slopes=slopes, source=source)
    assert largest_difference(tmp_path / "hf", ours, tokens) <= 1e-4
    assert float((ours.double() - oracle(MODEL, weights(MODEL), slopes, tokens)).abs().max()) <= 1e-4
    with pytest.raises(ValueError, match="first block"):
        transformers_logits(tmp_path / "hf", tokens[:, :256])


def test_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    report = write(tmp_path / "hf", tokenizer_dir, dtype="bf16", slopes=relaxed(MODEL))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {
        "architectures": ["MiniMaxForCausalLM"], "model_type": "minimax", "dtype": "bfloat16", "postnorm": True,
        "rotary_dim": 16, "head_dim": 16, "rope_theta": ROPE_BASE, "sliding_window": None, "block_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE}, "shared_intermediate_size": 0,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "attn_type_list": [0, 0, 0, 1],
        "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 5, "tie_word_embeddings": False,
        "layernorm_mlp_alpha": 8**0.25, "full_attn_alpha_factor": 8**0.25, "linear_attn_beta_factor": 1.0,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    tensors = stored(tmp_path / "hf")
    assert {t.dtype for name, t in tensors.items() if name.endswith(".weight")} == {torch.bfloat16}
    assert {t.dtype for name, t in tensors.items() if not name.endswith(".weight")} == {torch.float32}
    assert len(tensors) == report.tensors
    assert len(report.files) > 3
    assert max((tmp_path / "hf" / f).stat().st_size for f in report.files[:3]) < 170_000
    assert tensors["model.embed_tokens.weight"].shape == (300, 48)
    assert torch.equal(tensors["lm_head.weight"], weights(MODEL)["output_layer.weight"][:300].bfloat16())
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("32k -> 128k", "12,345", "ab" * 32, "relax", "transformers only", "step_00000010"):
        assert fact in card
    assert "<beginning_of_sentence>" in (tmp_path / "hf" / "chat_template.jinja").read_text()


def test_every_tensor_is_aligned(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Odd numbers of bf16 values come before fp32 decay buffers; readers map the files and view them in their dtype."""
    model = dataclasses.replace(MODEL, hidden_size=47, vocab_size=299)
    report = write(tmp_path / "hf", tokenizer_dir, model, relaxed(model), dtype="bf16", shard_bytes=1 << 40)
    for name in report.files:
        data = (tmp_path / "hf" / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert length % 8 == 0
        assert len({entry["dtype"] for entry in header.values()}) == 1
    assert len(report.files) == 2
    assert torch.equal(
        stored(tmp_path / "hf")["model.norm.weight"], weights(model)["decoder.final_layernorm.weight"].bfloat16()
    )


def test_the_vocabulary_padding_is_cut_off(tmp_path: Path, tokenizer_dir: Path) -> None:
    poisoned = weights(MODEL)
    assert poisoned["output_layer.weight"].shape[0] == 384
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        poisoned[name][300:] = float("nan")
    write(tmp_path / "hf", tokenizer_dir, source=MemorySource(poisoned))
    assert all(bool(t.isfinite().all()) for t in stored(tmp_path / "hf").values())


def test_generates_from_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    write(tmp_path / "hf", tokenizer_dir)
    text = generate(tmp_path / "hf", ["one two"], max_new_tokens=8)
    assert text == generate(tmp_path / "hf", ["one two"], max_new_tokens=8)
    assert text


def test_refusals_leave_nothing_behind(tmp_path: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "hf"
    with pytest.raises(ConfigError, match="epsilon"):
        write(out, tokenizer_dir, dataclasses.replace(MODEL, lightning_norm_eps=1e-5))
    some = weights(MODEL)
    del some["decoder.layers.2.mlp.experts.w2"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.w2"):
        write(out, tokenizer_dir, source=MemorySource(some))
    other = weights(MODEL) | {"decoder.layers.3.mlp.router.weight": torch.zeros(5, 48)}
    with pytest.raises(CheckpointError, match=r"shape \(5, 48\)"):
        write(out, tokenizer_dir, source=MemorySource(other))
    assert list(tmp_path.iterdir()) == []

    write(out, tokenizer_dir)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        write(out, tokenizer_dir)
    with pytest.raises(CheckpointError):
        write(out, tokenizer_dir, source=MemorySource(other), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    write(out, tokenizer_dir, dtype="bf16", overwrite=True)
    assert (out / "config.json").read_bytes() != before["config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Committed, dict[str, Tensor]]:
    return make_checkpoint(tmp_path_factory.mktemp("run"))


def test_a_checkpoint_is_read_tensor_by_tensor(committed: tuple[Committed, dict[str, Tensor]]) -> None:
    checkpoint, expected = committed
    source = CheckpointSource(checkpoint)
    assert expected.keys() == our_shapes(MODEL).keys() <= source.keys()
    for name, shape in our_shapes(MODEL).items():
        assert source.get(name).shape == shape
        assert torch.equal(source.get(name), expected[name]), name


def test_a_damaged_checkpoint_is_refused(committed: tuple[Committed, dict[str, Tensor]], tmp_path: Path) -> None:
    shutil.copytree(committed[0].path, tmp_path / "step_00000010")
    file = max((tmp_path / "step_00000010").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not what was written"):
        CheckpointSource(read_manifest(tmp_path / "step_00000010"))


@pytest.mark.usefixtures("here")
def test_choosing_and_exporting_a_checkpoint(
    committed: tuple[Committed, dict[str, Tensor]], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "m1.toml"
    config.write_text(f'preset = "tiny"\n[run]\ndir = "{committed[0].path.parent.parent}"\n[export]\ndtype = "bf16"\n')
    resolved = load_config(config)
    prepare_tokenizer(resolved.path(resolved.config.data.out), tokenizer_dir)
    for stage in (None, "128k"):
        assert choose_checkpoint(resolved, stage=stage, checkpoint=None).path == committed[0].path
    with pytest.raises(CheckpointError, match=r"stage 1m \(finished stages: 128k\)"):
        choose_checkpoint(resolved, stage="1m", checkpoint=None)
    with pytest.raises(ConfigError, match="2m"):
        choose_checkpoint(resolved, stage="2m", checkpoint=None)

    chosen = choose_checkpoint(resolved, stage=None, checkpoint=committed[0].path)
    other = dataclasses.replace(chosen.meta, extra={**chosen.meta.extra, "tokenizer_sha256": "5" * 64})
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        Export(resolved, dataclasses.replace(chosen, meta=other))
    job = Export(resolved, chosen)
    assert [(stage.name, stage.row_tokens) for stage in job.contents.lineage.stages] == [("32k", 128), ("128k", 512)]
    report = job.write(tmp_path / "hf", overwrite=False)
    assert report.portable
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e6, 512)
    seen = verify_export(job, tmp_path / "hf")
    assert (seen.tensors, seen.difference.positions, seen.sentences) == (report.tensors, 3 * 600, 4)
    assert seen.difference.largest < 1e-5 < seen.difference.largest_logit

    def wrong(name: str, tensor: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """A wrong conversion: what it writes, it also expects."""
        for exported, value in to_released(name, tensor, model):
            yield exported, value.flip(0) if exported == "lm_head.weight" else value

    monkeypatch.setattr("m1_stages.hf.contents.to_exported", wrong)
    job.write(tmp_path / "wrong", overwrite=False)
    with pytest.raises(CheckpointError, match="differ from the trained model's"):
        verify_export(job, tmp_path / "wrong")


def test_only_an_export_of_ours_is_overwritten(tmp_path: Path, tokenizer_dir: Path) -> None:
    def listing() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")  # somebody's download
    before = listing()
    for out in (run, tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "hub", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="the export folder"):
            write(out, tokenizer_dir, overwrite=True)
    assert listing() == before
    assert (tmp_path / "link").is_symlink()
    out = tmp_path / "hf"
    write(out, tokenizer_dir)
    write(out, tokenizer_dir, overwrite=True)
    (out / "notes.txt").write_text("mine")
    before = listing()
    with pytest.raises(ConfigError, match=r"also has what m1 did not write \(notes.txt\)"):
        write(out, tokenizer_dir, overwrite=True)
    assert listing() == before
