"""Optional packages, asked for before a command has done anything that would be lost."""

from __future__ import annotations

from importlib.util import find_spec

from m1_stages.errors import EnvironmentProblem


def require_packages(*names: str, for_what: str, extra: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: as they are imported.
        for_what: what needs them, the beginning of a sentence: "the report".
        extra: the extra of this project that installs them.

    Raises:
        EnvironmentProblem: one is not installed; all that are missing are named.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise EnvironmentProblem(
            f"{for_what} needs {' and '.join(missing)}, not installed here", fix=f'pip install "m1cli[{extra}]"'
        )
