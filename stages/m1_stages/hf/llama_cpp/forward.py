"""Logits and tokens that llama.cpp computes from a gguf file, through the Python package llama-cpp-python, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError, EnvironmentProblem


def llama_cpp_logits(path: Path, tokens: Tensor) -> Tensor:
    """Compute [B, T, vocab] fp32 logits of B separate texts.

    Args:
        tokens: [B, T] int64. llama.cpp sees 512 at a time, so that longer texts exercise the state between two calls.

    Raises:
        CheckpointError: llama.cpp does not load the file.
        EnvironmentProblem: llama-cpp-python is not installed.
    """
    model = load(path, tokens.shape[1])
    rows = []
    for text in tokens.tolist():
        model.reset()
        model.eval(text)
        rows.append(torch.from_numpy(model.scores[: len(text)].copy()))
    return torch.stack(rows)


def llama_cpp_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens into which llama.cpp splits each text; control tokens in it are recognised.

    Raises:
        M1Error: what ``llama_cpp_logits`` raises.
    """
    model = load(path, 8)
    return [list(model.tokenize(text.encode(), add_bos=False, special=True)) for text in texts]


def load(path: Path, context: int) -> Any:
    """Load a gguf file with room for ``context`` tokens, fp32 key-value caches, and the logits of every token kept.

    Raises:
        M1Error: what ``llama_cpp_logits`` raises.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # also: its library does not load
        raise EnvironmentProblem(
            f"this needs llama-cpp-python: {error}",
            fix='pip install "m1cli[gguf]" (it compiles llama.cpp; some minutes)',
        ) from error
    try:
        return llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"llama.cpp does not load the export: {error}", where=str(path)) from error
