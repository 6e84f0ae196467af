"""``m1 demo`` asks for what its last commands need before its first one."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1_stages import packages
from m1cli.app import app


def test_missing_packages_are_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("transformers", "plotly") else name)
    done = CliRunner().invoke(app, ["demo", "--dir", str(tmp_path / "demo")])
    assert done.exit_code == 3, done.output
    told = " ".join(done.output.split())
    assert "the demo needs transformers and plotly, not installed here" in told
    assert 'pip install "m1cli[demo]"' in told
    assert not (tmp_path / "demo").exists()
