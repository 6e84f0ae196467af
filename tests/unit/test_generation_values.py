"""What generation computes on the host and with single tensors: distributions, uniform numbers, texts, when an answer ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from m1_stages.errors import ConfigError, NumericStop
from m1_stages.generation import EngineOptions, Repetition, Request, Sampling, Thinking
from m1_stages.generation.decoder import IDLE, SlotRule, rules_on
from m1_stages.generation.sampling import sequence_seed, uniforms
from m1_stages.generation.sequence import Sequence
from m1_stages.generation.text import TextStream

CPU = torch.device("cpu")
PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(sampling: Sampling, numbers: list[float], probs: torch.Tensor = PROBS) -> list[int]:
    """The token for each uniform number."""
    n = len(numbers)
    rules = rules_on(CPU, [SlotRule(sampling=sampling, stop_ids=(), from_length=0)] * n)
    token, _ = rules.choose(
        probs.log().expand(n, -1) + 3.0,
        torch.ones(n, dtype=torch.int64),
        torch.tensor(numbers, dtype=torch.float64),
        torch.full((n,), -1),
    )
    return token.tolist()


def test_uniform_numbers_meet_the_distribution_function() -> None:
    edges = [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.5499, 0.5501, 0.7999, 0.8001, 1 - 2**-53]
    assert drawn(Sampling(), edges) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    # At temperature 1/2 the probabilities are squared: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275.
    assert drawn(Sampling(temperature=0.5), [0.036, 0.037, 0.617, 0.619, 0.626, 0.628, 0.854, 0.855]) == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]
    assert drawn(Sampling(temperature=0.0), [0.0, 0.99]) == [1, 1]


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    # The two likeliest: 0.4 and 0.25 of 0.65.
    assert drawn(Sampling(top_k=2), [0.0, 0.614, 0.616, 1 - 2**-53]) == [1, 1, 3, 3]
    # 0.4 + 0.25 < 0.66 <= 0.85: three stay.
    assert drawn(Sampling(top_p=0.66), [0.0, 0.469, 0.472, 0.76, 0.77, 1 - 2**-53]) == [1, 1, 3, 3, 4, 4]
    assert drawn(Sampling(top_p=0.64), [0.0, 0.614, 0.616]) == [1, 1, 3]
    assert drawn(Sampling(top_p=1e-9), [0.0, 0.999]) == [1, 1]
    # top-p counts in what top-k left: 0.4 / 0.65 = 0.615.
    assert drawn(Sampling(top_k=2, top_p=0.61), [0.999]) == [1]
    assert drawn(Sampling(top_k=2, top_p=0.62), [0.999]) == [3]
    tied = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert drawn(Sampling(top_k=1), [0.1, 0.9], probs=tied) == [0, 3]


def test_rows_do_not_depend_on_each_other() -> None:
    probs = torch.randn(5000, generator=torch.Generator().manual_seed(4)).softmax(-1)
    kinds = [Sampling(), Sampling(top_p=0.7), Sampling(temperature=0.0), Sampling(top_k=9, temperature=0.6)]
    numbers = uniforms(5, 0, 4)
    rules = rules_on(CPU, [SlotRule(sampling=kind, stop_ids=(), from_length=0) for kind in kinds])
    logits = probs.log().expand(4, -1) + 3.0
    token, _ = rules.choose(logits, torch.ones(4).long(), torch.from_numpy(numbers), torch.full((4,), -1))
    alone = [drawn(kind, [number], probs)[0] for kind, number in zip(kinds, numbers.tolist(), strict=True)]
    assert token.tolist() == alone
    assert alone[2] == int(probs.argmax())


def test_forced_and_banned_tokens() -> None:
    rules = rules_on(CPU, [IDLE, SlotRule(sampling=Sampling(temperature=0.0), stop_ids=(1, 3), from_length=8)])
    logits = PROBS.log().expand(2, -1)

    def choose(lengths: int, forced: list[int]) -> tuple[list[int], list[float]]:
        token, logprob = rules.choose(
            logits, torch.tensor([lengths] * 2), torch.zeros(2).double(), torch.tensor(forced)
        )
        return token.tolist(), logprob.tolist()

    assert choose(7, [-1, -1])[0] == [1, 4]
    assert choose(8, [-1, -1])[0] == [1, 1]
    tokens, logprobs = choose(7, [2, 3])
    assert tokens == [2, 3]
    assert logprobs == pytest.approx([math.log(0.05), math.log(0.25)], abs=1e-6), "of the model, whatever is chosen"
    with pytest.raises(ConfigError, match="8 stop ids, not 9"):
        rules_on(CPU, [SlotRule(sampling=Sampling(), stop_ids=range(9), from_length=9)])


def test_uniform_numbers_are_a_function_of_seed_and_position() -> None:
    whole = uniforms(2**64 - 3, 0, 1000)
    assert np.array_equal(np.concatenate([uniforms(2**64 - 3, at, 100) for at in range(0, 1000, 100)]), whole)
    assert 0 <= whole.min() < 0.01 < 0.99 < whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.03
    seeds = {sequence_seed(s, p, n) for s in (0, 1) for p in ([1, 2], [12], "1", [1, 2, 0]) for n in (0, 1)}
    assert len(seeds) == 16
    assert sequence_seed(3, [7, 8], 2) == sequence_seed(3, (7, 8), 2)
    pinned = [0.5952387755891879, 0.7068792928191471]
    assert uniforms(sequence_seed(0, [1, 2], 0), 0, 2).tolist() == pinned, "another version draws other texts"


def decode(ids: Any) -> str:
    return bytes(ids).decode(errors="replace")


def pieces(text: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, shown = TextStream(decode, stops), []
    for byte in text:
        if not stream.stopped:
            stream.push(byte)
            shown.append(stream.take())
    stream.finish()
    shown.append(stream.take())
    return shown, stream


def test_only_whole_characters_are_shown() -> None:
    shown, stream = pieces("né€😀x".encode())
    assert shown == ["n", "", "é", "", "", "€", "", "", "", "😀", "x", ""]
    assert stream.text == "né€😀x"
    shown, stream = pieces(b"a\xff\xc3\xa9\xe2\x82")
    assert shown == ["a", "", "�", "é", "", "", "�"]
    assert stream.text == decode(b"a\xff\xc3\xa9\xe2\x82")
    text = ("é\ufffd€" * 30).encode() + b"\x80" * 7 + "😀".encode()
    assert pieces(text)[1].text == "".join(pieces(text)[0]) == decode(text)


def test_stop_strings_are_found_across_tokens_and_never_shown() -> None:
    shown, stream = pieces(b"one STOX STOP two", ("STOP", "Z"))
    assert (stream.stopped, stream.text, "".join(shown)) == (True, "one STOX ", "one STOX ")
    assert shown[4:8] == ["", "", "", "STOX"], "what a stop string may begin with is held back"
    assert pieces(b"aab", ("ab",))[1].text == "a"
    assert pieces(b"xaba", ("ba", "ab"))[1].text == "x", "the earlier one"
    shown, stream = pieces(b"end ST", ("STOP",))
    assert (stream.stopped, "".join(shown)) == (False, "end ST")


def sequence(tokens: bytes, logprobs: list[float] | None = None, **more: Any) -> Sequence:
    """An answer that was given ``tokens`` until it ended."""
    request = Request(**{"prompt": [1, 2], "max_tokens": 50, **more})
    built = Sequence(0, 0, request, decode)
    for token, logprob in zip(tokens, logprobs or [-1.0] * len(tokens), strict=True):
        if built.completion is None:
            built.push(token, logprob, "w")
    return built


def ended(*arguments: Any, **more: Any) -> tuple[str, str, int]:
    done = sequence(*arguments, **more).completion
    return (done.finish_reason, done.text, len(done.tokens)) if done else ("", "", -1)


def test_when_an_answer_ends() -> None:
    assert ended(b"abcdef", max_tokens=4) == ("length", "abcd", 4)
    assert ended(b"abcdef", stop_ids=frozenset([ord("c")])) == ("stop", "ab", 3)
    assert ended(b"ab, cd", stop_strings=(", c",)) == ("stop", "ab", 5)
    assert ended(b"a, b, c, d", stop_strings=(", c, d", ","), min_tokens=3) == ("stop", "a, b", 5)
    assert ended(b"abcdef") == ("", "", -1)
    sure, unsure = math.log(0.995), math.log(0.985)
    circles = Repetition(tokens=3, probability=0.99)
    assert ended(b"abcdefg", [sure, sure, unsure, sure, sure, sure, sure], repetition=circles) == (
        "repetition",
        "abcdef",
        6,
    )
    assert ended(b"abcd", [sure, sure, unsure, sure], repetition=circles)[0] == ""
    with pytest.raises(NumericStop, match="not a number at token 3"):
        sequence(b"ab", [-1.0, math.nan])
    assert ended(b"abcdefg", [sure] * 7, repetition=circles, min_tokens=5) == ("repetition", "abcde", 5)


OPEN, CLOSE = ord("<"), ord(">")


def thinking(budget: int, **more: Any) -> Thinking:
    return Thinking(budget=budget, opening=(OPEN,), closing=(CLOSE,), forced=(10, CLOSE, 10), **more)


def test_the_thinking_budget_forces_the_closing_text() -> None:
    built = sequence(b"<abc", thinking=thinking(3))
    assert built.forced(5) == [10, CLOSE, 10, -1, -1]
    assert built.horizon() == math.inf
    for token in (10, CLOSE, 10, ord("x")):
        built.push(token, -1.0, "w")
    built.finish("stop", "w")
    assert built.completion is not None
    assert (built.completion.forced, built.completion.reasoning_tokens) == (range(4, 7), 5)
    assert built.completion.text == "<abc\n>\nx"


def test_the_host_looks_before_the_budget_is_used_up() -> None:
    assert Sequence(0, 0, Request(prompt=[1], max_tokens=9), None).horizon() == math.inf
    built = sequence(b"", thinking=thinking(3))
    assert built.horizon() == 4, "the first token may open the reasoning"
    built = sequence(b"xyz<a", thinking=thinking(3))
    assert (built.horizon(), built.forced(2)) == (2, [-1, -1])
    built.in_flight = 2
    assert built.horizon() == 0
    assert sequence(b"<a>bcdefgh", thinking=thinking(3)).forced(3) == [-1] * 3, "it closed by itself"
    assert sequence(b"<a>bcdefgh", thinking=thinking(3)).horizon() == math.inf
    assert sequence(b"", thinking=thinking(0, is_open=True)).forced(2) == [10, CLOSE]
    assert sequence(b"ab", thinking=thinking(2, is_open=True)).forced(1) == [10]
    assert sequence(b"<", thinking=thinking(0)).forced(1) == [10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-0.1), r"temperature is -0.1; it has to be 0 \(greedy\), or 0.0001 to 10,000"),
        (lambda: Sampling(temperature=math.nan), "temperature is nan"),
        (lambda: Sampling(temperature=1e-45), "temperature is 1e-45"),
        (lambda: Sampling(temperature=1e39), "temperature is 1e[+]39"),
        (lambda: Sampling(top_k=2**63), "top_k is 9223372036854775808"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0; it has to be more than 0"),
        (lambda: Sampling(top_k=-1), "top_k is -1"),
        (lambda: Request(prompt=[1], max_tokens=0), "max_tokens is 0"),
        (lambda: Request(prompt=[1], max_tokens=3, min_tokens=4), r"min_tokens is 4; it has to be 0 to max_tokens \(3\)"),
        (lambda: Request(prompt=[1], max_tokens=3, samples=0), "samples is 0"),
        (lambda: Request(prompt=[1], max_tokens=3, stop_strings=("",)), "a stop string is empty"),
        (lambda: Request(prompt=[1], max_tokens=3, thinking=thinking(-1)), "a thinking budget has to be 0 or more"),
        (lambda: Request(prompt=[1], max_tokens=3, repetition=Repetition(tokens=0)), "the repetition stop needs 1 token"),
        (lambda: EngineOptions(capacity=0), "capacity is 0"),
        (lambda: EngineOptions(capacity=9, slots=0), "slots is 0"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
