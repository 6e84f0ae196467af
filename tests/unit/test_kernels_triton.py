"""The Triton kernels, through Triton's interpreter on a CPU (compiled where there is a GPU): values against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from m1_kernels import BackendChoice, explain_backend, lightning_attention, lightning_decode, lightning_layer
from m1_kernels.lightning.gpu import segments as plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPES = (0.917, 2.0, 4.9e-5, 0.0)
PACKINGS = [(1,), (15, 1, 16, 17), (128,), (129, 127), (700, 33, 1, 260)]
NAMES = ("o", "final", "dq", "dk", "dv", "d_initial")


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that short documents have several segments, of several pieces."""
    monkeypatch.setattr(plan, "MIN_SEGMENT_TOKENS", 256)
    monkeypatch.setattr(plan, "MIN_PIECE_TOKENS", 128)
    plan.segment_plan.cache_clear()
    yield
    plan.segment_plan.cache_clear()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def make(lengths: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype, heads: int = 4) -> list[Tensor]:
    gen = torch.Generator().manual_seed(len(lengths))
    shapes = [(1, sum(lengths), heads, d) for d in (dims[0], *dims)]
    return [torch.randn(s, generator=gen).to(DEVICE, dtype).requires_grad_() for s in shapes]


def run(xs: list[Tensor], backend: str, lengths: tuple[int, ...], with_states: bool) -> list[Tensor]:
    """Output, final states and all gradients."""
    q, k, v = xs
    gen = torch.Generator().manual_seed(7)
    log_decay = -torch.tensor(SLOPES, device=DEVICE)[: q.shape[2]]
    if not with_states:
        out, none = lightning_attention(q, k, v, log_decay, doc_lengths=lengths, backend=backend)
        assert none is None
        return [out, *torch.autograd.grad(out, xs, torch.randn(out.shape, generator=gen).to(out))]
    shape = (len(lengths), q.shape[2], q.shape[3], v.shape[3])
    state = torch.randn(shape, generator=gen).to(DEVICE).requires_grad_()
    out, final = lightning_attention(
        q, k, v, log_decay, doc_lengths=lengths, initial_state=state, output_final_state=True, backend=backend
    )
    assert final is not None
    weights = [torch.randn(y.shape, generator=gen).to(y) for y in (out, final)]
    return [out, final, *torch.autograd.grad((out, final), (*xs, state), weights)]


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS)
def test_fp32_equals_the_reference(lengths: tuple[int, ...], with_states: bool) -> None:
    xs = make(lengths, (16, 16), torch.float32)
    got, want = (run(xs, backend, lengths, with_states) for backend in ("triton", "reference"))
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize("dims", [(16, 32), (32, 16), (64, 64), (128, 128)])
def test_fp16_equals_the_reference_at_every_head_size(dims: tuple[int, int]) -> None:
    lengths = (300, 65)
    xs = make(lengths, dims, torch.float16, heads=3)
    got, want = (run(xs, backend, lengths, True) for backend in ("triton", "reference"))
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 1.5e-3, errors


def test_parts_of_a_fused_projection_are_read_where_they_lie() -> None:
    lengths = (200, 90)
    fused = torch.randn(1, 290, 4, 4, 16).to(DEVICE).requires_grad_()
    got, want = (run(list(fused.unbind(3)[:3]), backend, lengths, False) for backend in ("triton", "reference"))
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-6
    from m1_kernels.lightning.gpu.launch import addressable

    part = fused[0, :, :, 1]
    assert addressable(part) is part
    transposed = torch.randn(4, 290, 16).transpose(0, 1).to(DEVICE)
    assert addressable(transposed[..., ::2]).is_contiguous()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("edge", [63, 64, 127, 128, 129, 255, 256, 257])
def test_documents_never_see_each_other(edge: int, poison: float) -> None:
    lengths = (70, edge, 40)
    inside = slice(70, 70 + edge)
    keep = torch.ones(sum(lengths), dtype=torch.bool, device=DEVICE)
    keep[inside] = False
    clean = make(lengths, (16, 16), torch.float16, heads=1)
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, inside] = poison
    before = run(clean, "triton", lengths, False)
    after = run([x.requires_grad_() for x in dirty], "triton", lengths, False)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, keep], b[:, keep])
        assert not torch.equal(a[:, ~keep], b[:, ~keep])


def test_a_batch_is_its_rows() -> None:
    xs = [torch.randn(3, 140, 2, 16, device=DEVICE) for _ in range(3)]
    decay = -torch.tensor([0.3, 0.001], device=DEVICE)
    out, final = lightning_attention(*xs, decay, output_final_state=True, backend="triton")
    rows = [lightning_attention(*(x[n : n + 1] for x in xs), decay, backend="triton")[0] for n in range(3)]
    assert torch.equal(out, torch.cat(rows))
    assert final is not None
    assert final.shape == (3, 2, 16, 16)


def test_prefill_in_parts_and_decode_equal_one_forward() -> None:
    xs = [torch.randn(2, 150, 3, 16, device=DEVICE) for _ in range(3)]
    decay = -torch.tensor([0.5, 0.01, 0.0], device=DEVICE)
    want, want_state = lightning_attention(*xs, decay, output_final_state=True, backend="reference")
    state, outs = None, []
    for part in (slice(0, 70), slice(70, 130)):
        out, state = lightning_attention(
            *(x[:, part] for x in xs), decay, initial_state=state, output_final_state=True, backend="triton"
        )
        outs.append(out)
    assert state is not None
    other, others = state.clone(), []
    for t in range(130, 150):
        outs.append(lightning_decode(*(x[:, t] for x in xs), decay, state, backend="triton")[:, None])
        others.append(lightning_decode(*(x[:, t] for x in xs), decay, other, backend="chunked"))
    assert relative(torch.cat(outs, 1), want) < 1e-6
    assert want_state is not None
    assert relative(state, want_state) < 1e-6
    assert relative(torch.stack(others, 1), want[:, 130:]) < 1e-6


def eager_layer(x: Tensor, weight: Tensor, decay: Tensor, lengths: tuple[int, ...], eps: float) -> Tensor:
    """The same layer in float64, in plain PyTorch."""
    q, k, v, gate = x.double().unbind(3)
    out, _ = lightning_attention(F.silu(q), F.silu(k), F.silu(v), decay, doc_lengths=lengths, backend="reference")
    flat = out.flatten(2)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps) * weight.double()
    return normed * torch.sigmoid(gate.flatten(2))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_the_fused_layer_equals_the_eager_one(dtype: torch.dtype, bound: float) -> None:
    lengths = (150, 1, 49)
    x = torch.randn(1, 200, 3, 4, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
    weight = torch.linspace(0.5, 2, 48, device=DEVICE).to(dtype).requires_grad_()
    decay = -torch.tensor([0.5, 0.01, 0.0], device=DEVICE)
    out = lightning_layer(x, weight, decay, eps=1e-6, doc_lengths=lengths)
    want = eager_layer(x, weight, decay, lengths, 1e-6)
    assert relative(out, want) < bound
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    got = torch.autograd.grad(out, (x, weight), grad.to(dtype))
    wanted = torch.autograd.grad(want, (x, weight), grad.double())
    errors = [relative(a, b) for a, b in zip(got, wanted, strict=True)]
    assert max(errors) < bound, errors


def test_the_backend_is_explained_and_refused() -> None:
    q = torch.ones(1, 4, 2, 16, device=DEVICE)
    assert explain_backend("triton", q) == BackendChoice("triton", "requested")
    assert explain_backend("auto", q).name == ("triton" if q.is_cuda else "chunked")
    for wrong, words in ((q.double(), "float64"), (torch.ones(1, 4, 2, 24, device=DEVICE), "24")):
        with pytest.raises(ValueError, match=words):
            explain_backend("triton", wrong)
        assert explain_backend("auto", wrong).name == "chunked"


def test_a_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA device, not cpu"):
        explain_backend("triton", torch.ones(1, 4, 2, 16))


@pytest.mark.parametrize("heads", [1, 8, 16, 48, 64, 100])
@pytest.mark.parametrize("lengths", [(1,), (511, 4000), (131072,), (7, 90000, 3, 128, 40000)])
def test_a_plan_covers_every_token_once(heads: int, lengths: tuple[int, ...]) -> None:
    for all_states in (False, True):
        p = plan.segment_plan(lengths, heads, 132, torch.device("cpu"), all_states)
        segments, pieces = p.segments.tolist(), p.pieces.tolist()
        edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        at = 0
        for start, length, first, count, *_ in segments:
            assert start == at
            at += length
            doc = max(n for n, edge in enumerate(edges) if edge <= start)
            assert at <= edges[doc + 1]
            assert at == edges[doc + 1] or length % plan.CHUNK_TOKENS == 0
            covered = start
            for begin, tokens, after, before in pieces[first : first + count]:
                assert (begin, before, after) == (covered, covered - start, start + length - covered - tokens)
                covered += tokens
            assert covered == start + length or count == 0
        assert at == sum(lengths)
        assert sorted(p.order.tolist()) == list(range(len(segments)))
        assert sorted(row[4] for row in segments if row[4] >= 0) == list(range(p.rows))
        assert sorted(row[5] for row in segments if row[5] >= 0) == list(range(p.rows))
