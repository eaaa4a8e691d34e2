"""Cosine loss and its gradient. Floor: two reads and one write of the same bytes.

python -m pytest benchmarks/bench_cosine.py -s
"""

import pytest
import torch

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.cosine import cosine_loss, cosine_loss_reference

CASES = [(131072, 768, "bfloat16")] if DEVICE == "cuda" else [(16384, 768, "float32"), (16384, 768, "bfloat16")]


@pytest.mark.parametrize(("num_rows", "width", "dtype"), CASES)
def test_rows(benchmark, num_rows, width, dtype):
    kind = getattr(torch, dtype)
    student = torch.randn(num_rows, width, device=DEVICE, dtype=kind, requires_grad=True)
    teacher = torch.randn(num_rows, width, device=DEVICE, dtype=kind)
    gradient = torch.empty_like(teacher)

    def backward(loss):
        student.grad = None
        loss(student, teacher).loss.backward()

    def eager(student_ND, teacher_ND):
        return cosine_loss_reference(student_ND, teacher_ND)

    compiled = torch.compile(eager)
    compare(
        benchmark,
        "cosine",
        f"{num_rows} x {width} {dtype}",
        {
            OURS: lambda: torch.ops.fastdistil.cosine_rows(student.detach(), teacher, None, None),
            "fastdistil autograd": lambda: backward(cosine_loss),
            "eager PyTorch": lambda: backward(eager),
            "torch.compile": lambda: backward(compiled),
        },
        num_bytes=3 * num_rows * width * kind.itemsize,
        num_flops=12 * num_rows * width,
        floor=lambda: torch.add(student.detach(), teacher, out=gradient),
        budget_s=5.0,
    )
