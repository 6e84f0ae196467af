"""Whole training steps on one device: ours, the best quick baseline, and transformers, one micro-batch a step.

    python benchmarks/train_step.py [--tokens 32768,131072] [--rows both] [--profile 131072] [--json OUT] [--budget-s 400]
    CUDA_VISIBLE_DEVICES= python benchmarks/train_step.py --preset tiny --device cpu --tokens 256   # tests itself

A step is forward, backward, gradient norm, clipping and AdamW on fp32 master weights. ``ours`` is what ``m1 pretrain`` runs,
activations kept or recomputed as it would choose for rows of that length (printed; ``--set run.recompute=...``);
``baseline`` is in ``train_step_baseline.py``; ``transformers`` is MiniMaxForCausalLM up to 32,768 tokens, one document.
Ours and the baseline start every case from the same weights. Checked, else the exit code is 1: equal numbers of parameters,
losses of every token of a small packed batch (with larger weights, so that every part shows), loss and gradient norm of the
first step of every case; in bf16 within 25 % of the losses' spread, 1 % and 5 %, in fp32 far closer.

Rows: ``one-document``: random tokens. ``packed``: rows of ``--data`` as the trainer draws them, else random tokens in
documents of log-normal length (printed). All peers get the same rows.

Times: CUDA events around a step. Every peer meets 5 rows, from 524,288 tokens on 2 (``--steps``), and then the same again:
the second pass is timed, its median and range are given. The first pass is the warm-up; its median stands in a column of
its own, because kernels that are planned for every new document length show there what they cost in training. Peak:
``max_memory_allocated`` of both passes.

MFU = model FLOP / time / 989 TFLOP/s (dense bf16, H100 and H200), recomputation not counted. FLOP of a step, with T tokens,
H heads of width D, V rows of the head, backward = twice forward:
    6 T * (matrix parameters that a token meets: attention and router, k of E experts, head; not the embedding)
    + 6 H D sum(n^2) per softmax layer over documents of n tokens: QK' and PV are 2 n^2 H D each, of which causality halves
    + 12 T H D^2 per lightning layer: the recurrent form, state update and readout at 2 D^2 each per token and head
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from train_step_peers import (
    BaselinePeer,
    Ours,
    Setting,
    TransformersPeer,
    build_chunks,
    flops,
    plan_for,
    random_row,
    row_source,
    strengthen,
)
from train_step_profile import HEAD, print_head, print_profile, print_summary, profile_step, table_row

from m1_data.storage.manifest import load_manifest
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.load import load_config
from m1_stages.curriculum import StagePlan
from m1_stages.runtime import device as devices
from m1_stages.runtime import parallel

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
LONG = 524_288
SHARES = {"ours": 4, "baseline": 5, "transformers": 1}
TRANSFORMERS_TOKENS = 32_768
BOUNDS = {
    "bf16": {"probe": 0.25, "first_loss": 0.01, "first_grad_norm": 0.05},
    "fp32": {"probe": 1e-3, "first_loss": 1e-4, "first_grad_norm": 1e-5},
}
Case = dict[str, Any]


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(step: Callable[[], Any], on_cuda: bool) -> tuple[Any, float]:
    """Result and milliseconds."""
    if not on_cuda:
        began = time.perf_counter()
        return step(), (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = step()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def measure(peer: Any, case: Case, plan: StagePlan, bench: Bench) -> None:
    """Fill in ``case``: warm up, then time."""
    args, tokens, on_cuda = bench.args, case["tokens"], bench.setting.device.type == "cuda"
    steps = args.steps or (2 if tokens >= LONG else 5)
    row = row_source(args.data, bench.resolved, plan, case["rows"], tokens, steps)
    clean()
    peer.restart(plan, tokens)
    case |= {"stage": plan.stage, "rope_base": plan.rope_base, "first_pass_ms": [], "ms": [], "flops": []}
    case["recompute"] = peer.recomputes
    case |= {"documents": [], "losses": []}
    for number in range(2 * steps):
        again = number >= steps
        if again and time.perf_counter() > bench.deadline:
            case["status"] = f"stopped by the budget after {len(case['ms'])} of {steps} timed steps"
            break
        batch = row(number % steps)
        on_device = batch.to(bench.setting.device)
        (loss, norm), ms = timed(partial(peer.step, on_device), on_cuda)
        case["losses"].append(loss)
        case["ms" if again else "first_pass_ms"].append(ms)
        if number == 0:
            case |= {"first_loss": loss, "first_grad_norm": norm, "longest": max(batch.doc_lengths)}
        if again:
            case["flops"].append(flops(bench.resolved.config.model, batch.doc_lengths))
            case["documents"].append(len(batch.doc_lengths))
    if case["ms"]:
        middle = median(case["ms"])
        rate = median(f / ms * 1e3 for f, ms in zip(case["flops"], case["ms"], strict=True))
        case |= {"median_ms": middle, "tokens_per_s": tokens / middle * 1e3, "model_tflop_per_s": rate / 1e12}
        case["mfu"] = rate / bench.peak_flops if bench.peak_flops else None
    case["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    if (
        tokens in bench.profiles
        and on_cuda
        and case["rows"] == bench.kinds[-1]
        and time.perf_counter() < bench.deadline
    ):
        batch = row(0).to(bench.setting.device)
        case["profile"] = profile_step(lambda: peer.step(batch))
        title = f"{case['peer']}, {case['rows']}, {tokens:,} tokens"
        print_profile(title, case["profile"], top=25 if case["peer"] == "ours" else 0)
        print(HEAD, flush=True)


class Bench:
    """The run: its settings, its results, and what did not hold."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sizes = [int(n) for n in args.tokens.split(",")]
        self.kinds = ["one-document", "packed"] if args.rows == "both" else [args.rows]
        self.one_document = [int(n) for n in args.one_document.split(",")] if args.one_document else []
        self.profiles = [int(n) for n in args.profile.split(",")] if args.profile else []
        self.peers = [p for p in SHARES if p in args.peers.split(",")]
        self.began = time.perf_counter()
        self.deadline = self.began + args.budget_s
        self.resolved = configuration(args)
        device = devices.use(args.device)
        topology = parallel.start(self.resolved.config.parallel, device=device, seed=self.resolved.config.run.seed)
        run = self.resolved.config.run
        self.setting = Setting(
            config=self.resolved.config,
            device=device.torch_device,
            bf16=(args.precision or run.precision) == "bf16",
            topology=topology,
            device_kind=device,
            tiled_from=args.tiled_from,
        )
        name = torch.cuda.get_device_name() if device.name == "cuda" else "CPU"
        self.peak_flops = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
        self.bounds = BOUNDS["bf16" if self.setting.bf16 else "fp32"]
        self.cases: list[Case] = []
        self.broken: list[str] = []
        self.probed: Tensor | None = None
        self.results: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": name,
            "versions": versions(),
            "preset": args.preset,
            "precision": "bf16" if self.setting.bf16 else "fp32",
            "recompute": run.recompute,
            "model": dataclasses.asdict(self.resolved.config.model),
            "peers": {},
            "cases": self.cases,
            "broken": self.broken,
        }

    def save(self) -> None:
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def expect(self, holds: bool, what: str) -> None:
        print(f"{'holds' if holds else 'BROKEN'}: {what}", flush=True)
        if not holds:
            self.broken.append(what)

    def run(self) -> None:
        print_head(self)
        chunks, weights = build_chunks(self.setting, rope_base=1e4)
        built = [chunks]
        del chunks
        makers: dict[str, Callable[[], Any]] = {
            "ours": lambda: Ours(self.setting, built[0], weights),
            "baseline": lambda: BaselinePeer(self.setting, weights),
            "transformers": lambda: TransformersPeer(self.setting),
        }
        for number, name in enumerate(self.peers):
            left = self.began + self.args.budget_s - time.perf_counter()
            share = SHARES[name] / sum(SHARES[p] for p in self.peers[number:])
            self.deadline = time.perf_counter() + max(0.0, left) * share
            peer = self._make(name, makers[name])
            if name == "ours" or "ours" not in self.peers:
                built.clear()  # the peer holds the model now, or nobody
            if peer is not None:
                self._run_peer(name, peer)
            gone = weakref.ref(peer) if peer is not None else None
            del peer
            clean()
            if gone is not None:
                self._freed(name, gone)
        print_summary(self)

    def _freed(self, name: str, gone: Any) -> None:
        """The next peer's peak must not count this one."""
        left = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.expect(gone() is None and left < 0.25, f"{name} is freed: {left:.2f} GiB are left")

    def _make(self, name: str, make: Callable[[], Any]) -> Any:
        print(f"\n## {name}\n", flush=True)
        try:
            peer = make()
        except ImportError as error:
            print(f"SKIPPED: {name} cannot run here: {error}", flush=True)
            self.results["peers"][name] = {"skipped": str(error)}
            return None
        self.results["peers"][name] = {"notes": peer.notes, "parameters": peer.parameters()}
        print(f"{peer.parameters():,} parameters; {peer.notes}", flush=True)
        return peer

    def _run_peer(self, name: str, peer: Any) -> None:
        if name != "transformers":
            self._probe(name, peer)
        print(f"\n{HEAD}", flush=True)
        for tokens in self.sizes:
            plan = plan_for(self.resolved, tokens, self.args.stage)
            for kind in self.kinds:
                if kind == "one-document" and self.one_document and tokens not in self.one_document:
                    continue
                if name == "transformers" and (tokens > TRANSFORMERS_TOKENS or kind == "packed"):
                    continue
                case: Case = {"peer": name, "rows": kind, "tokens": tokens, "status": "ok"}
                self.cases.append(case)
                if time.perf_counter() > self.deadline:
                    case["status"] = "SKIPPED: the time budget is spent"
                else:
                    self._attempt(peer, case, plan)
                print(table_row(case, self._of("ours", case)), flush=True)
                self.save()
        for case in self.cases:
            ours = self._of("ours", case)
            if name == "baseline" == case["peer"] and ours and "first_loss" in case and "first_loss" in ours:
                self._compare(case, ours)
        self.save()

    def _attempt(self, peer: Any, case: Case, plan: StagePlan) -> None:
        try:
            measure(peer, case, plan, self)
        except Exception as error:
            if "out of memory" in str(error).lower():
                case["status"] = "out of memory"
            else:
                case["status"] = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self.broken.append(f"{case['peer']}, {case['rows']}, {case['tokens']:,}: {case['status']}")
                traceback.print_exc()
        clean()

    def _of(self, peer: str, case: Case) -> Case | None:
        same = (c for c in self.cases if all(c[k] == case[k] for k in ("rows", "tokens")) and c["peer"] == peer)
        return next(same, None)

    def _probe(self, name: str, peer: Any) -> None:
        """The losses of every token of a small packed batch, and the numbers of parameters, against ours."""
        tokens = min(4096, *self.sizes)
        batch = random_row("packed", tokens, self.resolved.config.model.vocab_size, 99).to(self.setting.device)
        peer.restart(plan_for(self.resolved, tokens, self.args.stage), tokens)
        strengthen(peer.model, self.resolved.config.model)
        losses = peer.losses(batch).float().cpu()
        if name == "ours":
            self.probed = losses
        if self.probed is None or name == "ours":
            return
        away = float((losses - self.probed).norm() / (self.probed - self.probed.mean()).norm())
        bound = self.bounds["probe"]
        self.expect(
            away <= bound, f"{name}: losses of {tokens} tokens, distance from ours / spread {away:.1e}, bound {bound}"
        )
        counts = [self.results["peers"][p]["parameters"] for p in ("ours", name)]
        self.expect(
            counts[0] == counts[1], f"ours and {name} have equally many parameters: {counts[0]:,}, {counts[1]:,}"
        )

    def _compare(self, case: Case, ours: Case) -> None:
        for key in ("first_loss", "first_grad_norm"):
            bound = self.bounds[key]
            away = abs(case[key] / ours[key] - 1)
            what = f"{case['rows']}, {case['tokens']:,}: {key} {case[key]:.5f}, ours {ours[key]:.5f}: {away:.1e}"
            self.expect(away <= bound, f"{what}, bound {bound}")


def configuration(args: argparse.Namespace) -> Resolved:
    """The bare preset with ``--set``; the vocabulary is the data's, or the preset's tokenizer's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m1.toml"
        path.write_text(f'preset = "{args.preset}"\n', encoding="utf-8")
        resolved = load_config(path, args.set)
    config = resolved.config
    vocab = config.model.vocab_size or config.tokenizer.vocab_size
    if args.data:
        vocab = max(config.model.vocab_size, load_manifest(Path(args.data)).vocab_size)
    model = dataclasses.replace(config.model, vocab_size=vocab)
    return dataclasses.replace(resolved, config=dataclasses.replace(config, model=model))


def versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for name in ("torch", "triton", "megatron-core", "fla-core", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="32768,131072,262144,524288,1048576", help="a row's, several with commas")
    parser.add_argument("--rows", choices=("one-document", "packed", "both"), default="both")
    parser.add_argument("--data", help="folder of m1 prepare-data for the packed rows")
    parser.add_argument("--stage", choices=STAGE_NAMES, help="decay rates, RoPE base, data mix; default: by the tokens")
    parser.add_argument("--peers", default="ours,baseline,transformers")
    parser.add_argument("--profile", nargs="?", const="131072", help="profile a step at these tokens; default 131072")
    parser.add_argument("--json", help="write everything here")
    parser.add_argument("--preset", default="700m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the preset's")
    parser.add_argument("--steps", type=int, help="rows of a case; default 5, from 524288 tokens on 2")
    parser.add_argument("--one-document", help="only these of --tokens also as one document; default: all")
    parser.add_argument("--tiled-from", type=int, default=LONG, help="tokens from which the baseline tiles its experts")
    parser.add_argument("--budget-s", type=float, default=400.0, help="seconds after which no case is started")
    args = parser.parse_args()
    bench = Bench(args)
    try:
        bench.run()
    finally:
        bench.save()
        parallel.stop()
    sys.exit(1 if bench.broken else 0)


if __name__ == "__main__":
    main()
