"""What the machine code of every Triton kernel says, without a GPU: no spill, 16-byte loads, registers in bounds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from benchmarks import aot, aot_variants
from tests.support.precision import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are Python functions under TRITON_INTERPRET=1")

ROOT = Path(__file__).resolve().parents[2]


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


def test_places_rows_and_rates_share_one_compilation():
    """By Triton's own cache, in a process of its own: streams, first indices, rows, vocabularies, probabilities."""
    words = [sys.executable, "-m", "tests.workers.compilations_worker"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = (
        "_dropout_kernel",
        "_keys_kernel",
        "_distill_kernel",
        "_mixture_kernel",
        "_cosine_kernel",
        "_strip_sums_kernel",
        "_rope_kernel",
    )
    assert {name.partition(".")[2] for name in found} >= {*wanted}
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_kernels_compile_where_an_argument_is_one():
    """Triton makes an integer argument of 1 a Python constant, which has not a tensor's methods."""
    for variant, report in aot.compile_all((variant, 90) for variant in aot_variants.specialised_variants()):
        assert report.num_spills == 0, variant.name


def test_syntax_trees_are_made_one_at_a_time(monkeypatch, tmp_path):
    """CPython 3.11 cannot make two in two threads, nearly always (its issue 106905)."""
    parse, inside, most = triton.JITFunction.parse, [], []

    def watched(function):
        inside.append(function)
        most.append(len(inside))
        time.sleep(0.01)  # in which the other threads come
        inside.pop()
        return parse(function)

    monkeypatch.setattr(triton.JITFunction, "parse", watched)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what was compiled before is not parsed
    variants = (v for v in aot_variants.variants() if v.name.startswith("gelu"))
    assert len(list(aot.compile_all((variant, 90) for variant in variants))) > 1
    assert max(most) == 1
