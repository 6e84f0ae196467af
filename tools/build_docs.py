"""Build the documentation in build/docs: ``make docs``.

pdoc renders the docstrings of every module; markdown2, which pdoc depends on, renders the Markdown files. The front page is the
README's table of packages with links, so the order of the layers is written down once. pdoc imports what it documents: that needs
torch, Megatron-Core and Triton, but no CUDA device, because a kernel is compiled when it is first called. A module that cannot be
imported, or a docstring that cannot be rendered, fails the build instead of being dropped.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pdoc.doc
import pdoc.render
from pdoc.render_helpers import to_html

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("m1cli", "m1_stages", "m1_kernels", "m1_data")
GUIDES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "docs/*.md", "docs/adr/*.md")
_LINK = re.compile(r"(\]\((?!https?:)[^)#\s]+)\.md(#[^)\s]*)?\)")
_ROW = re.compile(r"^\| `([^`]+/)` \| (.+) \|$", re.MULTILINE)


class Package(NamedTuple):
    """A row of the README's table of packages."""

    name: str
    """Dotted name, like ``m1_stages.plan``."""
    page: str
    """Address of its page from the front page."""
    sentence: str
    """What it is, as HTML."""


def packages(readme: str) -> list[Package]:
    """Rows of the README's table that name a Python package, in the README's order: from the top layer to the bottom."""
    found = []
    for folder, sentence in _ROW.findall(readme):
        name = ".".join(part for part in Path(folder).parts if part not in ("stages", "kernels", "data"))
        if (ROOT / folder / "__init__.py").is_file():
            found.append(Package(name, name.replace(".", "/") + ".html", to_html(_links(sentence))))
    return found


def _links(markdown: str) -> str:
    """Let links to Markdown files lead to their pages."""
    return _LINK.sub(r"\1.html\2)", markdown)


def write_guides(out: Path) -> list[str]:
    """Render the Markdown files to the same relative paths under ``out``; return their pages, as relative addresses."""
    pages = []
    template = pdoc.render.env.get_template("guide.html.jinja2")
    for path in (path for pattern in GUIDES for path in sorted(ROOT.glob(pattern))):
        page = path.relative_to(ROOT).with_suffix(".html")
        text = path.read_text(encoding="utf-8")
        title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), page.stem)
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        html = template.render(title=title, body=to_html(_links(text)), up="../" * (len(page.parts) - 1))
        (out / page).write_text(html, encoding="utf-8")
        pages.append(str(page))
    shutil.copytree(ROOT / "docs" / "figures", out / "docs" / "figures")
    return pages


def module_names() -> list[str]:
    """Names of all modules. pdoc's own search skips the modules of a package with ``__all__``; several of ours have it."""
    names = list(PACKAGES)
    for name in PACKAGES:
        found = pkgutil.walk_packages(import_module(name).__path__, f"{name}.", onerror=_fail)
        names += [module.name for module in found if not module.name.endswith(".__main__")]
    return names


def _fail(name: str) -> None:
    raise ImportError(f"cannot import {name}") from sys.exc_info()[1]


def resolve_lazy_names(module: ModuleType) -> None:
    """Put the names that a module's ``__getattr__`` provides into its namespace, where pdoc looks for them."""
    for name in getattr(module, "__all__", ()):
        vars(module).setdefault(name, getattr(module, name))


def main() -> int:
    """Write the pages to ``build/docs``, in place of earlier ones, and print where they are; 1 if one could not be rendered."""
    out = ROOT / "build" / "docs"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same pages on every machine
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modules = {name: pdoc.doc.Module(import_module(name)) for name in module_names()}
        for name, module in modules.items():
            resolve_lazy_names(module.obj)
            vars(module)["submodules"] = [m for n, m in modules.items() if n.rpartition(".")[0] == name]
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        pdoc.render.configure(
            docformat="google", template_directory=ROOT / "tools" / "docs_templates", footer_text="m1, Apache-2.0"
        )
        pdoc.render.env.globals["packages"] = packages(readme)
        pdoc.render.env.globals["guides"] = write_guides(out)
        for name, module in modules.items():
            page = out / (name.replace(".", "/") + ".html")
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(pdoc.render.html_module(module, modules), encoding="utf-8")
        (out / "index.html").write_text(pdoc.render.html_index(modules), encoding="utf-8")
        (out / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")
    # Megatron-Core reports its optional parts. Types that are imported for type checking only are printed as written.
    problems = {
        str(warning.message).splitlines()[0]
        for warning in caught
        if "/pdoc/" in warning.filename and not str(warning.message).startswith("Error parsing type annotation")
    }
    for problem in sorted(problems):
        print(problem, file=sys.stderr)
    print(f"{len(modules)} modules: {out / 'index.html'}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
