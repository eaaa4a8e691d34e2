"""The row kernel: loss and gradient of rows of logits. Floor: two reads and one write of the same bytes.

python -m benchmarks.bench_distill --rows 512 --vocab 30522,50265 --dtype bf16
python -m pytest benchmarks/bench_distill.py -s
"""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem

TEMPERATURE, KD_SCALE, MLM_SCALE = 2.0, 5.0, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill(Options):
    """Check and time distill_loss(student_NV, teacher_NV, labels_N, temperature=..., kd_scale=..., mlm_scale=...,
    vocab_size=...); a kernel of your own may return the loss alone."""

    known: ClassVar[tuple[str, ...]] = ("ours", "kernel", "eager", "compile", "liger")

    rows: Sizes = ()
    """Rows. Without it 512, on a GPU 16,384 in bf16 and 8,192 in fp32, well beyond the L2 cache."""
    vocab: Sizes = (30522,)
    """Words, which on a GPU are padded to columns as those of the trained models are."""


def cases(options: Distill) -> Iterator[Case]:
    for dtype, vocab, backward in itertools.product(
        options.dtypes(cuda=("bf16", "fp32")), options.vocab, options.passes(True)
    ):
        columns = options.usual(vocab, -(-vocab // 16) * 16)
        for rows in options.rows or (options.usual(512, 8192 if dtype == "float32" else 16384),):
            name = f"{rows} x {columns} {dtype}, 15 % labelled{'' if backward else ', forward'}"
            sizes = {"rows": rows, "columns": columns, "vocab": vocab, "dtype": dtype, "backward": backward}
            yield Case(name, sizes, distill)


def distill(*, rows: int, columns: int, vocab: int, dtype: str, backward: bool, device: str) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider, pytorch_and_ours
    from fastdistil.kernels.distill import distill_loss, distill_loss_reference

    kind = getattr(torch, dtype)
    student, teacher = ((3 * torch.randn(rows, columns, device=device)).to(kind) for _ in range(2))
    labels = torch.randint(vocab, (rows,), device=device)
    labels.masked_fill_(torch.rand(rows, device=device) > 0.15, -100)
    gradient = torch.empty_like(teacher)
    scales = torch.tensor([KD_SCALE, MLM_SCALE], device=device)

    def eager(*args, **kwargs):
        return distill_loss_reference(*args, **kwargs)

    def kernel():  # loss and gradient, as linear_distill_loss calls it
        return torch.ops.fastdistil.distill_rows(
            student.detach(), teacher, labels, None, gradient, 0, TEMPERATURE, scales, vocab
        )

    def liger():
        from liger_kernel.transformers import LigerJSD  # pyright: ignore[reportMissingImports]

        log_q, log_p = ((x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
        # beta = 0: the forward KL; without T^2 and without the MLM term.
        return torch.autograd.grad(LigerJSD(beta=0.0)(log_q, log_p), student)

    providers = pytorch_and_ours(distill_loss, eager)
    if backward:
        ours = providers["ours"]._replace(title=f"{OURS} autograd")
        providers |= {"ours": ours, "kernel": Provider(OURS, kernel, "kernel", True)}
        if device == "cuda" and importlib.util.find_spec("liger_kernel"):
            providers["liger"] = Provider("Liger JSD, KD only", liger, "KL alone", True)
    return Problem(
        arguments=[student.requires_grad_(backward), teacher, labels],
        options=dict(temperature=TEMPERATURE, kd_scale=KD_SCALE, mlm_scale=MLM_SCALE, vocab_size=vocab),
        trained=[0] if backward else (),
        definition=distill_loss_reference,
        rowwise=[0, 1, 2],
        providers=providers,
        num_bytes=(2 + backward) * student.numel() * kind.itemsize,
        num_flops=24 * student.numel(),  # 4 exponentials and about 20 other operations an element
        floor=lambda: torch.add(student.detach(), teacher, out=gradient),
        budget_s=12.0,
    )


def usual_cases() -> Iterator[Case]:
    return cases(Distill())


def test_distill(benchmark, case, results):
    compare(benchmark, "distill", case, results)


main = benchmark("distill", Distill, cases)

if __name__ == "__main__":
    sys.exit(main())
