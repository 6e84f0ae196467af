"""Imported models: bit for bit what was exported, and the function of the source's own float64 forward pass."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import packed_batch
from support.exporting import contents, make_tokenizer, relaxed, weights
from support.importing import RELEASED, configure, released_config, released_tensors, shrunken, write_source
from support.released_reference import source_logits
from torch import Tensor

from m1_stages.checkpoint import CheckpointStore, Committed
from m1_stages.config import PRESETS, ModelConfig, ParallelConfig
from m1_stages.decay import Slopes, released_slopes
from m1_stages.hf.checkpoint_tensors import CheckpointSource, MemorySource
from m1_stages.hf.export import export
from m1_stages.hf.source.config_json import read_source_config
from m1_stages.jobs import import_model

LENGTHS = (1, 255, 256, 257, 1500, 4096)


def imported(run_dir: Path, source: Path, model: ModelConfig) -> Committed:
    """Import ``source`` into a new run of ``model``."""
    import_model.run(configure(run_dir, model), source)
    (committed,) = CheckpointStore(run_dir / "run" / "checkpoints").committed()
    return committed


def differing(committed: Committed, expected: dict[str, Tensor], model: ModelConfig) -> list[str]:
    """Tensors of a checkpoint that are not bit-equal; rows of the vocabulary's padding are zero."""
    source, out = CheckpointSource(committed), []
    assert source.keys() == expected.keys()
    for name, tensor in expected.items():
        found = source.get(name)
        if "word_embeddings" in name or "output_layer" in name:
            assert not found[model.vocab_size :].any()
            found, tensor = found[: model.vocab_size], tensor[: model.vocab_size]
        if found.dtype != tensor.dtype or not torch.equal(found, tensor):
            out.append(name)
    return out


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {key: value for key, value in values.items() if not key.startswith(keys)}


DIALECTS = {
    "both": without("nothing"),
    "transformers": without("attn_type_list", "layernorm_", "rotary_dim", "rope_theta", "postnorm", "shared_"),
    "released": without("layer_types", "full_attn_", "linear_attn_", "mlp_", "rope_parameters", "block_size"),
}
"""What is left of our own ``config.json`` when only one kind of loader is served."""


@pytest.mark.parametrize("preset", PRESETS)
def test_an_export_that_is_imported_is_the_same_bit_for_bit(tmp_path: Path, preset: str) -> None:
    model = shrunken(preset, tmp_path)
    partial = model.rotary_dim != model.head_dim
    assert partial == (preset == "m1-456b")
    slopes = relaxed(model) if preset == "700m" else released_slopes(model.num_layers, model.num_heads)
    ours, tokenizer = weights(model), make_tokenizer(tmp_path / "tokenizer")
    export(MemorySource(ours), tmp_path / "hf", contents(tokenizer, model, slopes), shard_bytes=60_000)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    for dialect, keep in DIALECTS.items():
        if partial and dialect == "released":
            continue  # its rows are in transformers' order, and only rope_parameters says so
        (tmp_path / "hf" / "config.json").write_text(json.dumps(keep(written)))
        assert read_source_config(tmp_path / "hf").model == dataclasses.replace(model, aux_loss_coef=0.001), dialect
        if dialect != "both" and preset != "tiny":
            continue  # the same configuration and the same files
        committed = imported(tmp_path / dialect, tmp_path / "hf", model)
        assert differing(committed, ours, model) == [], dialect
        meta = committed.meta
        used = [layer for layer in range(model.num_layers) if not model.is_softmax(layer)]
        assert torch.equal(torch.tensor(meta.decay["slopes"])[used], torch.tensor(slopes)[used])
        assert meta.decay["policy"] == ("imported" if preset == "700m" else "fixed")
        assert meta.extra["rope_base"] == 5e4
        assert meta.extra["contexts"] == {"import": 4096}
    if preset != "700m":
        what = contents(tokenizer, model, slopes, target="text01")
        export(MemorySource(ours), tmp_path / "text01", what, shard_bytes=60_000)
        assert differing(imported(tmp_path / "from-text01", tmp_path / "text01", model), ours, model) == []


def test_released_weights_keep_their_dtypes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf")
    committed = imported(tmp_path / "run", source, RELEASED)
    expected = {
        name: tensor if name.endswith("router.weight") else tensor.bfloat16()
        for name, tensor in weights(RELEASED).items()
    }
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32, torch.bfloat16}
    assert differing(committed, expected, RELEASED) == []
    record = committed.meta.extra["import"]
    assert record["source"] == "hf"
    assert (record["tensors"], record["bytes"]) == (len(released_tensors(RELEASED)), sum(
        tensor.nbytes for tensor in released_tensors(RELEASED).values()))  # fmt: skip
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "run" / "run" / "imported" / name).read_bytes() == (source / name).read_bytes()
    assert committed.meta.extra["tokenizer_sha256"] == record["files"]["tokenizer.json"]


def test_logits_are_those_of_the_source(tmp_path: Path) -> None:
    """The released layout: half of the channels rotated, other values of alpha and beta than the usual ones."""
    model = dataclasses.replace(RELEASED, alpha=1.75, beta=0.8)
    source = write_source(tmp_path / "hf", model, tensors=released_tensors(model, dtype=torch.float32))
    committed = imported(tmp_path / "run", source, model)
    tokens = torch.randint(0, model.vocab_size, (LENGTHS[-1],), generator=torch.Generator().manual_seed(4))
    expected = source_logits(source, tokens)
    assert expected.abs().max() > 2.5, "the comparison needs logits of trained-like size"
    ours = model_logits(committed, model, committed.meta.decay["slopes"], tokens)
    for length, logits in ours.items():
        assert logits.shape == (length, model.vocab_size)
        assert (logits - expected[:length]).abs().max() < 1e-4, length
    assert (ours[257] - ours[4096][:257]).abs().max() < 1e-5, "the reference is causal, and so must the model be"


def model_logits(committed: Committed, model: ModelConfig, slopes: Slopes, tokens: Tensor) -> dict[int, Tensor]:
    """Logits of our model for the first 1, 255, ... tokens."""
    from m1_stages.runtime import device, parallel

    parallel.start(ParallelConfig(), device=device.use("cpu"), seed=0)
    try:
        from m1_stages.model import build_model

        base = committed.meta.extra["rope_base"]
        built = build_model(model, parallel=ParallelConfig(), rope_base=base)[0].eval()
        built.set_slopes(slopes)
        source = CheckpointSource(committed)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                parameter.copy_(source.get(name))
            return {n: built(packed_batch(tokens[:n], [n]), logits=True)[0].double() for n in LENGTHS}
    finally:
        parallel.stop()


PEAK = """
from pathlib import Path
from support.importing import configure
from m1_stages.config import ModelConfig
from m1_stages.jobs import import_model
from m1_stages.hf.source import commit

model = ModelConfig(**{model!r})
small = ModelConfig(**{small!r})
folder = Path({folder!r})
import_model.run(configure(folder / "warm", small), folder / "small")  # all imports, all buffers
def resident(kind):
    return int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts again from the present one
before = resident("VmRSS")
import_model.run(configure(folder / "measured", model), folder / "large")
print("peak", resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_under_two_tensors_and_a_shard(tmp_path: Path) -> None:
    """On a model with one large tensor, a hundred times everything else together: the embedding, and the head like it."""
    small = dataclasses.replace(RELEASED, hidden_size=16, num_layers=8, expert_hidden_size=8, vocab_size=100)
    model = dataclasses.replace(small, vocab_size=1_600_100)
    write_source(tmp_path / "small", small, with_tokenizer=False)
    tensors = released_tensors(small)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(model.vocab_size, model.hidden_size, dtype=torch.bfloat16)
    write_source(tmp_path / "large", model, tensors=tensors, shards=2, with_tokenizer=False)
    largest = tensors["lm_head.weight"].nbytes
    shard = max(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert shard < 1.05 * largest
    del tensors
    script = PEAK.format(model=dataclasses.asdict(model), small=dataclasses.asdict(small), folder=str(tmp_path))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = 1024 * int(done.stdout.split("peak ")[1])
    assert peak < 2 * largest + shard + (8 << 20), (peak / largest, shard / largest)
    assert peak > 0.9 * largest, "it was measured"
    (committed,) = CheckpointStore(tmp_path / "measured" / "run" / "checkpoints").committed()
    assert CheckpointSource(committed).get("output_layer.weight")[: model.vocab_size].eq(1).all()


def test_configuration_keys_are_those_of_the_released_file() -> None:
    """The support's configuration is the published one, by its values at the released size."""
    c = released_config(dataclasses.replace(RELEASED, num_layers=80, num_heads=64))
    assert len(c) == 38
    assert c["layernorm_mlp_alpha"] == 3.5565588200778455
    assert c["attn_type_list"] == ([0] * 7 + [1]) * 10
