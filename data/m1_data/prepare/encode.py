"""Step 5, tokenize and verify: a fast engine encodes, and every run proves a sample of its ids equal to tokenizers'.

The proof has two parts. Before anything is read: texts that engines are known to disagree on, with every added token of the
tokenizer among them. While a source is read: a sample of its documents from the first to the last. A difference is refused:
ids of two engines are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from m1_data.errors import DataError, EnvironmentProblem
from m1_data.seeded_random import derive_seed
from m1_data.tokenizer import LoadedTokenizer, text_tokenizer_json

VERIFY_CHARS = 2_000
"""Characters at the beginning, in the middle and at the end of a text that are compared; up to three times this, the whole."""

VERIFY_ONE_IN = 1_000
"""Of this many documents in a row, at least one is verified."""

_HOSTILE_TEXTS = (
    " ",
    "   a",
    "a   \n\n  b\t\tc\r\nd ",
    "e\u0301 \u00e9 \u212b \uff21\uff22 \ufb01 \u2167",  # what a normalizer would change
    "\ufeff\u200b\u00a0\u2028\x00\x1b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u0905\u0928\u0941 \u0e44\u0e17\u0e22 \u6570\u5b66 \u0627\u0644",
    "It's I'LL don't 1234567890 3.14 x+=1; <|a|> </b>",
    "a" * 500,
    " " * 500,
    "9" * 500,
)

BATCH_CHARS = 8_000_000
BATCH_DOCUMENTS = 2_048


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Some documents of one source with their token ids."""

    texts: list[str]
    ids: NDArray[Any]
    """The token ids of all documents, one after another: uint32 or the engine's own integer type, ``[tokens]``."""
    offsets: NDArray[np.int64]
    """Document n has ``ids[offsets[n] : offsets[n + 1]]``; int64 ``[documents + 1]``."""
    verified_ids: int
    """Number of ids that were compared with those of the tokenizers library."""


def tokenize_and_verify(texts: Iterable[str], encoder: Encoder, *, verify_docs: int) -> Iterator[EncodedBatch]:
    """Yield the texts with their token ids, in order, in batches of bounded size.

    The texts that ``is_verified`` names are verified, each before its batch is encoded.

    Raises:
        DataError: the engine's ids differ from those of the tokenizers library.
    """
    documents = 0
    for batch in _batches(texts):
        verified = encoder.verify([t for n, t in enumerate(batch, documents) if is_verified(n, verify_docs)])
        ids, offsets = encoder.encode(batch)
        documents += len(batch)
        yield EncodedBatch(texts=batch, ids=ids, offsets=offsets, verified_ids=verified)


def is_verified(number: int, verify_docs: int) -> bool:
    """Return whether the document at place ``number`` of its source, from 0, is verified.

    The first ``verify_docs`` are, then fewer and fewer, and one of every ``VERIFY_ONE_IN`` to the end. The places are
    pseudo-random and the same in every run; nothing has to be known of what comes later.
    """
    block, place = divmod(number, VERIFY_ONE_IN)
    if place == derive_seed("verify", block) % VERIFY_ONE_IN:
        return True
    return derive_seed("verify more", number) % (number + 1) < verify_docs


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of at most ``BATCH_DOCUMENTS`` texts and ``BATCH_CHARS`` characters; a longer text is one of its own."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and (chars + len(text) > BATCH_CHARS or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
        if chars > BATCH_CHARS:  # a long document does not wait until the next one, perhaps as long, has been read
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Encoder:
    """Encodes documents; control tokens written in a text stay text.

    Raises:
        EnvironmentProblem: the engine is not installed.
        DataError: the engine cannot load this tokenizer, or gives other ids than the tokenizers library.
    """

    def __init__(self, tokenizer: LoadedTokenizer, engine: str) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        try:
            self._encode = {"gigatoken": self._gigatoken, "fastokens": self._fastokens, "tokenizers": self._hf}[
                engine
            ]()
        except ImportError as error:
            raise EnvironmentProblem(
                f"the encoding engine {engine} is not installed",
                fix=f"pip install {engine}, or set data.engine = tokenizers",
            ) from error
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise DataError(
                f"{engine} cannot load this tokenizer: {error}", fix='set data.engine = "tokenizers"'
            ) from error
        self.verify(self._hostile_texts())

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return all ids one after another, ``[tokens]``, and the int64 ``[documents + 1]`` offsets between documents."""
        ids, offsets = self._encode(list(texts))
        return ids, offsets

    def verify(self, texts: Sequence[str]) -> int:
        """Compare the ids of texts with those of the tokenizers library; return how many were compared.

        Of a long text the beginning, the middle and the end are compared.

        Raises:
            DataError: an id differs.
        """
        if self.engine == "tokenizers" or not texts:
            return 0
        pieces = [piece for text in texts for piece in _pieces(text)]
        ids, offsets = self.encode(pieces)
        for n, expected in enumerate(self._hf()(pieces, split=True)):
            got = ids[offsets[n] : offsets[n + 1]]
            if len(got) != len(expected) or (got != np.asarray(expected)).any():
                raise DataError(
                    f"{self.engine} and tokenizers disagree on a text that begins {pieces[n][:60]!r}",
                    fix='set data.engine = "tokenizers" (slower, and right), and report the text to the engine',
                )
        return int(offsets[-1])

    def _hostile_texts(self) -> list[str]:
        added = [token.content for token in self._tokenizer.reference.get_added_tokens_decoder().values()]
        return [
            *_HOSTILE_TEXTS,
            *(form.format(token) for token in added for form in ("{0}", "a{0}b", " a {0} {0}{0}\n")),
        ]

    def _for_engine(self) -> bytes:
        """The tokenizer as the fast engines take it: they find every added token in a text, so special ones are left out."""
        raw = text_tokenizer_json(self._tokenizer.json_bytes)
        vocabulary = [token for token in raw.get("added_tokens") or [] if not token["special"]]
        return orjson.dumps({**raw, "added_tokens": vocabulary})

    def _gigatoken(self) -> Any:
        from gigatoken import Tokenizer

        engine = Tokenizer.from_json(self._for_engine())

        # One text at a time: encode_batch takes 2.8 times the CPU time on its thread pool (a cache per thread), and imports
        # the awkward library for its result.
        return lambda texts: _joined([engine.encode(text) for text in texts])

    def _fastokens(self) -> Any:
        from fastokens import Tokenizer

        engine = Tokenizer.from_json_str(self._for_engine().decode())
        return lambda texts: _joined(
            [encoding.ids for encoding in engine.encode_batch(texts, add_special_tokens=False)]
        )

    def _hf(self) -> Any:
        reference = self._tokenizer.reference

        def encode(texts: list[str], split: bool = False) -> Any:
            lists = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
            return lists if split else _joined(lists)

        return encode


def _pieces(text: str) -> list[str]:
    if len(text) <= 3 * VERIFY_CHARS:
        return [text]
    middle = (len(text) - VERIFY_CHARS) // 2
    return [text[:VERIFY_CHARS], text[middle : middle + VERIFY_CHARS], text[-VERIFY_CHARS:]]


def _joined(parts: Sequence[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in parts], out=offsets[1:])
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in parts]
    # One long document is a batch of its own: its ids may need gigabytes, and are not copied.
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), offsets
