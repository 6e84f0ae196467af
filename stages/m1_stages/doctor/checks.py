"""Checks what has to be true of a machine before a long run starts. Each finding says what is true and how to fix it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.doctor.host_memory import host_memory_finding
from m1_stages.doctor.probes import Finding, Probe, collective_finding, gpu_findings, has_nvidia
from m1_stages.plan.shapes import count_parameters
from m1_stages.plan.stage_workload import model_with_vocab
from m1_stages.run_dir import CHECKPOINTS

_BYTES_PER_PARAMETER = 14
"""Bytes of a checkpoint per parameter: fp32 weights and two moments, and bf16 weights at the most."""
_GIB = 2**30
_PIP = f"{sys.executable} -m pip install"


def examine(folder: Path, resolved: Resolved | None) -> Iterator[Finding]:
    """Run all checks and yield their findings as they are made, the slow ones last.

    Args:
        folder: where m1 will be started.
        resolved: the configuration, if there is one: it names the run directory and the size of a checkpoint.
    """
    gloo = Probe("gloo", 2)
    gpus = Probe("gpus", 1) if has_nvidia() else None
    with_gpu = gpus is not None
    yield from _check_packages(with_gpu=with_gpu)
    yield _check_psutil()
    yield _check_megatron_helpers()
    yield _check_shadowed_imports(folder)
    run_dir = resolved.run_dir if resolved else folder
    yield _check_run_dir(run_dir)
    yield _check_disk(run_dir, resolved)
    if with_gpu:
        yield _check_kernel_cache()
    yield from _check_limits(with_gpu=with_gpu)
    yield collective_finding("gloo", gloo, "export GLOO_SOCKET_IFNAME=lo   (between machines: their network interface)")
    if gpus is None:
        yield Finding(name="GPUs", ok=True, detail="none: runs go to the CPU")
        if resolved:
            yield host_memory_finding(resolved, 0)
        return
    found, error = gpus.result()
    yield from gpu_findings(found, error)
    if resolved and not error:
        yield host_memory_finding(resolved, len(found["gpus"]))
    if found.get("gpus"):
        yield collective_finding("NCCL", Probe("nccl", len(found["gpus"])), "NCCL_DEBUG=WARN m1 doctor   (says why)")


def _check_packages(*, with_gpu: bool) -> Iterator[Finding]:
    """Compare installed versions with the ranges that m1 requires, and with those that its requirements need of each other."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    own = importlib.metadata.metadata("m1cli")
    python, wanted = ".".join(map(str, sys.version_info[:3])), own["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(python)
    yield Finding(
        name="python",
        ok=fits,
        detail=f"{python}, needs {wanted}",
        fix="" if fits else _suitable_python(wanted),
    )
    problems, installed = [], []
    queue = [("m1", text) for text in importlib.metadata.requires("m1cli") or []]
    for owner, text in queue:
        requirement = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', text)
        required = extra is None or (owner == "m1" and with_gpu and extra[1] == "gpu")
        if requirement.name == "m1cli" or (owner != "m1" and extra) or (extra and extra[1] == "dev"):
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if required:
                problems.append((f"{requirement.name} is missing, {owner} needs it", requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append((f"{requirement.name} {version}, {owner} needs {requirement.specifier}", requirement))
        if owner == "m1":
            installed.append(f"{requirement.name} {version}")
            queue += [(requirement.name, line) for line in importlib.metadata.requires(requirement.name) or []]
    for what, requirement in problems:
        yield Finding(name="packages", ok=False, detail=what, fix=f"{_PIP} '{requirement.name}{requirement.specifier}'")
    if not problems:
        yield Finding(name="packages", ok=True, detail=", ".join(dict.fromkeys(installed)))


def _suitable_python(wanted: str) -> str:
    """Name a Python of this machine that m1 can be installed with, as ``make setup`` finds it."""
    script = Path(__file__).with_name("find_python.sh")
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["sh", str(script)], capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            found = done.stdout.strip()
            return f"{found} fits: make PYTHON={found} setup, or {found} -m venv .venv and install m1 there"
    return f"install a Python that fits {wanted}, for example: sudo apt install python3.12 python3.12-venv, or pyenv install 3.12"


def _check_psutil() -> Finding:
    """Check that psutil imports: Megatron's checkpoint writer hangs without it and does not declare it."""
    try:
        import psutil

        return Finding(name="psutil", ok=True, detail=f"{psutil.__version__} imports")
    except ImportError as error:
        detail = f"does not import ({error}): saving a checkpoint would hang"
        return Finding(name="psutil", ok=False, detail=detail, fix=f"{_PIP} --force-reinstall psutil")


def _check_megatron_helpers() -> Finding:
    """Check that Megatron's compiled helpers load; only the extension is loaded, because importing its package imports torch."""
    name = "megatron's compiled helpers"
    wanted = next(line for line in importlib.metadata.requires("m1cli") or [] if line.startswith("megatron-core"))
    reinstall = f"{_PIP} --force-reinstall --no-deps '{wanted}'"
    try:
        files = importlib.metadata.files("megatron-core") or []
        path = next(str(f.locate()) for f in files if f.name.startswith("helpers_cpp.") and f.suffix == ".so")
        spec = importlib.util.spec_from_file_location("helpers_cpp", path)
        assert spec is not None
        importlib.util.module_from_spec(spec)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, ok=False, detail="megatron-core is missing", fix=f"{_PIP} '{wanted}'")
    except StopIteration:
        detail = f"the wheel has none for Python {sys.version_info[0]}.{sys.version_info[1]}"
        return Finding(name=name, ok=False, detail=detail, fix=reinstall)
    except ImportError as error:
        return Finding(name=name, ok=False, detail=f"do not load: {error}", fix=reinstall)
    return Finding(name=name, ok=True, detail="load")


def _check_shadowed_imports(folder: Path) -> Finding:
    """Check that no file hides a package: ``python -m`` and torchrun search the working directory before installed packages."""
    names = ["torch", "megatron", "triton", "transformers", "numpy", "psutil", "rich", "typer", "tokenizers", "pyarrow",
             "datasets", "m1cli"]  # fmt: skip
    listed = [Path(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    shadowing = [
        path / found
        for path in (folder, *listed)
        for name in names
        for found in (name, f"{name}.py")
        if (path / found).exists() and path.resolve() != _package_location(name) and not _is_installed(path, name)
    ]
    if not shadowing:
        return Finding(name="imports", ok=True, detail="no file here hides an installed package")
    detail = f"{', '.join(map(str, shadowing))} would be imported instead of the installed package"
    first = shadowing[0]
    leave_out = f"take {first.parent} out of PYTHONPATH"
    fix = f"mv {first} {first}.away   (or work elsewhere)" if first.parent == folder else leave_out
    return Finding(name="imports", ok=False, detail=detail, fix=fix)


def _is_installed(path: Path, package: str) -> bool:
    """Whether an installer put ``package`` into ``path``: another installation, whose version is checked, is no stray file."""
    name = {"megatron": "megatron_core"}.get(package, package)
    return any(path.glob(f"{name}-*.dist-info")) or any(path.glob(f"{name}-*.egg-info"))


def _package_location(package: str) -> Path | None:
    """Return the folder that a package is installed in; for m1 the folder of the source it runs from."""
    if package == "m1cli":
        return Path(__file__).resolve().parents[3]
    try:
        name = {"megatron": "megatron-core"}.get(package, package)
        return Path(str(importlib.metadata.distribution(name).locate_file(""))).resolve()
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_run_dir(run_dir: Path) -> Finding:
    """Check that files can be written into the run directory, or into its nearest existing parent."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        install = f"sudo install -d -o {os.getuid()} {run_dir}" if isinstance(error, PermissionError) else ""
        fix = install or "choose another: --set run.dir=FOLDER"
        return Finding(name="run directory", ok=False, detail=f"{run_dir}: {error.strerror}", fix=fix)
    return Finding(name="run directory", ok=True, detail=f"{run_dir} can be written")


def _check_disk(run_dir: Path, resolved: Resolved | None) -> Finding:
    """Check the space for the checkpoints of a run: the last ones, one being written, one for each stage and fine-tuning."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    used = sum(f.stat().st_size for f in (run_dir / CHECKPOINTS).rglob("*") if f.is_file())
    free, needed, detail = shutil.disk_usage(existing).free, _GIB, ""
    if resolved:
        one = count_parameters(model_with_vocab(resolved.config)).total * _BYTES_PER_PARAMETER
        count = resolved.config.run.keep_last + 1 + len(STAGE_NAMES) + max(1, len(resolved.config.sft.runs))
        needed = one * count - used
        detail = f"; {count} checkpoints of {one / _GIB:,.1f} GiB have to fit"
    detail = f"{free / _GIB:,.0f} GiB free at {existing}{detail}"
    fix = "" if free > needed else f"free {(needed - free) / _GIB:,.0f} GiB, or choose another run.dir"
    return Finding(name="disk", ok=free > needed, detail=detail, fix=fix)


def _check_kernel_cache() -> Finding:
    """Check that Triton can keep what it compiles: otherwise every process compiles every kernel again."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")).absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{cache}: {error.strerror}; every process would compile all kernels again"
        return Finding(
            name="kernel cache", ok=False, detail=detail, fix="export TRITON_CACHE_DIR=FOLDER   (on a local disk)"
        )
    entries = sum(1 for _ in cache.iterdir()) if cache.exists() else 0
    detail = f"{cache} can be written, {entries} entries" + ("" if entries else ": the first steps compile")
    return Finding(name="kernel cache", ok=True, detail=detail)


def _check_limits(*, with_gpu: bool) -> Iterator[Finding]:
    """Check open files, locked memory and shared memory, and on a machine with GPUs the C compiler."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if with_gpu else 1024
    fix = (
        ""
        if files >= wanted
        else f"ulimit -n {hard}"
        if hard >= wanted
        else f"raise the hard limit, then ulimit -n {wanted}"
    )
    yield Finding(name="open files", ok=not fix, detail=f"{files}, needs {wanted} (ulimit -n)", fix=fix)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = locked == resource.RLIM_INFINITY
    rdma = Path("/dev/infiniband").exists()
    detail = (
        f"{'unlimited' if free else f'{locked >> 10} KiB'}{'; InfiniBand needs unlimited' if rdma else ''} (ulimit -l)"
    )
    fix = "" if free or not rdma else "ulimit -l unlimited   (in a container: docker run --ulimit memlock=-1)"
    yield Finding(name="locked memory", ok=not fix, detail=detail, fix=fix)
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        fix = (
            "" if size >= _GIB or not with_gpu else "mount -o remount,size=8G /dev/shm   (or docker run --shm-size=8g)"
        )
        yield Finding(name="shared memory", ok=not fix, detail=f"/dev/shm has {size / _GIB:.1f} GiB", fix=fix)
    if with_gpu:
        found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "")
        detail = found or "none; Triton builds the kernels' launchers with it"
        yield Finding(name="C compiler", ok=bool(found), detail=detail, fix="" if found else "apt-get install gcc")
