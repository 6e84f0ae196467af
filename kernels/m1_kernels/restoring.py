"""Whether the present forward pass only restores what a backward pass needs (``recompute`` says so, operators ask)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_restoring: ContextVar[bool] = ContextVar("restoring", default=False)


def recomputing() -> bool:
    """Return whether the present forward pass only restores activations; nobody reads its result."""
    return _restoring.get()


@contextmanager
def restoring() -> Iterator[None]:
    """Mark the forward passes inside as ones that only restore activations."""
    token = _restoring.set(True)
    try:
        yield
    finally:
        _restoring.reset(token)
