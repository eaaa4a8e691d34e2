"""The mixture of teachers' distributions as logits. Floor: the same reads and writes, two teachers at a time.

python -m benchmarks.bench_mixture --rows 512 --teachers 2,3 --dtype bf16
python -m pytest benchmarks/bench_mixture.py -s
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

TEMPERATURE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture(Options):
    """Check and time mix_logits(teachers_KNV, weights_K, temperature=..., vocab_size=...); a kernel of your own takes
    the logits of each teacher (N, V) and the keywords, and weighs all teachers alike."""

    known: ClassVar[tuple[str, ...]] = ("ours", "kernel", "eager", "compile")

    rows: Sizes = ()
    """Rows. Without it 512, on a GPU 16,384 in bf16 and 8,192 in fp32, well beyond the L2 cache."""
    vocab: Sizes = (30522,)
    """Words, which on a GPU are padded to columns as those of the trained models are."""
    teachers: Sizes = (2,)
    """How many there are."""


def cases(options: Mixture) -> Iterator[Case]:
    for dtype, vocab, teachers in itertools.product(
        options.dtypes(cuda=("bf16", "fp32")), options.vocab, options.teachers
    ):
        columns = options.usual(vocab, -(-vocab // 16) * 16)
        for rows in options.rows or (options.usual(512, 8192 if dtype == "float32" else 16384),):
            sizes = {"rows": rows, "columns": columns, "vocab": vocab, "teachers": teachers, "dtype": dtype}
            yield Case(f"{teachers} x {rows} x {columns} {dtype}", sizes, mixture)


def mixture(*, rows: int, columns: int, vocab: int, teachers: int, dtype: str, device: str) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider, pytorch_and_ours
    from fastdistil.kernels.mixture import mix_logits, mix_logits_reference, running_shares

    kind, weights = getattr(torch, dtype), [1.0] * teachers
    logits = [(3 * torch.randn(rows, columns, device=device)).to(kind) for _ in range(teachers)]
    mixed = logits[0].clone()

    def eager(*logits, **options):
        return mix_logits_reference(logits, weights, **options)

    def ours(*logits, **options):
        return mix_logits(logits, weights, **options)[:, :vocab]

    def kernel():  # as linear_distill's chunk loop calls it
        for y, share in zip(logits[1:], running_shares(weights), strict=True):
            torch.ops.fastdistil.mix_rows(mixed, y, TEMPERATURE, share, vocab)

    def floor():
        for y in logits[1:]:
            torch.add(mixed, y, out=mixed)

    return Problem(
        arguments=logits,
        options={"temperature": TEMPERATURE, "vocab_size": vocab},
        trained=(),
        definition=eager,
        rowwise=range(teachers),
        providers=pytorch_and_ours(ours, eager) | {"kernel": Provider(f"{OURS} in place", kernel, "in place", True)},
        num_bytes=3 * (teachers - 1) * mixed.numel() * kind.itemsize,
        num_flops=15 * (teachers - 1) * mixed.numel(),  # 4 exponentials, a logarithm and about 10 others
        floor=floor,
    )


def usual_cases() -> Iterator[Case]:
    return cases(Mixture())


def test_mixture(benchmark, case, results):
    compare(benchmark, "mixture", case, results)


main = benchmark("mixture", Mixture, cases)

if __name__ == "__main__":
    sys.exit(main())
