"""Text of an answer while its tokens arrive: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from m1_stages.generation.request import Decode

_UNFINISHED = "�"


class TextStream:
    """Decodes tokens one by one.

    Args:
        decode: token ids to text; bytes that are no UTF-8 become U+FFFD.
        stop_strings: texts that end the answer.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stop_strings
        self._window: list[int] = []
        """The tokens since the last one that ended with a whole character, and that one before them."""
        self._known = 0
        """Characters of the window's text that are in ``text`` already."""
        self.text = ""
        """The text so far; cut before a stop string once there is one."""
        self.stopped = False
        self._taken = 0

    def push(self, token: int, *, may_stop: bool = True) -> None:
        """Append one token; without ``may_stop`` no stop string that is complete with it ends the answer."""
        self._window.append(token)
        decoded = self._decode(self._window)
        whole = decoded[:-1] if decoded.endswith(_UNFINISHED) else decoded
        self._append(whole[self._known :], may_stop)
        self._known = max(self._known, len(whole))
        if len(whole) == len(decoded):
            self._window = [token]
            self._known = len(self._decode(self._window))

    def finish(self) -> None:
        """No token follows: bytes that form no character are shown as U+FFFD."""
        if not self.stopped:
            self._append(self._decode(self._window)[self._known :] if self._window else "", True)
        self._window, self._stops = [], ()

    def take(self) -> str:
        """Return the text since the last call that no later token can change."""
        end = len(self.text) if self.stopped else len(self.text) - self._held()
        new, self._taken = self.text[self._taken : end], max(end, self._taken)
        return new

    def _append(self, more: str, may_stop: bool) -> None:
        before = len(self.text)
        self.text += more
        found = [at for stop in self._stops if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if may_stop and more and found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """The most characters at the end of the text with which a stop string begins."""
        return max(
            (
                n
                for stop in self._stops
                for n in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:n])
            ),
            default=0,
        )
