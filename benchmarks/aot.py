"""Compiles every Triton kernel for GPUs that are not here, and reads what the machine code says.

    python -m benchmarks.aot        a table, one line for each kernel, dtype, tile and architecture

No GPU and no driver are needed. Registers and stack come from `cuobjdump -res-usage`, load widths, spills and the
instruction mix from the disassembly; both tools lie inside the triton package. tests/kernels/test_aot.py fails on a
spill or on a narrow hot load.
"""

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_variants import Variant, rarer_variants, variants
from fastdistil.kernels._backend import LAUNCH_OPTIONS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 164, 89: 100, 90: 228, 100: 228}  # of an SM; the driver takes 1 of them a CTA
# Instructions whose number says where the time goes, in the whole kernel.
MIX = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA",
    "tma loads": r"UTMALDG",
    "tma stores": r"UTMASTG",
    "mufu": r"MUFU",
    "shared loads": r"LDSM?",
    "shared stores": r"STSM?",
    "all": r"[A-Z]\w+",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    arch: int
    registers: int
    stack_bytes: int
    num_spills: int
    """Loads and stores to local memory in the machine code."""
    shared_bytes: int
    ctas: int
    """That fit an SM, by registers, threads, shared and tensor memory."""
    loads: dict[int, int] = field(default_factory=dict)
    """Bits of a global load a thread, asynchronous ones included -> how many such instructions."""
    mix: dict[str, int] = field(default_factory=dict)
    """The keys of MIX -> how many such instructions."""

    @property
    def widest_load(self) -> int:
        return max(self.loads, default=0)


def compile_variant(variant: Variant, arch: int) -> Report:
    """The resources `variant` takes on compute capability `arch` (80, 90, 100)."""
    names = list(variant.signature)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if variant.signature[name].startswith("*") or name in variant.divisible
    }
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(k),): v for k, v in variant.constexprs.items()},
        attrs=attrs,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **LAUNCH_OPTIONS},
    )
    return report(compiled.asm["cubin"], compiled.metadata)


def report(cubin: bytes, metadata: Any) -> Report:
    """What the machine code of a compiled kernel says; `metadata` is Triton's of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)  # no analysis of where branches go: a quarter faster
    loads: dict[int, int] = {}
    for options in re.findall(r"\bLDG(?:STS)?\.E([.\w]*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", options)
        bits = int(width[1]) if width else 32
        loads[bits] = loads.get(bits, 0) + 1
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", sass)
    arch, registers = metadata.target.arch, _number(r"REG:(\d+)", usage)
    return Report(
        arch=arch,
        registers=registers,
        stack_bytes=_number(r"STACK:(\d+)", usage),
        num_spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=metadata.shared,
        ctas=_ctas(arch, metadata.num_warps, registers, metadata),
        loads=loads,
        mix={name: sum(bool(re.fullmatch(kind, opcode)) for opcode in opcodes) for name, kind in MIX.items()},
    )


def compile_all(pairs: Iterable[tuple[Variant, int]]) -> Iterator[tuple[Variant, Report]]:
    """Variants and their reports, in order.

    As many at a time as there are cores: half is done by ptxas and nvdisasm.
    """
    pairs = list(pairs)
    parse, parsing = triton.JITFunction.parse, threading.Lock()

    def parse_alone(function: triton.JITFunction) -> Any:
        """CPython 3.11 counts the depth of all threads' syntax trees together, now and then a SystemError (its issue
        106905)."""
        with parsing:
            return parse(function)

    with mock.patch.object(triton.JITFunction, "parse", parse_alone), ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda pair: compile_variant(*pair), pairs)
        yield from zip((variant for variant, _ in pairs), reports, strict=True)


def _ctas(arch: int, num_warps: int, registers: int, metadata: Any) -> int:
    """CTAs that an SM holds at once.

    It has 65,536 registers, given out by 8 a thread, 64 warps (Ada: 48) and 512 columns of tensor memory.
    """
    limits = [
        65536 // (-(-registers // 8) * 8 * 32 * num_warps),
        (48 if arch == 89 else 64) // num_warps,
        SHARED_KIB[arch] * 1024 // (metadata.shared + 1024),
    ]
    if columns := getattr(metadata, "tmem_size", 0):
        limits.append(512 // max(32, triton.next_power_of_2(columns)))
    return min(limits)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in: {text}"
    return int(match[1])


def main() -> None:
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<40}{'arch':>5}{'registers':>10}{'CTAs':>5}{'spills':>7}{'stack':>6}{'shared':>7}"
        + "".join(f"{name:>14}" for name in MIX)
        + "  loads (bits: number)"
    )
    everything = [*variants(), *rarer_variants()]
    for variant, r in compile_all((v, arch) for v in everything for arch in v.archs):
        loads = ", ".join(f"{bits}: {number}" for bits, number in sorted(r.loads.items()))
        print(
            f"{variant.name:<40}{r.arch:>5}{r.registers:>10}{r.ctas:>5}{r.num_spills:>7}{r.stack_bytes:>6}"
            f"{r.shared_bytes:>7}{''.join(f'{n:>14}' for n in r.mix.values())}  {loads}",
            flush=True,
        )


if __name__ == "__main__":
    main()
