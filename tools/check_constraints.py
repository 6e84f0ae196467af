"""Check that constraints.txt can be installed: ``make check-constraints``.

For every supported Python on Linux, uv resolves ``.[dev]`` against the constraints twice: with the torch that the index serves
by default (a CUDA build, which pins its own triton) and with a CPU build of the same version, which asks for neither. Only
metadata is read; nothing is downloaded or installed. uv asks PyPI unless UV_DEFAULT_INDEX says otherwise.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "x86_64-manylinux_2_28"
# The requirements of a CPU build of torch 2.13 (its METADATA), which is not on PyPI. It lives on an index of its own.
CPU_TORCH_REQUIRES = ("filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3", "networkx>=2.5.1")
CPU_TORCH_REQUIRES += ("jinja2", "fsspec>=0.8.5")


def supported_pythons(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Versions named in the classifiers of pyproject.toml, like ``3.11``."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    names = (c.rpartition(" :: ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python"))
    return [name for name in names if re.fullmatch(r"3\.\d+", name)]


def cpu_torch_wheel(folder: Path, version: str) -> None:
    """Write a wheel of metadata alone that stands for a CPU build of torch."""
    name = f"torch-{version}+cpu"
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in CPU_TORCH_REQUIRES)
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}+cpu\n{requires}"
        )
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def resolve(python: str, constraints: Path, *options: str) -> tuple[dict[str, str], str]:
    """Versions by package that uv chooses for ``python`` on Linux, or none of them and its reason."""
    command = ["uv", "pip", "compile", str(ROOT / "pyproject.toml"), "--extra", "dev", "--constraint", str(constraints)]
    command += ["--python-version", python, "--python-platform", PLATFORM, "--only-binary", ":all:", "--quiet"]
    command += ["--no-header", "--no-annotate", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {}, done.stderr.strip()
    return dict(line.split("==", 1) for line in done.stdout.split() if "==" in line), ""


def main(constraints: Path = ROOT / "constraints.txt") -> int:
    """Print a line for each Python and torch build; 1 if one of them cannot be resolved."""
    pins = dict(line.split("==", 1) for line in constraints.read_text(encoding="utf-8").split() if "==" in line)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        cpu_torch_wheel(Path(folder), pins["torch"])
        for python in supported_pythons():
            for build, options, expected in (
                ("default torch", (), pins["torch"]),
                ("CPU torch", ("--find-links", folder), f"{pins['torch']}+cpu"),
            ):
                chosen, reason = resolve(python, constraints, *options)
                if not reason and chosen.get("torch") != expected:
                    reason = f"uv chose torch {chosen.get('torch')}, not {expected}"
                failed = failed or bool(reason)
                triton = chosen.get("triton", "none")
                print(f"Python {python}, {build}: {reason or f'{len(chosen)} packages, triton {triton}'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
