"""Milliseconds that the host needs for one micro-batch where every launch is nothing, on one core.

    python -m benchmarks.host [--rounds 100] [--fp8]

Python, PyTorch's dispatcher and autograd, and Triton's launch path at BERT-base's shapes, on meta tensors (no_gpu.py):
PyTorch's operators find the shapes of their results in C++, the few of no_gpu.SHAPES in Python, and compute nothing;
Triton's launches end where the driver would be called. It is the process's own time, which other work on the machine
disturbs least. What a GPU's driver and the caching allocator take is not in it.
"""

import argparse
import os
import statistics
import time

import torch

from benchmarks import micro_batch
from benchmarks.no_gpu import pretend


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--fp8", action="store_true", help="the teacher in FP8")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pretend()
    made = micro_batch.meta_trainer(fp8=args.fp8)
    for _ in range(3):  # compiles
        made.micro_batch()
    times = []
    for _ in range(args.rounds):
        begin = time.process_time()
        made.micro_batch()
        times.append(1e3 * (time.process_time() - begin))
    print(
        f"{statistics.median(times):.2f} ms a micro-batch, median of {args.rounds} ({min(times):.2f} to "
        f"{max(times):.2f}), one core, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
