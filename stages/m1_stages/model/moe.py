"""Top-k router and grouped SwiGLU experts for Megatron's MoE layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router as MegatronRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Router(MegatronRouter):
    """fp32 softmax over all experts, top-k, renormalised; with a load-balancing loss over all ranks' tokens.

    The loss has transformers' scale: ``coef * E * sum_i f_i P_i`` with ``f_i`` the slots of expert i per token (all k
    slots) and ``P_i`` its mean probability: ``k * coef`` when balanced. ``f`` and ``P`` are taken over the tokens that all
    data-parallel (and sequence-parallel) ranks process together, so the loss does not depend on how they are spread. Each
    rank attaches its own tokens' share, times the trained tokens of the micro-batch, because gradients are divided by the
    trained tokens of the global batch later.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        assert pg_collection is not None
        super().__init__(config=config, pg_collection=pg_collection)
        self.top_k = config.moe_router_topk
        self.trained_tokens = 0
        """Of the current micro-batch on this data-parallel rank; set by the layer."""
        self.tokens_per_expert: Tensor | None = None
        """Slots per expert since the last ``take_stats``, over all ranks."""
        self.aux_loss: Tensor | None = None
        self.micro_batches = 0

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, E] fp32 logits to probabilities and boolean map, both [tokens, E]."""
        probs = torch.softmax(logits, dim=-1)
        top, index = probs.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(probs).scatter(1, index, top / top.sum(-1, keepdim=True))
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, True)
        if torch.is_grad_enabled() and self.training:
            weights = MoEAuxLossAutoScaler.apply(weights, self._balance_loss(probs, chosen))
        return weights, chosen

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[tokens, 1, hidden] to combine weights and routing map [tokens, E]."""
        logits = input.float() @ self.weight.float().T
        return self.routing(logits.view(-1, self.num_experts))

    def _balance_loss(self, probs: Tensor, chosen: Tensor) -> Tensor:
        group = self.tp_dp_cp_group
        local = torch.cat(
            [
                chosen.sum(0).double(),
                probs.detach().double().sum(0),
                probs.new_tensor([probs.shape[0], self.trained_tokens / self.tp_group.size()], dtype=torch.float64),
            ]
        )
        if group.size() > 1:
            torch.distributed.all_reduce(local, group=group)
        slots, prob_sums, (tokens, trained) = local.split([self.num_experts, self.num_experts, 2])
        scale = self.config.moe_aux_loss_coeff * self.num_experts
        self._record(slots, scale * (slots * prob_sums).sum() / tokens**2)
        share = (slots / tokens).float() @ probs.sum(0) / tokens.float()
        loss: Tensor = scale * share * trained.float()
        return loss

    def _record(self, slots: Tensor, loss: Tensor) -> None:
        self.tokens_per_expert = slots if self.tokens_per_expert is None else self.tokens_per_expert + slots
        self.aux_loss = loss if self.aux_loss is None else self.aux_loss + loss
        self.micro_batches += 1

    def take_stats(self) -> Tensor:
        """[1 + E] fp64: mean balance loss and slots per expert since the last call; starts anew."""
        if self.tokens_per_expert is None or self.aux_loss is None:
            return torch.zeros(1 + self.num_experts, dtype=torch.float64, device=self.weight.device)
        stats = torch.cat([self.aux_loss[None] / self.micro_batches, self.tokens_per_expert])
        self.tokens_per_expert, self.aux_loss, self.micro_batches = None, None, 0
        return stats


class GroupedExperts(nn.Module):
    """This rank's SwiGLU experts: ``w2(silu(w1 x) * w3 x)`` for tokens sorted by expert.

    ``w13`` [experts, 2 (w1, w3), inner, hidden] and ``w2`` [experts, hidden, inner]; the inner width is sharded over the
    expert-tensor-parallel ranks.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__()
        assert pg_collection is not None
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
        """tokens [M, hidden] sorted by local expert, counts [experts], combine weights [M]; returns [M, hidden]."""
        if tokens.device.type == "cuda" and tokens.dtype == torch.bfloat16:
            ends = tokens_per_expert.cumsum(0).to(device=tokens.device, dtype=torch.int32)
            gate_up = F.grouped_mm(tokens, self.w13.flatten(1, 2).transpose(1, 2), offs=ends)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = F.silu(gate) * up * probs[:, None].to(tokens.dtype)
            return F.grouped_mm(inner, self.w2.transpose(1, 2), offs=ends), None
        parts = tokens.split(tokens_per_expert.tolist())
        weights = probs.split(tokens_per_expert.tolist())
        out = [
            F.linear(F.silu(F.linear(x, w13[0])) * F.linear(x, w13[1]) * p[:, None].to(x.dtype), w2)
            for x, p, w13, w2 in zip(parts, weights, self.w13, self.w2, strict=True)
        ]
        return torch.cat(out), None

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
