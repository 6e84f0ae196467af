"""Lightning attention on one CUDA device: ours, fla's, transformers' loop, beside the copy floor, in one run.

    python benchmarks/kernels.py [--out results.json] [--only NAME ...] [--no-fla]

Floor: a device copy of the fewest bytes, each tensor once: forward q, k, v, o; forward+backward these and do, dq, dk, dv,
with q, k, v read again. Times are medians of CUDA-event timings after warm-up, spread is the 20 % and 80 % quantile.
Errors: ||x - ref|| / ||ref|| against our float64 chunked backend on some heads, random inputs that are fresh per case and the
same for both; outputs lie where NaN was before. ``fla``: ``chunk_simple_gla(g_gamma=-slope, scale=1)`` of
flash-linear-attention, if it is installed; its tuner tries 4 warps and more.
A case that does not fit in the device's memory says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels import lightning_attention, lightning_decode, lightning_layer

D = 128
DEVICE = "cuda"
DOCUMENTS = (0.30, 0.21, 0.165, 0.12, 0.08, 0.06, 0.045, 0.02)
# name, heads, tokens, documents, layer of 80 whose decay rates are taken
CASES = (
    ("32k", 64, 32 * 1024, False),
    ("128k", 64, 128 * 1024, False),
    ("256k", 64, 256 * 1024, False),
    ("256k-8docs", 64, 256 * 1024, True),
    ("1m-16heads", 16, 1024 * 1024, False),
    ("1m-8heads", 8, 1024 * 1024, False),
    ("1m", 64, 1024 * 1024, False),
)
LAYER = 62
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def slopes(heads: int, layer: int = LAYER, layers: int = 80) -> Tensor:
    """MiniMax's decay rates: 2^(-8(h+1)/H) (1 - layer/(layers-1) + 1e-5)."""
    h = torch.arange(1, heads + 1, device=DEVICE, dtype=torch.float32)
    return torch.exp2(-8 * h / heads) * (1 - layer / (layers - 1) + 1e-5)


def timed(function: Callable[[], Any]) -> dict[str, float]:
    from triton.testing import do_bench

    function()
    median, low, high = do_bench(function, warmup=25, rep=150, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median, "low": low, "high": high}


def document_lengths(tokens: int, packed: bool) -> tuple[int, ...]:
    if not packed:
        return (tokens,)
    lengths = [int(share * tokens) + 3 * n for n, share in enumerate(DOCUMENTS)]
    return (*lengths[:-1], tokens - sum(lengths[:-1]))


def ours(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, lengths: tuple[int, ...], **more: Any) -> tuple:
    return lightning_attention(q, k, v, decay, doc_lengths=lengths, **more)


def fla_attention() -> Attend | None:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        print(f"fla is not installed ({error}): its columns stay empty", file=sys.stderr)
        return None

    _spare_slow_configs()

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, lengths: tuple[int, ...], **more: Any) -> tuple:
        edges = None
        if len(lengths) > 1:
            edges = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        result: tuple = chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0, cu_seqlens=edges, **more)
        return result

    return attend


def _spare_slow_configs() -> None:
    """Let fla's tuner try 4 warps and more only: at D=128 those with 2 never won, and took minutes to compile."""
    from triton.runtime import Autotuner

    for tuner in [x for x in gc.get_objects() if isinstance(x, Autotuner)]:
        tuner.configs = [c for c in tuner.configs if c.num_warps >= 4] or tuner.configs


def inputs(heads: int, tokens: int, grad: bool) -> list[Tensor]:
    xs = [torch.empty(1, tokens, heads, D, device=DEVICE, dtype=torch.bfloat16).normal_() for _ in range(3)]
    return [x.requires_grad_(grad) for x in xs]


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(attend: Attend, heads: int, tokens: int, packed: bool) -> dict[str, Any]:
    """Times and peak memory, forward and forward+backward."""
    lengths, decay = document_lengths(tokens, packed), -slopes(heads)
    result: dict[str, Any] = {}
    for what in ("forward", "both"):
        clean()
        try:
            result[what] = _time_attention(attend, inputs(heads, tokens, what == "both"), decay, lengths)
        except torch.OutOfMemoryError:
            result[what] = {"oom": True}
    return result


def _time_attention(attend: Attend, xs: list[Tensor], decay: Tensor, lengths: tuple[int, ...]) -> dict[str, float]:
    """Forward, and backward too if the inputs want gradients."""
    if xs[0].requires_grad:
        do = torch.empty_like(xs[0]).normal_()
        result = timed(lambda: torch.autograd.grad(attend(*xs, decay, lengths)[0], xs, do))
    else:
        result = timed(lambda: attend(*xs, decay, lengths))
    return result | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def errors(attend: Attend, heads: int, tokens: int, layer: int) -> dict[str, float]:
    """Relative errors of outputs, final state and all gradients, against float64."""
    clean()
    torch.cuda.manual_seed(tokens + layer)
    decay = -slopes(64, layer)[:: 64 // heads][:heads].contiguous()
    xs = inputs(heads, tokens, True)
    state = torch.randn(1, heads, D, D, device=DEVICE).requires_grad_()
    do, ds = torch.empty_like(xs[0]).normal_(), torch.randn_like(state)

    def run(function: Attend, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*xs, state)]
        out, final = function(*leaves[:3], decay, (tokens,), initial_state=leaves[3], output_final_state=True)
        grads = torch.autograd.grad((out, final), leaves, (do.to(out.dtype), ds.to(final.dtype)))
        return [out.detach(), final.detach(), *grads]

    poisoned = [torch.full_like(x, float("nan")) for x in xs for _ in range(2)]
    del poisoned  # the allocator hands this memory to the outputs
    got = run(attend, None)
    want = run(lambda *a, **k: ours(*a, backend="chunked", **k), torch.float64)
    names = ("o", "state", "dq", "dk", "dv", "dstate")
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, got, want, strict=True)}


def eager_layer(attend: Attend, x: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
    """The lightning layer in eager PyTorch: SiLU, the kernel, RMSNorm in fp32, sigmoid gate."""
    q, k, v, gate = x.unbind(3)
    out, _ = attend(F.silu(q), F.silu(k), F.silu(v), decay, (x.shape[1],))
    y = out.flatten(2).float()
    y = (weight.float() * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))).to(x.dtype)
    return y * torch.sigmoid(gate.flatten(2))


def layer_case(fla: Attend | None, heads: int, tokens: int) -> dict[str, Any]:
    decay = -slopes(heads)
    variants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda x, w: lightning_layer(x, w, decay, eps=1e-6)
    }
    if fla is not None:
        variants["fla + eager"] = lambda x, w: eager_layer(fla, x, w, decay)
    return {name: _time_layer(layer, heads, tokens) for name, layer in variants.items()}


def _time_layer(layer: Callable[[Tensor, Tensor], Tensor], heads: int, tokens: int) -> dict[str, Any]:
    clean()
    x = torch.empty(1, tokens, heads, 4, D, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    weight = torch.ones(heads * D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty(1, tokens, heads * D, device=DEVICE, dtype=torch.bfloat16).normal_()

    def forward() -> None:
        with torch.no_grad():
            layer(x, weight)

    first = timed(forward)
    both = timed(lambda: torch.autograd.grad(layer(x, weight), (x, weight), dy))
    return {"forward": first, "both": both | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}}


def decode_case(batch: int, heads: int) -> dict[str, Any]:
    clean()
    state = torch.randn(batch, heads, D, D, device=DEVICE)
    q, k, v = (torch.randn(batch, heads, D, device=DEVICE).bfloat16() for _ in range(3))
    decay = -slopes(heads)
    result = timed(lambda: lightning_decode(q, k, v, decay, state))
    return result | {"bytes": 2 * state.numel() * 4}


def transformers_case(heads: int, tokens: int) -> dict[str, Any] | None:
    """The block loop of MiniMaxLightningAttention, without its projections, norm and gate."""
    try:
        from transformers import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError as error:
        print(f"transformers is not installed ({error}): its row is missing", file=sys.stderr)
        return None

    class Open(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((1,), 30.0, device=x.device, dtype=x.dtype)

    clean()
    config = MiniMaxConfig(hidden_size=heads * D, num_attention_heads=heads, head_dim=D, num_hidden_layers=8,
                           layer_types=["linear_attention"] * 7 + ["full_attention"])  # fmt: skip
    with torch.device("meta"):
        layer = MiniMaxLightningAttention(config, layer_idx=3)
    layer = layer.to_empty(device=DEVICE)
    layer.qkv_proj = layer.act_fn = layer.norm = layer.out_proj = torch.nn.Identity()
    layer.output_gate = Open()
    rate = slopes(heads)[:, None, None]
    block = torch.arange(layer.block_size, device=DEVICE, dtype=torch.float32) + 1
    distance = block[:, None] - block[None, :]
    layer.slope_rate = rate
    layer.query_decay = torch.exp(-rate * block[:, None])
    layer.key_decay = torch.exp(-rate * (layer.block_size - block[:, None]))
    masked = torch.where(distance >= 0, -rate * distance, float("-inf"))
    layer.diagonal_decay = torch.exp(masked)[None]
    layer = layer.to(torch.bfloat16)
    packed = torch.randn(1, tokens, 3 * heads * D, device=DEVICE).bfloat16().requires_grad_()
    do = torch.randn(1, tokens, heads * D, device=DEVICE).bfloat16()

    def forward() -> Tensor:
        out: Tensor = layer(packed, (None, None), None)[0]
        return out

    with torch.no_grad():
        first = timed(forward)
    return {"forward": first, "both": timed(lambda: torch.autograd.grad(forward(), packed, do))}


def ceilings() -> dict[str, float]:
    source = torch.empty(2 * 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timed(lambda: target.copy_(source))["ms"] * 1e-9
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    return {"copy_tb_s": copy, "matmul_tflops": 2 * 8192**3 / timed(lambda: a @ b)["ms"] * 1e-9}


def cell(result: dict[str, Any] | None, floor: float) -> str:
    if result is None:
        return "| "
    if result.get("oom"):
        return "out of memory"
    spread = max(result["high"] - result["ms"], result["ms"] - result["low"])
    text = f"{result['ms']:.2f} ± {spread:.2f} ms, **{floor / result['ms']:.0%}**"
    return text + f", {result['peak_gib']:.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write everything here as JSON")
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(c[0] for c in CASES)}, errors, layer, decode, loop")
    parser.add_argument("--no-fla", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device; on a CPU run benchmarks/kernels_cpu.py")
    import triton

    def wanted(name: str) -> bool:
        return args.only is None or name in args.only

    def save() -> None:
        if args.out:
            with open(args.out, "w") as file:
                json.dump(results, file, indent=1)

    fla = None if args.no_fla else fla_attention()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= {"triton": triton.__version__, "ceilings": ceilings(), "cases": {}}
    bandwidth = results["ceilings"]["copy_tb_s"]
    print(f"{results['device']}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {bandwidth:.2f} TB/s, matrix product {results['ceilings']['matmul_tflops']:.0f} TFLOP/s\n")
    print("| case | tokens x heads | ours forward | ours forward+backward | fla forward | fla forward+backward |")
    print("|---|---|---|---|---|---|")
    for name, heads, tokens, packed in CASES:
        if not wanted(name):
            continue
        one = tokens * heads * D * 2 / bandwidth * 1e-9
        row = {"ours": measure(ours, heads, tokens, packed)}
        if fla is not None:
            row["fla"] = measure(fla, heads, tokens, packed)
        results["cases"][name] = row | {"floor_forward_ms": 4 * one, "floor_both_ms": 11 * one}
        cells = [cell(row[who][what], n * one) for who in row for what, n in (("forward", 4), ("both", 11))]
        print(f"| {name} | {tokens:,} x {heads} | " + " | ".join(cells) + " |", flush=True)
        save()
    if wanted("errors"):
        print("\n| relative error | o | state | dq | dk | dv | dstate |\n|---|---|---|---|---|---|---|")
        results["errors"] = {}
        for tokens, heads, layer in ((32_768, 8, 0), (32_768, 8, 62), (32_768, 8, 78), (2**20, 2, 0), (2**20, 2, 78)):
            for who, attend in (("ours", ours), ("fla", fla)):
                if attend is not None:
                    found = errors(attend, heads, tokens, layer)
                    results["errors"][f"{who} {tokens} layer {layer}"] = found
                    values = " | ".join(f"{x:.3e}" for x in found.values())
                    print(f"| {who}, {tokens:,} tokens, rates of layer {layer} | {values} |", flush=True)
        save()
    if wanted("layer"):
        results["layer"] = layer_case(fla, 64, 128 * 1024)
        print("\n| lightning layer, 131,072 x 64 | forward ms | forward+backward ms | peak GiB |\n|---|---|---|---|")
        for who, r in results["layer"].items():
            print(
                f"| {who} | {r['forward']['ms']:.2f} | {r['both']['ms']:.2f} | {r['both']['peak_gib']:.1f} |",
                flush=True,
            )
        save()
    if wanted("decode"):
        r = results["decode"] = decode_case(64, 64)
        share = r["bytes"] / bandwidth * 1e-9 / r["ms"]
        print(f"\ndecode, 64 sequences x 64 heads: {r['ms'] * 1e3:.0f} us, {share:.0%} of the floor", flush=True)
        save()
    if wanted("loop"):
        r = results["loop"] = transformers_case(64, 32 * 1024)
        if r is not None:
            print(f"\ntransformers' loop, 32,768 x 64: {r['forward']['ms']:.1f} / {r['both']['ms']:.1f} ms", flush=True)
        save()


if __name__ == "__main__":
    main()
