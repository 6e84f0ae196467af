"""Computes what an export is compared with: logits of transformers, of the Megatron model that was trained, and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.decay import Slopes
from m1_stages.errors import CheckpointError, EnvironmentProblem
from m1_stages.hf.checkpoint_tensors import TensorSource, get_checked, require_all
from m1_stages.hf.tensor_names import PREFILL_BLOCK, our_shapes
from m1_stages.hf.verification.comparison import Reference

if TYPE_CHECKING:
    from m1_data.sampling.loader import PackedBatch


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
        with _quiet():  # it warns of the decay buffers that a portable export does not store
            loaded, info = MiniMaxForCausalLM.from_pretrained(export_dir, dtype=torch.float32, output_loading_info=True)
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers say nothing but errors, and show no progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
        with _quiet():  # it warns of a model_type that it does not know, which tokenizing does not need
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
    """Return the logits of ``trained_reference``, [B, T, vocab] fp32 on the CPU."""
    return trained_reference(
        source, model, slopes=slopes, rope_base=rope_base, tokens=tokens, rounded_to=rounded_to
    ).logits


def trained_reference(
    source: TensorSource,
    model: ModelConfig,
    *,
    slopes: Slopes,
    rope_base: float,
    tokens: Tensor,
    rounded_to: torch.dtype = torch.float32,
) -> Reference:
    """Compute logits and router decisions of the Megatron model with the checkpoint's weights, in fp32.

    The model computes on this process's GPU, or on the CPU of a process that sees none.

    The function starts and leaves a process group of its own; there must be none before.

    Args:
        tokens: [B, T] int64: B texts, packed into one row and isolated from each other.
        rounded_to: dtype the export stores, so that its rounding is not taken for a difference of the models.

    Raises:
        CheckpointError: tensors are missing or have another shape.
        EnvironmentProblem: the GPU has no room for the model in fp32.
    """
    from m1_stages.runtime import device, parallel

    require_all(source, model, "the checkpoint")
    here, sizes = device.use("auto"), ParallelConfig()
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
            gaps = _record_router_gaps(built, model)
            logits: Tensor = built.eval()(_packed(tokens).to(here.torch_device), logits=True)
        return Reference(
            tokens=tokens,
            logits=logits.cpu().view(*tokens.shape, -1),
            gaps=torch.stack([gaps[layer] for layer in range(model.num_layers)]).view(-1, *tokens.shape),
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"the model in fp32 does not fit on the GPU: {str(error).splitlines()[0]}",
            where=here.why,
            fix="compute on the CPU: m1 export … --device cpu",
        ) from error
    finally:
        parallel.stop()


def _packed(tokens: Tensor) -> PackedBatch:
    """[B, T] tokens as one row of B documents."""
    from m1_data.sampling.loader import PackedBatch

    texts, length = tokens.shape
    row = tokens.reshape(1, -1)
    return PackedBatch(
        tokens=row,
        labels=row.roll(-1, 1),
        loss_mask=torch.ones(row.shape),
        position_ids=torch.arange(length).repeat(texts)[None],
        cu_seqlens=torch.arange(texts + 1, dtype=torch.int32) * length,
        doc_lengths=(length,) * texts,
        sample_ids=(0,),
        trained_tokens=row.numel(),
    )


def _record_router_gaps(built: Any, model: ModelConfig) -> dict[int, Tensor]:
    """Let every layer record how much likelier the last chosen expert is than the next one, [tokens] fp32 by layer."""
    gaps: dict[int, Tensor] = {}

    def record(layer: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].view(-1, model.hidden_size)
        probs = torch.softmax(hidden.float() @ module.router.weight.float().T, dim=-1)
        if model.experts_per_token == model.num_experts:
            gaps[layer] = torch.ones(len(probs))
        else:
            top = probs.topk(model.experts_per_token + 1).values
            gaps[layer] = (top[:, -2] - top[:, -1]).cpu()

    for layer in built.decoder.layers:
        layer.mlp.register_forward_pre_hook(partial(record, layer.layer_number - 1))
    return gaps


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
