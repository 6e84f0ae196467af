"""Needle documents: length, depth, and that the answer is where it is said to be and nowhere else."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_data.sampling.needles import (
    KEY_TOKENS,
    PAIR_TOKENS,
    SHORTEST_TOKENS,
    VALUE_TOKENS,
    Haystack,
    needle_document,
    training_documents,
)
from m1_stages.errors import DataError

TEXT = Haystack.of_random_ids(np.arange(10, 60), 5_000, seed=3)


def found(tokens: np.ndarray, word: np.ndarray) -> list[int]:
    return [at for at in range(len(tokens) - len(word) + 1) if (tokens[at : at + len(word)] == word).all()]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(SHORTEST_TOKENS, 700),
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    seed=st.integers(0, 9),
    sample=st.integers(0, 9),
)
def test_the_needle_is_at_its_depth_and_its_answer_there_only(
    length: int, depths: list[float], seed: int, sample: int
) -> None:
    document = needle_document(TEXT, seed=seed, length=length, depths=depths, sample=sample)
    assert len(document.tokens) == length
    text_tokens = length - 2 * PAIR_TOKENS * len(depths)
    questions = length - PAIR_TOKENS * len(depths)
    assert sorted(document.answers) == list(range(questions + KEY_TOKENS, length, PAIR_TOKENS))
    for depth, needle, answer in zip(depths, document.needles, document.answers, strict=True):
        before = sum(other < needle for other in document.needles)
        assert needle - before * PAIR_TOKENS == round(depth * text_tokens)
        key = document.tokens[needle : needle + KEY_TOKENS]
        value = document.tokens[needle + KEY_TOKENS : needle + PAIR_TOKENS]
        assert found(document.tokens, key) == [needle, answer - KEY_TOKENS]
        assert found(document.tokens, value) == [needle + KEY_TOKENS, answer]


def test_the_control_asks_the_same_over_the_same_text() -> None:
    arguments = {"seed": 1, "length": 200, "sample": 4}
    document = needle_document(TEXT, depths=[0.5], **arguments)
    control = needle_document(TEXT, depths=[0.5], hidden=False, **arguments)
    assert (document.tokens[-PAIR_TOKENS:] == control.tokens[-PAIR_TOKENS:]).all()
    assert (control.needles, control.answers) == ((), document.answers)
    assert len(control.tokens) == 200
    assert (control.tokens[:92] == document.tokens[:92]).all()
    assert (control.tokens[92:184] == document.tokens[100:192]).all(), "the text goes on where the needle was"
    assert found(control.tokens, control.tokens[-VALUE_TOKENS:]) == [200 - VALUE_TOKENS]


def test_a_document_depends_on_each_argument_and_on_nothing_else() -> None:
    def tokens(seed: int = 0, length: int = 128, depth: float = 0.5, sample: int = 0) -> bytes:
        return needle_document(TEXT, seed=seed, length=length, depths=[depth], sample=sample).tokens.tobytes()

    assert tokens() == tokens()
    others = [tokens(seed=1), tokens(length=129), tokens(depth=0.9), tokens(sample=1)]
    assert len({tokens(), *others}) == 5
    # What it is must not change between versions, or results of different dates could not be compared.
    assert np.frombuffer(tokens(), np.int64)[-8:].tolist() == PINNED


PINNED = [49, 35, 54, 54, 18, 56, 28, 47]


def test_training_documents_fit_their_contexts_and_differ_in_density() -> None:
    documents = list(islice(training_documents(TEXT, [128, 4096], seed=5), 200))
    short = [d for d in documents if len(d) < 128]
    long = [d for d in documents if len(d) >= 255]
    assert len(short) + len(long) == 200
    assert min(map(len, short)) >= SHORTEST_TOKENS
    assert max(map(len, long)) < 4096
    assert abs(sum(map(len, short)) - sum(map(len, long))) < 4096, "each context gets the same number of tokens"
    assert len({len(d) for d in long}) > 0.9 * len(long)
    shares = []
    for document in long:
        asked = 0
        while document[(at := len(document) - (asked + 1) * PAIR_TOKENS) :].size <= len(document) // 2:
            places = found(document, document[at : at + PAIR_TOKENS])
            if len(places) != 2 or places[1] != at:
                break
            asked += 1
        assert 1 <= asked <= min(256, len(document) // (3 * PAIR_TOKENS))
        shares.append(asked * PAIR_TOKENS / len(document))
    assert min(shares) < 0.05
    assert max(shares) > 0.3


def test_refusals() -> None:
    with pytest.raises(DataError, match="no room for 3 needles"):
        needle_document(TEXT, seed=0, length=48, depths=[0, 0.5, 1], sample=0)
    few = Haystack.of_random_ids(np.arange(2), 100, seed=0)
    with pytest.raises(DataError, match="2 different ids are too few"):
        needle_document(few, seed=0, length=2000, depths=[0.5], sample=0)
