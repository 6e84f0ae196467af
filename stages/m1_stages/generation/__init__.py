"""Generation: token ids in, token ids out.

The engine writes many answers at the same time, each in a slot of its own. What it keeps of the tokens so far is a recurrent
fp32 state for each lightning layer, whose size does not depend on the context, and keys and values for each softmax layer. A slot
that becomes free takes the next prompt at once. Prompts are packed without padding, long ones are read in pieces. A text depends
on the weights, the prompt, the seed and the number of the sample, not on the batch, the slot, the order or the number of ranks.

    engine = Engine(model, EngineOptions(slots=64, capacity=8192), replica=Replica.of(parallel))
    number = engine.submit(Request(prompt=ids, max_tokens=512, sampling=Sampling(temperature=0.7, seed=1), samples=4))
    while not engine.is_idle:
        for update in engine.step():                    # new tokens of every answer
            if update.completion is not None:           # tokens, logprobs, finish_reason, ...
                ...
    engine.cancel(number)                               # at any time, as submit
    engine.weights_changed("step 1200")                 # after the model's weights were replaced in place

``engine.generate([request, ...])`` does all of that for a list. ``open_engine`` in ``m1_stages.generation.loading`` builds the
model of a checkpoint. All ranks of a replica (tensor- and expert-parallel) make the same calls; ``Replica.index`` and ``count``
divide prompts among replicas. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m1_stages.generation.engine import Engine
    from m1_stages.generation.replica import Replica
    from m1_stages.generation.request import Completion, EngineOptions, Repetition, Request, Sampling, Thinking, Update

_MODULES = {
    "Completion": "request", "Engine": "engine", "EngineOptions": "request", "Repetition": "request", "Replica": "replica",
    "Request": "request", "Sampling": "request", "Thinking": "request", "Update": "request",
}  # fmt: skip
__all__ = [
    "Completion",
    "Engine",
    "EngineOptions",
    "Repetition",
    "Replica",
    "Request",
    "Sampling",
    "Thinking",
    "Update",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"m1_stages.generation.{_MODULES[name]}"), name)
    raise AttributeError(name)
