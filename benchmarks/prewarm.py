"""Compiles what a BERT-base run launches on a GPU, without that GPU, into Triton's cache, which may be carried there.

    TRITON_CACHE_DIR=FOLDER python -m benchmarks.prewarm [--arch 90] [--size bert-base]

By the JIT's own path, so that the keys are those of a real launch: two micro-batches, a validation, and the teacher's
drift, with the teacher in bf16 and in FP8. The cache is good for one version of Triton, and where it lies at the same
path: its index names files absolutely.
"""

import argparse
import time

import triton

from benchmarks import micro_batch, workload
from benchmarks.no_gpu import pretend


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for an H100")
    parser.add_argument("--size", choices=workload.SIZES, default="bert-base")
    args = parser.parse_args()
    begin = time.monotonic()
    driver = pretend(args.arch)
    for fp8 in (False, True) if args.arch >= 89 else (False,):
        made = micro_batch.meta_trainer(size=args.size, fp8=fp8)
        for work in (made.micro_batch, made.micro_batch, made.evaluate, made.drift):
            micro_batch.record(made, driver, work)
    seconds = time.monotonic() - begin
    print(f"{len(driver.kernels)} kernels for sm_{args.arch} by Triton {triton.__version__} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
