"""What the machine code of every Triton kernel says, without a GPU: no spill, 16-byte loads, registers in bounds."""

import pytest

from benchmarks import aot
from tests.precision import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="kernels are Python functions under TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("variant", list(aot.variants()), ids=lambda variant: variant.name)
def test_no_spills_and_wide_loads(variant):
    for arch in aot.ARCHITECTURES:
        report = aot.compile_variant(variant, arch)
        assert report.num_spills == report.stack_bytes == 0, report
        # Every load of a row is 128 bits; the others are the label, its logit and num_rows, one each.
        assert report.widest_load == 128, report
        assert sum(n for bits, n in report.loads.items() if bits < 128) <= 3, report
        # The row kernel needs two CTAs of 512 threads an SM to overlap its two passes: 65,536 / 1,024 registers.
        assert report.registers * 32 * variant.num_warps <= 65536 // 2, report


def test_the_check_sees_a_narrow_load():
    """A vocabulary that is not padded: row stride and bound 30,522 compile to 2-byte loads (facts.md)."""
    variant = next(v for v in aot.variants() if v.name == "distill bf16 gradient")
    narrow = aot.Variant(
        name="not padded", kernel=variant.kernel, signature=variant.signature,
        constexprs=variant.constexprs, divisible=(), num_warps=variant.num_warps,
    )  # fmt: skip
    assert aot.compile_variant(narrow, 90).widest_load < 128
