"""Logits in float64 of a Hugging Face folder of this family, read under the released names; no code of ours.

Equations: MiniMax-01, arXiv 2501.08313, and the released ``modeling_minimax_m1.py``. Lightning layers run as their recurrence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor


def source_logits(folder: Path, tokens: Tensor) -> Tensor:
    """[T] token ids to [T, vocab] float64 logits, of the files alone; all rows in the order of the released code."""
    c: dict[str, Any] = json.loads((folder / "config.json").read_text())
    w: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            w |= {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
    layers, heads, dim, rotary = c["num_hidden_layers"], c["num_attention_heads"], c["head_dim"], c["rotary_dim"]
    length = len(tokens)
    position = torch.arange(length, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor, eps: float = c["rms_norm_eps"]) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:
        angles = position[:, None] * c["rope_theta"] ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def lightning(layer: int, p: str, x: Tensor) -> Tensor:
        qkv = F.silu(x @ w[f"{p}qkv_proj.weight"].T).view(length, heads, 3, dim)
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
                               for h in range(heads)], dtype=torch.float64)  # fmt: skip
        state, kept, out = torch.zeros(heads, dim, dim, dtype=torch.float64), torch.exp(-slopes)[:, None, None], []
        for q, k, v in zip(*qkv.unbind(2), strict=True):
            state = kept * state + k[:, :, None] * v[:, None, :]
            out.append(torch.einsum("hd,hde->he", q, state))
        flat = norm(torch.stack(out).reshape(length, -1), w[f"{p}norm.weight"], 1e-6)
        return (torch.sigmoid(x @ w[f"{p}output_gate.weight"].T) * flat) @ w[f"{p}out_proj.weight"].T

    def softmax(p: str, x: Tensor) -> Tensor:
        groups = c["num_key_value_heads"]
        q, k, v = ((x @ w[f"{p}{n}_proj.weight"].T).view(length, -1, dim) for n in "qkv")
        q, k = rotated(q), rotated(k)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = (q[:, head] @ k[:, group].T / dim**0.5).masked_fill(later, float("-inf"))
            out.append(scores.softmax(-1) @ v[:, group])
        return torch.cat(out, -1) @ w[f"{p}o_proj.weight"].T

    def experts(p: str, x: Tensor) -> Tensor:
        share, chosen = (x @ w[f"{p}gate.weight"].T).softmax(-1).topk(c["num_experts_per_tok"])
        share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(c["num_local_experts"]):
            row, slot = torch.where(chosen == e)
            w1, w2, w3 = (w[f"{p}experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            out[row] += share[row, slot, None] * ((F.silu(x[row] @ w1.T) * (x[row] @ w3.T)) @ w2.T)
        return out

    h = w["model.embed_tokens.weight"][tokens]
    for layer in range(layers):
        p, is_softmax = f"model.layers.{layer}.", c["attn_type_list"][layer] == 1
        x = norm(h, w[f"{p}input_layernorm.weight"])
        attention = softmax(f"{p}self_attn.", x) if is_softmax else lightning(layer, f"{p}self_attn.", x)
        kind = "full_attention" if is_softmax else "linear_attention"
        h = c[f"layernorm_{kind}_alpha"] * x + c[f"layernorm_{kind}_beta"] * attention
        y = norm(h, w[f"{p}post_attention_layernorm.weight"])
        h = c["layernorm_mlp_alpha"] * y + c["layernorm_mlp_beta"] * experts(f"{p}block_sparse_moe.", y)
    return norm(h, w["model.norm.weight"]) @ w["lm_head.weight"].T
