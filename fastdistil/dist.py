"""Ranks, devices and the process group.

Everything here also works in one process without a launcher: then there is no process group and collectives return
their input.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fastdistil.launcher import launched


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands: its rank of `world_size`, its device, and a CPU group for host-side agreement."""

    rank: int
    world_size: int
    device: torch.device
    host_group: Any  # a gloo ProcessGroup: flags and objects travel through it without touching the GPU's stream

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str, *, timeout_s: int, threads: int | None) -> Place:
    """Choose the device, join the process group if torchrun made one, and share the cores between the processes.

    Raises ValueError where CUDA is asked for and there is none, or where ranks outnumber the GPUs.
    """
    here = launched()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "--engine.device cuda wants a GPU and PyTorch sees none: use --engine.device cpu, or install the CUDA build of torch"
            )
        if here.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {here.local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}: lower --nproc-per-node"
            )
        torch.cuda.set_device(here.local_rank)
        place_device = torch.device("cuda", here.local_rank)
    else:
        place_device = torch.device("cpu")
        # torchrun sets OMP_NUM_THREADS=1 for several processes, which leaves cores idle
        torch.set_num_threads(
            threads or max(1, len(os.sched_getaffinity(0)) // here.local_world_size)
        )
    host_group = None
    if here.by_torchrun:
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device == "cuda" else "gloo"
        torch_dist.init_process_group(
            backend, timeout=timeout, device_id=place_device if device == "cuda" else None
        )
        host_group = (
            torch_dist.group.WORLD
            if backend == "gloo"
            else torch_dist.new_group(backend="gloo", timeout=timeout)
        )
    return Place(here.rank, here.world_size, place_device, host_group)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed over all ranks, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(x)
    return x


def any_rank(flag: bool, place: Place) -> bool:
    """Whether any rank says yes. Goes over the host group: no GPU sync, about 0.1 ms."""
    if place.host_group is None:
        return flag
    vote = torch.tensor([int(flag)])
    torch_dist.all_reduce(vote, op=torch_dist.ReduceOp.MAX, group=place.host_group)
    return bool(vote[0])  # a CPU tensor


def first_error(error: str | None, place: Place) -> str | None:
    """The error of the lowest rank that has one, on every rank: all stop together and rank 0 can say why."""
    if place.host_group is None:
        return error
    errors: list[str | None] = [None] * place.world_size
    torch_dist.all_gather_object(errors, error, group=place.host_group)
    return next((f"rank {rank}: {e}" if rank else e for rank, e in enumerate(errors) if e), None)


def broadcast_object(value: Any, place: Place) -> Any:
    """Rank 0's picklable `value`, on every rank."""
    if place.host_group is None:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=place.host_group)
    return box[0]


def broadcast_tensor(x: Tensor) -> Tensor:
    """Rank 0's `x` on every rank, in place; same shape and dtype everywhere, on the rank's device."""
    if torch_dist.is_initialized():
        torch_dist.broadcast(x, src=0)
    return x


def barrier(place: Place) -> None:
    """Wait until every rank is here."""
    if place.host_group is not None:
        torch_dist.barrier(group=place.host_group)
