"""Any layout of documents: packed equals the reference, and each document's place does not matter."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_kernels import causal_attention, lightning_attention
from m1_kernels.lightning.chunk_layout import chunk_layout


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(0, 2**31))
def test_lightning_equals_the_reference(doc_lengths: list[int], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, sum(doc_lengths), 2, 4, generator=gen, dtype=torch.float64) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for backend in ("chunked", "reference"):
        out, final = lightning_attention(
            *inputs,
            -torch.tensor([0.9, 0.01]),
            doc_lengths=doc_lengths,
            output_final_state=True,
            backend=backend,
        )
        assert final is not None
        grads = torch.autograd.grad((out.sin().sum(), final.sin().sum()), inputs)
        results.append((out, final, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.integers(0, 2**31))
def test_a_documents_place_in_the_row_does_not_matter(doc_lengths: list[int], seed: int) -> None:
    """Rows in reverse order of documents: the same bits, in both attention kinds."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sum(doc_lengths), 2, 8, generator=gen)
    swapped = torch.cat(x.split(doc_lengths, dim=1)[::-1], dim=1)
    decay = -torch.tensor([0.3, 0.001])
    for attend in (
        lambda y, lengths: lightning_attention(y, y, y, decay, doc_lengths=lengths)[0],
        lambda y, lengths: causal_attention(y, y, y, doc_lengths=lengths),
    ):
        forth, back = attend(x, doc_lengths), attend(swapped, doc_lengths[::-1])
        assert torch.equal(torch.cat(back.split(doc_lengths[::-1], dim=1)[::-1], dim=1), forth)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.sampled_from([16, 32, 64]))
def test_layout_places_every_token_once_and_never_mixes_documents(doc_lengths: list[int], chunk: int) -> None:
    layout = chunk_layout(tuple(doc_lengths), chunk, torch.device("cpu"))
    total = sum(doc_lengths)
    assert torch.equal(layout.gather[layout.scatter], torch.arange(total))
    assert int((layout.gather < total).sum()) == total
    assert sum(layout.widths) == len(layout.lengths) == sum(-(-n // chunk) for n in doc_lengths)
    doc_of_token = torch.repeat_interleave(torch.arange(len(doc_lengths)), torch.tensor(doc_lengths))
    for slots in layout.gather.view(-1, chunk):
        assert len(doc_of_token[slots[slots < total]].unique()) == 1
