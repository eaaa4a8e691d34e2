"""Cosine loss and its gradient. Floor: two reads and one write of the same bytes.

python -m benchmarks.bench_cosine --rows 16384 --widths 384,768 --dtype bf16
python -m pytest benchmarks/bench_cosine.py -s
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(Options):
    """Check and time cosine_loss(student_ND, teacher_ND) beside PyTorch's and kernels of your own."""

    known: ClassVar[tuple[str, ...]] = ("ours", "kernel", "eager", "compile")

    rows: Sizes = ()
    """Rows. Without it 16,384, on a GPU 131,072."""
    widths: Sizes = (768,)
    """Columns."""


def cases(options: Cosine) -> Iterator[Case]:
    rows = options.rows or options.usual((16384,), (131072,))
    for n, width, dtype, backward in itertools.product(rows, options.widths, options.dtypes(), options.passes(True)):
        name = f"{n} x {width} {dtype}{'' if backward else ' forward'}"
        yield Case(name, {"rows": n, "width": width, "dtype": dtype, "backward": backward}, cosine)


def cosine(*, rows: int, width: int, dtype: str, backward: bool, device: str) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider, pytorch_and_ours
    from fastdistil.kernels.cosine import cosine_loss, cosine_loss_reference

    kind = getattr(torch, dtype)
    student, teacher = (torch.randn(rows, width, device=device, dtype=kind) for _ in range(2))
    gradient = torch.empty_like(teacher)

    def eager(student, teacher):
        return cosine_loss_reference(student, teacher)

    providers = pytorch_and_ours(cosine_loss, eager)
    if backward:  # what the trainer runs
        kernel = Provider(
            OURS, lambda: torch.ops.fastdistil.cosine_rows(student.detach(), teacher, None, None), "kernel", True
        )
        providers |= {"kernel": kernel, "ours": providers["ours"]._replace(title=f"{OURS} autograd")}
    return Problem(
        arguments=[student.requires_grad_(backward), teacher],
        trained=[0] if backward else (),
        definition=cosine_loss_reference,
        rowwise=[0, 1],
        providers=providers,
        num_bytes=(2 + backward) * rows * width * kind.itemsize,
        num_flops=(6 + 6 * backward) * rows * width,
        floor=lambda: torch.add(student.detach(), teacher, out=gradient),
    )


def usual_cases() -> Iterator[Case]:
    return cases(Cosine())


def test_cosine(benchmark, case, results):
    compare(benchmark, "cosine", case, results)


main = benchmark("cosine", Cosine, cases)

if __name__ == "__main__":
    sys.exit(main())
