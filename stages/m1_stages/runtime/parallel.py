"""Start-up of the process group and of Megatron-Core's parallel state."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from m1_stages.config import ParallelConfig
from m1_stages.errors import ConfigError
from m1_stages.runtime.device import Device
from m1_stages.runtime.rendezvous import inherited_store
from m1_stages.runtime.watchdog import SLOW_PHASE_FACTOR, heartbeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Sizes of all axes, and this process's place in them."""

    world_size: int
    rank: int
    local_world: int
    """Processes on this machine."""
    tp_size: int
    pp_size: int
    cp_size: int
    ep_size: int
    etp_size: int
    dp_size: int
    dp_rank: int
    cp_rank: int = 0
    vpp_size: int = 1
    """Chunks of layers on each pipeline rank."""

    def sizes(self) -> dict[str, int]:
        """Axis sizes by short name, for checkpoints and logs."""
        values = asdict(self)
        return {name: values[f"{name}_size"] for name in ("world", "tp", "pp", "vpp", "cp", "ep", "etp", "dp")}


def local_rank() -> int:
    """Index of this process on its machine, as torchrun or Slurm says; 0 alone."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def global_rank() -> int:
    """Index of this process in the run, as torchrun or the launcher says; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def start(parallel: ParallelConfig, *, device: Device, seed: int) -> Topology:
    """Initialise ``torch.distributed`` (from RANK/WORLD_SIZE, or alone) and Megatron-Core's groups.

    Raises:
        ConfigError: the number of processes is not a multiple of what the parallel sizes need, or gloo cannot do it.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = global_rank()
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    for what, needed in (
        ("tensor x pipeline x context", model_ranks),
        ("expert x expert_tensor x pipeline", expert_ranks),
    ):
        if world % needed:
            raise ConfigError(
                f"{what} = {needed} does not divide the {world} processes of this run",
                where="[parallel]",
                fix=f"start a multiple of {needed} processes (parallel.processes = {needed}) or lower the sizes",
            )
    both = parallel.expert > 1 and parallel.expert_tensor > 1
    if device.backend == "gloo" and both and parallel.dispatcher == "alltoall":
        raise ConfigError(
            f"expert = {parallel.expert} and expert_tensor = {parallel.expert_tensor} together need GPUs with "
            "dispatcher = alltoall: gloo cannot gather the unequal numbers of tokens of the experts",
            where="[parallel]",
            fix='on a CPU set dispatcher = "allgather", or one of the two to 1',
        )
    # The watchdog knows more about a hang than the collective that times out, so it comes first.
    timeout = datetime.timedelta(seconds=SLOW_PHASE_FACTOR * parallel.timeout_s + 60.0)
    heartbeat("join")
    if world == 1:
        store = dist.HashStore()
        dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        inherited = inherited_store(rank, world, timeout)
        dist.init_process_group(device.backend, store=inherited, rank=rank, world_size=world, timeout=timeout)
    heartbeat("build")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        world_size=world,
        rank=rank,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
        tp_size=parallel.tensor,
        pp_size=parallel.pipeline,
        cp_size=parallel.context,
        ep_size=parallel.expert,
        etp_size=parallel.expert_tensor,
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        vpp_size=parallel.virtual_pipeline,
    )


def stop() -> None:
    """Leave the groups; safe to call when they never came up."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
