"""From rows of files to pieces of a store: what one process does, for any part of the rows and with the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from m1_data.chat.conversations import Conversation
from m1_data.chat.encoder import ChatEncoder, Encoded
from m1_data.chat.rows import Row
from m1_data.sft.reflection import PatternCounter, trained_texts
from m1_data.sft.samples import SampleSettings, SampleTally, samples_in

SAMPLE = np.dtype(
    [
        ("begin", "<i8"),  # of its ids in tokens.bin
        ("length", "<i8"),
        ("first_trained", "<i8"),  # the first id that is a label and trained; its length where there is none
        ("trained", "<i8"),  # number of labels that are trained
        ("where_end", "<i8"),
        ("hash", "<u8", 2),  # of what its row says
        ("domain", "<i4"),  # number of its name in the manifest
        ("file", "<i4"),
    ]
)
"""What is known of a sample."""
TRAINED = np.uint32(1 << 31)
"""The bit of an id in ``tokens.bin`` that says that it is a training target."""
PIECE_BYTES = 4 << 20


@dataclass(slots=True)
class Piece:
    """Samples in the form of a store's files. Places and numbers of domains count from the piece's beginning."""

    tokens: bytearray = field(default_factory=bytearray)
    samples: bytearray = field(default_factory=bytearray)
    """``SAMPLE`` of each."""
    reflection: bytearray = field(default_factory=bytearray)
    where: bytearray = field(default_factory=bytearray)
    domains: dict[str, int] = field(default_factory=dict)
    """Number by name."""

    def add(self, conversation: Conversation, encoded: Encoded, matches: npt.NDArray[np.int64]) -> None:
        """Append a sample."""
        ids, trained = encoded
        targets = np.flatnonzero(trained[1:]) + 1
        begin = len(self.tokens) // 4
        self.tokens += (ids.astype("<u4") | np.where(trained, TRAINED, 0)).astype("<u4").tobytes()
        self.where += conversation.where.encode()
        self.reflection += matches.astype("<u4").tobytes()
        sample = np.zeros(1, SAMPLE)
        sample[0] = (
            begin,
            len(ids),
            targets[0] if len(targets) else len(ids),
            len(targets),
            len(self.where),
            np.frombuffer(conversation.digest, "<u8"),
            self.domains.setdefault(conversation.domain, len(self.domains)),
            conversation.file,
        )
        self.samples += sample.tobytes()


class RowEncoder:
    """Encodes rows. The process that renders the template lives until ``close``.

    Raises:
        DataError: see ``ChatEncoder``.
    """

    def __init__(self, settings: SampleSettings) -> None:
        self._settings = settings
        self._chat = ChatEncoder(settings.tokenizer_dir, settings.chat_template, date=settings.date)
        self._counter = PatternCounter(settings.patterns)
        self.pad_id: int = self._chat.pad_id

    def encode(self, rows: Iterable[Row], tally: SampleTally) -> Iterator[Piece]:
        """Yield the samples of rows, in pieces of some ``PIECE_BYTES``.

        Args:
            tally: is counted up.

        Raises:
            DataError: see ``samples_in``.
        """
        piece = Piece()
        for conversation, encoded in samples_in(rows, self._settings, self._chat, tally):
            piece.add(conversation, encoded, self._counter.count(trained_texts(conversation)))
            if len(piece.tokens) >= PIECE_BYTES:
                yield piece
                piece = Piece()
        yield piece

    def close(self) -> None:
        """End the process that renders the template."""
        self._chat.close()
