"""Decoding of all slots at once: static buffers, and on a CUDA device one graph for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m1_kernels import begin_step, end_step
from m1_stages.errors import ConfigError
from m1_stages.generation.forward import IncrementalModel
from m1_stages.generation.replica import Replica, device_copy
from m1_stages.generation.request import Sampling
from m1_stages.generation.sampling import RowRules
from m1_stages.generation.states import SlotStates

MOST_STOP_IDS = 8
"""Stop ids that can be kept back by ``min_tokens``."""


class Block:
    """Tokens of some consecutive steps on their way to the host."""

    def __init__(self, tokens: Tensor, logprobs: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in (tokens, logprobs)]
            self._tokens, self._logprobs = (
                host.copy_(x, non_blocking=True) for host, x in zip(pinned, (tokens, logprobs), strict=True)
            )
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens, self._logprobs = tokens.clone(), logprobs.clone()

    def wait(self) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens and log-probabilities, [steps][slots], once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist(), self._logprobs.tolist()


@dataclass(kw_only=True)
class SlotRule:
    """What the answer in a slot asks for."""

    sampling: Sampling
    stop_ids: Sequence[int]
    """Those that must not be chosen yet."""
    from_length: int
    """Tokens of prompt and answer from which on they may be."""


IDLE = SlotRule(sampling=Sampling(temperature=0.0), stop_ids=(), from_length=0)


class Decoder:
    """The slots, and the steps that give each of them one more token.

    Args:
        steps: most steps of a block.
    """

    def __init__(self, model: IncrementalModel, states: SlotStates, replica: Replica, *, steps: int) -> None:
        self.model, self.states, self.steps, self._replica = model, states, steps, replica
        slots, device = states.slots, model.device
        self.token, self.length = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2))
        self._active = torch.zeros(slots, dtype=torch.int64, device=device)
        self._rules = rules_on(device, [IDLE] * slots)
        self._uniform = torch.zeros(steps, slots, dtype=torch.float64, device=device)
        self._forced = torch.full((steps, slots), -1, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(steps, slots, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(steps, slots, dtype=torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._warm_up()
            self._graph = self._captured()

    def start(self, slots: Sequence[int], tokens: Tensor, lengths: Sequence[int], rules: Sequence[SlotRule]) -> None:
        """Let ``slots`` go on from their first tokens [n] (on the device); ``lengths``: tokens that are in their states."""
        at = device_copy(slots, torch.int64, self.token.device)
        self.token[at] = tokens
        self.length[at] = device_copy(lengths, torch.int64, self.token.device)
        self._set_rules(at, rules, active=1)

    def stop(self, slots: Sequence[int]) -> None:
        """Let the tokens of ``slots`` be meaningless from now on."""
        self._set_rules(device_copy(slots, torch.int64, self.token.device), [IDLE] * len(slots), active=0)

    def run(self, uniform: Tensor, forced: Tensor) -> Block:
        """Compute as many steps as ``uniform`` [steps, slots] fp64 and ``forced`` [steps, slots] int64 (host) have rows."""
        steps, device = len(uniform), self.token.device
        self._uniform[:steps] = device_copy(uniform, torch.float64, device)
        self._forced[:steps] = device_copy(forced, torch.int64, device)
        self._at.zero_()
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
        return Block(self._tokens[:steps], self._logprobs[:steps])

    @torch.no_grad()
    def _step(self) -> None:
        capacity = self.states.capacity
        step = begin_step(self.length, self._active, self._at, self._uniform, self._forced, capacity=capacity)
        hidden = self.model.decode(self.token, self.length, step, self.states)
        chosen = self._rules.choose(self.model.logits(hidden), step.lengths, step.uniform, step.forced)
        end_step(
            *self._replica.agree(*chosen), token=self.token, tokens=self._tokens, logprobs=self._logprobs,
            positions=self.length, active=self._active, at=self._at, capacity=capacity,
        )  # fmt: skip

    def _set_rules(self, at: Tensor, rules: Sequence[SlotRule], *, active: int) -> None:
        self._active[at] = active
        for mine, new in zip(self._rules, rules_on(self.token.device, rules), strict=True):
            mine[at] = new

    def _warm_up(self) -> None:
        """Compile and allocate all that a step needs, on a stream of its own. No slot is in use yet."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._at.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Record a step; nothing of it is computed, so answers may be under way."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph


def rules_on(device: torch.device, rules: Sequence[SlotRule]) -> RowRules:
    """Return the rules of a batch on the device.

    Raises:
        ConfigError: too many stop ids are to be kept back.
    """
    banned = []
    for rule in rules:
        ids = list(rule.stop_ids)
        if len(ids) > MOST_STOP_IDS:
            raise ConfigError(
                f"min_tokens can keep back {MOST_STOP_IDS} stop ids, not {len(ids)}", fix="set min_tokens to 0"
            )
        banned.append(ids + [ids[0] if ids else 0] * (MOST_STOP_IDS - len(ids)))
    sampling = [rule.sampling for rule in rules]
    return RowRules(
        temperature=device_copy([s.temperature for s in sampling], torch.float32, device),
        top_k=device_copy([s.top_k for s in sampling], torch.int64, device),
        top_p=device_copy([s.top_p for s in sampling], torch.float64, device),
        banned=device_copy(banned, torch.int64, device),
        from_length=device_copy([rule.from_length if rule.stop_ids else 0 for rule in rules], torch.int64, device),
    )
