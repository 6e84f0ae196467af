"""Compares how an export's loader splits text into tokens with the tokenizer that the model was trained with."""

from __future__ import annotations

from pathlib import Path

from m1_stages.errors import CheckpointError
from m1_stages.hf.verification.child import loader_tokens
from m1_stages.hf.verification.transformers_loading import load_tokenizer

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

    loaded, plain = load_tokenizer(export_dir), Tokenizer.from_file(str(export_dir / "tokenizer.json"))
    another = CheckpointError(
        "transformers makes another tokenizer of the export's files",
        where=str(export_dir / "tokenizer_config.json"),
        fix="set tokenizer_class to PreTrainedTokenizerFast in the tokenizer of the prepared data, and export again",
    )
    for text in SENTENCES:
        try:
            found = loaded.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            what = f"{another.what}: it fails on {text!r}: {error}"
            raise CheckpointError(what, where=another.where, fix=another.fix) from error
        _refuse_other_tokens(text, found, plain.encode(text, add_special_tokens=False).ids, another)
    return len(SENTENCES)


def compare_llama_cpp_tokens(gguf: Path, tokenizer_json: bytes) -> int:
    """Compare the ids that llama.cpp gives a few sentences with those of the tokenizer that the model was trained with.

    Returns:
        The number of sentences, all of which have the same ids.

    Raises:
        CheckpointError: llama.cpp splits a sentence otherwise.
        EnvironmentProblem: llama-cpp-python is not installed.
    """
    from tokenizers import Tokenizer

    plain = Tokenizer.from_buffer(tokenizer_json)
    for text, found in zip(SENTENCES, loader_tokens(gguf, SENTENCES), strict=True):
        _refuse_other_tokens(
            text,
            found,
            plain.encode(text, add_special_tokens=False).ids,
            CheckpointError(
                "llama.cpp makes another tokenizer of the export",
                where=str(gguf),
                fix="export with --target text01 or hf",
            ),
        )
    return len(SENTENCES)


def _refuse_other_tokens(text: str, found: list[int], expected: list[int], error: CheckpointError) -> None:
    """Raise ``error`` with what it gives the text in place of the expected tokens."""
    if found != expected:
        at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
        what = f"it gives {text!r} from token {at} on {found[at : at + 4]}, tokenizer.json {expected[at : at + 4]}"
        raise CheckpointError(f"{error.what}: {what}", where=error.where, fix=error.fix)
