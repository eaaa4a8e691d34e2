"""The row kernel: loss and gradient of rows of logits. Floor: two reads and one write of the same bytes.

python -m pytest benchmarks/bench_distill.py -s
"""

import importlib.util

import pytest
import torch

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.distill import distill_loss, distill_loss_reference

TEMPERATURE, KD_SCALE, MLM_SCALE = 2.0, 5.0, 2.0
# GPU rows as the trained models have them, padded to 30,528; sizes well beyond the L2 cache.
CASES = (
    [(16384, 30528, "bfloat16"), (8192, 30528, "float32")]
    if DEVICE == "cuda"
    else [(512, 30522, "float32"), (512, 30522, "bfloat16")]
)


@pytest.mark.parametrize(("num_rows", "num_columns", "dtype"), CASES)
def test_rows(benchmark, num_rows, num_columns, dtype):
    kind = getattr(torch, dtype)
    student = (3 * torch.randn(num_rows, num_columns, device=DEVICE)).to(kind).requires_grad_()
    teacher = (3 * torch.randn(num_rows, num_columns, device=DEVICE)).to(kind)
    labels = torch.randint(30522, (num_rows,), device=DEVICE)
    labels = torch.where(torch.rand(num_rows, device=DEVICE) < 0.15, labels, -100)
    gradient = torch.empty_like(teacher)
    scales = torch.tensor([KD_SCALE, MLM_SCALE], device=DEVICE)
    weights = {"temperature": TEMPERATURE, "kd_scale": KD_SCALE, "mlm_scale": MLM_SCALE, "vocab_size": 30522}

    def rows(target):
        return torch.ops.fastdistil.distill_rows(
            target.detach(), teacher, labels, None, gradient, 0, TEMPERATURE, scales, 30522
        )

    def backward(loss):
        student.grad = None
        loss(student, teacher, labels, **weights).loss.backward()

    def eager(*args, **kwargs):
        return distill_loss_reference(*args, **kwargs)

    compiled = torch.compile(eager)
    providers = {
        OURS: lambda: rows(student),  # loss and gradient, as linear_distill_loss calls it
        "fastdistil autograd": lambda: backward(distill_loss),
        "eager PyTorch": lambda: backward(eager),
        "torch.compile": lambda: backward(compiled),
    }
    if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerJSD  # pyright: ignore[reportMissingImports]

        divergence = LigerJSD(beta=0.0)  # forward KL; without T^2 and without the MLM term

        def liger():
            student.grad = None
            log_q, log_p = ((x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
            divergence(log_q, log_p).backward()

        providers["Liger JSD, KD only"] = liger
    num_elements = num_rows * num_columns
    compare(
        benchmark,
        "distill",
        f"{num_rows} x {num_columns} {dtype}, 15 % labelled",
        providers,
        num_bytes=3 * num_elements * kind.itemsize,
        num_flops=24 * num_elements,  # 4 exponentials and about 20 other operations an element
        floor=lambda: torch.add(student.detach(), teacher, out=gradient),
    )
