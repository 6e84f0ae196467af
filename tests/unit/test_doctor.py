"""``m1 doctor``: what it finds on a broken machine, and that it finds nothing on a good one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m1_stages.config.load import load_config
from m1_stages.doctor import checks as doctor
from m1_stages.doctor import probes as doctor_probes
from m1_stages.doctor.checks import Finding

MEGATRON = "megatron-core<0.20,>=0.19.2"


def m1_doctor(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m1cli", "doctor", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1", **env},
    )  # fmt: skip


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_good_machine_is_ok(tmp_path: Path) -> None:
    done = m1_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything is ok" in done.stdout
    assert "2 processes summed 1 MiB" in done.stdout


def test_what_is_wrong_comes_with_how_to_fix_it(tmp_path: Path) -> None:
    """A folder named torch, a psutil that does not import, a run directory below a file: three problems, as JSON too."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "psutil.py").write_text("raise ImportError('no psutil here')")
    (tmp_path / "file").write_text("")
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n[run]\ndir = "file/run"\n')
    done = m1_doctor(tmp_path, "--json", PYTHONPATH=str(tmp_path / "stub"))
    assert done.returncode == 3, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    wrong = {finding["name"]: finding for finding in report["findings"] if not finding["ok"]}
    assert wrong.keys() == {"psutil", "imports", "run directory"}
    assert "no psutil here" in wrong["psutil"]["detail"]
    assert "pip install --force-reinstall psutil" in wrong["psutil"]["fix"]
    assert str(tmp_path / "torch") in wrong["imports"]["detail"]
    assert str(tmp_path / "stub" / "psutil.py") in wrong["imports"]["detail"]
    assert wrong["imports"]["fix"].startswith("mv ")
    assert "Not a directory" in wrong["run directory"]["detail"]
    assert wrong["run directory"]["fix"] == "choose another: --set run.dir=FOLDER"


def test_versions_out_of_range_are_named_with_who_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "numpy":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"megatron-core": "0.15.0", "tokenizers": "0.22.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    wrong = [finding for finding in doctor._check_packages(with_gpu=False) if not finding.ok]
    details = [finding.detail for finding in wrong]
    assert f"megatron-core 0.15.0, m1 needs {MEGATRON.removeprefix('megatron-core')}" in details
    assert "numpy is missing, m1 needs it" in details
    assert any(detail.startswith("tokenizers 0.22.0, transformers needs") for detail in details), details
    assert any(f"pip install '{MEGATRON}'" in finding.fix for finding in wrong)


def test_another_python_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    found = by_name(list(doctor._check_packages(with_gpu=False)))["python"]
    assert (found.ok, found.detail) == (False, "3.11.7, needs <3.14,>=3.12")
    proposed = found.fix.partition(" fits: ")[0]
    told = subprocess.run([proposed, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    assert told.stdout.strip() in ("(3, 12)", "(3, 13)")
    assert found.fix.startswith(f"{proposed} fits: make PYTHON={proposed} setup")


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing = {finding.detail: finding.fix for finding in doctor._check_packages(with_gpu=False) if not finding.ok}
    assert "triton is missing, m1 needs it" not in missing, "a build of torch for GPUs needs it all the same"
    missing = {finding.detail: finding.fix for finding in doctor._check_packages(with_gpu=True) if not finding.ok}
    assert missing["triton is missing, m1 needs it"].split(" -m ")[1] == "pip install 'triton>=3.6'"


def test_the_checkpoints_of_a_large_model_have_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m1.toml").write_text('preset = "m1-456b"\n')
    resolved = load_config(tmp_path / "m1.toml")
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = doctor._check_disk(resolved.run_dir, resolved)
    assert not found.ok
    assert "9 checkpoints of 5,9" in found.detail, "456 billion parameters of 14 bytes are 5.9 TiB"
    assert found.fix.startswith("free 53,")
    assert doctor._check_disk(resolved.run_dir, None).ok


def test_a_path_with_the_installed_packages_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(importlib.metadata.distribution("torch").locate_file("")))
    assert doctor._check_shadowed_imports(tmp_path).ok
    (tmp_path / "numpy.py").write_text("")
    found = doctor._check_shadowed_imports(tmp_path)
    assert (str(tmp_path / "numpy.py") in found.detail, found.fix.split()[0]) == (True, "mv")


def test_another_installation_is_not_to_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    (site / "torch").mkdir(parents=True)
    (site / "megatron").mkdir()
    work.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(site))
    stray = doctor._check_shadowed_imports(work)
    assert (stray.ok, stray.fix) == (False, f"take {site} out of PYTHONPATH")
    (site / "torch-2.13.0.dist-info").mkdir()
    (site / "megatron_core-0.19.2.dist-info").mkdir()
    assert doctor._check_shadowed_imports(work).ok


def test_low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 65536))
    found = by_name(list(doctor._check_limits(with_gpu=True)))
    assert (found["open files"].ok, found["open files"].fix) == (False, "ulimit -n 65536")


def test_a_probe_that_hangs_is_ended() -> None:
    probe = doctor_probes.Probe("gloo", 2, wait_s=0.1)
    found = doctor_probes.collective_finding("gloo", probe, "the fix")
    assert (found.ok, found.detail, found.fix) == (False, "all-reduce failed: no answer within 0.1 s", "the fix")
    assert all(process.returncode is not None for process in probe._processes)


H100 = {"name": "H100", "gib": 79.0, "free_gib": 78.0, "capability": [9, 0]}
GOOD = {"torch": "2.13.0", "torch_cuda": "12.9", "driver_cuda": 12080, "gpus": [H100], "archs": ["sm_80", "sm_90"]}


@pytest.mark.parametrize(
    ("change", "name", "says", "fix"),
    [
        ({"torch_cuda": None}, "driver", "a build for CPUs", "download.pytorch.org/whl/cu126"),
        ({"torch_cuda": "13.0"}, "driver", "supports CUDA 12.8, torch 2.13.0 was built for 13.0", "whl/cu126"),
        ({"gpus": []}, "driver", "sees no GPU", "nvidia-smi"),
        ({"gpus": [{**H100, "capability": [7, 5]}]}, "GPU 0", "bf16 needs 8.0", "fp32"),
        (
            {"gpus": [{**H100, "capability": [12, 0]}]},
            "GPU 0",
            "torch has kernels for sm_80, sm_90 only",
            "pip install",
        ),
    ],
)
def test_gpus_that_do_not_fit(change: dict[str, Any], name: str, says: str, fix: str) -> None:
    assert all(finding.ok for finding in doctor_probes.gpu_findings(GOOD, ""))
    found = by_name(list(doctor_probes.gpu_findings(GOOD | change, "")))[name]
    assert not found.ok
    assert says in found.detail
    assert fix in found.fix


def test_every_problem_has_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(module: object, name: str) -> Callable[..., Any]:
        def fail(*args: object, **kwargs: object) -> Any:
            raise ImportError("broken")

        monkeypatch.setattr(module, name, fail)
        return fail

    broken(doctor.importlib.util, "module_from_spec")
    found = doctor._check_megatron_helpers()
    assert (found.ok, "broken" in found.detail) == (False, True)
    assert f"--force-reinstall --no-deps '{MEGATRON}'" in found.fix


def test_the_kernel_cache_is_where_triton_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    found = doctor._check_kernel_cache()
    assert (found.ok, found.detail) == (
        True, f"{tmp_path}/.triton/cache can be written, 0 entries: the first steps compile",
    )  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = doctor._check_kernel_cache()
    assert (found.ok, "TRITON_CACHE_DIR=" in found.fix) == (False, True)
    assert f"{tmp_path}/file/cache: Not a directory" in found.detail
    (tmp_path / "cache" / "compiled").mkdir(parents=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor._check_kernel_cache().detail == f"{tmp_path}/cache can be written, 1 entries"


def test_it_does_not_import_torch_itself() -> None:
    code = "import sys, m1cli.commands.doctor; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
