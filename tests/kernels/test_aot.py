"""What the machine code of every Triton kernel says, without a GPU: no spill, 16-byte loads, registers in bounds."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks import aot, aot_variants
from tests.support.precision import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are Python functions under TRITON_INTERPRET=1")


def mistakes(variant: aot_variants.Variant, report: aot.Report) -> list[str]:
    """What is wrong with the machine code of a variant, in words."""
    narrow = sum(number for bits, number in report.loads.items() if bits < 128)
    wanted = {
        "no spill": variant.may_spill or report.num_spills == report.stack_bytes == 0,
        # Every load of a row is 128 bits; the others are scalars and numbers that a row has one of.
        "loads of 128 bits": report.widest_load == 128,
        f"{variant.max_narrow_loads} narrow loads at most": narrow <= variant.max_narrow_loads,
        f"{variant.min_ctas} CTAs an SM": report.ctas >= variant.min_ctas,
        "tensor cores where there are products": variant.tensor_cores == (report.mix["tensor"] > 0),
    }
    return [f"{variant.name} wants {what}: {report}" for what, is_so in wanted.items() if not is_so]


def assert_good(variants: Iterable[aot_variants.Variant], arch: int) -> None:
    reports = aot.compile_all((variant, arch) for variant in variants if arch in variant.archs)
    assert [mistake for variant, report in reports for mistake in mistakes(variant, report)] == []


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_no_spills_and_wide_loads(arch):
    assert_good(aot_variants.variants(), arch)


@pytest.mark.soak
@pytest.mark.parametrize("arch", aot_variants.ARCHITECTURES)
def test_no_spills_and_wide_loads_in_rarer_variants(arch):
    assert_good(aot_variants.rarer_variants(), arch)


def test_the_check_sees_a_narrow_load():
    """A vocabulary that is not padded: row stride and bound 30,522 compile to 2-byte loads (facts.md)."""
    variant = next(v for v in aot_variants.variants() if v.name == "distill bf16 gradient")
    narrow = replace(variant, name="not padded", divisible=())
    (mistake, *_) = mistakes(narrow, aot.compile_variant(narrow, 90))
    assert mistake.startswith("not padded wants loads of 128 bits")


def test_kernels_compile_where_an_argument_is_one():
    """Triton makes an integer argument of 1 a Python constant, which has not a tensor's methods."""
    for variant, report in aot.compile_all((variant, 90) for variant in aot_variants.specialised_variants()):
        assert report.num_spills == 0, variant.name
