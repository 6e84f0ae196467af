"""A forward pass over a folder in the released dialect: plain PyTorch in float64, one layer in memory at a time.

The released modeling code does not run in transformers 5, and vLLM dropped the model. This pass reads ``config.json`` and the
weights as they do, and knows nothing of our names, our model or Megatron-Core. Formulas: MiniMax-M1 ``modeling_minimax_m1.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1_stages.errors import CheckpointError
from m1_stages.hf.safetensors_writer import INDEX

LIGHTNING_EPS = 1e-6
"""Epsilon of the lightning output norm, which the released code does not read from the configuration."""

Weights = Callable[[str], Tensor]
"""Reads a tensor of a layer by the rest of its name."""


def released_logits(folder: Path, tokens: Tensor, device: str = "cpu") -> Tensor:
    """Compute [B, T, vocab] float32 logits of B separate texts, rounded from float64, on the CPU.

    Args:
        tokens: [B, T] int64.
        device: where the products are computed, ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: the configuration is not one that this pass computes, or a tensor is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        weights = _Weights(folder, torch.device(device))
        with torch.inference_mode():
            return torch.stack([row.float() for row in _forward(config, weights, tokens)])
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"the export cannot be computed: {error!r}", where=str(folder)) from error


def _forward(config: dict[str, Any], weights: _Weights, tokens: Tensor) -> list[Tensor]:
    if not config["postnorm"] or config["hidden_act"] != "silu" or config["shared_intermediate_size"]:
        raise ValueError("only postnorm models with SwiGLU experts and none that all tokens share are computed")
    eps, layers = config["rms_norm_eps"], config["num_hidden_layers"]
    embedding = weights.get("model.embed_tokens.weight", as_stored=True)
    states = [embedding[row].to(weights.device).double() for row in tokens]
    for layer in range(layers):
        read = weights.of_layer(layer)
        kind = "full_attention" if config["attn_type_list"][layer] else "linear_attention"
        attend = _softmax_attention if config["attn_type_list"][layer] else _lightning_attention
        alpha, beta = (config[f"layernorm_{kind}_{name}"] for name in ("alpha", "beta"))
        before, after = read("input_layernorm.weight"), read("post_attention_layernorm.weight")
        normed = [_norm(x, before, eps) for x in states]
        mixed = attend(config, layer, read, normed)
        normed = [_norm(alpha * x + beta * y, after, eps) for x, y in zip(normed, mixed, strict=True)]
        alpha, beta = config["layernorm_mlp_alpha"], config["layernorm_mlp_beta"]
        lengths = [len(x) for x in normed]
        joined = torch.cat(normed)
        states = list((alpha * joined + beta * _experts(config, read, joined)).split(lengths))
    norm, head = weights.get("model.norm.weight"), weights.get("lm_head.weight")
    return [(_norm(x, norm, eps) @ head.T).cpu() for x in states]


def _lightning_attention(config: dict[str, Any], layer: int, read: Weights, texts: list[Tensor]) -> list[Tensor]:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    qkv, gate, out, norm = (read(f"self_attn.{n}.weight") for n in ("qkv_proj", "output_gate", "out_proj", "norm"))
    rates = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    rates = (rates * (1.0 - layer / (layers - 1 + 1e-5) + 1e-5)).to(qkv.device)
    results = []
    for x in texts:
        q, k, v = F.silu(x @ qkv.T).view(len(x), heads, 3, -1).permute(2, 1, 0, 3)
        at = torch.arange(len(x), dtype=torch.float64, device=x.device)
        distance = at[:, None] - at
        mixed = [
            ((q[h] @ k[h].T) * torch.exp(-rates[h] * distance.clamp(min=0)).tril()) @ v[h] for h in range(heads)
        ]  # fmt: skip
        joined = _norm(torch.cat(mixed, -1), norm, LIGHTNING_EPS)
        results.append((torch.sigmoid(x @ gate.T) * joined) @ out.T)
    return results


def _softmax_attention(config: dict[str, Any], layer: int, read: Weights, texts: list[Tensor]) -> list[Tensor]:
    width, per_key = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
    to_q, to_k, to_v, to_out = (read(f"self_attn.{letter}_proj.weight") for letter in "qkvo")
    results = []
    for x in texts:
        cos, sin = _rotations(config, len(x), x.device)
        q, k, v = ((x @ w.T).view(len(x), -1, width).transpose(0, 1) for w in (to_q, to_k, to_v))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        hidden = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        mixed = []
        for head in range(len(q)):
            scores = (q[head] @ k[head // per_key].T * width**-0.5).masked_fill(hidden, float("-inf"))
            mixed.append(scores.softmax(-1) @ v[head // per_key])
        results.append(torch.cat(mixed, -1) @ to_out.T)
    return results


def _rotations(config: dict[str, Any], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, rotary_dim / 2] cosines and sines."""
    rotary = config["rotary_dim"]
    exponents = torch.arange(0, rotary, 2, dtype=torch.float64, device=device) / rotary
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * config["rope_theta"] ** -exponents
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r/2) of the first r channels of [heads, T, D]; r/2 is the width of ``cos``."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _experts(config: dict[str, Any], read: Weights, x: Tensor) -> Tensor:
    probs = (x @ read("block_sparse_moe.gate.weight").T).softmax(-1)
    share, chosen = probs.topk(config["num_experts_per_tok"])
    share = share / share.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(config["num_local_experts"]):
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        if not len(rows):
            continue
        w1, w2, w3 = (read(f"block_sparse_moe.experts.{expert}.w{n}.weight") for n in (1, 2, 3))
        answer = (F.silu(x[rows] @ w1.T) * (x[rows] @ w3.T)) @ w2.T
        out.index_add_(0, rows, share[rows, slots, None] * answer)
    return out


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


class _Weights:
    """Tensors of the folder by their released names, as float64."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self.device = folder, device
        self._place: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]

    def get(self, name: str, *, as_stored: bool = False) -> Tensor:
        """Read a tensor: in float64 on the device, or ``as_stored`` on the CPU."""
        from safetensors import safe_open

        with safe_open(self._folder / self._place[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor if as_stored else tensor.to(self.device).double()

    def of_layer(self, layer: int) -> Weights:
        """Return a reader of the tensors of one layer."""
        return lambda name: self.get(f"model.layers.{layer}.{name}")
