"""The kernels of a decoding step on a GPU, for ``generate.py --only kernels``: are they right, and where does the time go.

1. Each kernel against PyTorch on the CPU, bf16 and fp32, at the sizes of the 700m preset.
2. A step, replayed: milliseconds by events, its kernels by name, with and without programmatic dependent launch, and whether
   both give the same tokens. With it a kernel's time holds its wait for the one before it: compare sums without it.
3. The choice of tokens alone, with 512 and with 32,000 of them.
4. The step with other settings of its kernels, one changed at a time, and some together (``VARIANTS``), captured anew each time.
In all of them ``experts read`` is the mean over layers of those that some row chose: fewer are read where rows say the same.
"""

from __future__ import annotations

import importlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
REPLAYS = 25
_MOE, _ATTENTION, _OVERLAP = (
    f"m1_kernels.{name}" for name in ("moe.decode_triton", "softmax_attention.decode_triton", "overlap")
)
WITHOUT_OVERLAP = {(_OVERLAP, "_CAPABILITY"): (99, 0)}
UP_TILES = (
    (32, 128, 4, 3), (32, 64, 4, 4), (64, 128, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 4),
)  # fmt: skip
DOWN_TILES = (
    (64, 128, 4, 3), (64, 128, 4, 5), (64, 128, 8, 4), (32, 128, 4, 4), (32, 128, 4, 5), (32, 256, 4, 3),
)  # fmt: skip
VARIANTS: dict[str, dict[tuple[str, str], Any]] = {
    "no programmatic dependent launch": WITHOUT_OVERLAP,
    "first weights of experts not read ahead": {(_MOE, "AHEAD"): 0},
    "256 bytes of a row read ahead": {(_MOE, "AHEAD"): 256},
    "1024 bytes of a row read ahead": {(_MOE, "AHEAD"): 1024},
    "attention, 32 keys at once": {(_ATTENTION, "KEYS_AT_ONCE"): 32},
    **{f"up {tiles}": {(_MOE, "UP"): tiles} for tiles in UP_TILES},
    **{f"down {tiles}": {(_MOE, "DOWN"): tiles} for tiles in DOWN_TILES},
}
"""Module and name of what is set, and to what: kernels read these when they are launched."""


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
    choice_times()
    told = {}
    for name, settings in (("as it is", {}), ("without programmatic dependent launch", WITHOUT_OVERLAP)):
        with settings_are(settings):
            told[name] = step_times(bench, name)
            bench._free()
    equal = len({repr(answers) for answers in told.values()}) == 1
    bench.broken |= not equal
    print(f"tokens and log-probabilities of both: {'equal in every bit' if equal else 'DIFFERENT'}")
    sweep(bench)


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
def settings_are(settings: dict[tuple[str, str], Any]) -> Iterator[None]:
    """Kernels are launched with these settings, by module and name."""
    from m1_kernels.moe.decode_triton import Tiles
    from m1_kernels.overlap import overlap

    before = [(importlib.import_module(module), name) for module, name in settings]
    values = [getattr(module, name) for module, name in before]
    for (module, name), value in zip(before, settings.values(), strict=True):
        setattr(module, name, Tiles(*value) if name in ("UP", "DOWN") else value)
    overlap.cache_clear()
    try:
        yield
    finally:
        for (module, name), value in zip(before, values, strict=True):
            setattr(module, name, value)
        overlap.cache_clear()


def choice_times() -> None:
    """Print the microseconds of the choice of tokens for 64 rows, in a graph."""
    for vocab in (512, 32_000):
        logits = torch.randn(64, vocab, device="cuda") * 2
        zeros = torch.zeros(64, dtype=torch.int64, device="cuda")
        uniform = torch.rand(64, dtype=torch.float64, device="cuda")
        found = []
        for heat, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 0, 0.95), (1.0, 50, 1.0)):
            rules = {
                "temperature": uniform.float() * 0 + heat, "top_k": zeros + top_k, "top_p": uniform * 0 + top_p,
                "uniform": uniform, "banned": zeros[:, None], "lengths": zeros + 1, "from_length": zeros, "forced": zeros - 1,
            }  # fmt: skip
            graph = captured(lambda x=logits, rules=rules: [choose_tokens(x, **rules) for _ in range(20)])
            found.append(f"{1e3 * events_ms(graph.replay) / 20:.1f}")
        print(f"choice of tokens, {vocab} logits: greedy, sampled, top-p 0.95, top-k 50: {', '.join(found)} us")


class Steps:
    """An engine in the middle of answers, and its captured step."""

    def __init__(self, bench: Any) -> None:
        from m1_stages.generation import Request, Sampling

        a = self.args = bench.args
        engine = bench.engine(slots=a.batch, capacity=a.prompt + a.tokens + 64, steps=a.steps)
        self.asked = [Request(prompt=p, max_tokens=a.tokens, sampling=Sampling(temperature=0.0)) for p in bench.prompts]
        self.answers = [(answer.tokens, answer.logprobs) for (answer,) in engine.generate(self.asked)]
        for request in self.asked:
            engine.submit(request)
        begun: set[int] = set()
        while len(begun) < a.batch:
            begun |= {update.request for update in engine.step()}
        self.decoder = engine._decoder
        self.engine = engine

    def ask(self, temperature: float, top_p: float) -> None:
        """Choose tokens so from now on, and go a few steps."""
        self.decoder._rules.temperature.fill_(temperature)
        self.decoder._rules.top_p.fill_(top_p)
        self.decoder._uniform.uniform_()
        for _ in range(3):
            self.replay()

    def capture(self) -> None:
        """Record the step again, with the settings of now."""
        self.decoder._at.zero_()
        self.decoder._warm_up()
        self.decoder._graph = self.decoder._captured()

    def replay(self) -> None:
        """Go ``--steps`` steps from the middle of the answers."""
        self.decoder._at.zero_()
        self.decoder.length.fill_(self.args.prompt + self.args.tokens // 2)
        for _ in range(self.decoder.steps):
            self.decoder._graph.replay()

    def ms(self) -> float:
        """Milliseconds of a step."""
        self.replay()
        return events_ms(self.replay) / self.decoder.steps

    def experts_read(self) -> float:
        """Experts of a layer that the rows choose, the mean over layers; goes a step."""
        from m1_stages.generation import forward

        chosen: list[int] = []

        def route(*inputs: Any, **more: Any) -> Any:
            result = norm_and_route(*inputs, **more)
            chosen.append(result[2].unique().numel())
            return result

        with mock.patch.object(forward, "norm_and_route", route):
            self.decoder._at.zero_()
            self.decoder._step()
        return statistics.mean(chosen)


KINDS = {"greedy": (0.0, 1.0), "sampled": (1.0, 1.0), "filtered": (1.0, 0.95)}
"""Temperature and top-p."""


def step_times(bench: Any, title: str) -> list[Any]:
    """Print time and kernels of a step; returns tokens and log-probabilities of greedy answers."""
    steps = Steps(bench)
    bound, _ = bench._bound()
    for kind, rules in KINDS.items():
        steps.ask(*rules)
        ms, experts = steps.ms(), steps.experts_read()
        bench.results[f"step {title}, {kind}"] = {"ms": ms, "experts_read": experts}
        print(f"\na step {title}, {kind}: {ms:.4f} ms, {bound / 1e9 / ms:.3f} TB/s of the bound; experts read {experts:.2f} "
              f"of {bench.shape.num_experts}")  # fmt: skip
        if kind != "sampled":
            steps.decoder._at.zero_()
            print_kernels(steps.decoder._graph.replay)
    return steps.answers


def print_kernels(action: Callable[[], Any]) -> None:
    """Print the kernels of ``action`` by name."""
    from train_step_profile import busy_ms, shortened, traced

    kernels, _ = traced(action)
    span = (max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)) / 1e3
    print(f"{len(kernels)} kernels, profiled {span:.4f} ms, of them {span - busy_ms(kernels):.4f} between kernels")
    print("\n| us | times | us each | kernel |\n|---:|---:|---:|---|")
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.duration)
    for name, times in sorted(by_name.items(), key=lambda x: -sum(x[1])):
        print(f"| {sum(times):.1f} | {len(times)} | {statistics.median(times):.2f} | {shortened(name)} |")
    print(flush=True)


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


def captured(action: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of ``action``, which ran once before."""
    action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        action()
    return graph


def sweep(bench: Any) -> None:
    """Print the milliseconds of a step, greedy and sampled, with the settings as they are and with each of ``VARIANTS``.

    At the end stand all changes together that each saved at least 2 us, the best one of each setting.
    """
    steps = Steps(bench)

    def told(name: str, settings: dict[tuple[str, str], Any]) -> float:
        found = []
        try:
            with settings_are(settings):
                steps.capture()
                for kind in ("greedy", "sampled"):
                    steps.ask(*KINDS[kind])
                    found.append(steps.ms())
        except Exception as error:  # the others are measured all the same
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            return float("inf")
        bench.results[f"variant {name}"] = found
        print(f"{name:42} greedy {found[0]:.4f} ms, sampled {found[1]:.4f} ms", flush=True)
        return found[1]

    usual = told("as it is", {})
    times = {name: told(name, settings) for name, settings in VARIANTS.items()}
    usual = min(usual, told("as it is, once more", {}))
    best: dict[tuple[str, str], Any] = {}
    for name in sorted(times, key=lambda x: -times[x]):
        if times[name] < usual - 0.002:
            best |= VARIANTS[name]
    told("the best together", best)
    print("which are " + (", ".join(f"{name} {value}" for (_, name), value in best.items()) or "none"))
