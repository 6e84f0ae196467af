"""Linear cross-entropy, bf16 head and hidden states, forward+backward: ours, plain torch, Liger, in one run.

    python benchmarks/cross_entropy.py [--device cuda] [--tokens N ...] [--head WIDTHxROWS ...] [--runs 7]

Prints one markdown table. ``ours`` is ``linear_cross_entropy``; ``ours, upcast`` the same from fp32 copies of the inputs,
which is what every device without bf16 products does; ``torch`` is a bf16 linear layer, then ``cross_entropy`` of the
logits in fp32; ``Liger`` its fused linear cross-entropy, if it is installed: as it is by default, and with a loss per token
and fp32 sums, which is what training here needs. ``bf16`` is the exact result rounded to bf16: the least error possible.

ms: median of ``--runs`` runs after two more, by CUDA events. MiB: peak of a run above the inputs, gradients included.
Errors, against float64 on all tokens: the loss, largest of all tokens (where there is only a mean, of that); the gradients,
||x - ref|| / ||ref||. Every token weighs 1 / tokens. A method that does not fit in memory says so.

Without a CUDA device it ends with code 2, unless ``--device cpu`` is given (small sizes; no memory figures).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels import linear_cross_entropy

TOKENS = (8192, 32768)
HEADS = ((1024, 32000), (6144, 25008))  # the second: 200,064 rows over eight ranks
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = tuple[Tensor, Tensor, Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, valid_vocab=weight.shape[0])


def upcast(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ours(hidden.float(), weight.float(), labels)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def methods() -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": ours, "ours, upcast": upcast, "torch": plain}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError as error:
        print(f"Liger is not installed ({error}): its rows are skipped", file=sys.stderr)
        return found
    found["Liger, mean"] = lambda h, w, y: liger(h, w, y, reduction="mean")
    found["Liger, per token, fp32 sums"] = lambda h, w, y: liger(h, w, y, reduction="none", accum_dtype=torch.float32)
    return found


def inputs(tokens: int, width: int, rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a standard deviation of 3; one label in two is drawn from the first 16 rows, as frequent tokens are."""
    gen = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=gen, device=device).bfloat16()
    weight = (torch.randn(rows, width, generator=gen, device=device) * 3 / width**0.5).bfloat16()
    labels = torch.randint(rows, (tokens,), generator=gen, device=device)
    labels[::2] %= 16
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    """float64, without ``linear_cross_entropy``: losses [T], gradients of hidden and weight."""
    head = weight.detach().double().requires_grad_()
    losses, grad_hidden = [], []
    for h, y in zip(hidden.detach().split(2048), labels.split(2048), strict=True):
        h = h.double().requires_grad_()
        loss = F.cross_entropy(h @ head.T, y, reduction="none")
        (loss.sum() / len(labels)).backward()
        losses.append(loss.detach())
        grad_hidden.append(h.grad)
    assert head.grad is not None
    return torch.cat(losses), torch.cat([g for g in grad_hidden if g is not None]), head.grad


def step(method: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    loss = method(hidden, weight, labels)
    upstream = torch.full_like(loss, 1 / max(loss.numel(), 1))
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), upstream)
    return loss.detach(), grad_hidden, grad_weight


def errors(got: Result, want: Result) -> list[str]:
    reference = want[0] if got[0].dim() else want[0].mean()
    loss = float((got[0].double() - reference).abs().max())
    norms = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got[1:], want[1:], strict=True)]
    return [f"{loss:.1e}" + ("" if got[0].dim() else " (mean)"), *(f"{x:.1e}" for x in norms)]


def milliseconds(function: Callable[[], object], runs: int, device: str) -> float:
    for _ in range(2):
        function()
    times = []
    for _ in range(runs):
        if device == "cpu":
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak(function: Callable[[], object], device: str) -> str:
    if device == "cpu":
        return "-"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def measure(method: Loss, xs: tuple[Tensor, Tensor, Tensor], want: Result, runs: int, device: str) -> list[str]:
    """Cells of one row: ms, MiB, errors."""
    try:
        cells = errors(step(method, *xs), want)
        used = peak(lambda: step(method, *xs), device)
        return [f"{milliseconds(lambda: step(method, *xs), runs, device):,.2f}", used, *cells]
    except torch.OutOfMemoryError:
        return ["does not fit", "-", "-", "-", "-"]


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(c) for c in cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--head", nargs="+", default=[f"{h}x{v}" for h, v in HEADS], metavar="WIDTHxROWS")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if args.runs < 5:
        parser.error("--runs: at least 5")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (--device cpu --tokens 512 --head 64x1000 tries the script)")
        return 2

    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, bf16, forward+backward, median of {args.runs} runs\n")
    row("tokens", "width x rows", "method", "ms", "peak MiB", "error: loss", "grad hidden", "grad weight")
    row(*["---"] * 8)
    candidates = methods()
    for head in args.head:
        width, rows = (int(x) for x in head.split("x"))
        for tokens in args.tokens:
            xs = inputs(tokens, width, rows, args.device)
            want = exact(*xs)
            for method in candidates:
                row(tokens, head, method, *measure(candidates[method], xs, want, args.runs, args.device))
            rounded = want[0].float(), want[1].bfloat16(), want[2].bfloat16()
            row(tokens, head, "bf16", "-", "-", *errors(rounded, want))
            del xs, want, rounded
    return 0


if __name__ == "__main__":
    sys.exit(main())
