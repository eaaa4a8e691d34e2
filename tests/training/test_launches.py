"""What a micro-batch of BERT-base and of ModernBERT-base launches, moves and compiles on a GPU, counted without one
(benchmarks/no_gpu.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.no_gpu import SHARED_BYTES
from benchmarks.workload import architectures
from fastdistil.model.architecture import attended, flops_per_token
from tests.support.precision import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are Python functions under TRITON_INTERPRET=1")

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 16384
AT_MOST = {
    "90 bf16 micro_batch": {
        "launches": 297,
        "zeros": 0,
        "casts of weights": 0,
        "sums of weights": 2,
        "GB outside GEMMs": 12.95,
    },
    "90 fp8 micro_batch": {"launches": 351, "zeros": 1, "casts of weights": 0, "GB outside GEMMs": 16.3},
    "90 bf16 evaluate": {"launches": 149, "zeros": 0, "casts of weights": 0, "GB outside GEMMs": 6.9},
    # 22 and 11 layers where BERT's are 12 and 6. The zeros are the bias that GELU's kernel reads and the head has not.
    "modernbert-base bf16 micro_batch": {
        "launches": 572,
        "zeros": 3,
        "casts of weights": 0,
        "sums of weights": 0,
        "GB outside GEMMs": 32.9,
    },
    "modernbert-base fp8 micro_batch": {"launches": 683, "zeros": 3, "casts of weights": 0, "GB outside GEMMs": 39.5},
    "modernbert-base bf16 evaluate": {"launches": 360, "zeros": 2, "casts of weights": 0, "GB outside GEMMs": 19.2},
}
COMPILATIONS = {"80": 28, "90": 31, "100": 30, "modernbert-base": 28}
"""Of a run that trains and validates with a teacher in bf16 or, from 8.9 on, in FP8."""
SIZES = {"90": "bert-base", "modernbert-base": "modernbert-base"}

READ_NO_ROWS = {"dropout._keys_kernel", "gelu._product_kernel"}
"""Or theirs by TMA."""


@pytest.fixture(scope="module")
def launched():
    """By compute capability or model, what tests/workers/launches_worker.py says."""
    words = [sys.executable, "-m", "tests.workers.launches_worker", "80", "90", "100"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", AT_MOST)
def test_a_micro_batch_launches_and_moves_no_more_than_this(launched, case):
    of, what = case.split(" ", 1)
    found = launched[of][what]
    assert {name: found[name] for name, most in AT_MOST[case].items() if found[name] > most} == {}


@pytest.mark.parametrize("of", SIZES)
def test_all_products_are_counted(launched, of):
    """The recorder's against the cost model's, which knows no padding of the vocabulary."""
    expected = TOKENS * flops_per_token(*architectures(SIZES[of]), lambda _window: 0).total
    for precision in ("bf16", "fp8"):
        assert launched[of][f"{precision} micro_batch"]["FLOP of products"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("of", SIZES)
def test_attention_is_counted_by_its_pairs(launched, of):
    """Both products of a forward of sequences of 512 tokens, which in a layer with a window are many fewer."""
    found = launched[of]["bf16 evaluate"]
    models, lengths = architectures(SIZES[of]), np.array([512])
    seen = [attended(lengths, model.window(layer)) for model in models for layer in range(model.num_layers)]
    expected = 4 * 768 * TOKENS * sum(seen)
    assert found["GFLOP"] * 1e9 - found["FLOP of products"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("of", COMPILATIONS)
def test_what_is_launched_compiles_to_good_code(launched, of):
    """No spill, and 128 bits a load where rows are read: arguments that are not aligned would halve them, or worse."""
    kernels = launched[of]["kernels"]
    assert [kernel for kernel in kernels if kernel["spills"]] == []
    assert [k for k in kernels if k["widest load"] < 128 and k["name"] not in READ_NO_ROWS] == []
    assert len(kernels) <= COMPILATIONS[of], sorted(kernel["name"] for kernel in kernels)


def test_product_with_gelu_is_fed_and_emptied_by_tma(launched):
    """On Hopper: forward, forward that keeps, backward; tensor cores, TMA both ways, a CTA's shared memory."""
    found = [kernel for kernel in launched["90"]["kernels"] if kernel["name"] == "gelu._product_kernel"]
    assert len(found) >= 3
    assert all(kernel["mix"][kind] for kernel in found for kind in ("tensor", "tma loads", "tma stores"))
    assert max(kernel["shared"] for kernel in found) <= SHARED_BYTES[90]


def test_the_check_sees_a_spill(launched):
    """Attention in fp32 has none of the tensor cores' products: whole operands lie in registers."""
    assert any(k["spills"] for k in launched["drift"] if k["name"] == "attention._forward_kernel")
