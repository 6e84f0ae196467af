"""What the gradient guard costs: whole training steps of 700m with and without it, in turns, in one run.

    python benchmarks/guard_overhead.py [--tokens 32768] [--blocks 6] [--steps 5]

With: norms of every layer, verdicts from a full window, as ``training/loop.py`` does. Without: one norm of the whole gradient (as
clipping needs it) and no verdict. Blocks of steps alternate, so that both meet the same clocks; a step is wall time from one
verdict to the next. Peers, rows and weights are those of ``train_step.py``.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from unittest import mock

import torch
from train_step import configuration
from train_step_peers import Ours, Setting, build_chunks, plan_for, random_row

from m1_stages.config import GuardConfig
from m1_stages.guard import Guard, GuardState, Observation
from m1_stages.runtime import device as devices
from m1_stages.runtime import gradients, parallel


def one_norm(self: gradients.ReadyGradients) -> torch.Tensor:
    """What is left of ``squares`` without layers."""
    grads = [main.grad for _, pairs in self._parts for _, main in pairs if main.grad is not None]
    total = torch.zeros(self._num_layers + 1, dtype=torch.float64, device=grads[0].device)
    total[-1] = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--preset", default="700m")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    resolved = configuration(argparse.Namespace(preset=args.preset, set=[], data=None))
    device = devices.use(args.device)
    config = resolved.config
    topology = parallel.start(config.parallel, device=device, seed=config.run.seed)
    setting = Setting(
        config=config,
        device=device.torch_device,
        bf16=config.run.precision == "bf16",
        topology=topology,
        device_kind=device,
        tiled_from=1 << 30,
    )
    chunks, weights = build_chunks(setting, rope_base=1e4)
    ours = Ours(setting, chunks, weights)
    plan = plan_for(resolved, args.tokens, None)
    ours.restart(plan, args.tokens)
    batches = [
        random_row("one-document", args.tokens, config.model.vocab_size, n).to(device.torch_device) for n in range(4)
    ]
    guard = Guard(GuardConfig(), GuardState())
    times: dict[str, list[float]] = {"with": [], "without": []}
    number = 0

    def step(judge: bool) -> float:
        nonlocal number
        began = time.perf_counter()
        result = ours.measured(batches[number % 4])
        if judge:
            seen = Observation(step=number, loss=result.loss, grad_norm=result.grad_norm,
                               layer_grad_norms=result.layer_grad_norms)  # fmt: skip
            guard.judge(seen)
        result.apply(max_norm=config.optim.grad_clip)
        number += 1
        return time.perf_counter() - began

    for _ in range(140 if device.name == "cuda" else 20):  # fills the window
        step(True)
    for _ in range(args.blocks):
        times["with"] += [step(True) for _ in range(args.steps)][1:]
        with mock.patch.object(gradients.ReadyGradients, "squares", one_norm):
            times["without"] += [step(False) for _ in range(args.steps)][1:]
    a, b = (median(times[name]) * 1e3 for name in ("with", "without"))
    name = torch.cuda.get_device_name() if device.name == "cuda" else "CPU"
    print(
        f"{name}, {args.preset}, {args.tokens:,} tokens: with the guard {a:.2f} ms, without {b:.2f} ms: {a / b - 1:+.2%}"
    )
    parallel.stop()


if __name__ == "__main__":
    main()
