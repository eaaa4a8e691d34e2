"""GELU of a product and its bias, and the product with it. Floor: a copy of as many bytes; the product alone.

python -m pytest benchmarks/bench_gelu.py -s
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels import gelu
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


@pytest.mark.skipif(DEVICE != "cuda", reason="two ways on CUDA alone")
@pytest.mark.parametrize("use", ["forward", "forward, z kept", "backward"])
@pytest.mark.parametrize("num_rows", [16384, 65536])
def test_product(benchmark, monkeypatch, num_rows, use):
    """Whether OWN_PRODUCT is right on this device."""
    width, ffn_size = 768, 3072
    x, weight, second, bias, z = (
        torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        for size in ((num_rows, width), (ffn_size, width), (width, ffn_size), (ffn_size,), (num_rows, ffn_size))
    )
    dbias = torch.zeros(ffn_size, device=DEVICE)

    def timed(majors):
        def run():
            monkeypatch.setattr(gelu, "OWN_PRODUCT", majors)
            if use == "backward":
                gelu.gelu_backward_product(x, second, z, bias, dbias=dbias, accumulate=True)
            else:
                gelu.linear_gelu_forward(x, weight, bias, keep=use == "forward, z kept")

        return run

    compare(
        benchmark,
        "gelu",
        f"product, {use}, {num_rows} x {width} x {ffn_size} bfloat16",
        {OURS: timed(gelu.OWN_PRODUCT), "cuBLAS and a kernel of rows": timed(())},
        num_bytes=(1 if use == "forward" else 2) * z.numel() * z.element_size(),
        num_flops=2 * num_rows * width * ffn_size,
        floor=lambda: torch.mm(x, weight.t(), out=z),
        budget_s=5.0,
    )
