"""The kernels of a decoding step on a GPU, for ``generate.py --only kernels``: are they right, and where does the time go.

1. Each kernel against PyTorch on the CPU, bf16 and fp32, at the sizes of the 700m preset.
2. A step, replayed: milliseconds by events, its kernels by name, with and without programmatic dependent launch, and whether
   both give the same tokens. With it a kernel's time holds its wait for the one before it: compare sums without it.
3. The two kernels of the experts with other tile sizes, where tokens choose experts evenly, and where one gets every fourth.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from m1_kernels import (
    begin_step,
    choose_tokens,
    decode_attention,
    end_step,
    lightning_decode_layer,
    mix_and_norm,
    norm_and_route,
    rotary_frequencies,
    rotate_into_cache,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference over largest value; a bf16 number has 8 bits, and the CPU rounds in more places."""
REPLAYS = 40
UP_TILES = (
    (32, 128, 4, 3), (32, 128, 4, 2), (32, 128, 4, 4), (16, 128, 4, 3), (16, 256, 4, 3), (64, 64, 4, 3), (64, 128, 8, 3),
    (32, 64, 4, 4), (32, 256, 8, 2), (16, 256, 4, 2),
)  # fmt: skip
DOWN_TILES = (
    (64, 128, 4, 3), (32, 128, 4, 3), (32, 256, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (16, 256, 4, 3), (128, 64, 4, 3),
    (64, 256, 8, 2), (32, 256, 4, 2), (16, 512, 4, 2),
)  # fmt: skip


def measure(bench: Any) -> None:
    """Print everything; ``bench.broken`` becomes true where a kernel is wrong."""
    if bench.device.name == "cpu":
        print("kernels: they need a GPU")
        return
    for dtype in (torch.float32, torch.bfloat16):
        for name, difference in differences(dtype):
            bad = not difference <= TOLERANCE[dtype]
            bench.broken |= bad
            print(
                f"{str(dtype)[6:]:9} {name:22} largest difference {difference:.1e}{' WRONG' if bad else ''}", flush=True
            )
    told = {}
    for overlapping in (True, False):
        with overlap_is(overlapping):
            title = f"{'with' if overlapping else 'without'} programmatic dependent launch"
            told[overlapping] = step_times(bench, title)
            bench._free()
    equal = told[True] == told[False]
    bench.broken |= not equal
    print(f"tokens and log-probabilities with and without it: {'equal in every bit' if equal else 'DIFFERENT'}")
    sweep_tiles(bench)


def differences(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Name and largest relative difference of every kernel against the same function on the CPU."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def compared(function: Callable[..., Any], *inputs: Any, **more: Any) -> float:
        """Over all results, and over all tensors that the function changes."""
        here = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        there = [x.cuda() if isinstance(x, Tensor) else x for x in inputs]
        results = []
        for given in (here, there):
            result = function(*given, **more)
            results.append([*(result if isinstance(result, tuple) else () if result is None else (result,)), *given])
        pairs = [(a.double(), b.cpu().double()) for a, b in zip(*results, strict=True) if isinstance(a, Tensor)]
        return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)

    tokens, width, experts, inner, heads, dim = 64, 1024, 16, 1536, 8, 128
    x, y, norm = random(tokens, width), random(tokens, width), random(width)
    scales: dict[str, Any] = {"eps": 1e-5, "alpha": 3.0, "beta": 1.0}
    router = random(experts, width) / 32
    n, weights, index = norm_and_route(x, y, norm, router, 2, **scales)
    got_n, got_weights, got_index = (
        t.cpu() for t in norm_and_route(x.cuda(), y.cuda(), norm.cuda(), router.cuda(), 2, **scales)
    )
    yield "norm", float((n.double() - got_n.double()).abs().max() / n.double().abs().max())
    logits = got_n.double() @ router.double().T  # of the norm as the GPU rounded it
    top, best = logits.softmax(-1).topk(2)
    yield "router, experts", float((best != got_index).float().mean())
    yield "router, weights", float((top / top.sum(1, keepdim=True) - got_weights).abs().max())
    w13, w2 = random(experts, 2, inner, width) / 32, random(experts, width, inner) / 39
    skewed = torch.where(torch.arange(tokens)[:, None] % 3 < 2, torch.tensor([[3, 7]]), index)
    for name, chosen in (("experts", index), ("experts, skewed", skewed)):
        for rows in (tokens, 5, 1):
            yield f"{name}, {rows}", compared(
                mix_and_norm, n[:rows], w13, w2, weights[:rows], chosen[:rows], norm, first=0, num_experts=experts,
                **scales,
            )  # fmt: skip
    slots, capacity = 64, 1344
    positions = torch.randint(0, capacity - 1, (slots,), generator=generator)
    frequencies = rotary_frequencies(1e6, dim, torch.device("cpu"))
    keys, values, grouped = (
        random(slots, capacity, 1, dim),
        random(slots, capacity, 1, dim),
        random(slots, 1, heads + 2, dim),
    )
    yield "rotation into cache", compared(rotate_into_cache, grouped, positions, positions, frequencies, keys, values)
    yield "attention", compared(decode_attention, random(slots, heads, dim), keys, values, positions + 1)
    yield "lightning", compared(
        lightning_decode_layer, random(slots, heads, 4, dim), random(heads * dim), -torch.rand(heads, generator=generator),
        torch.randn(slots, heads, dim, dim, generator=generator), eps=1e-5,
    )  # fmt: skip
    active, at = (positions % 3 > 0).long(), torch.tensor([2])
    uniform, forced = torch.rand(8, slots, dtype=torch.float64, generator=generator), torch.full((8, slots), -1)
    yield "begin of a step", compared(begin_step, positions, active, at, uniform, forced, capacity=capacity)

    def ended(token: Tensor, tokens: Tensor, logprobs: Tensor, positions: Tensor, active: Tensor, at: Tensor) -> None:
        end_step(
            positions * 2, positions.float() + 0.5, token=token, tokens=tokens, logprobs=logprobs, positions=positions,
            active=active, at=at, capacity=capacity,
        )  # fmt: skip

    state = [torch.zeros(slots).long(), torch.zeros(8, slots).long(), torch.zeros(8, slots), positions, active, at]
    yield "end of a step", compared(ended, *state)
    rules: dict[str, Tensor] = {
        "temperature": (positions % 3).float(), "top_k": positions % 2 * 50,
        "top_p": torch.where(positions % 5 > 2, 0.9, 1.0).double(), "uniform": uniform[0], "banned": positions[:, None] % 9,
        "lengths": positions, "from_length": torch.full((slots,), 700), "forced": torch.where(positions % 7 == 0, positions, -1),
    }  # fmt: skip
    yield "choice of tokens", compared(
        lambda scores, *given: choose_tokens(scores.clone(), **dict(zip(rules, given, strict=True)))[0].clone(),
        torch.randn(slots, 32_000, generator=generator), *rules.values(),
    ) if dtype == torch.float32 else 0.0  # fmt: skip


@contextmanager
def overlap_is(on: bool) -> Iterator[None]:
    """Kernels are launched with or without programmatic dependent launch."""
    from m1_kernels import overlap

    before = overlap._CAPABILITY
    overlap._CAPABILITY = before if on else (99, 0)
    overlap.overlap.cache_clear()
    try:
        yield
    finally:
        overlap._CAPABILITY = before
        overlap.overlap.cache_clear()


def step_times(bench: Any, title: str) -> list[Any]:
    """Print time and kernels of a step; returns tokens and log-probabilities of greedy answers."""
    from train_step_profile import busy_ms, shortened, traced

    from m1_stages.generation import Request, Sampling

    a = bench.args
    engine = bench.engine(slots=a.batch, capacity=a.prompt + a.tokens + 64, steps=a.steps)
    asked = [Request(prompt=p, max_tokens=a.tokens, sampling=Sampling(temperature=0.0)) for p in bench.prompts]
    done = engine.generate(asked)
    for request in asked:
        engine.submit(request)
    begun: set[int] = set()
    while len(begun) < a.batch:
        begun |= {update.request for update in engine.step()}
    decoder = engine._decoder

    def replayed() -> None:
        decoder._at.zero_()
        for _ in range(a.steps):
            decoder._graph.replay()

    replayed()
    step_ms = events_ms(replayed) / a.steps
    bound, _ = bench._bound()
    bench.results[f"step {title}"] = step_ms
    decoder._at.zero_()
    kernels, _ = traced(decoder._graph.replay)
    span = (max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)) / 1e3
    print(f"\na step {title}: {step_ms:.4f} ms, {bound / 1e9 / step_ms:.3f} TB/s; {len(kernels)} kernels, profiled "
          f"{span:.4f} ms, of them {span - busy_ms(kernels):.4f} between kernels")  # fmt: skip
    print("\n| us | times | us each | kernel |\n|---:|---:|---:|---|")
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.duration)
    for name, times in sorted(by_name.items(), key=lambda x: -sum(x[1])):
        print(f"| {sum(times):.1f} | {len(times)} | {statistics.median(times):.2f} | {shortened(name)} |")
    print(flush=True)
    return [(answer.tokens, answer.logprobs) for (answer,) in done]


def events_ms(action: Callable[[], Any], repeats: int = REPLAYS) -> float:
    """Median milliseconds by CUDA events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sweep_tiles(bench: Any) -> None:
    """Microseconds of a layer's expert kernels, in a graph over all layers, so that no weight comes from the cache."""
    from m1_kernels.moe import decode_triton as few

    layers = [layer.mlp.experts for layer in bench.model.decoder.layers]
    count, k, rows = bench.shape.num_experts, bench.shape.experts_per_token, bench.args.batch
    slot = torch.arange(rows * k, device="cuda").view(rows, k)
    patterns = {"even": slot % count, "skewed": torch.where(slot % 4 == 0, 0, 1 + slot % (count - 1))}
    x = torch.randn(rows, bench.shape.hidden_size, device="cuda").to(layers[0].w13.dtype)
    weights = torch.full((rows, k), 1 / k, device="cuda")
    best_up, best_down = few.UP, few.DOWN
    tried = [(few.Tiles(*up), best_down) for up in UP_TILES] + [(best_up, few.Tiles(*down)) for down in DOWN_TILES]
    for up, down in tried:
        few.UP, few.DOWN = up, down
        found = []
        for index in patterns.values():

            def all_layers(index: Tensor = index) -> None:
                for experts in layers:
                    few.expert_rows_triton(x, experts.w13, experts.w2, weights, index, 0)

            try:
                all_layers()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph), torch.no_grad():
                    all_layers()
                found.append(f"{1e3 * events_ms(graph.replay) / len(layers):.2f} us")
            except Exception as error:  # other tiles are measured all the same
                found.append(f"{type(error).__name__}")
        shown = ", ".join(f"{name} {time}" for name, time in zip(patterns, found, strict=True))
        print(f"experts of a layer, up {tuple(up)}, down {tuple(down)}: {shown}", flush=True)
    few.UP, few.DOWN = best_up, best_down
