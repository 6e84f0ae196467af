"""Megatron-Core's optimizer, built from our configuration and stepped with a decision in between."""

from __future__ import annotations

from typing import Any

import torch

from m1_stages.config import OptimConfig
from m1_stages.errors import ConfigError
from m1_stages.runtime.optimizer_offload import HostState


def build_optimizer(chunks: list[Any], optim: OptimConfig, *, bf16: bool, distributed: bool) -> Any:
    """AdamW over DDP-wrapped ``chunks``: dense and expert parameters are chained, vectors have no weight decay.

    The learning rate is set before every step (``set_learning_rate``), so no scheduler state exists.

    Raises:
        ConfigError: ``optim.offload`` without a GPU.
    """
    if optim.offload and not next(chunks[0].parameters()).is_cuda:
        raise ConfigError(
            "optim.offload moves the optimizer's state off a GPU, and this run has none",
            where="key optim.offload",
            fix="leave the key out on a CPU",
        )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=1.0,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    _fuse(optimizer)
    optimizer.host_state = HostState(optimizer, chunks) if optim.offload else None
    return optimizer


def _fuse(optimizer: Any) -> None:
    """On a GPU let torch's AdamW update all parameters in one kernel; Megatron does not ask for it.

    Its step counters are then on the device, where loaded ones have to be brought.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            on_gpu = all(param.is_cuda for param in group["params"])
            group["fused"] = True if on_gpu else None
            for param in group["params"] if on_gpu else ():
                state = part.optimizer.state.get(param)
                if state and "step" in state:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set ``lr`` on every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_loadable(optimizer: Any) -> None:
    """Prepare for loading a checkpoint; only Megatron's distributed optimizer with torch's AdamW needs it.

    Without Transformer Engine or Apex it counts on state that a fresh AdamW does not have, and looks for a ``step`` in the
    loaded tensors that its own checkpoint keeps elsewhere (``distrib_optimizer.py``, ``state_dict`` and
    ``_set_main_param_and_optimizer_states``).
    """
    for part in _distributed_parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        part._set_main_param_and_optimizer_states = _SetWithStep(part)


def finish_loading(optimizer: Any) -> None:
    """Give every parameter its own step counter: the load shares one tensor, which each parameter would then advance."""
    for part in _distributed_parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()
    _fuse(optimizer)


class _SetWithStep:
    def __init__(self, part: Any) -> None:
        self._part, self._original = part, type(part)._set_main_param_and_optimizer_states

    def __call__(self, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self._part.model_param_group_index_map[model_param]
        main = self._part.optimizer.param_groups[group]["params"][order]
        self._original(self._part, model_param, {**tensors, "step": self._part.optimizer.state[main]["step"]})


def _distributed_parts(optimizer: Any) -> list[Any]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [p for p in getattr(optimizer, "chained_optimizers", [optimizer]) if isinstance(p, DistributedOptimizer)]
