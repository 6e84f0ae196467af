"""Step 4, deduplicate: of texts that differ in nothing but white space, the first one stays, whatever its source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from m1_data.prepare.tally import Tally
from m1_data.storage.text_digest import DIGEST_BYTES, text_digest


def deduplicate(texts: Iterable[str], seen: ExactDedup, tally: Tally) -> Iterator[str]:
    """Yield the texts that ``seen`` has not met, in order; count the others in ``tally.rejected`` as duplicates."""
    for text in texts:
        if seen.is_new(text):
            yield text
        else:
            tally.rejected["duplicate"] += 1


class ExactDedup:
    """Remembers the ``text_digest`` of every text of all sources."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._new: list[bytes] = []

    def is_new(self, text: str) -> bool:
        """Remember the text and return whether no equal one came before."""
        digest = text_digest(text)
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self._new.append(digest)
        return True

    def take_new_digests(self) -> bytes:
        """Return the concatenated digests that were added since the last call."""
        digests = b"".join(self._new)
        self._new.clear()
        return digests

    def restore(self, digests: bytes) -> None:
        """Remember the digests that ``take_new_digests`` returned in an earlier run."""
        self._seen.update(digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))
