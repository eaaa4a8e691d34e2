"""linear against torch.nn.functional.linear, of which it is another implementation."""

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels.linear import (
    add_column_sum,
    add_product,
    add_rows,
    linear,
    linear_add,
    linear_dx,
    linear_forward,
    runs_on_onednn,
)
from tests.support.precision import DEVICE, FLOOR, INTERPRETED, assert_no_worse_than_pytorch, compiled, each_dtype

pytestmark = [pytest.mark.triton]

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 48, 128), (130, 384, 33)]


def make_leaves(shape, dtype, *, bias=True):
    num_rows, width, columns = shape
    gen = torch.Generator().manual_seed(0)
    sizes = {"x": (num_rows, width), "weight": (columns, width)} | ({"bias": (columns,)} if bias else {})
    leaves = {k: torch.randn(s, generator=gen).to(DEVICE, dtype) for k, s in sizes.items()}
    return {k: v.requires_grad_() for k, v in leaves.items()}


def judged(operator):
    """Output and gradients, by a loss whose value is 0: a sum over all outputs may be right by chance."""

    def loss(x, weight, bias=None):
        out = operator(x, weight, bias)
        factors = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
        total = (out * factors.view_as(out)).sum()
        return total - total.detach(), out

    return loss


either_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


@either_bias
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype, bias):
    assert_no_worse_than_pytorch(judged(linear), judged(F.linear), make_leaves(shape, dtype, bias=bias))


def test_without_a_bias_it_is_the_same_operator():
    """PyTorch's own is slower in fp32 (docstring): the profiler sees oneDNN's, forward and backward."""
    leaves = make_leaves((64, 48, 128), torch.float32, bias=False)
    if not runs_on_onednn(leaves["x"]):
        pytest.skip("oneDNN serves the CPU alone")
    with torch.profiler.profile() as profile:
        judged(linear)(**leaves)[0].backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == 2
    assert counts["aten::mm"] == 1  # dweight


@pytest.mark.parametrize(
    ("sums", "accumulate"), [(torch.float32, True), (None, False)], ids=["added to fp32", "in the dtype"]
)
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_without_autograd(shape, dtype, sums, accumulate):
    """What a layer's own backward calls, against PyTorch's gradients, each added to something or in its place."""
    leaves = make_leaves(shape, dtype)
    x, weight, bias = (leaf.detach() for leaf in leaves.values())
    gen = torch.Generator().manual_seed(1)
    dout = torch.randn((shape[0], shape[2]), generator=gen).to(DEVICE, dtype)

    def of(tensors):
        out = F.linear(*tensors)
        return [F.linear(*tensors[:2]), out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))]

    truth, theirs = of([leaf.detach().double().requires_grad_() for leaf in leaves.values()]), of([*leaves.values()])
    start = 0.5 if accumulate else torch.nan
    into = torch.full_like(x, start) if accumulate else None
    dx = linear_dx(dout, weight, into)
    assert into is None or dx is into
    dweight, dbias = (torch.full_like(t, start, dtype=sums or dtype) for t in (weight, bias))
    add_product(dweight, dout.t(), x, accumulate)
    add_column_sum(dbias, dout, accumulate)
    mine = [linear_forward(x, weight, b) for b in (None, bias)]
    mine += [t - 0.5 * accumulate for t in (dx, dweight, dbias)]
    for name, my, their, exact in zip(("out without bias", "out", *leaves), mine, theirs, truth, strict=True):
        my_error, their_error = ((t.double() - exact).abs().max().item() for t in (my, their))
        rounding = max(FLOOR, torch.finfo(dtype).eps) * (exact.abs().max().item() + 0.5)
        assert my_error <= 2 * their_error + rounding, f"{name}: error {my_error:.2e}, PyTorch's own {their_error:.2e}"


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_added_to_a_residual(shape, dtype):
    """The same bits whether the residual stays or not; no worse than a product and a sum of PyTorch's."""
    leaves = make_leaves(shape, dtype, bias=False)
    x, weight = (leaf.detach() for leaf in leaves.values())
    residual = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    before = residual.clone()
    mine = linear_add(x, weight, residual, True)
    assert torch.equal(residual, before)
    assert torch.equal(linear_add(x, weight, residual, False), mine)
    exact = before.double() + x.double() @ weight.double().t()
    my_error, their_error = ((t.double() - exact).abs().max().item() for t in (mine, before + F.linear(x, weight)))
    assert my_error <= 2 * their_error + max(FLOOR, torch.finfo(dtype).eps) * exact.abs().max().item()


@each_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (15, 300), (1300, 24), (2049, 257)], ids=str)
def test_sums_of_columns_in_strips(shape, dtype):
    """No rows, less than a strip, whole and cut strips; rows in wider ones, as a gradient of three parts may lie."""
    gen = torch.Generator().manual_seed(2)
    wide = torch.randn((shape[0], shape[1] + 5), generator=gen).to(DEVICE, dtype)
    for x in (wide, wide[:, : shape[1]]):
        exact = x.double().sum(0)
        total = torch.full(exact.shape, 0.25, device=DEVICE)
        add_column_sum(total, x, accumulate=True)
        # Where Triton serves in fp32; elsewhere within the dtype, as PyTorch sums.
        theirs = (x.sum(0).double() - exact).abs().max()
        assert (total - 0.25 - exact).abs().max() <= theirs + FLOOR * (exact.abs().max() + shape[0] ** 0.5)
        rounded = torch.empty_like(total, dtype=dtype)
        add_column_sum(rounded, x, accumulate=False)
        assert (rounded - exact).abs().max() <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()


def test_strided_rows():
    """A slice of columns, as the teacher's tokens of a chunk may be."""
    leaves = make_leaves((16, 12, 8), torch.float32)
    wide = torch.randn(16, 24, device=DEVICE)
    got = linear(wide[:, ::2], leaves["weight"], leaves["bias"])
    torch.testing.assert_close(got, F.linear(wide[:, ::2], leaves["weight"], leaves["bias"]))


@pytest.mark.skipif(DEVICE == "cuda", reason="the operator is for the CPU; CUDA has PyTorch's own")
def test_operator_is_well_formed():
    for dtype in (torch.float32, torch.bfloat16):
        leaves = make_leaves((9, 16, 24), dtype)
        torch.library.opcheck(torch.ops.fastdistil.linear, tuple(leaves.values()))
        torch.library.opcheck(torch.ops.fastdistil.linear, (leaves["x"], leaves["weight"], None))


@either_bias
def test_compiles_without_graph_breaks(bias):
    leaves = make_leaves((9, 16, 24), torch.float32, bias=bias)
    got = compiled(judged(linear))(**leaves)
    want = judged(linear)(**leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_who_is_served():
    """fp16 and fp64, which oneDNN has not everywhere, and autocast are PyTorch's."""
    x = torch.zeros(2, 2)
    on_cpu = torch.backends.mkldnn.is_available()
    assert [runs_on_onednn(x.to(d)) for d in (torch.float32, torch.bfloat16)] == [on_cpu] * 2
    assert not any(runs_on_onednn(x.to(d)) for d in (torch.float16, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, x, x[0]).dtype == torch.bfloat16


@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA PyTorch refuses these itself")
def test_what_does_not_fit_is_refused():
    x, weight, bias = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
    for wrong in ((x, weight.t(), bias), (x, weight, bias[:4]), (x[0], weight, bias)):
        with pytest.raises(ValueError, match="linear wants"):
            linear(*wrong)
    with pytest.raises(ValueError, match=r"linear wants .* got \[\(3, 4\), \(4, 5\)\]"):
        linear(x, weight.t(), None)
    for of_bias in (bias, None):
        with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and"):
            linear(x, weight.bfloat16(), of_bias)


TABLES = {
    "every row another one": lambda n: torch.arange(n),
    "one row": lambda n: torch.full((n,), 3),
    "a mask token and rare ones": lambda n: torch.where(torch.arange(n) % 8 < 3, 4, torch.arange(n) * 7 % 61),
    "positions": lambda n: torch.arange(n) % 29,
    "runs of a block": lambda n: torch.arange(n) // 32,
}
"""Indices of n rows: within a block of sorted rows, over its border, over many of them."""


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 31, 64, 1500])
@pytest.mark.parametrize("of", TABLES)
def test_rows_of_an_index_add_up(of, num_rows, dtype):
    gen = torch.Generator().manual_seed(2)
    index = TABLES[of](num_rows).to(DEVICE)
    rows = torch.randn(num_rows, 40, generator=gen).to(DEVICE, dtype)
    before = torch.randn(num_rows + 64, 40, generator=gen).to(DEVICE)
    exact = torch.zeros_like(before, dtype=torch.float64).index_add_(0, index, rows.double())
    # On the CPU PyTorch's table is of the dtype of the rows.
    ulp = torch.finfo(dtype).eps if DEVICE == "cpu" and not INTERPRETED else torch.finfo(torch.float32).eps
    most = float(exact.abs().max()) + 1
    for padding, accumulate in ((None, True), (4, True), (4, False)):
        expected = exact.clone()
        if padding is not None:
            expected[padding] = 0
        expected += before if accumulate else 0
        results = []
        for _ in range(2):
            total = before.clone()
            add_rows(total, rows, index, padding, accumulate)
            results.append(total)
        assert torch.equal(*results)
        assert (results[0] - expected).abs().max() <= 64 * ulp * most


def test_neighbours_do_not_change_the_sum_of_a_row():
    """But for rounding, since a block of sorted rows begins elsewhere. Rows of the table without a token stay 0."""
    gen = torch.Generator().manual_seed(3)
    rows = torch.randn(600, 24, generator=gen).to(DEVICE)
    index = torch.randint(50, (600,), generator=gen).to(DEVICE)
    whole, alone = torch.zeros(50, 24, device=DEVICE), torch.zeros(50, 24, device=DEVICE)
    add_rows(whole, rows, index, None, True)
    add_rows(alone, rows[index == 7], index[index == 7], None, True)
    torch.testing.assert_close(whole[7], alone[7])
    assert (alone[:7] == 0).all()
    assert (alone[8:] == 0).all()
