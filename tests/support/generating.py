"""A small model with random weights for tests of generation, and what one forward pass over a whole text says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from support.batches import packed_batch
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.generation import Completion, Engine, EngineOptions, Replica, Request, Sampling
from m1_stages.generation.replica import generation_layout
from m1_stages.runtime import device, parallel

MODEL = ModelConfig(
    hidden_size=32, num_layers=4, num_heads=4, head_dim=8, num_kv_heads=2, rotary_dim=8, num_experts=4,
    expert_hidden_size=32, vocab_size=250, softmax_every=4, init_std=0.25,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


@contextmanager
def tiny_model(seed: int = 3, **sizes: Any) -> Iterator[tuple[Any, ParallelConfig]]:
    """This rank's part of the model, in the layout in which one that was trained with ``sizes`` generates."""
    layout = generation_layout(ParallelConfig(**sizes))
    parallel.start(layout, device=device.use("cpu"), seed=0)
    try:
        from m1_stages.model import build_model

        model = build_model(MODEL, parallel=layout, rope_base=1e4, seed=seed)
        model.set_slopes(released_slopes(MODEL.num_layers, MODEL.num_heads))
        yield model[0], layout
    finally:
        parallel.stop()


def engine_on(model: Any, layout: ParallelConfig | None = None, decode: Any = None, **sizes: int) -> Engine:
    options = EngineOptions(**{"slots": 4, "capacity": 600, **sizes})
    return Engine(model, options, replica=Replica.of(layout or ParallelConfig()), decode=decode)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    ids: list[int] = torch.randint(0, MODEL.vocab_size, (tokens,), generator=generator).tolist()
    return ids


def whole_pass(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """[len(tokens), vocab] log-probabilities before each of ``tokens``, of the forward pass that training makes."""
    text = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        logits = model(packed_batch(text, (len(text),)), logits=True)[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    """The only answer to each request."""
    return [samples[0] for samples in engine.generate(requests)]
