"""Ranks, devices and the process group.

Everything here also works in one process without a launcher: then there is no process group and collectives return
their input.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastdistil.run.command import launched


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands: its rank of `world_size`, its device, and a CPU group for host-side agreement."""

    rank: int
    world_size: int
    device: torch.device
    host_group: Any  # a gloo ProcessGroup: flags and objects travel through it without touching the GPU's stream
    second_device: torch.device | None = None  # where the teacher lives, if not with the student
    teacher_link: "TeacherLink | None" = None  # where ranks are set aside for teachers

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_teacher(self) -> bool:
        """Whether this rank is set aside for a teacher; it is none of `world_size`, which counts students."""
        return self.rank >= self.world_size

    @property
    def num_devices(self) -> int:
        """Devices at work in the whole run."""
        num_teachers = self.teacher_link.num_teachers if self.teacher_link else 0
        return self.world_size * (2 if self.second_device else 1) + num_teachers


def init(
    device: str, *, timeout_s: int, threads: int | None, teacher_ranks: int = 0, second_device: bool = False
) -> Place:
    """Choose the device, join the process group if torchrun made one, and share the cores between the processes.

    The last `teacher_ranks` ranks are left out of the process group, so that DeepSpeed sees students alone; `teacher_link` joins
    them. Raises ValueError where CUDA is asked for and there is none, or where ranks outnumber the GPUs.
    """
    here, second = launched(), None
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
        if second_device:
            second = torch.device("cuda", here.local_rank + here.local_world_size)
            if second.index >= torch.cuda.device_count():
                raise ValueError(
                    f"--teacher.device second wants {2 * here.local_world_size} GPUs for {here.local_world_size} process(es) here, this machine has "
                    f"{torch.cuda.device_count()}: lower --nproc-per-node, or use --teacher.device same"
                )
    else:
        if second_device:
            raise ValueError("--teacher.device second wants a second GPU, got the CPU: use --teacher.device same")
        place_device = torch.device("cpu")
        keep_freed_memory()
        settle_vector_math()
        # torchrun sets OMP_NUM_THREADS=1 for several processes, which leaves cores idle
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here.local_world_size))
    host_group = link = None
    num_students = here.world_size - teacher_ranks
    if here.by_torchrun:
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device == "cuda" else "gloo"
        store, *_ = next(rendezvous("env://", timeout=timeout))
        if teacher_ranks:
            link = TeacherLink(
                PrefixStore("teachers", store), here.rank, num_students, teacher_ranks, backend=backend, timeout=timeout
            )
        if here.rank < num_students:
            torch_dist.init_process_group(
                backend,
                store=PrefixStore("students", store),
                rank=here.rank,
                world_size=num_students,
                timeout=timeout,
                device_id=place_device if device == "cuda" else None,
            )
            host_group = (
                torch_dist.group.WORLD if backend == "gloo" else torch_dist.new_group(backend="gloo", timeout=timeout)
            )
    return Place(here.rank, num_students, place_device, host_group, second, link)


Question = tuple[int, int]  # (which sequence of micro-batches, number in it)


class TeacherLink:
    """What students and the ranks set aside for teachers say to each other: questions one way, hidden states the other.

    Student r asks teacher rank num_students + r % num_teachers. Groups of its own, made without torch.distributed's registry:
    there the students alone are the world. A peer that dies closes the connection, which raises RuntimeError here.
    """

    STOP: Question = (-1, 0)

    def __init__(
        self, store: Any, rank: int, num_students: int, num_teachers: int, *, backend: str, timeout: timedelta
    ) -> None:
        size = num_students + num_teachers
        self.num_teachers = num_teachers
        self.students = [r for r in range(num_students) if num_students + r % num_teachers == rank]
        self.teacher = num_students + rank % num_teachers  # of a student
        self.host: Any = torch_dist.ProcessGroupGloo(store, rank, size, timeout)
        self.device: Any = self.host
        if backend == "nccl":
            options = torch_dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            store = PrefixStore("nccl", store)
            self.device = torch_dist.ProcessGroupNCCL(store, rank, size, options)
        self.open: list[tuple[Any, Any]] = []  # (question, answer) on their way

    def ask(self, question: Question, answer: Tensor) -> Callable[[], None]:
        """A student: have `answer` filled, without waiting: the host group's own threads deliver the question.

        The result waits until it is filled; with NCCL it is the current stream that waits, not the host.
        """
        asked = self.host.send([torch.tensor(question)], self.teacher, 0)
        works = asked, self.device.recv([answer], self.teacher, 0)
        self.open.append(works)

        def wait() -> None:
            for work in works:
                work.wait()
            self.open.remove(works)

        return wait

    def stop(self) -> None:
        """A student: no more questions."""
        for work in chain.from_iterable(self.open):  # asked ahead and not used
            work.wait()
        if self.device is not self.host:  # a sync, once a run: STOP must not overtake an answer
            torch.cuda.synchronize()
        self.host.send([torch.tensor(self.STOP)], self.teacher, 0).wait()

    def next_question(self, student: int) -> Question:
        """A teacher: wait for what a student asks."""
        question = torch.empty(2, dtype=torch.int64)
        self.host.recv([question], student, 0).wait()
        split, number = question.tolist()  # a CPU tensor
        return split, number

    def reply(self, student: int, answer: Tensor) -> None:
        """A teacher: fill the oldest open answer of a student."""
        self.device.send([answer], student, 0).wait()

    def gather(self, text: str) -> list[str]:
        """The first 4,000 bytes of what every rank says, in the order of ranks; all must call it."""
        data = text.encode()[:4000].ljust(4000, b"\0")
        said = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = [torch.empty_like(said) for _ in range(self.host.size())]
        self.host.allgather([everyone], [said]).wait()
        return [x.numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for x in everyone]


def keep_freed_memory() -> None:
    """Let this process keep the CPU memory that it frees, in pages of 2 MiB where Linux gives them; nothing without glibc.

    Freed tensors of many megabytes go back to the system otherwise, and coming by them again costs a page fault for every
    4 KiB: 10 to 18 % of a training step in fp32 on two cores, 4 to 7 % in bf16. A loss chunk's rows are 120 KB apart, so small pages
    also miss the TLB: 30 % of that product. Takes effect for all tensors if it is called before the first one is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            mallopt(parameter, value)


def settle_vector_math() -> None:
    """Have MKL's vector functions choose their kernels now, in one thread.

    They choose at their first call in a process, and where two threads make it at once one of them may take a kernel for another
    processor, that once: 15 of 490 runs of a toy model had other last bits in their first micro-batch, with this 0 of 200. Both functions are
    called by the encoder's attention on CPUs.
    """
    torch.ones(1).exp().log()


def bound_every_group(timeout_s: int) -> None:
    """Give process groups that others made this timeout, too: DeepSpeed's have PyTorch's, 10 or 30 minutes."""
    from torch.distributed import distributed_c10d as c10d

    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def tell_launcher(error: BaseException) -> None:
    """Let torchrun name this error, and the first one of all ranks as the cause."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


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


def gather_numbers(value: float, place: Place) -> list[float]:
    """What every rank says, in the order of ranks. Over the host group."""
    if place.host_group is None:
        return [value]
    everyone = [torch.zeros(1, dtype=torch.float64) for _ in range(place.world_size)]
    mine = torch.tensor([value], dtype=torch.float64)
    torch_dist.all_gather(everyone, mine, group=place.host_group)
    return torch.cat(everyone).tolist()  # CPU tensors


def first_error(error: str | None, place: Place) -> str | None:
    """The error of the lowest rank that has one, on every rank: all stop together and rank 0 can say why."""
    if place.teacher_link is not None:
        errors = place.teacher_link.gather(error or "")
    elif place.host_group is None:
        return error
    else:
        errors = [None] * place.world_size
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
