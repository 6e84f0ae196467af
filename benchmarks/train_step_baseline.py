"""The baseline of ``train_step.py``: the model as one would write it quickly today, from parts that exist.

fla's ``chunk_simple_gla``, cuDNN attention through SDPA (one call per document; flash where cuDNN refuses), experts through
``grouped_mm`` over sorted tokens, cross-entropy of 4,096 tokens at a time, every layer recomputed in the backward pass, the
rest eager PyTorch. bf16 logits are cast to fp32 after the product: with fp32 operands it would be an order slower. Where fla
cannot run (CPU), ``m1_kernels``' chunked reference stands in, so that the rest can be tested there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes

CE_TOKENS = 4096
TILE_TOKENS = 65_536
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Weights = dict[str, Tensor]


def recompute(function: Callable[..., Any], *args: object) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def lightning(device: str) -> tuple[Attend, str]:
    """The lightning attention of the baseline, ``(q, k, v, log_decay, edges)``, and its name."""
    if device == "cuda":
        from fla.ops.simple_gla import chunk_simple_gla
        from triton.runtime import Autotuner

        for tuner in [x for x in gc.get_objects() if isinstance(x, Autotuner)]:
            # 2 warps never won at D=128, and take minutes to compile.
            tuner.configs = [c for c in tuner.configs if c.num_warps >= 4] or tuner.configs

        def fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor) -> Tensor:
            cu_seqlens = edges if len(edges) > 2 else None
            out: Tensor = chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, cu_seqlens=cu_seqlens)[0]
            return out

        return fla, "fla chunk_simple_gla"
    from m1_kernels import lightning_attention

    def reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor) -> Tensor:
        return lightning_attention(q, k, v, log_decay, cu_seqlens=edges, backend="chunked")[0]

    return reference, "m1_kernels' chunked reference IN PLACE OF fla (no CUDA)"


def softmax_backends(device: str, dtype: torch.dtype, model: ModelConfig) -> tuple[list[SDPBackend], str]:
    """cuDNN first if a trial forward and backward run, and its name."""
    if device != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], "SDPA's CPU kernels IN PLACE OF cuDNN (no CUDA)"
    q = torch.randn(1, model.num_heads, 4096, model.head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except RuntimeError as error:
        return [SDPBackend.FLASH_ATTENTION], f"flash, because cuDNN refused: {str(error).splitlines()[0]}"
    return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], "cuDNN (flash for documents that cuDNN refuses)"


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [M, K] sorted by expert, times weight [E, N, K] transposed."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    lengths = [b - a for a, b in pairwise([0, *ends.tolist()])]
    return torch.cat([part @ w.T for part, w in zip(rows.split(lengths), weight, strict=True)])


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class Lightning(nn.Module):
    """Projection rows: q, k, v, gate, each (head, D)."""

    log_decay: Tensor

    def __init__(self, c: ModelConfig, attend: Attend) -> None:
        super().__init__()
        width = c.num_heads * c.head_dim
        self.heads, self.eps, self.attend = c.num_heads, c.lightning_norm_eps, attend
        self.project, self.out = Linear(c.hidden_size, 4 * width), Linear(width, c.hidden_size)
        self.norm = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, batch: PackedBatch, edges: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v, gate = self.project(x).chunk(4, -1)
        q, k, v = (F.silu(y).view(1, len(x), self.heads, -1) for y in (q, k, v))
        y = self.attend(q, k, v, self.log_decay, edges).reshape(len(x), -1)
        return self.out(F.rms_norm(y, y.shape[-1:], self.norm, self.eps) * torch.sigmoid(gate))


class Softmax(nn.Module):
    """Projection rows: q, k, v, each (head, D)."""

    def __init__(self, c: ModelConfig, backends: list[SDPBackend]) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, self.backends = c.num_heads, c.num_kv_heads, c.head_dim, backends
        self.project = Linear(c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        self.out = Linear(c.num_heads * c.head_dim, c.hidden_size)

    def forward(self, x: Tensor, batch: PackedBatch, edges: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.project(x).view(len(x), -1, self.dim)
        q, k, v = heads.split([self.heads, self.kv, self.kv], 1)
        q, k = (rotate(y, *rotation) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv, 1) for y in (k, v))
        outs = []
        with sdpa_kernel(self.backends, set_priority=True):
            for part in zip(*(y.split(batch.doc_lengths) for y in (q, k, v)), strict=True):
                q1, k1, v1 = (y.transpose(0, 1)[None] for y in part)
                outs.append(F.scaled_dot_product_attention(q1, k1, v1, is_causal=True)[0].transpose(0, 1))
        return self.out((torch.cat(outs) if len(outs) > 1 else outs[0]).reshape(len(x), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos and sin [T, 1, rotated / 2] in x's dtype."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class Experts(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.k, self.num, self.aux_coef, self.tiled = c.experts_per_token, c.num_experts, c.aux_loss_coef, False
        self.tile_tokens = TILE_TOKENS
        self.router = Linear(c.hidden_size, c.num_experts)
        self.w13 = nn.Parameter(torch.empty(c.num_experts, 2 * c.expert_hidden_size, c.hidden_size))
        self.w2 = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.expert_hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = torch.softmax(self.router(x).float(), -1)
        weights, index = probs.topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        slots = torch.zeros_like(probs).scatter_(1, index, 1.0).mean(0)
        aux = self.aux_coef * self.num * (slots @ probs.mean(0))
        if not self.tiled:
            return self.mix(x, weights, index), aux
        tiles = zip(*(y.split(self.tile_tokens) for y in (x, weights, index)), strict=True)
        return torch.cat([recompute(self.mix, *tile) for tile in tiles]), aux

    def mix(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        by_expert, slot = torch.sort(index.flatten(), stable=True)
        experts = torch.arange(self.num, device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        token = slot // self.k
        gate, up = product(x.index_select(0, token), self.w13, ends).chunk(2, -1)
        rows = product(F.silu(gate) * up, self.w2, ends) * weights.flatten()[slot][:, None]
        return torch.zeros_like(x).index_add_(0, token, rows)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        self.alpha, self.eps, self.attention, self.experts = c.residual_alpha, c.norm_eps, attention, Experts(c)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(c.hidden_size)) for _ in range(2))

    def forward(self, x: Tensor, *where: object) -> tuple[Tensor, Tensor]:
        x = F.rms_norm(x, x.shape[-1:], self.norm1, self.eps)
        x = F.rms_norm(self.alpha * x + self.attention(x, *where), x.shape[-1:], self.norm2, self.eps)
        y, aux = self.experts(x)
        return self.alpha * x + y, aux


class Baseline(nn.Module):
    """``model(batch)``: loss of every token [T] fp32, and the balance loss (sum over layers)."""

    def __init__(self, c: ModelConfig, attend: Attend, backends: list[SDPBackend]) -> None:
        super().__init__()
        assert c.beta == 1.0, "the baseline has no beta"
        self.config, self.rope_base = c, 0.0
        self.embed = nn.Parameter(torch.empty(c.padded_vocab_size, c.hidden_size))
        kinds = [c.is_softmax(n) for n in range(c.num_layers)]
        self.layers: Any = nn.ModuleList(Layer(c, Softmax(c, backends) if s else Lightning(c, attend)) for s in kinds)
        self.norm = nn.Parameter(torch.ones(c.hidden_size))
        self.head = nn.Parameter(torch.empty(c.padded_vocab_size, c.hidden_size))

    def prepare(self, slopes: Slopes, rope_base: float, *, tiled: bool) -> None:
        """What changes from case to case."""
        self.rope_base = rope_base
        for layer, rates in zip(self.layers, slopes, strict=True):
            layer.attention.log_decay = -torch.tensor(rates, dtype=torch.float32, device=self.embed.device)
            layer.experts.tiled = tiled

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        x = F.embedding(batch.tokens[0], self.embed)
        exponents = torch.arange(0, self.config.rotary_dim, 2, device=x.device, dtype=torch.float32)
        angles = batch.position_ids[0].float()[:, None, None] * self.rope_base ** -(exponents / self.config.rotary_dim)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        edges, aux = batch.cu_seqlens.long(), torch.zeros((), device=x.device)
        for layer in self.layers:
            x, part = recompute(layer, x, batch, edges, rotation)
            aux = aux + part
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.config.norm_eps)
        parts = zip(x.split(CE_TOKENS), batch.labels[0].split(CE_TOKENS), strict=True)
        loss = torch.cat([recompute(self.cross_entropy, *part) for part in parts])
        return loss, aux

    def cross_entropy(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, self.head[: self.config.vocab_size]).float()
        return F.cross_entropy(logits, labels, reduction="none")


def from_ours(weights: Weights, c: ModelConfig) -> Weights:
    """The baseline's parameters from ours, by name; only the rows of the attention projections lie in another order."""
    d, h = c.head_dim, c.hidden_size
    group = c.num_heads // c.num_kv_heads
    result = {
        "embed": weights["embedding.word_embeddings.weight"],
        "norm": weights["decoder.final_layernorm.weight"],
        "head": weights["output_layer.weight"],
    }
    same: Sequence[tuple[str, str]] = (
        ("norm1", "attn_norm.weight"),
        ("norm2", "mlp_norm.weight"),
        ("attention.out.weight", "self_attention.linear_out.weight"),
        ("experts.router.weight", "mlp.router.weight"),
        ("experts.w2", "mlp.experts.w2"),
    )
    for n in range(c.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"layers.{n}."
        result |= {theirs + new: weights[ours + old] for new, old in same}
        result[theirs + "experts.w13"] = weights[ours + "mlp.experts.w13"].flatten(1, 2)
        if c.is_softmax(n):
            grouped = weights[ours + "self_attention.linear_qkv.weight"].view(c.num_kv_heads, group + 2, d, h)
            rows = torch.cat([part.reshape(-1, h) for part in grouped.split([group, 1, 1], 1)])
        else:
            parts = weights[ours + "self_attention.linear_in.weight"].view(c.num_heads, 4, d, h)
            rows = parts.transpose(0, 1).reshape(-1, h)
            result[theirs + "attention.norm"] = weights[ours + "self_attention.norm.weight"]
        result[theirs + "attention.project.weight"] = rows
    return result
