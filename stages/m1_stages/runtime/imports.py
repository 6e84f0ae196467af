"""Imports the large libraries of a training process without what costs seconds and is never used."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and Megatron-Core: nothing is collected.

    They define a million objects that live as long as the process; collections among them took a fifth of a start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_megatron() -> None:
    """Import Megatron-Core while ``torch.compile`` returns functions as they are.

    Megatron-Core wraps its fused activations when it is imported, which loads torch's whole compiler. None of them is in our
    models, and its own switch (``megatron.core.jit.disable_jit_fuser``) can be reached only after they were wrapped.
    """
    if "megatron.core" in sys.modules:
        return
    import torch

    compiler = torch.compile
    torch.compile = _uncompiled
    try:
        with importing():
            from megatron.core.models import gpt  # noqa: F401
            from megatron.core.transformer.moe import moe_layer  # noqa: F401
    finally:
        torch.compile = compiler


def _uncompiled(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand in for ``torch.compile``, as a function and as a decorator with options."""
    return model if model is not None else lambda function: function
