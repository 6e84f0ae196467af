"""The forward pass that continues from states, over the modules and weights of a training model.

It uses the weights of Megatron's modules and not their forward methods: those shard the tokens over the tensor-parallel ranks
(sequence parallelism) and send tokens to their experts, whose numbers only the device knows. Here all ranks of a group hold the
same tokens and add up their shares. So a CUDA graph can hold a decoding step, and the model can be one in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from m1_kernels import (
    apply_rotary,
    causal_attention,
    chunk_attention,
    decode_attention,
    lightning_decode_layer,
    lightning_prefill_layer,
    mix_local_experts,
    route,
)
from m1_stages.errors import ConfigError
from m1_stages.generation.states import SlotStates
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.hybrid import HybridModel
from m1_stages.model.moe import MixtureOfExperts, fp32_product
from m1_stages.model.post_norm import post_norm_layer


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """The next tokens of some prompts, packed one after the other without padding."""

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64 position of each token in its sequence."""
    rows: Tensor
    """[T] int64 row of each token in a cache of slots * capacity rows."""
    slots: Sequence[int]
    """The slot of each prompt."""
    starts: Sequence[int]
    """Tokens of each prompt before these."""
    lengths: Sequence[int]
    """Tokens of each prompt here."""
    carried: Tensor
    """[lightning layers, prompts, heads here, D, D] fp32: states before these tokens; afterwards those behind them."""


class IncrementalModel:
    """Continues sequences with the weights of ``model``, which must be whole on its tensor- and expert-parallel ranks.

    Raises:
        ConfigError: the model is cut into a pipeline, or its key heads into more parts than there are.
    """

    def __init__(self, model: HybridModel) -> None:
        if not (model.pre_process and model.post_process):
            raise ConfigError(
                "generation needs all layers on each rank", where="parallel.pipeline", fix="build the model with 1"
            )
        self.model, self.config = model, model.model_config
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        weight = model.output_layer.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._kinds = [isinstance(layer.self_attention, SoftmaxAttention) for layer in model.decoder.layers]
        self._index = [sum(kind is before for before in self._kinds[:i]) for i, kind in enumerate(self._kinds)]
        self._log_decay: list[Tensor | None] = [None] * len(self._kinds)
        self.refresh()

    @property
    def rope_bases(self) -> tuple[float, ...]:
        """The RoPE base of each softmax layer, a plain number: a captured graph holds its value."""
        layers = (layer.self_attention for layer in self.model.decoder.layers)
        return tuple(module.rope_base for module in layers if isinstance(module, SoftmaxAttention))

    def refresh(self) -> None:
        """Take over the decay rates of the model; call it after they, or all weights, were replaced in place."""
        for number, layer in enumerate(self.model.decoder.layers):
            if isinstance(layer.self_attention, LightningAttention):
                rates, mine = layer.self_attention.log_decay, self._log_decay[number]
                assert rates is not None, "set_slopes was not called"
                if mine is None:
                    self._log_decay[number] = rates.clone()
                else:
                    mine.copy_(rates)  # a captured graph reads this tensor

    @torch.no_grad()
    def prefill(self, chunk: PrefillChunk, states: SlotStates) -> Tensor:
        """Read the chunk's tokens; returns their final hidden states [T, hidden]. The cache is filled, ``carried`` advanced."""
        whole = not any(chunk.starts)

        def lightning(module: LightningAttention, index: int, number: int, x: Tensor) -> tuple[Tensor, None]:
            parts = F.linear(x, module.linear_in.weight).view(-1, module.num_heads, 4, module.head_dim)
            out, chunk.carried[index] = lightning_prefill_layer(
                parts, module.norm.weight, self._rates(number), chunk.carried[index],
                doc_lengths=tuple(chunk.lengths), eps=module.norm.eps, tp_group=self.tp_group,
            )  # fmt: skip
            return self._row_parallel(out, module), None

        def softmax(module: SoftmaxAttention, index: int, number: int, x: Tensor) -> tuple[Tensor, None]:
            q, k, v = self._heads(module, x, chunk.positions)
            keys, values = states.keys[index], states.values[index]
            keys.flatten(0, 1)[chunk.rows], values.flatten(0, 1)[chunk.rows] = k, v
            if whole:
                out = causal_attention(q[None], k[None], v[None], doc_lengths=tuple(chunk.lengths))[0]
            else:
                out = chunk_attention(q, keys, values, slots=chunk.slots, starts=chunk.starts, lengths=chunk.lengths)
            return self._row_parallel(out.flatten(1), module), None

        return self._layers(chunk.tokens, lightning, softmax)

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, active: Tensor, states: SlotStates) -> Tensor:
        """Read one token of every slot; returns final hidden states [slots, hidden]. The states advance by the token.

        On a CUDA device nothing waits for the host.

        Args:
            tokens, positions: [slots] int64.
            active: [slots] bool. The results of other slots mean nothing. Their recurrent states change, their caches do not,
                except for the last row, which no answer reads: prompts are being read into them.
        """
        slot = torch.arange(states.slots, device=self.device)
        rows = torch.where(active, positions, states.capacity - 1)
        lengths = torch.where(active, positions + 1, 1)

        def lightning(module: LightningAttention, index: int, number: int, x: Tensor) -> tuple[Tensor, None]:
            parts = F.linear(x, module.linear_in.weight).view(-1, module.num_heads, 4, module.head_dim)
            out = lightning_decode_layer(
                parts, module.norm.weight, self._rates(number), states.recurrent[index],
                eps=module.norm.eps, tp_group=self.tp_group,
            )  # fmt: skip
            return self._row_parallel(out, module), None

        def softmax(module: SoftmaxAttention, index: int, number: int, x: Tensor) -> tuple[Tensor, None]:
            q, k, v = self._heads(module, x, positions)
            keys, values = states.keys[index], states.values[index]
            keys[slot, rows], values[slot, rows] = k, v
            return self._row_parallel(decode_attention(q, keys, values, lengths).flatten(1), module), None

        return self._layers(tokens, lightning, softmax)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map final hidden states [P, hidden] to logits [P, vocab] fp32, on every tensor-parallel rank."""
        scores = fp32_product(hidden, self.model.output_layer.weight)
        if self.tp_group.size() > 1:
            scores = gather_from_tensor_model_parallel_region(scores, group=self.tp_group)
        return scores[:, : self.config.vocab_size]

    def _layers(self, tokens: Tensor, lightning: Callable[..., Any], softmax: Callable[..., Any]) -> Tensor:
        hidden = self._embed(tokens)
        for number, layer in enumerate(self.model.decoder.layers):
            attend = softmax if self._kinds[number] else lightning
            hidden = post_norm_layer(
                hidden,
                attn_norm=layer.attn_norm,
                attention=partial(attend, layer.self_attention, self._index[number], number),
                mlp_norm=layer.mlp_norm,
                experts=partial(self._experts, layer.mlp),
                alpha=layer.alpha,
                beta=layer.beta,
            )
        out: Tensor = self.model.decoder.final_layernorm(hidden)
        return out

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.model.embedding.word_embeddings
        if self.tp_group.size() == 1:
            return F.embedding(tokens, table.weight)
        here = (tokens >= table.vocab_start_index) & (tokens < table.vocab_end_index)
        rows = F.embedding(torch.where(here, tokens - table.vocab_start_index, 0), table.weight)
        return self._summed(torch.where(here[:, None], rows, 0), self.tp_group)

    def _heads(self, module: SoftmaxAttention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] to rotated q [T, H, D], rotated k and v [T, KV, D]."""
        grouped = F.linear(x, module.linear_qkv.weight).view(-1, module.num_groups, module.group + 2, module.head_dim)
        turned = apply_rotary(
            grouped[:, :, : module.group + 1].flatten(1, 2),
            positions,
            base=module.rope_base,
            rotary_dim=module.rotary_dim,
        ).view(-1, module.num_groups, module.group + 1, module.head_dim)
        return turned[:, :, : module.group].flatten(1, 2), turned[:, :, module.group], grouped[:, :, module.group + 1]

    def _experts(self, module: MixtureOfExperts, x: Tensor) -> tuple[Tensor, None]:
        experts, router = module.experts, module.router
        weights, index = route(fp32_product(x, router.weight), router.top_k)
        first = module.ep_group.rank() * experts.num_local_experts
        out = mix_local_experts(
            x, experts.w13, experts.w2, weights, index, first=first, num_experts=self.config.num_experts
        )
        return self._summed(out, self.expert_group), None

    def _row_parallel(self, x: Tensor, module: LightningAttention | SoftmaxAttention) -> Tensor:
        return self._summed(F.linear(x, module.linear_out.weight), self.tp_group)

    def _summed(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    def _rates(self, number: int) -> Tensor:
        rates = self._log_decay[number]
        assert rates is not None
        return rates
