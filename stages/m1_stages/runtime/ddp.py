"""Megatron's data parallelism around each chunk: fp32 gradient buffers, their reduction, and what overlaps with computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor, nn

from m1_stages.config import ParallelConfig
from m1_stages.runtime.layer_timer import LayerTimer


class TrainableModel(Sequence[Any]):
    """This rank's chunks of the model, each wrapped in Megatron's DDP, used as one.

    The reductions are set in the model's configuration, where Megatron's schedules look for them. Gradients are complete when
    ``Finalize`` has run, at the end of the backward passes, whether their reduction overlaps with these or not.

    Args:
        chunks: the bare chunks in model order: one, or several in an interleaved pipeline.
        parallel: decides what overlaps with computing, and whether optimizer state is sharded.
        bucket_size: parameters that are reduced and gathered together where that overlaps; Megatron's own by default.
    """

    def __init__(self, chunks: Sequence[Any], parallel: ParallelConfig, *, bucket_size: int | None = None) -> None:
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
        self.chunks: list[Any] = [
            DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
        self.layer_timer = LayerTimer(chunks)
        config = self.chunks[0].config
        config.finalize_model_grads_func = Finalize()
        config.no_sync_func = _per_chunk([chunk.no_sync for chunk in self.chunks])
        if parallel.overlap_grad_reduce:
            # The stages of a pipeline start their reductions together, or each would slow down the others' messages.
            config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in self.chunks])
        if parallel.overlap_param_gather:
            if interleaved:
                config.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in self.chunks])
            for chunk in self.chunks:
                _wait_before_use(chunk)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.chunks[index]

    def __len__(self) -> int:
        return len(self.chunks)

    def zero_grad_buffers(self) -> None:
        """Set the fp32 gradient buffers to zero, before the first backward pass of a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def gather_parameters(self) -> None:
        """Make the whole of every parameter current; every rank calls it before parameters are read outside a forward pass.

        Where the gather overlaps with the forward pass, an update leaves this rank with new values of its own shards only.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


class Finalize:
    """Megatron's reductions of the gradients, without its division by the number of tokens.

    The division would wait for the device and pass over all gradients once more; ``StepResult.apply`` does it together with
    clipping.
    """

    def __call__(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(chunks, None, **kwargs)


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
    trained = [parameter for parameter in parameters if parameter.requires_grad]  # only these are gathered

    def wait(*_: Any) -> None:
        for parameter in trained:
            wrapped.param_to_bucket_group[parameter].finish_param_sync(
                skip_next_bucket_dispatch=wrapped.ddp_config.align_param_gather
            )

    return wait
