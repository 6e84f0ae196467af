"""Jobs for resident ranks: measurements of a small model under a layout, of hand-made models, and whole runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from typing import Any
from unittest import mock

import numpy as np
import torch
from distributed import parity_worker
from support import pretraining
from torch import nn

from m1_data.sampling.needles import KEY_TOKENS, Haystack
from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.evaluation import long_context as measure
from m1_stages.events import Event, GateForced, StageEvaluated, StepDone
from m1_stages.runtime import device, parallel

IDS = 8
LENGTHS, DEPTHS = [64, 128], [0.0, 0.5, 1.0]


def layout(job: dict[str, Any]) -> dict[str, Any]:
    """Train a little, measure, and say what was measured and whether anything changed."""
    torch.set_num_threads(1)
    dev, sizes = device.use("cpu"), ParallelConfig(**job["parallel"])
    topology = parallel.start(sizes, device=dev, seed=1)
    before = measure.zigzag, measure.summed_everywhere
    try:
        if job.get("mutation") == "marks of contiguous shards":
            measure.zigzag = lambda t, rank, ranks: t.chunk(ranks, 1)[rank]  # type: ignore[assignment]
        if job.get("mutation") == "not summed over ranks":
            measure.summed_everywhere = lambda mine: mine  # type: ignore[assignment]
        model, chunks, optimizer = parity_worker.build(sizes, seed=5)
        for _ in range(3):
            rows = [parity_worker.packed([0, 1]), parity_worker.packed([2, 3])]
            few = [dataclasses.replace(row, tokens=row.tokens % IDS, labels=row.labels % IDS) for row in rows]
            parity_worker.step_of(chunks, optimizer, [row.zigzag(topology.cp_rank, topology.cp_size) for row in few])
        subject = measure.Subject(model=chunks, topology=topology, device=dev)
        chunks.gather_parameters()  # as the stage-final checkpoint does
        haystack = Haystack.of_random_ids(np.arange(IDS), 200, seed=2)
        state = fingerprint(model, optimizer)
        checks: list[int] = []
        needles = measure.needle_map(
            subject, haystack, lengths=LENGTHS, depths=DEPTHS, samples=2, what="random",
            tokens_at_once=job.get("tokens_at_once", 256), check=lambda: checks.append(1),
        )  # fmt: skip
        documents = [haystack.span(n, seed=n) for n in (200, 128, 70)]
        positions = measure.loss_by_position(
            subject, documents, seq_len=128, pad_id=0, tokens_at_once=256, check=lambda: checks.append(1)
        )
        return {
            "needles": dataclasses.asdict(needles),
            "positions": dataclasses.asdict(positions),
            "unchanged": fingerprint(model, optimizer) == state,
            "training": all(chunk.training for chunk in chunks) and torch.is_grad_enabled(),
            "checks": len(checks),
        }
    finally:
        measure.zigzag, measure.summed_everywhere = before
        parallel.stop()


def fingerprint(model: Any, optimizer: Any) -> list[Any]:
    """Everything that a measurement must leave alone."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes() + parameter.main_grad.numpy().tobytes())
    for part in optimizer.parts:
        for state in part.optimizer.state.values():
            digest.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
    stats = [(layer.mlp.router.tokens_per_expert is None, layer.mlp.router.micro_batches) for layer in model.layers]
    return [digest.hexdigest(), stats, torch.get_rng_state().numpy().tobytes().hex()]


class Oracle(nn.Module):
    """Stands for all layers: says what the token after each one is, as a row of the identity."""

    def __init__(self, kind: str, sight: int) -> None:
        super().__init__()
        self.kind, self.sight = kind, sight
        self.layers = nn.ModuleList()
        self.batch: Any = None

    def set_input_tensor(self, tensor: Any) -> None:
        """There is one stage."""

    def forward(self, **_: Any) -> torch.Tensor:
        batch, out = self.batch, torch.zeros(self.batch.tokens.shape[1], 1, 256)
        if self.kind == "position":
            known = batch.position_ids[0] >= self.sight
            out[known, 0, batch.labels[0][known]] = 1.0
            return out
        start = 0
        for length in batch.doc_lengths:
            tokens = batch.tokens[0, start : start + length].tolist()
            for at in range(KEY_TOKENS, length):
                window = tokens[at - KEY_TOKENS + 1 : at + 1]
                for back in range(max(KEY_TOKENS - 1, at - self.sight), at):
                    if tokens[back - KEY_TOKENS + 1 : back + 1] == window:
                        out[start + at, 0, tokens[back + 1]] = 1.0
            start += length
        return out


def oracle(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a model that looks ``sight`` tokens back for the last four, or that knows tokens from a position on."""
    dev = device.use("cpu")
    topology = parallel.start(ParallelConfig(), device=dev, seed=1)
    try:
        from m1_stages.model import build_model

        shape = ModelConfig(
            hidden_size=256, num_layers=8, num_heads=4, head_dim=8, num_kv_heads=2, rotary_dim=8, num_experts=2,
            expert_hidden_size=16, vocab_size=250,
        )  # fmt: skip
        model = build_model(shape, parallel=ParallelConfig(), rope_base=1e4)[0]
        model.decoder = Oracle(job["kind"], job["sight"])
        model.output_layer.weight.data = 40 * torch.eye(256)
        model.register_forward_pre_hook(lambda model, inputs: setattr(model.decoder, "batch", inputs[0]))
        whole: Any = [model]
        subject = measure.Subject(model=whole, topology=topology, device=dev)
        text = Haystack.of_random_ids(np.arange(1, 250), 600, seed=2)
        if job["kind"] == "copy":
            needles = measure.needle_map(
                subject,
                text,
                lengths=job["lengths"],
                depths=job["depths"],
                samples=2,
                what="random",
                tokens_at_once=512,
                check=lambda: None,
            )
            return dataclasses.asdict(needles)
        documents = [text.span(n, seed=n) for n in job["documents"]]
        measured = measure.loss_by_position(
            subject, documents, seq_len=job["seq_len"], pad_id=0, tokens_at_once=600, check=lambda: None
        )
        return dataclasses.asdict(measured)
    finally:
        parallel.stop()


def pretrained(job: dict[str, Any]) -> dict[str, Any]:
    """``m1 pretrain``'s job: how it ended, every step exactly, and the events of evaluations."""
    steps: list[Any] = []
    events: list[Any] = []

    def sink(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append([event.global_step, event.loss.hex(), event.grad_norm.hex(), event.aux_loss.hex()])
        elif isinstance(event, (StageEvaluated, GateForced)):
            events.append({"event": type(event).__name__, **dataclasses.asdict(event)})

    make = measure.needle_document

    def stopping(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args, **kwargs)

    with mock.patch.object(measure, "needle_document", stopping if job.get("stop_in_evaluation") else make):
        ended = pretraining.pretrained(job, [sink])
    return {**ended, "steps": steps, "events": events}
