"""Compares an export with its checkpoint for ``m1 export``: every byte, the tokens, and the logits that a loader computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from m1_stages.config import ModelConfig
from m1_stages.hf.llama_cpp.read_back import compare_gguf
from m1_stages.hf.read_back import compare_files
from m1_stages.hf.targets import Target, gguf_name
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.verification.child import loader_logits, trained_reference_of
from m1_stages.hf.verification.comparison import FP32, Difference, Reference, bf16_products, compare
from m1_stages.hf.verification.tokens import compare_llama_cpp_tokens, compare_tokenizer
from m1_stages.jobs.export import Export
from m1_stages.packages import require_packages

TEXTS, TEXT_TOKENS = 3, 2 * PREFILL_BLOCK + 88
"""Random texts of a verification, each of two full blocks of transformers' prefill and a partial one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The result of a verification."""

    tensors: int
    """Tensors that were read back, all of them equal bit by bit."""
    sentences: int
    """Sentences that the loader's tokenizer splits as ``tokenizer.json`` does."""
    loader: str
    """Who computed the logits."""
    computed: str
    """How and where both models were computed."""
    difference: Difference
    epsilon_effect: float | None = None
    """Largest difference of a logit that the loader's other epsilon alone makes; None where it has the model's."""


def require_loader(target: Target) -> None:
    """Check that the packages are there that a verification of ``target`` needs.

    Raises:
        EnvironmentProblem: one is not installed.
    """
    names, extra = (("gguf", "llama_cpp"), "gguf") if target == "gguf" else (("transformers",), "hf")
    require_packages(*names, for_what=f"verifying an export for {target}", extra=extra)


def verify_export(job: Export, folder: Path, device: str = "cpu") -> Verified:
    """Compare every file of ``folder`` with the checkpoint, then the logits of the target's loader with the trained model's.

    Each model is computed in a child process of its own, one after the other. Nothing is written.

    Args:
        device: ``cpu`` or ``cuda``: where both models compute.

    Raises:
        CheckpointError: a value differs, or logits differ by more than rounding.
        EnvironmentProblem: a package that loads the export is not installed, there is no such device, or it has no room.
    """
    what = job.contents
    require_loader(what.target)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, what.model.vocab_size, (TEXTS, TEXT_TOKENS), generator=generator)
    if what.target == "gguf":
        return _verify_gguf(job, folder, tokens, device)
    tensors, sentences = compare_files(job.source, folder, what), compare_tokenizer(folder)
    loader, said = {
        "hf": ("transformers", "transformers"),
        "text01": ("released", "m1's own forward pass over the released names"),
    }[what.target]
    reference = _reference(job, what.model, tokens, device)
    logits = loader_logits(loader, folder, tokens, device)
    return Verified(
        tensors=tensors,
        sentences=sentences,
        loader=said,
        computed=f"fp32 on {device}",
        difference=compare(reference, logits, rounding=FP32, loader=said),
    )


def _verify_gguf(job: Export, folder: Path, tokens: Tensor, device: str) -> Verified:
    """Compare with the model at llama.cpp's epsilon of the lightning output norm; say how far that is from the trained one."""
    what, said = job.contents, "llama.cpp"
    path = folder / gguf_name(what.dtype)
    tensors = compare_gguf(job.source, folder, what)
    sentences = compare_llama_cpp_tokens(path, what.tokenizer.files["tokenizer.json"])
    logits = loader_logits("llama.cpp", path, tokens, device)
    model = what.model
    reference = _reference(job, replace(model, lightning_norm_eps=model.norm_eps), tokens, device)
    rounding = FP32 if what.dtype == "fp32" else bf16_products(reference)
    difference = compare(reference, logits, rounding=rounding, loader=said)
    effect = None
    if model.lightning_norm_eps != model.norm_eps:
        trained = _reference(job, model, tokens, device)
        effect = float((trained.logits - reference.logits).abs().max())
    how = "fp32" if what.dtype == "fp32" else "llama.cpp multiplies in bf16"
    return Verified(
        tensors=tensors,
        sentences=sentences,
        loader=said,
        computed=f"{how}, on the CPU" if device == "cpu" else f"{how} on the CPU, the trained model on {device}",
        difference=difference,
        epsilon_effect=effect,
    )


def _reference(job: Export, model: ModelConfig, tokens: Tensor, device: str) -> Reference:
    return trained_reference_of(
        job.committed.path,
        model,
        slopes=job.contents.slopes,
        rope_base=job.contents.rope_base,
        tokens=tokens,
        dtype=job.contents.dtype,
        device=device,
    )
