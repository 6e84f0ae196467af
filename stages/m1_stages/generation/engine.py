"""The engine: continuous batching over a fixed number of slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch

from m1_stages.errors import ConfigError, EnvironmentProblem
from m1_stages.generation.decoder import Block, Decoder, SlotRule, rules_on
from m1_stages.generation.forward import IncrementalModel, PrefillChunk
from m1_stages.generation.replica import Replica, device_copy
from m1_stages.generation.request import Completion, Decode, EngineOptions, Request, Update
from m1_stages.generation.sampling import uniforms
from m1_stages.generation.sequence import Sequence
from m1_stages.generation.states import SlotStates, state_bytes
from m1_stages.model.hybrid import HybridModel


class Engine:
    """Generates with the weights of ``model``, which may change in place between two steps.

    All ranks of a replica make the same calls in the same order; they get the same results.

    Args:
        model: whole on its tensor- and expert-parallel ranks, in any state of training.
        decode: turns token ids into text; without it there is no text, and stop strings are refused.
        replica: the ranks that generate together.
        weights: a name for the present weights, which completions repeat.

    Raises:
        ConfigError: the model is cut into a pipeline.
        EnvironmentProblem: the device has no room for the states.
    """

    def __init__(
        self,
        model: HybridModel,
        options: EngineOptions,
        *,
        replica: Replica,
        decode: Decode | None = None,
        weights: str = "",
    ) -> None:
        self.options, self.weights, self._decode = options, weights, decode
        self.model = IncrementalModel(model)
        self.replica = replica
        on_gpu = self.model.device.type == "cuda"
        try:
            sizes = {"slots": options.slots, "capacity": options.capacity, "tp": self.model.tp_group.size()}
            self.states = SlotStates(model.model_config, dtype=self.model.dtype, device=self.model.device, **sizes)
            self._decoder = Decoder(self.model, self.states, replica, steps=options.steps if on_gpu else 1)
        except RuntimeError as error:  # a GPU's OutOfMemoryError is one; a CPU has none of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            need = state_bytes(model.model_config, dtype=self.model.dtype, **sizes)
            raise EnvironmentProblem(
                f"the states of {options.slots} answers of {options.capacity:,} tokens need {need / 2**30:.2f} GiB on each rank, "
                "and the device has no room for them beside the weights",
                where=torch.cuda.get_device_name(self.model.device) if on_gpu else "CPU",
                fix="lower --slots, --max-tokens or --context",
            ) from error
        self._ahead = 1 if on_gpu else 0
        """Blocks that run while the host looks at the one before."""
        self._numbers = count()
        self._waiting: deque[Sequence] = deque()
        self._reading: dict[Sequence, torch.Tensor] = {}
        """Prompts that are partly read, and their recurrent states [lightning layers, heads here, D, D]."""
        self._running: dict[int, Sequence] = {}
        """The answers that are being written, by their slots."""
        self._free = list(range(options.slots))[::-1]
        self._blocks: deque[tuple[Block, dict[int, Sequence]]] = deque()
        self._news: dict[Sequence, None] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self._waiting or self._reading or self._running or self._blocks or self._news)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, which updates repeat.

        Raises:
            ConfigError: prompt and answer do not fit, an id is not in the vocabulary, or stop strings without ``decode``.
        """
        vocab, capacity = self.model.config.vocab_size, self.options.capacity
        if len(request.prompt) + request.max_tokens > capacity:
            raise ConfigError(
                f"the prompt has {len(request.prompt):,} tokens and the answer up to {request.max_tokens:,}, together more than "
                f"the context of {capacity:,}",
                fix=f"shorten the prompt, or ask for at most {max(0, capacity - len(request.prompt)):,} tokens",
            )
        for what, ids in (("token ids of the prompt", request.prompt), ("stop ids", request.stop_ids)):
            if len(ids) and not (min(ids) >= 0 and max(ids) < vocab):
                raise ConfigError(
                    f"the {what} go from {min(ids)} to {max(ids)}, and the vocabulary from 0 to {vocab - 1}"
                )
        if request.stop_strings and self._decode is None:
            raise ConfigError("stop strings need text, and this engine was given no decode", fix="use stop ids")
        if request.min_tokens > 1:
            rules_on(torch.device("cpu"), [_rule(request)])
        number = next(self._numbers)
        self._waiting.extend(Sequence(number, sample, request, self._decode) for sample in range(request.samples))
        return number

    def cancel(self, number: int) -> None:
        """End all unfinished answers of a request; their last updates come with the next step."""
        mine = [s for s in [*self._waiting, *self._reading, *self._running.values()] if s.number == number]
        for sequence in mine:
            sequence.finish("cancelled", self.weights)
            self._news[sequence] = None
        self._release(mine)
        self._waiting = deque(s for s in self._waiting if s.number != number)

    def step(self) -> list[Update]:
        """Read some tokens of waiting prompts, let every running answer grow, and return what is new.

        Raises:
            NumericStop: the model's output is not a number.
        """
        self._read_prompts()
        self._grow()
        updates = [sequence.update() for sequence in self._news]
        self._news.clear()
        return updates

    def generate(self, requests: list[Request]) -> list[list[Completion]]:
        """Answer all requests and return the completions of each, in order; nothing else may be queued."""
        numbers = {self.submit(request): i for i, request in enumerate(requests)}
        found: list[dict[int, Completion]] = [{} for _ in requests]
        for update in self.updates():
            if update.completion is not None:
                found[numbers[update.request]][update.sample] = update.completion
        return [[samples[n] for n in sorted(samples)] for samples in found]

    def updates(self) -> Iterator[Update]:
        """Step until there is nothing left to do, and yield what is new."""
        while not self.is_idle:
            yield from self.step()

    def weights_changed(self, weights: str = "") -> None:
        """Go on with weights that were replaced in place, and name them.

        Answers that are being written keep the states that the old weights made; ``Completion.weights`` names both.
        """
        self.model.refresh()
        self.weights = weights

    def _read_prompts(self) -> None:
        """Read the next ``prefill_tokens`` tokens of prompts, first come first served."""
        room, parts, partly = self.options.prefill_tokens, [], list(self._reading)
        while room > 0 and (partly or (self._waiting and self._free)):
            sequence = partly.pop(0) if partly else self._admit()
            take = min(room, len(sequence.request.prompt) - sequence.read)
            parts.append((sequence, take))
            room -= take
        if parts:
            self._read(parts)

    def _admit(self) -> Sequence:
        """Give the first waiting answer a slot."""
        sequence = self._waiting.popleft()
        sequence.slot, sequence.first_weights = self._free.pop(), self.weights
        self._reading[sequence] = torch.zeros_like(self.states.recurrent[:, 0])
        return sequence

    def _read(self, parts: list[tuple[Sequence, int]]) -> None:
        device, capacity = self.model.device, self.options.capacity
        positions = np.concatenate([np.arange(s.read, s.read + take) for s, take in parts])
        tokens = np.concatenate([np.asarray(s.request.prompt[s.read : s.read + take]) for s, take in parts])
        slots = [s.slot for s, _ in parts]
        lengths = [take for _, take in parts]
        chunk = PrefillChunk(
            tokens=device_copy(tokens, torch.int64, device),
            positions=device_copy(positions, torch.int64, device),
            rows=device_copy(positions + np.repeat(np.array(slots) * capacity, lengths), torch.int64, device),
            slots=slots,
            starts=[s.read for s, _ in parts],
            lengths=lengths,
            carried=torch.stack([self._reading[s] for s, _ in parts], dim=1),
        )
        hidden = self.model.prefill(chunk, self.states)
        done: list[tuple[Sequence, int]] = []
        for row, ((sequence, take), last) in enumerate(zip(parts, np.cumsum(lengths) - 1, strict=True)):
            sequence.read += take
            self._reading[sequence] = chunk.carried[:, row].clone()
            if sequence.read == len(sequence.request.prompt):
                done.append((sequence, int(last)))
        if done:
            self._begin([s for s, _ in done], hidden[device_copy([last for _, last in done], torch.int64, device)])

    def _begin(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        """Choose the first tokens of answers whose prompts are read, by their last hidden states [n, hidden]."""
        device = self.model.device
        lengths = [s.read for s in sequences]
        rules = [_rule(s.request) for s in sequences]
        chosen = rules_on(device, rules).choose(
            self.model.logits(hidden),
            device_copy([n + 1 for n in lengths], torch.int64, device),
            device_copy([uniforms(s.seed, 0, 1)[0] for s in sequences], torch.float64, device),
            device_copy([s.forced(1)[0] for s in sequences], torch.int64, device),
        )
        tokens, logprobs = self.replica.agree(*chosen)
        for sequence in sequences:
            self.states.recurrent[:, sequence.slot] = self._reading.pop(sequence)
            self._running[sequence.slot] = sequence
            sequence.in_flight += 1
        self._decoder.start([s.slot for s in sequences], tokens, lengths, rules)
        self._blocks.append((Block(tokens[None], logprobs[None]), dict(enumerate(sequences))))

    def _grow(self) -> None:
        """Start a block of steps if the host knows enough, and look at the oldest blocks."""
        running = self._running.values()
        while running and (steps := min(self._decoder.steps, min(s.horizon() for s in running))) < 1 and self._blocks:
            self._collect()
        left = max((s.request.max_tokens - s.next_index for s in running), default=0)
        if running and left > 0:
            self._start_block(int(min(steps, left)))
        while self._blocks and (len(self._blocks) > self._ahead or left <= 0):
            self._collect()

    def _start_block(self, steps: int) -> None:
        uniform = np.zeros((steps, self.options.slots))
        forced = np.full((steps, self.options.slots), -1, dtype=np.int64)
        for slot, sequence in self._running.items():
            uniform[:, slot] = uniforms(sequence.seed, sequence.next_index, steps)
            forced[:, slot] = sequence.forced(steps)
        block = self._decoder.run(torch.from_numpy(uniform), torch.from_numpy(forced))
        for sequence in self._running.values():
            sequence.in_flight += steps
        self._blocks.append((block, dict(self._running)))

    def _collect(self) -> None:
        """Hand the tokens of the oldest block to their answers, and free the slots of those that are finished."""
        block, sequences = self._blocks.popleft()
        tokens, logprobs = block.wait()
        finished: list[Sequence] = []
        for column, sequence in sequences.items():
            sequence.in_flight -= len(tokens)
            for row in range(len(tokens)):
                if sequence.completion is None:
                    sequence.push(tokens[row][column], logprobs[row][column], self.weights)
                    self._news[sequence] = None
                    if sequence.completion is not None:
                        finished.append(sequence)
        self._release(finished)

    def _release(self, sequences: list[Sequence]) -> None:
        """Free the slots of finished answers, of all at once: each call to the device costs the others time."""
        held = [sequence for sequence in sequences if sequence.slot >= 0]
        if running := [s.slot for s in held if self._running.pop(s.slot, None) is not None]:
            self._decoder.stop(running)
        for sequence in held:
            self._reading.pop(sequence, None)
            self._free.append(sequence.slot)
            sequence.slot = -1


def _rule(request: Request) -> SlotRule:
    held_back = sorted(request.stop_ids) if request.min_tokens > 1 else []
    return SlotRule(sampling=request.sampling, stop_ids=held_back, from_length=len(request.prompt) + request.min_tokens)
