"""Computes logits in a child process: one model is in memory at a time, and the child alone decides which device it sees.

``python -m m1_stages.hf.verification.child FOLDER`` is the child: it reads its job from FOLDER and writes its answer there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from m1_stages import errors
from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, EnvironmentProblem, M1Error
from m1_stages.hf.verification.comparison import Reference

_JOB, _TOKENS, _ANSWER, _ERROR = "job.json", "tokens.safetensors", "answer.safetensors", "error.json"


def trained_reference_of(
    checkpoint: Path,
    model: ModelConfig,
    *,
    slopes: Slopes,
    rope_base: float,
    tokens: Tensor,
    dtype: str,
    device: str,
) -> Reference:
    """Compute ``trained.trained_reference`` of a committed checkpoint, whose files were verified before, in a child process.

    Args:
        dtype: ``fp32`` or ``bf16``: what the export stores.
        device: ``cpu`` or ``cuda``.

    Raises:
        M1Error: what ``trained_reference`` raises.
    """
    answer = in_child(
        {
            "loader": "m1",
            "checkpoint": str(checkpoint.resolve()),
            "model": asdict(model),
            "slopes": slopes,
            "rope_base": rope_base,
            "dtype": dtype,
        },
        tokens,
        device,
    )
    return Reference(tokens=tokens, logits=answer["logits"], gaps=answer["gaps"])


def loader_logits(loader: str, path: Path, tokens: Tensor, device: str) -> Tensor:
    """Compute [B, T, vocab] fp32 logits of an export in a child process.

    Args:
        loader: ``transformers``, ``released`` (``released_forward``) or ``llama.cpp``.
        path: what it loads.
        device: ``cpu`` or ``cuda``; llama.cpp computes on the CPU.

    Raises:
        M1Error: what the loader raises.
    """
    return in_child({"loader": loader, "path": str(path.resolve())}, tokens, device)["logits"]


def loader_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens into which llama.cpp splits each text, from a child process.

    Raises:
        M1Error: what ``llama_cpp.forward`` raises.
    """
    job = {"loader": "llama.cpp tokens", "path": str(path.resolve()), "texts": list(texts)}
    answer = in_child(job, torch.zeros(1, dtype=torch.int64), "cpu")
    return [answer[str(n)].tolist() for n in range(len(texts))]


def in_child(job: dict[str, Any], tokens: Tensor, device: str) -> dict[str, Tensor]:
    """Compute a job in a process of its own."""
    from safetensors.torch import load_file, save_file

    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "torch sees no CUDA device", where=f"torch {torch.__version__}", fix="leave out --device cuda"
        )
    with TemporaryDirectory(prefix="m1-verify-") as name:
        folder = Path(name)
        (folder / _JOB).write_text(json.dumps(job | {"device": device}))
        save_file({"tokens": tokens}, folder / _TOKENS)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "m1_stages.hf.verification.child", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if (folder / _ERROR).is_file():
            said = json.loads((folder / _ERROR).read_text())
            raise getattr(errors, said["kind"])(said["what"], where=said["where"], fix=said["fix"])
        if done.returncode or not (folder / _ANSWER).is_file():
            raise _lost(job["loader"], done)
        return load_file(folder / _ANSWER)


def _lost(loader: str, done: subprocess.CompletedProcess[str]) -> M1Error:
    """The error for a child that ended without an answer."""
    if done.returncode < 0:
        return EnvironmentProblem(
            f"the process that computed the logits of {loader} was killed by signal {-done.returncode}",
            fix="look for the out-of-memory killer in the system's log; one model in fp32 and its logits must fit",
        )
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
    return CheckpointError(f"the process that computed the logits of {loader} ended with {done.returncode}: {last}")


def main(folder: Path) -> None:
    """Do the job in ``folder``; what a person can act on is written there as an error."""
    from safetensors.torch import load_file, save_file

    job = json.loads((folder / _JOB).read_text())
    tokens = load_file(folder / _TOKENS)["tokens"]
    try:
        answer = compute(job, tokens)
    except (MemoryError, torch.OutOfMemoryError) as short:
        what = f"there is no memory to compute the logits of {job['loader']}: {short or 'MemoryError'}"
        fix = "one model in fp32 and its logits must fit: use a larger machine, or --device cpu"
        (folder / _ERROR).write_text(json.dumps({"kind": "EnvironmentProblem", "what": what, "where": "", "fix": fix}))
        return
    except M1Error as error:
        said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        (folder / _ERROR).write_text(json.dumps(said))
        return
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, folder / _ANSWER)


def compute(job: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """Compute a job in this process."""
    if job["loader"] == "m1":
        return _trained(job, tokens)
    path, device = Path(job["path"]), job["device"]
    if job["loader"] == "transformers":
        from m1_stages.hf.verification.transformers_loading import transformers_logits

        return {"logits": transformers_logits(path, tokens, device)}
    if job["loader"] == "released":
        from m1_stages.hf.verification.released_forward import released_logits

        return {"logits": released_logits(path, tokens, device)}
    from m1_stages.hf.llama_cpp.forward import llama_cpp_logits, llama_cpp_tokens

    if job["loader"] == "llama.cpp tokens":
        return {str(n): torch.tensor(ids) for n, ids in enumerate(llama_cpp_tokens(path, job["texts"]))}
    return {"logits": llama_cpp_logits(path, tokens)}


def _trained(job: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    from m1_stages.checkpoint.manifest import read_manifest
    from m1_stages.hf.checkpoint_tensors import CheckpointSource
    from m1_stages.hf.config_json import DTYPES
    from m1_stages.hf.verification.trained import trained_reference

    reference = trained_reference(
        CheckpointSource(read_manifest(Path(job["checkpoint"])), verified=True),
        ModelConfig(**job["model"]),
        slopes=job["slopes"],
        rope_base=job["rope_base"],
        tokens=tokens,
        rounded_to=DTYPES[job["dtype"]],
    )
    return {"logits": reference.logits, "gaps": reference.gaps}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
