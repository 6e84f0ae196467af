"""The base of every error that a person sees, and the kinds that data code raises.

Libraries raise and only ``m1cli`` prints. The other kinds, and all exit codes, are in ``m1_stages.errors``.
"""

from __future__ import annotations

EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_DATA = 4
EXIT_IN_USE = 8


class M1Error(Exception):
    """A problem the user can act on: what is wrong, where, and what to do.

    Args:
        what: one sentence that says what is wrong, with the offending value.
        where: file, line, key or rank; empty when there is no place to name.
        fix: what to do about it; empty when nothing can be suggested honestly.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return " | ".join(part for part in (self.what, self.where, self.fix) if part)


class ConfigError(M1Error):
    """The configuration or the command line cannot be used."""

    exit_code = EXIT_CONFIG


class EnvironmentProblem(M1Error):
    """The machine or the installed packages cannot do what was asked."""

    exit_code = EXIT_ENVIRONMENT


class DataError(M1Error):
    """Data is unreadable, broken or missing."""

    exit_code = EXIT_DATA


class InUse(M1Error):
    """Another command is at work in the same folder."""

    exit_code = EXIT_IN_USE
