"""The unit in which prepared data is stored and drawn: one source's documents of one length bucket."""

from __future__ import annotations

from typing import NamedTuple

from m1_data.spec import LENGTH_CLASSES

_CLASS_OF_BUCKET = {bucket: name for name, buckets in LENGTH_CLASSES.items() for bucket in buckets}


class Cell(NamedTuple):
    """A cell is named by its source, the source's domain and one of ``spec.BUCKET_NAMES``."""

    source: str
    domain: str
    bucket: str

    @property
    def length_class(self) -> str:
        """The length class of the bucket: short, medium or long."""
        return _CLASS_OF_BUCKET[self.bucket]
