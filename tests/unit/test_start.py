"""How a training process starts and ends: what it never imports, and that it does not take Python apart at its end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_run import make_run

from m1_stages.runtime.imports import importing

UNUSED = (
    "torch._inductor.compile_fx", "torch._inductor.lowering", "torch.ao.quantization.fx.convert", "networkx", "transformers",
    "datasets", "tokenizers", "pyarrow", "pandas", "plotly", "matplotlib", "scipy", "huggingface_hub", "torchvision", "fastapi",
)  # fmt: skip
"""What Megatron-Core, torch or a job imports when it can, and training does without; together it took two seconds."""


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_pretraining_imports_and_compiles_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "def end():\n"
        "    import torch\n"
        f"    print('LOADED', [m for m in {UNUSED!r} if m in sys.modules], torch.compile.__module__)\n"
        "atexit.register(end)\n"
        "from m1cli.app import main\n"
        "main()\n"
    )
    done = _python(code, "pretrain", "--stage", "32k", "--config", str(make_run(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LOADED [] torch"), done.stdout[-500:] + done.stderr[-500:]


END = """
import atexit, sys, types
from m1cli import app
class Taken: # noqa
    def __del__(self): print("taken apart", flush=True)
kept = Taken()
atexit.register(lambda: print("exit function", end=" "))
def command(): {first}; sys.exit({code})
app.app = command
app.main()
"""


@pytest.mark.parametrize(
    ("first", "code", "printed", "status"),
    [
        ("sys.modules['torch'] = sys", "75", "exit function", 75),
        ("sys.modules['torch'] = sys", "None", "exit function", 0),
        ("pass", "75", "exit function taken apart", 75),
        ("sys.modules['torch'] = sys", "'a text'", "exit function taken apart", 1),
        ("import threading; sys.modules['torch'] = sys; threading.Timer(0.2, print, ['thread']).start()", "75",
         "thread\nexit function taken apart", 75),
    ],
)  # fmt: skip
def test_a_process_with_torch_ends_at_once(first: str, code: str, printed: str, status: int) -> None:
    done = _python(END.format(first=first, code=code))
    assert (done.stdout.strip(), done.returncode) == (printed, status), done.stderr


def test_nothing_is_collected_while_libraries_are_imported() -> None:
    assert gc.isenabled()
    during = []

    def fails() -> None:
        with importing():
            during.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fails()
    assert (during, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
