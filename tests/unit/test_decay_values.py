"""Decay rates by values: what counts as released, what a custom table must be, and the ends of a ramp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from m1_stages.config import CurriculumConfig, ModelConfig, Resolved
from m1_stages.config.load import load_config
from m1_stages.decay import half_life_tokens, is_released, policy_slopes, ramp, released_slopes, stage_slopes
from m1_stages.errors import ConfigError

MODEL = ModelConfig(
    hidden_size=8, num_layers=4, num_heads=2, head_dim=4, num_kv_heads=1, rotary_dim=4, num_experts=4,
    expert_hidden_size=16, vocab_size=128, softmax_every=4,
)  # fmt: skip


def test_released_slopes_of_two_heads() -> None:
    """2^-4 and 2^-8, falling to almost nothing with the layer."""
    slopes = released_slopes(3, 2)
    assert [row[0] for row in slopes] == pytest.approx(
        [2**-4 * (1 - n / (2 + 1e-5) + 1e-5) for n in range(3)], rel=1e-12
    )
    assert [row[1] / row[0] for row in slopes] == pytest.approx([2**-4] * 3, rel=1e-12)
    assert slopes[0][0] == pytest.approx(0.062500625, rel=1e-9)
    assert slopes[2][0] == pytest.approx(9.375e-7, rel=1e-3)


def test_half_lives() -> None:
    assert half_life_tokens(math.log(2.0)) == 1.0
    assert half_life_tokens(0.5) == pytest.approx(1.3862943611, rel=1e-9)


def test_relaxed_slopes_fall_to_the_released_ones_at_a_million() -> None:
    relax = CurriculumConfig(decay="relax", relax_exponent=0.5)
    released = released_slopes(4, 2)
    assert policy_slopes(relax, MODEL, 1_048_576) == released
    assert policy_slopes(relax, MODEL, 262_144) == [[2.0 * slope for slope in row] for row in released]
    assert policy_slopes(relax, MODEL, 65_536) == [[4.0 * slope for slope in row] for row in released]


def test_stretched_slopes_fall_from_the_released_ones_at_32k() -> None:
    released = released_slopes(4, 2)
    stretch = CurriculumConfig(decay="stretch", stretch_exponent=(0.5,))
    assert policy_slopes(stretch, MODEL, 32_768) == released
    assert policy_slopes(stretch, MODEL, 131_072) == [[slope / 2.0 for slope in row] for row in released]
    each = CurriculumConfig(decay="stretch", stretch_exponent=(0.0, 0.5, 1.0, 1.5))
    found = policy_slopes(each, MODEL, 131_072)
    assert found == [[slope / divisor for slope in row] for row, divisor in zip(released, (1, 2, 4, 8), strict=True)]


@pytest.mark.parametrize(("factor", "expected"), [(1.0, True), (1 + 9e-7, True), (1 - 9e-7, True), (1 + 1.1e-6, False)])
@pytest.mark.parametrize("layer", [0, 2])
def test_released_is_meant_to_a_millionth(layer: int, factor: float, expected: bool) -> None:
    slopes = released_slopes(4, 2)
    slopes[layer][1] *= factor
    assert is_released(slopes, MODEL) is expected


def test_rows_of_softmax_layers_do_not_matter() -> None:
    slopes = released_slopes(4, 2)
    slopes[3] = [1.0, 1.0]
    assert is_released(slopes, MODEL)


def test_ramps_have_two_ends_and_nothing_beyond() -> None:
    old, new = [[0.25, 1.0]], [[1.0, 0.25]]
    assert (ramp(old, new, 0.0), ramp(old, new, 1.0)) == (old, new)
    assert ramp(old, new, 0.5) == [[pytest.approx(0.5, rel=1e-12)] * 2]
    assert ramp(old, new, 0.25)[0] == pytest.approx([0.25**0.75, 0.25**0.25], rel=1e-12)
    tenths = [[n / 10 for n in range(1, 10)]]
    assert (ramp(tenths, new, 0.0), ramp(new, tenths, 1.0)) == (tenths, tenths), "to the last bit"
    assert ramp(old, new, 1.0)[0] is not new[0], "a copy: whoever changes it changes no plan"
    for progress in (-0.01, 1.01, 1.5):
        with pytest.raises(ValueError, match="outside"):
            ramp(old, new, progress)


def custom(folder: Path, table: Any) -> Resolved:
    (folder / "decay.json").write_text(table if isinstance(table, str) else json.dumps(table))
    (folder / "m1.toml").write_text(
        'preset = "tiny"\n[model]\nnum_layers = 2\nsoftmax_every = 2\nnum_heads = 2\nnum_kv_heads = 1\n'
        '[curriculum]\ndecay = "custom"\ncustom_table = "decay.json"\n'
    )
    return load_config(folder / "m1.toml")


def test_a_custom_table_is_taken_as_it_is(tmp_path: Path) -> None:
    resolved = custom(tmp_path, {"32k": [[1, 0.5], [0.25, 2]]})
    assert stage_slopes(resolved, "32k") == [[1.0, 0.5], [0.25, 2.0]]
    assert all(isinstance(slope, float) for row in stage_slopes(resolved, "32k") for slope in row)


@pytest.mark.parametrize(
    "rows",
    [[[1, 1]], [[1, 1]] * 3, [[1, 1], [1]], [[1, 1], [1, 1, 1]], [[1, 1], [1, 0]], [[1, 1], [1, -1]], [[1, 1], [1, "1"]],
     [[1, 1], 1], "no list", None, [[1, 1], [1, math.inf]], [[1, 1], [1, math.nan]]],
    ids=["a layer less", "a layer more", "a head less", "a head more", "0", "negative", "text", "no row", "no rows", "null",
         "infinite", "NaN"],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(rows: Any, tmp_path: Path) -> None:
    resolved = custom(tmp_path, {"32k": rows})
    with pytest.raises(ConfigError, match=r"no \[2\]\[2\] list of slopes > 0 for 32k") as caught:
        stage_slopes(resolved, "32k")
    assert caught.value.where == f"{tmp_path}/decay.json, key 32k"


@pytest.mark.parametrize("table", ["{", None], ids=["no JSON", "no file"])
def test_a_table_that_cannot_be_read_is_named(table: str | None, tmp_path: Path) -> None:
    resolved = custom(tmp_path, table or "")
    if table is None:
        (tmp_path / "decay.json").unlink()
    with pytest.raises(ConfigError, match="cannot read the custom decay table") as caught:
        stage_slopes(resolved, "32k")
    assert caught.value.where.endswith(", key curriculum.custom_table")


def test_a_table_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="list of slopes > 0 for 32k"):
        stage_slopes(custom(tmp_path, [1]), "32k")
