"""Which kernels serve CPU tensors: the choice at import, here and in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

from fastdistil.kernels._backend import CPU_BACKEND
from tests.support.precision import INTERPRETED

LOGGING = 'import logging; logging.basicConfig(format="%(levelname)s %(message)s")'
PROGRAM = """
import torch
from fastdistil.kernels._backend import CPU_BACKEND
from fastdistil.kernels.distill import distill_loss
torch.manual_seed(0)
student, teacher = torch.randn(2, 5, 3000).unbind()
labels = torch.tensor([1, -100, 2999, -100, 0])
loss = distill_loss(student, teacher, labels, temperature=2.0, kd_scale=1.0, mlm_scale=1.0).loss.item()
"""


def run(**environment: str) -> tuple[str, float, str]:
    """Backend, loss and log of a fresh process, which imports one operator and nothing else of ours."""
    done = subprocess.run(
        [sys.executable, "-c", f"{LOGGING}\n{PROGRAM}print(CPU_BACKEND, loss)"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    backend, loss = done.stdout.split()
    return backend, float(loss), done.stderr


def test_interpreter_is_chosen_by_the_environment():
    assert run(TRITON_INTERPRET="1")[0] == "triton-interpreter"
    assert (CPU_BACKEND == "triton-interpreter") == INTERPRETED


@pytest.mark.skipif(not CPU_BACKEND.startswith("cpp-"), reason="csrc/ is not built or not in use")
def test_one_build_serves_both_instruction_sets_and_neither():
    assert f"cpp-{torch.backends.cpu.get_cpu_capability().lower()}" == CPU_BACKEND
    here: dict[str, float] = {}
    exec(PROGRAM, here)
    for capability, backend in (("avx2", "cpp-avx2"), ("default", "torch")):
        got, loss, log = run(ATEN_CPU_CAPABILITY=capability)
        assert got == backend
        assert loss == pytest.approx(here["loss"], rel=1e-6)
        assert log.count("WARNING") == (backend == "torch")  # slower: said once
