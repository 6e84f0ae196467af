"""Megatron-Core's optimizer, built from our configuration and stepped with a decision in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m1_stages.config import OptimConfig
from m1_stages.errors import ConfigError
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer.gather import GatheredState
from m1_stages.runtime.optimizer.offload import HostState


class Optimizer:
    """AdamW over a rank's parameters: dense and expert parameters are chained, vectors have no weight decay.

    The learning rate is set before every step (``set_learning_rate``), so no scheduler state exists.

    Args:
        bf16: parameters are bf16 and have fp32 master weights.
        distributed: the state is sharded over the data-parallel ranks.

    Raises:
        ConfigError: ``optim.offload`` without a GPU.
    """

    def __init__(self, model: TrainableModel, optim: OptimConfig, *, bf16: bool, distributed: bool) -> None:
        if optim.offload and not next(model[0].parameters()).is_cuda:
            raise ConfigError(
                "optim.offload moves the optimizer's state off a GPU, and this run has none",
                where="key optim.offload",
                fix="leave the key out on a CPU",
            )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(
            optimizer="adam",
            lr=1.0,  # constants: Megatron tells the parameter groups of a loaded state by them
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
        self.megatron: Any = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=False)
        self._optim = optim
        self._configure_groups()
        self._fuse()
        self.host_state = HostState(self.parts, model) if optim.offload else None

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers of dense and of expert parameters; one of them where there is only one kind."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    def set_learning_rate(self, lr: float) -> None:
        """Set ``lr`` on every parameter group."""
        for group in self.megatron.param_groups:
            group["lr"] = lr

    def begin_step(self) -> None:
        """Forget the gradients of the last step, and bring the state to host memory where that is configured."""
        self.megatron.zero_grad()
        if self.host_state is not None:
            self.host_state.offload()

    def prepare_gradients(self) -> None:
        """After the backward passes: bring the state back, and hand the reduced gradients to the main parameters."""
        if self.host_state is not None:
            self.host_state.reload()
        self.megatron.prepare_grads()

    @torch.no_grad()
    def apply_gradients(self, *, scale: float) -> None:
        """Multiply the prepared gradients by ``scale`` and update the parameters."""
        for part in self.parts:
            grads = [param.grad for param in part.get_parameters() if param.grad is not None]
            if grads and scale != 1.0:
                torch._foreach_mul_(grads, scale)
        self.megatron.step_with_ready_grads()

    def sharded_state_dict(
        self, model_state: dict[str, Any], *, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State as ``dist_checkpointing`` takes it, beside the model's ``sharded_state_dict``."""
        state: dict[str, Any] = self.megatron.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        return state

    def gathered_state(self) -> GatheredState | None:
        """Return how a checkpoint gets the state of the distributed optimizer; None where each rank holds its own whole."""
        parts = self._distributed_parts()
        return GatheredState(parts) if parts else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``sharded_state_dict`` of the same layout gave, filled; inside ``loading``.

        The configured betas, eps and weight decay stay in force, whatever the state was saved with.
        """
        self.megatron.load_state_dict(state)
        self._configure_groups()

    @torch.no_grad()
    def start_afresh(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Forget all moments, and take the master weights from the model's parameters, which were loaded without them.

        Args:
            exact: fp32 values of parameters that are rounded in the model: the masters start from these.
        """
        for part in self.parts:
            if part.optimizer is not None:
                part.optimizer.state.clear()
        self.megatron.reload_model_params()
        distributed = self._distributed_parts()
        for part in distributed:
            for param in exact.keys() & part.model_param_group_index_map.keys():
                group, order = part.model_param_group_index_map[param]
                mine = part._get_model_param_range_map(param)["param"]
                main = part.optimizer.param_groups[group]["params"][order]
                main.copy_(exact[param].reshape(-1)[mine.start : mine.end])
        for param, values in () if distributed else exact.items():
            if param.requires_grad:  # a frozen one has no master
                param.main_param.copy_(values)  # type: ignore[attr-defined]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Surround making, reading and loading a sharded state dict.

        Megatron's distributed optimizer with torch's AdamW needs it. Without Transformer Engine or Apex it counts on state
        that a fresh AdamW does not have, and looks for a ``step`` in the loaded tensors that its own checkpoint keeps
        elsewhere (``distrib_optimizer.py``, ``state_dict`` and ``_set_main_param_and_optimizer_states``).
        """
        parts = self._distributed_parts()
        for part in parts:
            _create_state(part)
            part._set_main_param_and_optimizer_states = _SetWithStep(part)  # on the instance, inside this context only
        try:
            yield
        finally:
            for part in parts:
                del part._set_main_param_and_optimizer_states  # the class's own method answers again
        self.separate_step_counters()

    def separate_step_counters(self) -> None:
        """Give every parameter its own step counter: the load shares one tensor, which each parameter would then advance."""
        for part in self._distributed_parts():
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()
        self._fuse()

    def _configure_groups(self) -> None:
        """Set what Megatron leaves to its scheduler, which we do not use: vectors have a ``wd_mult`` of 0."""
        for group in self.megatron.param_groups:
            group["betas"] = (self._optim.beta1, self._optim.beta2)
            group["eps"] = self._optim.eps
            group["weight_decay"] = self._optim.weight_decay * group["wd_mult"]

    def _fuse(self) -> None:
        """Let torch's AdamW update all parameters in one kernel on a GPU; Megatron does not ask for it.

        The step counters are then on the device, so loaded ones move there.
        """
        for part in self.parts:
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                on_gpu = all(param.is_cuda for param in group["params"])
                group["fused"] = True if on_gpu else None
                for param in group["params"] if on_gpu else ():
                    state = part.optimizer.state.get(param)
                    if state and "step" in state:
                        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)

    def _distributed_parts(self) -> list[Any]:
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        return [part for part in self.parts if isinstance(part, DistributedOptimizer)]


def _create_state(part: Any) -> None:
    inner = part.optimizer
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                inner.state[param] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


class _SetWithStep:
    """Megatron's ``_set_main_param_and_optimizer_states`` with the ``step`` that it looks for."""

    def __init__(self, part: Any) -> None:
        self._part, self._original = part, type(part)._set_main_param_and_optimizer_states

    def __call__(self, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self._part.model_param_group_index_map[model_param]
        main = self._part.optimizer.param_groups[group]["params"][order]
        self._original(self._part, model_param, {**tensors, "step": self._part.optimizer.state[main]["step"]})
