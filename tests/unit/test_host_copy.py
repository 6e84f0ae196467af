"""Copies of a state in host memory that is used again."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from m1_stages.checkpoint.host_copy import HostCopy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def state(device: str, seed: int) -> list[torch.Tensor]:
    """Of every kind: larger than a buffer, empty, without dimensions, not contiguous, of several dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = [
        random(300, 7),
        random(5).bfloat16(),
        random(0, 3),
        random(()),
        random(40, 30).t(),
        random(9) > 0,
        random(64),
    ]
    return [tensor.to(device) for tensor in [*tensors, *(random(n) for n in range(1, 60))]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slot_bytes", [96, 1000, 1 << 20])
def test_copies_have_the_values_and_stay_while_the_state_changes(device: str, slot_bytes: int) -> None:
    host, tensors = HostCopy(slot_bytes, cpu_too=True), state(device, 1)
    expected = [tensor.cpu().clone() for tensor in tensors]
    copies = host.of(tensors)
    for tensor in tensors:
        tensor.zero_()
    for copy, value in zip(copies, expected, strict=True):
        assert (copy.device.type, copy.dtype, copy.shape) == ("cpu", value.dtype, value.shape)
        assert torch.equal(copy, value)


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_is_used_again(device: str) -> None:
    host = HostCopy(1000, cpu_too=True)
    first = [copy.data_ptr() for copy in host.of(state(device, 1)) if copy.numel()]
    tensors = state(device, 2)
    copies = host.of(tensors)
    assert [copy.data_ptr() for copy in copies if copy.numel()] == first
    assert all(torch.equal(copy, tensor.cpu()) for copy, tensor in zip(copies, tensors, strict=True))
    more = [*tensors, torch.ones(5000, device=device)]
    assert all(torch.equal(copy, tensor.cpu()) for copy, tensor in zip(host.of(more), more, strict=True))


def test_each_copy_is_saved_alone() -> None:
    """``torch.save`` writes the whole storage of a view: here it must be the tensor's bytes."""
    file = io.BytesIO()
    torch.save(HostCopy().of([torch.ones(1 << 20), torch.ones(3)])[1], file)
    assert file.tell() < 4000
    file.seek(0)
    assert torch.load(file).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
def test_an_optimizer_in_host_memory_is_copied_with_a_model_on_the_gpu() -> None:
    tensors = [torch.arange(9.0, device="cuda"), torch.arange(7.0)]
    copies = HostCopy().of(tensors)
    tensors[1].zero_()
    assert [copy.tolist() for copy in copies] == [list(range(9)), list(range(7))]


@pytest.mark.parametrize("num_bytes", [1 << 20, 100], ids=["enough", "too little"])
def test_memory_that_was_prepared_is_used_if_it_is_enough(num_bytes: int) -> None:
    host, tensors = HostCopy(1000, cpu_too=True), state("cpu", 1)
    host.prepare(num_bytes)
    prepared = np.frombuffer(host._memory, dtype=np.uint8).ctypes.data  # type: ignore[arg-type]
    copies = host.of(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert (copies[0].data_ptr() == prepared) is (num_bytes > 1000)
