"""``m1`` commands one after the other in one process, as a user types them; it pays the imports once."""

from __future__ import annotations

from typing import Any

from support.pretraining import pretrained
from typer.testing import CliRunner

from m1cli.app import app


def commands(job: dict[str, Any]) -> list[list[Any]]:
    """Exit code and output of every entry of ``job["commands"]``: arguments of ``m1``, or a job of ``support.pretraining``."""
    out = []
    for command in job["commands"]:
        if isinstance(command, dict):
            ended = pretrained(command)
            out.append([ended["exit"], ended["error"]])
            continue
        done = CliRunner().invoke(app, command)
        out.append([done.exit_code, done.output])
    return out
