"""Decay rates of the lightning layers per stage, layer and head, and the ramp between stages.

A head with slope ``s`` forgets by ``exp(-s)`` per token: its half-life is ``ln 2 / s`` tokens. Everything here is plain
Python floats, so the numbers can be printed, plotted and checkpointed without torch.

The released slopes are ``2 ** (-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)`` for the 0-based head ``h`` of ``H``
and the global layer ``l`` of ``L`` (transformers ``modeling_minimax.py``, ``get_slope_rate``).
Other loaders compute them from the configuration, so only a model that ends on exactly these is portable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from m1_stages.config import CurriculumConfig, ModelConfig, Resolved
from m1_stages.errors import ConfigError

Slopes = list[list[float]]
"""``[num_layers][num_heads]``, tokens^-1, all > 0. Rows of softmax layers are kept but unused."""

FULL_CONTEXT_TOKENS = 1_048_576
BASE_CONTEXT_TOKENS = 32_768


def released_slopes(num_layers: int, num_heads: int) -> Slopes:
    """The slopes every other loader of this model family computes."""
    heads = [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]
    return [[rate * (1.0 - layer / (num_layers - 1 + 1e-5) + 1e-5) for rate in heads] for layer in range(num_layers)]


def half_life_tokens(slope: float) -> float:
    """Tokens after which a head has forgotten half."""
    return math.log(2.0) / slope


def stage_slopes(resolved: Resolved, stage: str) -> Slopes:
    """The slopes ``stage`` ends with under the configured policy.

    Raises:
        ConfigError: a ``custom`` table that is missing or does not fit the model.
    """
    config = resolved.config
    if config.curriculum.decay == "custom":
        return _custom(resolved, stage)
    return policy_slopes(config.curriculum, config.model, config.stages[stage].context_tokens)


def policy_slopes(curriculum: CurriculumConfig, model: ModelConfig, context_tokens: int) -> Slopes:
    """Slopes of the ``fixed``, ``relax`` and ``stretch`` policies at a full-scale context length.

    ``relax``: released * (1M / context) ** exponent, so exactly the released slopes at 1M.
    ``stretch``: released * (32K / context) ** exponent of the layer, so memory grows beyond the released slopes.
    """
    released = released_slopes(model.num_layers, model.num_heads)
    if curriculum.decay == "fixed":
        return released
    if curriculum.decay == "relax":
        factor = (FULL_CONTEXT_TOKENS / context_tokens) ** curriculum.relax_exponent
        return [[slope * factor for slope in row] for row in released]
    exponents = curriculum.stretch_exponent
    if len(exponents) == 1:
        exponents = exponents * model.num_layers
    ratio = BASE_CONTEXT_TOKENS / context_tokens
    return [[slope * ratio**e for slope in row] for row, e in zip(released, exponents, strict=True)]


def is_released(slopes: Sequence[Sequence[float]], model: ModelConfig, *, rel_tol: float = 1e-6) -> bool:
    """Whether the lightning rows of ``slopes`` are the released ones, so that every loader computes the same."""
    reference = released_slopes(model.num_layers, model.num_heads)
    return all(
        math.isclose(a, b, rel_tol=rel_tol)
        for layer in range(model.num_layers)
        if not model.is_softmax(layer)
        for a, b in zip(slopes[layer], reference[layer], strict=True)
    )


def ramp(old: Slopes, new: Slopes, progress: float) -> Slopes:
    """Slopes at ``progress`` of the way from ``old`` to ``new``, linear in the logarithm.

    ``progress`` 0 returns ``old`` and 1 returns ``new`` exactly; between them every slope lies between its two ends.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"ramp progress {progress} is outside [0, 1]")
    if progress == 0.0 or progress == 1.0:
        return [list(row) for row in (new if progress else old)]
    return [
        [math.exp((1.0 - progress) * math.log(a) + progress * math.log(b)) for a, b in zip(ra, rb, strict=True)]
        for ra, rb in zip(old, new, strict=True)
    ]


def _custom(resolved: Resolved, stage: str) -> Slopes:
    key, model = "curriculum.custom_table", resolved.config.model
    path = resolved.path(resolved.config.curriculum.custom_table)
    where = f"{resolved.origins.get(key, '')}, key {key}"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the custom decay table: {error}", where=where, fix=f"put valid JSON at {path}"
        ) from error
    rows: Any = table.get(stage) if isinstance(table, dict) else None
    shape_ok = (
        isinstance(rows, list)
        and len(rows) == model.num_layers
        and all(isinstance(row, list) and len(row) == model.num_heads for row in rows)
        and all(isinstance(s, (int, float)) and 0 < s < math.inf for row in rows for s in row)
    )
    if not shape_ok:
        raise ConfigError(
            f"the custom decay table has no [{model.num_layers}][{model.num_heads}] list of slopes > 0 for {stage}",
            where=f"{path}, key {stage}",
            fix="give one row per layer (rows of softmax layers are ignored) and one slope per head",
        )
    return [[float(s) for s in row] for row in rows]
