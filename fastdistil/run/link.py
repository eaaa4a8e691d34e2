"""Students and the ranks that are set aside for teachers: questions one way, hidden states the other."""

from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

Question = tuple[int, int]  # (which sequence of micro-batches, number in it)


class TeacherLink:
    """Carries students' questions to the ranks set aside for teachers, and hidden states back.

    Student r asks teacher rank num_students + r % num_teachers. The link has process groups of its own, which
    torch.distributed does not know: there the students alone are the world. A peer that dies closes the connection,
    which raises RuntimeError here.
    """

    STOP: Question = (-1, 0)
    LATER: Question = (-2, 0)

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

    def ask_later(self) -> None:
        """A student: what it asks next may come after more than the timeout. Every student says so equally often."""
        self.host.send([torch.tensor(self.LATER)], self.teacher, 0).wait()

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
