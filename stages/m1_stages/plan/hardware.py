"""Holds the GPUs by name, and every measured constant of the time and memory model. Calibrate here and nowhere else.

Sizes: FLOP/s and bytes/s in plain units, memory in GiB, shares between 0 and 1, bandwidths per direction and GPU.
"""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass

from m1_stages.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU and the links of its machine, as the vendor states them."""

    name: str
    bf16_flops: float
    """FLOP/s of dense bf16 products."""
    fp32_flops: float
    """FLOP/s of fp32 products without TF32, which ``run.precision = fp32`` uses."""
    memory_gib: float
    """GiB that the driver reports."""
    memory_bandwidth: float
    """Bandwidth of the GPU's memory, bytes/s."""
    link_bandwidth: float
    """Bandwidth to the GPUs of the same machine, bytes/s in each direction."""
    network_bandwidth: float
    """Bandwidth to other machines, bytes/s in each direction: one network card for each GPU."""
    flash_attention: float
    """Share of peak FLOP/s of softmax attention through flash (``torch.nn.attention.varlen``), causal half counted."""
    cudnn: bool
    """Softmax attention of whole documents goes through cuDNN on compute capability 9.0 and up
    (``m1_kernels.softmax_attention.attention``)."""
    host_link: float
    """Bandwidth to the host's memory, bytes/s in each direction: PCIe x16."""
    gpus_per_node: int = 8
    host_memory_gib: float = 2048.0
    """Memory of a machine with ``gpus_per_node`` of them."""


# Vendors' data sheets: A100/A800 80GB SXM, H100/H800/H200/H20 SXM, HGX B200, GeForce RTX 4090 (fp16 with fp32 sums, no
# NVLink: PCIe 4.0 x16). Memory as nvidia-smi shows it. Networks are the usual ones: 200 Gbit/s a GPU beside an A100, 400
# beside newer ones, 100 Gbit/s for a whole machine of 4090s. Hosts are on PCIe 5.0 (63 GB/s), beside an A100 or 4090 on 4.0.
# Host memory: DGX A100 80GB, H100, H200 and B200 have 2 TiB; 512 GiB is usual beside eight 4090s.
# Flash shares: measured on one H200 (300-350 TFLOP/s), where the kernel does not use the newer tensor-core instructions;
# elsewhere estimates: 190 TFLOP/s on an A100, H20 and 4090 at the same share, a B200 as fast as an H200.
_GPUS = (
    Gpu(name="a100", bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=79.2, memory_bandwidth=2.04e12,
        link_bandwidth=300e9, network_bandwidth=25e9, flash_attention=0.6, cudnn=False, host_link=31.5e9),
    Gpu(name="a800", bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=79.2, memory_bandwidth=2.04e12,
        link_bandwidth=200e9, network_bandwidth=25e9, flash_attention=0.6, cudnn=False, host_link=31.5e9),
    Gpu(name="h20", bf16_flops=148e12, fp32_flops=44e12, memory_gib=95.6, memory_bandwidth=4.0e12,
        link_bandwidth=450e9, network_bandwidth=50e9, flash_attention=0.6, cudnn=True, host_link=63e9),
    Gpu(name="h100", bf16_flops=989e12, fp32_flops=67e12, memory_gib=79.2, memory_bandwidth=3.35e12,
        link_bandwidth=450e9, network_bandwidth=50e9, flash_attention=0.33, cudnn=True, host_link=63e9),
    Gpu(name="h800", bf16_flops=989e12, fp32_flops=67e12, memory_gib=79.2, memory_bandwidth=3.35e12,
        link_bandwidth=200e9, network_bandwidth=50e9, flash_attention=0.33, cudnn=True, host_link=63e9),
    Gpu(name="h200", bf16_flops=989e12, fp32_flops=67e12, memory_gib=139.8, memory_bandwidth=4.8e12,
        link_bandwidth=450e9, network_bandwidth=50e9, flash_attention=0.33, cudnn=True, host_link=63e9),
    Gpu(name="b200", bf16_flops=2250e12, fp32_flops=75e12, memory_gib=178.3, memory_bandwidth=7.7e12,
        link_bandwidth=900e9, network_bandwidth=50e9, flash_attention=0.15, cudnn=True, host_link=63e9),
    Gpu(name="rtx4090", bf16_flops=165e12, fp32_flops=83e12, memory_gib=24.0, memory_bandwidth=1.01e12,
        link_bandwidth=25e9, network_bandwidth=1.6e9, flash_attention=0.6, cudnn=False, host_link=31.5e9,
        host_memory_gib=512.0),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _GPUS}


def gpu_named(name: str) -> Gpu:
    """Return the GPU called ``name``, in upper or lower case.

    Raises:
        ConfigError: there is no such GPU; the message lists the known ones.
    """
    if (gpu := GPUS.get(name.lower())) is not None:
        return gpu
    hint = difflib.get_close_matches(name.lower(), GPUS, n=1)
    known = ", ".join(GPUS)
    raise ConfigError(
        f"there is no GPU {name!r} here; known are {known}",
        where="--gpu",
        fix=f"did you mean {hint[0]}?" if hint else "choose the nearest of them",
    )


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU that a driver calls ``name``, like ``NVIDIA A100-SXM4-80GB``; None when there is no such GPU here."""
    words = re.findall("[a-z0-9]+", name.lower())
    names = [*words, *map("".join, itertools.pairwise(words))]  # "RTX 4090" is two words
    return next((GPUS[word] for word in names if word in GPUS), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Measured behaviour, as shares of the vendor's numbers so that it carries over to other GPUs.

    Sources: [step] profiles of training steps of 700m, bf16, one H200, 32,768 (kept), 131,072 (kept) and 1,048,576 tokens
    (recomputed), ``docs/LOG.md`` of 2026-11-26; [log] other entries there; [guess] not measured.
    """

    matrix: float = 0.74
    """Share of peak FLOP/s of projections. [step] 1M tokens: 328 TFLOP in 443 ms."""
    experts: float = 0.65
    """Share of peak FLOP/s of the grouped products of the experts. [step] 682 TFLOP/s at 32K, 666 at 128K, 624 at 1M."""
    head: float = 0.63
    """Share of peak FLOP/s of the head's bf16 -> fp32 products. [step] 1M tokens: 275 TFLOP in 444 ms."""
    head_bytes_per_logit: float = 10.0
    """Memory traffic of softmax and its gradient. fp32 read twice, bf16 written once. [step] 85.5 ms at 1M tokens."""
    cudnn_attention: float = 0.54
    """Share of peak FLOP/s of softmax attention through cuDNN, causal half counted. [step] 1M tokens: 506 TFLOP/s forward,
    538 backward."""
    softmax_backward: float = 2.5
    """Backward over forward FLOPs: five products instead of two (scores are computed again)."""
    bandwidth: float = 0.88
    """Share of the memory bandwidth that a copy reaches. [log] 4.24 of 4.8 TB/s."""
    lightning_forward: float = 1.0
    """Share of copy bandwidth of the fused layer over 14 tensors. [log] 6.8 ms; the scan alone reaches 0.79."""
    lightning_backward: float = 0.6
    """Share of copy bandwidth of the fused layer's backward over 27 tensors. [step] layer between its projections 249 ms
    at 1M, 7.0 ms at 32K."""
    element_wise: float = 0.9
    """Share of copy bandwidth of norms, residuals, activations, router, copies. [step] 500 ms at 1M tokens."""
    moe_index_s_per_slot: float = 3.5e-9
    """Sorting, index arithmetic and gathers, seconds per (token, expert) slot and pass at the H200's bandwidth.
    [step] 136 ms / (1,048,576 x 2 slots x 8 layers x 2 passes) = 4.0e-9, 3.9e-9 at 32K; rows gathered count as
    element-wise."""
    host_s_per_layer_pass: float = 5.5e-3
    """Python and kernel launches of one layer in one pass; counts where the GPU would be faster. [log] 700m at 16,384 tokens
    a micro-batch, recomputed: 112,500 tokens/s = 0.146 s for 8 layers x 3 passes and a quarter of a step's end."""
    host_s_per_layer_step: float = 1.0e-3
    """Host time of one layer at the end of a step: loss, norms and routing are read while the GPU idles. [step] 32K
    tokens: 110 ms, of which the GPU is busy for 102; the profiler shows 17 ms, a part of which is its own."""
    expert_imbalance: float = 1.15
    """Tokens of the busiest expert-parallel rank over the mean. [guess]"""
    optimizer_bytes_per_parameter: float = 88.0
    """Norms, scaling, clipping, fused AdamW (28), copy to bf16. [step] 14.7 ms that do not depend on the tokens."""
    link: float = 0.80
    """Share of the links a collective reaches within a machine. [guess]"""
    network: float = 0.85
    """Share of the network that a collective reaches between machines. [guess]"""
    latency_s: float = 20e-6
    """Latency of one collective within a machine. [guess]"""
    hop_s: float = 5e-6
    """Additional latency for each rank beyond this machine. [guess]"""
    reserve_gib: float = 1.6
    """CUDA context, NCCL, cuBLAS: on the device, but not allocated by torch. [guess]"""
    fragmentation: float = 0.03
    """Share of torch's allocations that is lost in freed blocks too small for reuse. [guess]"""
    headroom: float = 0.03
    """Share of a GPU's memory that a layout must leave free to be proposed. [guess]"""
    keep_margin: float = 0.1
    """Share of a GPU's memory that must stay free where activations are kept although they could be recomputed: four times the
    largest deviation of an estimate from a measured peak."""
    keep_margin_experts: float = 0.25
    """``keep_margin`` with expert parallelism: how many tokens the busiest rank gets is not known in advance. [guess]"""
    host_bandwidth: float = 0.8
    """Share of the link to the host that a copy to pinned memory reaches. [guess]"""
    pinned_rounding: float = 1.4
    """Pinned memory that torch takes over what is asked for, because its blocks are powers of two. Counted over the fp32 tensors
    of a rank: 1.29 for 700m, 1.42 for 7b-a1b (1.39 with EP 8), 1.24 for the released model with EP 8."""
    process_gib: float = 5.0
    """Host memory of a process without checkpoints: Python, torch, CUDA, NCCL, the batches. [guess]"""
    start_s: float = 20.0
    """From the start of a process until it loads a checkpoint or trains: imports, ranks, data, model, kernels from a warm
    cache. [guess]"""
    save_plan_s: float = 0.5
    """Planning a checkpoint and meeting the other ranks. [guess]"""
    host_copy_bytes_per_s: float = 8e9
    """A process copies its state from the GPU through two pinned buffers to ordinary memory. [guess]"""
    gather_bytes_per_s: float = 4e9
    """A process gathers the state of a distributed optimizer in host memory. [guess]"""
    write_bytes_per_s: float = 1e9
    """A process writes, hashes, flushes and reads back a checkpoint with two threads, to a file system as fast as memory.
    [log] 1.06e9. A slower file system decides."""
    load_bytes_per_s: float = 2e9
    """A process verifies and loads its part of a checkpoint. [guess] verifying alone: [log] 3.2e9 with two threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Sizes and properties of the trainer's layers that time and memory depend on; each names the code that decides it."""

    tile_tokens: int = 65_536
    """Tokens whose experts' inner values exist together (``m1_kernels.moe.experts.TILE_TOKENS``); only where every expert is on
    the rank."""
    recompute_keeps_softmax: bool = True
    """Recomputation keeps the output of softmax attention (``m1_stages.model.spec``)."""
    expands_keys: bool = True
    """Keys and values are repeated for every query head (``m1_kernels.softmax_attention.attention``, torch 2.11)."""
    logits_at_once: int = 2**27
    """Logits of a chunk: ``m1_kernels.cross_entropy.linear.LOGITS_AT_ONCE``."""
    fewest_tokens: int = 1024
    """Smallest number of tokens of a chunk: ``m1_kernels.cross_entropy.linear.FEWEST_TOKENS``."""
    optimizer_copies: float = 1.0
    """fp32 copies of the largest group of parameters that the update makes (torch's AdamW, all tensors at once)."""


CALIBRATION = Calibration()
TRAINER = Trainer()
