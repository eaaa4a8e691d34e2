"""The product with GELU in forms that it does not have: what holds it up, and what might be faster.

    python -m benchmarks.gelu_variants      on a GPU: milliseconds, and how far results are from those of the one in use

A variant is kernels/gelu.py with some lines changed, so each shows what it is. benchmarks/tiles.py compiles and times
them, too.

Without GELU it is as slow, so its loop of products is what it lacks of cuBLAS (docs/gpu.md). Tensor cores take 512
cycles for a slice of 128 x 128 x 64. Meanwhile L2 hands over 32 KiB, 64 bytes a cycle and multiprocessor; shared memory
takes them in and gives tensor cores 48 KiB, 160 bytes a cycle in all, of 128 that it can. A tile of 128 x 192 asks L2
for 53, and shared memory, in products of 128 and of 64 columns, for 160 again. So if half of b is faster and a in
registers is not, L2 is the limit, and the wider tile should help; if both are, shared memory is.
"""

import importlib.util
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistil.kernels import gelu

IN_USE = "128 x 128"
# Lines of kernels/gelu.py, each group of which stands there once, and what stands there instead.
HALF_OF_B = """
-            mbarrier.expect(full.index(stage), 2 * SIDE * DEPTH * 2)
+            mbarrier.expect(full.index(stage), 2 * SIDE * DEPTH * 2, pred=position % 2 == 0)
+            mbarrier.expect(full.index(stage), SIDE * DEPTH * 2, pred=position % 2 == 1)
-                tma_load(b_desc, [k, column], full.index(stage), b_ring.index(stage))
+                tma_load(b_desc, [k, column], full.index(stage), b_ring.index(stage), pred=position % 2 == 0)
-                tma_load(b_desc, [column, k], full.index(stage), b_ring.index(stage))
+                tma_load(b_desc, [column, k], full.index(stage), b_ring.index(stage), pred=position % 2 == 0)
"""
A_IN_REGISTERS = """
-        position = i * slices
+        position = i * slices
+        mbarrier.wait(full.index(position % STAGES), position // STAGES & 1)
+        first = a_ring.index(position % STAGES).load(gl.DotOperandLayout(0, ACCUMULATOR, 2))
-            product = warpgroup_mma(a_ring.index(stage), b, product, use_acc=k > 0, is_async=True)
+            product = warpgroup_mma(first, b, product, use_acc=k > 0, is_async=True)
"""
# c is the 64 columns behind the 128 of b. It leaves no registers for keeping gelu'(z).
WIDE = """
-STAGES = gl.constexpr(5)  # and two halves of a tile for each warpgroup: 227 of 227 KiB
+WIDE, STAGES, BUFFERS = gl.constexpr(192), gl.constexpr({stages}), gl.constexpr({buffers})
-    in_group = GROUP * (F // SIDE)
+    in_group = GROUP * (F // WIDE)
-    return (first + tile % in_group % height) * SIDE, tile % in_group // height * SIDE
+    return (first + tile % in_group % height) * SIDE, tile % in_group // height * WIDE
-def _produce(a_desc, b_desc, a_ring, b_ring, full, empty, N, F, K, BACKWARD: gl.constexpr):
+def _produce(a_desc, b_desc, c_desc, a_ring, b_ring, c_ring, full, empty, N, F, K, BACKWARD: gl.constexpr):
-    for tile in range(gl.program_id(0), gl.cdiv(N, SIDE) * (F // SIDE), gl.num_programs(0)):
+    for tile in range(gl.program_id(0), gl.cdiv(N, SIDE) * (F // WIDE), gl.num_programs(0)):
-            mbarrier.expect(full.index(stage), 2 * SIDE * DEPTH * 2)
+            mbarrier.expect(full.index(stage), (SIDE + WIDE) * DEPTH * 2)
-                tma_load(b_desc, [k, column], full.index(stage), b_ring.index(stage))
+                tma_load(b_desc, [k, column], full.index(stage), b_ring.index(stage))
+                tma_load(c_desc, [k, column + SIDE], full.index(stage), c_ring.index(stage))
-                tma_load(b_desc, [column, k], full.index(stage), b_ring.index(stage))
+                tma_load(b_desc, [column, k], full.index(stage), b_ring.index(stage))
+                tma_load(c_desc, [column + SIDE, k], full.index(stage), c_ring.index(stage))
-    slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging, full, empty, turn, slope_full, N, F, K,
+    slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, c_ring, staging, full, empty, turn, slope_full,
+    N, F, K,
-    tiles = gl.cdiv(gl.cdiv(N, SIDE) * (F // SIDE) - gl.program_id(0), gl.num_programs(0))
+    tiles = gl.cdiv(gl.cdiv(N, SIDE) * (F // WIDE) - gl.program_id(0), gl.num_programs(0))
-            mbarrier.expect(slope_full.index(MINE), SIDE * SIDE * 2)
-            for part in gl.static_range(2):
+            mbarrier.expect(slope_full.index(MINE), SIDE * WIDE * 2)
+            for part in gl.static_range(3):
-        product = gl.zeros((SIDE, SIDE), gl.float32, ACCUMULATOR)
+        product = gl.zeros((SIDE, SIDE), gl.float32, ACCUMULATOR)
+        rest = gl.zeros((SIDE, PART), gl.float32, LAYOUT)
-            if not BACKWARD:
-                b = b.permute((1, 0))
+            c = c_ring.index(stage)
+            if not BACKWARD:
+                b = b.permute((1, 0))
+                c = c.permute((1, 0))
-            product = warpgroup_mma_wait(1, deps=[product])
+            rest = warpgroup_mma(a_ring.index(stage), c, rest, use_acc=k > 0, is_async=True)
+            product, rest = warpgroup_mma_wait(2, deps=[product, rest])
-        product = warpgroup_mma_wait(0, deps=[product])
+        product, rest = warpgroup_mma_wait(0, deps=[product, rest])
-        for part in gl.static_range(2):
-            x = gl.convert_layout(parts[part], LAYOUT, assert_trivial=True)
+        for part in gl.static_range(3):
+            x = rest if part == 2 else gl.convert_layout(parts[part], LAYOUT, assert_trivial=True)
-                z = x + biases[part].to(gl.float32)[None, :]
+                z = x + gl.load(bias_ptr + at + columns).to(gl.float32)[None, :]
-                _store_next(value, out_desc, staging, 2 * part + 1 if KEEP else part, row, at)
+                _store_next(value, out_desc, staging, part + 3 * (i // 2), row, at)
-    a_desc, b_desc, slope_desc, out_desc,  # gelu'(z): written, in the backward read, or None
+    a_desc, b_desc, c_desc, slope_desc, out_desc,
-    b_ring = gl.allocate_shared_memory(gl.bfloat16, B_SHAPE, B)
-    staging0 = gl.allocate_shared_memory(gl.bfloat16, [2, SIDE, PART], RESULT)
-    staging1 = gl.allocate_shared_memory(gl.bfloat16, [2, SIDE, PART], RESULT)
+    C_SHAPE: gl.constexpr = [STAGES, DEPTH, PART] if BACKWARD else [STAGES, PART, DEPTH]
+    b_ring = gl.allocate_shared_memory(gl.bfloat16, B_SHAPE, B)
+    c_ring = gl.allocate_shared_memory(gl.bfloat16, C_SHAPE, B)
+    staging0 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, SIDE, PART], RESULT)
+    staging1 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, SIDE, PART], RESULT)
-                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging0, full, empty, turn, slope_full,
-                N, F, K, 0, BACKWARD, KEEP,
+                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, c_ring, staging0, full, empty, turn,
+                slope_full, N, F, K, 0, BACKWARD, KEEP,
-                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, staging1, full, empty, turn, slope_full,
-                N, F, K, 1, BACKWARD, KEEP,
+                slope_desc, out_desc, bias_ptr, partial_ptr, a_ring, b_ring, c_ring, staging1, full, empty, turn,
+                slope_full, N, F, K, 1, BACKWARD, KEEP,
-            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, N, F, K, BACKWARD)),
+            (_produce, (a_desc, b_desc, c_desc, a_ring, b_ring, c_ring, full, empty, N, F, K, BACKWARD)),
-        _described(a, side, depth), _described(b, *b_block),
+        _described(a, side, depth), _described(b, *b_block), _described(b, *(min(part, n) for n in b_block)),
"""


def changed(source: str, changes: str) -> str:
    """The source with these lines changed. A ValueError if they do not stand in it once."""
    hunks: list[tuple[list[str], list[str]]] = []
    for line in changes.strip("\n").split("\n"):
        if line[0] == "-" and (not hunks or hunks[-1][1]):
            hunks.append(([], []))
        hunks[-1][line[0] == "+"].append(line[1:] + "\n")
    source = "\n" + source
    for old, new in (("\n" + "".join(old), "\n" + "".join(new)) for old, new in hunks):
        if source.count(old) != 1:
            raise ValueError(f"to be changed once, stands there {source.count(old)} times:{old}")
        source = source.replace(old, new)
    return source[1:]


@cache
def variant(changes: str) -> ModuleType:
    """kernels/gelu.py with lines changed, up to its operators: a module in a file, from which Triton reads kernels."""
    name = f"gelu_{zlib.crc32(changes.encode())}"
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(changed(Path(gelu.__file__).read_text(), changes).partition("@torch.library.custom_op")[0])
    spec = importlib.util.spec_from_file_location(f"fastdistil.kernels.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.TRITON_DEVICES, module._capability = gelu.TRITON_DEVICES, gelu._capability  # type: ignore[attr-defined]
    return module


class Use(NamedTuple):
    """One of the kernel's uses in one form."""

    use: str
    form: str
    right: bool
    """Whether it computes what it should."""
    call: Callable[[], Tensor]


def uses(device: torch.device, num_tokens: int) -> Iterator[Use]:
    """BERT-base's, in the form in use and in all others."""
    N, D, F = num_tokens, 768, 3072
    x, weight, second, bias, slope = (
        torch.randn(shape, device=device).bfloat16() for shape in ((N, D), (F, D), (D, F), (F,), (N, F))
    )
    dbias = torch.zeros(F, device=device)

    def forward(module: ModuleType, keep: bool) -> Tensor:
        return module.linear_gelu_forward(x, weight, bias, keep)[0]

    def backward(module: ModuleType) -> Tensor:
        return module.gelu_backward_product(x, second, slope, dbias=dbias, accumulate=True)

    def forms(use: str, call: Callable[[ModuleType], Tensor], wide: str | None) -> Iterator[Use]:
        yield Use(use, IN_USE, True, partial(call, gelu))
        yield Use(use, "128 x 128, half of b", False, partial(call, variant(HALF_OF_B)))
        yield Use(use, "128 x 128, a in registers", False, partial(call, variant(A_IN_REGISTERS)))
        if wide is not None:
            yield Use(use, "128 x 192", True, partial(call, variant(wide)))

    yield from forms("forward", partial(forward, keep=False), WIDE.format(stages=4, buffers=2))
    yield from forms("forward, derivative kept", partial(forward, keep=True), None)
    yield from forms("backward", backward, WIDE.format(stages=3, buffers=3))


def measure(
    ms: Callable[[Callable[[], Tensor]], float], device: torch.device, num_tokens: int
) -> dict[str, dict[str, Any]]:
    """{use: {form: milliseconds and, if it should be right, how far it is from the form in use}}."""
    found: dict[str, dict[str, Any]] = {}
    wanted = torch.empty(0)
    for use, form, right, call in uses(device, num_tokens):
        forms = found.setdefault(use, {})
        out = call().float()
        wanted = out if form == IN_USE else wanted  # which comes first
        forms[form] = {"ms": round(ms(call), 4)}
        if right:
            forms[form]["off"] = f"{float((out - wanted).norm() / wanted.norm()):.1e}"
    return found


def main() -> None:
    from triton.testing import do_bench_cudagraph

    def ms(call: Callable[[], Tensor]) -> float:
        took: Any = do_bench_cudagraph(call, rep=20, return_mode="median")
        return took

    for use, forms in measure(ms, torch.device("cuda"), 16384).items():
        for form, row in forms.items():
            print(f"{use:<26}{form:<28}{row['ms']:.4f} ms  {row.get('off', 'wrong by design')}")


if __name__ == "__main__":
    main()
