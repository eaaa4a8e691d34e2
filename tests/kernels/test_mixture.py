"""mix_logits against the mean of softmaxes in fp64. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.kernels import linear_distill as module
from fastdistil.kernels.distill import distill_loss, distill_loss_reference
from fastdistil.kernels.mixture import mix_logits, mix_logits_reference, running_shares
from tests.support.precision import (
    DEVICE,
    FLOOR,
    INTERPRETED,
    SLACK,
    assert_no_worse_than_pytorch,
    compiled,
    each_dtype,
)
from tests.support.properties import for_any

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, of -inf in Triton's interpreter
]

# Below, at and across the 16 rows that the CPU takes together and the 2,048 or 4,096 columns of a kernel's step.
SHAPES = [(1, 1), (5, 31), (16, 2048), (17, 2049), (2, 4104), (3, 30528)]
WEIGHTS = (2.0, 1.0, 0.5)


def make_logits(shape, dtype=torch.float32, *, count=3, seed=0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(*shape, generator=gen)).to(DEVICE, dtype) for _ in range(count)]


def probabilities(logits_NV: Tensor, vocab_size: int | None = None, temperature: float = 2.0) -> Tensor:
    """What a student is taught: the distribution at the temperature, in fp64."""
    return torch.softmax(logits_NV[:, :vocab_size].double() / temperature, dim=-1)


def check(logits: list[Tensor], weights=WEIGHTS, *, vocab_size: int | None = None, temperature: float = 2.0) -> Tensor:
    """The probabilities are no worse than twice PyTorch's, which rounds the logarithms once, for each time ours are.

    Where fp32 is truncated, by a unit more.
    """
    options = {"temperature": temperature, "vocab_size": vocab_size}
    mixed = mix_logits(logits, weights, **options)
    assert (mixed.shape, mixed.dtype) == (logits[0].shape, logits[0].dtype)
    truth = mix_logits_reference([y.double() for y in logits], weights, **options)
    exact, theirs, mine = (
        probabilities(y, vocab_size, temperature)
        for y in (truth, mix_logits_reference(logits, weights, **options), mixed)
    )
    error, own = ((p - exact).abs().max().item() for p in (mine, theirs))
    least = torch.finfo(logits[0].dtype).eps if INTERPRETED else 0.0
    assert error <= SLACK * own * max(1, len(logits) - 1) + max(least, FLOOR), (
        f"error {error:.2e}, PyTorch's own {own:.2e}"
    )
    return mixed


@each_dtype
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, count, dtype):
    logits = make_logits(shape, dtype, count=count)
    before = [y.clone() for y in logits]
    check(logits, WEIGHTS[:count])
    assert all(torch.equal(*pair) for pair in zip(logits, before, strict=True)), "they are left as they are"


@for_any(
    lambda st: {
        "shape": st.tuples(st.integers(1, 20), st.integers(1, 200)),
        "weights": st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4),
        "temperature": st.floats(0.25, 8.0),
    }
)
def test_any_shape_and_weights(shape, weights, temperature):
    check(make_logits(shape, count=len(weights)), weights, temperature=temperature)


@each_dtype
def test_padding_columns_do_not_matter(dtype):
    logits = make_logits((5, 320), dtype)
    for y, rubbish in zip(logits, (torch.nan, torch.inf, 1e4), strict=True):
        y[:, 301:] = rubbish
    mixed = check(logits, vocab_size=301)
    assert mixed[:, :301].isfinite().all()


def test_a_teacher_mixed_with_itself_is_that_teacher():
    """Within a rounding or two of the logarithms: logits are then the logarithms of its own probabilities."""
    (y,) = make_logits((5, 2049), count=1)
    alone = 2.0 * torch.log_softmax(y / 2.0, dim=-1)
    torch.testing.assert_close(mix_logits([y, y, y], WEIGHTS, temperature=2.0), alone, rtol=1e-6, atol=1e-6)


def test_neither_order_nor_scale_of_weights_matters():
    a, b, c = make_logits((5, 301))
    one = mix_logits([a, b, c], [2.0, 1.0, 0.5], temperature=2.0)
    for other in ([c, a, b], [1.0, 4.0, 2.0]), ([b, c, a], [0.1, 0.05, 0.2]):
        torch.testing.assert_close(mix_logits(*other, temperature=2.0), one, rtol=1e-5, atol=1e-5)


def test_the_probabilities_are_averaged_not_the_logits():
    """Two teachers that are each sure of another word: half of each, which no mean of logits says."""
    y, x = torch.full((1, 4), -20.0, device=DEVICE), torch.full((1, 4), -20.0, device=DEVICE)
    y[0, 0], x[0, 1] = 20.0, 10.0
    p = probabilities(mix_logits([y, x], [1, 1], temperature=1.0), temperature=1.0)
    assert p[0].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=1e-6)


@each_dtype
def test_minus_infinity_is_a_token_that_is_never_said(dtype):
    logits = make_logits((5, 301), dtype)
    for y in logits:
        y[:, 3] = -torch.inf
    logits[0][:, 7] = -torch.inf
    mixed = check(logits)
    assert (mixed[:, 3] == -torch.inf).all()
    assert mixed[:, [*range(3), *range(4, 301)]].isfinite().all()


@pytest.mark.parametrize("size", [200.0, 1e4, 1e30])
def test_large_logits_and_vanished_probabilities(size):
    """Rows beyond what fp32 sums without their largest logit; columns whose probability is 0 get no weight."""
    logits = make_logits((5, 301), count=2)
    logits[0].mul_(size)
    mixed = check(logits, WEIGHTS[:2])
    assert not mixed.isnan().any()
    loss = distill_loss(logits[1], mixed, None, temperature=2.0, kd_scale=1.0, mlm_scale=0.0)
    assert loss.loss.isfinite()


def test_a_row_without_any_token_is_not_a_number():
    logits = make_logits((3, 301), count=2)
    logits[1][1] = -torch.inf
    mixed = mix_logits(logits, WEIGHTS[:2], temperature=2.0)
    assert mixed[1].isnan().all()
    assert mixed[[0, 2]].isfinite().all()


def test_strided_inputs():
    y, x = make_logits((6, 80), torch.bfloat16, count=2)
    for cut in ((slice(None), slice(None, None, 2)), (slice(None, None, 2), slice(8, 72))):
        got = mix_logits([y[cut], x[cut]], [1, 3], temperature=2.0)
        assert torch.equal(got, mix_logits([y[cut].contiguous(), x[cut].contiguous()], [1, 3], temperature=2.0))


# --- inside the loss


def make_heads(dtype=torch.float32, widths=(24, 40, 16), num_tokens=13, V=320) -> tuple[list[Tensor], list]:
    """The trained three tensors, and hidden states, weight and bias of teachers of other widths."""
    gen = torch.Generator().manual_seed(1)

    def head(width):
        shapes = (num_tokens, width), (V, width), (V,)
        return [(1.5 * torch.randn(*s, generator=gen) / s[-1] ** 0.25).to(DEVICE, dtype) for s in shapes]

    trained, *teachers = map(head, widths)
    return trained, teachers


def fused(student_ND, weight_VD, bias_V, *, teachers, labels_N, chunk_tokens, **options) -> list[Tensor]:
    """[loss, kd, mlm, agreement, dstudent, dweight, dbias] of linear_distill.forward."""
    scales = torch.tensor([0.7, 0.3], device=DEVICE)
    dweight, dbias = (torch.empty_like(x, dtype=torch.float32) for x in (weight_VD, bias_V))
    first, *others = teachers
    arguments: list[Any] = [student_ND, weight_VD, bias_V, *first, labels_N, None, 2.0, scales, 301, chunk_tokens]
    loss, sums, dstudent = module.forward(
        *arguments,
        dweight=dweight, dbias=dbias, accumulate=False,
        others=[(*other, share) for other, share in zip(others, running_shares(WEIGHTS[: len(teachers)]), strict=True)],
    )  # fmt: skip
    assert dstudent is not None
    return [loss, *sums, dstudent, dweight, dbias]


class _Ours(torch.autograd.Function):
    """The fused loss as a function of the three trained tensors."""

    @staticmethod
    def forward(ctx: Any, student_ND, weight_VD, bias_V, options):
        loss, kd, mlm, agree, *gradients = fused(student_ND, weight_VD, bias_V, **options)
        ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(gradients, (student_ND, weight_VD, bias_V), strict=True)))
        ctx.mark_non_differentiable(kd, mlm, agree)
        return loss, kd, mlm, agree

    @staticmethod
    def backward(ctx: Any, *_):
        return *ctx.saved_tensors, None


def plain(student_ND, weight_VD, bias_V, *, teachers, labels_N, chunk_tokens):
    """The same with whole logits and a whole mixture, in the dtype of the student's."""
    logits = [F.linear(*(x.to(student_ND.dtype) for x in teacher)) for teacher in teachers]
    mixture = mix_logits_reference(logits, WEIGHTS[: len(teachers)], temperature=2.0, vocab_size=301)
    return distill_loss_reference(
        F.linear(student_ND, weight_VD, bias_V), F.pad(mixture, (0, 19)), labels_N,
        temperature=2.0, kd_scale=0.7, mlm_scale=0.3, vocab_size=301,
    )  # fmt: skip


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 64], ids=lambda c: f"chunk {c}")
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 3), (torch.bfloat16, 2)], ids=str)
def test_the_loss_takes_several_teachers(dtype, count, chunk_tokens):
    """Values and gradients with teachers of other widths; in bf16 two, whose mixture is rounded once as PyTorch's."""
    trained, teachers = make_heads(dtype, (24, 40, 16, 8)[: 1 + count])
    labels_N = torch.randint(301, (13,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels_N[3:] = -100
    names = ("student_ND", "weight_VD", "bias_V")
    leaves = {name: x.requires_grad_() for name, x in zip(names, trained, strict=True)}
    rest = {"teachers": teachers, "labels_N": labels_N, "chunk_tokens": chunk_tokens}
    # A number of dbias may be a sum over tokens in which nearly everything cancels.
    sizes = {"dbias_V": 13 * (0.7 * 2.0 + 0.3)}
    assert_no_worse_than_pytorch(
        lambda **x: _Ours.apply(*x.values(), rest), functools.partial(plain, **rest), leaves, sizes=sizes
    )


def test_agreement_is_with_the_top_of_the_mixture():
    """A student that is the second of two teachers agrees with them where that one's top is also the mixture's."""
    _, (first, second) = make_heads(widths=(8, 40, 24))
    rest: dict[str, Any] = {"labels_N": torch.full((13,), -100, device=DEVICE), "chunk_tokens": 5}
    logits = [F.linear(*teacher)[:, :301] for teacher in (first, second)]
    wanted = mix_logits_reference(logits, WEIGHTS[:2], temperature=2.0).argmax(1) == logits[1].argmax(1)
    assert 0 < wanted.sum() < 13
    assert fused(*second, teachers=[first, second], **rest)[3] == wanted.sum()
    assert fused(*second, teachers=[second], **rest)[3] == 13


def test_three_buffers_for_any_number_of_teachers():
    of = functools.partial(module.default_chunk_tokens, 30528, torch.bfloat16, torch.device("cuda"))
    one, two, nine = (of(total_memory=16 * 2**30, num_teachers=count) for count in (1, 2, 9))
    assert one == of(total_memory=16 * 2**30)
    assert two == nine
    assert 3 * two <= 2 * one < 3 * (two + 256)
    assert [module.num_buffers(count) for count in (1, 2, 3, 9)] == [2, 3, 3, 3]


# --- the operator


def test_registration():
    y, x = make_logits((5, 48), count=2)
    torch.library.opcheck(torch.ops.fastdistil.mix_rows.default, (y, x, 2.0, 0.25, 47))


def test_compiles_without_graph_breaks():
    logits = make_logits((5, 48), torch.bfloat16)
    mix = functools.partial(mix_logits, weights_K=WEIGHTS, temperature=2.0)
    assert torch.equal(compiled(mix)(logits), mix(logits))


def test_running_shares_give_the_weights_back():
    shares = running_shares([2.0, 1.0, 5.0])
    assert shares == pytest.approx([1 / 3, 5 / 8])
    assert running_shares([3.0]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers_KNV": []}, r"wants \(N, V\) logits of one shape, got \[\]"),
        ({"teachers_KNV": [torch.zeros(3), torch.zeros(3)]}, r"got \[\(3,\), \(3,\)\]"),
        ({"teachers_KNV": [torch.zeros(2, 3), torch.zeros(2, 4)]}, r"got \[\(2, 3\), \(2, 4\)\]"),
        ({"teachers_KNV": [torch.zeros(2, 3).double()] * 2}, "got torch.float64"),
        (
            {"teachers_KNV": [torch.zeros(2, 3), torch.zeros(2, 3).bfloat16()]},
            "one dtype on one device.*torch.bfloat16 on cpu.*: convert",
        ),
        ({"weights_K": [1.0]}, r"a weight above 0 for each of 2 teachers, got \[1.0\]"),
        ({"weights_K": [1.0, 0.0]}, r"got \[1.0, 0.0\]"),
        ({"weights_K": [1.0, float("nan")]}, "nan"),
        ({"vocab_size": 4}, r"vocab_size must be in \[1, 3\], the columns there are, got 4"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ],
    ids=str,
)
def test_errors_name_the_offender(change, message):
    good: dict[str, Any] = {"teachers_KNV": [torch.zeros(2, 3)] * 2, "weights_K": [1.0, 1.0], "temperature": 2.0}
    with pytest.raises(ValueError, match=message):
        mix_logits(**good | change)
