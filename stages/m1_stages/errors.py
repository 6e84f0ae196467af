"""The errors of a run and their exit codes. Data code raises those of ``m1_data.errors``, which are part of the same list."""

from __future__ import annotations

from m1_data.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_ENVIRONMENT,
    EXIT_IN_USE,
    ConfigError,
    DataError,
    EnvironmentProblem,
    InUse,
    M1Error,
)

EXIT_CHECKPOINT = 5
EXIT_NUMERIC = 6
EXIT_LOST = 7
EXIT_PREEMPTED = 75

__all__ = [
    "EXIT_CHECKPOINT",
    "EXIT_CONFIG",
    "EXIT_DATA",
    "EXIT_ENVIRONMENT",
    "EXIT_IN_USE",
    "EXIT_LOST",
    "EXIT_NUMERIC",
    "EXIT_PREEMPTED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "InUse",
    "M1Error",
    "NumericStop",
    "Preempted",
    "RankLost",
]


class CheckpointError(M1Error):
    """No checkpoint can be used, or one could not be written."""

    exit_code = EXIT_CHECKPOINT


class NumericStop(M1Error):
    """Training stopped because its numbers left the permitted range."""

    exit_code = EXIT_NUMERIC


class RankLost(M1Error):
    """A rank was killed, stopped answering, or stopped moving."""

    exit_code = EXIT_LOST


class Preempted(M1Error):
    """The run was stopped on request and is saved: the same command continues it."""

    exit_code = EXIT_PREEMPTED
