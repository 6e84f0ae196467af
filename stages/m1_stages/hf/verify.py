"""Compares an export, loaded by transformers, with the Megatron model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.hf.checkpoint_tensors import TensorSource, get_checked, require_all
from m1_stages.hf.tensor_names import PREFILL_BLOCK, our_shapes


def verify(export_dir: Path, reference_logits: Tensor, tokens: Tensor) -> float:
    """Return the largest absolute logit difference over all positions; both sides compute in fp32.

    Args:
        reference_logits: [1, T, vocab] logits of the trained model.
        tokens: [1, T] int64, longer than transformers' block so that the state between blocks is exercised.

    Raises:
        ValueError: T is too short, or the logits have another shape.
        CheckpointError: transformers found missing or unexpected tensors, or logits are not finite.
    """
    if tokens.shape[1] <= PREFILL_BLOCK:
        raise ValueError(f"{tokens.shape[1]} tokens do not reach beyond the first block of {PREFILL_BLOCK}")
    with torch.inference_mode():
        logits = load_transformers(export_dir)(tokens).logits
    if logits.shape != reference_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} against {tuple(reference_logits.shape)}")
    difference = float((logits.double() - reference_logits.double()).abs().max())
    if not difference < float("inf"):
        raise CheckpointError("the exported model's logits are not finite", where=str(export_dir))
    return difference


def load_transformers(export_dir: Path) -> Any:
    """Load the export as transformers' fp32 model, and check that it used every tensor and missed none.

    Raises:
        EnvironmentProblem: transformers is not installed.
        CheckpointError: tensors are missing or unexpected.
    """
    try:
        from transformers import MiniMaxForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise EnvironmentProblem("this needs transformers", fix='pip install "m1cli[hf]"') from error
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the decay buffers that a portable export does not store
    try:
        loaded, info = MiniMaxForCausalLM.from_pretrained(export_dir, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # of every kind, from the reader of any of the files
        raise CheckpointError(f"transformers does not load the export: {error}", where=str(export_dir)) from error
    finally:
        logging.set_verbosity(before)
    decay = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(decay))
    unexpected = sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise CheckpointError(
            f"transformers does not find {missing[:3]} and does not know {unexpected[:3]}", where=str(export_dir)
        )
    return loaded.eval()


SENTENCES = (
    "The lemma follows by induction on n: 2^10 = 1024, 3.14159 < 22/7.",
    "def f(x):\n\treturn [i ** 2 for i in range(x)]  # naïve, déjà vu\n\n",
    "  Leading and trailing spaces,\r\ntabs\tand 千と千尋 🙂 \u200b end.  ",
    "<think>control tokens as text</think> <pad>",
)
"""Text that a tokenizer which is set up otherwise splits otherwise."""


def compare_tokenizer(export_dir: Path) -> int:
    """Compare the ids that transformers' tokenizer gives a few sentences with those of ``tokenizer.json`` itself.

    Returns:
        The number of sentences, all of which have the same ids.

    Raises:
        CheckpointError: transformers cannot load it without code of its own, or splits a sentence otherwise.
        EnvironmentProblem: transformers is not installed.
    """
    from tokenizers import Tokenizer

    loaded, plain = _load_tokenizer(export_dir), Tokenizer.from_file(str(export_dir / "tokenizer.json"))
    for text in SENTENCES:
        expected = plain.encode(text, add_special_tokens=False).ids
        try:
            found = loaded.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise _another_tokenizer(export_dir, f"fails on {text!r}: {error}") from error
        if found != expected:
            at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
            what = f"gives {text!r} from token {at} on {found[at : at + 4]}, tokenizer.json {expected[at : at + 4]}"
            raise _another_tokenizer(export_dir, what)
    return len(SENTENCES)


def _another_tokenizer(export_dir: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"transformers makes another tokenizer of the export's files: it {what}",
        where=str(export_dir / "tokenizer_config.json"),
        fix="set tokenizer_class to PreTrainedTokenizerFast in the tokenizer of the prepared data, and export again",
    )


def _load_tokenizer(export_dir: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise EnvironmentProblem("this needs transformers", fix='pip install "m1cli[hf]"') from error
    try:
        return AutoTokenizer.from_pretrained(export_dir, trust_remote_code=False)
    except Exception as error:  # of every kind, from the reader of any of the files
        raise CheckpointError(f"transformers does not load the tokenizer: {error}", where=str(export_dir)) from error


def trained_logits(
    source: TensorSource,
    model: ModelConfig,
    *,
    slopes: Slopes,
    rope_base: float,
    tokens: Tensor,
    rounded_to: torch.dtype = torch.float32,
) -> Tensor:
    """Compute [1, T, vocab] fp32 logits of the Megatron model with the checkpoint's weights; they are returned on the CPU.

    The model computes on this process's GPU, or on the CPU of a machine without one.

    The function starts and leaves a process group of its own; there must be none before.

    Args:
        rounded_to: dtype the export stores, so that its rounding is not taken for a difference of the models.

    Raises:
        CheckpointError: tensors are missing or have another shape.
        EnvironmentProblem: the GPU has no room for the model in fp32.
    """
    from m1_data.sampling.loader import PackedBatch
    from m1_stages.runtime import device, parallel

    require_all(source, model, "the checkpoint")
    here, sizes, length = device.use("auto"), ParallelConfig(), tokens.shape[1]
    parallel.start(sizes, device=here, seed=0)
    try:
        from m1_stages.model import build_model

        built = build_model(model, parallel=sizes, rope_base=rope_base, device=here.name)[0]
        built.set_slopes(slopes)
        parameters = dict(built.named_parameters())
        shapes = our_shapes(model)
        if parameters.keys() != shapes.keys():
            raise CheckpointError(f"the model and the export disagree on {sorted(parameters.keys() ^ shapes.keys())}")
        with torch.no_grad():
            for name, shape in shapes.items():
                parameters[name].copy_(get_checked(source, name, shape).to(rounded_to))
            batch = PackedBatch(
                tokens=tokens,
                labels=tokens.roll(-1, 1),
                loss_mask=torch.ones(tokens.shape),
                position_ids=torch.arange(length)[None],
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                doc_lengths=(length,),
                sample_ids=(0,),
                trained_tokens=length,
            )
            logits: Tensor = built.eval()(batch.to(here.torch_device), logits=True)
            return logits.cpu()
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"the model in fp32 does not fit on the GPU: {str(error).splitlines()[0]}",
            where=here.why,
            fix="compute on the CPU: CUDA_VISIBLE_DEVICES= m1 export …",
        ) from error
    finally:
        parallel.stop()


def generate(export_dir: Path, prompts: Sequence[str], *, max_new_tokens: int = 48) -> list[str]:
    """Generate greedy continuations by transformers in fp32, one prompt at a time: padding breaks its cached decoding.

    Raises:
        EnvironmentProblem: transformers is not installed.
    """
    model, tokenizer = load_transformers(export_dir), _load_tokenizer(export_dir)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        texts.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
