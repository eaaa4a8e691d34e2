"""LayerNorm with residual and dropout against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.kernels import layernorm as module
from fastdistil.kernels.dropout import dropout, keep_reference
from fastdistil.kernels.layernorm import (
    add_layernorm,
    add_layernorm_reference,
    dropout_add_layernorm,
    dropout_add_layernorm_reference,
    layernorm,
)
from tests.support.norms import assert_as_right, destinations, each_destination, judged
from tests.support.precision import (
    DEVICE,
    DTYPES,
    FLOOR,
    INTERPRETED,
    SLACK,
    each_dtype,
    fp64,
    of_the_definition,
    results,
)
from tests.support.properties import for_any

pytestmark = pytest.mark.triton

# Rows of a program: 32; of a block: 1,024 down to 1. Widths that are no multiple of 16, of a block, of a warp.
SHAPES = [(1, 2), (5, 31), (33, 384), (67, 65), (3, 768), (2, 769), (1, 4096)]
SEED = torch.tensor(2**62 + 12345, device=DEVICE)
OPTIONS = {"plain": {}, "dropout": {"dropout_p": 0.3, "seed": SEED, "stream": 5}}


def make_leaves(shape, dtype=torch.float32, seed=0, *, without: Sequence[str] = ()) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    N, D = shape
    sizes = {"x_ND": (N, D), "residual_ND": (N, D), "weight_D": (D,), "bias_D": (D,)}
    leaves: dict[str, Any] = {
        name: torch.randn(size, generator=gen).to(DEVICE, dtype).requires_grad_() for name, size in sizes.items()
    }
    leaves["dout_ND"] = torch.randn(shape, generator=gen).to(DEVICE, dtype)
    return {name: leaf for name, leaf in leaves.items() if name not in without}


def make_pair(shape, dtype=torch.float32, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Leaves and gradients of `add_layernorm`. Without that of its second output, parameters get none."""
    leaves = make_leaves(shape, dtype, without=without)
    dsum = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    leaves |= {} if "dsum_ND" in without else {"dsum_ND": dsum}
    if "dout_ND" in without:
        leaves |= {name: leaves[name].detach() for name in ("weight_D", "bias_D") if name in leaves}
    return leaves


def summed(x_ND, residual_ND, *, dropout_p=0.0, seed=None, stream=0):
    """What is normalised, with our mask."""
    if seed is not None:
        rows, columns = (torch.arange(n, device=DEVICE) for n in x_ND.shape)
        kept = keep_reference(seed, stream, dropout_p, rows[:1] * 0, rows, columns)[0]
        x_ND = x_ND * kept / (1 - dropout_p)
    return x_ND if residual_ND is None else residual_ND + x_ND


def eager(x_ND, residual_ND, weight_D, bias_D, *, eps=1e-12, **options):
    """What a PyTorch user would write, every step in the dtype of the input."""
    y = summed(x_ND, residual_ND, **options)
    return F.layer_norm(y, y.shape[1:], weight_D, bias_D, eps)


def eager_pair(x_ND, residual_ND, weight_D, bias_D, *, eps=1e-5, **options):
    y = summed(x_ND, residual_ND, **options)
    return y, F.layer_norm(y, y.shape[1:], weight_D, bias_D, eps)


def judged_pair(operator, **options):
    """The same of two outputs. Of their gradients, dsum_ND and dout_ND, one may be missing."""

    def loss(dsum_ND: Tensor | None = None, dout_ND: Tensor | None = None, **leaves: Tensor):
        pair = operator(**{"bias_D": None} | leaves, **options)
        given = [(out.double() * d).sum() for out, d in zip(pair, (dsum_ND, dout_ND), strict=True) if d is not None]
        total = torch.stack(given).sum()
        return total - total.detach(), *pair

    return loss


def check(leaves, *, eps=1e-12, **options):
    """No worse than twice PyTorch's own error and one rounding of the largest value, which fp32 inside spares.

    A gradient of x is a difference of numbers as large as dout * weight * rstd, of two columns 0. A GPU's square root
    is not PyTorch's.
    """
    options["eps"] = eps
    truth = results(judged(ops_layernorm_reference, **options), fp64(leaves))
    mine, theirs = (results(judged(op, **options), leaves) for op in (ops_layernorm, eager))
    assert_right(truth, mine, theirs, leaves, **options)


def check_pair(leaves, **options):
    options["eps"] = 1e-5
    truth = results(judged_pair(add_layernorm_reference, **options), fp64(leaves))
    mine, theirs = (results(judged_pair(op, **options), leaves) for op in (add_layernorm, eager_pair))
    assert_right(truth, mine, theirs, leaves, **options)


def assert_right(truth, mine, theirs, leaves, *, eps, **options):
    given = {name: leaf.detach().double() for name, leaf in leaves.items()}
    rstd = (summed(given["x_ND"], given["residual_ND"], **options).var(1, correction=0) + eps).rsqrt()
    keep_p = 1 - options.get("dropout_p", 0.0)
    size = ((given.get("dout_ND", given["x_ND"]) * given["weight_D"]).abs().amax(1) * rstd).max().item() / keep_p
    rounding = torch.finfo(leaves["x_ND"].dtype).eps
    for name, exact in truth.items():
        my_error, their_error = ((r[name] - exact).abs().max().item() for r in (mine, theirs))
        allowed = SLACK * their_error + rounding * exact.abs().max().item()
        allowed += FLOOR * size * (DEVICE == "cuda" and name in ("dx_ND", "dresidual_ND"))
        assert my_error <= allowed, f"{name}: error {my_error:.2e}, PyTorch's own {their_error:.2e}"


def ops_layernorm(x_ND, residual_ND, weight_D, bias_D, **options):
    return dropout_add_layernorm(x_ND, residual_ND, weight_D, bias_D, **options)


ops_layernorm_reference = dropout_add_layernorm_reference


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype, options):
    check(make_leaves(shape, dtype), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_dtype
def test_without_a_bias(dtype, options):
    check(make_leaves((67, 65), dtype, without=["bias_D"]), **options)


each_absence = pytest.mark.parametrize(
    "without", [[], ["bias_D"], ["bias_D", "dsum_ND"], ["bias_D", "dout_ND"]], ids=lambda x: " ".join(x) or "all there"
)


@each_absence
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_dtype
@pytest.mark.parametrize("shape", [(5, 31), (67, 65), (3, 768), (2, 769)], ids=str)
def test_the_sum_beside_its_layernorm(shape, dtype, options, without):
    """The pre-norm form; nobody may want one of the two."""
    check_pair(make_pair(shape, dtype, without=without), **options)


@pytest.mark.parametrize("width", [1, 2, 4096])
def test_widths_at_the_ends_of_the_pre_norm_form(width):
    check_pair(make_pair((3, width)), **OPTIONS["dropout"])


@each_dtype
def test_what_is_normalised_is_the_sum_as_it_is_stored(dtype):
    """And not what it was before it was rounded: the backward finds no other."""
    leaves = make_leaves((9, 130), dtype, without=["dout_ND"])
    total, out = add_layernorm(**leaves, **OPTIONS["dropout"])
    assert total.dtype == dtype
    wanted = layernorm(total, leaves["weight_D"], leaves["bias_D"], eps=1e-5)
    torch.testing.assert_close(out, wanted, rtol=torch.finfo(torch.float32).eps, atol=1e-6)


@for_any(
    lambda st: {
        "shape": st.tuples(st.integers(1, 70), st.integers(16, 300)),  # three values may be nearly equal
        "dtype": st.sampled_from(DTYPES),
        "options": st.sampled_from(list(OPTIONS.values())),
        "seed": st.integers(0, 10),
    }
)
def test_any_shape(shape, dtype, options, seed):
    check(make_leaves(shape, dtype, seed), **options)


@each_dtype
def test_without_a_residual(dtype):
    leaves = make_leaves((7, 100), dtype)
    del leaves["residual_ND"]
    truth = results(judged(functools.partial(ops_layernorm_reference, residual_ND=None)), fp64(leaves))
    theirs = results(judged(functools.partial(eager, residual_ND=None)), leaves)
    mine = results(judged(layernorm), leaves)
    for name, exact in truth.items():
        allowed = SLACK * (theirs[name] - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (mine[name] - exact).abs().max() <= allowed, name


def without_residual(x_ND, weight_D, bias_D, *, dropout_p=0.0, seed=None, stream=0):
    return layernorm(dropout(x_ND, seed, stream=stream, dropout_p=dropout_p), weight_D, bias_D)


@pytest.mark.parametrize(
    "without",
    [[], ["residual_ND"], ["bias_D"], ["residual_ND", "bias_D"]],
    ids=["residual", "no residual", "no bias", "neither"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_destination
@each_dtype
@pytest.mark.parametrize("shape", [(3, 17), (67, 96)], ids=str)
def test_functions_without_autograd(shape, dtype, sums, accumulate, options, without):
    """What a layer's own backward calls, against the operators' gradients; and the sum of dx over its rows.

    A layer without biases has none before its LayerNorm either, which is then not asked for that sum.
    """
    leaves = make_leaves(shape, dtype, without=without)
    public, definition = ops_layernorm, ops_layernorm_reference
    if "residual_ND" in without:
        public, definition = without_residual, functools.partial(definition, residual_ND=None)
    given = {name: leaf.detach() for name, leaf in leaves.items()}
    x, weight, dout = (given[name] for name in ("x_ND", "weight_D", "dout_ND"))
    seed, stream, dropout_p = options.get("seed"), options.get("stream", 0), options.get("dropout_p", 0.0)

    bias = given.get("bias_D")
    out, saved = module.forward(x, given.get("residual_ND"), weight, bias, 1e-12, seed, stream, dropout_p)
    into: dict[str, Any] = destinations(("dweight", "dbias", "dx_sum"), shape[1], sums or dtype, accumulate)
    into |= dict.fromkeys(("dbias", "dx_sum") if bias is None else ())
    dresidual, dx = module.backward(dout, saved, weight, seed, stream, dropout_p, **into, accumulate=accumulate)
    assert (dresidual is dx) == (options == {})
    mine = {"value 1": out, "dx_ND": dx, "dresidual_ND": dresidual}
    of = {"dweight_D": into["dweight"], "dbias_D": into["dbias"], "sum of dx": into["dx_sum"]}
    mine |= {name: total - 0.5 * accumulate for name, total in of.items() if total is not None}
    if "residual_ND" in without:
        del mine["dresidual_ND"]

    truth, theirs = (results(judged(definition, **options), fp64(leaves)), results(judged(public, **options), leaves))
    for found in (truth, theirs):
        del found["value 0"]
        found |= {"sum of dx": found["dx_ND"].sum(0)} if "sum of dx" in mine else {}
    assert_as_right(truth, mine, theirs, dtype)


@pytest.mark.parametrize(
    "without",
    [[], ["bias_D"], ["bias_D", "dsum_ND"], ["bias_D", "residual_ND"]],
    ids=["all there", "no bias", "no dsum", "no residual"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_destination
@each_dtype
@pytest.mark.parametrize("shape", [(3, 17), (67, 96)], ids=str)
def test_pre_norm_functions_without_autograd(shape, dtype, sums, accumulate, options, without):
    """As above. Where nothing is added and nothing dropped, the sum is x itself."""
    leaves = make_pair(shape, dtype, without=without)
    given = {name: leaf.detach() for name, leaf in leaves.items()}
    weight, bias, residual = given["weight_D"], given.get("bias_D"), given.get("residual_ND")
    place = options.get("seed"), options.get("stream", 0), options.get("dropout_p", 0.0)

    total, out, saved = module.add_forward(given["x_ND"], residual, weight, bias, 1e-5, *place)
    assert (total is given["x_ND"]) == (residual is None and options == {})
    into: dict[str, Any] = destinations(("dweight", "dbias"), shape[1], sums or dtype, accumulate)
    into |= {} if bias is not None else {"dbias": None}
    before = {name: given[name].clone() for name in ("dsum_ND", "dout_ND") if name in given}
    dresidual, dx = module.add_backward(
        given["dout_ND"], given.get("dsum_ND"), saved, weight, *place, **into, accumulate=accumulate
    )
    assert all(torch.equal(given[name], was) for name, was in before.items())
    assert (dresidual is dx) == (options == {})
    mine = {"value 1": total, "value 2": out, "dx_ND": dx, "dresidual_ND": dresidual}
    of = {"dweight_D": into["dweight"], "dbias_D": into["dbias"]}
    mine |= {name: found - 0.5 * accumulate for name, found in of.items() if found is not None}
    absent = {}
    if residual is None:
        absent["residual_ND"] = None
        del mine["dresidual_ND"]

    truth, theirs = (
        results(judged_pair(functools.partial(operator, **absent), **options), tensors)
        for operator, tensors in ((add_layernorm_reference, fp64(leaves)), (eager_pair, leaves))
    )
    for found in (truth, theirs):
        del found["value 0"]
    assert_as_right(truth, mine, theirs, dtype)


def test_more_rows_than_programs(monkeypatch):
    """Beyond MAX_PROGRAMS a program takes more rows, also where they do not divide."""
    for num_rows in (1, 130, 10**6 + 1):
        rows = module._rows_per_program(num_rows, 4)
        assert rows % 4 == 0
        assert -(-num_rows // rows) <= module.MAX_PROGRAMS
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    check(make_leaves((130, 40)), **OPTIONS["dropout"])


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="PyTorch's LayerNorm for CPUs sums them in bf16")
def test_parameter_gradients_are_summed_in_fp32():
    """Programs of 256.25 and -256 leave 0.25, of which bf16 sums would keep nothing. xhat is 1 and -1."""
    x = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16, device=DEVICE).repeat(64, 32)
    weight, bias = (
        torch.full((64,), value, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for value in (1.0, 0.0)
    )
    dout = torch.full_like(x, 8.0)
    dout[0], dout[32:] = 8.25, -8.0
    out = layernorm(x, weight, bias)
    dweight, dbias = torch.autograd.grad(out, (weight, bias), dout)
    assert torch.equal(dweight, 0.25 * x[0])
    assert torch.equal(dbias, torch.full_like(bias, 0.25))


def test_equal_values_and_large_offsets():
    """Variance 0 with an eps of 1e-12, and a mean a thousand times the deviation."""
    leaves = make_leaves((4, 64))
    with torch.no_grad():
        leaves["x_ND"][0], leaves["residual_ND"][0] = 3.0, -1.0
        leaves["x_ND"][1:] += 1e3
    check(leaves)
    out = ops_layernorm(**{k: v for k, v in leaves.items() if k != "dout_ND"})
    torch.testing.assert_close(out[0], leaves["bias_D"], rtol=0, atol=0)


def test_eps_shows_on_small_values():
    """Trap 6 of the recipe: 1e-12 is far below the variance of ordinary rows, not of these."""
    leaves = make_leaves((3, 50))
    with torch.no_grad():
        for name in ("x_ND", "residual_ND"):
            leaves[name] *= 1e-7
    check(leaves, eps=1e-12)
    arguments = [leaves[k] for k in ("x_ND", "residual_ND", "weight_D", "bias_D")]
    assert not torch.allclose(ops_layernorm(*arguments), ops_layernorm(*arguments, eps=1e-5))


def test_the_mask_is_that_of_the_definition():
    """Every dropped element of x, and no other, has gradient 0: forward and backward draw one mask."""
    leaves, options = make_pair((9, 130)), OPTIONS["dropout"]
    of_pair = results(judged_pair(add_layernorm, **options), leaves)["dx_ND"]
    del leaves["dsum_ND"]
    gradient = results(judged(ops_layernorm, **options), leaves)["dx_ND"]
    rows, columns = (torch.arange(n, device=DEVICE) for n in (9, 130))
    kept = keep_reference(SEED, 5, 0.3, rows[:1] * 0, rows, columns)[0]
    assert torch.equal(gradient != 0, kept)
    assert torch.equal(of_pair != 0, kept)


def test_nothing_is_dropped_without_a_seed():
    leaves = make_pair((9, 130))
    got, wanted = (results(judged_pair(add_layernorm, dropout_p=p), leaves) for p in (0.3, 0.0))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    del leaves["dsum_ND"]
    got, wanted = (results(judged(ops_layernorm, dropout_p=p), leaves) for p in (0.3, 0.0))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_backward_is_deterministic():
    leaves = make_leaves((70, 96), torch.bfloat16)
    first, second = (results(judged(ops_layernorm, **OPTIONS["dropout"]), leaves) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    pair = make_pair((70, 96), torch.bfloat16)
    first, second = (results(judged_pair(add_layernorm, **OPTIONS["dropout"]), pair) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_input_and_frozen_parameters():
    leaves = make_leaves((6, 40))
    wide = torch.randn(6, 80, device=DEVICE, requires_grad=True)
    arguments = [leaves[k].detach() for k in ("residual_ND", "weight_D", "bias_D")]
    out = ops_layernorm(wide[:, ::2], *arguments)
    out.backward(leaves["dout_ND"])
    assert wide.grad is not None
    assert torch.equal(wide.grad[:, 1::2], torch.zeros(6, 40, device=DEVICE))
    whole = wide.detach()[:, ::2].contiguous().requires_grad_()
    ops_layernorm(whole, *arguments).backward(leaves["dout_ND"])
    torch.testing.assert_close(wide.grad[:, ::2], whole.grad, rtol=0, atol=0)


def test_strided_parameters():
    leaves, wide = make_leaves((6, 40)), torch.randn(2, 80, device=DEVICE)
    weight, bias = wide[:, ::2]
    for operator in (layernorm, lambda x, *p: ops_layernorm(x, leaves["residual_ND"], *p)):
        got = operator(leaves["x_ND"], weight, bias)
        wanted = operator(leaves["x_ND"], weight.contiguous(), bias.contiguous())
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_strided_arguments_of_the_pre_norm_form():
    """Every one of them a slice, its two gradients transposed."""
    leaves = make_pair((6, 40))
    sliced = {
        name: torch.stack([leaf.detach()] * 2, -1)[..., 0].requires_grad_(leaf.requires_grad)
        for name, leaf in leaves.items()
    }
    sliced |= {name: leaves[name].t().contiguous().t() for name in ("dsum_ND", "dout_ND")}
    got, wanted = (results(judged_pair(add_layernorm, **OPTIONS["dropout"]), x) for x in (sliced, leaves))
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_no_rows():
    leaves = make_leaves((0, 40))
    got = results(judged(ops_layernorm), leaves)
    assert got["value 1"].shape == got["dx_ND"].shape == (0, 40)
    assert not got["dweight_D"].any()
    got = results(judged_pair(add_layernorm), make_pair((0, 40), without=["bias_D"]))
    assert got["value 1"].shape == got["value 2"].shape == got["dx_ND"].shape == (0, 40)
    assert not got["dweight_D"].any()


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="on the CPU it is put together from PyTorch's own")
def test_registration():
    leaves = make_leaves((5, 48))
    x, residual, weight, bias = list(leaves.values())[:4]
    for given, seed, p in ((residual, SEED, 0.3), (residual, None, 0.0), (None, None, 0.0)):
        operator = torch.ops.fastdistil.dropout_add_layernorm.default
        torch.library.opcheck(operator, (x, given, weight, bias, 1e-12, seed, 5, p))
    torch.library.opcheck(operator, (x, residual, weight, None, 1e-12, SEED, 5, 0.3))
    for given, seed, p in ((bias, SEED, 0.3), (bias, None, 0.0), (None, SEED, 0.3), (None, None, 0.0)):
        operator = torch.ops.fastdistil.add_layernorm.default
        torch.library.opcheck(operator, (x, residual, weight, given, 1e-5, seed, 5, p))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("without", [None, [], ["bias_D"], ["bias_D", "dsum_ND"], ["bias_D", "dout_ND"]], ids=str)
def test_compiles_without_graph_breaks(without, options):
    """`without`: what the pre-norm form is without; None is for the other one."""
    leaves = make_leaves((5, 48)) if without is None else make_pair((5, 48), without=without)
    loss = judged(ops_layernorm, **options) if without is None else judged_pair(add_layernorm, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = results(compiled, leaves)
    for name, value in results(loss, leaves).items():
        torch.testing.assert_close(got[name], value, msg=name)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    leaves = fp64(make_leaves((3, 6)))
    tensors = [leaves[k] for k in ("x_ND", "residual_ND", "weight_D", "bias_D")]
    for definition in (ops_layernorm_reference, add_layernorm_reference):
        assert torch.autograd.gradcheck(functools.partial(definition, **OPTIONS["dropout"]), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_ND": torch.zeros(3)}, r"a residual like x, \(3,\)"),
        ({"x_ND": torch.zeros(2, 8).double(), "residual_ND": torch.zeros(2, 8).double()}, "got torch.float64"),
        ({"residual_ND": torch.zeros(2, 8).bfloat16()}, r"got \(2, 8\) torch.bfloat16"),
        ({"weight_D": torch.zeros(7)}, r"a weight of shape \(8,\) and dtype torch.float32, got \(7,\)"),
        ({"bias_D": torch.zeros(8).bfloat16()}, "a bias of shape .* torch.bfloat16: convert the module"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"seed": torch.tensor(1.0)}, "seed as a 0-dim int64 tensor"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_offender(changes, message):
    good: dict[str, Any] = {"x_ND": torch.zeros(2, 8), "residual_ND": torch.zeros(2, 8)}
    good |= {"weight_D": torch.zeros(8), "bias_D": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        dropout_add_layernorm(**good | changes)
    with pytest.raises(ValueError, match=message):
        add_layernorm(**good | changes)


def test_too_wide():
    x = torch.zeros(1, 4097)
    with pytest.raises(ValueError, match=r"D of 1 to 4096, got \(1, 4097\)"):
        layernorm(x, x[0], x[0])
    with pytest.raises(ValueError, match=r"add_layernorm wants .* D of 1 to 4096, got \(1, 4097\)"):
        add_layernorm(x, x, x[0], None)
