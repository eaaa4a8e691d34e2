"""quantise_rows against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.kernels.fp8_rows import quantise_rows
from tests.support.precision import DEVICE, INTERPRETED, each_dtype

pytestmark = pytest.mark.triton

# Below, at and across powers of two, which blocks are, and of 8 columns, which a thread takes.
SHAPES = [(1, 1), (5, 31), (3, 256), (17, 257), (2, 3072)]


def make_x(shape, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, bias = (2 * torch.randn(s, generator=gen) for s in (shape, shape[1:]))
    return x.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def definition(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() if bias is None else F.gelu(x.double() + bias.double())


def check(x: Tensor, bias: Tensor | None) -> None:
    """Every number within half a step of e4m3: 2^-4 of itself, or of the subnormals' 2^-9."""
    q, scale = quantise_rows(x, bias)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (len(x), 1))
    exact = definition(x, bias)
    amax = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=1e-5, atol=0)
    got, fp32 = q.double() * scale.double(), 1e-6 * amax
    # the interpreter's conversion truncates subnormals
    allowed = torch.maximum(exact.abs() * 2**-4, scale * 2.0 ** (-9 if INTERPRETED else -10)) + fp32
    right = (got - exact).abs() <= allowed
    if INTERPRETED:  # and it loses the carry of 1.96 to 2.0, where it writes 1.0
        ulps_below = exact.abs() / scale.double() / 2.0 ** torch.frexp(exact / scale).exponent
        right |= ulps_below >= 1 - 2**-5
    assert right.all()


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_half_a_step(shape, dtype, gelu):
    x, bias = make_x(shape, dtype)
    check(x, bias if gelu else None)


def test_what_e4m3_holds_comes_back_exactly():
    """All of its numbers, in rows whose scales are powers of two, tiny and huge ones included."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite() & (numbers.abs() >= 2**-6)].to(DEVICE)  # no subnormals
    x = numbers * 2.0 ** torch.tensor([[-30.0], [0.0], [60.0]], device=DEVICE)
    q, scale = quantise_rows(x)
    assert torch.equal(q.float() * scale, x)
    assert torch.equal(scale.flatten().cpu(), torch.tensor([2.0**-30, 1.0, 2.0**60]))


def test_an_outlier_costs_its_own_row_only():
    x, _ = make_x((3, 40))
    spoiled = x.clone()
    spoiled[1, 5] = 1e4
    (q, scale), (spoiled_q, spoiled_scale) = quantise_rows(x), quantise_rows(spoiled)
    for row in (0, 2):
        assert torch.equal(q[row].float(), spoiled_q[row].float())
        assert torch.equal(scale[row], spoiled_scale[row])
    assert not torch.equal(q[1].float(), spoiled_q[1].float())


def test_rows_of_zeros_and_no_rows():
    q, scale = quantise_rows(torch.zeros(2, 16, device=DEVICE))
    assert not q.float().any()
    assert (scale > 0).all()
    q, scale = quantise_rows(torch.zeros(0, 16, device=DEVICE))
    assert (q.shape, scale.shape) == ((0, 16), (0, 1))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's conversion to e4m3 has no NaN")
def test_nan_stays_nan():
    x, _ = make_x((2, 40))
    x[0, 7] = float("nan")
    q, scale = quantise_rows(x)
    y = q.float() * scale
    assert y[0].isnan().any()
    assert y[1].isfinite().all()


def test_strided_inputs():
    x, bias = make_x((6, 80), torch.bfloat16)
    got = quantise_rows(x[:, ::2], bias[::2])
    wanted = quantise_rows(x[:, ::2].contiguous(), bias[::2].contiguous())
    assert torch.equal(got[0].float(), wanted[0].float())
    assert torch.equal(got[1], wanted[1])


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="on the CPU it is put together from PyTorch's own")
def test_registration():
    # e4m3 has no allclose, which the comparison with aot_autograd needs
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, bias = make_x((5, 48))
    for arguments in ((x, None), (x, bias)):
        torch.library.opcheck(torch.ops.fastdistil.quantise_rows.default, arguments, test_utils=checks)


def test_compiles_without_graph_breaks():
    x, bias = make_x((5, 48), torch.bfloat16)
    compiled = torch.compile(quantise_rows, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x, bias), quantise_rows(x, bias), strict=True):
        assert torch.equal(got.float(), wanted.float())


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3), None, r"wants \(N, D\) with D of 1 or more, got \(3,\)"),
        (torch.zeros(3, 0), None, r"got \(3, 0\)"),
        (torch.zeros(2, 3).double(), None, "got torch.float64"),
        (torch.zeros(2, 3), torch.zeros(4), r"a bias of shape \(3,\) .* got \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(3).bfloat16(), "got .* torch.bfloat16: convert the module"),
    ],
    ids=str,
)
def test_errors_name_the_offender(x, bias, message):
    with pytest.raises(ValueError, match=message):
        quantise_rows(x, bias)
