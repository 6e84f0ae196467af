"""The forward pass that continues from states, over the modules and weights of a training model.

It uses the weights of Megatron's modules and not their forward methods: those shard the tokens over the tensor-parallel ranks
(sequence parallelism) and send tokens to their experts, whose numbers only the device knows. Here all ranks of a group hold the
same tokens and add up their shares. So a CUDA graph can hold a decoding step, and the model can be one in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from m1_kernels import (
    StepInputs,
    causal_attention,
    chunk_attention,
    decode_attention,
    fp32_logits,
    lightning_decode_layer,
    lightning_prefill_layer,
    mix_and_norm,
    norm_and_route,
    rotary_frequencies,
    rotate,
    rotate_into_cache,
)
from m1_stages.errors import ConfigError
from m1_stages.generation.states import SlotStates
from m1_stages.model.attention import LightningAttention, SoftmaxAttention
from m1_stages.model.hybrid import HybridModel
from m1_stages.model.lora import has_adapters


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
        ConfigError: the model is cut into a pipeline, its key heads into more parts than there are, or it has adapters.
    """

    def __init__(self, model: HybridModel) -> None:
        if not (model.pre_process and model.post_process):
            raise ConfigError(
                "generation needs all layers on each rank", where="parallel.pipeline", fix="build the model with 1"
            )
        if has_adapters([model]):
            raise ConfigError(
                "generation reads weights, and this model has adapters beside them",
                fix="merge them (m1_stages.model.lora)",
            )
        self.model, self.config = model, model.model_config
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        weight = model.output_layer.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._kinds = [isinstance(layer.self_attention, SoftmaxAttention) for layer in model.decoder.layers]
        self._index = [sum(kind is before for before in self._kinds[:i]) for i, kind in enumerate(self._kinds)]
        self._rates = [self._rates_of(layer.self_attention) for layer in model.decoder.layers]
        """What each layer's kernels read beside weights: decay rates [heads here], or RoPE frequencies [rotary_dim / 2]; fp32."""

    def refresh(self) -> None:
        """Take over decay rates and RoPE base of the model; call it after they, or all weights, were replaced in place."""
        for mine, layer in zip(self._rates, self.model.decoder.layers, strict=True):
            mine.copy_(self._rates_of(layer.self_attention))  # a captured graph reads this tensor

    def _rates_of(self, module: LightningAttention | SoftmaxAttention) -> Tensor:
        if isinstance(module, SoftmaxAttention):
            return rotary_frequencies(module.rope_base, module.rotary_dim, self.device)
        assert module.log_decay is not None, "set_slopes was not called"
        return module.log_decay.clone()

    @torch.no_grad()
    def prefill(self, chunk: PrefillChunk, states: SlotStates) -> Tensor:
        """Read the chunk's tokens; returns their final hidden states [T, hidden]. The cache is filled, ``carried`` advanced."""
        whole = not any(chunk.starts)

        def lightning(module: LightningAttention, index: int, number: int, x: Tensor) -> Tensor:
            parts = F.linear(x, module.linear_in.weight).view(-1, module.num_heads, 4, module.head_dim)
            out, chunk.carried[index] = lightning_prefill_layer(
                parts, module.norm.weight, self._rates[number], chunk.carried[index],
                doc_lengths=tuple(chunk.lengths), eps=module.norm.eps, tp_group=self.tp_group,
            )  # fmt: skip
            return self._row_parallel(out, module)

        def softmax(module: SoftmaxAttention, index: int, number: int, x: Tensor) -> Tensor:
            grouped = self._heads(module, x)
            turned = rotate(grouped[:, :, :-1].flatten(1, 2), chunk.positions, self._rates[number])
            turned = turned.view(-1, module.num_groups, module.group + 1, module.head_dim)
            q, k, v = turned[:, :, :-1].flatten(1, 2), turned[:, :, -1], grouped[:, :, -1]
            keys, values = states.keys[index], states.values[index]
            keys.flatten(0, 1)[chunk.rows], values.flatten(0, 1)[chunk.rows] = k, v
            if whole:
                out = causal_attention(q[None], k[None], v[None], doc_lengths=tuple(chunk.lengths))[0]
            else:
                out = chunk_attention(q, keys, values, slots=chunk.slots, starts=chunk.starts, lengths=chunk.lengths)
            return self._row_parallel(out.flatten(1), module)

        return self._layers(chunk.tokens, lightning, softmax)

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, step: StepInputs, states: SlotStates) -> Tensor:
        """Read one token of every slot; returns final hidden states [slots, hidden]. The states advance by the token.

        On a CUDA device nothing waits for the host. The results of slots that are not active mean nothing. Their recurrent
        states change, their caches do not, except for the last row, which no answer reads: prompts are being read into them.

        Args:
            tokens, positions: [slots] int64.
            step: of ``begin_step``.
        """

        def lightning(module: LightningAttention, index: int, number: int, x: Tensor) -> Tensor:
            parts = F.linear(x, module.linear_in.weight).view(-1, module.num_heads, 4, module.head_dim)
            out = lightning_decode_layer(
                parts, module.norm.weight, self._rates[number], states.recurrent[index],
                eps=module.norm.eps, tp_group=self.tp_group,
            )  # fmt: skip
            return self._row_parallel(out, module)

        def softmax(module: SoftmaxAttention, index: int, number: int, x: Tensor) -> Tensor:
            keys, values = states.keys[index], states.values[index]
            q = rotate_into_cache(self._heads(module, x), positions, step.rows, self._rates[number], keys, values)
            return self._row_parallel(decode_attention(q, keys, values, step.seen).flatten(1), module)

        return self._layers(tokens, lightning, softmax)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map final hidden states [P, hidden] to logits [P, vocab] fp32, on every tensor-parallel rank."""
        scores = fp32_logits(hidden, self.model.output_layer.weight)
        if self.tp_group.size() > 1:
            scores = gather_from_tensor_model_parallel_region(scores, group=self.tp_group)
        return scores[:, : self.config.vocab_size]

    def _layers(self, tokens: Tensor, lightning: Callable[..., Tensor], softmax: Callable[..., Tensor]) -> Tensor:
        """Compute ``post_norm_layer`` of all layers. The sum at the end of one goes into the norm that comes next, unrounded."""
        layers = list(self.model.decoder.layers)
        x: Tensor = layers[0].attn_norm(self._embed(tokens))
        following = [layer.attn_norm for layer in layers[1:]] + [self.model.decoder.final_layernorm]
        add_up = partial(self._summed, group=self.expert_group) if self.expert_group.size() > 1 else None
        for number, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            attend = softmax if self._kinds[number] else lightning
            attended = attend(layer.self_attention, self._index[number], number, x)
            scales = {"alpha": layer.alpha, "beta": layer.beta}
            norm, router, experts = layer.mlp_norm, layer.mlp.router, layer.mlp.experts
            y, weights, index = norm_and_route(
                x, attended, norm.weight, router.weight, router.top_k, eps=norm.eps, **scales
            )
            x = mix_and_norm(
                y, experts.w13, experts.w2, weights, index, next_norm.weight,
                first=layer.mlp.ep_group.rank() * experts.num_local_experts, num_experts=self.config.num_experts,
                eps=next_norm.eps, add_up=add_up, **scales,
            )  # fmt: skip
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.model.embedding.word_embeddings
        if self.tp_group.size() == 1:
            return F.embedding(tokens, table.weight)
        here = (tokens >= table.vocab_start_index) & (tokens < table.vocab_end_index)
        rows = F.embedding(torch.where(here, tokens - table.vocab_start_index, 0), table.weight)
        return self._summed(torch.where(here[:, None], rows, 0), self.tp_group)

    def _heads(self, module: SoftmaxAttention, x: Tensor) -> Tensor:
        """[T, hidden] to [T, KV, G + 2, D]: of every key head its G queries, the key and the value."""
        return F.linear(x, module.linear_qkv.weight).view(-1, module.num_groups, module.group + 2, module.head_dim)

    def _row_parallel(self, x: Tensor, module: LightningAttention | SoftmaxAttention) -> Tensor:
        return self._summed(F.linear(x, module.linear_out.weight), self.tp_group)

    def _summed(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x
