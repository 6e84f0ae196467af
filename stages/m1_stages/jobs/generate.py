"""Generates from a checkpoint for ``m1 generate``: encodes the prompts, shares them among the replicas, hands answers on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m1_stages.checkpoint import Committed
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import Resolved
from m1_stages.config.sft_runs import for_stage, is_sft
from m1_stages.errors import ConfigError
from m1_stages.generation import Completion, EngineOptions, Request, Update
from m1_stages.generation.prompts import Prompt, PromptEncoder
from m1_stages.jobs.export import choose_checkpoint
from m1_stages.jobs.generate_options import GenerateOptions
from m1_stages.jobs.prepared import chat_template, open_tokenizer
from m1_stages.runtime.collectives import agree_max, gather, world
from m1_stages.runtime.signals import StopRequest

if TYPE_CHECKING:
    from m1_stages.generation.engine import Engine

_EXCHANGE_STEPS = 32
"""Steps of the engine after which replicas exchange finished answers, and agree on stopping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One finished answer to a prompt of the job."""

    prompt: int
    """Index of the prompt."""
    sample: int
    completion: Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is going to be done."""

    committed: Committed
    requests: tuple[Request, ...]
    chat: bool
    context: int
    capacity: int
    slots: int


def plan(
    resolved: Resolved, prompts: Sequence[Prompt], options: GenerateOptions, encoder: PromptEncoder | None = None
) -> tuple[Task, PromptEncoder]:
    """Choose the checkpoint and encode all prompts; nothing is loaded yet.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: a prompt and its answer are longer than the context, or the checkpoint has another tokenizer.
        DataError: no prepared data, or a prompt that cannot be encoded.
    """
    committed = choose_checkpoint(resolved, stage=options.stage, checkpoint=options.checkpoint)
    resolved = for_stage(resolved, committed.meta.stage)
    config = resolved.config
    manifest = open_tokenizer(resolved)
    data_dir = resolved.path(config.data.out)
    refuse_other_tokenizer(committed, manifest.tokenizer_sha256, data_dir)
    encoder = encoder or PromptEncoder(
        data_dir / "tokenizer", manifest.eod_token, chat_template(resolved), date=config.sft.date
    )
    chat = is_sft(committed.meta.stage) if options.chat is None else options.chat
    context = longest_context(resolved, committed) if options.context is None else options.context
    requests = tuple(_request(prompt, options, encoder, chat=chat, context=context) for prompt in prompts)
    total = sum(request.samples for request in requests)
    task = Task(
        committed=committed,
        requests=requests,
        chat=chat,
        context=context,
        capacity=max(len(r.prompt) + r.max_tokens for r in requests),
        slots=min(options.slots, total),
    )
    return task, encoder


def longest_context(resolved: Resolved, committed: Committed) -> int:
    """Return the tokens of the longest rows that the checkpoint was trained on."""
    if recorded := committed.meta.extra.get("contexts"):
        return int(max(recorded.values()))
    stage = committed.meta.stage  # an older version wrote it: the configuration says
    return resolved.config.sft_seq_len if is_sft(stage) else resolved.config.seq_len(stage)


def run(
    resolved: Resolved,
    task: Task,
    encoder: PromptEncoder,
    options: GenerateOptions,
    *,
    on_update: Callable[[int, Update], None],
    on_answer: Callable[[Answer], None],
    is_wanted: Callable[[], bool],
) -> str:
    """Answer all prompts; every rank calls it.

    Args:
        on_update: called on rank 0 with what is new of its own replica's answers, and the index of their prompt.
        on_answer: called on rank 0 with every finished answer of all replicas.
        is_wanted: whether anybody still takes answers; all ranks stop when it is false on one.

    Returns:
        The name of the signal on which it stopped early, or an empty text.

    Raises:
        M1Error: what ``open_engine`` and ``Engine.step`` raise.
    """
    from m1_stages.generation.loading import open_engine

    sizes = EngineOptions(slots=task.slots, capacity=task.capacity, prefill_tokens=options.prefill_tokens)
    with open_engine(resolved, task.committed, sizes, decode=encoder.decode) as engine, StopRequest() as stop:
        return _answer_all(engine, task, stop, on_update, on_answer, is_wanted)


def _answer_all(
    engine: Engine,
    task: Task,
    stop: StopRequest,
    on_update: Callable[[int, Update], None],
    on_answer: Callable[[Answer], None],
    is_wanted: Callable[[], bool],
) -> str:
    replica, replicas = engine.replica.index, engine.replica.count
    mine = {engine.submit(task.requests[i]): i for i in range(replica, len(task.requests), replicas)}
    finished: list[Answer] = []
    working = True
    while working:
        for _ in range(_EXCHANGE_STEPS if world() > 1 else 1):
            for update in engine.step():
                on_update(mine[update.request], update)
                if update.completion is not None:
                    finished.append(
                        Answer(prompt=mine[update.request], sample=update.sample, completion=update.completion)
                    )
        for answers in gather(finished if engine.replica.is_first else []):
            for answer in answers:
                on_answer(answer)
        finished = []
        if agree_max(int(stop.asked())):
            return stop.received or "request"
        working = bool(agree_max(int(not engine.is_idle))) and not agree_max(int(not is_wanted()))
    return ""


def _request(prompt: Prompt, options: GenerateOptions, encoder: PromptEncoder, *, chat: bool, context: int) -> Request:
    chat = chat or prompt.conversation is not None
    ids = encoder.encode(prompt, chat=chat)
    if len(ids) + options.max_tokens > context:
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens and the answer up to {options.max_tokens:,}, together more than the "
            f"{context:,} of the context",
            where=prompt.where,
            fix=_shorter(context - len(ids)),
        )
    request = Request(
        prompt=ids,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        sampling=options.sampling,
        samples=options.samples,
        stop_ids=encoder.stop_ids(chat=chat) | frozenset(options.stop_ids),
        stop_strings=options.stop_strings,
        repetition=options.repetition,
    )
    if options.thinking_budget is None:
        return request
    return replace(request, thinking=encoder.thinking(options.thinking_budget, ids))


def _shorter(room: int) -> str:
    if room < 1:
        return "shorten the prompt, or choose a checkpoint of a longer context"
    return f"shorten the prompt, or set --max-tokens {room} or less"


def as_line(answer: Answer, prompt: Prompt, task: Task, options: GenerateOptions) -> dict[str, Any]:
    """Return an answer as one line of JSON Lines, in plain values."""
    done = answer.completion
    asked: dict[str, Any] = {"id": prompt.id} if prompt.id is not None else {}
    return asked | {
        "prompt": answer.prompt,
        "sample": answer.sample,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": len(done.tokens),
        "reasoning_tokens": done.reasoning_tokens,
        "forced_tokens": [done.forced.start, done.forced.stop],
        "tokens": done.tokens,
        "logprobs": done.logprobs,
        "seed": options.sampling.seed,
        "checkpoint": task.committed.path.name,
    }
