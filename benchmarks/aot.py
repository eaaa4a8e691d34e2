"""Compiles every Triton kernel for GPUs that are not here, and reads what the machine code says.

    python -m benchmarks.aot        a table, one line for each kernel, dtype, tile and architecture

No GPU and no driver are needed. Registers and stack come from `cuobjdump -res-usage`, load widths and spills from the
disassembly; both tools lie inside the triton package. tests/test_aot.py fails on a spill or on a narrow hot load.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdistil.kernels import cosine, distill
from fastdistil.kernels._triton import LAUNCH_OPTIONS

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # and their bytes


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation: what the launcher would pass."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Argument -> Triton type ("*bf16", "i32", "fp32"), or "constexpr"."""
    constexprs: dict[str, Any]
    """Values of the constexpr arguments; an absent optional pointer is None."""
    divisible: tuple[str, ...] = ()
    """Integers that the launcher specialises as multiples of 16. Pointers always are: torch aligns them."""
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class Report:
    arch: int
    registers: int
    stack_bytes: int
    num_spills: int
    """Loads and stores to local memory in the machine code."""
    shared_bytes: int
    loads: dict[int, int] = field(default_factory=dict)
    """Bits of a global load a thread -> how many such instructions."""

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
        options={"num_warps": variant.num_warps, **LAUNCH_OPTIONS},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    loads: dict[int, int] = {}
    for options in re.findall(r"\bLDG\.E([.\w]*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", options)
        bits = int(width[1]) if width else 32
        loads[bits] = loads.get(bits, 0) + 1
    return Report(
        arch=arch,
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        num_spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        loads=loads,
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in: {text}"
    return int(match[1])


def _distill_variant(dtype: str, *, gradient: bool, num_rows: bool) -> Variant:
    signature = {
        "s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "label_ptr": "*i64",
        "num_rows_ptr": "*i32" if num_rows else "constexpr",
        "ds_ptr": f"*{dtype}" if gradient else "constexpr", "out_ptr": "*fp32",
        "s_stride": "i32", "t_stride": "i32", "ds_stride": "i32" if gradient else "constexpr",
        "N": "i32", "first_row": "i32", "width": "i32", "vocab_size": "i32",
        "temperature": "fp32", "kd_scale": "fp32", "mlm_scale": "fp32",
        "LANES": "constexpr", "VECTOR": "constexpr",
    }  # fmt: skip
    absent = {} if num_rows else {"num_rows_ptr": None}
    absent |= {} if gradient else {"ds_ptr": None, "ds_stride": 0}
    tile = {
        "LANES": 32 * distill.NUM_WARPS,
        "VECTOR": distill.COLUMNS_PER_LOAD[TRITON_DTYPES[dtype]],
    }
    return Variant(
        name=f"distill {dtype}" + " gradient" * gradient + " num_rows" * num_rows,
        kernel=distill._distill_kernel,
        signature=signature,
        constexprs=absent | tile,
        divisible=("s_stride", "t_stride", "ds_stride", "width"),
        num_warps=distill.NUM_WARPS,
    )


def _cosine_variant(dtype: str, width: int) -> Variant:
    settings = cosine.tile(width)
    signature = {
        "s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "num_rows_ptr": "*i32",
        "out_ptr": "*fp32", "ds_ptr": f"*{dtype}", "N": "i32", "D": "i32",
        "EPS": "constexpr", "ROWS": "constexpr", "BLOCK_D": "constexpr",
    }  # fmt: skip
    num_warps = settings.pop("num_warps")
    return Variant(
        name=f"cosine {dtype} D={width}",
        kernel=cosine._cosine_kernel,
        signature=signature,
        constexprs={"EPS": cosine.EPS, **settings},
        divisible=("D",),
        num_warps=num_warps,
    )


def variants() -> Iterator[Variant]:
    """Every kernel in every dtype and tile that the launchers use."""
    for dtype in TRITON_DTYPES:
        yield _distill_variant(dtype, gradient=True, num_rows=True)
        yield _distill_variant(dtype, gradient=True, num_rows=False)
        yield _distill_variant(dtype, gradient=False, num_rows=True)
        for width in (384, 768, 1024, 8192):
            yield _cosine_variant(dtype, width)


def main() -> None:
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<34}{'arch':>5}{'registers':>10}{'spills':>7}{'stack':>6}{'shared':>7}  loads (bits: number)"
    )
    for variant in variants():
        for arch in ARCHITECTURES:
            r = compile_variant(variant, arch)
            loads = ", ".join(f"{bits}: {number}" for bits, number in sorted(r.loads.items()))
            print(
                f"{variant.name:<34}{arch:>5}{r.registers:>10}{r.num_spills:>7}{r.stack_bytes:>6}"
                f"{r.shared_bytes:>7}  {loads}"
            )


if __name__ == "__main__":
    main()
