"""Ranks: the processes that train together, their devices, and how they agree.

Everything here also works in one process without a launcher: then there is no process group and collectives return
their input.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastdistil.run.command import Failed, Launched, is_installed, launched, num_cores
from fastdistil.run.config import PER_HOST, Config, flatten, to_json
from fastdistil.run.link import TeacherLink

ANSWERS_S = 3.0
"""For so long a rank that fails waits for torch.distributed's store."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a run. Host-side agreement travels over gloo, so that no GPU has to be waited for."""

    rank: int
    world_size: int
    """Ranks that train a student."""
    device: torch.device
    host_group: Any = None
    """A gloo ProcessGroup of the ranks that train; None in a single process."""
    second_device: torch.device | None = None
    """Where the teacher lives, if not with the student."""
    link: TeacherLink | None = None
    """Where ranks are set aside for teachers."""
    store: Any = None
    """torch.distributed's store of these ranks; None in a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    @property
    def is_teacher(self) -> bool:
        """Whether this rank is set aside for a teacher; it is none of `world_size`, which counts students."""
        return self.rank >= self.world_size

    @property
    def num_devices(self) -> int:
        """Devices at work in the whole run."""
        return self.world_size * (2 if self.second_device else 1) + (self.link.num_teachers if self.link else 0)

    @property
    def machine(self) -> str:
        """What is at work, for a reader: "8 × NVIDIA H100 80GB HBM3", or "Intel Xeon Processor, 8 threads"."""
        if self.device.type == "cuda":
            return f"{self.num_devices} × {torch.cuda.get_device_name(self.device)}"
        cpus = Path("/proc/cpuinfo")  # elsewhere than on Linux the system's own word for it
        lines = cpus.read_text(errors="replace").splitlines() if cpus.is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
        threads = self.num_devices * torch.get_num_threads()
        return f"{name.replace('(R)', '')}, {threads} thread{'s' * (threads > 1)}"

    @contextmanager
    def together(self, *, with_teachers: bool = False) -> Iterator[None]:
        """A stage that all ranks pass or none: what one refuses inside (ValueError, OSError) is raised on all of them.

        The lowest rank that refused is heard: rank 0 raises its own exception, all others a ValueError of its words.
        Every rank that trains must come here; `with_teachers` those that are set aside for teachers, too. A refusal is
        the end: teachers that are already serving are told, and the process group is left.
        """
        error = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        words = "" if error is None else str(error) or repr(error)
        said = self.gather_text(words, with_teachers=with_teachers)
        first = next((rank for rank, text in enumerate(said) if text), None)
        if first is None:
            return
        if not with_teachers:
            self.leave()
        if error is not None and first == self.rank == 0:
            raise error
        raise ValueError(f"rank {first}: {said[first]}" if first else said[first]) from error

    def gather_text(self, text: str, *, with_teachers: bool) -> list[str]:
        """What every rank says, in the order of ranks; at most 4,000 bytes of it where there are teachers."""
        if with_teachers and self.link is not None:
            return self.link.gather(text)
        if self.host_group is None:
            return [text]
        said: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(said, text, group=self.host_group)
        return said

    def require_one_command(self, config: Config) -> None:
        """Raises ValueError, on every rank alike, where one has other options or other code than rank 0.

        Every host is started on its own; ranks with other options would meet, and spoil the run in silence.
        """
        here, defaults = flatten(to_json(config)), flatten(to_json(Config()))
        facts = {f"--{k}": v for k, v in here.items() if v != defaults[k] and k not in PER_HOST}
        facts |= {"torch": torch.__version__, "the code of fastdistil": _code_digest()}
        if config.engine.zero_stage is None:  # which follows from it
            facts["DeepSpeed"] = "installed" if is_installed("deepspeed") else "missing"
        first, *others = map(json.loads, self.gather_text(json.dumps(facts), with_teachers=True))
        for rank, other in enumerate(others, start=1):
            for name in sorted(first.keys() | other.keys()):
                on_0, on_rank = (said.get(name, "the default") for said in (first, other))
                if on_0 != on_rank:
                    raise ValueError(
                        f"{name.replace('_', '-')} is {on_rank} on rank {rank} and {on_0} on rank 0: start the same "
                        "command of the same version on every host"
                    )

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all ranks, in place."""
        if self.host_group is not None:
            torch_dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether any rank says yes. Goes over the host group: no GPU sync, about 0.1 ms."""
        if self.host_group is None:
            return flags
        # A bit each: one number is one message, four are two.
        votes = torch.tensor([sum(flag << i for i, flag in enumerate(flags))])
        torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.BOR, group=self.host_group)
        together = int(votes[0])  # a CPU tensor
        return tuple(bool(together >> i & 1) for i in range(len(flags)))

    def gather(self, number: float) -> list[float]:
        """What every rank says, in the order of ranks. Over the host group."""
        if self.host_group is None:
            return [number]
        everyone = [torch.zeros(1, dtype=torch.float64) for _ in range(self.world_size)]
        torch_dist.all_gather(everyone, torch.tensor([number], dtype=torch.float64), group=self.host_group)
        return torch.cat(everyone).tolist()  # CPU tensors

    def first_cause(self, cause: str) -> str:
        """What ended the run: `cause`, unless another rank has said its own before.

        Whoever loses a rank hears no more than a closed connection, so each says in the store why it ends before it
        does. Waits ANSWERS_S at most: the store may have gone, too.
        """
        if self.store is None:
            return cause
        said = [cause]

        def ask() -> None:
            with contextlib.suppress(Exception):  # the store has gone
                said.append(self.store.compare_set("cause", "", cause).decode())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWERS_S)
        return said[-1]

    def ask_students_to_stop(self) -> None:
        """A rank that is set aside for a teacher: it has no part in the exchange by which students hear of a signal."""
        with contextlib.suppress(Exception):  # the store has gone
            self.store.set("stop", "")

    def is_asked_by_teacher(self) -> bool:
        """Whether a rank that is set aside has had a signal; rank 0 asks, in a message where there are some."""
        return self.link is not None and self.store.check(["stop"])

    def leave(self) -> None:
        """Tell the teacher ranks that this student has no more questions, and leave the process group."""
        if self.link is not None:
            self.link.stop()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.host_group is None:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def broadcast_tensor(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank, in place; same shape and dtype everywhere, on the rank's device."""
        if self.host_group is not None:
            torch_dist.broadcast(x, src=0)
        return x


def init_ranks(
    device: str, *, timeout_s: int, threads: int | None, teacher_ranks: int = 0, second_device: bool = False
) -> Ranks:
    """Choose the device, join the process group if torchrun made one, and share the cores between the processes.

    The last `teacher_ranks` ranks are left out of the process group, so that DeepSpeed sees students alone; a link
    joins them. Raises ValueError where CUDA is asked for and there is none, or where ranks outnumber the GPUs; Failed
    where they do not all come.
    """
    here = launched()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    second = None
    if device == "cuda":
        if not is_installed("triton"):
            raise ValueError(
                "a GPU is served by Triton, which is not installed: `pip install triton` on Linux, `pip install "
                "triton-windows` on Windows, or use --engine.device cpu"
            )
        home, second = _gpus(here, second_device=second_device)
        torch.cuda.set_device(home)
    elif second_device:
        raise ValueError("--teacher.device second wants a second GPU, got the CPU: use --teacher.device same")
    else:
        home = torch.device("cpu")
        keep_freed_memory()
        settle_vector_math()
        # torchrun sets OMP_NUM_THREADS=1 for several processes, which leaves cores idle.
        torch.set_num_threads(threads or max(1, num_cores() // here.local_world_size))
    num_students = here.world_size - teacher_ranks
    if not here.by_torchrun:
        return Ranks(here.rank, num_students, home, second_device=second)
    try:
        return _meet(here, num_students, home, second, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:  # a store that was waited for in vain, a connection that was refused
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise Failed(
            f"the {here.world_size} ranks have not all met within --engine.timeout-s {timeout_s} ({said:.200}): a host "
            "has refused, and says why, or it cannot be reached"
        ) from error


def _meet(
    here: Launched, num_students: int, home: torch.device, second: torch.device | None, *, timeout: timedelta
) -> Ranks:
    teacher_ranks = here.world_size - num_students
    backend = "nccl" if home.type == "cuda" else "gloo"
    store, *_ = next(rendezvous("env://", timeout=timeout))
    link = host_group = None
    if teacher_ranks:
        of_link = PrefixStore("teachers", store)
        link = TeacherLink(of_link, here.rank, num_students, teacher_ranks, backend=backend, timeout=timeout)
    if here.rank < num_students:
        torch_dist.init_process_group(
            backend,
            store=PrefixStore("students", store),
            rank=here.rank,
            world_size=num_students,
            timeout=timeout,
            device_id=home if home.type == "cuda" else None,
        )
        on_host = backend == "gloo"
        host_group = torch_dist.group.WORLD if on_host else torch_dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(here.rank, num_students, home, host_group, second, link, store)


def _code_digest() -> str:
    """Some of the SHA-256 of the package's Python files."""
    package = Path(__file__).parents[1]
    files = sorted(
        {*package.glob("**/*.py"), *package.glob("kernels/*.py")}
    )  # in a checkout a link, which ** leaves out
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _gpus(here: Launched, *, second_device: bool) -> tuple[torch.device, torch.device | None]:
    """This process's GPU, and another one for its teacher where that is asked for."""
    if not torch.cuda.is_available():
        raise ValueError(
            "--engine.device cuda wants a GPU and PyTorch sees none: use --engine.device cpu, or install the CUDA "
            "build of torch"
        )
    count = torch.cuda.device_count()
    if here.local_world_size > count:
        raise ValueError(
            f"{here.local_world_size} processes on this machine want a GPU each, it has {count}: lower --nproc-per-node"
        )
    if second_device and 2 * here.local_world_size > count:
        raise ValueError(
            f"--teacher.device second wants {2 * here.local_world_size} GPUs for {here.local_world_size} process(es) "
            f"here, this machine has {count}: lower --nproc-per-node, or use --teacher.device same"
        )
    second = torch.device("cuda", here.local_rank + here.local_world_size) if second_device else None
    return torch.device("cuda", here.local_rank), second


def keep_freed_memory() -> None:
    """Let this process keep the CPU memory that it frees, in pages of 2 MiB where Linux gives them.

    Nothing without glibc.

    Otherwise freed tensors of many megabytes go back to the system, and getting them again costs a page fault for every
    4 KiB: 10 to 18 % of a training step in fp32 on two cores, 4 to 7 % in bf16. The rows of a loss chunk are 120 KB
    apart, so small pages also miss the TLB, which is 30 % of that product. Works for all tensors if called before the
    first one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            mallopt(parameter, value)


def settle_vector_math() -> None:
    """Have MKL's vector functions choose their kernels now, in one thread.

    They choose at their first call in a process. Where two threads make that call at once, one of them may for that
    once take a kernel for another processor: 15 of 490 runs of a toy model had other last bits in their first
    micro-batch, and with this 0 of 200. The encoder's attention on CPUs calls both functions.
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
