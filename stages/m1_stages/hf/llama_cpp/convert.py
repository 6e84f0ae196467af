"""Converts a ``text01`` export to a gguf file with llama.cpp's converter, from the user's copy of llama.cpp's sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from m1_data.tokenizer import SPLIT_PATTERN
from m1_stages.errors import CheckpointError, ConfigError

CONVERTER = "convert_hf_to_gguf.py"
SAME_SPLIT = "gpt-4o"
"""llama.cpp's name of the pre-tokenizer that splits text as tokenizers trained by ``m1 prepare-data`` do."""
_OUT_TYPES = {"fp32": "f32", "bf16": "bf16"}


def find_converter(sources: str, where: str) -> Path:
    """Return the folder of llama.cpp's sources, checked for its converter with this model family.

    Args:
        sources: what the configuration names; empty for nothing.
        where: where it says so.

    Raises:
        ConfigError: there is no converter, or one from before this model family.
    """
    fix = (
        "pip download --no-binary llama-cpp-python --no-deps llama-cpp-python, unpack it, and set export.llama_cpp to its "
        "folder vendor/llama.cpp"
    )
    if not sources:
        raise ConfigError("target gguf needs llama.cpp's sources, for their converter", where=where, fix=fix)
    folder = Path(sources)
    if not (folder / CONVERTER).is_file():
        raise ConfigError(
            f"there is no {CONVERTER} in the folder of llama.cpp's sources", where=f"{folder}, {where}", fix=fix
        )
    texts = [folder / CONVERTER, *(folder / "conversion").glob("minimax.py")]
    if not any("MiniMaxText01ForCausalLM" in text.read_text(encoding="utf-8", errors="replace") for text in texts):
        raise ConfigError(
            "this llama.cpp is from before it had the model family (build b10437)", where=f"{folder}, {where}", fix=fix
        )
    return folder.resolve()


def convert(text01: Path, out: Path, *, sources: Path, dtype: str, name: str) -> None:
    """Write the gguf file ``out`` from the ``text01`` export in ``text01``, in a child process.

    llama.cpp has a list of known tokenizers, by a hash; for the others its converter stops. Where it does, and the tokenizer
    splits text with the pattern of ``m1 prepare-data``, the answer is ``SAME_SPLIT`` (``convert_child``).

    Args:
        dtype: ``fp32`` or ``bf16``; vectors and routers are stored in fp32 in any case.
        name: the model's name in the file.

    Raises:
        CheckpointError: the converter failed; the message has its last line.
    """
    child = Path(__file__).with_name("convert_child.py")
    command = [sys.executable, str(child), str(sources), _known_split(text01)]
    command += [str(text01), "--outfile", str(out), "--outtype", _OUT_TYPES[dtype], "--model-name", name]
    environment = {key: value for key, value in os.environ.items() if key != "NO_LOCAL_GGUF"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not out.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"llama.cpp's converter ended with {done.returncode}: {said[-1] if said else 'it said nothing'}",
            where=str(sources / CONVERTER),
            fix=_fix(done.stderr),
        )


def _known_split(text01: Path) -> str:
    """llama.cpp's name of the tokenizer's split where it is ours; empty for any other."""
    steps = json.loads((text01 / "tokenizer.json").read_bytes()).get("pre_tokenizer") or {}
    patterns = [step.get("pattern") for step in steps.get("pretokenizers", [steps]) if step.get("type") == "Split"]
    return SAME_SPLIT if patterns == [{"Regex": SPLIT_PATTERN}] else ""


def _fix(said: str) -> str:
    if "No module named" in said:
        return 'pip install "m1cli[gguf]"'
    if "get_vocab_base_pre" in said:
        return (
            "use a tokenizer that llama.cpp knows, or one that m1 prepare-data trained; or export with --target text01"
        )
    return "export with --target text01, and convert by hand to see all that the converter says"
