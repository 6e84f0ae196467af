"""CPU or GPU, and the one place that lets Megatron-Core run without CUDA.

Megatron-Core 0.19.2 calls ``torch.cuda`` directly for devices, random state and streams. On a machine without CUDA those
calls are answered for the CPU. The redirection is installed before ``megatron.core`` is imported, is never active where
CUDA exists, and counts what it answers (``hits``), so that an upgrade that adds a call shows in a test.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from m1_stages.errors import EnvironmentProblem
from m1_stages.runtime.imports import import_megatron

_hits: Counter[str] = Counter()
_installed = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The device that this process computes on."""

    name: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: Literal["gloo", "nccl"]
    why: str

    def gpu_name(self) -> str:
        """Name that the driver gives the GPU; empty on a CPU."""
        return torch.cuda.get_device_name(self.torch_device) if self.name == "cuda" else ""

    def synchronize(self) -> None:
        """Wait until a GPU has done what it was given."""
        if self.name == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def reset_peak_memory(self) -> None:
        """Start a new peak on a GPU, so that a stage does not report the one before; a process on a CPU keeps its peak."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_memory_gib(self) -> float:
        """Largest memory in use: of the GPU since ``reset_peak_memory``, or of this process since it started on a CPU."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def use(name: str, *, local_rank: int = 0) -> Device:
    """Choose the device of this process and import Megatron-Core; on a CPU, redirect its CUDA calls first. Idempotent.

    Raises:
        EnvironmentProblem: CUDA asked for and absent, CPU asked for on a machine with CUDA, or fewer GPUs than processes.
    """
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise EnvironmentProblem(
            "run.device is cuda, but torch sees no CUDA device",
            where=f"torch {torch.__version__}",
            fix="install a CUDA build of torch and a driver, or set run.device = auto",
        )
    if name == "cpu" and cuda:
        raise EnvironmentProblem(
            "run.device is cpu on a machine with CUDA: Megatron-Core would mix both",
            fix="hide the GPUs: CUDA_VISIBLE_DEVICES= m1 …",
        )
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentProblem(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible",
                fix="lower parallel.processes",
            )
        torch.cuda.set_device(local_rank)
        import_megatron()
        return Device(name="cuda", torch_device=torch.device("cuda", local_rank), backend="nccl", why="torch sees CUDA")
    _install()
    return Device(name="cpu", torch_device=torch.device("cpu"), backend="gloo", why="torch sees no CUDA device")


def hits() -> dict[str, int]:
    """Count how often each redirected call was answered since the start; empty where CUDA exists."""
    return dict(_hits)


def _install() -> None:
    global _installed
    if _installed:
        return
    if "megatron.core.parallel_state" in sys.modules:
        raise RuntimeError("device.use must be called before megatron.core is imported")
    _installed = True
    for name, answer in _CUDA_ANSWERS.items():
        setattr(torch.cuda, name, _counted(name, answer))
    torch.cuda.Stream = _Stream  # type: ignore[misc,assignment]  # stays a class: others write it in annotations
    _RedirectCuda().__enter__()
    threading.Thread.run = _with_redirection(threading.Thread.run)  # type: ignore[method-assign]
    import_megatron()
    _patch_megatron()


def _counted(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _hits[f"torch.cuda.{name}"] += 1
        return answer(*args, **kwargs)

    return call


class _Stream:
    """A stream or event on a CPU: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _hits["torch.cuda.Stream"] += 1

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or self


def _no_stream(stream: Any = None) -> AbstractContextManager[None]:
    return nullcontext()


_CUDA_ANSWERS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.random.default_generator.manual_seed(seed),
    "stream": _no_stream,
    "current_stream": lambda device=None: _Stream(),
}


class _RedirectCuda(TorchFunctionMode):
    """Rewrites ``device="cuda"``, ``pin_memory``, ``.cuda()`` and the type strings of tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            _hits["Tensor.cuda"] += 1
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            _hits["Tensor.type"] += 1
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            _hits['device="cuda"'] += 1
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            _hits["pin_memory"] += 1
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _with_redirection(run: Callable[..., None]) -> Callable[..., None]:
    """Function modes belong to a thread: enter one in threads started later (not in classes with a ``run`` of their own)."""

    def wrapped(self: threading.Thread) -> None:
        with _RedirectCuda():
            run(self)

    return wrapped


def _patch_megatron() -> None:
    """Three functions of Megatron-Core that no call into ``torch.cuda`` explains."""
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import token_dispatcher

    def get_state(device: Any = -1, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        _hits["random._get_cuda_rng_state"] += 1
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        _hits["random._set_cuda_rng_state"] += 1
        torch.set_rng_state(new_state)

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        _hits["token_dispatcher.maybe_move_tensor_to_cpu"] += 1
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu
