"""gguf exports with llama.cpp itself: it is asked for what it computes, and every byte of its file counts.

Skipped without the extra ``gguf``, or where M1_LLAMA_CPP does not name the folder of llama.cpp's sources.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exporting import compute_in_this_process, contents, make_tokenizer, weights
from support.importing import RELEASED

from m1_stages.decay import released_slopes
from m1_stages.errors import CheckpointError
from m1_stages.hf.checkpoint_tensors import MemorySource
from m1_stages.hf.contents import Contents
from m1_stages.hf.export import export
from m1_stages.hf.llama_cpp.convert import find_converter
from m1_stages.hf.llama_cpp.read_back import compare_gguf
from m1_stages.hf.verification.comparison import FP32, compare
from m1_stages.hf.verification.tokens import compare_llama_cpp_tokens
from m1_stages.hf.verification.trained import trained_logits, trained_reference

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
SOURCES = os.environ.get("M1_LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(not SOURCES, reason="M1_LLAMA_CPP does not name llama.cpp's sources")

MODEL = dataclasses.replace(RELEASED, vocab_size=288)
SLOPES = released_slopes(MODEL.num_layers, MODEL.num_heads)
AT_ITS_EPSILON = dataclasses.replace(MODEL, lightning_norm_eps=MODEL.norm_eps)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    root = tmp_path_factory.mktemp(request.param)
    what = contents(make_tokenizer(root / "tokenizer"), MODEL, target="gguf", dtype=request.param)
    sources = find_converter(SOURCES, "M1_LLAMA_CPP")
    export(MemorySource(weights(MODEL)), root / "x", what, shard_bytes=1 << 40, llama_cpp=sources)
    return next((root / "x").glob("*.gguf")), what


def trained(tokens: torch.Tensor, function: Any = trained_logits, model: Any = AT_ITS_EPSILON) -> Any:
    return function(MemorySource(weights(MODEL)), model, slopes=SLOPES, rope_base=5e4, tokens=tokens)


def test_llama_cpp_generates_the_same_100_greedy_tokens(exported: tuple[Path, Contents]) -> None:
    """One at a time from its state and cache, against whole forward passes of ours at its epsilon."""
    from m1_stages.hf.llama_cpp.forward import llama_cpp_logits, load

    path, what = exported
    if what.dtype != "fp32":
        pytest.skip("llama.cpp multiplies in bf16")
    prompt = torch.randint(0, 288, (61,), generator=torch.Generator().manual_seed(6)).tolist()
    model, found = load(path, 512), []
    model.eval(prompt)
    for _ in range(100):
        found.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(found[-1:])
    logits = trained(torch.tensor([prompt + found]))[0]
    assert found == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(set(found)) > 20
    tokens = torch.randint(0, 288, (2, 700), generator=torch.Generator().manual_seed(7))
    reference = trained(tokens, trained_reference)
    computed = llama_cpp_logits(path, tokens)
    assert compare(reference, computed, rounding=FP32, loader="llama.cpp").largest < 3e-5
    assert (computed - trained(tokens, model=MODEL)).abs().max() > 1e-4, "the other epsilon shows"


def test_every_byte_of_a_gguf_file_counts(exported: tuple[Path, Contents], monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    compute_in_this_process(monkeypatch)
    path, what = exported
    source = MemorySource(weights(MODEL))
    assert compare_gguf(source, path.parent, what) == 3 + 8 * (2 + 1 + 3) + 7 * 4 + 4
    assert compare_llama_cpp_tokens(path, what.tokenizer.files["tokenizer.json"]) == 4
    places: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        at = (0, tensor.n_bytes // 2, tensor.n_bytes - 1)[len(places) % 3]
        places.setdefault(re.sub(r"\.\d+\.", ".N.", tensor.name), int(tensor.data_offset) + at)
    assert len(places) == 16
    data = bytearray(path.read_bytes())
    for kind, at in [*places.items(), *(("", at) for at in (3, 30, 3000, len(data) - 1))]:
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            compare_gguf(source, path.parent, what)
        assert not kind or re.search(kind.replace("N", r"\d+"), caught.value.what), caught.value.what
        data[at] ^= 4
    path.write_bytes(data)
    compare_gguf(source, path.parent, what)
    with pytest.raises(CheckpointError, match=r"rope\.freq_base is 50000\.0, of the checkpoint it is 60000\.0"):
        compare_gguf(source, path.parent, dataclasses.replace(what, rope_base=6e4))
