"""How the tests of fused operators judge errors: by PyTorch's own, against the truth from fp64 leaves."""

import os
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLACK = 4 if INTERPRETED else 2  # Triton's interpreter truncates fp32 -> bf16 instead of rounding
# Eight roundings of the largest value: what two right ways of summing thousands of numbers may differ by, when
# PyTorch's own error happens to be next to none.
FLOOR = 8 * 2.0**-24

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize(
    "dtype",
    # A kernel treats fp16 as it does bf16; in the interpreter, which is slow, that is for make soak.
    [*DTYPES[:2], pytest.param(torch.float16, marks=[pytest.mark.soak] * INTERPRETED)],
    ids=str,
)

USUAL = not INTERPRETED and "ATEN_CPU_CAPABILITY" not in os.environ
of_the_definition = pytest.mark.skipif(
    not USUAL, reason="of the definition, which is the same whatever serves the operator"
)


def compiled(function: Callable) -> Callable:
    """torch.compile without a graph break: by Inductor where the usual kernels serve, elsewhere traced alone.

    Inductor's cache does not know ATEN_CPU_CAPABILITY: it would take loops that it kept for AVX-512 for those of AVX2.
    """
    return torch.compile(function, fullgraph=True, backend="inductor" if USUAL else "aot_eager")


def results(loss: Callable[..., Tensor | Sequence[Tensor]], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp64 values of loss(**leaves), one by one, and of the gradient of the first for every leaf that wants one."""
    values = loss(**leaves)
    values = [values] if isinstance(values, Tensor) else list(values)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(values[0], list(trained.values()))
    named = {f"value {i}": value for i, value in enumerate(values)}
    named |= {f"d{name}": gradient for name, gradient in zip(trained, gradients, strict=True)}
    return {name: tensor.detach().double() for name, tensor in named.items()}


def fp64(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same leaves in fp64; a leaf of lower precision would round the true gradient."""
    return {
        name: leaf.detach().double().requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else leaf
        for name, leaf in leaves.items()
    }


def assert_no_worse_than_pytorch(
    ours: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    leaves: Mapping[str, Tensor],
    *,
    sizes: Mapping[str, float] | None = None,
) -> None:
    """Every value and gradient of `ours` errs at most SLACK times as much as `reference` does in the same dtype.

    Besides, each may err by FLOOR of its size: that of its largest number or, if it is more, what `sizes` holds under
    its name. That is for results whose own numbers are small because what they are made of cancels: PyTorch then errs
    by next to nothing in one case and by several roundings of those larger numbers in the next.
    """
    least = 0.0
    if INTERPRETED:  # a truncation of its own, which PyTorch may happen to be spared: one unit of the largest value
        least = max(torch.finfo(x.dtype).eps for x in leaves.values() if x.is_floating_point())
    truth = results(reference, fp64(leaves))
    mine, theirs = results(ours, leaves), results(reference, leaves)
    for name, exact in truth.items():
        my_error, their_error = ((x[name] - exact).abs().max().item() for x in (mine, theirs))
        size = exact.abs().max().item()
        allowed = SLACK * their_error + max(least * size, FLOOR * max(size, (sizes or {}).get(name, 0.0)))
        assert my_error <= allowed, f"{name}: error {my_error:.2e}, PyTorch's own {their_error:.2e}"
