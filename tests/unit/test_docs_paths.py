"""README and CONTRIBUTING name what is there: every path exists, every package has its row, every exit code its line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from m1_stages import errors
from m1_stages.errors import M1Error

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
TOP_FOLDERS = ("m1cli", "stages", "kernels", "data", "docs", "tests", "benchmarks", "tools")
PACKAGE_FOLDERS = ("m1cli", "stages/m1_stages", "kernels/m1_kernels", "data/m1_data")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def paths_in(page: str) -> set[str]:
    """Paths in backticks and link targets; a source file may be named by the end of its path, like ``training/loop.py``."""
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    words = re.findall(r"`([^`\s]+)`", prose)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose)]
    full = [word for word in words if "/" in word and word.split("/")[0] in TOP_FOLDERS]
    ends = [word for word in words if word not in full and word.endswith((".py", ".md", ".txt", "-config.yaml"))]
    return {path for path in (*full, *ends, *links) if path}


def exists(path: str) -> bool:
    return any(ROOT.glob(path)) or any(match for top in TOP_FOLDERS for match in (ROOT / top).rglob(path))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    paths = paths_in(page)
    assert len(paths) > 20
    missing = [path for path in sorted(paths) if not exists(path)]
    assert not missing


def test_the_layout_table_names_every_package() -> None:
    rows = re.findall(r"^\| `([^`]+)/` \| .+ \|$", text("README.md"), re.MULTILINE)
    packages = [
        str(init.parent.relative_to(ROOT)) for top in PACKAGE_FOLDERS for init in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(set(packages) - set(rows)) == []
    assert len(rows) == len(set(rows))


def test_packages_stand_in_the_order_of_the_layers() -> None:
    """CONTRIBUTING's layers of m1_stages are the README's, from the top."""
    rows = re.findall(r"^\| `stages/m1_stages/(\w+)/` ", text("README.md"), re.MULTILINE)
    table = text("CONTRIBUTING.md").partition("inside `m1_stages`, from the top")[2].partition("Inside `m1_data`")[0]
    layers = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
    assert [name for name in layers if name in rows] == [name for name in rows if name in layers]
    assert set(rows) - set(layers) == {"recipes"}


def test_every_exit_code_has_its_line() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| ", text("README.md"), re.MULTILINE)}
    raised = {
        error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, M1Error)
    }
    assert codes == raised | {0, 1, 130}


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)`", text(page))) <= targets, page


def test_the_hooks_run_what_make_check_runs() -> None:
    recipe = text("Makefile").partition("\ncheck:")[2].partition("\n\n")[0]
    checks = re.findall(r"\$\(BIN\)/(.+)", recipe)
    hooks = re.findall(r"entry: \.venv/bin/(.+)", text(".pre-commit-config.yaml"))
    assert hooks == checks


def test_the_tools_of_make_targets_are_pinned() -> None:
    pins = dict(line.split("==") for line in text("constraints.txt").split())
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    assert {"pdoc", "codespell", "ruff", "mypy", "import-linter"} <= set(pins)
    assert any(requirement.startswith("pdoc") for requirement in extras["docs"])
