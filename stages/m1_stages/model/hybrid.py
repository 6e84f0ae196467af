"""The model: Megatron's GPTModel with our layers, forward pass over a packed batch, fp32 head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from m1_data.loader import PackedBatch
from m1_kernels import linear_cross_entropy
from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.init import initialize
from m1_stages.model.packing import Packing
from m1_stages.model.spec import block_spec, transformer_config


def _mark_sharded_weights(module: nn.Module) -> None:
    """Tell the gradient norm which weights are shards.

    Megatron sets these attributes while it initialises weights, which we do ourselves; without them tensor-parallel ranks
    above 0 are left out of the norm, and clipping goes wrong.
    """
    for part in module.modules():
        if isinstance(part, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(part.weight, True, 0, 1)
        elif isinstance(part, RowParallelLinear):
            set_tensor_model_parallel_attributes(part.weight, True, 1, 1)


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """What the routers saw since the last look."""

    aux_loss: float
    """Balance loss, mean over layers and micro-batches, coefficient included."""
    expert_load: list[list[float]]
    """[layer][expert] share of the slots; 1 / E when balanced."""


class HybridModel(GPTModel):
    """``model(batch)`` gives the loss of every token; slopes and RoPE base are set from outside.

    The head computes in fp32. In bf16 its stored weight is bf16 like the others (with an fp32 master in the optimizer): an
    fp32 weight among them trains, but Megatron 0.16.1 cannot save it (``Float16OptimizerWithFloat16Params`` numbers the
    float16 parameters only, ``DistributedOptimizer`` fails on the sizes).
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, *, precision: str, recompute: bool, on_cpu: bool):
        config = transformer_config(model, parallel, bf16=precision == "bf16", on_cpu=on_cpu)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, config, recompute=recompute),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=2**31 - 1,
            pre_process=first,
            post_process=last,
            position_embedding_type="none",
            pg_collection=groups,
        )
        self.model_config = model
        self._groups = groups
        _mark_sharded_weights(self)

    def set_slopes(self, slopes: list[list[float]]) -> None:
        """Set the decay rates, [num_layers][num_heads] tokens^-1; rows of softmax layers are ignored."""
        device = next(self.parameters()).device
        for layer in self.decoder.layers:
            if isinstance(layer.self_attention, LightningAttention):
                layer.self_attention.set_slopes(slopes[layer.layer_number - 1], device)

    def set_rope_base(self, base: float) -> None:
        """Set the RoPE base of every softmax layer."""
        self.rope_base = base
        for layer in self.decoder.layers:
            if isinstance(layer.self_attention, SoftmaxAttention):
                layer.self_attention.rope_base = base

    def set_recompute(self, recompute: bool) -> None:
        """Recompute the activations of every layer in the backward pass, or keep them."""
        for layer in self.decoder.layers:
            layer.set_recompute(recompute)

    def forward(self, batch: PackedBatch, *, logits: bool = False) -> Tensor:
        """Per-token loss [1, T] fp32 of this rank's tokens, or ``logits`` [1, T, vocab] fp32.

        On all but the last pipeline stage: hidden states.

        Logits of all tokens exist only when asked for: meant for verification, not for training.
        """
        out: Tensor = super().forward(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            labels=None if logits else batch.labels,
            packed_seq_params=Packing.of(batch, self._groups.cp),
        )
        return out

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None = None, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        tp = self._groups.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp)
        elif tp.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp)
        hidden, weight = hidden_states.squeeze(1), self.output_layer.weight
        if labels is None:
            scores = hidden.float() @ weight.float().T
            if tp.size() > 1:
                scores = gather_from_tensor_model_parallel_region(scores, group=tp)
            return scores[None, :, : self.model_config.vocab_size]
        loss = linear_cross_entropy(
            hidden,
            weight,
            labels.view(-1),
            valid_vocab=self.model_config.vocab_size,
            tp_group=tp if tp.size() > 1 else None,
        )
        return loss[None]

    @torch.no_grad()
    def routing_stats(self) -> RoutingStats:
        """Read and reset the routers' counters; one reduction over the pipeline and one copy to the host."""
        c = self.model_config
        stats = torch.zeros(c.num_layers, 1 + c.num_experts, dtype=torch.float64, device=next(self.parameters()).device)
        for layer in self.decoder.layers:
            stats[layer.layer_number - 1] = layer.mlp.router.take_stats()
        if self._groups.pp.size() > 1:
            torch.distributed.all_reduce(stats, group=self._groups.pp)
        rows = stats.tolist()
        slots = [max(sum(row[1:]), 1.0) for row in rows]
        return RoutingStats(
            aux_loss=sum(row[0] for row in rows) / len(rows),
            expert_load=[[n / total for n in row[1:]] for row, total in zip(rows, slots, strict=True)],
        )


def build_model(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: str = "fp32",
    rope_base: float,
    recompute: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> list[HybridModel]:
    """Build this rank's part of the model with initial weights that are the same for every parallel layout.

    Args:
        device: ``cpu``, ``cuda``, or ``meta`` (shapes only, no memory, no initial weights).

    Returns:
        A list of one chunk (interleaved pipelines would hold more).
    """
    with torch.device("meta" if device == "meta" else "cpu" if device == "cpu" else torch.device("cuda")):
        built = HybridModel(model, parallel, precision=precision, recompute=recompute, on_cpu=device != "cuda")
    built.set_rope_base(rope_base)
    if device != "meta":
        initialize(built, model, seed=seed)
    return [built]
