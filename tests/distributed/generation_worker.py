"""One rank that generates: what it wrote, and where it is."""

from __future__ import annotations

from typing import Any

import torch

from m1_stages.runtime import device


def generated(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities of a few prompts in the layout ``parallel``; sums over the group ``spoil`` are left out."""
    torch.set_num_threads(1)
    device.use("cpu")
    from support.generating import GREEDY, engine_on, prompt, tiny_model

    from m1_stages.generation import Request, Sampling

    drawn = Sampling(temperature=1.2, top_p=0.9, seed=5)
    with tiny_model(**job["parallel"]) as (model, layout):
        engine = engine_on(model, layout, slots=3, prefill_tokens=50)
        if spoil := job.get("spoil"):
            whole, left_out = engine.model._summed, getattr(engine.model, spoil)
            engine.model._summed = lambda x, group: x if group is left_out else whole(x, group)  # type: ignore[method-assign]
        requests = [
            Request(prompt=prompt(n, seed), max_tokens=12, sampling=GREEDY if seed % 2 else drawn)
            for seed, n in enumerate((4, 70, 33, 1))
        ]
        done = [samples[0] for samples in engine.generate(requests)]
        return {
            "tokens": [one.tokens for one in done],
            "logprobs": [one.logprobs for one in done],
            "replica": [engine.replica.index, engine.replica.count, engine.replica.is_first],
            "local": model.decoder.layers[0].mlp.experts.num_local_experts,
            "heads": engine.states.recurrent.shape[2],
        }
