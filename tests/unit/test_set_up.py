"""``make setup`` finds a Python by running it, and a wheel works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIND = ROOT / "stages/m1_stages/doctor/find_python.sh"


def command(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def find(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "HOME": str(tmp_path),
    }
    return subprocess.run(["/bin/sh", str(FIND), *arguments], env=environment, capture_output=True, text=True)


def pretends(version: str) -> str:
    """A shell command that runs the probe with this Python as if it was of ``version``."""
    return (
        f"""shift; exec {sys.executable} -c "import sys; sys.version_info = {version}; exec(sys.argv.pop(1))" "$@" """
    )


def test_shims_that_fail_and_old_versions_are_passed_over(tmp_path: Path) -> None:
    command(tmp_path / "bin", "python3", pretends("(3, 11, 7)"))
    command(tmp_path / "bin", "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    command(tmp_path / "bin", "python3.13", 'exec /nowhere/python3.13 "$@"')
    good = command(tmp_path / "pyenv/versions/3.12.1/bin", "python", pretends("(3, 12, 1)") + "; exit 0")
    done = find(tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, sys.executable, "")
    good.write_text("#!/bin/sh\nexit 1\n")
    command(tmp_path / "bin", "python3", pretends("(3, 13, 0)"))
    assert find(tmp_path).returncode == 0, "the default one comes first"


def test_without_any_it_says_what_to_install(tmp_path: Path) -> None:
    command(tmp_path / "bin", "python3", pretends("(3, 14, 0)"))
    for name in ("python3.12", "python3.13"):
        command(tmp_path / "bin", name, "exit 127")
    done = find(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: m1 needs Python 3.12 or 3.13, and none was found\n  to do: install one")


def test_the_one_that_was_asked_for_or_none(tmp_path: Path) -> None:
    old = command(tmp_path / "bin", "python3.11", pretends("(3, 11, 7)"))
    assert find(tmp_path, sys.executable).stdout.strip() == sys.executable
    done = find(tmp_path, str(old))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {old} is not a Python 3.12 or 3.13")


def test_an_environment_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "mine").write_text("mine")
    done = subprocess.run(
        ["sh", str(ROOT / "tools/set_up.sh"), str(tmp_path / "env"), sys.executable], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'env'} is no environment that this set-up finished")
    assert (tmp_path / "env" / "mine").read_text() == "mine"


@pytest.mark.parametrize(("driver", "works"), [("12.4", True), ("12.4", False), ("13.0", True), ("13.0", False)])
def test_an_old_driver_gets_the_newest_torch_for_it(tmp_path: Path, driver: str, works: bool) -> None:
    command(tmp_path / "bin", "nvidia-smi", f"echo '| Driver Version: 550.54   CUDA Version: {driver}  |'")
    said, env = tmp_path / "said", tmp_path / "env"
    fails = "" if works else 'case "$*" in *--torch-backend*) echo "no such wheel" >&2; exit 1;; esac'
    command(env / "bin", "uv", f'echo "$@" >> {said}\n{fails}')
    command(env / "bin", "python", f'[ "$2" = pip ] || exec {sys.executable} "$@"')
    done = subprocess.run(
        ["sh", str(ROOT / "tools/set_up.sh"), str(env), sys.executable], capture_output=True, text=True,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    asked = said.read_text().splitlines()
    old = driver == "12.4"
    assert ("--torch-backend=cu126" if old else "--torch-backend=auto") in asked[0]
    pins = Path(asked[0].split("--constraint ")[1])
    names = {line.split("==")[0] for line in (ROOT / pins).read_text().splitlines()}
    assert {"torch", "triton", "transformers"} - names == ({"torch", "triton"} if old else set())
    assert (done.returncode, (env / ".installed").exists()) == ((1, False) if old and not works else (0, True))
    assert len(asked) == (2 if not old and not works else 1), "the default index has no torch for an old driver"
    assert ("no such wheel" in done.stderr) != works


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources; building leaves folders beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "m1"
    names = ["pyproject.toml", "README.md", "LICENSE", "m1cli", "kernels", "stages", "data"]
    ignored = ["--exclude=__pycache__", "--exclude=*.egg-info"]
    copy.mkdir()
    packed = subprocess.run(["tar", "-c", *ignored, "-C", str(ROOT), *names], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(copy)], input=packed.stdout, check=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(copy),
    ]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr
    (path,) = folder.glob("m1cli-*.whl")
    return path


def test_a_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = set()
    for where, package in (("", "m1cli"), ("kernels", "m1_kernels"), ("stages", "m1_stages"), ("data", "m1_data")):
        files = (path for path in (ROOT / where / package).rglob("*") if path.is_file())
        sources |= {str(path.relative_to(ROOT / where)) for path in files if "__pycache__" not in path.parts}
    assert inside == sources


def test_a_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def m1(*arguments: str) -> str:
        where = work if work.exists() else tmp_path
        code = "import m1_stages, sys; assert m1_stages.__file__.startswith(sys.argv.pop(1)); from m1cli.app import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, str(site), *arguments],
            cwd=where,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for preset in ("tiny", "700m", "7b-a1b", "m1-456b"):
        m1("init", str(tmp_path / preset), "--preset", preset)
        assert "num_layers" in m1("config", "show", "--config", str(tmp_path / preset / "m1.toml"))
    work.mkdir()
    (work / "m1.toml").write_text(
        'preset = "tiny"\n[tokenizer]\nvocab_size = 300\n[[data.sources]]\nname = "a"\ndomain = "stem"\n'
        'format = "jsonl"\npath = "a.jsonl"\n[curriculum]\nlength_scale = 0.001\n'
    )
    assert "32k" in m1("stages")
    assert "GiB" in m1("plan")
