"""Encodes plain text as transformers encodes it in its place: at the beginning, behind a control token, or within a text.

Tokenizers of the SentencePiece type write a space before a text. The same text gets other ids behind a control token, and
again others where it only continues a text, as an answer continues the generation prompt.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from m1_data.tokenizer import encode_text, text_tokenizer

Place = Literal["first", "behind", "within"]


class PieceEncoder:
    """Encodes pieces of a rendered conversation; control tokens in them stay text.

    Args:
        data: the ``tokenizer.json``.

    Raises:
        DataError: see ``text_tokenizer``.
        Exception: not a tokenizer; tokenizers raises no other class.
    """

    def __init__(self, data: bytes) -> None:
        self.plain = text_tokenizer(data)
        raw = json.loads(data)
        self._places: dict[Place, Any] = {"first": self.plain}
        for place in ("behind", "within"):
            changed = _in_place(raw, place)
            self._places[place] = self.plain if changed == raw else text_tokenizer(json.dumps(changed).encode())

    def encode(self, text: str, place: Place) -> list[int]:
        """Return the token ids of a text.

        Args:
            place: ``first`` begins the conversation, ``behind`` follows a control token, ``within`` continues a text.
        """
        return encode_text(self._places[place], text)


def _in_place(raw: dict[str, Any], place: Place) -> dict[str, Any]:
    """The tokenizer without what writes a space before a text in another place."""
    return raw | {part: _part_in_place(raw.get(part), place) for part in ("normalizer", "pre_tokenizer")}


def _part_in_place(part: dict[str, Any] | None, place: Place) -> dict[str, Any] | None:
    kind = part["type"] if part else ""
    if part is None or kind == "Sequence":
        return part and {
            key: [kept for one in value if (kept := _part_in_place(one, place))] if isinstance(value, list) else value
            for key, value in part.items()
        }
    if kind == "Metaspace" and (place == "within" or part.get("prepend_scheme") == "first"):
        return {key: value for key, value in part.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    if place == "within" and kind == "Prepend":
        return None
    if place == "within" and kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part
