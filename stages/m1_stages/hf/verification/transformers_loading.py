"""Loads an export with transformers: the model, the tokenizer, and what they make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.hf.tensor_names import PREFILL_BLOCK


def load_transformers(export_dir: Path) -> Any:
    """Load the export as transformers' fp32 model, and check that it used every tensor and missed none.

    Raises:
        EnvironmentProblem: transformers is not installed.
        CheckpointError: tensors are missing or unexpected.
    """
    try:
        from transformers import MiniMaxForCausalLM
    except ImportError as error:
        raise EnvironmentProblem("this needs transformers", fix='pip install "m1cli[hf]"') from error
    try:
        with quiet():  # it warns of the decay buffers that a portable export does not store
            loaded, info = MiniMaxForCausalLM.from_pretrained(export_dir, dtype=torch.float32, output_loading_info=True)
    except (MemoryError, torch.OutOfMemoryError):  # not the fault of the export
        raise
    except Exception as error:  # of every kind, from the reader of any of the files
        raise CheckpointError(f"transformers does not load the export: {error}", where=str(export_dir)) from error
    decay = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(decay))
    unexpected = sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise CheckpointError(
            f"transformers does not find {missing[:3]} and does not know {unexpected[:3]}", where=str(export_dir)
        )
    return loaded.eval()


def load_tokenizer(export_dir: Path) -> Any:
    """Load the tokenizer of an export with transformers, without code of its own.

    Raises:
        CheckpointError: transformers does not load it.
        EnvironmentProblem: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise EnvironmentProblem("this needs transformers", fix='pip install "m1cli[hf]"') from error
    try:
        with quiet():  # it warns of a model_type that it does not know, which tokenizing does not need
            return AutoTokenizer.from_pretrained(export_dir, trust_remote_code=False)
    except Exception as error:  # of every kind, from the reader of any of the files
        raise CheckpointError(f"transformers does not load the tokenizer: {error}", where=str(export_dir)) from error


def transformers_logits(export_dir: Path, tokens: Tensor, device: str = "cpu") -> Tensor:
    """Return [B, T, vocab] fp32 logits that transformers computes from the export; they are returned on the CPU.

    Args:
        tokens: [B, T] int64, longer than transformers' block so that the state between blocks is exercised.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: T is too short.
        CheckpointError: transformers found missing or unexpected tensors.
        EnvironmentProblem: transformers is not installed.
    """
    if tokens.shape[1] <= PREFILL_BLOCK:
        raise ValueError(f"{tokens.shape[1]} tokens do not reach beyond the first block of {PREFILL_BLOCK}")
    model = load_transformers(export_dir).to(device)
    with torch.inference_mode():
        return torch.cat([model(row[None].to(device)).logits.cpu() for row in tokens])


def generate(export_dir: Path, prompts: Sequence[str], *, max_new_tokens: int = 48) -> list[str]:
    """Generate greedy continuations by transformers in fp32, one prompt at a time: padding breaks its cached decoding.

    Raises:
        EnvironmentProblem: transformers is not installed.
    """
    model, tokenizer = load_transformers(export_dir), load_tokenizer(export_dir)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        texts.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing but errors, and show no progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
