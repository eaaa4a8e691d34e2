"""What a micro-batch launches on a GPU that is not here: launches_worker ARCHITECTURE...

Prints, as JSON, for each compute capability the totals of a micro-batch and of a validation of BERT-base, with the
teacher in bf16 and in FP8, and what the machine code of every compilation says; the same of ModernBERT-base on an H100;
and the machine code of "drift", for the teacher beside itself in fp32 there.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import aot, micro_batch
from benchmarks.micro_batch import PRODUCT_KINDS, Event
from benchmarks.no_gpu import Kernel, pretend


def code_of(kernel: Kernel) -> dict[str, Any]:
    """Name, spills, bits of the widest load, shared memory and instruction mix of a compilation."""
    report = aot.report(kernel.cubin, kernel.metadata)
    spills = report.num_spills + report.stack_bytes
    found = {"name": kernel.name, "spills": spills, "widest load": report.widest_load}
    return found | {"shared": report.shared_bytes, "mix": report.mix}


def codes_of(kernels: list[Kernel]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(code_of, kernels))


def products(events: list[Event]) -> float:
    return sum(e.flops for e in events if e.kind in PRODUCT_KINDS)


def launched(arch: int, size: str = "bert-base") -> dict[str, Any]:
    driver, found = pretend(arch), {}
    for precision in ("bf16", "fp8") if arch >= 89 else ("bf16",):
        made = micro_batch.meta_trainer(size=size, fp8=precision == "fp8")
        micro_batch.record(made, driver, made.micro_batch)  # the first one has no gradients to add to
        for name in ("micro_batch", "evaluate"):
            events = micro_batch.record(made, driver, getattr(made, name))
            found[f"{precision} {name}"] = micro_batch.totals(events) | {"FLOP of products": products(events)}
    return found | {"kernels": codes_of(driver.kernels)}


def launched_in_fp32() -> list[dict[str, Any]]:
    """What the teacher's drift compiles."""
    driver, made = pretend(), micro_batch.meta_trainer()
    micro_batch.record(made, driver, made.drift)
    return codes_of(driver.kernels)


if __name__ == "__main__":
    found: dict[str, Any] = {"drift": launched_in_fp32(), "modernbert-base": launched(90, "modernbert-base")}
    print(json.dumps(found | {arch: launched(int(arch)) for arch in sys.argv[1:]}))
