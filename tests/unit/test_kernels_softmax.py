"""Packed causal softmax attention and rotary embedding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m1_kernels import apply_rotary, causal_attention
from m1_kernels.softmax_attention.attention import choose_softmax_backend

LENGTHS = (1, 5, 64, 1, 130, 5)


def inputs(dtype: torch.dtype = torch.float32, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = (torch.randn(1, tokens, n, 8, generator=gen, dtype=dtype) for n in (heads, groups, groups))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The textbook: float64, one mask over all tokens."""
    q, k, v = (x[0].double() for x in (q, k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    group = q.shape[1] // k.shape[1]
    outs = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].T / math.sqrt(q.shape[2])
        outs.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[:, h // group])
    return torch.stack(outs, 1)[None]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_values_and_gradients_equal_the_textbook(heads: int, groups: int) -> None:
    xs = inputs(torch.float64, heads, groups)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    got, want = causal_attention(*xs, cu_seqlens=cu_seqlens), masked_softmax(*xs, LENGTHS)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(o.sin().sum(), xs) for o in (got, want)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_isolation_bit_for_bit() -> None:
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    keep = torch.ones(sum(LENGTHS), dtype=torch.bool)
    keep[start:end] = False

    def results(xs: list[Tensor]) -> list[Tensor]:
        out = causal_attention(*xs, doc_lengths=LENGTHS)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), xs)]

    xs = list(inputs())
    before = results(xs)
    changed = [x.detach().clone() for x in xs]
    for x in changed:
        x[:, start:end] = 1e4
    after = results([x.requires_grad_() for x in changed])
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, keep], b[:, keep])
        assert not torch.equal(a[:, ~keep], b[:, ~keep])


def test_without_documents_the_row_is_one() -> None:
    xs = inputs()
    one = causal_attention(*xs, doc_lengths=(sum(LENGTHS),))
    assert torch.equal(causal_attention(*xs), one)
    assert not torch.equal(causal_attention(*xs, doc_lengths=LENGTHS), one)


def test_backend_is_explicit() -> None:
    q, k, v = inputs()
    assert choose_softmax_backend(q.device, q.dtype).name == "per-document"
    assert "torch.float32 on cpu" in choose_softmax_backend(q.device, q.dtype).why
    with pytest.raises(ValueError, match=r"backend 'varlen' cannot run torch\.float32 on cpu"):
        causal_attention(q, k, v, backend="varlen")
    with pytest.raises(ValueError, match="backend 'flash' is not one of"):
        causal_attention(q, k, v, backend="flash")


def test_wrong_arguments_are_named() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="H a multiple of KV"):
        causal_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="q, k, v are"):
        causal_attention(q, k[:, 1:], v[:, 1:])
    with pytest.raises(TypeError, match=r"torch\.float64"):
        causal_attention(q, k.double(), v)
    with pytest.raises(ValueError, match="doc_lengths covers 3"):
        causal_attention(q, k, v, doc_lengths=(3,))
    with pytest.raises(ValueError, match=r"q, k, v are \(2, "):
        causal_attention(*(x.view(2, -1, *x.shape[2:]) for x in (q, k, v)), doc_lengths=LENGTHS)


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotary_is_a_complex_rotation_of_the_first_channels(rotary_dim: int) -> None:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(1, 6, 2, 8, generator=gen)
    positions = torch.tensor([0, 1, 2, 0, 1, 1000])
    half = rotary_dim // 2
    frequencies = torch.tensor([100.0 ** (-2 * i / rotary_dim) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(6, half, dtype=torch.float64), positions[:, None] * frequencies)[:, None]
    pairs = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double()) * turn
    want = torch.cat([pairs.real, pairs.imag, x[..., rotary_dim:].double()], -1)
    got = apply_rotary(x, positions, base=100.0, rotary_dim=rotary_dim)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(got[:, [0, 3]], x[:, [0, 3]])


def test_rotary_equals_transformers_at_a_million_tokens() -> None:
    """Bit-equal angles: one unit in the last place of a frequency is 0.06 rad at these positions."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = pytest.importorskip("transformers").MiniMaxConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e7}
    )
    positions = torch.arange(0, 1_048_576, 9973)
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(1, len(positions), 2, 64, generator=gen)
    cos, sin = minimax.MiniMaxRotaryEmbedding(config)(x, positions[None])
    want, _ = minimax.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    got = apply_rotary(x, positions, base=1e7, rotary_dim=64)
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-6, rtol=0)


def test_rotary_keeps_the_dtype_and_rotates_in_fp32() -> None:
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3, 1, 4, generator=gen).bfloat16()
    positions = torch.tensor([5, 100_001, 1_000_001])
    got = apply_rotary(x, positions, base=1e4, rotary_dim=4)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rotary(x.float(), positions, base=1e4, rotary_dim=4).bfloat16())


def test_rotary_refuses_sizes_that_do_not_fit() -> None:
    x, positions = torch.ones(1, 3, 1, 4), torch.arange(3)
    for rotary_dim in (0, 3, 6):
        with pytest.raises(ValueError, match=f"rotary_dim is {rotary_dim}"):
            apply_rotary(x, positions, base=1e4, rotary_dim=rotary_dim)
    with pytest.raises(ValueError, match=r"positions is \(2,\)"):
        apply_rotary(x, positions[:2], base=1e4, rotary_dim=4)
