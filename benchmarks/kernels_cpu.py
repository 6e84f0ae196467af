"""Lightning attention on this CPU: tokens/s forward+backward, fp32, 4 heads, beside two loops one would write first.

    python benchmarks/kernels_cpu.py [--chunks]

``token loop``: the recurrence one token at a time. ``transformers``: the block loop of MiniMaxLightningAttention, its
projections taken out, one call per document because it cannot keep packed documents apart. All three are checked to give
the same values before they are timed. ``--chunks`` times chunk sizes instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from m1_kernels import causal_attention, lightning_attention
from m1_kernels.lightning import chunked

HEADS = 4
CASES = ((4096, 16, 1), (4096, 32, 1), (4096, 16, 60), (4096, 32, 300), (65_536, 32, 1), (65_536, 32, 300))
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def document_lengths(tokens: int, documents: int) -> tuple[int, ...]:
    gen = torch.Generator().manual_seed(0)
    cuts = (torch.randperm(tokens - 1, generator=gen)[: documents - 1] + 1).sort().values
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])
    return tuple(edges.diff().tolist())


def token_loop(lengths: tuple[int, ...], slopes: Tensor) -> Attend:
    decay = torch.exp(-slopes)[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for qd, kd, vd in zip(*(x[0].split(lengths) for x in (q, k, v)), strict=True):
            state = torch.zeros(HEADS, q.shape[3], v.shape[3])
            for t in range(len(qd)):
                state = decay * state + kd[t, :, :, None] * vd[t, :, None, :]
                rows.append((qd[t, :, None] @ state)[:, 0])
        return torch.stack(rows)[None]

    return attend


class _Open(nn.Module):
    """A gate of sigmoid 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((1,), 30.0)


def transformers_loop(lengths: tuple[int, ...], dim: int) -> tuple[Attend, Tensor]:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=HEADS * dim,
        num_attention_heads=HEADS,
        head_dim=dim,
        num_hidden_layers=8,
        layer_types=["linear_attention"] * 7 + ["full_attention"],
    )
    layer = MiniMaxLightningAttention(config, layer_idx=3)
    layer.qkv_proj = layer.act_fn = layer.norm = layer.out_proj = nn.Identity()
    layer.output_gate = _Open()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = torch.cat([q, k, v], dim=3).flatten(2)
        outputs = [layer(document, (None, None), None)[0] for document in packed.split(lengths, dim=1)]
        return torch.cat(outputs, dim=1).view(v.shape)

    return attend, layer.slope_rate.flatten()


def rate(attend: Attend, inputs: list[Tensor], repeats: int) -> float:
    """Tokens per second, forward and backward, best of ``repeats``."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, out)
        best = min(best, time.perf_counter() - start)
    return inputs[0].shape[1] / best


def case(tokens: int, dim: int, documents: int, chunks: bool) -> str:
    torch.manual_seed(0)
    inputs = [torch.randn(1, tokens, HEADS, dim, requires_grad=True) for _ in range(3)]
    lengths = document_lengths(tokens, documents)
    theirs, slopes = transformers_loop(lengths, dim)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, -slopes, doc_lengths=lengths)[0]

    if chunks:
        cells = []
        for size in (16, 32, 64, 128):
            chunked.CPU_CHUNK_TOKENS = size
            cells.append(rate(ours, inputs, 8))
        return " | ".join(f"{x:,.0f}" for x in cells)

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, doc_lengths=lengths)

    want = ours(*inputs)
    torch.testing.assert_close(theirs(*inputs), want, atol=1e-3, rtol=1e-3)
    cells = [rate(ours, inputs, 8), rate(theirs, inputs, 5)]
    loop = "not run"
    if tokens <= 4096:
        naive = token_loop(lengths, slopes)
        torch.testing.assert_close(naive(*inputs), want, atol=1e-3, rtol=1e-3)
        loop = f"{rate(naive, inputs, 1):,.0f}"
    packed = f"{rate(softmax, inputs, 4):,.0f}" if max(lengths) <= 4096 else "not run"
    return f"{cells[0]:,.0f} | {cells[1]:,.0f} | {loop} | {packed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", action="store_true", help="time chunk sizes of ours instead")
    chunks = parser.parse_args().chunks
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, tokens/s forward+backward")
    columns = "chunk 16 | 32 | 64 | 128" if chunks else "ours | transformers | token loop | our softmax attention"
    print(f"| tokens | head_dim | documents | {columns} |")
    print("|" + "---|" * 7)
    for tokens, dim, documents in CASES:
        print(f"| {tokens:,} | {dim} | {documents} | {case(tokens, dim, documents, chunks)} |", flush=True)


if __name__ == "__main__":
    main()
