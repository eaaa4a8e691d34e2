"""What the machine code of every Triton kernel says, without a GPU: no spill, 16-byte loads, registers in bounds."""

import pytest

from benchmarks import aot, aot_variants
from tests.support.precision import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are Python functions under TRITON_INTERPRET=1")


def name(variant: aot.Variant) -> str:
    return f"{variant.name} sm_{'-'.join(map(str, variant.archs))}"


@pytest.mark.parametrize("variant", list(aot_variants.variants()), ids=name)
def test_no_spills_and_wide_loads(variant):
    for arch in variant.archs:
        report = aot.compile_variant(variant, arch)
        assert variant.may_spill or report.num_spills == report.stack_bytes == 0, report
        # Every load of a row is 128 bits; the others are scalars and numbers that a row has one of.
        assert report.widest_load == 128, report
        assert sum(n for bits, n in report.loads.items() if bits < 128) <= variant.max_narrow_loads
        assert report.ctas >= variant.min_ctas, report
        assert variant.tensor_cores == (report.mix["tensor"] > 0), report


def test_the_check_sees_a_narrow_load():
    """A vocabulary that is not padded: row stride and bound 30,522 compile to 2-byte loads (facts.md)."""
    variant = next(v for v in aot_variants.variants() if v.name == "distill bf16 gradient")
    narrow = aot.Variant(
        name="not padded", kernel=variant.kernel, signature=variant.signature,
        constexprs=variant.constexprs, divisible=(), num_warps=variant.num_warps,
    )  # fmt: skip
    assert aot.compile_variant(narrow, 90).widest_load < 128
