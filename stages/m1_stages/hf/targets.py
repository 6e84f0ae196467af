"""The kinds of exports: what each one can express, and how an existing folder is recognised. No torch.

``hf`` is what transformers reads, ``text01`` the released dialect (released code, vLLM <= 0.23, llama.cpp's converter), ``gguf``
a file for llama.cpp. A model is exported to a target exactly, or refused with the targets that can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, is_released
from m1_stages.errors import CheckpointError, ConfigError

Target = Literal["hf", "text01", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
ARCHITECTURES = {"MiniMaxText01ForCausalLM": "minimax_text_01", "MiniMaxM1ForCausalLM": "minimax_m1"}
"""``model_type`` of the classes of the released code; both compute the same."""

RELEASED_NORM_EPS = 1e-6
"""Epsilon of the lightning output norm in transformers and in the released code, which read no other."""
LLAMA_CPP_SOFTMAX_EVERY = 8
"""Layers from one softmax layer to the next in llama.cpp: its converter stores no layer pattern."""


class Obstacle(NamedTuple):
    """One property of a model that a target cannot express."""

    what: str
    key: str


def obstacles(target: Target, model: ModelConfig, slopes: Slopes) -> list[Obstacle]:
    """Return why ``target`` cannot hold the model exactly; empty when it can."""
    found = []
    released = is_released(slopes, model)
    if target != "hf" and not released:
        found.append(
            Obstacle(
                "the decay rates are not the released ones, and only transformers reads others", "curriculum.decay"
            )
        )
    if target == "text01" and model.num_heads & (model.num_heads - 1):
        found.append(
            Obstacle(
                f"the released code has other decay rates for {model.num_heads} heads, no power of two",
                "model.num_heads",
            )
        )
    if target == "gguf":
        if model.softmax_every != LLAMA_CPP_SOFTMAX_EVERY:
            found.append(
                Obstacle(
                    f"every {model.softmax_every}th layer is a softmax layer, and llama.cpp takes every "
                    f"{LLAMA_CPP_SOFTMAX_EVERY}th for one",
                    "model.softmax_every",
                )
            )
        if model.beta != 1.0:
            found.append(Obstacle(f"beta is {model.beta:g}, and llama.cpp knows only 1", "model.beta"))
        if model.lightning_norm_eps not in (RELEASED_NORM_EPS, model.norm_eps):
            found.append(
                Obstacle(
                    f"llama.cpp computes the lightning output norm with the epsilon of the others, {model.norm_eps:g}, and "
                    f"this model was trained with {model.lightning_norm_eps:g}",
                    "model.lightning_norm_eps",
                )
            )
    elif model.lightning_norm_eps != RELEASED_NORM_EPS:
        who = "transformers" if target == "hf" else "the released code"
        found.append(
            Obstacle(
                f"{who} computes the lightning output norm with epsilon {RELEASED_NORM_EPS:g} and reads no other, but this "
                f"model was trained with {model.lightning_norm_eps:g}",
                "model.lightning_norm_eps",
            )
        )
    return found


def refuse_inexact(target: Target, model: ModelConfig, slopes: Slopes) -> None:
    """Refuse a target that would compute another function than the model.

    Raises:
        ConfigError: names what the target cannot express, and the targets that can.
    """
    found = obstacles(target, model, slopes)
    if not found:
        return
    able = [other for other in TARGETS if not obstacles(other, model, slopes)]
    raise ConfigError(
        f"target {target} cannot hold this model: {'; '.join(obstacle.what for obstacle in found)}",
        where=f"key {found[0].key}",
        fix=f"m1 export --target {able[0]}" if able else f"no target can; train with another {found[0].key}",
    )


def gguf_name(dtype: str) -> str:
    """Return the name of the weight file of a ``gguf`` export of ``dtype``."""
    return f"model-{dtype}.gguf"


def target_of(folder: Path) -> Target:
    """Recognise the target of an existing export by its files.

    Raises:
        CheckpointError: the folder is no export of a kind that m1 writes.
    """
    if any(folder.glob("*.gguf")):
        return "gguf"
    try:
        classes = json.loads((folder / "config.json").read_bytes())["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the folder has neither a .gguf file nor a config.json that names its class: {error!r}",
            where=str(folder),
            fix="name a folder that m1 export wrote",
        ) from error
    if classes == ["MiniMaxForCausalLM"]:
        return "hf"
    if isinstance(classes, list) and len(classes) == 1 and classes[0] in ARCHITECTURES:
        return "text01"
    raise CheckpointError(
        f"architectures is {classes!r}, and m1 exports MiniMaxForCausalLM, {' or '.join(ARCHITECTURES)}",
        where=str(folder / "config.json"),
        fix="do not use this export; write it again with --overwrite",
    )
