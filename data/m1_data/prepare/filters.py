"""Step 3, filter: the place to add a data filter.

A filter is a function that takes a cleaned text and the source's tally, and returns the text (unchanged or rewritten), or
None to reject it. It counts each rejection in the tally under a short reason, which appears in the manifest and in the
closing account. To add one, write it here and name it in ``FILTERS``::

    def at_least_100_characters(text: str, tally: Tally) -> str | None:
        if len(text) < 100:
            tally.rejected["under 100 characters"] += 1
            return None
        return text

    FILTERS: tuple[Filter, ...] = (at_least_100_characters,)

Three rules follow from the rest of the pipeline:

* The result depends on the text alone: the same inputs must give the same bytes, also after an interruption.
* A rejection is a choice: it does not count against ``data.max_bad_share``, as an unusable record does (``Tally.reject``).
* The up-to-date check does not see a change of ``FILTERS``: raise ``work_folder.FORMAT_VERSION`` with it, so that existing
  data is prepared again. A filter with a setting gets a key in ``spec.PrepareSpec``, which that check does see, and is called
  in ``run.prepare`` beside ``filter_texts``.

``FILTERS`` also choose the texts that a tokenizer is trained on. ``tests/unit/test_data_filters.py`` shows how to test one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from m1_data.prepare.tally import Tally

Filter = Callable[[str, Tally], str | None]
"""A filter takes (text, tally) and returns the text, or None after counting the rejection in the tally."""

FILTERS: tuple[Filter, ...] = ()
"""The filters, in the order in which they see a text."""


def filter_texts(texts: Iterable[str], tally: Tally) -> Iterator[str]:
    """Yield every text as ``apply_filters`` returns it, in order, without the rejected ones."""
    for text in texts:
        kept = apply_filters(text, tally)
        if kept is not None:
            yield kept


def apply_filters(text: str, tally: Tally) -> str | None:
    """Return the text after all of ``FILTERS``, or None as soon as one of them rejects it."""
    for keep in FILTERS:
        kept = keep(text, tally)
        if kept is None:
            return None
        text = kept
    return text
