"""Recomputation of a layer in the backward pass that repeats neither softmax attention nor the experts' forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from m1_kernels.host_inputs import HostInputs
from m1_kernels.restoring import restoring

_SOFTMAX_OPS = (
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
)


def recomputed(
    layer: Callable[[Tensor], Tensor], x: Tensor, *, keep_softmax: bool, host: HostInputs | None = None
) -> Tensor:
    """Compute ``layer(x)`` and keep only ``x``; everything else is computed again in the backward pass.

    Args:
        layer: a pure function of one tensor that returns one tensor.
        x: the input, any shape.
        keep_softmax: also keep output and log-sum-exp of every softmax attention, 2 + 4 / D bytes a channel in bf16:
            at a million tokens its forward pass is a quarter of the step.
        host: offloads ``x`` between forward and backward; None keeps it on the device.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if not keep_softmax:
            return nullcontext(), _restoring()
        kept, restored = create_selective_checkpoint_contexts(_softmax_ops())
        return kept, _restoring(restored)

    with host.saving() if host is not None else nullcontext():
        out: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return out


@contextmanager
def _restoring(*others: AbstractContextManager[Any]) -> Iterator[None]:
    with restoring(), ExitStack() as stack:
        for other in others:
            stack.enter_context(other)
        yield


def _softmax_ops() -> list[Any]:
    import torch.nn.attention.varlen

    spaces = (name.split("::") for name in _SOFTMAX_OPS)
    return [getattr(getattr(torch.ops, space), name).default for space, name in spaces]
