"""Step 5, tokenize and verify: a fast engine encodes, and every run proves a sample of its ids equal to tokenizers'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from m1_data.errors import DataError, EnvironmentProblem
from m1_data.tokenizer import LoadedTokenizer

VERIFY_CHARS = 2_000
"""Characters at the beginning of a text whose ids are compared."""

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

    The first ``verify_docs`` texts are verified, each before its batch is encoded.

    Raises:
        DataError: the engine's ids differ from those of the tokenizers library.
    """
    documents = 0
    for batch in _batches(texts):
        verified = encoder.verify(batch[: verify_docs - documents]) if documents < verify_docs else 0
        ids, offsets = encoder.encode(batch)
        documents += len(batch)
        yield EncodedBatch(texts=batch, ids=ids, offsets=offsets, verified_ids=verified)


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
        DataError: the engine cannot load this tokenizer.
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

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return all ids one after another, ``[tokens]``, and the int64 ``[documents + 1]`` offsets between documents."""
        ids, offsets = self._encode(list(texts))
        return ids, offsets

    def verify(self, texts: Sequence[str]) -> int:
        """Compare the ids of each text's beginning with those of the tokenizers library; return how many were compared.

        Raises:
            DataError: an id differs.
        """
        if self.engine == "tokenizers":
            return 0
        heads = [text[:VERIFY_CHARS] for text in texts]
        ids, offsets = self.encode(heads)
        for n, expected in enumerate(self._hf()(heads, split=True)):
            got = ids[offsets[n] : offsets[n + 1]]
            if len(got) != len(expected) or (got != np.asarray(expected)).any():
                raise DataError(
                    f"{self.engine} and tokenizers disagree on a text that begins {heads[n][:60]!r}",
                    fix='set data.engine = "tokenizers" (slower, and right), and report the text to the engine',
                )
        return int(offsets[-1])

    def _without_control_tokens(self) -> bytes:
        return orjson.dumps({**orjson.loads(self._tokenizer.json_bytes), "added_tokens": [], "post_processor": None})

    def _gigatoken(self) -> Any:
        from gigatoken import Tokenizer

        engine = Tokenizer.from_json(self._without_control_tokens())

        # One text at a time: encode_batch takes 2.8 times the CPU time on its thread pool (a cache per thread), and imports
        # the awkward library for its result.
        return lambda texts: _joined([engine.encode(text) for text in texts])

    def _fastokens(self) -> Any:
        from fastokens import Tokenizer

        engine = Tokenizer.from_json_str(self._without_control_tokens().decode())
        return lambda texts: _joined(
            [encoding.ids for encoding in engine.encode_batch(texts, add_special_tokens=False)]
        )

    def _hf(self) -> Any:
        reference = self._tokenizer.reference

        def encode(texts: list[str], split: bool = False) -> Any:
            lists = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
            return lists if split else _joined(lists)

        return encode


def _joined(parts: Sequence[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in parts], out=offsets[1:])
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in parts]
    # One long document is a batch of its own: its ids may need gigabytes, and are not copied.
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), offsets
