"""A chunk of the model: Megatron's GPTModel with our layers, forward pass over a packed batch, fp32 head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from m1_data.sampling.loader import PackedBatch
from m1_kernels import HostInputs, linear_cross_entropy
from m1_stages.config import ModelConfig
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.packed_seq_params import PackedSeqParams
from m1_stages.model.spec import block_spec


class HybridModel(GPTModel):
    """``model(batch)`` gives the loss of every token; slopes and RoPE base are set from outside.

    The head computes in fp32. In bf16 its stored weight is bf16 like the others (with an fp32 master in the optimizer): an
    fp32 weight among them trains, but Megatron 0.19.2 cannot save it (``Float16OptimizerWithFloat16Params`` numbers the
    float16 parameters only, ``DistributedOptimizer`` fails on the sizes).
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, chunk: int | None, recompute: bool) -> None:
        """``chunk``: which of this rank's chunks in an interleaved pipeline; None in any other."""
        groups = ProcessGroupCollection.use_mpu_process_groups()
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, config, chunk=chunk, recompute=recompute),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=2**31 - 1,
            pre_process=first,
            post_process=last,
            position_embedding_type="none",
            pg_collection=groups,
            vp_stage=chunk,
        )
        self.model_config = model
        self._groups = groups
        self._host: HostInputs | None = None

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

    def set_recompute(self, recompute: bool, *, offload: bool = False) -> None:
        """Recompute the activations of every layer in the backward pass, or keep them.

        Args:
            offload: with ``recompute``, the layers' inputs are offloaded to host memory.
        """
        self._host = HostInputs() if recompute and offload else None
        for layer in self.decoder.layers:
            layer.set_recompute(recompute, host=self._host)

    def forward(self, batch: PackedBatch, *, logits: bool = False, predict_at: Tensor | None = None) -> Tensor:
        """Return the per-token loss [1, T] fp32 of this rank's tokens, or with ``logits`` [1, T, vocab] fp32.

        All chunks of a pipeline but the last return hidden states.

        Logits of all tokens exist only with ``logits``, which is for verification, not for training. With ``predict_at``, P
        indices into this rank's tokens, [P, 2] fp32: the loss there, and 1 where the label is the likeliest token, else 0.
        """
        if self._host is not None:
            self._host.begin()
        packed_seq_params = PackedSeqParams.of(batch, self._groups.cp)
        packed_seq_params.predict_at = predict_at
        out: Tensor = super().forward(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            labels=None if logits else batch.labels,
            packed_seq_params=packed_seq_params,
        )
        return out

    def _postprocess(
        self, hidden_states: Tensor, *, packed_seq_params: PackedSeqParams, labels: Tensor | None = None, **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        tp = self._groups.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp)
        elif tp.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp)
        hidden, weight = hidden_states.squeeze(1), self.output_layer.weight
        if labels is None:
            return self._logits(hidden)[None]
        if (at := packed_seq_params.predict_at) is not None:
            return self._predictions(hidden[at], labels.view(-1)[at])
        loss = linear_cross_entropy(
            hidden,
            weight,
            labels.view(-1),
            valid_vocab=self.model_config.vocab_size,
            tp_group=tp if tp.size() > 1 else None,
        )
        return loss[None]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[P, hidden] to [P, vocab] fp32, on every tensor-parallel rank."""
        scores = hidden.float() @ self.output_layer.weight.float().T
        if self._groups.tp.size() > 1:
            scores = gather_from_tensor_model_parallel_region(scores, group=self._groups.tp)
        return scores[:, : self.model_config.vocab_size]

    def _predictions(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if not len(labels):
            return hidden.new_zeros(0, 2, dtype=torch.float32)
        scores = self._logits(hidden)
        loss = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        return torch.stack([loss, (scores.argmax(-1) == labels).float()], 1)
