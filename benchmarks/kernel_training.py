"""Training curves by the precision of the lightning kernel: a small language model, float64 except for the kernel.

    python benchmarks/kernel_training.py [--out training.json] [--plot training.svg]

Every arm sees the same batches: packed documents of a random text that can be learned, fresh ones each step. Arms:

    reference   attention in float64 (backend "chunked")
    seeds       the same from other initial weights: how far apart trainings lie that nobody calls different
    fp32, bf16  the reference's initial weights, q, k, v and the gradient cast for the Triton kernels, results cast back

Layers are those of MiniMax-01 (section 2.2) without experts, all of them lightning: RMSNorm, fused projection, SiLU on
q, k, v, attention, RMSNorm over all heads, sigmoid gate, projection; then SwiGLU. Without a CUDA device the kernels run
in Triton's interpreter, on a tiny model. Exit code 1 if a bound does not hold: fp32 within 1e-4 of the reference's loss
at every step, bf16 within one standard deviation over the seeds at every step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m1_kernels import lightning_attention
from m1_kernels.triton_support import lightning_refusal

VOCAB, FP32_BOUND, EPS = 64, 1e-4, 1e-6
SHARES = (0.43, 0.31, 0.19)  # of the tokens, and one document of the rest
WIDTH, HEIGHT, LEFT, GAP = 420, 240, 70, 50  # of a panel, and around it
COLORS = {"reference": "#222", "seeds": "#bbb", "fp32": "#1f6f8b", "bf16": "#c9a227"}


class Arm(NamedTuple):
    """The backend and the precision of attention."""

    backend: str
    dtype: torch.dtype


REFERENCE = Arm("chunked", torch.float64)
KERNELS = {"fp32": Arm("triton", torch.float32), "bf16": Arm("triton", torch.bfloat16)}


@dataclass(frozen=True)
class Size:
    """A model and its training."""

    heads: int
    head_dim: int
    width: int
    lengths: tuple[int, ...]
    """Tokens of each document of a batch."""
    layers: int = 4
    steps: int = 50
    lr: float = 2e-3


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Odd lengths: no block divides them."""
    lengths = [int(share * tokens) | 1 for share in SHARES]
    return (*lengths, tokens - sum(lengths))


def document(rng: random.Random, table: Sequence[int], length: int) -> list[int]:
    """A successor of the last symbol (p 0.4) or of the one before it (0.5), or any; now and then a passage is repeated."""
    text = [rng.randrange(VOCAB), rng.randrange(VOCAB)]
    while len(text) < length:
        p = rng.random()
        if p < 0.02:
            start = rng.randrange(len(text))
            text += text[start : start + 16]
        else:
            text.append(table[text[-1]] if p < 0.4 else table[text[-2] + VOCAB] if p < 0.9 else rng.randrange(VOCAB))
    return text[:length]


def batches(size: Size, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels, [tokens] each, for every step."""
    rng = random.Random(0)
    table = [rng.randrange(VOCAB) for _ in range(2 * VOCAB)]
    for _ in range(size.steps):
        texts = [document(rng, table, length + 1) for length in size.lengths]
        yield (
            torch.tensor([x for text in texts for x in text[:-1]], device=device),
            torch.tensor([x for text in texts for x in text[1:]], device=device),
        )


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """MiniMax's decay rates: 2^(-8(h+1)/H) (1 - layer/(layers-1) + 1e-5)."""
    h = torch.arange(1, heads + 1, dtype=torch.float64)
    return torch.exp2(-8 * h / heads) * (1 - layer / (layers - 1) + 1e-5)


class Block(nn.Module):
    log_decay: Tensor

    def __init__(self, size: Size, layer: int, arm: Arm) -> None:
        super().__init__()
        self.size, self.arm, width, inner = size, arm, size.width, size.heads * size.head_dim
        self.norm, self.norm_heads, self.norm_mlp = (nn.RMSNorm(n, eps=EPS) for n in (width, inner, width))
        self.project, self.out = nn.Linear(width, 4 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.register_buffer("log_decay", -slopes(size.heads, layer, size.layers))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norm(x)).view(1, len(x), self.size.heads, 4, self.size.head_dim)
        q, k, v = (F.silu(y).to(self.arm.dtype) for y in parts[:, :, :, :3].unbind(3))
        y, _ = lightning_attention(q, k, v, self.log_decay, doc_lengths=self.size.lengths, backend=self.arm.backend)
        gate = parts[0, :, :, 3].flatten(1).sigmoid()
        x = x + self.out(self.norm_heads(y[0].flatten(1).to(x.dtype)) * gate)
        gate, up = self.up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def train(size: Size, arm: Arm, seed: int, device: str) -> list[float]:
    """The loss of every step, before its update."""
    torch.manual_seed(seed)
    blocks = [Block(size, layer, arm) for layer in range(size.layers)]
    head = (nn.RMSNorm(size.width, eps=EPS), nn.Linear(size.width, VOCAB, bias=False))
    model = nn.Sequential(nn.Embedding(VOCAB, size.width), *blocks, *head).double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.95))
    losses = []
    for inputs, labels in batches(size, device):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def distances(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, reference, strict=True)]


def text(x: float, y: float, content: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{content}</text>'


def panel(left: float, title: str, lines: dict[str, Sequence[float]], low: float, high: float, log: bool) -> list[str]:
    """Axes and lines; a line named "a b" has a's colour, and values below ``low`` lie on the axis."""
    steps = len(next(iter(lines.values())))

    def scale(value: float) -> float:
        value, bottom, top = (math.log10(x) if log else x for x in (max(value, low), low, high))
        return GAP + HEIGHT * (top - value) / (top - bottom)

    parts = [text(left, GAP - 14, title, 'class="head"')]
    decades = [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)] if log else []
    for tick in decades or [low + n * (high - low) / 4 for n in range(5)]:
        parts.append(f'<path d="M{left} {scale(tick):.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(text(left - 6, scale(tick) + 4, f"{tick:.0e}" if log else f"{tick:.2f}", 'text-anchor="end"'))
    xs = [left + WIDTH * n / max(steps - 1, 1) for n in range(steps)]
    for n in range(0, steps, max(steps // 5, 1)):
        parts.append(text(xs[n], GAP + HEIGHT + 16, str(n), 'text-anchor="middle"'))
    for row, (name, values) in enumerate(lines.items()):
        color = COLORS.get(name.split()[0], "#b33")
        points = " ".join(f"{x:.1f},{scale(y):.1f}" for x, y in zip(xs, values, strict=True))
        dash = ' stroke-dasharray="5 4"' if name.split()[0] in ("bf16", "bound") else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        parts.append(text(left + 100 * row, GAP + HEIGHT + 36, name, f'style="fill:{color}"'))
    return parts


def picture(results: dict[str, Any]) -> str:
    """Left the losses, with the range over the seeds; right the distances from the reference."""
    losses, away = results["losses"], results["away"]
    low, high = math.floor(min(results["low"])), math.ceil(max(results["high"]))
    curves = {"seeds lowest": results["low"], "seeds highest": results["high"], "reference": losses["reference"]}
    curves |= {"bf16": losses["bf16"]} if "bf16" in losses else {}
    steps = len(losses["reference"])
    gaps = {"seeds stdev": results["stdev"], **away, "bound of fp32": [FP32_BOUND] * steps}
    floor = 10.0 ** math.floor(math.log10(max(min(x for d in away.values() for x in d), 1e-9)))
    width = 2 * (WIDTH + LEFT) + 30
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + GAP + 50}" role="img">',
        "<title>Training with the lightning kernels, and in float64</title>",
        "<style>text{font:12px sans-serif;fill:#222}.head{font-weight:bold;font-size:13px}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        *panel(LEFT, f"loss by step: {results['device']}", curves, low, high, log=False),
        *panel(2 * LEFT + WIDTH, "distance from the float64 reference's loss", gaps, floor, 1.0, log=True),
        "</svg>\n",
    ])  # fmt: skip


def measure(size: Size, device: str, seeds: int) -> dict[str, Any]:
    """Losses of all arms that run on this device, why others do not, and the spread over the seeds."""
    kernels, refused = {}, {}
    for name, arm in KERNELS.items():
        reason = lightning_refusal(torch.device(device), arm.dtype, (size.head_dim, size.head_dim))
        if reason:
            refused[name] = reason
        else:
            kernels[name] = arm
    losses = {name: train(size, arm, 0, device) for name, arm in {"reference": REFERENCE, **kernels}.items()}
    others = [train(size, REFERENCE, seed, device) for seed in range(1, seeds + 1)]
    return {
        "losses": losses,
        "seeds": others,
        "refused": refused,
        "away": {name: distances(losses[name], losses["reference"]) for name in kernels},
        "stdev": [stdev(x) for x in zip(*others, strict=True)],
        "low": [min(x) for x in zip(*others, strict=True)],
        "high": [max(x) for x in zip(*others, strict=True)],
    }


def print_table(results: dict[str, Any]) -> None:
    away, steps = results["away"], len(results["stdev"])
    print("| step | reference loss | fp32 - reference | bf16 - reference | seeds: standard deviation | range |")
    print("|---|---|---|---|---|---|")
    for n in sorted({*range(0, steps, 5), steps - 1}):
        cells = [f"{away[name][n]:.1e}" if name in away else "not run" for name in KERNELS]
        spread = f"{results['stdev'][n]:.1e} | {results['high'][n] - results['low'][n]:.1e}"
        print(f"| {n} | {results['losses']['reference'][n]:.4f} | {' | '.join(cells)} | {spread} |")


def verdict(results: dict[str, Any]) -> bool:
    """Say which bounds hold; False if one does not. A NaN holds nowhere. What could not run is not judged."""
    away, good = results["away"], True
    if "fp32" in away:
        worst = max(away["fp32"], key=lambda x: (math.isnan(x), x))
        good = worst <= FP32_BOUND
        print(
            f"fp32: {'holds' if good else 'BROKEN'}: largest |fp32 - reference| over all steps {worst:.2e}, bound 1e-4"
        )
    if "bf16" in away:
        shares = [a / s for a, s in zip(away["bf16"], results["stdev"], strict=True)]
        worst = max(shares, key=lambda x: (math.isnan(x), x))
        print(
            f"bf16: {'holds' if worst <= 1 else 'BROKEN'}: |bf16 - reference| / standard deviation over "
            f"{len(results['seeds'])} float64 seeds at the same step is at most {worst:.3f} (step {shares.index(worst)}), "
            f"bound 1; largest |bf16 - reference| {max(away['bf16']):.2e}, "
            f"smallest standard deviation {min(results['stdev']):.2e}"
        )
        good = good and worst <= 1
    for name, reason in results["refused"].items():
        print(f"{name}: NOT RUN, nothing shown: {reason}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, help="default 4, on a CPU 2")
    parser.add_argument("--head-dim", type=int, help="default 64, on a CPU 16")
    parser.add_argument("--width", type=int, help="default 256, on a CPU 32")
    parser.add_argument("--tokens", type=int, help="of a batch of four documents; default 2048, on a CPU 96")
    parser.add_argument("--steps", type=int, help="default 50, on a CPU 20")
    parser.add_argument("--seeds", type=int, default=5, help="other initial weights, at least 2")
    parser.add_argument("--out", help="write the losses as JSON")
    parser.add_argument("--plot", help="write a picture of them as SVG")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: at the first call
    elif not torch.cuda.is_available():
        parser.error("no CUDA device")
    defaults = (4, 64, 256, 2048, 50) if args.device == "cuda" else (2, 16, 32, 96, 20)
    given = (args.heads, args.head_dim, args.width, args.tokens, args.steps)
    heads, head_dim, width, tokens, steps = (d if g is None else g for g, d in zip(given, defaults, strict=True))
    if tokens < 32 or steps < 1 or args.seeds < 2:
        parser.error("wants --tokens of at least 32, --steps of at least 1, --seeds of at least 2")
    size = Size(heads, head_dim, width, document_lengths(tokens), steps=steps)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, Triton's interpreter"
    print(f"{name}, torch {torch.__version__}: {size}\n", flush=True)
    results = {
        "device": name,
        "torch": torch.__version__,
        "size": asdict(size),
        **measure(size, args.device, args.seeds),
    }
    print_table(results)
    print()
    good = verdict(results)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)
    if args.plot:
        with open(args.plot, "w") as file:
            file.write(picture(results))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
