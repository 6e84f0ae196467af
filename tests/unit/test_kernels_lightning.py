"""Lightning attention: the chunked backend against the float64 reference, isolation, states, arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m1_kernels import BackendChoice, explain_backend, lightning_attention

H, DK, DV = 4, 8, 12
SLOPES = (0.917, 0.06, 4.9e-5, 0.0)
LENGTHS = (1, 2, 63, 64, 65, 255, 256, 257, 1000, 1500)


def inputs(
    tokens: int, documents: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_decay and initial states; leaves that take gradients except the decay."""
    gen = torch.Generator().manual_seed(seed)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = ((1, tokens, H, DK), (1, tokens, H, DK), (1, tokens, H, DV))
    q, k, v = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    state = torch.randn(documents, H, DK, DV, generator=gen, dtype=state_dtype).requires_grad_()
    return q, k, v, -torch.tensor(SLOPES), state


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def run_with_gradients(
    args: tuple[Tensor, ...], backend: str, doc_lengths: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    q, k, v, log_decay, state = args
    out, final = lightning_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state,
        output_final_state=True,
        backend=backend,
        doc_lengths=doc_lengths,
    )
    assert final is not None
    gen = torch.Generator().manual_seed(9)
    weights = (torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (out, final))
    grads = torch.autograd.grad((out, final), (q, k, v, state), tuple(weights))
    names = ("o", "final", "dq", "dk", "dv", "d_initial")
    return dict(zip(names, (out.detach(), final.detach(), *grads), strict=True))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_values_and_gradients_equal_the_reference(tokens: int) -> None:
    args = inputs(tokens, 1)
    got, want = run_with_gradients(args, "chunked"), run_with_gradients(args, "reference")
    errors = {name: relative(got[name], want[name]) for name in want}
    assert max(errors.values()) < 3e-6, errors


def test_reference_is_the_recurrence_of_the_released_model() -> None:
    """S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t: geometric decay, the current token undecayed, no scale."""
    q, k, v, log_decay, initial = (x.detach().double() for x in inputs(40, 1, torch.float64))
    state, rows = initial[0], []
    for t in range(40):
        state = torch.exp(log_decay)[:, None, None] * state + k[0, t, :, :, None] * v[0, t, :, None, :]
        rows.append(torch.einsum("hd,hde->he", q[0, t], state))
    for backend in ("reference", "chunked"):
        out, final = lightning_attention(
            q, k, v, log_decay, initial_state=initial, output_final_state=True, backend=backend
        )
        assert final is not None
        assert relative(out[0], torch.stack(rows)) < 1e-13
        assert relative(final[0], state) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_decay_is_exponential_not_a_linear_bias(backend: str) -> None:
    """One key seen s tokens later weighs exp(-slope * s), where a linear (ALiBi-like) bias would weigh -slope * s."""
    q = torch.ones(1, 4, 1, 1)
    k = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    out, _ = lightning_attention(q, k, torch.ones(1, 4, 1, 1), -torch.tensor([0.5]), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.606531, 0.367879, 0.223130]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("doc_lengths", [(5,), (1, 33, 7), (32, 1, 1, 40)])
def test_gradcheck(doc_lengths: tuple[int, ...]) -> None:
    q, k, v, log_decay, state = inputs(sum(doc_lengths), len(doc_lengths), torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        return lightning_attention(
            q, k, v, log_decay, initial_state=state, output_final_state=True, doc_lengths=doc_lengths, backend="chunked"
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, state), fast_mode=True)


PACKING = (1, 64, 3, 200, 31, 32, 33, 1, 97)


def test_a_packing_equals_each_document_alone() -> None:
    q, k, v, log_decay, state = inputs(sum(PACKING), len(PACKING))
    packed = run_with_gradients((q, k, v, log_decay, state), "reference", PACKING)
    chunked = run_with_gradients((q, k, v, log_decay, state), "chunked", PACKING)
    assert max(relative(chunked[n], packed[n]) for n in packed) < 3e-6
    start = 0
    for n, length in enumerate(PACKING):
        document = (x[:, start : start + length] for x in (q, k, v))
        out, final = lightning_attention(
            *document, log_decay, initial_state=state[n : n + 1], output_final_state=True, backend="reference"
        )
        assert final is not None
        assert relative(chunked["o"][:, start : start + length], out) < 3e-6
        assert relative(chunked["final"][n], final[0]) < 3e-6
        start += length


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_isolation_bit_for_bit(backend: str) -> None:
    """Another text in document A, even infinities: no bit of another document's output, state or gradient moves."""
    q, k, v, log_decay, state = inputs(sum(PACKING), len(PACKING))
    before = run_with_gradients((q, k, v, log_decay, state), backend, PACKING)
    changed = 3
    start = sum(PACKING[:changed])
    inside = slice(start, start + PACKING[changed])
    others = torch.ones(sum(PACKING), dtype=torch.bool)
    others[inside] = False
    documents = torch.arange(len(PACKING)) != changed
    for value in (1e4, float("inf")):
        with torch.no_grad():
            tensors = [x.detach().clone() for x in (q, k, v, state)]
            for x in tensors[:3]:
                x[:, inside] = value
            tensors[3][changed] = value
        q2, k2, v2, state2 = (x.requires_grad_() for x in tensors)
        after = run_with_gradients((q2, k2, v2, log_decay, state2), backend, PACKING)
        for name in before:
            keep = documents if name in ("final", "d_initial") else others
            a, b = (x[0] if keep is others else x for x in (before[name], after[name]))
            assert torch.equal(a[keep], b[keep]), name
            assert not torch.equal(a[~keep], b[~keep]), name


def test_runs_repeat_bit_for_bit() -> None:
    args = inputs(sum(PACKING), len(PACKING))
    first, second = (run_with_gradients(args, "chunked", PACKING) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("cut", [1, 31, 32, 100, 299])
def test_prefix_then_suffix_equals_the_whole(cut: int) -> None:
    args = inputs(300, 1)
    q, k, v, log_decay, state = args
    whole = run_with_gradients(args, "chunked")
    head, middle = lightning_attention(
        q[:, :cut], k[:, :cut], v[:, :cut], log_decay, initial_state=state, output_final_state=True
    )
    tail, final = lightning_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], log_decay, initial_state=middle, output_final_state=True
    )
    assert final is not None
    gen = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64).float() for x in (whole["o"], whole["final"])]
    out = torch.cat([head, tail], 1)
    grads = torch.autograd.grad((out, final), (q, k, v, state), weights)
    for name, got in zip(("o", "final", "dq", "dk", "dv", "d_initial"), (out, final, *grads), strict=True):
        assert relative(got, whole[name]) < 3e-6, name


def test_a_batch_equals_its_rows() -> None:
    q, k, v, log_decay, _ = inputs(3 * 70, 1)
    batch = [x.view(3, 70, *x.shape[2:]) for x in (q, k, v)]
    out, final = lightning_attention(*batch, log_decay, output_final_state=True)
    packed, states = lightning_attention(q, k, v, log_decay, doc_lengths=(70, 70, 70), output_final_state=True)
    assert torch.equal(out.flatten(0, 1), packed[0])
    assert final is not None
    assert states is not None
    assert torch.equal(final, states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_only_their_own_rounding(dtype: torch.dtype) -> None:
    args = inputs(1500, 1, dtype)
    got = run_with_gradients(args, "chunked")
    want = run_with_gradients(args, "reference")
    assert got["o"].dtype == got["dq"].dtype == dtype
    assert got["final"].dtype == got["d_initial"].dtype == torch.float32
    rounding = torch.finfo(dtype).eps / 2
    for name in ("o", "dq", "dk", "dv"):
        assert relative(got[name], want[name].to(dtype)) < rounding, name
    assert relative(got["final"], want["final"]) < 3e-6


def test_autocast_changes_nothing() -> None:
    args = inputs(100, 1)
    plain = run_with_gradients(args, "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_with_gradients(args, "chunked")
    assert all(torch.equal(plain[n], cast[n]) for n in plain)


def slow_head_error(tokens: int, state_dtype: torch.dtype) -> float:
    """Error of the final state of a head of slope 4.9e-5, its state kept in ``state_dtype`` between blocks of 256."""
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, tokens, 1, 16, generator=gen).abs().bfloat16() for _ in range(2))
    log_decay = -torch.tensor([4.9e-5])
    state = torch.zeros(1, 1, 16, 16)
    for start in range(0, tokens, 256):
        part = slice(start, start + 256)
        _, new = lightning_attention(
            k[:, part], k[:, part], v[:, part], log_decay, initial_state=state, output_final_state=True
        )
        assert new is not None
        state = new.to(state_dtype).float()
    k, v = (x[0, :, 0].double() for x in (k, v))
    age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64)
    exact = (k * torch.exp(-4.9e-5 * age)[:, None]).T @ v
    return relative(state[0, 0], exact)


def test_slow_heads_keep_their_memory_at_32k_tokens() -> None:
    """The state crosses 128 blocks; kept in bf16 the same run is far off, so this bound sees a rounded state."""
    error = slow_head_error(32_768, torch.float32)
    assert error < 1e-5
    assert slow_head_error(32_768, torch.bfloat16) > 1000 * error


def test_auto_runs_chunked_and_says_why() -> None:
    choice = explain_backend()
    assert choice.name == "chunked"
    assert "no inputs" in choice.why
    assert explain_backend("reference") == BackendChoice("reference", "requested")


def small(**changes: Tensor) -> dict[str, Tensor]:
    args = {"q": torch.ones(1, 4, 2, 3), "k": torch.ones(1, 4, 2, 3), "v": torch.ones(1, 4, 2, 5)}
    return args | {"log_decay": torch.zeros(2)} | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.ones(1, 4, 2, 3, dtype=torch.int64)}, TypeError, "q, k, v are torch.int64"),
        ({"k": torch.ones(1, 4, 2, 3).half()}, TypeError, "torch.float16"),
        ({"v": torch.ones(1, 5, 2, 5)}, ValueError, r"q, k, v are .*\(1, 5, 2, 5\)"),
        ({"log_decay": torch.zeros(2).bfloat16()}, TypeError, "log_decay is torch.bfloat16"),
        ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay is \(3,\)"),
        ({"log_decay": torch.zeros(2, requires_grad=True)}, ValueError, "without gradient"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens covers 3 tokens, q has 4"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 4])}, ValueError, "cu_seqlens has a document without tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens is torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4]), "doc_lengths": (2, 2)}, ValueError, "cu_seqlens has 2 edges"),
        ({"doc_lengths": (2, 1)}, ValueError, "doc_lengths covers 3"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, ValueError, r"initial_state is \(2, 2, 3, 5\)"),
        ({"initial_state": torch.zeros(1, 2, 3, 5).bfloat16()}, ValueError, "initial_state is .*bfloat16"),
        ({"backend": "triton"}, ValueError, "backend 'triton' cannot run: .*not 3 and 5"),
        ({"backend": "fast"}, ValueError, "backend 'fast' is not one of"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lightning_attention(**small(**changes))  # type: ignore[arg-type]


def test_documents_need_one_row() -> None:
    x = torch.ones(2, 4, 2, 3)
    with pytest.raises(ValueError, match="cu_seqlens and doc_lengths need a batch of 1"):
        lightning_attention(x, x, x, torch.zeros(2), cu_seqlens=torch.tensor([0, 8]))


def test_no_second_derivatives() -> None:
    q, k, v, log_decay, _ = inputs(5, 1)
    out, _ = lightning_attention(q, k, v, log_decay)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
