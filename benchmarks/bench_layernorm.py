"""LayerNorm of a residual sum with dropout. Floor: a copy of as many bytes.

python -m pytest benchmarks/bench_layernorm.py -s
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.dropout import new_dropout_seed
from fastdistil.kernels.layernorm import dropout_add_layernorm

CASES = (
    [(16384, 768, "bfloat16"), (65536, 768, "bfloat16")]
    if DEVICE == "cuda"
    else [(4096, 768, "float32"), (4096, 768, "bfloat16")]
)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("num_rows", "width", "dtype"), CASES)
def test_layernorm(benchmark, num_rows, width, dtype, dropout_p, backward):
    kind = getattr(torch, dtype)
    x, residual, dout = (torch.randn(num_rows, width, device=DEVICE, dtype=kind) for _ in range(3))
    weight, bias = (torch.randn(width, device=DEVICE, dtype=kind) for _ in range(2))
    leaves = [t.requires_grad_(backward) for t in (x, residual, weight, bias)]
    seed = new_dropout_seed(DEVICE)

    def ours():
        return dropout_add_layernorm(*leaves, dropout_p=dropout_p, seed=seed)

    def eager():
        return F.layer_norm(residual + F.dropout(x, dropout_p), (width,), weight, bias, 1e-12)

    def timed(forward):
        def run():
            out = forward()
            if backward:
                torch.autograd.grad(out, leaves, dout)

        return run

    providers: dict[str, Callable[[], object]] = {
        OURS: timed(ours),
        "eager PyTorch": timed(eager),
        "torch.compile": timed(torch.compile(eager)),
    }
    if DEVICE == "cuda" and dropout_p == 0 and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_layer_norm  # pyright: ignore[reportMissingImports]

        providers["Liger (and an add)"] = timed(lambda: liger_layer_norm(residual + x, weight, bias, 1e-12))
    # Forward two reads and a write; backward three reads and two writes, one without dropout.
    units = 3 + (4 + (dropout_p > 0)) * backward
    num_bytes = units * x.numel() * x.element_size()
    source = torch.randn(num_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    compare(
        benchmark,
        "layernorm",
        f"{num_rows} x {width} {dtype} dropout {dropout_p}{' forward+backward' * backward}",
        providers,
        num_bytes=num_bytes,
        num_flops=(10 + 15 * backward) * x.numel(),
        floor=lambda: target.copy_(source),
        budget_s=5.0,
    )
