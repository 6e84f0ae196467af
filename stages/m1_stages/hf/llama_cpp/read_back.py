"""Reads a gguf file back and compares tensors, hyperparameters and tokenizer with the checkpoint's, value by value."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.hf.checkpoint_tensors import TensorSource, require_all
from m1_stages.hf.checksums import FIX, refuse_changed
from m1_stages.hf.contents import Contents
from m1_stages.hf.model_card import CARD
from m1_stages.hf.read_back import refuse_different, refuse_other_files
from m1_stages.hf.targets import gguf_name

ARCHITECTURE = "minimax-01"
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "block_sparse_moe.gate": "ffn_gate_inp",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.output_gate": "attn_gate", "self_attn.norm": "attn_norm_2",
    "self_attn.out_proj": "attn_output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
}  # fmt: skip
"""llama.cpp's name by the released one, inside a layer and without ``.weight``."""
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_place(released: str) -> tuple[str, int | None]:
    """Return the tensor of a gguf file that holds the released one, and which of its experts; None for tensors without."""
    name = released.removesuffix(".weight")
    if name in _WHOLE:
        return f"{_WHOLE[name]}.weight", None
    found = re.fullmatch(r"model\.layers\.(\d+)\.(?:block_sparse_moe\.experts\.(\d+)\.)?(.+)", name)
    assert found is not None, released
    layer, expert, part = found.groups()
    return f"blk.{layer}.{_LAYER[part]}.weight", None if expert is None else int(expert)


def compare_gguf(source: TensorSource, folder: Path, contents: Contents) -> int:
    """Compare the gguf file of an export with the checkpoint, and every file with its hash.

    Returns:
        The number of tensors in the file, all of which are equal bit by bit.

    Raises:
        CheckpointError: something differs; the message names tensor and element, or key, and both values.
        EnvironmentProblem: the package ``gguf`` is not installed.
    """
    require_all(source, contents.model, contents.lineage.checkpoint)
    file = gguf_name(contents.dtype)
    refuse_other_files(folder, {file})
    path = folder / file
    reader = _open(path)
    for key, expected in expected_values(contents).items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if not _same(found, expected):
            raise _differs(path, f"{key} is {_short(found)}, of the checkpoint it is {_short(expected)}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    seen = set()
    for released, expected_tensor in contents.tensors(source):
        place, expert = gguf_place(released)
        if place not in stored:
            raise _differs(path, f"{place} is missing")
        seen.add(place)
        name = place if expert is None else f"expert {expert} of {place}"
        refuse_different(path, name, _values(path, stored[place], expert), expected_tensor.float())
    if extra := sorted(stored.keys() - seen):
        raise _differs(path, f"{extra[0]!r} is no tensor of this model")
    refuse_changed(folder, {file, CARD})
    return len(seen)


def expected_values(contents: Contents) -> dict[str, Any]:
    """Return the keys of the gguf file on which its computation and its tokens depend."""
    model, tokenizer = contents.model, contents.tokenizer
    numbers = {
        "block_count": model.num_layers,
        "context_length": contents.max_positions,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.expert_hidden_size,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.freq_base": contents.rope_base,
        "rope.dimension_count": model.rotary_dim,
        "expert_count": model.num_experts,
        "expert_used_count": model.experts_per_token,
        "residual_scale": model.residual_alpha,
    }
    values = json.loads(tokenizer.files["tokenizer.json"])
    merges = values["model"]["merges"]
    return {
        "general.architecture": ARCHITECTURE,
        **{f"{ARCHITECTURE}.{key}": value for key, value in numbers.items()},
        "tokenizer.ggml.tokens": _vocabulary(values, model.vocab_size),
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        **({} if tokenizer.bos is None else {"tokenizer.ggml.bos_token_id": tokenizer.bos}),
        **({} if tokenizer.eos is None else {"tokenizer.ggml.eos_token_id": tokenizer.eos}),
        "tokenizer.chat_template": tokenizer.template.decode(),
    }


def _vocabulary(values: dict[str, Any], size: int) -> list[str]:
    """The text of every token id; llama.cpp's converter names ids without one ``[PADn]``."""
    texts = {number: text for text, number in values["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in values["added_tokens"]}
    return [texts.get(number, f"[PAD{number}]") for number in range(size)]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):  # stored as fp32
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=2**-24)
    return type(found) is type(expected) and bool(found == expected)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _values(path: Path, tensor: Any, expert: int | None) -> Tensor:
    """The values of a stored tensor, or of one expert in it, as fp32."""
    kind = tensor.tensor_type.name
    if kind not in ("F32", "BF16"):
        raise _differs(path, f"{tensor.name} is stored as {kind}, and m1 exports F32 and BF16")
    data = tensor.data if expert is None else tensor.data[expert]
    values = torch.from_numpy(data.copy())
    return values if kind == "F32" else values.view(torch.bfloat16).float()


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EnvironmentProblem("this needs the package gguf", fix='pip install "m1cli[gguf]"') from error
    try:
        return GGUFReader(path)
    except Exception as error:  # of every kind: it reads lengths and offsets from the file
        raise _differs(path, f"the file is missing or damaged: {error}") from error


def _differs(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the export is not the checkpoint's: {what}", where=str(path), fix=FIX)
