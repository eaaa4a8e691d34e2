"""geglu against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.kernels.geglu import backward, forward, geglu, geglu_reference
from tests.support.precision import (
    DEVICE,
    assert_no_worse_than_pytorch,
    compiled,
    each_dtype,
    fp64,
    of_the_definition,
    results,
)

pytestmark = pytest.mark.triton

# (N, F): blocks of 16 rows and 128 columns.
SHAPES = [(1, 1), (5, 31), (16, 128), (17, 127), (3, 257), (33, 20)]


def make_leaves(shape: tuple[int, int], dtype=torch.float32) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    x, dout = (2 * torch.randn(shape[0], width, generator=gen) for width in (2 * shape[1], shape[1]))
    return {"x_N2F": x.to(DEVICE, dtype).requires_grad_(), "dout_NF": dout.to(DEVICE, dtype)}


def eager(x_N2F: Tensor) -> Tensor:
    """What Hugging Face's ModernBertMLP does."""
    input, gate = x_N2F.chunk(2, -1)
    return F.gelu(input) * gate


def judged(operator):
    """Output and, by a loss whose value is 0, its gradient: a sum over all outputs may be right by chance."""

    def loss(dout_NF: Tensor, x_N2F: Tensor):
        out = operator(x_N2F)
        total = (out.double() * dout_NF).sum()
        return total - total.detach(), out

    return loss


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype):
    assert_no_worse_than_pytorch(judged(geglu), judged(eager), make_leaves(shape, dtype))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_without_autograd(shape, dtype):
    """What a layer's own backward calls: the operator, to the last bit."""
    leaves = make_leaves(shape, dtype)
    x, dout = leaves["x_N2F"], leaves["dout_NF"]
    out = geglu(x)
    assert torch.equal(forward(x.detach()), out)
    assert torch.equal(backward(dout, x.detach()), *torch.autograd.grad(out, x, dout))


def test_the_halves_and_their_order():
    """gelu of the first alone: 0 of it is 0 whatever the gate, and a gate of 0 passes no gradient to it."""
    x = torch.tensor([[0.0, 3.0, 50.0, 7.0, 0.0, -2.0]], device=DEVICE, requires_grad=True)
    out = geglu(x)
    assert out.tolist() == [[0.0, 0.0, -100.0]]
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx[0, [1, 2, 3, 5]].tolist() == [0.0, -2.0, 0.0, 50.0]
    assert dx[0, 0].item() == pytest.approx(3.5)


def test_extremes():
    """Far out GELU is 0 or its argument, and its derivative 0 or 1, without a NaN from 0 * inf."""
    a = torch.tensor([[-1e30, -50.0, -6.0, 0.0, 6.0, 50.0, 1e30]], device=DEVICE)
    x = torch.cat((a, torch.full_like(a, 2.0)), 1).requires_grad_()
    out = geglu(x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    exact = x.detach().double().requires_grad_()
    torch.testing.assert_close(out.double(), eager(exact), rtol=1e-6, atol=1e-6)
    (wanted,) = torch.autograd.grad(eager(exact).sum(), exact)
    assert dx.isfinite().all()
    inside = [1, 2, 3, 4, 5, *range(7, 14)]
    torch.testing.assert_close(dx[0, inside].double(), wanted[0, inside], rtol=1e-6, atol=1e-6)


def test_exact_erf_and_not_its_approximation():
    a = torch.linspace(-4, 4, 200, device=DEVICE)[None]
    out, zero = geglu(torch.cat((a, torch.ones_like(a)), 1)), 2e-6
    assert (out.double() - F.gelu(a.double())).abs().max() < zero
    assert (out - F.gelu(a, approximate="tanh")).abs().max() > 100 * zero


def test_strides_and_no_rows():
    """A slice and a transposed gradient: the kernels want both contiguous."""
    leaves = make_leaves((6, 80))
    given = leaves["x_N2F"].detach()[:, ::2].requires_grad_()
    copied, dout = given.detach().contiguous().requires_grad_(), torch.randn(40, 6, device=DEVICE).T
    got, wanted = geglu(given), geglu(copied)
    assert torch.equal(got, wanted)
    assert torch.equal(*torch.autograd.grad(got, given, dout), *torch.autograd.grad(wanted, copied, dout))
    nothing = results(judged(geglu), make_leaves((0, 40)))
    assert nothing["value 1"].shape == (0, 40)
    assert nothing["dx_N2F"].shape == (0, 80)


def test_registration():
    leaves = make_leaves((5, 24))
    torch.library.opcheck(torch.ops.fastdistil.geglu.default, (leaves["x_N2F"],))
    torch.library.opcheck(torch.ops.fastdistil.geglu_backward.default, (leaves["dout_NF"], leaves["x_N2F"].detach()))


def test_compiles_without_graph_breaks():
    leaves = make_leaves((5, 24))
    got = results(compiled(judged(geglu)), leaves)
    for name, value in results(judged(geglu), leaves).items():
        torch.testing.assert_close(got[name], value, msg=name)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    assert torch.autograd.gradcheck(geglu_reference, (fp64(make_leaves((3, 4)))["x_N2F"],))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"geglu wants two halves of the same width, \(N, 2 F\) or \(B, L, 2 F\), got \(4,\)"),
        (torch.zeros(2, 3), r"got \(2, 3\)"),
        (torch.zeros(2, 4).double(), "geglu wants fp32, bf16 or fp16, got torch.float64"),
    ],
    ids=str,
)
def test_errors_name_the_offender(x, message):
    with pytest.raises(ValueError, match=message):
        geglu(x)
