"""Megatron's data parallelism around each chunk: fp32 gradient buffers, their reduction, and what overlaps with computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from m1_stages.config import ParallelConfig
from m1_stages.runtime.layer_timer import LayerClock


def wrap_ddp(chunks: Sequence[Any], parallel: ParallelConfig, *, bucket_size: int | None = None) -> list[Any]:
    """Wrap each chunk in Megatron's DDP and hang the reductions on the model's configuration.

    Gradients are complete when ``Finalize`` has run, at the end of the backward passes, whether their reduction overlaps
    with these or not.

    Args:
        bucket_size: parameters that are reduced and gathered together where that overlaps; Megatron's own by default.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    interleaved = len(chunks) > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=interleaved,
        bucket_size=bucket_size,
    )
    wrapped: list[Any] = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    wrapped[0].layer_clock = LayerClock(chunks)
    config = wrapped[0].config
    config.finalize_model_grads_func = Finalize()
    config.no_sync_func = _per_chunk([chunk.no_sync for chunk in wrapped])
    if parallel.overlap_grad_reduce:
        # The stages of a pipeline start their reductions together, or each would slow down the others' messages.
        config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in wrapped])
    if parallel.overlap_param_gather:
        if interleaved:
            config.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in wrapped])
        for chunk in wrapped:
            _wait_before_use(chunk)
    return wrapped


class Finalize:
    """Megatron's reductions of the gradients, without its division by the tokens: that would wait for the device and pass
    over all gradients once more, and ``StepResult.apply`` does it together with clipping."""

    def __call__(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(chunks, None, **kwargs)


def gather_parameters(wrapped: Iterable[Any]) -> None:
    """Make the whole of every parameter current; every rank calls it before parameters are read outside a forward pass.

    Where the gather overlaps with the forward pass, an update leaves this rank with new values of its own shards only.
    """
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _per_chunk(functions: list[Callable[..., Any]]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _wait_before_use(wrapped: Any) -> None:
    """Wait for gathered parameters where our layers use them.

    Megatron waits in the forward of the module that holds a parameter. Our layers read the parameters of their parts
    directly (fused norms, router, experts), and the model the head's: without these hooks they compute with old values.
    """
    decoder = wrapped.module.decoder
    for layer in decoder.layers:
        layer.register_forward_pre_hook(_waiting(wrapped, list(layer.parameters())))
    if wrapped.module.post_process:
        decoder.final_layernorm.register_forward_pre_hook(_waiting(wrapped, [wrapped.module.output_layer.weight]))


def _waiting(wrapped: Any, parameters: list[nn.Parameter]) -> Callable[..., None]:
    def wait(*_: Any) -> None:
        for parameter in parameters:
            wrapped.param_to_bucket_group[parameter].finish_param_sync(
                skip_next_bucket_dispatch=wrapped.ddp_config.align_param_gather
            )

    return wait
