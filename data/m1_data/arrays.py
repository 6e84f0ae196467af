"""Names for the NumPy array types that several modules pass around."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""An int64 array: token ids, lengths in tokens, or positions."""

Floats = npt.NDArray[np.float64]
"""A float64 array: shares or weights."""
