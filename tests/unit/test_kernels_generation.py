"""Kernels that generation uses: through Triton's interpreter on a CPU, against PyTorch and against the training kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from m1_kernels import (
    BackendChoice,
    causal_attention,
    choose_tokens,
    chunk_attention,
    decode_attention,
    lightning_attention,
    lightning_decode_layer,
    lightning_prefill_layer,
    mix_experts,
    mix_local_experts,
    route,
)
from m1_kernels.lightning import carried
from m1_kernels.moe import decode_triton as few
from m1_kernels.sampling import choose_triton
from m1_kernels.softmax_attention import decode_triton as split_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("programs", [1, 12, 1024])
@pytest.mark.parametrize(("heads", "kv", "dim"), [(6, 2, 16), (4, 4, 24), (8, 1, 32)])
def test_decode_attention_reads_each_slot_up_to_its_length(
    programs: int, heads: int, kv: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_keys, "PROGRAMS", programs)
    lengths = torch.tensor([1, 64, 65, 300, 131], device=DEVICE)
    q, k, v = random(5, heads, dim), random(5, 300, kv, dim), random(5, 300, kv, dim, seed=1)
    for slot, length in enumerate(lengths.tolist()):
        k[slot, length:], v[slot, length:] = 1e4, float("nan")
    expected = torch.cat(
        [
            causal_attention(F.pad(q[i : i + 1], (0, 0, 0, 0, n - 1, 0))[None], k[i : i + 1, :n], v[i : i + 1, :n])[
                0, -1:
            ]
            for i, n in enumerate(lengths.tolist())
        ]
    )
    assert largest(split_keys.decode_attention_triton(q, k, v, lengths), expected) < 1e-5
    assert largest(decode_attention(q, k.nan_to_num(), v.nan_to_num(), lengths), expected) < 1e-5


def test_attention_over_a_cached_prefix_is_attention_over_the_whole_text() -> None:
    starts, lengths, slots = (0, 300, 17), (5, 1, 280), (2, 0, 3)
    keys, values = random(4, 320, 2, 8), random(4, 320, 2, 8, seed=1)
    q = random(sum(lengths), 4, 8)
    got = chunk_attention(q, keys, values, slots=slots, starts=starts, lengths=lengths).split(lengths)
    for out, asked, start, length, slot in zip(got, q.split(lengths), starts, lengths, slots, strict=True):
        whole = torch.cat([random(start, 4, 8), asked]) if start else asked
        seen = (x[slot : slot + 1, : start + length] for x in (keys, values))
        assert largest(out, causal_attention(whole[None], *seen)[0, start:]) < 1e-5
    with pytest.raises(ValueError, match="do not fit"):
        chunk_attention(q, keys, values, slots=slots, starts=(0, 320, 17), lengths=lengths)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_lightning_layer_goes_on_from_its_state(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "choose_backend", lambda *_: BackendChoice(backend, "test"))
    lengths, heads, dim, eps = (1, 40, 16), 2, 16, 1e-6
    parts, weight, rates = (
        random(57, heads, 4, dim),
        random(heads * dim).abs(),
        -torch.tensor([0.5, 1e-3], device=DEVICE),
    )
    state = random(3, heads, dim, dim)
    q, k, v, gate = parts.unbind(2)
    attended, expected_state = lightning_attention(
        F.silu(q)[None], F.silu(k)[None], F.silu(v)[None], rates,
        doc_lengths=lengths, initial_state=state, output_final_state=True, backend="reference",
    )  # fmt: skip
    flat = attended[0].flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps) * weight
    expected = normed * torch.sigmoid(gate.flatten(1))
    assert expected_state is not None
    out, final = lightning_prefill_layer(parts, weight, rates, state.clone(), doc_lengths=lengths, eps=eps)
    assert largest(out, expected) < 1e-5
    assert largest(final, expected_state) < 1e-5
    # Token by token: the second document alone.
    one = state[1:2].clone()
    steps = [lightning_decode_layer(parts[t : t + 1], weight, rates, one, eps=eps) for t in range(1, 41)]
    assert largest(torch.cat(steps), expected[1:41]) < 1e-5
    assert largest(one, expected_state[1:2]) < 1e-5


@pytest.mark.parametrize("tokens", [1, 23, 150])  # 150: an expert has more slots than are multiplied together
def test_experts_of_few_tokens(tokens: int) -> None:
    experts, width, inner = 4, 48, 40
    x, w13, w2 = random(tokens, width), random(experts, 2, inner, width), random(experts, width, inner)
    logits = random(tokens, experts)
    logits[0] = torch.tensor([0.0, 9.0, -1.0, 8.0])
    weights, index = route(logits, 2)
    assert index[0].tolist() == [1, 3]
    assert weights[0].tolist() == pytest.approx([1 / (1 + 2.718281828**-1), 1 / (1 + 2.718281828)], abs=1e-6)
    fast_weights, fast_index = few.route_triton(logits, 2)
    assert torch.equal(fast_index, index)
    assert largest(fast_weights, weights) < 1e-6
    expected = mix_experts(x, w13, w2, weights, index, keep=False)
    assert largest(few.mix_few_triton(x, w13, w2, weights, index, 0), expected) < 1e-5
    for share in (few_share, local_share):  # two ranks with experts 0 to 2, and 3
        parts = [share(x, w13[a:b], w2[a:b], weights, index, a) for a, b in ((0, 3), (3, 4))]
        assert largest(parts[0] + parts[1], expected) < 1e-5
        assert float(parts[1][(index == 3).sum(1) == 0].abs().sum()) == 0.0


def few_share(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, first: int) -> Tensor:
    return few.mix_few_triton(x, w13, w2, weights, index, first)


def local_share(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, first: int) -> Tensor:
    return mix_local_experts(x, w13, w2, weights, index, first=first, num_experts=4)


ORDER = ("temperature", "top_k", "top_p", "uniform", "banned", "lengths", "from_length", "forced")


def test_tokens_are_chosen_as_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_triton, "BLOCK", 16)  # an interpreted block costs the same at any size: three of them
    rows, vocab = 12, 45
    logits = (random(rows, vocab).cpu() * 3).contiguous()
    logits[3] -= 20  # a threshold below zero
    logits[:, 7] = logits[:, 39] = logits.amax(1)  # ties for the highest, in one lane of two blocks
    logits[[1, 11], 42] = torch.nextafter(
        logits[[1, 11], 7], torch.tensor(0.0)
    )  # left out by the last bit of a threshold
    logits[5, 20:] = float("-inf")
    number = torch.arange(rows)
    asked = {
        "temperature": torch.tensor([0, 1, 0.5, 1, 1, 2, 1, 1, 0, 1, 0.7, 1], dtype=torch.float32),
        "top_k": torch.tensor([0, 0, 0, 20, 0, 0, 1, 5, 3, 0, vocab, 2]),
        "top_p": torch.tensor([1, 1e-9, 1, 1, 0.8, 1, 1, 0.5, 0.5, 1e-9, 0.99, 1], dtype=torch.float64),
        "banned": torch.stack([number * 0 + 7, number * 0 + 39, number], dim=1),
        "lengths": number + 5,
        "from_length": torch.where(number % 3 == 0, number + 6, number + 5),
        "forced": torch.where(number == 9, 9, -1),
    }
    logprobs = logits.log_softmax(1)
    edges = torch.tensor([0.0, 0.3, 0.77, 1.0], dtype=torch.float64)  # 1: rounding can bring the highest number there
    for shift in (0, 2):
        asked["uniform"] = edges[(number + shift) % 4]
        token, logprob = choose_tokens(logits.clone(), **asked)
        on_device = [x.to(DEVICE) for x in (logits.clone(), *(asked[name] for name in ORDER))]
        got, got_logprob = choose_triton.choose_tokens_triton(*on_device)
        assert got.tolist() == token.tolist()
        assert float((got_logprob.cpu() - logprobs.gather(1, token[:, None])[:, 0]).abs().max()) < 1e-5
        assert float((got_logprob.cpu() - logprob).abs().max()) < 1e-5
        assert (token[0], token[8], token[9]) == (
            logits[0].index_fill(0, torch.tensor([0, 7, 39]), -9e9).argmax(),
            7,
            9,
        )
    logits[2, 3] = float("nan")
    on_device[0] = logits.to(DEVICE)
    assert choose_triton.choose_tokens_triton(*(x[:3] for x in on_device))[1].isnan().nonzero().tolist() == [[2]]
