"""What becomes of a key that is changed while a run exists."""

from __future__ import annotations

from enum import Enum


class WhenChanged(Enum):
    """The answer to a key that is not what the checkpoint that a run continues was made with."""

    FIXED_FOR_RUN = "fixed for the run"
    """Refused: the weights, or the form of what is saved, depend on it."""
    FIXED_IN_STAGE = "fixed within a stage"
    """Refused while the stage is in progress or finished; said and logged when a stage begins with it."""
    APPLIED = "applied from now on"
    """Said and logged."""
    BY_PREPARED_DATA = "fixed by m1 prepare-data"
    """Compared with what the prepared data records (``m1_data.storage``)."""
    NO_EFFECT = "does not change what is trained"
