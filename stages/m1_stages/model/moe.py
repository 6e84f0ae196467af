"""Top-k router and grouped SwiGLU experts for Megatron's MoE layer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router as MegatronRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m1_kernels import fp32_logits, grouped_experts, mix_experts, recomputing


class Router(MegatronRouter):
    """fp32 softmax over all experts, top-k, renormalised; with a load-balancing loss over all ranks' tokens.

    The loss has transformers' scale: ``coef * E * sum_i f_i P_i`` with ``f_i`` the slots of expert i per token (all k
    slots) and ``P_i`` its mean probability: ``k * coef`` when balanced. ``f`` and ``P`` are taken over the tokens that all
    data-parallel (and sequence-parallel) ranks process together, so the loss does not depend on how they are spread. Each
    rank attaches its own tokens' share, times the trained tokens of the micro-batch, because gradients are divided by the
    trained tokens of the global batch later.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        assert pg_collection is not None
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.top_k = config.moe_router_topk
        self.adapter: nn.Module | None = None
        self.trained_tokens = 0
        """Trained tokens of the current micro-batch on this data-parallel rank; the layer sets them."""
        self.tokens_per_expert: Tensor | None = None
        """Slots per expert since the last ``take_stats``, over all ranks."""
        self.aux_loss: Tensor | None = None
        self.micro_batches = 0

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map [tokens, hidden] to combine weights [tokens, k] fp32 and their experts [tokens, k] int64."""
        logits = fp32_product(hidden, self.weight)
        if self.adapter is not None:
            logits = logits + self.adapter(hidden).float()
        probs = torch.softmax(logits, dim=-1)
        top, index = probs.topk(self.top_k, dim=-1)
        weights = top / top.sum(-1, keepdim=True)
        if torch.is_grad_enabled() and self.training:
            weights = MoEAuxLossAutoScaler.apply(weights, self._balance_loss(probs, index))
        return weights, index

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Megatron's hook; ``forward`` does not use it."""
        raise NotImplementedError

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map [tokens, 1, hidden] to the combine weights and boolean map, [tokens, E], that Megatron's dispatchers take."""
        weights, index = self.choose(input.view(-1, input.shape[-1]))
        nowhere = weights.new_zeros(weights.shape[0], self.num_experts)
        return nowhere.scatter(1, index, weights), nowhere.bool().scatter(1, index, True)

    def _balance_loss(self, probs: Tensor, index: Tensor) -> Tensor:
        group = self.tp_dp_cp_group
        chosen = torch.zeros_like(probs).scatter_(1, index, 1.0)
        local = torch.cat(
            [
                chosen.sum(0, dtype=torch.float64),
                probs.detach().sum(0, dtype=torch.float64),
                # Filled on the device: a copy from the host would wait for all that is queued, in every layer.
                probs.new_full((1,), probs.shape[0], dtype=torch.float64),
                probs.new_full((1,), self.trained_tokens / self.tp_group.size(), dtype=torch.float64),
            ]
        )
        if group.size() > 1:
            torch.distributed.all_reduce(local, group=group)
        slots, prob_sums, (tokens, trained) = local.split([self.num_experts, self.num_experts, 2])
        scale = self.config.moe_aux_loss_coeff * self.num_experts
        if not recomputing():
            self._record(slots, scale * (slots * prob_sums).sum() / tokens**2)
        share = (slots / tokens).float() @ probs.sum(0) / tokens.float()
        loss: Tensor = scale * share * trained.float()
        return loss

    def _record(self, slots: Tensor, loss: Tensor) -> None:
        self.tokens_per_expert = slots if self.tokens_per_expert is None else self.tokens_per_expert + slots
        self.aux_loss = loss if self.aux_loss is None else self.aux_loss + loss
        self.micro_batches += 1

    def take_stats(self) -> Tensor:
        """Return and reset [1 + E] fp64: mean balance loss and slots per expert since the last call."""
        if self.tokens_per_expert is None or self.aux_loss is None:
            return torch.zeros(1 + self.num_experts, dtype=torch.float64, device=self.weight.device)
        stats = torch.cat([self.aux_loss[None] / self.micro_batches, self.tokens_per_expert])
        self.tokens_per_expert, self.aux_loss, self.micro_batches = None, None, 0
        return stats


class MixtureOfExperts(MoELayer):
    """Megatron's MoE layer; where every expert is on this rank, tokens are not dispatched at all."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        parts = MoESubmodules(router=Router, experts=GroupedExperts)
        super().__init__(config, parts, pg_collection=pg_collection, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map [tokens, 1, hidden] to [tokens, 1, hidden]."""
        if self.ep_group.size() > 1 or self.config.expert_tensor_parallel_size > 1:
            out = super().forward(hidden_states, *args, **kwargs)[0]
            _forget_graph(self.token_dispatcher)
            return out, None
        x, e = hidden_states.view(-1, hidden_states.shape[-1]), self.experts
        out = mix_experts(x, e.w13, e.w2, *self.router.choose(x), keep=e.keep)
        return out.view(hidden_states.shape), None


def _forget_graph(dispatcher: Any) -> None:
    """Drop what Megatron's dispatcher keeps of a forward pass as attributes: through them the graph of the last micro-batch,
    and with it the model and its process groups, would never be freed."""
    for name, value in list(vars(dispatcher).items()):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            setattr(dispatcher, name, None)


def fp32_product(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x @ w.T`` [T, E] in fp32, of x [T, h] and w [E, h] in any dtype."""
    product: Tensor = _Fp32Product.apply(x, w)
    return product


class _Fp32Product(torch.autograd.Function):
    """``x @ w.T`` in fp32, [T, h] and [E, h]; keeps x as it is, not an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return fp32_logits(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, w = ctx.saved_tensors
        d_w = (grads[0].T @ x.float()).to(w.dtype) if ctx.needs_input_grad[1] else None
        return (grads[0] @ w.float()).to(x.dtype), d_w


class GroupedExperts(nn.Module):
    """This rank's SwiGLU experts: ``w2(silu(w1 x) * w3 x)`` for tokens sorted by expert.

    ``w13`` [experts, 2 (w1, w3), inner, hidden] and ``w2`` [experts, hidden, inner]; the inner width is sharded over the
    expert-tensor-parallel ranks.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.keep = True
        """Whether gate and up are kept for the backward; off when the layer is recomputed."""
        self.config, self.num_local_experts, self.pg = config, num_local_experts, pg_collection
        inner = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        dtype, device = config.params_dtype, _device(config)
        self.w13 = nn.Parameter(
            torch.empty(num_local_experts, 2, inner, config.hidden_size, dtype=dtype, device=device)
        )
        self.w2 = nn.Parameter(torch.empty(num_local_experts, config.hidden_size, inner, dtype=dtype, device=device))
        for param in (self.w13, self.w2):
            # Without allreduce=False Megatron reduces expert gradients over the dense groups when EP is 1 and ETP != TP;
            # without tensor_model_parallel ranks above 0 drop out of the gradient norm.
            param.allreduce = False  # type: ignore[attr-defined]
            param.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Map tokens [M, hidden] sorted by local expert, counts [experts] and combine weights [M] to [M, hidden]."""
        return grouped_experts(tokens, tokens_per_expert, probs, self.w13, self.w2, keep=self.keep), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Sharded over experts (axis 0) and, inside experts, over the inner width."""
        ep, etp, edp = self.pg.ep, self.pg.expt_tp, self.pg.expt_dp
        prepend = len(sharded_offsets)

        def sharded(name: str, param: Tensor, inner_axis: int) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                param,
                *sharded_offsets,
                (prepend, ep.rank(), ep.size()),
                (prepend + inner_axis, etp.rank(), etp.size()),
                replica_id=(0, 0, edp.rank()),
                prepend_axis_num=prepend,
            )

        return {f"{prefix}w13": sharded("w13", self.w13, 2), f"{prefix}w2": sharded("w2", self.w2, 2)}


def _device(config: TransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
