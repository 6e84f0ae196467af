"""Keeping fp32 sums fp32 inside a caller's autocast region."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor


def without_autocast[F: Callable[..., Any]](function: F) -> F:
    """Wrap the ``forward`` or ``backward`` of an autograd function so that autocast does not reach its matrix products.

    ``torch.amp.custom_fwd`` does the same for one device type, which must be named when the class is written.
    """

    @wraps(function)
    def wrapped(ctx: Any, *args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(ctx, *args)

    return cast(F, wrapped)
