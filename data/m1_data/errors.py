"""The one error type a person ever sees, and its exit codes.

Libraries raise; only ``m1cli`` renders. It lives in the lowest room so that every room can raise it.
"""

from __future__ import annotations

EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_DATA = 4
EXIT_CHECKPOINT = 5
EXIT_NUMERIC = 6
EXIT_PREEMPTED = 75


class M1Error(Exception):
    """A problem the user can act on: what is wrong, where, and what to do.

    Args:
        what: one sentence, what is wrong, with the offending value.
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
    """Unusable configuration or command line."""

    exit_code = EXIT_CONFIG


class EnvironmentProblem(M1Error):
    """The machine or the installed packages cannot do what was asked."""

    exit_code = EXIT_ENVIRONMENT


class DataError(M1Error):
    """Unreadable, broken or missing data."""

    exit_code = EXIT_DATA


class CheckpointError(M1Error):
    """No checkpoint can be used, or one could not be written."""

    exit_code = EXIT_CHECKPOINT


class NumericStop(M1Error):
    """Training stopped because its numbers left the permitted range."""

    exit_code = EXIT_NUMERIC


class Preempted(M1Error):
    """Stopped on request after saving: run the same command again to continue."""

    exit_code = EXIT_PREEMPTED
