"""What ``train_step.py`` compares, and on what: whole trainers, from weights to updated master weights, and rows of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from train_step_baseline import Baseline, Weights, from_ours, lightning, softmax_backends

from m1_data.sampling.loader import PackedBatch, PackedDataset, Segment, collate
from m1_stages.config import STAGE_NAMES, Config, ModelConfig, OptimConfig, Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology
from m1_stages.training.recompute_choice import choose_recompute

if TYPE_CHECKING:
    from m1_stages.model import ModelChunks  # it imports Megatron-Core, and the device is chosen first
    from m1_stages.training.step import StepResult

LR = 1e-4
SIGMA, SEED = 1.4, 1234


def flops(model: ModelConfig, lengths: Sequence[int]) -> float:
    """Of one training step, as the docstring of ``train_step.py`` derives them."""
    h, d, tokens = model.hidden_size, model.head_dim, sum(lengths)
    width, softmax = model.num_heads * d, sum(model.is_softmax(n) for n in range(model.num_layers))
    linear = model.num_layers - softmax
    matrices = linear * 5 * h * width + softmax * 2 * h * (width + model.num_kv_heads * d) + model.vocab_size * h
    matrices += model.num_layers * h * (model.num_experts + model.experts_per_token * 3 * model.expert_hidden_size)
    squares = sum(float(n) ** 2 for n in lengths)
    return 6.0 * tokens * matrices + softmax * 6.0 * width * squares + linear * 12.0 * tokens * width * d


def median_length(tokens: int) -> int:
    return max(1, min(2048, tokens // 8))


def random_row(kind: str, tokens: int, vocab: int, number: int) -> PackedBatch:
    """Row ``number``, the same for every peer and machine."""
    rng = np.random.default_rng((SEED, tokens, number))
    lengths = [tokens]
    if kind == "packed":
        drawn = (median_length(tokens) * np.exp(SIGMA * rng.standard_normal(tokens))).clip(16, tokens // 2).astype(int)
        ends = drawn.cumsum()
        lengths = drawn[: np.searchsorted(ends, tokens)].tolist()
        lengths.append(tokens - sum(lengths))
    return collate([[_random_segment(rng, n, vocab) for n in lengths]], [number], seq_len=tokens, pad_id=0)


def _random_segment(rng: np.random.Generator, length: int, vocab: int) -> Segment:
    ids = rng.integers(0, vocab, length + 1)
    trained = np.ones(length, dtype=bool)
    trained[-1] = False
    return Segment(ids[:-1], np.where(trained, ids[1:], 0), trained)


def row_source(
    data: str | None, resolved: Resolved, plan: StagePlan, kind: str, tokens: int, count: int
) -> Callable[[int], PackedBatch]:
    """Row by number, ``count`` of them."""
    config = resolved.config
    if kind == "one-document" or data is None:
        return lambda number: random_row(kind, tokens, config.model.vocab_size, number)
    now, before = (
        dataclasses.replace(config.mix(stage), seq_len_tokens=tokens) if stage else None
        for stage in (plan.stage, plan.starts_from)
    )
    assert now is not None
    rows = PackedDataset(Path(data), now, before, seed=config.run.seed, seq_len=tokens, num_rows=count)
    return lambda number: rows.batch([number])


def plan_for(resolved: Resolved, tokens: int, stage: str | None) -> StagePlan:
    """Of ``stage``, or of the one whose rows are nearest in length: decay rates and RoPE base."""
    nearest = min(STAGE_NAMES, key=lambda s: abs(math.log(resolved.config.seq_len(s) / tokens)))
    return plan_stage(resolved, stage or nearest)


@dataclass(frozen=True)
class Setting:
    """What all peers share."""

    config: Config
    device: torch.device
    bf16: bool
    topology: Topology
    device_kind: Device
    tiled_from: int
    """Tokens from which the baseline's experts run in tiles."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


class Peer(Protocol):
    """``restart`` with the initial weights for a case, then ``step`` as often as wanted."""

    notes: str
    recomputes: bool
    """Activations, in the present case."""

    def parameters(self) -> int: ...
    def restart(self, plan: StagePlan, tokens: int) -> None: ...
    def losses(self, batch: PackedBatch) -> Tensor: ...
    def step(self, batch: PackedBatch) -> tuple[float, float]: ...


def build_chunks(setting: Setting, rope_base: float) -> tuple[ModelChunks, Weights]:
    """Our model and a copy of its initial weights on the host, by our names."""
    from m1_stages.hf.tensor_names import our_shapes
    from m1_stages.model import build_model

    chunks = build_model(
        setting.config.model,
        parallel=setting.config.parallel,
        precision="bf16" if setting.bf16 else "fp32",
        rope_base=rope_base,
        device=setting.device.type,
        seed=setting.config.run.seed,
    )
    state, shapes = chunks[0].state_dict(), our_shapes(setting.config.model)
    return chunks, {name: state[name].detach().cpu().clone().view(shape) for name, shape in shapes.items()}


@torch.no_grad()
def strengthen(module: nn.Module, c: ModelConfig) -> None:
    """Matrices times the power of two that gives a product's outputs the size of its inputs, as in a trained model.

    From the first weights the residual stream is hardly more than the embedding, whatever the layers compute. ``restart``
    restores them.
    """
    factor = 2.0 ** round(math.log2(1.28 / (c.init_std * c.hidden_size**0.5)))
    for param in module.parameters():
        if param.dim() > 1:
            param.mul_(factor)


class Ours:
    """The product's path: Megatron's DDP and optimizer, ``train_step``, ``apply``, as ``training/loop.py`` runs them."""

    def __init__(self, setting: Setting, chunks: ModelChunks, weights: Weights) -> None:
        from m1_stages.runtime.ddp import TrainableModel
        from m1_stages.runtime.optimizer import Optimizer

        parallel = setting.config.parallel
        self.setting = setting
        self.notes = f"run.recompute = {setting.config.run.recompute}"
        self.recomputes = False
        self.model, self.routers, self.weights = chunks[0], chunks, weights
        self.trainable = TrainableModel(chunks, parallel)
        self.optimizer = Optimizer(
            self.trainable, setting.config.optim, bf16=setting.bf16, distributed=parallel.distributed_optimizer
        )
        self.plan: StagePlan | None = None

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def restart(self, plan: StagePlan, tokens: int) -> None:
        self.plan = plan
        self.model.set_rope_base(plan.rope_base)
        self.model.set_slopes(plan.slopes_at(1.0))
        case = dataclasses.replace(
            plan, seq_len=tokens, micro_batch_rows=1, global_batch_rows=self.setting.topology.dp_size
        )
        decision = choose_recompute(self.setting.config, case, self.setting.topology, self.setting.device_kind)
        print(f"ours, {tokens:,} tokens: activations {decision}", flush=True)
        self.recomputes = decision.activations.recompute
        self.model.set_recompute(self.recomputes, offload=decision.activations.offload)
        state = self.model.state_dict()
        for name, tensor in self.weights.items():
            state[name].copy_(tensor.view(state[name].shape))
        self.optimizer.megatron.reload_model_params()
        for part in self.optimizer.parts:
            forget(part.optimizer)

    @torch.no_grad()
    def losses(self, batch: PackedBatch) -> Tensor:
        out: Tensor = self.model(batch)
        return out[0]

    def measured(self, batch: PackedBatch) -> StepResult:
        """A step that is not applied yet."""
        from m1_stages.training.objective import NextTokenCrossEntropy
        from m1_stages.training.step import train_step

        assert self.plan is not None
        self.model.set_slopes(self.plan.slopes_at(1.0))
        self.optimizer.set_learning_rate(LR)
        return train_step(self.trainable, self.optimizer, [batch], NextTokenCrossEntropy())

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        result = self.measured(batch)
        if not result.finite:
            raise RuntimeError(f"loss {result.loss}, gradient norm {result.grad_norm}")
        result.apply(max_norm=self.setting.config.optim.grad_clip)
        return result.loss, result.grad_norm


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments and step counters."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


class MasterAdamW:
    """fp32 copies of the parameters, torch's fused AdamW on them, clipping; matrices only have weight decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], optim: OptimConfig) -> None:
        self.params: list[Tensor] = list(parameters)
        self.clip = optim.grad_clip
        self.master: list[Tensor] = [p.detach().float().clone().requires_grad_() for p in self.params]
        groups = [
            {"params": [m for m in self.master if m.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [m for m in self.master if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def step(self) -> float:
        """Update from the gradients at the parameters, which it frees; the gradient norm."""
        for param, master in zip(self.params, self.master, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        norm = nn.utils.clip_grad_norm_(self.master, self.clip, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.master)
        return float(norm)

    @torch.no_grad()
    def reload(self) -> None:
        """Start anew from the parameters."""
        torch._foreach_copy_(self.master, self.params)
        self.adam.zero_grad()
        for param in self.params:
            param.grad = None
        forget(self.adam)


class BaselinePeer:
    recomputes = True

    def __init__(self, setting: Setting, weights: Weights) -> None:
        model = setting.config.model
        attend, attend_name = lightning(setting.device.type)
        backends, softmax_name = softmax_backends(setting.device.type, setting.dtype, model)
        self.notes = (
            f"lightning: {attend_name}; softmax: {softmax_name}; experts in tiles from {setting.tiled_from:,} tokens"
        )
        with torch.device(setting.device):
            self.model = Baseline(model, attend, backends).to(setting.dtype)
        self.weights, self.tiled_from = from_ours(weights, model), setting.tiled_from
        self.model.load_state_dict(self.weights)
        self.optimizer = MasterAdamW(self.model.parameters(), setting.config.optim)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def restart(self, plan: StagePlan, tokens: int) -> None:
        self.model.prepare(plan.slopes_at(1.0), plan.rope_base, tiled=tokens >= self.tiled_from)
        self.model.load_state_dict(self.weights)
        self.optimizer.reload()

    @torch.no_grad()
    def losses(self, batch: PackedBatch) -> Tensor:
        loss: Tensor = self.model(batch)[0]
        return loss

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        losses, aux = self.model(batch)
        loss = (losses * batch.loss_mask[0]).sum() / batch.trained_tokens
        (loss + aux).backward()
        return float(loss.detach()), self.optimizer.step()


class TransformersPeer:
    """``MiniMaxForCausalLM`` with its own random weights: same shape, other numbers, so no losses are compared."""

    recomputes = True

    def __init__(self, setting: Setting) -> None:
        from transformers import MiniMaxConfig, MiniMaxForCausalLM, __version__

        c = setting.config.model
        alpha = c.residual_alpha
        config = MiniMaxConfig(
            vocab_size=c.padded_vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
            intermediate_size=c.expert_hidden_size, num_local_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token, rms_norm_eps=c.norm_eps, block_size=256, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            layer_types=["full_attention" if c.is_softmax(n) else "linear_attention" for n in range(c.num_layers)],
            full_attn_alpha_factor=alpha, linear_attn_alpha_factor=alpha, mlp_alpha_factor=alpha,
            tie_word_embeddings=False, attn_implementation="sdpa", pad_token_id=None,
        )  # fmt: skip
        with torch.device(setting.device):
            self.model = MiniMaxForCausalLM(config).to(setting.dtype).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = MasterAdamW(self.model.parameters(), setting.config.optim)
        experts = getattr(self.model.config, "_experts_implementation", "unknown")
        self.notes = f"transformers {__version__}, sdpa, gradient checkpointing, experts: {experts}, no balance loss"

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def restart(self, plan: StagePlan, tokens: int) -> None:
        self.optimizer.reload()

    def losses(self, batch: PackedBatch) -> Tensor:
        raise NotImplementedError

    def step(self, batch: PackedBatch) -> tuple[float, float]:
        loss = self.model(input_ids=batch.tokens, labels=batch.tokens).loss
        loss.backward()
        return float(loss.detach()), self.optimizer.step()
