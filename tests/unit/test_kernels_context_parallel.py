"""Context parallelism of lightning attention: shards joined by their states equal the uncut sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m1_kernels import lightning_attention
from m1_kernels.lightning.cp_states import (
    ShardCut,
    correct_final_states_,
    correct_key_value_gradients_,
    correct_outputs_,
    correct_query_gradients_,
    cut_shards,
    entering_states,
    leaving_state_gradients,
)
from m1_kernels.lightning.reference import lightning_attention_reference

H, DK, DV = 3, 4, 5
LOG_DECAY = -torch.tensor([0.0, 2.0, 5e-5])
NAMES = ("o", "final", "dq", "dk", "dv")
TOKENS = 96
SHARDS = {
    "1": (96,),
    "2": (48, 48),
    "2 unequal": (1, 95),
    "3": (32, 32, 32),
    "3 unequal": (40, 7, 49),
    "4": (24, 24, 24, 24),
    "4 unequal": (2, 50, 1, 43),
    "8": (12,) * 8,
    "8 unequal": (1, 30, 2, 3, 20, 9, 30, 1),
}


def inputs(doc_lengths: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, and gradients of the outputs and the final states."""
    gen = torch.Generator().manual_seed(seed)
    tokens, state = sum(doc_lengths), torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(tokens, H, d) for d in (DK, DK, DV, DV)]
    packed = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]
    return (*packed, torch.randn(len(doc_lengths), H, DK, DV, generator=gen, dtype=state))


def uncut(args: tuple[Tensor, ...], doc_lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Float64 o, final, dq, dk, dv of the whole sequence."""
    q, k, v, do, d_final = (x.double() for x in args)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, final = lightning_attention_reference(*leaves, LOG_DECAY, tuple(doc_lengths))
    return (out.detach(), final.detach(), *torch.autograd.grad((out, final), leaves, (do, d_final)))


class Shard:
    """One shard run alone. ``lightning_attention`` keeps its graph, so a backward may wait for dS_out."""

    def __init__(
        self, args: tuple[Tensor, ...], d_final: Tensor, cut: ShardCut, entering: Tensor | None = None
    ) -> None:
        *qkv, self.do = args
        self.qkv, self.cut, self.d_final = [x.detach().requires_grad_() for x in qkv], cut, d_final
        self.initial = d_final.new_zeros(len(cut.doc_lengths), H, DK, DV)
        if entering is not None:
            self.initial[0] = entering
        self.initial.requires_grad_()
        out, final = lightning_attention(
            *(x[None] for x in self.qkv),
            LOG_DECAY,
            doc_lengths=cut.doc_lengths,
            initial_state=self.initial,
            output_final_state=True,
            backend="chunked",
        )
        assert final is not None
        self.graph = (out, final)
        self.out, self.final = out.detach()[0].clone(), final.detach().clone()

    def backward(self, leaving: Tensor | None = None) -> tuple[Tensor, ...]:
        """dq, dk, dv and the gradient of the state entering the first document."""
        d_final = self.d_final.clone()
        if self.cut.into_next:
            d_final[-1] = 0.0 if leaving is None else leaving
        leaves = (*self.qkv, self.initial)
        *grads, d_initial = torch.autograd.grad(self.graph, leaves, (self.do[None], d_final), retain_graph=True)
        return (*grads, d_initial[0])


def cut_inputs(
    args: tuple[Tensor, ...], cuts: Sequence[ShardCut], shards: Sequence[int]
) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Each shard's q, k, v, do, and the gradient of its documents' final states, of those that end in it."""
    *packed, d_final = args
    result, document = [], 0
    for tokens, cut in zip(zip(*(x.split(list(shards)) for x in packed), strict=True), cuts, strict=True):
        result.append((tokens, d_final[document : document + len(cut.doc_lengths)]))
        document += len(cut.doc_lengths) - cut.into_next
    return result


def join(shards: Sequence[Shard], grads: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    finals = [s.final[:-1] if s.cut.into_next else s.final for s in shards]
    tokens = (torch.cat([g[i] for g in grads]) for i in range(3))
    return (torch.cat([s.out for s in shards]), torch.cat(finals), *tokens)


def run_corrected(
    args: tuple[Tensor, ...], doc_lengths: Sequence[int], shard_lengths: Sequence[int]
) -> tuple[Tensor, ...]:
    """Every shard from zero states first, then the corrections."""
    cuts = cut_shards(doc_lengths, shard_lengths)
    shards = [Shard(*x, cut) for x, cut in zip(cut_inputs(args, cuts, shard_lengths), cuts, strict=True)]
    grads = [shard.backward() for shard in shards]
    entering = entering_states(torch.stack([s.final[-1] for s in shards]), LOG_DECAY, cuts)
    leaving = leaving_state_gradients(torch.stack([g[3] for g in grads]), LOG_DECAY, cuts)
    for n, (shard, (dq, dk, dv, _)) in enumerate(zip(shards, grads, strict=True)):
        q, k, v = (x.detach() for x in shard.qkv)
        correct_outputs_(shard.out, q, entering[n], LOG_DECAY, shard.cut)
        correct_final_states_(shard.final, entering[n], LOG_DECAY, shard.cut)
        correct_query_gradients_(dq, shard.do, entering[n], LOG_DECAY, shard.cut)
        correct_key_value_gradients_(dk, dv, k, v, leaving[n], LOG_DECAY, shard.cut)
    return join(shards, grads)


def run_simple(
    args: tuple[Tensor, ...], doc_lengths: Sequence[int], shard_lengths: Sequence[int]
) -> tuple[Tensor, ...]:
    """The docstring's simpler way: the local sums first, then each shard once, with its entering state."""
    cuts = cut_shards(doc_lengths, shard_lengths)
    pieces = cut_inputs(args, cuts, shard_lengths)
    states, gradients = [], []
    for ((q, k, v, do), d_final), cut in zip(pieces, cuts, strict=True):
        first, last = cut.doc_lengths[0], cut.doc_lengths[-1]
        to_end, from_start = (
            (LOG_DECAY.double() * x[:, None]).exp().to(d_final.dtype)[..., None]
            for x in (torch.arange(last).flip(0), torch.arange(first) + 1)
        )
        states.append(torch.einsum("thk,thv->hkv", k[-last:] * to_end, v[-last:]))
        gradient = torch.einsum("thk,thv->hkv", q[:first] * from_start, do[:first])
        if len(cut.doc_lengths) > 1 or not cut.into_next:
            gradient += (LOG_DECAY.to(gradient.dtype) * first).exp()[:, None, None] * d_final[0]
        gradients.append(gradient)
    entering = entering_states(torch.stack(states), LOG_DECAY, cuts)
    leaving = leaving_state_gradients(torch.stack(gradients), LOG_DECAY, cuts)
    shards = [Shard(*x, cut, s) for x, cut, s in zip(pieces, cuts, entering, strict=True)]
    return join(shards, [shard.backward(gradient) for shard, gradient in zip(shards, leaving, strict=True)])


def documents(edges: str, shard_lengths: Sequence[int]) -> tuple[int, ...]:
    """Documents whose edges stand as named to the edges of the shards."""
    ends = list(accumulate(shard_lengths))
    total = ends[-1]
    marks = {
        "one document": [],
        "inside": [5, 21, 37, 38, 70, 90],
        "inside one shard": [total - 3],
        "at every shard edge": ends,
        "at every other shard edge": ends[1::2],
        "one token before": [x - 1 for x in ends],
        "one token after": [x + 1 for x in ends],
        "on both sides": [x + d for x in ends for d in (-1, 0, 1)],
        "every token": list(range(total)),
    }[edges]
    inner = sorted({x for x in marks if 0 < x < total})
    return tuple(b - a for a, b in zip([0, *inner], [*inner, total], strict=True))


EDGES = (
    "one document",
    "inside",
    "inside one shard",
    "at every shard edge",
    "at every other shard edge",
    "one token before",
    "one token after",
    "on both sides",
    "every token",
)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("run", [run_corrected, run_simple])
def test_shards_equal_the_uncut_sequence(run, shards: str, edges: str) -> None:
    doc_lengths = documents(edges, SHARDS[shards])
    args = inputs(doc_lengths)
    for name, got, want in zip(NAMES, run(args, doc_lengths, SHARDS[shards]), uncut(args, doc_lengths), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("edges", ["one document", "inside", "one token after"])
def test_fp32_per_head(shards: str, edges: str) -> None:
    """Per head, so that an undecayed head does not hide the error of a decayed one; inside autocast the same bits."""
    doc_lengths = documents(edges, SHARDS[shards])
    args = inputs(doc_lengths, torch.float32)
    results = run_corrected(args, doc_lengths, SHARDS[shards])
    for name, got, want in zip(NAMES, results, uncut(args, doc_lengths), strict=True):
        assert got.dtype == torch.float32
        for head in range(H):
            error = (got[:, head].double() - want[:, head]).norm() / want[:, head].norm()
            assert error < 1e-5, (name, head, float(error))
    with torch.autocast("cpu", torch.bfloat16):
        again = run_corrected(args, doc_lengths, SHARDS[shards])
    assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True))


def test_bf16_outputs_are_rounded_and_states_are_not() -> None:
    args = inputs((TOKENS,), torch.bfloat16)
    results = run_corrected(args, (TOKENS,), SHARDS["4"])
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3
    errors = [
        float((got.double() - want).norm() / want.norm())
        for got, want in zip(results, uncut(args, (TOKENS,)), strict=True)
    ]
    assert errors[1] < 1e-6
    assert max(errors) < 2**-8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_documents_and_any_shards(data: st.DataObject) -> None:
    """Random cuts: the shards tile the documents, and both ways give the uncut sequence."""
    tokens = data.draw(st.integers(1, 60))
    lengths = []
    for _ in range(2):
        edges = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=9))) if tokens > 1 else []
        lengths.append(tuple(b - a for a, b in zip([0, *edges], [*edges, tokens], strict=True)))
    doc_lengths, shard_lengths = lengths
    glued: list[int] = []
    for cut, length in zip(cut_shards(doc_lengths, shard_lengths), shard_lengths, strict=True):
        assert sum(cut.doc_lengths) == length
        first, *rest = cut.doc_lengths
        if cut.from_previous:
            glued[-1] += first
        else:
            glued.append(first)
        glued += rest
    assert tuple(glued) == doc_lengths
    args = inputs(doc_lengths, seed=data.draw(st.integers(0, 99)))
    want = uncut(args, doc_lengths)
    for run in (run_corrected, run_simple):
        for name, got, right in zip(NAMES, run(args, doc_lengths, shard_lengths), want, strict=True):
            torch.testing.assert_close(got, right, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_a_slow_head_over_many_long_shards() -> None:
    """1,024 shards of 1,024 tokens: the combine in fp32 keeps what a decay of 5e-5 per token leaves."""
    cuts = cut_shards((2**20,), (1024,) * 1024)
    local = torch.randn(1024, H, DK, DV, generator=torch.Generator().manual_seed(0))
    crossed = torch.arange(1024)[:, None] - torch.arange(1024) - 1
    weight = torch.where(crossed >= 0, (LOG_DECAY.double()[:, None, None] * 1024 * crossed.clamp(min=0)).exp(), 0.0)
    for got, sums in (
        (entering_states(local, LOG_DECAY, cuts), weight),
        (leaving_state_gradients(local, LOG_DECAY, cuts), weight.mT),
    ):
        want = torch.einsum("hnj,jhkv->nhkv", sums, local.double())
        errors = (got.double() - want).transpose(0, 1).flatten(1).norm(dim=1) / want.transpose(0, 1).flatten(1).norm(
            dim=1
        )
        assert errors.max() < 1e-5, errors


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "edges", ["inside", "at every shard edge", "at every other shard edge", "one token before", "one token after"]
)
@pytest.mark.parametrize("shards", ["2", "4", "8 unequal"])
def test_a_poisoned_document_reaches_no_other(shards: str, edges: str, poison: float) -> None:
    """Values and gradients of all other documents: the same bits as without the poison."""
    doc_lengths = documents(edges, SHARDS[shards])
    args = inputs(doc_lengths)
    clean = run_corrected(args, doc_lengths, SHARDS[shards])
    document_of_token = torch.repeat_interleave(torch.arange(len(doc_lengths)), torch.tensor(doc_lengths))
    for n in range(len(doc_lengths)):
        rows, finals = document_of_token == n, torch.arange(len(doc_lengths)) == n
        poisoned = [x.clone() for x in args]
        for x in poisoned:
            x[finals if x is poisoned[-1] else rows] = poison
        for name, got, want in zip(
            NAMES, run_corrected(tuple(poisoned), doc_lengths, SHARDS[shards]), clean, strict=True
        ):
            others = ~(finals if name == "final" else rows)
            assert torch.equal(got[others], want[others]), (name, n)
            assert not got[~others].isfinite().all(), (name, n)


def test_only_states_of_the_same_document_enter_and_leave() -> None:
    """Exactly zero elsewhere, whatever the other states are."""
    cuts = cut_shards((3, 5, 4, 8), (4, 4, 4, 4, 4))
    local = torch.full((5, H, DK, DV), float("inf"))
    for combine, crossed in ((entering_states, [1, 4]), (leaving_state_gradients, [0, 3])):
        assert combine(local, LOG_DECAY, cuts).flatten(1).isinf().all(1).nonzero().flatten().tolist() == crossed
        others = [n for n in range(5) if n not in crossed]
        assert not combine(local, LOG_DECAY, cuts)[others].any()


def test_a_shard_of_whole_documents_is_left_alone() -> None:
    """Nothing crosses its edges: no bit changes, whatever states come with it."""
    doc_lengths = (2, 4)
    q, k, v, do, final = inputs(doc_lengths)
    cut = ShardCut(doc_lengths, False, False)
    state = torch.full((H, DK, DV), float("nan"), dtype=torch.float64)
    results = [x.clone() for x in (do, final, q, k, v)]
    out, end, dq, dk, dv = results
    correct_outputs_(out, q, state, LOG_DECAY, cut)
    correct_final_states_(end, state, LOG_DECAY, cut)
    correct_query_gradients_(dq, do, state, LOG_DECAY, cut)
    correct_key_value_gradients_(dk, dv, k, v, state, LOG_DECAY, cut)
    assert all(torch.equal(x, y) for x, y in zip(results, (do, final, q, k, v), strict=True))


def test_cuts_name_what_crosses_each_edge() -> None:
    assert cut_shards((3, 5, 4, 8), (4, 4, 4, 4, 4)) == (
        ShardCut((3, 1), False, True),
        ShardCut((4,), True, False),
        ShardCut((4,), False, False),
        ShardCut((4,), False, True),
        ShardCut((4,), True, False),
    )
    assert ShardCut((3, 1), False, True).reversed() == ShardCut((1, 3), True, False)


@pytest.mark.parametrize(
    ("docs", "shards", "message"),
    [((), (4,), "doc_lengths"), ((4,), (), "shard_lengths"), ((4, 0), (4,), "doc_lengths"), ((4,), (5,), "cover 4")],
)
def test_cuts_that_do_not_fit_are_refused(docs: tuple[int, ...], shards: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_shards(docs, shards)


def test_wrong_arguments_are_refused() -> None:
    cuts = cut_shards((6, 4), (5, 5))
    local, x = torch.zeros(2, H, DK, DV), torch.zeros(5, H, DK)
    with pytest.raises(TypeError, match=r"local is torch\.bfloat16"):
        entering_states(local.bfloat16(), LOG_DECAY, cuts)
    with pytest.raises(TypeError, match=r"log_decay torch\.bfloat16"):
        entering_states(local, LOG_DECAY.bfloat16(), cuts)
    with pytest.raises(ValueError, match="local is"):
        entering_states(local[:1], LOG_DECAY, cuts)
    with pytest.raises(ValueError, match="cuts disagree"):
        entering_states(local, LOG_DECAY, cuts[::-1])
    with pytest.raises(ValueError, match="cuts disagree"):
        leaving_state_gradients(local[:1], LOG_DECAY, cuts[:1])
    with pytest.raises(TypeError, match=r"the state for out, q is torch\.float32"):
        correct_outputs_(x.new_zeros(5, H, DV).double(), x.double(), local[0], LOG_DECAY, cuts[1])
    with pytest.raises(ValueError, match="out, q are"):
        correct_outputs_(torch.zeros(4, H, DV), x, local[0], LOG_DECAY, cuts[1])
    with pytest.raises(TypeError, match=r"entering is torch\.float64"):
        correct_final_states_(local, local[0].double(), LOG_DECAY, cuts[1])
    with pytest.raises(ValueError, match="final is"):
        correct_final_states_(local[:1], local[0], LOG_DECAY, cuts[1])
