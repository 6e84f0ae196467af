"""Every operator says which backend runs and why, and a lightning layer chooses once per forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.batches import packed_batch

from m1_kernels import BackendChoice, choose_backend, lightning_attention, lightning_layer, triton_support
from m1_kernels.lightning import dispatch
from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.model import backend_choices, build_model
from m1_stages.runtime import device, parallel

SHAPE = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, head_dim=16, num_kv_heads=1, rotary_dim=16, num_experts=4,
    expert_hidden_size=32, vocab_size=64,
)  # fmt: skip
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_support.elementwise_refusal.cache_clear()
    yield
    triton_support.elementwise_refusal.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper with Triton and cuDNN."""
    monkeypatch.setattr(triton_support, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16")])
def test_the_choices_on_a_cpu(precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: object())
    assert backend_choices(SHAPE, precision=precision, device=torch.device("cpu")) == {
        "lightning attention": "chunked: Triton kernels need a CUDA device, not cpu (or TRITON_INTERPRET=1, for tests)",
        "softmax attention": f"per-document: {dtype} on cpu: the other backends take 16-bit CUDA tensors only",
        "experts": f"per-expert: {dtype} on cpu: grouped products take bf16 CUDA tensors only",
        "element-wise kernels": "pytorch: Triton kernels need a CUDA device, not cpu",
    }


def test_the_choices_in_bf16_on_a_gpu(a_gpu: pytest.MonkeyPatch) -> None:
    assert backend_choices(SHAPE, precision="bf16", device=CUDA) == {
        "lightning attention": "triton: fastest on a CUDA device",
        "softmax attention": "cudnn: 16-bit inputs on Hopper or newer",
        "experts": "grouped-mm: bf16 on a CUDA device: one product for all experts",
        "element-wise kernels": "triton: one pass over memory on a CUDA device",
    }


def test_the_choices_in_fp32_on_a_gpu(a_gpu: pytest.MonkeyPatch) -> None:
    assert backend_choices(SHAPE, precision="fp32", device=CUDA) == {
        "lightning attention": "triton: fastest on a CUDA device",
        "softmax attention": "per-document: torch.float32 on cuda: the other backends take 16-bit CUDA tensors only",
        "experts": "per-expert: torch.float32 on cuda: grouped products take bf16 CUDA tensors only",
        "element-wise kernels": "triton: one pass over memory on a CUDA device",
    }


def test_the_choices_on_an_older_gpu(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    choices = backend_choices(SHAPE, precision="bf16", device=CUDA)
    assert choices["lightning attention"] == "chunked: Triton kernels need compute capability 8.0 or newer"
    assert choices["softmax attention"] == "varlen: 16-bit inputs on CUDA: torch.nn.attention.varlen"
    assert choices["element-wise kernels"] == "pytorch: Triton kernels need compute capability 8.0 or newer"


def test_the_choices_on_a_gpu_without_triton(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(triton_support, "find_spec", lambda name: None)
    choices = backend_choices(SHAPE, precision="bf16", device=CUDA)
    assert choices["lightning attention"] == "chunked: triton is not installed (pip install 'm1cli[gpu]')"
    assert choices["element-wise kernels"] == "pytorch: triton is not installed (pip install 'm1cli[gpu]')"


@pytest.mark.parametrize(
    ("dtype", "sizes", "why"),
    [
        (torch.float64, (16, 16), "Triton kernels compute fp16, bf16 and fp32, not torch.float64"),
        (torch.float32, (16, 24), "Triton kernels have head sizes (16, 32, 64, 128), not 16 and 24"),
    ],
)
def test_a_gpu_falls_back_for_inputs_that_triton_does_not_take(
    a_gpu: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, int], why: str
) -> None:
    assert choose_backend(CUDA, dtype, sizes) == BackendChoice("chunked", why)


def test_element_wise_kernels_refuse_float64(a_gpu: pytest.MonkeyPatch) -> None:
    assert triton_support.elementwise_refusal(CUDA, torch.float64) is not None
    assert triton_support.elementwise_refusal(CUDA, torch.float16) is None


def test_element_wise_kernels_do_not_heed_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not triton_support.takes_triton(torch.ones(1))


def test_a_given_choice_is_taken_without_a_check() -> None:
    q = torch.ones(1, 4, 2, 16)
    with mock.patch.object(dispatch, "_choose", side_effect=AssertionError("chosen again")):
        lightning_attention(q, q, q, torch.zeros(2), backend=BackendChoice("chunked", "the caller's"))


def test_the_fused_layer_refuses_another_backend() -> None:
    with pytest.raises(ValueError, match="not on 'chunked'"):
        lightning_layer(
            torch.ones(1, 4, 2, 4, 16), torch.ones(32), torch.zeros(2), eps=1e-6, choice=BackendChoice("chunked", "")
        )


@pytest.fixture
def layer() -> Iterator[Any]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    model = build_model(SHAPE, parallel=ParallelConfig(), rope_base=1e4)[0].eval()
    model.set_slopes(released_slopes(SHAPE.num_layers, SHAPE.num_heads))
    yield model.decoder.layers[0].self_attention
    parallel.stop()


def test_a_lightning_layer_chooses_once_per_forward(layer: Any) -> None:
    from m1_stages.model.attention import LightningAttention
    from m1_stages.model.packed_seq_params import PackedSeqParams

    assert isinstance(layer, LightningAttention)
    params = PackedSeqParams.of(packed_batch(torch.zeros(40, dtype=torch.long), [30, 10]), layer.pg_collection.cp)
    hidden = torch.randn(40, 1, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), mock.patch.object(dispatch, "_choose", wraps=dispatch._choose) as chooser:
        layer(hidden, packed_seq_params=params)
    assert chooser.call_count == 1
