"""Probes GPUs and collectives in processes of their own: a broken driver or network hangs instead of failing.

This is the part of ``m1 doctor`` that needs torch. ``python -m m1_stages.doctor.probes gloo|nccl|gpus`` is one of these
processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_stages.runtime.rendezvous import LISTENER, inherited_store, listen

_WAIT_S = 60.0
_MIN_CAPABILITY = (8, 0)
"""Lowest compute capability of GPUs with bf16 matrix units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    """How to fix it: a command or a change; empty when the check is ok."""


def has_nvidia() -> bool:
    """Return whether there is an NVIDIA driver, whatever torch reports, and its GPUs are not hidden on purpose."""
    return Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


class Probe:
    """Processes that run one probe together. The constructor starts them; ``result`` waits for them.

    Args:
        what: "gloo", "nccl" or "gpus".
        world: number of processes.
        wait_s: seconds after the start at which the processes are killed.
    """

    def __init__(self, what: str, world: int, *, wait_s: float = _WAIT_S) -> None:
        self._deadline, self._wait_s = time.monotonic() + wait_s, wait_s
        listener = listen()
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]),
                       "WORLD_SIZE": str(world), LISTENER: str(listener.fileno()),
                       "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "m1_stages.doctor.probes", what],
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[listener.fileno()] if rank == 0 else [],
            )
            for rank in range(world)
        ]
        listener.close()

    def result(self) -> tuple[dict[str, Any], str]:
        """Return what the first process found, and why it found nothing: an error's last line, the timeout, or "" if it did."""
        try:
            outputs = [p.communicate(timeout=max(0.1, self._deadline - time.monotonic())) for p in self._processes]
        except subprocess.TimeoutExpired:
            for process in self._processes:
                process.kill()
                process.communicate()
            return {}, f"no answer within {self._wait_s:g} s"
        for process, (_, errors) in zip(self._processes, outputs, strict=True):
            if process.returncode:
                return {}, (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        found: dict[str, Any] = json.loads(outputs[0][0].strip().splitlines()[-1])
        return found, ""


def collective_finding(name: str, probe: Probe, fix: str) -> Finding:
    """Wait for ``probe`` and report whether its processes summed numbers over ``name``."""
    found, error = probe.result()
    if error:
        return Finding(name=name, ok=False, detail=f"all-reduce failed: {error}", fix=fix)
    return Finding(
        name=name, ok=True, detail=f"{found['world']} processes summed {found['mib']} MiB in {found['ms']:.1f} ms"
    )


def gpu_findings(found: dict[str, Any], error: str) -> Iterator[Finding]:
    """Report on each GPU, and on whether driver and torch fit each other."""
    if error:
        yield Finding(name="GPUs", ok=False, detail=f"torch does not get through to them: {error}", fix="nvidia-smi")
        return
    driver, cuda, gpus = found["driver_cuda"], found["torch_cuda"], found["gpus"]
    tag = (
        "cu130" if driver >= 13000 else "cu126"
    )  # the latter's newest torch is 2.14: later ones have no build for CUDA 12
    reinstall = (
        f"{sys.executable} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{tag}"
    )
    supports = f"driver supports CUDA {driver // 1000}.{driver % 1000 // 10}"
    if cuda is None:
        detail = f"torch {found['torch']} is a build for CPUs, and there is an NVIDIA driver"
        yield Finding(
            name="driver", ok=False, detail=detail, fix=f"{reinstall}   (or hide them: CUDA_VISIBLE_DEVICES=)"
        )
        return
    if driver // 1000 < int(cuda.split(".")[0]):
        detail = f"{supports}, torch {found['torch']} was built for {cuda}"
        yield Finding(name="driver", ok=False, detail=detail, fix=f"{reinstall}   (or a newer driver)")
        return
    fix = "" if gpus else "nvidia-smi"
    detail = f"{supports}, torch {found['torch']} was built for {cuda}" + ("" if gpus else ", and sees no GPU")
    yield Finding(name="driver", ok=bool(gpus), detail=detail, fix=fix)
    for number, gpu in enumerate(gpus):
        capability = tuple(gpu["capability"])
        version = ".".join(map(str, capability))
        detail = f"{gpu['name']}, {gpu['gib']:.0f} GiB, {gpu['free_gib']:.0f} free, compute capability {version}"
        fix = ""
        if capability < _MIN_CAPABILITY:
            detail, fix = f"{detail}; bf16 needs 8.0", 'run.precision = "fp32", or another GPU'
        elif not any(arch.split("_")[1][:-1] == str(capability[0]) for arch in found["archs"]):
            detail, fix = f"{detail}; torch has kernels for {', '.join(found['archs'])} only", reinstall
        yield Finding(name=f"GPU {number}", ok=not fix, detail=detail, fix=fix)


def _gpus() -> dict[str, Any]:
    """Return the versions of torch and the driver's CUDA, and the properties of each GPU."""
    import torch

    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = [properties.major, properties.minor]
        gpus.append({"name": properties.name, "gib": total / 2**30, "free_gib": free / 2**30, "capability": capability})
    archs = [arch.rstrip("af") for arch in torch.cuda.get_arch_list()] if gpus else []
    return {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "driver_cuda": version.value, "gpus": gpus,
            "archs": archs}  # fmt: skip


def _all_reduce(backend: str) -> dict[str, Any]:
    """Sum ones over the processes of this probe; return the size and the milliseconds of the second all-reduce.

    Raises:
        RuntimeError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=_WAIT_S / 2)
    dist.init_process_group(
        backend, store=inherited_store(rank, world, timeout), rank=rank, world_size=world, timeout=timeout
    )
    mib = 64 if backend == "nccl" else 1
    for _ in range(2):  # the first connects
        numbers = torch.ones(mib * 2**18, device=device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        total = float(numbers.mean())
        seconds = time.perf_counter() - began
    if total != world:
        raise RuntimeError(f"the sum of {world} ones is {total}")
    dist.destroy_process_group()
    return {"world": world, "mib": mib, "ms": seconds * 1e3}


if __name__ == "__main__":
    os.write(1, (json.dumps(_gpus() if sys.argv[1] == "gpus" else _all_reduce(sys.argv[1])) + "\n").encode())
