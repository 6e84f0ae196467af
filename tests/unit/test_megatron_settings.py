"""The settings of Megatron-Core that give wrong results without an error when they are wrong: docs/traps.md."""

from __future__ import annotations

import pytest

from m1_stages.config import ModelConfig, ParallelConfig

MODEL = ModelConfig(
    hidden_size=32, num_layers=16, num_heads=4, head_dim=8, num_kv_heads=2, rotary_dim=8, num_experts=4,
    expert_hidden_size=48, vocab_size=250,
)  # fmt: skip


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("pipeline", [2, 4])
def test_a_plain_pipeline_sends_in_batches(pipeline: int, on_cpu: bool) -> None:
    from m1_stages.model.spec import transformer_config

    config = transformer_config(MODEL, ParallelConfig(pipeline=pipeline), bf16=False, on_cpu=on_cpu)
    assert config.virtual_pipeline_model_parallel_size in (None, 1)
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (True, False)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_an_interleaved_pipeline_of_two_does_not(on_cpu: bool) -> None:
    """Both neighbours are the same process, and batched messages to it cross."""
    from m1_stages.model.spec import transformer_config

    sizes = ParallelConfig(pipeline=2, virtual_pipeline=2)
    config = transformer_config(MODEL, sizes, bf16=False, on_cpu=on_cpu)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (False, True)
