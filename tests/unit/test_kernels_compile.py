"""The kernels of a decoding step compile for a Hopper GPU, as their callers launch them: the interpreter is more lenient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Hopper())
run = JITFunction.run

def compiled(self, *args, grid, warmup, **options):
    code = run(self, *args, grid=grid, warmup=True, **options)
    waits, starts = ("griddepcontrol." + what in code.asm["ptx"] for what in ("wait", "launch_dependents"))
    ahead = "prefetch.global.L2" in code.asm["ptx"]
    print(self.fn.__name__, waits and starts and code.metadata.launch_pdl, ahead)

JITFunction.run = compiled
from m1_kernels import overlap
overlap.overlap = lambda device: {"OVERLAP": True, "launch_pdl": True}
from m1_kernels.decode import bookkeeping_triton, post_norm_triton
from m1_kernels.lightning.gpu import decode, fused_layer
from m1_kernels.moe import decode_triton
from m1_kernels.sampling import choose_triton
from m1_kernels.softmax_attention import decode_triton as attention, rotary_triton

dtype = getattr(torch, sys.argv[1])
new = lambda *shape: torch.empty(shape, dtype=dtype)
ids = lambda *shape: torch.zeros(shape, dtype=torch.int64)
fp32, fp64 = torch.zeros, lambda *shape: torch.zeros(shape, dtype=torch.float64)
slots, width, experts, inner = 64, 1024, 16, 1536
x, norm = new(slots, width), new(width)
n, weights, index = post_norm_triton.norm_and_route_triton(x, x, norm, new(experts, width), 2, 3.5, 1.0, 1e-5)
post_norm_triton.norm_and_route_triton(new(1, 6144), new(1, 6144), new(6144), new(32, 6144), 2, 3.5, 1.0, 1e-5)
rows = decode_triton.expert_rows_triton(n, new(4, 2, inner, width), new(4, width, inner), weights, index, 0)
post_norm_triton.sum_and_norm_triton(rows, n, norm, 3.5, 1.0, 1e-5)
decode_triton.mix_few_triton(n, new(4, 2, inner, width), new(4, width, inner), weights, index, 0)
for slots in (64, 1):
    bookkeeping_triton.begin_step_triton(ids(slots), ids(slots), ids(1), fp64(8, slots), ids(8, slots), slots)
    bookkeeping_triton.end_step_triton(
        ids(slots), fp32(slots), ids(slots), ids(8, slots), fp32(8, slots), ids(slots), ids(slots), ids(1), slots
    )
choose_triton.choose_tokens_triton(
    fp32(slots, 320), fp32(slots), ids(slots), fp64(slots), fp64(slots), ids(slots, 8), ids(slots), ids(slots), ids(slots)
)
cache = new(64, 1344, 1, 128)
q = rotary_triton.rotate_into_cache_triton(new(64, 1, 10, 128), ids(64), ids(64), fp32(64), cache, cache)
attention.decode_attention_triton(q, cache, cache, ids(64))
parts = new(64, 8, 4, 128)
out = decode.decode_triton(*parts[:, :, :3].unbind(2), fp32(8), fp32(64, 8, 128, 128), silu=True)
fused_layer.gated_norm_triton(out, parts, new(1024), 1e-5, None)
"""
KERNELS = {
    "_norm_and_route", "_up", "_down", "_sum_and_norm", "_sum_slots", "_end", "_choose", "_rotate_into_cache",
    "_partial", "_joined", "_step", "norm_gate",
}  # fmt: skip
READ_AHEAD = {"_up", "_down"}
"""Those that bring weights into the L2 cache while they wait."""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_kernels_compile_and_wait_for_the_one_before(dtype: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {tuple(line.split()) for line in done.stdout.splitlines()}
    expected = {(name, "True", str(name in READ_AHEAD)) for name in KERNELS}
    assert compiled == expected | {("_begin", "False", "False")}, "the first one of a graph has none before it"
