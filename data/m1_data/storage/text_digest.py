"""What tells one text from another when documents are deduplicated and held out."""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 16
_CHUNK = 1 << 20
"""Characters that are split into words at a time."""


def text_digest(text: str) -> bytes:
    """Return the 128-bit XXH3 hash of the text's words, in UTF-8 with a space between them.

    Texts that differ only in white space have the same digest. Memory is bounded, however long the text is.
    """
    digest = xxhash.xxh3_128()
    begun = apart = False
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        words = " ".join(chunk.split())
        if words:
            space = " " if begun and (apart or chunk[0].isspace()) else ""
            digest.update((space + words).encode("utf-8"))
            begun = True
        apart = not words or chunk[-1].isspace()
    return digest.digest()
