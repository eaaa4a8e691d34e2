"""Which kernels serve CPU tensors: the choice at import, here and in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

from fastdistil.kernels._backend import CPU_BACKEND, add_column_sums, times_gradient
from tests.support.precision import DEVICE, INTERPRETED

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


@pytest.mark.triton
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize(("programs", "num_sums", "width"), [(1, 1, 1), (130, 2, 33), (128, 3, 16), (0, 3, 5)])
def test_sums_of_programs(programs, num_sums, width, accumulate):
    """Each into a place of its own, in its dtype; one that nobody wants, into none."""
    gen = torch.Generator().manual_seed(0)
    partial = torch.randint(-8, 9, (programs, num_sums, width), generator=gen).to(DEVICE, torch.float32)
    places = [torch.full((width,), 2.0 if accumulate else torch.nan, device=DEVICE) for _ in range(num_sums)]
    places[-1] = places[-1].bfloat16()
    for absent in (None, 0):
        outs = [None if m == absent else place.clone() for m, place in enumerate(places)]
        add_column_sums(partial, outs, accumulate)
        for out, place, wanted in zip(outs, places, partial.sum(0), strict=True):
            if out is not None:
                torch.testing.assert_close(out, (wanted + 2.0 * accumulate).to(place.dtype), rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter], ids=["eager", "as where it cannot be read"])
def test_a_gradient_times_that_of_the_loss_is_rounded_once(kind):
    gradient = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    third = torch.tensor(1 / 3, device=DEVICE)
    of_loss = third if kind is torch.Tensor else torch.nn.Parameter(third, requires_grad=False)
    (got,) = times_gradient(of_loss, [gradient])
    assert torch.equal(got, (gradient.float() * third).bfloat16())
    assert not torch.equal(got, gradient * third.bfloat16())


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
