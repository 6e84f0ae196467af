"""The device and the process groups: what is refused, and what the CPU redirection covers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from m1_stages.config import ParallelConfig
from m1_stages.errors import ConfigError, EnvironmentProblem
from m1_stages.runtime import collectives as together
from m1_stages.runtime import device, parallel

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected where CUDA exists")
GLOO = device.Device(name="cpu", torch_device=torch.device("cpu"), backend="gloo", why="test")


def test_cpu_is_refused_where_cuda_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentProblem, match="CUDA_VISIBLE_DEVICES=") as error:
        device.use("cpu")
    assert "run.device is cpu" in error.value.what


def test_cuda_is_refused_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="no CUDA device"):
        device.use("cuda")


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EnvironmentProblem, match="local rank 2 has no GPU: 2 are visible"):
        device.use("auto", local_rank=2)


@on_cpu
def test_redirecting_after_megatron_was_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.parallel_state  # noqa: F401

    monkeypatch.setattr(device, "_installed", False)
    with pytest.raises(RuntimeError, match=r"before megatron\.core is imported"):
        device.use("cpu")


@on_cpu
def test_choosing_twice_redirects_once() -> None:
    device.use("cpu")
    device.use("auto")
    before = device.hits().get('device="cuda"', 0)
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert device.hits()['device="cuda"'] == before + 1


@on_cpu
def test_threads_are_redirected_too() -> None:
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(2, device="cuda").device.type))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        seen.append(pool.submit(lambda: torch.ones(1).cuda().device.type).result())
    assert seen == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (3, {"tensor": 2}, "tensor x pipeline x context = 2 does not divide the 3 processes"),
        (2, {"expert": 4}, "expert x expert_tensor x pipeline = 4 does not divide the 2 processes"),
        (4, {"expert": 2, "expert_tensor": 2}, "expert = 2 and expert_tensor = 2 together need GPUs with dispatcher ="),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, world: int, sizes: dict[str, int], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError) as error:
        parallel.start(ParallelConfig(**sizes), device=GLOO, seed=1)
    assert message in error.value.what
    assert "expert" not in sizes or world < 4 or 'set dispatcher = "allgather"' in error.value.fix
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [3]), ("gloo", None)])
def test_a_rank_waits_on_its_own_gpu(backend: str, devices: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself NCCL takes the GPU with the number of the rank."""
    asked = []
    monkeypatch.setattr(together, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: asked.append(device_ids))
    together.barrier()
    assert asked == [devices]
