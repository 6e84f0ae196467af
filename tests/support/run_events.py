"""Events of a small run, for tests of what is shown of them: stages of ten steps of 512 tokens."""

from __future__ import annotations

from m1_stages.decay import released_slopes
from m1_stages.events import RunStarted, StageStarted, StepDone

SLOPES = released_slopes(8, 4)
MIX = {
    "core": {"wanted": 0.7, "reached": 0.63},
    "domains": {"code": {"wanted": 0.7, "reached": 0.63}, "general": {"wanted": 0.3, "reached": 0.37}},
    "length_classes": {"short": {"wanted": 1.0, "reached": 1.0}},
    "epochs": [{"source": "web", "bucket": "lt32k", "epochs": 0.5}],
}


def run_started() -> RunStarted:
    return RunStarted(
        command="m1", run_dir="run", config_sha256="c", preset="tiny", device="cpu", precision="fp32", world_size=1,
        topology={"world": 1}, parameters=2_000_000, active_parameters=500_000, versions={"torch": "2.13.0"},
        backends={}, resumed_from="", data=[], saves="",
    )  # fmt: skip


def stage_started(name: str, step: int = 0) -> StageStarted:
    return StageStarted(
        stage=name, step=step, num_steps=10, seq_len=128, context_tokens=32_768, rope_base=1e6, global_batch_rows=4,
        tokens=5_120, lr_peak=1e-3, lr_final=1e-4, decay_policy="relax", ramp_steps=0, slopes_old=SLOPES, slopes_new=SLOPES,
        softmax_layers=[7], mix=MIX, title="stage 32k", starts_from="random weights", recompute=False, offload_activations=False,
        activations="kept: on a CPU",
    )  # fmt: skip


def step_done(name: str, n: int, offset: int = 0, loss: float | None = None) -> StepDone:
    return StepDone(
        stage=name, step=n, global_step=offset + n, tokens_seen=512 * (offset + n + 1),
        loss=7.0 - 0.1 * n if loss is None else loss,
        aux_loss=0.02, grad_norm=0.5, layer_grad_norms=[0.1] * 8, lr=1e-3, step_s=0.5, tokens_per_s=1024.0,
        half_lives=[*[[1.0, 2.0]] * 7, []], ramp_progress=0.0,
        trained_tokens=512, metrics={}, expert_load=[[0.25] * 4] * 8, peak_gib=1.0, sample_ids=[0, 1, 2, 3],
    )  # fmt: skip
