"""Generation against the forward pass of training: greedy tokens, log-probabilities, batches, pieces, slots, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.generating import GREEDY, MODEL, answers, engine_on, prompt, tiny_model, whole_pass

from m1_kernels.decode import bookkeeping, post_norm
from m1_kernels.moe import local_experts
from m1_kernels.norm import rms_norm
from m1_kernels.sampling import choose
from m1_kernels.softmax_attention import cached
from m1_stages.errors import ConfigError
from m1_stages.generation import Request, Sampling
from m1_stages.generation.states import state_bytes

LENGTHS = (1, 7, 61, 260, 3000)
DRAWN = Sampling(temperature=1.3, top_k=60, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Its norms have weights of their own: ones would hide that one was taken for another."""
    with tiny_model() as (built, _):
        norms = [p for name, p in built.named_parameters() if p.dim() == 1]
        for number, weight in enumerate(norms):
            weight.data += 0.5 * torch.randn(len(weight), generator=torch.Generator().manual_seed(number))
        yield built


def test_greedy_tokens_are_those_of_a_full_forward_pass(model: Any) -> None:
    engine = engine_on(model, slots=5, capacity=3500, prefill_tokens=1000)
    requests = [Request(prompt=prompt(n), max_tokens=500, sampling=GREEDY) for n in LENGTHS]
    for asked, done in zip(requests, answers(engine, requests), strict=True):
        assert (len(done.tokens), done.finish_reason, done.prompt_tokens) == (500, "length", len(asked.prompt))
        logprobs = whole_pass(model, asked.prompt, done.tokens)
        best, second = logprobs.topk(2).values.unbind(-1)
        differ = torch.nonzero(logprobs.argmax(-1) != torch.tensor(done.tokens))[:, 0].tolist()
        assert differ == [], f"margins there: {(best - second)[differ].tolist()}"
        taken = logprobs.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
        assert (taken - torch.tensor(done.logprobs)).abs().max() < 1e-3


def test_a_batch_says_what_each_prompt_says_alone(model: Any) -> None:
    """In fewer slots than there are prompts: those that become free are filled while others go on."""
    requests = [
        Request(prompt=prompt(n, seed), max_tokens=most, sampling=sampling)
        for seed, (n, most, sampling) in enumerate(
            [
                (5, 40, GREEDY),
                (90, 3, DRAWN),
                (1, 25, DRAWN),
                (33, 40, GREEDY),
                (200, 9, DRAWN),
                (8, 1, GREEDY),
                (40, 30, DRAWN),
            ]
        )
    ]
    together = answers(engine_on(model, slots=3, prefill_tokens=70), requests)
    for asked, done in zip(requests, together, strict=True):
        (alone,) = answers(engine_on(model, slots=1), [asked])
        assert done.tokens == alone.tokens
        assert done.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert len({tuple(done.tokens[:8]) for done in together}) > 4


def test_a_prompt_read_in_pieces_is_read_as_one(model: Any) -> None:
    asked = Request(prompt=prompt(300), max_tokens=5, sampling=GREEDY)
    whole = engine_on(model, slots=1)
    (expected,) = answers(whole, [asked])
    for pieces in (299, 64, 7):
        engine = engine_on(model, slots=1, prefill_tokens=pieces)
        (done,) = answers(engine, [asked])
        assert done.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        scale = whole.states.recurrent.abs().max()
        assert (engine.states.recurrent - whole.states.recurrent).abs().max() < 1e-5 * scale
        assert (engine.states.keys - whole.states.keys)[:, :, :304].abs().max() < 1e-5


def test_a_drawn_text_depends_on_seed_prompt_and_sample_alone(model: Any) -> None:
    requests = [Request(prompt=prompt(9, n), max_tokens=24, sampling=DRAWN, samples=2) for n in range(8)]
    expected = [[done.tokens for done in both] for both in engine_on(model, slots=16).generate(requests)]
    assert len({tuple(tokens) for both in expected for tokens in both}) == 16
    for slots, order in ((1, [3, 0, 7, 1, 6, 2, 5, 4]), (8, list(range(8))[::-1])):
        again = engine_on(model, slots=slots).generate([requests[i] for i in order])
        assert [[done.tokens for done in again[order.index(i)]] for i in range(8)] == expected
    other = Request(
        prompt=prompt(9, 0), max_tokens=24, sampling=Sampling(temperature=1.3, top_k=60, top_p=0.95, seed=12)
    )
    assert answers(engine_on(model, slots=1), [other])[0].tokens != expected[0][0]


def test_prompts_that_arrive_do_not_change_what_is_being_written(model: Any) -> None:
    asked = Request(prompt=prompt(20), max_tokens=60, sampling=DRAWN)
    (expected,) = answers(engine_on(model, slots=1), [asked])
    engine = engine_on(model, slots=3, prefill_tokens=30)
    number, got = engine.submit(asked), []
    while not engine.is_idle:
        for update in engine.step():
            got += update.tokens if update.request == number else []
            if update.request == number and len(got) % 10 == 0 and not update.completion:
                engine.submit(Request(prompt=prompt(50, len(got)), max_tokens=7, sampling=DRAWN))
    assert got == expected.tokens


def test_cancelled_answers_end_and_free_their_slots(model: Any) -> None:
    engine = engine_on(model, slots=1)
    first = engine.submit(Request(prompt=prompt(4), max_tokens=500, sampling=GREEDY, samples=2))
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    second = engine.submit(Request(prompt=prompt(6), max_tokens=5, sampling=GREEDY))
    ended = [update for update in engine.updates() if update.completion]
    reasons = [(update.request, update.sample, update.completion.finish_reason) for update in ended]
    assert sorted(reasons) == [(first, 0, "cancelled"), (first, 1, "cancelled"), (second, 0, "length")]
    (alone,) = answers(engine_on(model, slots=1), [Request(prompt=prompt(6), max_tokens=5, sampling=GREEDY)])
    assert next(u.completion.tokens for u in ended if u.request == second) == alone.tokens


def test_new_weights_take_effect_in_place(model: Any) -> None:
    engine, asked = engine_on(model, slots=1), Request(prompt=prompt(30), max_tokens=12, sampling=GREEDY)
    (before,) = answers(engine, [asked])
    weight, rates = model.output_layer.weight, model.decoder.layers[0].self_attention
    old, slopes = weight.detach().clone(), rates.log_decay
    try:
        weight.data.copy_(old.roll(1, 0))
        rates.log_decay = slopes * 3
        engine.weights_changed("second")
        (after,) = answers(engine, [asked])
        expected = whole_pass(model, asked.prompt, after.tokens)
        assert expected.argmax(-1).tolist() == after.tokens != before.tokens
        assert after.logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
        assert (before.weights, after.weights) == (("", ""), ("second", "second"))
    finally:
        weight.data.copy_(old)
        rates.log_decay = slopes


def test_a_new_rope_base_is_read_from_where_the_old_one_was(model: Any) -> None:
    engine, asked = engine_on(model, slots=1), Request(prompt=prompt(30), max_tokens=12, sampling=GREEDY)
    (before,) = answers(engine, [asked])
    softmax = next(n for n, layer in enumerate(model.decoder.layers) if hasattr(layer.self_attention, "rope_base"))
    place = engine.model._rates[softmax].data_ptr()  # a captured graph reads there
    try:
        model.set_rope_base(30.0)
        engine.weights_changed("longer")
        (after,) = answers(engine, [asked])
        assert engine.model._rates[softmax].data_ptr() == place
        assert after.logprobs == pytest.approx(
            whole_pass(model, asked.prompt, after.tokens).max(-1).values.tolist(), abs=1e-4
        )
        assert after.logprobs != pytest.approx(before.logprobs, abs=1e-2)
    finally:
        model.set_rope_base(1e4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_the_kernels_of_a_gpu_write_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    requests = [Request(prompt=prompt(n), max_tokens=6, sampling=s) for n, s in ((4, GREEDY), (33, DRAWN), (1, GREEDY))]
    expected = answers(engine_on(model, slots=2), requests)
    for module in (post_norm, bookkeeping, local_experts, choose, cached, rms_norm):
        monkeypatch.setattr(module, "takes_triton", lambda _: True)
    for got, want in zip(answers(engine_on(model, slots=2), requests), expected, strict=True):
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def test_the_state_of_lightning_layers_does_not_grow_with_the_context(model: Any) -> None:
    sizes = {n: engine_on(model, slots=2, capacity=n).states.num_bytes() for n in (1024, 65_536)}
    assert sizes[1024]["lightning"] == sizes[65_536]["lightning"] == 3 * 2 * 4 * 8 * 8 * 4
    assert sizes[65_536]["softmax"] == 64 * sizes[1024]["softmax"] == 2 * 2 * 65_536 * 2 * 8 * 4
    expected = state_bytes(MODEL, slots=2, capacity=1024, tp=1, dtype=torch.float32)
    assert expected == sum(sizes[1024].values())


def test_what_does_not_fit_is_refused_with_the_numbers(model: Any) -> None:
    engine = engine_on(model, slots=1, capacity=100)
    with pytest.raises(ConfigError, match=r"61 tokens and the answer up to 40, .* the context of 100") as caught:
        engine.submit(Request(prompt=prompt(61), max_tokens=40))
    assert caught.value.fix == "shorten the prompt, or ask for at most 39 tokens"
    engine.submit(Request(prompt=prompt(61), max_tokens=39))
    with pytest.raises(ConfigError, match="the vocabulary from 0 to 249"):
        engine.submit(Request(prompt=[250], max_tokens=4))
    with pytest.raises(ConfigError, match="stop strings need text"):
        engine.submit(Request(prompt=[1], max_tokens=4, stop_strings=("x",)))
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        Request(prompt=[], max_tokens=4)
