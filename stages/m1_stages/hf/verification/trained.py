"""Computes the Megatron model that was trained from a checkpoint's weights, in fp32: logits, and how decided its routers are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.hf.checkpoint_tensors import TensorSource, get_checked, require_all
from m1_stages.hf.tensor_names import our_shapes
from m1_stages.hf.verification.comparison import Reference

if TYPE_CHECKING:
    from m1_data.sampling.loader import PackedBatch


def trained_logits(
    source: TensorSource,
    model: ModelConfig,
    *,
    slopes: Slopes,
    rope_base: float,
    tokens: Tensor,
    rounded_to: torch.dtype = torch.float32,
) -> Tensor:
    """Return the logits of ``trained_reference``, [B, T, vocab] fp32 on the CPU."""
    return trained_reference(
        source, model, slopes=slopes, rope_base=rope_base, tokens=tokens, rounded_to=rounded_to
    ).logits


def trained_reference(
    source: TensorSource,
    model: ModelConfig,
    *,
    slopes: Slopes,
    rope_base: float,
    tokens: Tensor,
    rounded_to: torch.dtype = torch.float32,
) -> Reference:
    """Compute logits and router decisions of the Megatron model with the checkpoint's weights, in fp32.

    The model computes on this process's GPU, or on the CPU of a process that sees none.

    The function starts and leaves a process group of its own; there must be none before.

    Args:
        tokens: [B, T] int64: B texts, packed into one row and isolated from each other.
        rounded_to: dtype the export stores, so that its rounding is not taken for a difference of the models.

    Raises:
        CheckpointError: tensors are missing or have another shape.
        EnvironmentProblem: the GPU has no room for the model in fp32.
    """
    from m1_stages.runtime import device, parallel

    require_all(source, model, "the checkpoint")
    here, sizes = device.use("auto"), ParallelConfig()
    parallel.start(sizes, device=here, seed=0)
    try:
        from m1_stages.model import build_model

        built = build_model(model, parallel=sizes, rope_base=rope_base, device=here.name)[0]
        built.set_slopes(slopes)
        parameters = dict(built.named_parameters())
        shapes = our_shapes(model)
        if parameters.keys() != shapes.keys():
            raise CheckpointError(f"the model and the export disagree on {sorted(parameters.keys() ^ shapes.keys())}")
        with torch.no_grad():
            for name, shape in shapes.items():
                parameters[name].copy_(get_checked(source, name, shape).to(rounded_to))
            gaps = _record_router_gaps(built, model)
            logits: Tensor = built.eval()(_packed(tokens).to(here.torch_device), logits=True)
        return Reference(
            tokens=tokens,
            logits=logits.cpu().view(*tokens.shape, -1),
            gaps=torch.stack([gaps[layer] for layer in range(model.num_layers)]).view(-1, *tokens.shape),
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"the model in fp32 does not fit on the GPU: {str(error).splitlines()[0]}",
            where=here.why,
            fix="compute on the CPU: m1 export … --device cpu",
        ) from error
    finally:
        parallel.stop()


def _packed(tokens: Tensor) -> PackedBatch:
    """[B, T] tokens as one row of B documents."""
    from m1_data.sampling.loader import PackedBatch

    texts, length = tokens.shape
    row = tokens.reshape(1, -1)
    return PackedBatch(
        tokens=row,
        labels=row.roll(-1, 1),
        loss_mask=torch.ones(row.shape),
        position_ids=torch.arange(length).repeat(texts)[None],
        cu_seqlens=torch.arange(texts + 1, dtype=torch.int32) * length,
        doc_lengths=(length,) * texts,
        sample_ids=(0,),
        trained_tokens=row.numel(),
    )


def _record_router_gaps(built: Any, model: ModelConfig) -> dict[int, Tensor]:
    """Let every layer record how much likelier the last chosen expert is than the next one, [tokens] fp32 by layer."""
    gaps: dict[int, Tensor] = {}

    def record(layer: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].view(-1, model.hidden_size)
        probs = torch.softmax(hidden.float() @ module.router.weight.float().T, dim=-1)
        if model.experts_per_token == model.num_experts:
            gaps[layer] = torch.ones(len(probs))
        else:
            top = probs.topk(model.experts_per_token + 1).values
            gaps[layer] = (top[:, -2] - top[:, -1]).cpu()

    for layer in built.decoder.layers:
        layer.mlp.register_forward_pre_hook(partial(record, layer.layer_number - 1))
    return gaps
