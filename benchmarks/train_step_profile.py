"""What ``train_step.py`` prints: its tables, and where the time of one step goes, the GPU's kernels in groups, by name."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from train_step_peers import SEED, SIGMA, median_length

COPIES = "copies, casts, memset"
GROUPS: tuple[tuple[str, str], ...] = (
    # The first pattern that is found in a kernel's name decides. Casts and sums of the optimizer that run as ordinary
    # kernels count as copies or element-wise; the head's products count as matrix products.
    ("optimizer, gradient norm, clipping", r"multi_tensor_apply|[aA]dam|NormTwoOps|NormOps|lpnorm"),
    ("softmax attention", r"sdpa|flash|fmha|varlen_attn|attention|cudnn.*(dot_do_o|convert_dq)"),
    ("lightning attention", r"^(sweep|local_states|combine_states)|^chunk_(fwd|bwd)_kernel|^parallel_simple_gla"),
    ("cross-entropy", r"^_(statistics|errors)$|cunn_Soft[mM]ax|SoftMaxForward|SoftMaxBackward|nll_loss"),
    ("matrix products, grouped", r"GroupProblemShape|[gG]rouped"),
    ("matrix products, dense", r"gemm|Gemm|nvjet|cutlass|cublas|splitK|xmma|wgmma|sm90_"),
    (
        "index work (MoE, embedding)",
        r"[sS]ort|[tT]op[kK]|_sum_rows|index|Index|scatter|gather|searchsorted|cumsum|[sS]can|embedding|Embedding"
        r"|compute_grad_weight|krn_partial|sum_and_scatter|arange",
    ),
    (COPIES, r"^Mem(cpy|set)|direct_copy|copy_kernel|CatArray|FillFunctor|transpose|permute"),
    (
        "element-wise and norms",
        r"elementwise|reduce_kernel|DeviceReduce|[rR]ms_?[nN]orm|[lL]ayer_?[nN]orm|GammaBeta|[sS]oft[mM]ax|silu|sigmoid"
        r"|^(split_silu|token_squares|norm_gate|_swiglu|_rotate|_forward$|_backward$)",
    ),
)
OTHER = "other"
HEAD = (
    "| peer | rows | tokens | documents | ms: median (range) | ms, first pass | tokens/s | MFU | peak GiB | first loss |"
    " gradient norm | ours / this |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


class Kernel(NamedTuple):
    name: str
    start: float
    duration: float
    """Microseconds, like ``start``."""


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


def traced(step: Callable[[], Any]) -> tuple[list[Kernel], float]:
    """The GPU's work of one step, and its wall-clock seconds from idle to idle."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    work = {"kernel", "gpu_memcpy", "gpu_memset"}
    kernels = [Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in work]
    return kernels, wall


def busy_ms(kernels: list[Kernel]) -> float:
    """Milliseconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        stop = kernel.start + kernel.duration
        total += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return total / 1e3


def breakdown(kernels: list[Kernel], wall_s: float) -> dict[str, Any]:
    """Milliseconds and launches of every group and kernel."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.duration / 1e3)
    names = sorted(by_name, key=lambda n: -sum(by_name[n]))
    groups: dict[str, dict[str, float]] = {group: {"ms": 0.0, "launches": 0} for group, _ in (*GROUPS, (OTHER, ""))}
    for name, durations in by_name.items():
        group = groups[group_of(name)]
        group["ms"] += sum(durations)
        group["launches"] += len(durations)
    busy = busy_ms(kernels)
    return {
        "wall_ms": wall_s * 1e3,
        "busy_ms": busy,
        "idle_ms": max(0.0, wall_s * 1e3 - busy),
        "groups": groups,
        "kernels": [
            {"name": n, "group": group_of(n), "ms": sum(by_name[n]), "launches": len(by_name[n])} for n in names
        ],
    }


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    return breakdown(*traced(step))


def print_profile(title: str, found: dict[str, Any], *, top: int) -> None:
    wall = found["wall_ms"]
    print(f"\n### {title}: {wall:.1f} ms under the profiler, busy {found['busy_ms']:.1f} ms\n")
    print("| group | ms | share of the step | launches |\n|---|---:|---:|---:|")
    for name, group in sorted(found["groups"].items(), key=lambda x: -x[1]["ms"]):
        print(f"| {name} | {group['ms']:.1f} | {group['ms'] / wall:.1%} | {group['launches']} |")
    print(f"| idle (wall - busy) | {found['idle_ms']:.1f} | {found['idle_ms'] / wall:.1%} | |")
    unknown = [k for k in found["kernels"] if k["group"] == OTHER][:12]
    if unknown:
        print("\nIn 'other': " + "; ".join(f"`{shortened(k['name'])}` {k['ms']:.2f} ms" for k in unknown))
    if top:
        print(f"\n| top {top} kernels | group | ms | launches |\n|---|---|---:|---:|")
        for k in found["kernels"][:top]:
            print(f"| `{shortened(k['name'])}` | {k['group']} | {k['ms']:.2f} | {k['launches']} |")
    print(flush=True)


def shortened(name: str, length: int = 100) -> str:
    name = name.replace("|", "/").replace("at::native::", "").removeprefix("void ")
    return name if len(name) <= length else f"{name[: length - 1]}…"


def print_head(bench: Any) -> None:
    r, args = bench.results, bench.args
    print(f"# Training steps, {args.preset}, {r['precision']}, {r['device']}\n\n{r['date']}, `{r['command']}`")
    print(", ".join(f"{k} {v}" for k, v in r["versions"].items()))
    print(f"run.recompute = {r['recompute']} (ours; the baseline recomputes every layer)")
    if "packed" in bench.kinds:
        source = f"prepared data of {args.data}" if args.data else None
        lengths = ", ".join(f"{median_length(n):,}" for n in bench.sizes)
        drawn = f"log-normal, medians {lengths}, sigma {SIGMA}, from 16 tokens to half a row, seed {SEED}"
        print(f"packed: {source or f'random tokens; document lengths: {drawn}'}")
    for tokens in bench.profiles:
        if bench.setting.device.type != "cuda" or tokens not in bench.sizes:
            print(f"NO PROFILE of {tokens:,} tokens: it needs a CUDA device, and --tokens to name them")
    sys.stdout.flush()


def table_row(case: dict[str, Any], ours: dict[str, Any] | None) -> str:
    start = f"| {case['peer']} | {case['rows']} | {case['tokens']:,} |"
    if not case.get("ms"):
        return f"{start} | **{case['status']}** | | | | | | | |"
    documents = sorted(case["documents"])
    ratio = f"{case['median_ms'] / ours['median_ms']:.2f}" if ours and ours.get("ms") else ""
    cells = [
        f"{documents[0]}" if documents[0] == documents[-1] else f"{documents[0]}-{documents[-1]}",
        f"{case['median_ms']:,.1f} ({min(case['ms']):,.1f}-{max(case['ms']):,.1f})",
        f"{median(case['first_pass_ms']):,.1f}",
        f"{case['tokens_per_s']:,.0f}",
        f"{case['mfu']:.1%}" if case["mfu"] else "",
        f"{case['peak_gib']:.1f}" if case["peak_gib"] else "",
        f"{case['first_loss']:.4f}",
        f"{case['first_grad_norm']:.4f}",
        ratio,
    ]
    note = "" if case["status"] == "ok" else f" {case['status']}"
    return f"{start} {' | '.join(cells)} |{note}"


def print_summary(bench: Any) -> None:
    print(
        f"\n## Summary\n\n| rows | tokens | {' | '.join(f'{p}: tokens/s, MFU, GiB' for p in bench.peers)} | ours / baseline |"
    )
    print("|---|---:|" + "---:|" * (len(bench.peers) + 1))
    for kind in bench.kinds:
        for tokens in bench.sizes:
            here = {c["peer"]: c for c in bench.cases if c["rows"] == kind and c["tokens"] == tokens}
            cells = [_short(here.get(peer)) for peer in bench.peers]
            speeds = [here.get(p, {}).get("tokens_per_s") for p in ("ours", "baseline")]
            ratio = f"{speeds[0] / speeds[1]:.2f}" if all(speeds) else ""
            print(f"| {kind} | {tokens:,} | {' | '.join(cells)} | {ratio} |")
    print(f"\n{time.perf_counter() - bench.began:.0f} s in all; {len(bench.broken)} broken")
    for what in bench.broken:
        print(f"BROKEN: {what}")
    sys.stdout.flush()


def _short(case: dict[str, Any] | None) -> str:
    if case is None:
        return "-"
    if not case.get("ms"):
        return str(case["status"])
    mfu = f", {case['mfu']:.1%}" if case["mfu"] else ""
    return f"{case['tokens_per_s']:,.0f}{mfu}" + (f", {case['peak_gib']:.1f}" if case["peak_gib"] else "")
