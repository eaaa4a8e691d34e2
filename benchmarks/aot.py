"""Compiles every Triton kernel for GPUs that are not here, and reads what the machine code says.

    python -m benchmarks.aot        a table, one line for each kernel, dtype, tile and architecture

No GPU and no driver are needed. Registers and stack come from `cuobjdump -res-usage`, load widths, spills and the
instruction mix from the disassembly; both tools lie inside the triton package. tests/test_aot.py fails on a spill or on a
narrow hot load.
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

from fastdistil.kernels import cosine, distill, flash, flash_tiles
from fastdistil.kernels._triton import LAUNCH_OPTIONS

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # and their bytes
SHARED_BYTES = {
    80: 164 * 1024,
    90: 228 * 1024,
    100: 228 * 1024,
}  # of an SM; the driver takes 1 KiB of it a CTA
# Instructions whose number says where the time goes, in the whole kernel.
MIX = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA",
    "mufu": r"MUFU",
    "shared loads": r"LDSM?",
    "shared stores": r"STSM?",
    "all": r"[A-Z]\w+",
}


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
    num_stages: int = 3  # Triton's default
    archs: tuple[int, ...] = ARCHITECTURES
    """Where the launchers use it."""
    min_ctas: int = 2
    """CTAs that have to fit an SM, for one's loads to run beside the other's arithmetic."""
    may_spill: bool = False
    max_narrow_loads: int = 3
    """Loads of less than 128 bits that may be: scalars and numbers of a row."""


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
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            **LAUNCH_OPTIONS,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    loads: dict[int, int] = {}
    for options in re.findall(r"\bLDG(?:STS)?\.E([.\w]*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", options)
        bits = int(width[1]) if width else 32
        loads[bits] = loads.get(bits, 0) + 1
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", sass)
    registers, metadata = _number(r"REG:(\d+)", usage), compiled.metadata
    return Report(
        arch=arch,
        registers=registers,
        stack_bytes=_number(r"STACK:(\d+)", usage),
        num_spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=metadata.shared,
        ctas=_ctas(arch, variant.num_warps, registers, metadata),
        loads=loads,
        mix={
            name: sum(bool(re.fullmatch(kind, opcode)) for opcode in opcodes)
            for name, kind in MIX.items()
        },
    )


def _ctas(arch: int, num_warps: int, registers: int, metadata: Any) -> int:
    """CTAs that an SM holds at once: 65,536 registers given out by 8 a thread, 64 warps, 512 columns of tensor memory."""
    limits = [
        65536 // (-(-registers // 8) * 8 * 32 * num_warps),
        64 // num_warps,
        SHARED_BYTES[arch] // (metadata.shared + 1024),
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


def _attention_variant(dtype: str, head_dim: int, kernel: str, arch: int, dropout: bool) -> Variant:
    by_width = flash_tiles.TILES[arch][head_dim]
    tiles = flash_tiles.FP32_TILES if dtype == "fp32" else by_width
    tile = {
        "forward": tiles.forward_dropout if dropout else tiles.forward,
        "dq": tiles.dq,
        "dkdv": tiles.dkdv,
    }[kernel]
    pointers, scalars = {
        "forward": ("out_ptr lse_ptr", "keep_scale"),
        "dq": ("out_ptr dout_ptr lse_ptr dqkv_ptr delta_ptr", "keep_p dq_scale"),
        "dkdv": ("dout_ptr lse_ptr delta_ptr dqkv_ptr", "dk_scale dv_scale"),
    }[kernel]
    constexprs = {
        "H": 12, "D": head_dim, "BLOCK_D": head_dim, "TILE": flash.TILE_ROWS,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
    }  # fmt: skip
    statistics = ("lse_ptr", "delta_ptr")
    signature = {
        "qkv_ptr": f"*{dtype}", "tile_ptr": "*i32", "key_ptr": "*i32" if dropout else "constexpr",
        **{name: "*fp32" if name in statistics else f"*{dtype}" for name in pointers.split()},
        "N": "i32", "scale2": "fp32", "threshold": "i32",
        **dict.fromkeys(scalars.split(), "fp32"),
        **dict.fromkeys(constexprs, "constexpr"),
    }  # fmt: skip
    return Variant(
        name=f"attention {kernel} {dtype} D={head_dim}" + " dropout" * dropout,
        kernel={
            "forward": flash._forward_kernel,
            "dq": flash._dq_kernel,
            "dkdv": flash._dkdv_kernel,
        }[kernel],
        signature=signature,
        constexprs=constexprs | ({} if dropout else {"key_ptr": None}),
        num_warps=tile.num_warps,
        num_stages=flash_tiles.NUM_STAGES,
        archs=(arch,),
        min_ctas=1,
        # Outside the tensor cores Triton keeps whole operands in registers: no block that tl.dot takes fits.
        may_spill=dtype == "fp32",
        # lse, delta and keys of every row that a thread holds, 32 bits each: 20 to 109, but up to 398 with Triton 3.6.0.
        max_narrow_loads=400,
    )


def variants() -> Iterator[Variant]:
    """Every kernel in every dtype and tile that the launchers use."""
    for dtype in TRITON_DTYPES:
        yield _distill_variant(dtype, gradient=True, num_rows=True)
        yield _distill_variant(dtype, gradient=True, num_rows=False)
        yield _distill_variant(dtype, gradient=False, num_rows=True)
        for width in (384, 768, 1024, 8192):
            yield _cosine_variant(dtype, width)
    for arch in ARCHITECTURES:
        for kernel in ("forward", "dq", "dkdv"):
            for dropout in (False, True):
                for head_dim in flash_tiles.TILES[arch]:
                    yield _attention_variant("bf16", head_dim, kernel, arch, dropout)
                yield _attention_variant("fp16", 64, kernel, arch, dropout)
                yield _attention_variant("fp32", 64, kernel, arch, dropout)


def main() -> None:
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<40}{'arch':>5}{'registers':>10}{'CTAs':>5}{'spills':>7}{'stack':>6}{'shared':>7}"
        + "".join(f"{name:>14}" for name in MIX)
        + "  loads (bits: number)"
    )
    for variant in variants():
        for arch in variant.archs:
            r = compile_variant(variant, arch)
            loads = ", ".join(f"{bits}: {number}" for bits, number in sorted(r.loads.items()))
            print(
                f"{variant.name:<40}{arch:>5}{r.registers:>10}{r.ctas:>5}{r.num_spills:>7}{r.stack_bytes:>6}"
                f"{r.shared_bytes:>7}{''.join(f'{n:>14}' for n in r.mix.values())}  {loads}",
                flush=True,
            )


if __name__ == "__main__":
    main()
