"""One training step, walked: no file of the product is entered again below another one.

``docs/adr/0015-packages-by-purpose.md`` shows the list of calls. Loops over layers and micro-batches are Megatron's, whose
frames are not ours; a decorator around a function of the same file is not a way back; the backward pass is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.ranks import run_on_ranks
from support.tiny_run import make_run

DECORATORS = {"m1_kernels/autocast.py"}
PACKAGES = ("/m1_stages/", "/m1_kernels/", "/m1_data/")


def ours(frame: FrameType) -> str:
    """Path of the frame's file from its package on; empty for files that are not the product's."""
    path = frame.f_code.co_filename
    found = [path.index(name) + 1 for name in PACKAGES if name in path]
    return path[max(found) :] if found else ""


def files_below_the_loop(frame: FrameType | None) -> Iterator[str]:
    """Files on the stack, innermost first, up to the loop, or up to a backward pass: recomputation starts a new walk there."""
    while frame is not None and frame.f_code.co_name != "backward":
        if (file := ours(frame)) and file not in DECORATORS:
            yield file
        if frame.f_code.co_name == "train_stage":
            return
        frame = frame.f_back


def entered_again(files: list[str]) -> str:
    """The first file that appears twice with another one between, or nothing."""
    entries = [file for n, file in enumerate(files) if n == 0 or files[n - 1] != file]
    return next((file for file in entries if entries.count(file) > 1), "")


def walk(job: dict[str, Any]) -> dict[str, Any]:
    """Train the first stage; watch its third step. The walks that enter a file again, and all files that were entered."""
    from m1_stages.config.load import load_config
    from m1_stages.jobs import pretrain
    from m1_stages.training import loop

    seen: set[str] = set()
    again: dict[str, list[str]] = {}
    steps = iter(range(10**6))
    original = loop._batches

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (file := ours(frame)):
            seen.add(file)
            files = list(files_below_the_loop(frame))
            if file := entered_again(files):
                again.setdefault(file, files[::-1])

    def batches(*args: Any) -> Any:
        sys.setprofile(watch if next(steps) == 2 else None)
        return original(*args)

    loop._batches = batches
    try:
        pretrain.run(load_config(Path(job["config"]), job["set"]), ["32k"], [])
    finally:
        sys.setprofile(None)
        loop._batches = original
    return {"seen": sorted(seen), "again": again}


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_a_step_enters_no_file_twice(tmp_path: Path, recompute: str) -> None:
    config = make_run(tmp_path)
    job = {"config": str(config), "set": [f"run.recompute={recompute}", "evaluate.enabled=false"]}
    (found,) = run_on_ranks(1, "unit.test_step_walk:walk", job, fresh=True)
    assert found["again"] == {}
    passed = {
        "m1_stages/training/loop.py", "m1_stages/training/step.py", "m1_stages/training/objective.py",
        "m1_stages/training/update.py", "m1_stages/model/hybrid.py", "m1_stages/model/post_norm.py",
        "m1_kernels/lightning/dispatch.py", "m1_kernels/lightning/chunked.py", "m1_kernels/moe/experts.py",
        "m1_kernels/cross_entropy/linear.py", "m1_stages/runtime/gradients.py", "m1_stages/guard.py",
    }  # fmt: skip
    assert passed <= set(found["seen"]), "the walk really went from the loop to the kernels"


def test_a_way_back_is_found() -> None:
    assert entered_again(["loop", "step", "step", "loop"]) == "loop"
    assert entered_again(["loop", "step", "step", "model"]) == ""
