"""The shape of the sources: no circles of imports, arrows that point downwards only, and files and folders of a readable size."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
PACKAGES = {"m1cli": ".", "m1_kernels": "kernels", "m1_stages": "stages", "m1_data": "data"}
"""Package and the folder it lies in."""
MOST_LINES, MOST_MODULES = 400, 14


def modules_of(repo: Path) -> dict[str, Path]:
    """File of every module by its dotted name; a package's is its ``__init__.py``."""
    found = {}
    for package, folder in PACKAGES.items():
        root = repo / folder
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(repo: Path) -> dict[str, set[str]]:
    """Modules of ours that each module imports anywhere: also inside functions and for type checkers only."""
    modules = modules_of(repo)

    def imported(path: Path) -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports are not looked at"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in modules else str(node.module)

    return {name: {other for other in imported(path) if other in modules} for name, path in modules.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, sorted; none in a graph without circles (Tarjan's components)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in numbers:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], numbers[other])
        if lowest[name] == numbers[name]:
            at = stack.index(name)
            group, stack[at:] = stack[at:], []
            if len(group) > 1 or name in graph[name]:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in numbers:
            visit(name)
    return sorted(found)


def copy_of_sources(folder: Path) -> Path:
    for package, where in PACKAGES.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / where / package, folder / where / package, ignore=ignored)
    shutil.copy(REPO / "pyproject.toml", folder)
    return folder


def plant(repo: Path, module: str, line: str) -> None:
    """Add a line at the end of a module."""
    path = modules_of(repo)[module]
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")


def test_no_import_goes_in_a_circle() -> None:
    graph = imports_of(REPO)
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300, "imports are not seen"
    assert cycles(graph) == []


@pytest.mark.parametrize(
    "line",
    [
        "import m1_data.sampling.loader",
        "from m1_data.sampling import loader",
        "def later() -> None:\n    from m1_data.sampling.loader import PackedBatch",
        "if TYPE_CHECKING:\n    from m1_data.sampling.loader import PackedBatch",
    ],
    ids=["import", "from a package", "in a function", "for type checkers"],
)
def test_a_planted_circle_is_found(line: str, tmp_path: Path) -> None:
    repo = copy_of_sources(tmp_path)
    before = cycles(imports_of(repo))
    plant(repo, "m1_data.sampling.packing", line)
    (circle,) = [group for group in cycles(imports_of(repo)) if group not in before]
    assert {"m1_data.sampling.loader", "m1_data.sampling.packing"} <= set(circle)


def contracts() -> list[dict[str, Any]]:
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    return list(settings["tool"]["importlinter"]["contracts"])


def layers_with(module: str) -> str:
    """Name of the contract in whose layers ``module`` stands."""
    names = [c["name"] for c in contracts() if c["type"] == "layers" and module in " ".join(c["layers"]).split()]
    return names[0] if names else "layers inside m1_stages"


def forbidding(module: str, source: str) -> str:
    """Name of the contract that forbids ``source`` to import ``module``."""
    return next(c["name"] for c in contracts()
                if module in c.get("forbidden_modules", ()) and source in c.get("source_modules", ()))  # fmt: skip


def lint_imports(repo: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(repo / folder) for folder in PACKAGES.values()]
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("m1_stages.config.schema", "import m1_stages.training", layers_with("m1_stages.training")),
        ("m1_data.spec", "import m1_stages.config", layers_with("m1cli")),
        ("m1_stages.plan.flops", "import torch", forbidding("torch", "m1_stages.plan")),
    ],
    ids=["inside m1_stages", "between packages", "a library"],
)
def test_a_planted_import_upwards_is_refused(module: str, line: str, contract: str, tmp_path: Path) -> None:
    assert contract in [c["name"] for c in contracts()]
    repo = copy_of_sources(tmp_path)
    plant(repo, module, line)
    done = lint_imports(repo)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout, done.stdout
    assert module in done.stdout


def test_the_contracts_hold() -> None:
    done = lint_imports(REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(contracts())} kept, 0 broken" in done.stdout


def test_files_and_folders_have_a_readable_size() -> None:
    files = list(modules_of(REPO).values())
    others = [path for folder in ("tests", "benchmarks", "tools") for path in (REPO / folder).rglob("*.py")]
    lines = {
        str(path.relative_to(REPO)): len(path.read_text(encoding="utf-8").splitlines()) for path in [*files, *others]
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    folders = {path.parent for path in files}
    modules = {str(folder.relative_to(REPO)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in modules.items() if count > MOST_MODULES} == {}
