"""How layers are cut into pipeline chunks, and steps into the micro-batches that a pipeline takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from m1_stages.config import STAGE_NAMES, ParallelConfig
from m1_stages.config.load import load_config
from m1_stages.curriculum import plan_stage
from m1_stages.errors import ConfigError
from m1_stages.training.micro_batches import micro_batch_rows, refuse_uneven_pipeline


@pytest.mark.parametrize(
    ("sizes", "num_layers", "chunks"),
    [
        (ParallelConfig(), 8, (8,)),
        (ParallelConfig(pipeline=2), 8, (4, 4)),
        (ParallelConfig(pipeline=3), 8, (3, 3, 2)),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 10, (3, 3, 2, 2)),
        (ParallelConfig(pipeline=2, pipeline_layers=(5, 3)), 8, (5, 3)),
    ],
)
def test_layers_of_chunks(sizes: ParallelConfig, num_layers: int, chunks: tuple[int, ...]) -> None:
    assert sizes.chunk_layers(num_layers) == chunks


def write(folder: Path, tokens: int, rows: int = 1) -> Path:
    """``tokens`` a step in stage 32k, whose rows have 128, and ``rows`` at a time."""
    path = folder / "m1.toml"
    path.write_text(
        'preset = "tiny"\n[parallel]\npipeline = 2\nvirtual_pipeline = 2\n[stages.32k]\n'
        f"global_batch_tokens = {tokens}\nmicro_batch_rows = {rows}\n"
    )
    return path


@pytest.mark.parametrize(
    ("tokens", "rows", "dp_size", "count"),
    [
        (512, 1, 4, "has 1 on each of 4 data-parallel ranks (4 rows a step, 1 at a time)"),
        (512, 4, 1, "has 1 on each of 1 data-parallel ranks (4 rows a step, 4 at a time)"),
        (384, 1, 1, "has 3 on each of 1 data-parallel ranks (3 rows a step, 1 at a time)"),
        (128, 1, 2, "has 0 on each of 2 data-parallel ranks (1 rows a step, 1 at a time)"),
    ],
)
def test_micro_batches_that_do_not_divide_are_refused_before_training(
    tmp_path: Path, tokens: int, rows: int, dp_size: int, count: str
) -> None:
    resolved = load_config(write(tmp_path, tokens, rows))
    with pytest.raises(ConfigError) as error:
        refuse_uneven_pipeline(resolved, [plan_stage(resolved, "32k")], dp_size)
    assert count in error.value.what
    assert error.value.where.startswith(f"{tmp_path / 'm1.toml'}:4, key parallel.virtual_pipeline")
    assert "raise stages.32k.global_batch_tokens or lower stages.32k.micro_batch_rows" in error.value.fix


@pytest.mark.parametrize(("rows", "dp_size"), [(1, 2), (1, 1), (2, 1)])
def test_micro_batches_that_divide_are_accepted(tmp_path: Path, rows: int, dp_size: int) -> None:
    resolved = load_config(write(tmp_path, 512, rows))
    refuse_uneven_pipeline(resolved, [plan_stage(resolved, "32k")], dp_size)


def test_a_plain_pipeline_takes_any_number(tmp_path: Path) -> None:
    resolved = load_config(write(tmp_path, 384), ["parallel.virtual_pipeline=1"])
    plans = [plan_stage(resolved, stage) for stage in STAGE_NAMES]
    assert plans[0].global_batch_rows == 3
    refuse_uneven_pipeline(resolved, plans, 1)


def test_rows_of_a_micro_batch_divide_what_a_rank_has(tmp_path: Path) -> None:
    plan = plan_stage(load_config(write(tmp_path, 1536, 4)), "32k")
    assert plan.global_batch_rows == 12
    assert [micro_batch_rows(plan, dp) for dp in (1, 2, 3, 4, 6, 12, 24)] == [4, 3, 4, 3, 2, 1, 1]
