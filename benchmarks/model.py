"""The estimate of one micro-batch's milliseconds on an H100: counted work, divided by rates.

    python -m benchmarks.model [--fp8] [--tokens 16384] [--size bert-base]     by part and kind of work
    python -m benchmarks.model --operators                                     every operator and kernel counted

What is launched, moved and computed is counted by micro_batch.py. The rates are for BERT-base in bf16 on an H100 SXM,
fast, expected and slow. Those marked "measured" come from single kernels and products at 16,384 and 32,768 tokens
(docs/gpu.md); the others are guesses: what large copies reach of the data sheet's peak, lowered by what the compiled
code (aot.py) says of a kernel. The estimate for 16,384 tokens was 25.9 ms when all were guesses, and 25.5 were
measured; then 23.5 for other kernels, and 24.05 were. A limit of power, which slows what runs without a pause by 2 to
5 %, is not in it.

One stream, kernels one after the other, the host never late: no overlap is assumed. Time of a launch: the larger of its
bytes by the memory's rate and its FLOP by the arithmetic's, and LAUNCH_US more where that is below SHORT_US.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks import micro_batch, workload
from benchmarks.micro_batch import Event
from benchmarks.no_gpu import pretend
from fastdistil.model.architecture import attended, flops_per_token

PEAK_BF16 = 989e12  # FLOP/s, dense: NVIDIA's data sheet of the H100 SXM, as are 1979 in FP8 and 3.35 TB/s


class Rate(NamedTuple):
    """Fast, expected and slow: TFLOP/s, TB/s or microseconds."""

    fast: float
    expected: float
    slow: float


# TFLOP/s of a kind of work in a part of the micro-batch, of all FLOP that are executed.
ARITHMETIC = {
    # Measured: cuBLAS by shape, 563 (768 x 768) to 751.
    ("GEMM", "teacher"): Rate(720, 670, 610),
    ("GEMM", "student forward"): Rate(720, 670, 610),
    ("GEMM", "loss"): Rate(720, 680, 620),
    ("GEMM", "backward"): Rate(730, 680, 600),
    ("FP8 GEMM", "teacher"): Rate(1200, 1000, 800),
    # Measured: our own product, without z, with it, and the backward.
    ("GEMM + GELU", "teacher"): Rate(580, 550, 525),
    ("GEMM + GELU", "student forward"): Rate(495, 485, 470),
    ("GEMM + GELU", "loss"): Rate(495, 485, 470),
    ("GEMM + GELU", "backward"): Rate(430, 415, 400),
    # Measured, heads of 64 and 512 keys: softmax, not products, is most of the instructions.
    ("attention", "teacher"): Rate(365, 355, 330),
    ("attention", "student forward"): Rate(250, 238, 220),  # a random number a score
    ("attention", "backward"): Rate(292, 270, 260),  # seven products, where others count five
}
# TB/s by operator or kernel, else by kind of work. Most has arithmetic of its own to hide (erf, sums of a row, random
# numbers).
MEMORY = {
    "layernorm._forward_kernel": Rate(2.6, 2.2, 1.9),  # measured, as the next three
    "layernorm._backward_kernel": Rate(2.3, 2.15, 2.0),
    "gelu._forward_kernel": Rate(2.8, 2.7, 2.5),
    "gelu._backward_kernel": Rate(2.6, 2.5, 2.3),
    "row kernel": Rate(2.65, 2.42, 2.26),  # measured, of 16,384 and of 4,096 rows
    "sum": Rate(2.3, 1.6, 1.1),  # PyTorch's of columns
    "column sums": Rate(2.3, 1.6, 1.1),
    "linear._strip_sums_kernel": Rate(2.85, 2.6, 1.9),  # measured, of 32,768 and of 4,096 rows
    "FP8 rows": Rate(3.1, 2.2, 1.9),  # measured, without and with GELU
    "add": Rate(2.8, 2.4, 1.9),
    "add_": Rate(2.8, 2.4, 1.9),
    "_to_copy": Rate(2.8, 2.4, 1.9),
    "zeros": Rate(2.8, 2.4, 1.9),
    "GEMM": Rate(2.8, 2.4, 1.9),
    "GEMM + GELU": Rate(2.8, 2.4, 1.9),
    "attention": Rate(2.8, 2.4, 1.9),
}
OTHERS = Rate(2.2, 1.7, 1.2)  # embeddings, scatters, dropout, cosine
SHORT_US = 5.0
LAUNCH_US = Rate(1.5, 2.3, 3.5)  # of a kernel that does next to nothing, in a stream that is full

LENGTH = 512
"""Of the sequences."""
PARTS = ("teacher", "student forward", "loss", "backward", "other")


class Row(NamedTuple):
    """Of one or many events."""

    launches: float
    gflop: float
    megabytes: float
    ms: Rate

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Row":
        made = list(events)
        times = [milliseconds(e) for e in made]
        return cls(
            sum(e.launches for e in made),
            sum(e.flops for e in made) / 1e9,
            sum(e.num_bytes for e in made) / 1e6,
            Rate(*(sum(column) for column in zip(*times, strict=True))) if made else Rate(0, 0, 0),
        )

    def __str__(self) -> str:
        ms = "".join(f"{x:>9.2f}" for x in self.ms)
        return f"{self.launches:>9.0f}{self.gflop:>10,.0f}{self.megabytes:>10,.0f}{ms}"


def kind_of(e: Event) -> str:
    """The kind of an event, FP8 products apart."""
    return "FP8 GEMM" if e.kind == "GEMM" and e.dtype.itemsize == 1 else e.kind


def milliseconds(e: Event) -> Rate:
    """Of all launches of one event: see the top."""
    kind = kind_of(e)
    memory = MEMORY.get(e.name) or MEMORY.get(e.kind) or OTHERS
    # A product in a part that has none today gets the backward's rate, the lowest.
    compute = ARITHMETIC.get((kind, e.part)) or ARITHMETIC.get((kind, "backward"), Rate(650, 560, 480))
    result = []
    for tb_s, tflop_s, floor in zip(memory, compute, LAUNCH_US, strict=True):
        us = max(e.num_bytes / tb_s, e.flops / tflop_s) / 1e6
        result.append((us + e.launches * floor * (us < e.launches * SHORT_US)) / 1e3)
    return Rate(*result)


def count(*, size: str, tokens: int, fp8: bool) -> list[Event]:
    """Events of the second micro-batch; from here on this process is `pretend`ing."""
    driver = pretend()
    made = micro_batch.meta_trainer(size=size, tokens=tokens, length=LENGTH, fp8=fp8)
    micro_batch.record(made, driver, made.micro_batch)
    return micro_batch.record(made, driver, made.micro_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=workload.SIZES, default="bert-base")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--fp8", action="store_true", help="the teacher in FP8")
    parser.add_argument("--operators", action="store_true", help="a line for each operator and kernel")
    args = parser.parse_args()
    events = count(size=args.size, tokens=args.tokens, fp8=args.fp8)
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for e in events:
        groups[e.part, f"{kind_of(e)}: {e.name}" if args.operators else kind_of(e)].append(e)
    print("An estimate: counted work, divided by rates of which some were measured (docs/gpu.md).")
    print(f"{'':<64}{'launches':>9}{'GFLOP':>10}{'MB':>10}{'ms low':>9}{'expected':>9}{'high':>9}")
    for part in PARTS:
        for (of, kind), group in sorted(groups.items()):
            if of == part:
                print(f"{part:<18}{kind:<46}{Row.of(group)}")
        whole = [e for e in events if e.part == part]
        print(f"{part:<18}{'sum':<46}{Row.of(whole)}\n")
    total = Row.of(events)
    print(f"{'all, one stream, the host never late':<64}{total}")
    totals = micro_batch.totals(events)
    print(", ".join(f"{value:,.1f} {name}" for name, value in totals.items()))
    flops = flops_per_token(*workload.architectures(args.size), partial(attended, np.array([LENGTH]))).total
    for name, ms in total.ms._asdict().items():
        speed = args.tokens / ms * 1e3
        print(f"{name:<10}{ms:>6.1f} ms{speed:>12,.0f} tokens/s, MFU {speed * flops / PEAK_BF16:.1%}")


if __name__ == "__main__":
    main()
