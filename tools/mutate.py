"""Changes one thing in a module at a time and looks whether its tests notice: those that survive show what is not tested.

Usage: python tools/mutate.py m1_stages.guard tests/unit/test_guard.py [--seed N] [--max-mutants N] [--minutes M]

Works on a copy of the module's package in a temporary folder, which stands first on the import path; the working tree is only
read. Every mutant runs ``pytest -x`` in a forked child. The parent has imported third-party libraries only, so that no child
sees code of ours other than its mutant; what they cost to import is paid once. A mutant that fails a test, cannot be imported
or does not end in time is killed. ``tests/conftest.py`` is not loaded (choosing a device costs seconds): tests that need a
device are not for this.

Prints each survivor as ``file:line old -> new``, then a line of figures. The exit code is 0 whatever survives, and 1 when the
tests fail on the unchanged module.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
HEAVY = ("pytest", "_pytest.assertion.rewrite", "hypothesis.strategies", "numpy", "torch", "torch.distributed",
         "torch.utils.checkpoint", "jinja2", "tokenizers", "triton")  # fmt: skip
"""Imported before the forks where they are installed. None of them may import a package of this repository."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed place."""

    line: int
    old: str
    new: str
    source: str
    """The whole changed module."""


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for line, old, new, place in _changes(tree):
        owner, attribute, index = place
        container, key = (owner, attribute) if index is None else (getattr(owner, attribute), index)
        _put(container, key, new)
        found.append(Mutant(line, _text(old), _text(new), ast.unparse(ast.fix_missing_locations(tree))))
        _put(container, key, old)
    return sorted(found, key=lambda m: m.line)


Place = tuple[Any, str, int | None]


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, list):
        container[key] = value
    else:
        setattr(container, key, value)


def _changes(tree: ast.AST) -> Iterator[tuple[int, ast.AST, ast.AST, Place]]:
    """Line, node, what may stand there instead, and where: an owner's field, and the index in it if it is a list."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(tree, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.alias):
            continue  # messages
        if isinstance(tree, ast.keyword) and tree.arg in ("strict", "encoding"):
            continue  # what they guard against cannot happen, or is the default
        if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
            continue
        nodes = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, node in nodes:
            if not isinstance(node, ast.AST) or _is_docstring(node):
                continue
            for new in _instead_of(node, tree):
                yield getattr(node, "lineno", 0), node, new, (tree, field, index)
            yield from _changes(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _instead_of(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(left, [op], right):
            for other in COMPARISONS[type(op)]:
                yield ast.copy_location(ast.Compare(left, [other()], right), node)
        case ast.Compare(left, ops, right):
            for at, op in enumerate(ops):
                changed = [*ops[:at], COMPARISONS[type(op)][0](), *ops[at + 1 :]]
                yield ast.copy_location(ast.Compare(left, changed, right), node)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.copy_location(ast.BinOp(left, OPERATORS[type(op)](), right), node)
        case ast.BoolOp(op, values):
            yield ast.copy_location(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values), node)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.copy_location(ast.Constant(not value), node)
        case ast.Constant(int() | float() as value):
            steps = (value + 1, value - 1) if isinstance(value, int) else (2 * value or 1.0, value + 1)
            for other in steps:
                yield ast.copy_location(ast.Constant(other), node)
        case ast.Name("min" | "max" as name, ast.Load()):
            yield ast.copy_location(ast.Name("max" if name == "min" else "min", ast.Load()), node)
        case ast.Return(ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.copy_location(ast.Return(ast.Constant(None)), node)
        case ast.AugAssign(target, op, value):
            if type(op) in OPERATORS:
                yield ast.copy_location(ast.AugAssign(target, OPERATORS[type(op)](), value), node)
            yield ast.copy_location(ast.Pass(), node)
        case ast.Assign() | ast.Expr(ast.Call()) | ast.Continue() | ast.Break() | ast.Delete():
            if not isinstance(parent, ast.Module):  # without a constant nothing could be imported
                yield ast.copy_location(ast.Pass(), node)
    if isinstance(parent, ast.If | ast.While | ast.IfExp) and node is parent.test:
        yield ast.copy_location(ast.UnaryOp(ast.Not(), node), node)  # type: ignore[arg-type]


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="dotted name")
    parser.add_argument("tests", nargs="+", help="files, or tests, that should kill its mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which mutants are tried")
    parser.add_argument("--max-mutants", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="no further mutant is begun after so much time")
    chosen = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target, shown = copied(chosen.module, Path(folder))
        source = target.read_text(encoding="utf-8")
        _import_heavy()
        tests = [str((REPO / test).resolve()) if not Path(test).is_absolute() else test for test in chosen.tests]
        log = Path(folder) / "log"
        unchanged_began = time.monotonic()
        if (code := run_tests(tests, log, timeout_s=600.0)) != 0:
            print(log.read_text(errors="replace")[-3000:])
            print(f"the tests fail on the unchanged module (exit code {code})")
            return 1
        timeout_s = 10.0 + 5.0 * (time.monotonic() - unchanged_began)
        everything = mutants_of(source)
        order = random.Random(chosen.seed).sample(everything, len(everything))[: chosen.max_mutants]
        survivors: list[Mutant] = []
        tried = timeouts = 0
        for mutant in order:
            if time.monotonic() - began > 60.0 * chosen.minutes:
                break
            target.write_text(mutant.source, encoding="utf-8")
            code = run_tests(tests, log, timeout_s=timeout_s)
            tried, timeouts = tried + 1, timeouts + (code is None)
            survivors += [mutant] if code == 0 else []
        for mutant in sorted(survivors, key=lambda m: m.line):
            print(f"{shown}:{mutant.line} {mutant.old} -> {mutant.new}")
        print(
            f"{chosen.module}: {tried} of {len(everything)} mutants, {tried - len(survivors)} killed ({timeouts} by the time "
            f"limit of {timeout_s:.0f} s), {len(survivors)} survived, {time.monotonic() - began:.0f} s"
        )
    return 0


def copied(module: str, folder: Path) -> tuple[Path, Path]:
    """Copy the module's package to ``folder`` and put it first on the import path, here and for child processes.

    Returns:
        The module's file in the copy, and its path in the working tree as it is shown.
    """
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"there is no package {package}")
    root = Path(spec.origin).parent
    shutil.copytree(root, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    inside = Path(*rest).with_suffix(".py") if rest else Path("__init__.py")
    if not (folder / package / inside).exists():
        raise SystemExit(f"there is no module {module}")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two mutants of one second and size would be told apart by nothing
    sys.dont_write_bytecode = True
    original = root / inside
    return folder / package / inside, original.relative_to(REPO) if original.is_relative_to(REPO) else original


def _import_heavy() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in HEAVY:
        with suppress(ImportError):
            importlib.import_module(name)
    from hypothesis import Phase, settings

    phases = [Phase.explicit, Phase.generate]  # no time is spent on the smallest example
    settings.register_profile("mutate", derandomize=True, database=None, phases=phases, max_examples=50)
    settings.load_profile("mutate")
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("m1cli", "m1_stages", "m1_kernels", "m1_data"))
    assert not ours, f"imported before the forks: {ours}"


def run_tests(tests: Sequence[str], log: Path, *, timeout_s: float) -> int | None:
    """Exit code of pytest in a forked child; None: it did not end in time and was killed with what it started."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _in_child(tests, log)
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(tests: Sequence[str], log: Path) -> int:
    import pytest

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    run: Callable[..., int] = pytest.main
    options = [
        "--noconftest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-c",
        str(REPO / "pyproject.toml"),
        "--tb=short",
    ]
    return int(run([*options, "--rootdir", str(REPO), *tests]))


if __name__ == "__main__":
    sys.exit(main())
