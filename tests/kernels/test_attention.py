"""attention against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch); on a GPU Triton.

The backend under test is "fused" unless a test says otherwise: "auto" would be PyTorch's own on the CPU.
"""

import collections
import functools
import importlib.machinery
import itertools
import math
import sys
import types
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdistil.kernels import attention as attention_module
from fastdistil.kernels import attention_backends
from fastdistil.kernels.attention import attention, attention_reference, check_heads
from fastdistil.kernels.attention_backends import capturable, resolve_backend, seed_generator
from fastdistil.kernels.attention_tiles import TILES
from fastdistil.kernels.dropout import keep_reference
from fastdistil.kernels.layout import sequence_layout
from tests.support.precision import (
    DEVICE,
    DTYPES,
    FLOOR,
    INTERPRETED,
    assert_no_worse_than_pytorch,
    each_dtype,
    fp64,
    of_the_definition,
    results,
)
from tests.support.properties import for_any

# In a block of rows that runs past the end of its sequence a row there may see nothing of a window: 0 / 0, which is not
# stored. NumPy, which the interpreter computes with, says so.
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

# Below, at and across the blocks of 32 and 64 and the tile of 128. The interpreter gets fewer: it takes 10 ms a
# program.
LENGTHS = [[1], [3, 3, 3], [31, 32, 33, 7, 7], [64, 130] if INTERPRETED else [63, 64, 65, 128, 130]]
# And sequences below, at and across windows that are less, as much and more than a block.
WINDOWS = [
    (1, [1, 2, 3]),
    (20, [20, 21, 41, 130]),
    (64, [64, 200] if INTERPRETED else [64, 65, 128, 129, 300]),
    (65, [197]),
]


def make_leaves(lengths, dtype=torch.float32, heads=2, width=20, seed=0, device=DEVICE) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=gen)
    weight = torch.randn(sum(lengths), heads, width, generator=gen)
    return {"qkv_N3HD": qkv.to(device, dtype).requires_grad_(), "weight_NHD": weight.to(device, dtype)}


def dropout(dropout_p=0.3, seed=2**62 + 12345, stream=7) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": torch.tensor(seed, device=DEVICE), "stream": stream}


def eager(qkv_N3HD: Tensor, layout, *, dropout_p=0.0, seed=None, stream=0, window=0) -> Tensor:
    """What a PyTorch user would write: every step in the dtype of the input."""
    _, _, H, D = qkv_N3HD.shape
    heads = torch.arange(H, device=DEVICE)
    sizes = [batch * length for batch, length in layout.runs]
    tokens = torch.arange(qkv_N3HD.shape[0], device=DEVICE).split(sizes)
    outputs = []
    for (batch, length), rows, part in zip(layout.runs, tokens, qkv_N3HD.split(sizes), strict=True):
        q, k, v = part.view(batch, length, 3, H, D).permute(2, 0, 3, 1, 4)
        score = q @ k.mT / D**0.5
        if window:
            place = torch.arange(length, device=DEVICE)
            score = score.masked_fill((place[:, None] - place).abs() > window, -math.inf)
        weight = score.softmax(-1)
        if seed is not None:
            kept = [keep_reference(seed, stream, dropout_p, heads, row, row) for row in rows.view(batch, length)]
            weight = weight * torch.stack(kept) / (1 - dropout_p)
        outputs.append((weight @ v).transpose(1, 2).reshape(batch * length, H, D))
    return torch.cat(outputs)


def fused(qkv_N3HD: Tensor, layout, **options) -> Tensor:
    return attention(qkv_N3HD, layout, backend="fused", **options)


def judged(operator, layout, **options):
    """Output and, by a loss whose value is 0, gradient: a sum over all outputs may be right by chance."""

    def loss(qkv_N3HD, weight_NHD):
        out = operator(qkv_N3HD, layout, **options)
        total = (out.double() * weight_NHD).sum()
        return total - total.detach(), out

    return loss


def check(lengths, leaves, *, sizes=None, **options):
    layout = sequence_layout(lengths, DEVICE)
    assert_no_worse_than_pytorch(
        judged(fused, layout, **options), judged(eager, layout, **options), leaves, sizes=sizes
    )


@each_dtype
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_worse_than_twice_pytorch(lengths, dropout_p, dtype):
    """With dropout this proves that forward, backward and reference draw one mask."""
    check(lengths, make_leaves(lengths, dtype), **(dropout(dropout_p) if dropout_p else {}))


@each_dtype
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("window", "lengths"), WINDOWS, ids=str)
def test_no_worse_than_twice_pytorch_with_a_window(window, lengths, dropout_p, dtype):
    check(lengths, make_leaves(lengths, dtype), window=window, **(dropout(dropout_p) if dropout_p else {}))


@for_any(
    lambda st: {
        "lengths": st.lists(st.integers(1, 140), min_size=1, max_size=2 if INTERPRETED else 6),
        "heads": st.integers(1, 3),
        "width": st.integers(1, 128),
        "dtype": st.sampled_from(DTYPES),
        "with_dropout": st.booleans(),
        "window": st.integers(0, 140),
    },
    always=[{"lengths": [65], "heads": 1, "width": 1, "dtype": torch.float32, "with_dropout": False, "window": 0}],
)
def test_any_lengths_and_heads(lengths, heads, width, dtype, with_dropout, window):
    """Gradients are judged with a size of theirs that grows with the scores, as the error of flash attention does.

    It computes a weight again, as exp(score - lse). By then the score has been summed twice, and lse, kept in fp32, has
    been rounded up to four times: itself, to base 2, back from it, and in the difference. Each is a relative error of
    the weight of one unit of 2^-24 times the size of a score: four of them are half of FLOOR. `eager` keeps its
    weights, and with heads of width 1 each of its scores is a single rounding. PyTorch's own flash attention errs as
    ours does: of 300 random inputs of width 1 the worst gradient was wrong by 73 units of its largest number there, by
    71 here, and by 21 in `eager`; at widths 32 and 64 the three err alike. In bf16 and fp16 the output, of which delta
    is made, has been rounded, which of a few tokens may be more than all that `eager` rounds.
    """
    leaves = make_leaves(lengths, dtype, heads=heads, width=width)
    options = {"window": window} | (dropout() if with_dropout else {})
    qkv = leaves["qkv_N3HD"].detach().double()
    score = max((q @ k.mT).max().item() for q, k, _ in (x.abs().permute(1, 2, 0, 3) for x in qkv.split(lengths)))
    exact = results(judged(eager, sequence_layout(lengths, DEVICE), **options), fp64(leaves))["dqkv_N3HD"]
    times = max(1 + (score / width**0.5 + math.log(max(lengths))) / 2, torch.finfo(dtype).eps / FLOOR)
    check(lengths, leaves, sizes={"dqkv_N3HD": times * exact.abs().max().item()}, **options)


@pytest.mark.parametrize("width", [1, 16, 32, 33, 64, 128])
def test_head_widths(width):
    check([37, 5], make_leaves([37, 5], torch.bfloat16, width=width), **dropout())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([128, 128], id="all equal"),
        pytest.param([1] * 5 + [512] + [1] * 5, id="one of 512 among ones of 1"),
        pytest.param([1 + i * i % 3 for i in range(30)], id="many short"),
    ],
)
def test_layouts(lengths, dropout_p):
    leaves = make_leaves(lengths, torch.float16, heads=1, width=16)
    check(lengths, leaves, **(dropout(dropout_p) if dropout_p else {}))


def test_ten_thousand_sequences():
    # Ten thousand programs, at 10 ms each, would keep the interpreter busy for minutes: fewer say the same about it.
    many = 6 if INTERPRETED else 1000
    lengths = [2] * (3 * many) + [1] * (5 * many) + [3] * (2 * many)
    check(lengths, make_leaves(lengths, torch.float16, heads=1, width=16))


def test_one_token_sees_itself():
    qkv = make_leaves([1, 1, 1])["qkv_N3HD"]
    for backend in ("auto", "fused", "sdpa"):
        out = attention(qkv, sequence_layout([1, 1, 1], DEVICE), backend=backend)
        torch.testing.assert_close(out, qkv[:, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_to_the_last_bit(dtype):
    lengths = [65, 3, 33]
    loss = judged(fused, sequence_layout(lengths, DEVICE), **dropout())
    first, second = (results(loss, make_leaves(lengths, dtype)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_sequences_do_not_see_each_other(changed, window, backend):
    lengths = [5, 1, 33, 9, 3]
    layout, qkv = sequence_layout(lengths, DEVICE), make_leaves(lengths)["qkv_N3HD"].detach()
    start, end = sum(lengths[:changed]), sum(lengths[: changed + 1])
    other = qkv.clone()
    other[start:end] = float("nan")
    outputs = []
    for x in (qkv, other):
        x = x.clone().requires_grad_()
        out = attention(x, layout, backend=backend, window=window)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        outputs.append(torch.cat([out.detach()[:, None], gradient], dim=1))
    before, after = outputs
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert after[start:end].isnan().all()


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_what_a_window_hides_is_not_read(with_dropout, backend):
    """Rows 256 to 383 see 236 to 403, whose own attention ends at 64 and at 640 in every block there is."""
    lengths, options = [5, 700], dropout() if with_dropout and backend == "fused" else {}
    layout, leaves = sequence_layout(lengths, DEVICE), make_leaves([705], heads=1, width=16)
    judge, hidden = slice(5 + 256, 5 + 384), [slice(5 + 64), slice(5 + 640, None)]
    outputs = []
    for value in (1.0, float("nan")):
        qkv, dout = (x.detach().clone() for x in leaves.values())
        for rows in hidden:
            qkv[rows], dout[rows] = value, value
        out = attention(qkv.requires_grad_(), layout, backend=backend, window=20, **options)
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
        outputs.append(torch.cat([out.detach()[judge, None], dqkv[judge]], dim=1))
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="no one counts what a GPU does")
def test_work_grows_with_the_length_not_with_its_square(monkeypatch):
    """Blocks in Triton's interpreter; elsewhere the FLOP of the products, which the raw functions do not hide."""
    blocks = collections.Counter()
    for name in ("_forward_step", "_dq_step", "_dkdv_step") if INTERPRETED else ():
        step = getattr(attention_module, name)
        monkeypatch.setattr(attention_module, name, lambda *a, step=step: blocks.update("+") or step(*a))
    totals, window = [0], 32
    for length in (192, 384, 576):
        layout, leaves = sequence_layout([length], DEVICE), make_leaves([length], heads=1, width=16)
        qkv, dout = (x.detach() for x in leaves.values())
        with FlopCounterMode(display=False) as flops:
            out, saved = attention_module.forward(qkv, layout, None, 0, 0.0, "fused", window=window)
            attention_module.backward(
                dout, qkv, out, saved, layout, None, 0, 0.0, "fused", dbias=None, accumulate=False, window=window
            )
        totals.append(blocks.total() if INTERPRETED else flops.get_total_flops())
        blocks.clear()
    first, second, third = (after - before for before, after in itertools.pairwise(totals))
    assert third == second >= first > 0
    # A block sees its own rows and a window on either side: of 32 rows three of 32, in each of three kernels; of 64 it
    # is 128, in each of seven products.
    assert second == (3 * 192 // 32 * 3 if INTERPRETED else 7 * 2 * 16 * 192 * (64 + 2 * window))


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("length", [1, 65, 200])
def test_a_window_that_holds_the_sequence_is_none(length, backend):
    leaves, layout = make_leaves([length]), sequence_layout([length], DEVICE)
    operator = functools.partial(attention, backend=backend)
    without = results(judged(operator, layout), leaves)
    for window in (max(1, length - 1), length, 2**30 - 1):
        for name, value in results(judged(operator, layout, window=window), leaves).items():
            torch.testing.assert_close(value, without[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
def test_scores_far_below_zero_with_a_window(backend):
    """A row that sees nothing of the first block starts from a number below every score."""
    layout, leaves = sequence_layout([200], DEVICE), make_leaves([200])
    qkv = leaves["qkv_N3HD"].detach()
    qkv[:, 0], qkv[:, 1] = 2.0**9, -(2.0**9)  # whose scores, -20 * 2^18, are sums without a rounding in any order
    out = attention(qkv, layout, backend=backend, window=20)
    torch.testing.assert_close(out, attention_reference(qkv, layout, window=20))


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 1e2)], ids=str
)
def test_extreme_scores_stay_finite(dtype, value, backend):
    lengths = [1, 40]
    qkv = torch.full((41, 3, 2, 20), value, device=DEVICE, dtype=dtype, requires_grad=True)
    out = attention(qkv, sequence_layout(lengths, DEVICE), backend=backend)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


def test_one_key_that_wins_by_far():
    """Softmax of 0 and 1e4: the statistics start at -inf, the maximum comes in the last, masked block."""
    lengths = [70]
    leaves = make_leaves(lengths)
    with torch.no_grad():
        leaves["qkv_N3HD"][:, 0] = 10.0
        leaves["qkv_N3HD"][:, 1] = 0.0
        leaves["qkv_N3HD"][69, 1] = 1e4
    out = fused(leaves["qkv_N3HD"], sequence_layout(lengths, DEVICE))
    expected = leaves["qkv_N3HD"][69:, 2].expand_as(out)
    # A GPU does not round the product of score and scale: the one weight is a power of 2 near 1, and divided by itself.
    torch.testing.assert_close(out, expected, rtol=2.0**-21 if DEVICE == "cuda" else 0, atol=0)


def test_seed_and_stream_choose_the_mask():
    lengths = [40]
    qkv, layout = make_leaves(lengths)["qkv_N3HD"], sequence_layout(lengths, DEVICE)
    first = fused(qkv, layout, **dropout())
    assert torch.equal(first, fused(qkv, layout, **dropout()))
    for other in (dropout(seed=1), dropout(stream=8)):
        assert not torch.equal(first, fused(qkv, layout, **other))
    without = fused(qkv, layout)
    assert torch.equal(without, fused(qkv, layout, **dropout(dropout_p=0.0)))
    assert torch.equal(without, fused(qkv, layout, dropout_p=0.3))


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[1], [33, 9, 9, 130]], ids=str)
def test_raw_functions_are_the_operator(lengths, dtype, dropout_p, window, backend):
    """Also where the layout ends in empty tiles and where the caller, an autograd function, has gradients off."""
    layout = sequence_layout(lengths, DEVICE, sequence_step=7, tile_step=8)
    leaves, options = make_leaves(lengths, dtype), dropout(dropout_p)
    qkv, dout = leaves["qkv_N3HD"], leaves["weight_NHD"]
    torch.manual_seed(3)  # for sdpa
    expected = attention(qkv, layout, backend=backend, window=window, **options)
    (expected_dqkv,) = torch.autograd.grad(expected, qkv, dout)
    arguments = options["seed"], options["stream"], dropout_p, backend
    with torch.no_grad():
        torch.manual_seed(3)
        out, saved = attention_module.forward(qkv, layout, *arguments, window=window)
        dqkv = attention_module.backward(
            dout, qkv, out, saved, layout, *arguments, dbias=None, accumulate=False, window=window
        )
        torch.manual_seed(3)
        alone, _ = attention_module.forward(qkv, layout, *arguments, keep=False, window=window)
    for got, wanted in ((out, expected), (alone, expected), (dqkv, expected_dqkv)):
        assert not got.requires_grad
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("dtype", "total_dtype", "window"),
    [
        (torch.float32, torch.float32, 0),
        (torch.bfloat16, torch.float32, 0),
        (torch.bfloat16, torch.bfloat16, 0),
        (torch.bfloat16, torch.float32, 20),
    ],
    ids=str,
)
def test_bias_gradient_is_the_column_sums(dtype, total_dtype, window, accumulate, backend):
    lengths = [33, 9, 130]
    layout = sequence_layout(lengths, DEVICE, tile_step=8)
    leaves, options = make_leaves(lengths, dtype), dropout() if backend == "fused" else dropout(0.0)
    qkv, dout = (x.detach() for x in leaves.values())
    arguments = options["seed"], options["stream"], options["dropout_p"], backend
    before = 3.0 if accumulate else float("nan")
    dbias = torch.full((3 * 2 * 20,), before, device=DEVICE, dtype=total_dtype)
    out, saved = attention_module.forward(qkv, layout, *arguments, window=window)
    dqkv = attention_module.backward(
        dout, qkv, out, saved, layout, *arguments, dbias=dbias, accumulate=accumulate, window=window
    )
    rows = dqkv.double().flatten(1)
    expected = rows.sum(0) + (before if accumulate else 0)
    # Each addend is off by a rounding at most, to the dtype of dqkv or in the sum, and the total by its own.
    allowed = torch.finfo(dtype).eps * rows.abs().sum(0) + 2 * torch.finfo(total_dtype).eps * expected.abs()
    assert ((dbias.double() - expected).abs() <= allowed).all()


def test_the_mask_follows_the_rows_not_the_packing():
    """Rows 20 to 59 are one sequence in all three, beside other neighbours and in other tiles."""
    qkv = make_leaves([80])["qkv_N3HD"].detach()
    outputs = [
        fused(qkv, sequence_layout(lengths, DEVICE), **dropout())[20:60]
        for lengths in ([20, 40, 20], [5, 15, 40, 1, 19], [1] * 20 + [40] + [1] * 20)
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-6)


def test_sdpa_draws_unbiased_dropout_from_torchs_generator():
    draws = 2000  # of one sequence of 6 tokens, in one call
    qkv = make_leaves([6])["qkv_N3HD"].detach()
    repeated, layout = qkv.repeat(draws, 1, 1, 1), sequence_layout([6] * draws, DEVICE)
    run = functools.partial(attention, repeated, layout, backend="sdpa", **dropout(0.4))
    torch.manual_seed(3)
    first = run()
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert not torch.equal(first, run())
    drawn = first.view(draws, 6, 2, 20)
    exact = attention_reference(qkv, sequence_layout([6], DEVICE))
    # 240 numbers: six standard errors is a chance of 5e-7
    assert ((drawn.mean(0) - exact).abs() <= 6 * drawn.std(0) / draws**0.5).all()


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_no_number_is_taken_from_torchs_generator(backend):
    leaves, layout = make_leaves([2, 5]), sequence_layout([2, 5], DEVICE)
    options = dropout() if backend == "fused" else {}
    before = torch.get_rng_state()
    attention(leaves["qkv_N3HD"], layout, backend=backend, **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("window", [0, 2, 70])
def test_reference_is_pytorchs_attention_in_fp64(window):
    lengths = [3, 17, 17, 150]
    qkv, layout = make_leaves(lengths)["qkv_N3HD"].double(), sequence_layout(lengths, DEVICE)
    by_pytorch = attention(qkv, layout, backend="sdpa", window=window)
    torch.testing.assert_close(attention_reference(qkv, layout, window=window), by_pytorch)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    layout = sequence_layout([1, 3], "cpu")
    qkv = torch.randn(4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"dropout_p": 0.3, "seed": torch.tensor(5), "stream": 1}, {"window": 1}):
        reference = functools.partial(attention_reference, layout=layout, **options)
        assert torch.autograd.gradcheck(reference, qkv)


def test_registration():
    lengths = [5, 3]
    leaves, layout = make_leaves(lengths, width=16), sequence_layout(lengths, DEVICE)
    qkv, weight = leaves.values()
    for mask in ((None, 0, 0.0), (torch.tensor(5, device=DEVICE), 2, 0.3), (None, 0, 0.0, 3)):
        torch.library.opcheck(torch.ops.fastdistil.attention_forward.default, (qkv, layout.tiles, *mask))
        out, lse = torch.ops.fastdistil.attention_forward(qkv.detach(), layout.tiles, *mask)
        torch.library.opcheck(
            torch.ops.fastdistil.attention_backward.default, (weight, qkv.detach(), out, lse, layout.tiles, *mask)
        )


@pytest.mark.parametrize("window", [0, 4])
def test_compiles_to_one_graph_for_all_layouts(window):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for lengths in ([20, 3], [1, 2, 20], [5, 5, 3, 3, 3, 3, 1]):
        leaves, layout = make_leaves(lengths, torch.float16), sequence_layout(lengths, DEVICE)
        expected = results(judged(fused, layout, window=window, **dropout()), leaves)
        got = results(judged(compiled, layout, window=window, **dropout()), leaves)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
    # The first layout, then once more for any number of tiles from 2 on.
    assert counter.frame_count <= 2, counter.frame_count


def test_flash_attn_gets_what_it_wants(monkeypatch):
    """A stand-in for the package, which needs CUDA to be built: what it is called with; its result comes back."""
    calls: list[tuple[tuple, dict]] = []
    lengths = [5, 3]
    qkv, layout = make_leaves(lengths)["qkv_N3HD"], sequence_layout(lengths, DEVICE)

    def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options):
        calls.append(((cu_seqlens, max_seqlen), options))
        return attention_reference(qkv, layout)

    package: Any = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert resolve_backend("flash-attn", "cuda", dtype=torch.bfloat16) == "flash-attn"
    # Past resolve_backend, which wants CUDA: this has to run anywhere.
    monkeypatch.setattr(attention_module, "resolve_backend", lambda *_args, **_kw: "flash-attn")
    out = attention(qkv, layout, **dropout(0.25))
    torch.testing.assert_close(out, attention_reference(qkv, layout))
    in_evaluation: dict[str, Any] = dropout(0.25) | {"seed": None}
    attention(qkv, layout, **in_evaluation)
    attention(qkv, layout, window=3, **in_evaluation)
    (arguments, options), (_, evaluation), (_, local) = calls
    assert arguments[0] is layout.cu_seqlens
    assert arguments[1] == 5
    always = {"deterministic": True}
    assert (options, evaluation) == ({"dropout_p": 0.25} | always, {"dropout_p": 0.0} | always)
    assert local == evaluation | {"window_size": (3, 3)}


class Calls(TorchDispatchMode):
    """Records PyTorch's attention: operator, whether deterministic kernels are asked for, and its window."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, bool]] = []
        self.windows: list[tuple[int | None, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__:
            name = func.__name__.removesuffix(".default")
            self.made.append((name, torch.get_deterministic_debug_mode() == 2))
            self.windows.append(tuple((kwargs or {}).get(f"window_size_{side}") for side in ("left", "right")))
        return func(*args, **kwargs or {})


def on_fake_tensors(backend: Any, lengths: list[int], dropout_p: float, window: int = 0) -> Calls:
    """What a backend for CUDA calls on tensors without data: PyTorch binds the arguments and says shapes and dtypes.

    On the CPU, wherever this runs: on CUDA the sum of the bias's gradient is a launch of Triton's, which gives the
    kernel the address 0 for a tensor without data, and after that nothing in the process reaches the GPU.
    """
    layout = sequence_layout(lengths, "cpu", sequence_step=4)
    with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
        leaves = make_leaves(lengths, torch.bfloat16, width=24, device="cpu")
        qkv, dout = leaves["qkv_N3HD"].detach(), leaves["weight_NHD"]
        dbias = torch.empty(3 * 2 * 24)
        arguments = torch.tensor(5), 0, dropout_p, backend
        out, saved = attention_module.forward(qkv, layout, *arguments, window=window)
        dqkv = attention_module.backward(
            dout, qkv, out, saved, layout, *arguments, dbias=dbias, accumulate=True, window=window
        )
        alone, nothing = attention_module.forward(qkv, layout, *arguments, keep=False, window=window)
    assert (out.shape, out.dtype, out.is_contiguous()) == (dout.shape, torch.bfloat16, True)
    assert (alone.shape, nothing) == (dout.shape, ())
    assert (dqkv.shape, dqkv.dtype, dqkv.is_contiguous()) == (qkv.shape, torch.bfloat16, True)
    return calls


@pytest.mark.skipif(INTERPRETED, reason="of PyTorch's own calls, which are the same whatever serves the operator")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("window", [0, 3])
def test_torch_flash_is_one_call_each_way_in_one_order(window, dropout_p):
    calls = on_fake_tensors("torch-flash", [5, 3], dropout_p, window)
    forward, backward = ("_flash_attention_forward", False), ("_flash_attention_backward", True)
    assert calls.made == [forward, backward, forward]
    assert calls.windows == [(window, window) if window else (None, None)] * 3
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.skipif(INTERPRETED, reason="of PyTorch's own calls, which are the same whatever serves the operator")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_cudnn_is_one_call_for_each_run_above_one_token(dropout_p):
    made = [name for name, _ in on_fake_tensors("cudnn", [5, 5, 1, 3], dropout_p).made if "cudnn" in name]
    forward = "_scaled_dot_product_cudnn_attention"
    assert made == [forward] * 2 + [f"{forward}_backward"] * 2 + [forward] * 2


@pytest.mark.parametrize("backend", ["torch-flash", "cudnn"])
def test_heads_that_pytorchs_kernels_do_not_take(backend, monkeypatch):
    monkeypatch.setattr(attention_module, "resolve_backend", lambda *_args, **_kw: backend)
    with pytest.raises(
        ValueError, match=f"backend {backend} wants heads of a multiple of 8, got 20: use backend fused"
    ):
        attention(make_leaves([2])["qkv_N3HD"], sequence_layout([2], DEVICE))


def test_a_seeded_generator_gives_what_manual_seed_gives(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    seed_generator("cpu", 7)
    assert torch.equal(torch.rand(3), expected)
    generators = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    seed_generator("cuda:1", 2**63)
    seed_generator("cuda", 5)
    assert [generator.initial_seed() for generator in generators] == [5, 2**63]


def test_what_a_graph_can_hold():
    assert [capturable(backend) for backend in ("fused", "torch-flash", "flash-attn")] == [None] * 3
    for backend in ("sdpa", "cudnn"):
        assert f"{backend} makes one call for each run" in str(capturable(backend))


def test_the_default_on_cuda_is_read_from_the_table(monkeypatch):
    assert attention_backends.FASTEST.keys() == TILES.keys()
    row = attention_backends.Fastest(forward="cudnn", training="torch-flash")
    monkeypatch.setattr(attention_backends, "FASTEST", dict.fromkeys(attention_backends.FASTEST, row))
    assert resolve_backend("auto", "cuda", dtype=torch.bfloat16) == "cudnn"
    assert resolve_backend("auto", "cuda", dropout_p=0.1) == "torch-flash"
    assert resolve_backend("auto", "cuda", dropout_p=0.1, dtype=torch.float32) == "fused"
    assert resolve_backend("auto", "cpu", dropout_p=0.1) == "fused"
    assert resolve_backend("auto", "cuda", dtype=torch.bfloat16, window=64) == "fused"


def test_auto():
    assert resolve_backend("auto", "cuda") == "fused"
    assert resolve_backend("auto", torch.device("cuda:0"), dropout_p=0.1) == "fused"  # one that a GPU machine has
    assert resolve_backend("auto", "cpu") == "sdpa"
    assert resolve_backend("auto", "cpu", dropout_p=0.1) == "fused"
    assert resolve_backend("auto", "cpu", training=True, dtype=torch.float32) == "sdpa"
    assert resolve_backend("auto", "cpu", training=True, dtype=torch.bfloat16) == "fused"
    assert resolve_backend("auto", "cpu", training=True, dtype=torch.float32, window=64) == "fused"
    assert resolve_backend("auto", "cpu", window=64) == "sdpa"
    for backend in ("fused", "sdpa"):
        assert resolve_backend(backend, "cpu") == backend


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("flash", "cuda", None, "wants backend auto, fused, sdpa, torch-flash, cudnn or flash-attn, got 'flash'"),
        ("torch-flash", "cpu", torch.bfloat16, "torch-flash wants bf16 or fp16 on CUDA, got torch.bfloat16 on cpu"),
        ("cudnn", "cuda", torch.float32, "cudnn wants bf16 or fp16 on CUDA, got torch.float32 on cuda"),
        ("flash-attn", "cpu", None, "bf16 or fp16 on CUDA, got a tensor on cpu: use backend auto"),
        ("flash-attn", "cuda", torch.float32, "got torch.float32 on cuda: use backend auto"),
        ("flash-attn", "cuda", torch.float16, "is not installed: use backend auto, or pip install"),
    ],
)
def test_backends_that_cannot_run(backend, device, dtype, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if not installed, even where it is
    with pytest.raises(ValueError, match=message):
        resolve_backend(backend, device, dtype=dtype)


def test_cudnn_refuses_a_window():
    with pytest.raises(ValueError, match=r"cudnn has no window, got 64, .* use backend fused or torch-flash"):
        resolve_backend("cudnn", "cuda", dtype=torch.bfloat16, window=64)
    assert resolve_backend("torch-flash", "cuda", dtype=torch.bfloat16, window=64) == "torch-flash"


@pytest.mark.parametrize(
    "lengths",
    [[4, 4, 2, 4], [1], [128], [129, 1, 300, 129], [1 + i % 200 for i in range(1000)]],
    ids=lambda lengths: str(lengths[:4]),
)
def test_tiles_hold_every_row_once_and_cross_no_boundary(lengths):
    layout = sequence_layout(lengths, DEVICE)
    assert layout.tiles.dtype == layout.cu_seqlens.dtype == torch.int32
    assert layout.tiles.data_ptr() % 16 == 0  # or Triton compiles every kernel twice
    bounds = set(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    rows, tile_lengths = [], []
    for start, end, first in layout.tiles.tolist():
        assert (start, end) in bounds
        assert start <= first < end
        assert (first - start) % 128 == 0
        rows += range(first, min(first + 128, end))
        tile_lengths.append(end - start)
    assert sorted(rows) == list(range(sum(lengths)))
    assert tile_lengths == sorted(tile_lengths, reverse=True)


def test_layout():
    layout = sequence_layout([4, 4, 2, 4], DEVICE)
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 10, 14]
    assert (layout.max_length, layout.num_tokens, layout.runs) == (4, 14, ((2, 4), (1, 2), (1, 4)))


def test_layouts_may_share_a_longest_sequence():
    assert sequence_layout([4, 2], DEVICE, longest=9).max_length == 9
    with pytest.raises(ValueError, match="at most longest=3 tokens, got 4"):
        sequence_layout([4, 2], DEVICE, longest=3)


def test_layout_is_filled_up_to_a_step():
    layout = sequence_layout([130, 2, 2], DEVICE, sequence_step=4, tile_step=3)
    assert layout.cu_seqlens.tolist() == [0, 130, 132, 134, 134]
    real = [[0, 130, 0], [0, 130, 128], [130, 132, 130], [132, 134, 132]]
    assert layout.tiles.tolist() == [*real, [0, 0, 0], [0, 0, 0]]
    assert layout.runs == ((1, 130), (2, 2))


@pytest.mark.parametrize("backend", ["fused", "sdpa", "reference"])
def test_empty_sequences_and_tiles_change_nothing(backend):
    lengths = [33, 9, 9, 130]
    operator = {"reference": attention_reference}.get(backend, functools.partial(attention, backend=backend))
    options = {} if backend == "sdpa" else dropout()  # whose masks are drawn anew in every call
    plain, filled = (
        results(judged(operator, sequence_layout(lengths, DEVICE, **steps), **options), make_leaves(lengths))
        for steps in ({}, {"sequence_step": 7, "tile_step": 8})
    )
    for name, value in plain.items():
        assert torch.equal(value, filled[name]), name


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]], ids=str)
def test_layout_refuses_empty_sequences(lengths):
    with pytest.raises(ValueError, match="at least one sequence, each of 1 token or more"):
        sequence_layout(lengths, "cpu")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5, 3, 60), {}, r"one \(N, 3, heads, head width\) tensor, or .*, got \(5, 3, 60\)"),
        ((5, 2, 3, 20), {}, r"got \(5, 2, 3, 20\)"),
        ((6, 3, 3, 20), {}, "the layout holds 5 tokens, the tensor 6: count the trailing pad"),
        ((5, 3, 3, 20), {"dropout_p": 1.0}, "must be at least 0 and below 1, got 1.0"),
        ((5, 3, 3, 20), {"dropout_p": -0.1}, "got -0.1"),
        ((5, 3, 3, 20), {"stream": -1}, r"stream must be in \[0, 2\^31\), got -1"),
        ((5, 3, 3, 20), {"seed": torch.tensor(1.0)}, "seed as a 0-dim int64 tensor"),
        ((5, 3, 3, 20), {"backend": "math"}, "got 'math'"),
        ((5, 3, 3, 20), {"window": -1}, "window as a whole number from 0, which is none, to 2.30, got -1"),
        ((5, 3, 3, 20), {"window": 2.0}, "got 2.0"),
        ((5, 3, 3, 20), {"window": 2**30}, "got 1073741824"),
    ],
)
def test_errors(shape, options, message):
    layout = sequence_layout([2, 3], "cpu")
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(shape), layout, **options)


def test_fused_names_what_it_cannot_do():
    layout = sequence_layout([2, 3], DEVICE)
    with pytest.raises(ValueError, match=r"got torch.float64: convert it, or use backend sdpa"):
        fused(torch.zeros(5, 3, 3, 20, dtype=torch.float64, device=DEVICE), layout)
    if DEVICE == "cuda" or INTERPRETED:
        with pytest.raises(ValueError, match="heads of at most 128, got 129: use backend sdpa"):
            fused(torch.zeros(5, 3, 3, 129, device=DEVICE), layout)


@pytest.mark.parametrize(
    ("backend", "head_dim", "wanted"), [("fused", 256, "heads of at most 128"), ("cudnn", 20, "a multiple of 8")]
)
def test_what_a_gpu_does_not_take_is_known_before_it_works(backend, head_dim, wanted):
    """Raw functions check nothing: whoever loads the models asks."""
    with pytest.raises(ValueError, match=f"backend {backend} wants .*{wanted}, got {head_dim}: use backend"):
        check_heads(backend, head_dim, torch.device("cuda"))
    check_heads(backend, 64, torch.device("cuda"))
