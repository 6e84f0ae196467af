"""The hybrid model on Megatron-Core.

Importing this package imports no Megatron: call ``m1_stages.runtime.device.use`` first, then ``build_model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m1_stages.model.backends import backend_choices
    from m1_stages.model.chunks import ModelChunks, build_model
    from m1_stages.model.hybrid import HybridModel

__all__ = ["HybridModel", "ModelChunks", "backend_choices", "build_model"]


def __getattr__(name: str) -> Any:
    if name == "HybridModel":
        from m1_stages.model.hybrid import HybridModel

        return HybridModel
    if name == "backend_choices":
        from m1_stages.model.backends import backend_choices

        return backend_choices
    if name in ("ModelChunks", "build_model"):
        from m1_stages.model import chunks

        return getattr(chunks, name)
    raise AttributeError(name)
