"""Which kernels serve CPU tensors: the choice at import, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

from fastdistil.kernels._backend import CPU_BACKEND
from tests.support.precision import INTERPRETED

PROGRAM = """
import logging; logging.basicConfig(format="%(levelname)s %(message)s")
import torch
from fastdistil.kernels._backend import CPU_BACKEND
from fastdistil.kernels.distill import distill_loss
torch.manual_seed(0)
student, teacher = torch.randn(2, 5, 3000).unbind()
loss = distill_loss(student, teacher, torch.tensor([1, -100, 2999, -100, 0]),
                        temperature=2.0, kd_scale=1.0, mlm_scale=1.0).loss
print(CPU_BACKEND, loss.item())
"""


def run(**environment: str) -> tuple[str, float, str]:
    """Backend, loss and log of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    backend, loss = done.stdout.split()
    return backend, float(loss), done.stderr


def test_interpreter_is_chosen_by_the_environment():
    assert run(TRITON_INTERPRET="1")[0] == "triton-interpreter"
    assert (CPU_BACKEND == "triton-interpreter") == INTERPRETED


@pytest.mark.skipif(not CPU_BACKEND.startswith("cpp-"), reason="csrc/ is not built or not in use")
def test_one_build_serves_both_instruction_sets_and_neither():
    here, expected, log = run()
    assert here == f"cpp-{torch.backends.cpu.get_cpu_capability().lower()}"
    assert "WARNING" not in log
    for capability, backend in (("avx2", "cpp-avx2"), ("default", "torch")):
        got, loss, log = run(ATEN_CPU_CAPABILITY=capability)
        assert got == backend
        assert loss == pytest.approx(expected, rel=1e-6)
        assert log.count("WARNING") == (backend == "torch")  # slower: said once
