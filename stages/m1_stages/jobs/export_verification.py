"""Compares an export with its checkpoint for ``m1 export``: every byte, the tokens, and the logits that a loader computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from m1_stages.hf.read_back import compare_files
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.verification.child import loader_logits, trained_reference_of
from m1_stages.hf.verification.comparison import Difference, compare
from m1_stages.hf.verify import compare_tokenizer
from m1_stages.jobs.export import Export

TEXTS, TEXT_TOKENS = 3, 2 * PREFILL_BLOCK + 88
"""Random texts of a verification, each of two full blocks of transformers' prefill and a partial one."""
TOLERANCE = 1e-4
"""Largest permitted difference of a logit; fp32 against fp32 stays near 1e-6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The result of a verification."""

    tensors: int
    """Tensors that were read back, all of them equal bit by bit."""
    sentences: int
    """Sentences that the loader's tokenizer splits as ``tokenizer.json`` does."""
    loader: str
    """Who computed the logits."""
    difference: Difference


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
    tensors = compare_files(job.source, folder, what)
    sentences = compare_tokenizer(folder)
    loader, said = {
        "hf": ("transformers", "transformers"),
        "text01": ("released", "m1's own forward pass over the released names"),
    }[what.target]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, what.model.vocab_size, (TEXTS, TEXT_TOKENS), generator=generator)
    reference = trained_reference_of(
        job.committed.path,
        what.model,
        slopes=what.slopes,
        rope_base=what.rope_base,
        tokens=tokens,
        dtype=what.dtype,
        device=device,
    )
    logits = loader_logits(loader, folder, tokens, device)
    return Verified(
        tensors=tensors,
        sentences=sentences,
        loader=said,
        difference=compare(reference, logits, tolerance=TOLERANCE, loader=said),
    )
