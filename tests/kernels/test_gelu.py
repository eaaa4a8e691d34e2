"""bias_gelu against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.kernels import gelu as module
from fastdistil.kernels.gelu import (
    bias_gelu,
    bias_gelu_reference,
    gelu_backward_product,
    gelu_backward_rows,
    linear_gelu,
    linear_gelu_forward,
)
from tests.support.precision import DEVICE, INTERPRETED, SLACK, each_dtype, fp64, of_the_definition, results

pytestmark = pytest.mark.triton

# Blocks of 16 rows and 256 columns, strips of 128 rows.
SHAPES = [(1, 1), (5, 31), (17, 255), (130, 20), (3, 513)]


def make_leaves(shape, dtype=torch.float32, seed=0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    x, bias, dout = (2 * torch.randn(s, generator=gen) for s in (shape, shape[1:], shape))
    return {
        "x_NF": x.to(DEVICE, dtype).requires_grad_(),
        "bias_F": bias.to(DEVICE, dtype).requires_grad_(),
        "dout_NF": dout.to(DEVICE, dtype),
    }


def eager(x_NF: Tensor, bias_F: Tensor) -> Tensor:
    return F.gelu(x_NF + bias_F)


def judged(operator):
    """Output and, by a loss whose value is 0, every gradient: a sum over all outputs may be right by chance."""

    def loss(dout_NF: Tensor, **leaves: Tensor):
        out = operator(**leaves)
        total = (out.double() * dout_NF).sum()
        return total - total.detach(), out

    return loss


def check(leaves):
    """No worse than twice PyTorch's own error, and one rounding of the largest value."""
    truth = results(judged(bias_gelu_reference), fp64(leaves))
    mine, theirs = (results(judged(op), leaves) for op in (bias_gelu, eager))
    rounding = torch.finfo(leaves["x_NF"].dtype).eps
    for name, exact in truth.items():
        my_error, their_error = ((r[name] - exact).abs().max().item() for r in (mine, theirs))
        allowed = SLACK * their_error + rounding * exact.abs().max().item()
        assert my_error <= allowed, f"{name}: error {my_error:.2e}, PyTorch's own {their_error:.2e}"


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype):
    check(make_leaves(shape, dtype))


def test_extremes():
    """Far out GELU is 0 or z and its derivative 0 or 1, without a NaN from 0 * inf or inf - inf."""
    x = torch.tensor([[-1e30, -50.0, -6.0, 0.0, 6.0, 50.0, 1e30]], device=DEVICE, requires_grad=True)
    out = bias_gelu(x, torch.zeros(7, device=DEVICE))
    out.sum().backward()
    exact = x.detach().double().requires_grad_()
    F.gelu(exact).sum().backward()
    torch.testing.assert_close(out.double(), F.gelu(exact), rtol=1e-6, atol=1e-6)
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad[0, 1:6].double(), exact.grad[0, 1:6], rtol=1e-6, atol=1e-6)


def test_exact_erf_and_not_its_approximation():
    x = torch.linspace(-4, 4, 200, device=DEVICE)[None]
    out, zero = bias_gelu(x, torch.zeros(200, device=DEVICE)), 2e-6
    assert (out.double() - F.gelu(x.double())).abs().max() < zero
    assert (out - F.gelu(x, approximate="tanh")).abs().max() > 100 * zero


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="PyTorch's GELU, which cancels below -4, serves here")
def test_polynomial_is_right_far_below_what_bf16_rounds_by():
    """At every number of bf16 and at others between them: of GELU itself 1e-5 at most, which erf misses below -4."""
    every_bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    z = torch.cat([every_bf16[every_bf16.abs() <= 13], torch.linspace(-13, 13, 200_001)]).to(DEVICE)
    z = z[: z.numel() // 256 * 256].view(-1, 256).requires_grad_()
    out = bias_gelu(z, torch.zeros(256, device=DEVICE))
    (derivative,) = torch.autograd.grad(out.sum(), z)
    exact, density = z.detach().double(), (-z.detach().double().square() / 2).exp()
    tail = torch.special.erfcx(exact.abs() / 2**0.5) / 2 * density
    phi = torch.where(exact < 0, tail, 1 - tail)
    error, size = (out - exact * phi).abs(), (exact * phi).abs()
    assert (error <= 1e-5 * size + 1e-38).all()  # and what fp32 has no normal number for
    assert error.max() < 5e-7
    assert (derivative - phi - exact * density / (2 * torch.pi) ** 0.5).abs().max() < 1e-6


def test_backward_is_deterministic():
    leaves = make_leaves((300, 40), torch.bfloat16)
    first, second = (results(judged(bias_gelu), leaves) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_linear_gelu_is_linear_then_gelu():
    gen = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=gen).to(DEVICE).requires_grad_() for s in ((5, 8), (20, 8), (20,)))
    torch.testing.assert_close(linear_gelu(x, weight, None), F.gelu(F.linear(x, weight)))
    wanted = F.gelu(F.linear(x, weight, bias))
    got = linear_gelu(x, weight, bias)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (x, weight, bias)),
        torch.autograd.grad(wanted.square().sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def two_layers(x_ND: Tensor, weight_FD: Tensor, second_DF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    return F.linear(linear_gelu(x_ND, weight_FD, bias_F), second_DF)


def two_layers_reference(x_ND: Tensor, weight_FD: Tensor, second_DF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    return F.linear(F.gelu(F.linear(x_ND, weight_FD, bias_F)), second_DF)


@pytest.mark.parametrize(
    ("sums", "accumulate"), [(torch.float32, True), (None, False)], ids=["added to fp32", "in the dtype"]
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@each_dtype
@pytest.mark.parametrize("shape", [(5, 24, 31), (130, 64, 48), (17, 16, 272)], ids=str)
def test_functions_without_autograd(shape, dtype, has_bias, sums, accumulate):
    """What a layer's own backward calls, against the operators' gradients."""
    check_functions_without_autograd(shape, dtype, has_bias, sums, accumulate)


def test_without_a_bias_the_cpu_makes_none():
    """Not even zeros: GELU comes right behind the product, and its derivative behind the product of the backward."""
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("Triton's kernels read a bias of zeros")
    x, weight, dy = torch.ones(5, 8), torch.ones(24, 8), torch.ones(5, 16)
    with torch.profiler.profile() as profile:
        _, kept = linear_gelu_forward(x, weight, None, True)
        assert kept is not None
        gelu_backward_product(dy, torch.ones(16, 24), kept, dbias=None, accumulate=False)
    found = {event.key for event in profile.key_averages() if event.key.startswith(("aten::", "mkldnn::"))}
    assert {"aten::gelu", "aten::gelu_backward"} <= found
    assert not found & {"aten::zeros", "aten::new_zeros", "aten::add", "aten::add_", "aten::sum"}


on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] not in module.OWN_PRODUCT,
    reason="for Hopper's tensor cores: Gluon has no interpreter",
)


@on_hopper
@pytest.mark.parametrize("shape", [(130, 64, 128), (1, 128, 256), (1100, 64, 128), (40000, 768, 3072)], ids=str)
def test_product_with_gelu_behind_it(shape):
    """Rows below, at and across a tile and a group of eight tiles, more tiles than programs; nothing behind the end."""
    N, D, width = shape
    gen = torch.Generator().manual_seed(0)
    sizes = ((N, D), (width, D), (width,), (D, width), (N, D))
    x, weight, bias, second, dy = (torch.randn(s, generator=gen).to(DEVICE, torch.bfloat16) for s in sizes)
    weight, second = weight * D**-0.5, second * D**-0.5
    assert module._takes_own_product(x, weight, width)
    z = (x.float() @ weight.float().t() + bias.float()).requires_grad_()
    out, slope = linear_gelu_forward(x, weight, bias, True)
    assert slope is not None
    assert torch.equal(linear_gelu_forward(x, weight, bias, False)[0], out)
    exact = F.gelu(z)
    (derivative,) = torch.autograd.grad(exact.sum(), z)
    dz_exact = dy.float() @ second.float() * derivative
    dbias = torch.full((width,), 0.5, device=DEVICE)
    dz = gelu_backward_product(dy, second, slope, dbias=dbias, accumulate=True)
    pairs = [(slope, derivative), (out, exact.detach()), (dz, dz_exact), (dbias - 0.5, dz_exact.sum(0))]
    for got, wanted in pairs:
        assert (got.float() - wanted).norm() < 5e-3 * wanted.norm()
    again = torch.full((width,), 0.5, device=DEVICE)
    assert torch.equal(gelu_backward_product(dy, second, slope, dbias=again, accumulate=True), dz)
    assert torch.equal(again, dbias)
    zero, none = (linear_gelu_forward(x, weight, b, False)[0] for b in (torch.zeros_like(bias), None))
    assert torch.equal(zero, none)


def check_functions_without_autograd(shape, dtype, has_bias, sums, accumulate):
    N, D, width = shape
    gen = torch.Generator().manual_seed(0)
    sizes = {"x_ND": (N, D), "weight_FD": (width, D), "second_DF": (D, width), "dout_NF": (N, D)}
    sizes |= {"bias_F": (width,)} if has_bias else {}
    given = {name: torch.randn(size, generator=gen).to(DEVICE, dtype) for name, size in sizes.items()}
    x, weight, second, dy = (given[name] for name in ("x_ND", "weight_FD", "second_DF", "dout_NF"))
    bias = given.get("bias_F")
    leaves = {name: x if name == "dout_NF" else x.clone().requires_grad_() for name, x in given.items()}
    truth, theirs = (
        results(judged(operator), tensors)
        for operator, tensors in ((two_layers_reference, fp64(leaves)), (two_layers, leaves))
    )

    out, kept = linear_gelu_forward(x, weight, bias, True)
    kept_nothing, none = linear_gelu_forward(x, weight, bias, False)
    assert kept is not None
    assert none is None
    torch.testing.assert_close(kept_nothing, out)
    for rows in (False, True):
        dbias = None
        if has_bias:
            dbias = torch.full((width,), 0.5 if accumulate else torch.nan, dtype=sums or dtype, device=DEVICE)
        if rows:
            dz = gelu_backward_rows(dy @ second, kept, dbias=dbias, accumulate=accumulate)
        else:
            dz = gelu_backward_product(dy, second, kept, dbias=dbias, accumulate=accumulate)
        mine = {
            "value 1": out @ second.t(),
            "dx_ND": dz @ weight,
            "dweight_FD": dz.t() @ x,
            "dsecond_DF": dy.t() @ out,
        } | ({} if dbias is None else {"dbias_F": dbias - 0.5 * accumulate})
        for name, value in mine.items():
            my_error, their_error = ((v - truth[name]).abs().max().item() for v in (value.double(), theirs[name]))
            allowed = SLACK * their_error + torch.finfo(dtype).eps * truth[name].abs().max().item()
            assert my_error <= allowed, f"{name}: error {my_error:.2e}, the public operator's {their_error:.2e}"


def test_strided_inputs():
    """A slice and a transposed gradient: the kernels want both contiguous."""
    leaves = make_leaves((6, 80))
    bias, dout = leaves["bias_F"].detach()[::2], torch.randn(40, 6, device=DEVICE).T
    given = leaves["x_NF"].detach()[:, ::2].requires_grad_()
    copied = given.detach().contiguous().requires_grad_()
    got, wanted = bias_gelu(given, bias), bias_gelu(copied, bias.contiguous())
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    gradients = torch.autograd.grad(got, given, dout), torch.autograd.grad(wanted, copied, dout)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bias_gradient_is_summed_in_fp32():
    """Strips of 128.25 and -128 leave 0.25, of which bf16 sums would keep nothing. At 50 the derivative is 1."""
    x = torch.full((256, 1), 50.0, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    dout = torch.ones_like(x)
    dout[0], dout[128:] = 1.25, -1.0
    (dbias,) = torch.autograd.grad(bias_gelu(x, bias), bias, dout)
    assert dbias.item() == 0.25


def test_no_rows():
    got = results(judged(bias_gelu), make_leaves((0, 40)))
    assert got["dx_NF"].shape == (0, 40)
    assert not got["dbias_F"].any()


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="on the CPU it is put together from PyTorch's own")
def test_registration():
    leaves = make_leaves((5, 48))
    torch.library.opcheck(torch.ops.fastdistil.bias_gelu.default, (leaves["x_NF"], leaves["bias_F"]))


def test_compiles_without_graph_breaks():
    leaves = make_leaves((5, 48))
    loss = judged(bias_gelu)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = results(compiled, leaves)
    for name, value in results(loss, leaves).items():
        torch.testing.assert_close(got[name], value, msg=name)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    leaves = fp64(make_leaves((3, 4)))
    reference = functools.partial(bias_gelu_reference)
    assert torch.autograd.gradcheck(reference, (leaves["x_NF"], leaves["bias_F"]))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"wants \(N, F\) or \(B, L, F\) and \(F,\), got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(4), r"got \(2, 3\) and \(4,\)"),
        (torch.zeros(2, 3).double(), torch.zeros(3).double(), "got torch.float64"),
        (torch.zeros(2, 3), torch.zeros(3).bfloat16(), r"got \(3,\) torch.bfloat16: convert the module"),
    ],
    ids=str,
)
def test_errors_name_the_offender(x, bias, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)
