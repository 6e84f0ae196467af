"""Maps our tensor names and layouts to the released ones and back: pure reshapes, one of our tensors at a time.

Released layouts (transformers ``modeling_minimax.py``, MiniMax-M1 ``modeling_minimax_m1.py``): rows of the lightning
``qkv_proj`` are (head, {q, k, v}, D) with the output gate apart; experts are stored one by one, ``w1`` gate, ``w3`` up,
``w2`` down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes

PREFILL_BLOCK = 256
"""Tokens of a block of transformers' lightning prefill; the saved decay buffers have this length."""

GetTensor = Callable[[str], Tensor]

_PLAIN = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "block_sparse_moe.gate.weight",
}
_LIGHTNING = {
    "self_attention.norm.weight": "self_attn.norm.weight",
    "self_attention.linear_out.weight": "self_attn.out_proj.weight",
}
_SOFTMAX = {"self_attention.linear_out.weight": "self_attn.o_proj.weight"}
_VOCAB = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}


def our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the full (unsharded) model, in the order they are computed."""
    c = model
    hidden, heads = c.hidden_size, c.num_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (c.padded_vocab_size, hidden)}
    for layer in range(c.num_layers):
        if c.is_softmax(layer):
            attention: dict[str, tuple[int, ...]] = {
                "linear_qkv.weight": (heads + 2 * c.num_kv_heads * c.head_dim, hidden),
                "linear_out.weight": (hidden, heads),
            }
        else:
            attention = {
                "linear_in.weight": (4 * heads, hidden),
                "norm.weight": (heads,),
                "linear_out.weight": (hidden, heads),
            }
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            **{f"self_attention.{name}": shape for name, shape in attention.items()},
            "mlp_norm.weight": (hidden,),
            "mlp.router.weight": (c.num_experts, hidden),
            "mlp.experts.w13": (c.num_experts, 2, c.expert_hidden_size, hidden),
            "mlp.experts.w2": (c.num_experts, hidden, c.expert_hidden_size),
        }
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    shapes["output_layer.weight"] = (c.padded_vocab_size, hidden)
    return shapes


def to_released(name: str, tensor: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the released tensors that hold our tensor ``name``; views of it where the layout allows.

    Raises:
        KeyError: ``name`` is not one of ``our_shapes``.
    """
    if name in _VOCAB:
        yield _VOCAB[name], tensor[: model.vocab_size]
        return
    if name == "decoder.final_layernorm.weight":
        yield "model.norm.weight", tensor
        return
    part, prefix, renamed = _place(name, model)
    if part in renamed:
        yield prefix + renamed[part], tensor
    elif part == "self_attention.linear_in.weight":
        qkvg = tensor.reshape(model.num_heads, 4, model.head_dim, model.hidden_size)
        yield f"{prefix}self_attn.qkv_proj.weight", qkvg[:, :3].reshape(-1, model.hidden_size)
        yield f"{prefix}self_attn.output_gate.weight", qkvg[:, 3].reshape(-1, model.hidden_size)
    elif part == "self_attention.linear_qkv.weight":
        for letter, rows in zip("qkv", _grouped(tensor, model).split(_group_sizes(model), dim=1), strict=True):
            yield f"{prefix}self_attn.{letter}_proj.weight", rows.reshape(-1, model.hidden_size)
    elif part == "mlp.experts.w13":
        for expert in range(model.num_experts):
            yield f"{prefix}block_sparse_moe.experts.{expert}.w1.weight", tensor[expert, 0]
            yield f"{prefix}block_sparse_moe.experts.{expert}.w3.weight", tensor[expert, 1]
    elif part == "mlp.experts.w2":
        for expert in range(model.num_experts):
            yield f"{prefix}block_sparse_moe.experts.{expert}.w2.weight", tensor[expert]
    else:
        raise KeyError(name)


def to_exported(name: str, tensor: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the released tensors that hold our tensor ``name``, with the rows that transformers rotates in its order.

    Raises:
        KeyError: ``name`` is not one of ``our_shapes``.
    """
    for released_name, value in to_released(name, tensor, model):
        if model.rotary_dim != model.head_dim and released_name.endswith(("q_proj.weight", "k_proj.weight")):
            value = proportional_rows(value, head_dim=model.head_dim, rotary_dim=model.rotary_dim)
        yield released_name, value


def from_released(name: str, get: GetTensor, model: ModelConfig) -> Tensor:
    """Return our tensor ``name`` from released tensors; rows of the vocabulary's padding are zero.

    Raises:
        KeyError: ``name`` is not one of ``our_shapes``.
    """
    if name in _VOCAB:
        rows = get(_VOCAB[name])
        padding = rows.new_zeros(model.padded_vocab_size - model.vocab_size, model.hidden_size)
        return torch.cat([rows, padding])
    if name == "decoder.final_layernorm.weight":
        return get("model.norm.weight")
    part, prefix, renamed = _place(name, model)
    if part in renamed:
        return get(prefix + renamed[part])
    if part == "self_attention.linear_in.weight":
        qkv = get(f"{prefix}self_attn.qkv_proj.weight").reshape(model.num_heads, 3, model.head_dim, -1)
        gate = get(f"{prefix}self_attn.output_gate.weight").reshape(model.num_heads, 1, model.head_dim, -1)
        return torch.cat([qkv, gate], dim=1).reshape(-1, model.hidden_size)
    if part == "self_attention.linear_qkv.weight":
        groups = [
            get(f"{prefix}self_attn.{letter}_proj.weight").reshape(model.num_kv_heads, rows, model.hidden_size)
            for letter, rows in zip("qkv", _group_sizes(model), strict=True)
        ]
        return torch.cat(groups, dim=1).reshape(-1, model.hidden_size)
    if is_experts(name):
        return torch.stack([expert_from_released(name, expert, get) for expert in range(model.num_experts)])
    raise KeyError(name)


def is_experts(name: str) -> bool:
    """Whether our tensor ``name`` holds all experts of a layer, one after the other on its first axis."""
    return name.endswith((".mlp.experts.w13", ".mlp.experts.w2"))


def expert_from_released(name: str, expert: int, get: GetTensor) -> Tensor:
    """Return one expert's part of our tensor ``name``, without the axis of the experts."""
    layer, part = name.removeprefix("decoder.layers.").split(".mlp.experts.")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    if part == "w13":
        return torch.stack([get(f"{prefix}.w1.weight"), get(f"{prefix}.w3.weight")])
    return get(f"{prefix}.w2.weight")


def proportional_rows(rows: Tensor, *, head_dim: int, rotary_dim: int) -> Tensor:
    """Reorder query or key rows [heads * D, hidden] for a loader that rotates the pairs (i, i + D/2), i < rotary_dim/2.

    The released code pairs (i, i + rotary_dim/2); transformers' "proportional" type pairs (i, i + D/2) and leaves the
    other pairs unrotated. Query and key are permuted alike, so their products do not change.
    """
    order = _proportional_order(head_dim, rotary_dim)
    return rows.reshape(-1, head_dim, rows.shape[-1])[:, order].reshape(rows.shape)


def rows_from_proportional(rows: Tensor, *, head_dim: int, rotary_dim: int) -> Tensor:
    """Undo ``proportional_rows``."""
    order = _proportional_order(head_dim, rotary_dim).argsort()
    return rows.reshape(-1, head_dim, rows.shape[-1])[:, order].reshape(rows.shape)


def _proportional_order(head_dim: int, rotary_dim: int) -> Tensor:
    half, half_rotary = head_dim // 2, rotary_dim // 2
    rest = torch.arange(rotary_dim, head_dim)
    return torch.cat(
        [
            torch.arange(half_rotary),
            rest[: half - half_rotary],
            torch.arange(half_rotary, rotary_dim),
            rest[half - half_rotary :],
        ]
    )


def decay_buffers(model: ModelConfig, slopes: Slopes) -> Iterator[tuple[str, Tensor]]:
    """Yield the four fp32 buffers of every lightning layer, as transformers' ``decay_factors`` shapes them.

    All four are needed: its prefill reads the three decays, its cached decoding reads ``slope_rate``.
    """
    steps = torch.arange(1, PREFILL_BLOCK + 1, dtype=torch.float64)
    distance = steps[:, None] - steps[None, :]
    for layer in range(model.num_layers):
        if model.is_softmax(layer):
            continue
        rate = torch.tensor(slopes[layer], dtype=torch.float32).double()[:, None, None]
        buffers = {
            "slope_rate": rate,
            "query_decay": torch.exp(-rate * steps[:, None]),
            "key_decay": torch.exp(-rate * (PREFILL_BLOCK - steps[:, None])),
            "diagonal_decay": torch.exp(-rate * distance.clamp(min=0)).tril()[None],
        }
        for name, value in buffers.items():
            yield f"model.layers.{layer}.self_attn.{name}", value.float()


def _place(name: str, model: ModelConfig) -> tuple[str, str, dict[str, str]]:
    """Return the name inside the layer, the released prefix, and the tensors that are only renamed in such a layer."""
    if not name.startswith("decoder.layers."):
        raise KeyError(name)
    number, part = name.removeprefix("decoder.layers.").split(".", 1)
    layer = int(number)
    renamed = _PLAIN | (_SOFTMAX if model.is_softmax(layer) else _LIGHTNING)
    return part, f"model.layers.{layer}.", renamed


def _grouped(tensor: Tensor, model: ModelConfig) -> Tensor:
    return tensor.reshape(model.num_kv_heads, sum(_group_sizes(model)), model.hidden_size)


def _group_sizes(model: ModelConfig) -> list[int]:
    return [model.num_heads // model.num_kv_heads * model.head_dim, model.head_dim, model.head_dim]
