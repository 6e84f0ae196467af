"""The section ``export`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The settings of an export."""

    target: Annotated[
        Literal["hf", "text01", "gguf"],
        "hf: transformers; text01: the released names and configuration, for released code, vLLM <= 0.23 and llama.cpp's "
        "converter; gguf: a file for llama.cpp",
    ] = "hf"
    architecture: Annotated[
        Literal["MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"], "text01: the class that config.json names"
    ] = "MiniMaxText01ForCausalLM"
    llama_cpp: Annotated[
        str, "gguf: folder of llama.cpp's sources, with convert_hf_to_gguf.py (README, Export); empty: none"
    ] = ""
    license: Annotated[str, "licence of the weights, an identifier for the model card; empty: not stated"] = ""
    dtype: Annotated[Literal["fp32", "bf16"], "stored weights; decode in bf16 is unsound in transformers"] = "fp32"
    shard_gib: Annotated[float, "largest safetensors file, GiB"] = 4.0
