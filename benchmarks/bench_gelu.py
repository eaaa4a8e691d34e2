"""GELU of a product and its bias. Floor: a copy of as many bytes.

python -m pytest benchmarks/bench_gelu.py -s
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.gelu import bias_gelu

CASES = [(16384, 3072, "bfloat16")] if DEVICE == "cuda" else [(1024, 1536, "float32"), (1024, 1536, "bfloat16")]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("num_rows", "width", "dtype"), CASES)
def test_bias_gelu(benchmark, num_rows, width, dtype, backward):
    kind = getattr(torch, dtype)
    x, dout = (torch.randn(num_rows, width, device=DEVICE, dtype=kind) for _ in range(2))
    bias = torch.randn(width, device=DEVICE, dtype=kind)
    leaves = [t.requires_grad_(backward) for t in (x, bias)]

    def eager():
        return F.gelu(x + bias)

    def timed(forward):
        def run():
            out = forward()
            if backward:
                torch.autograd.grad(out, leaves, dout)

        return run

    num_bytes = (2 + 3 * backward) * x.numel() * x.element_size()
    source = torch.randn(num_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    compare(
        benchmark,
        "gelu",
        f"{num_rows} x {width} {dtype}{' forward+backward' * backward}",
        {
            OURS: timed(lambda: bias_gelu(x, bias)),
            "eager PyTorch": timed(eager),
            "torch.compile": timed(torch.compile(eager)),
        },
        num_bytes=num_bytes,
        num_flops=(20 + 25 * backward) * x.numel(),
        floor=lambda: target.copy_(source),
        budget_s=5.0,
    )
