"""The model against independent judges: transformers, a float64 quadratic reference, and its own isolation promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import packed_batch

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.config.load import load_config
from m1_stages.decay import Slopes, released_slopes
from m1_stages.hf.tensor_names import our_shapes, to_released
from m1_stages.model import build_model
from m1_stages.plan.shapes import count_parameters, lightning_sublayer, softmax_sublayer
from m1_stages.runtime import device, parallel

SHAPE = ModelConfig(
    hidden_size=64, num_layers=8, num_heads=4, head_dim=16, num_kv_heads=2, rotary_dim=16, num_experts=8,
    expert_hidden_size=96, vocab_size=500, init_std=0.15,
)  # fmt: skip
"""Weights of trained-like scale: with 0.02 the norms' epsilons and the slopes hardly show in the logits."""
SLOPES = released_slopes(SHAPE.num_layers, SHAPE.num_heads)
ROPE = 1e4


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


def built(shape: ModelConfig = SHAPE, slopes: Slopes = SLOPES) -> Any:
    model = build_model(shape, parallel=ParallelConfig(), rope_base=ROPE, seed=7)[0].eval()
    model.set_slopes(slopes)
    return model


def transformers_twin(model: Any, shape: ModelConfig = SHAPE) -> Any:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    alpha = shape.residual_alpha
    config = MiniMaxConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.expert_hidden_size, num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token, rms_norm_eps=shape.norm_eps, block_size=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE},
        layer_types=["full_attention" if shape.is_softmax(n) else "linear_attention" for n in range(shape.num_layers)],
        full_attn_alpha_factor=alpha, linear_attn_alpha_factor=alpha, mlp_alpha_factor=alpha, tie_word_embeddings=False,
    )  # fmt: skip
    twin = MiniMaxForCausalLM(config).eval()
    released: dict[str, torch.Tensor] = {}
    ours = model.state_dict()
    for name, expected in our_shapes(shape).items():
        tensor = ours[name].view(expected)
        released.update({key: value.contiguous() for key, value in to_released(name, tensor, shape)})
    fused = twin.state_dict()
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        experts = [f"{prefix}block_sparse_moe.experts.{e}." for e in range(shape.num_experts)]
        released[f"{prefix}mlp.gate.weight"] = released.pop(f"{prefix}block_sparse_moe.gate.weight")
        w1, w3, w2 = (torch.stack([released.pop(f"{e}{w}.weight") for e in experts]) for w in ("w1", "w3", "w2"))
        released[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        released[f"{prefix}mlp.experts.down_proj"] = w2
    buffers = {key for key in fused if key.endswith(("slope_rate", "query_decay", "key_decay", "diagonal_decay"))}
    missing, unexpected = twin.load_state_dict(released, strict=False)
    assert not unexpected
    assert set(missing) <= buffers
    return twin


@pytest.fixture(scope="module")
def pair(one_process: None) -> tuple[Any, Any]:
    model = built()
    return model, transformers_twin(model)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1500])
def test_logits_equal_transformers(pair: tuple[Any, Any], length: int) -> None:
    model, twin = pair
    tokens = torch.randint(0, SHAPE.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        ours, theirs = model(packed_batch(tokens, [length]), logits=True), twin(tokens[None]).logits
    assert ours.dtype == torch.float32
    assert theirs.abs().max() > 3.0, "the comparison needs logits of trained-like size"
    assert (ours - theirs).abs().max() < 1e-4


def test_a_pack_of_documents_equals_transformers_on_each_alone(pair: tuple[Any, Any]) -> None:
    model, twin = pair
    lengths = [300, 1, 64, 135]
    tokens = torch.randint(0, SHAPE.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = model(packed_batch(tokens, lengths), logits=True)[0].split(lengths)
        theirs = [twin(part[None]).logits[0] for part in tokens.split(lengths)]
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_one_reversed_layer_of_slopes_would_show(pair: tuple[Any, Any]) -> None:
    model, twin = pair
    tokens = torch.randint(0, SHAPE.vocab_size, (300,), generator=torch.Generator().manual_seed(6))
    wrong = [list(reversed(row)) if layer == 3 else row for layer, row in enumerate(SLOPES)]
    model.set_slopes(wrong)
    try:
        with torch.no_grad():
            difference = (model(packed_batch(tokens, [300]), logits=True) - twin(tokens[None]).logits).abs().max()
    finally:
        model.set_slopes(SLOPES)
    assert difference > 1e-2


def test_loss_is_the_cross_entropy_of_the_logits(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    tokens = torch.randint(0, SHAPE.vocab_size, (400,), generator=torch.Generator().manual_seed(9))
    batch = packed_batch(tokens, [250, 150])
    with torch.no_grad():
        loss, logits = model(batch), model(batch, logits=True)
    expected = torch.nn.functional.cross_entropy(logits[0].double(), batch.labels[0], reduction="none")
    assert (loss[0].double() - expected).abs().max() < 1e-5


def test_lightning_layer_equals_a_float64_quadratic_reference() -> None:
    model = built()
    layer = model.decoder.layers[2].self_attention
    hidden = torch.randn(700, 1, SHAPE.hidden_size, generator=torch.Generator().manual_seed(2))
    lengths = [400, 300]
    from m1_stages.model.packed_seq_params import PackedSeqParams

    packing = PackedSeqParams.of(packed_batch(torch.zeros(700, dtype=torch.long), lengths), layer.pg_collection.cp)
    with torch.no_grad():
        ours = layer(hidden, packed_seq_params=packing)[0][:, 0]
    x, heads, dim = hidden[:, 0].double(), SHAPE.num_heads, SHAPE.head_dim
    weights = layer.linear_in.weight.double().view(heads, 4, dim, -1)
    q, k, v, gate = (torch.einsum("th,ndh->tnd", x, weights[:, n]) for n in range(4))
    q, k, v = (torch.nn.functional.silu(y) for y in (q, k, v))
    out = torch.zeros_like(v)
    for start, end in ((0, 400), (400, 700)):
        t = torch.arange(end - start, dtype=torch.float64)
        distance = t[:, None] - t[None, :]
        for head in range(heads):
            decay = torch.where(distance >= 0, torch.exp(-SLOPES[2][head] * distance.clamp(min=0)), 0.0)
            out[start:end, head] = (q[start:end, head] @ k[start:end, head].T * decay) @ v[start:end, head]
    flat = out.reshape(700, -1)
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6) * layer.norm.weight.double()
    expected = (flat * torch.sigmoid(gate.reshape(700, -1))) @ layer.linear_out.weight.double().T
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("changed", [0, 57, 199])
def test_a_changed_token_never_reaches_another_document(changed: int) -> None:
    """Bit for bit in the outputs of both attention kinds; logits within the rounding of regrouped experts."""
    model = built()
    lengths = [200, 180, 70]
    tokens = torch.randint(0, SHAPE.vocab_size, (450,), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[changed] = (other[changed] + 1) % SHAPE.vocab_size
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    runs = []
    for ids in (tokens, other):
        records: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module: Any, args: Any, output: Any, records: Any = records) -> None:
            records.append((args[0][200:, 0].clone(), output[0][200:, 0].clone()))

        hooks = [layer.self_attention.register_forward_hook(keep) for layer in model.decoder.layers]
        with torch.no_grad():
            runs.append(model(packed_batch(ids, lengths), logits=True)[0])
        for hook in hooks:
            hook.remove()
        seen.append(records)
    assert not torch.equal(runs[0][changed:200], runs[1][changed:200]), "the change must matter in its own document"
    kinds = set()
    for layer, ((input_a, output_a), (input_b, output_b)) in zip(
        model.decoder.layers, zip(*seen, strict=True), strict=True
    ):
        if torch.equal(input_a, input_b):
            kinds.add(type(layer.self_attention).__name__)
            assert torch.equal(output_a, output_b), layer.layer_number
    assert "LightningAttention" in kinds
    difference = (runs[0][200:] - runs[1][200:]).abs().max() / runs[0].abs().max()
    assert difference < 1e-6


@pytest.mark.parametrize("kind", ["LightningAttention", "SoftmaxAttention"])
def test_attention_outputs_of_other_documents_are_bit_equal_given_equal_inputs(kind: str) -> None:
    from m1_stages.model.packed_seq_params import PackedSeqParams

    model = built()
    layer = next(x.self_attention for x in model.decoder.layers if type(x.self_attention).__name__ == kind)
    lengths = [130, 1, 300, 64]
    packing = PackedSeqParams.of(packed_batch(torch.zeros(495, dtype=torch.long), lengths), layer.pg_collection.cp)
    hidden = torch.randn(495, 1, SHAPE.hidden_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = layer(hidden, packed_seq_params=packing)[0]
        for position in (0, 64, 129):
            changed = hidden.clone()
            changed[position] += 1.0
            after = layer(changed, packed_seq_params=packing)[0]
            assert torch.equal(after[130:], before[130:])
            assert not torch.equal(after[:130], before[:130])


def test_released_shape_counts(tmp_path: Path) -> None:
    path = tmp_path / "m1.toml"
    path.write_text('preset = "m1-456b"')
    shape = load_config(path).config.model
    counts = count_parameters(shape)
    assert counts.total == 456_089_655_296
    assert counts.active == 45_944_920_064
    assert (lightning_sublayer(shape), softmax_sublayer(shape)) == (251_666_432, 113_246_208)
    model = build_model(shape, parallel=ParallelConfig(), precision="bf16", rope_base=1e7, device="meta")[0]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == counts.total


def test_initial_weights_and_recomputation_do_not_change_the_function() -> None:
    tokens = torch.randint(0, SHAPE.vocab_size, (200,), generator=torch.Generator().manual_seed(8))
    grads = []
    for recompute, offload in ((False, False), (True, False), (True, True)):
        chunks = build_model(SHAPE, parallel=ParallelConfig(), rope_base=ROPE, seed=7)
        chunks.set_recompute(recompute, offload=offload)
        model = chunks[0].train()
        model.set_slopes(SLOPES)
        model(packed_batch(tokens, [120, 80])).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        load = chunks.routing_stats().expert_load
        assert [sum(row) for row in load] == pytest.approx([1.0] * 8)
    assert all(torch.equal(grads[0][name], other[name]) for other in grads[1:] for name in grads[0])
    other = build_model(dataclasses.replace(SHAPE), parallel=ParallelConfig(), rope_base=ROPE, seed=8)[0]
    assert not torch.equal(other.output_layer.weight, model.output_layer.weight)
