"""cosine_loss against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (csrc/, else PyTorch)."""

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels import cosine as module
from fastdistil.kernels.cosine import cosine_loss, cosine_loss_reference
from tests.support.precision import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_no_worse_than_pytorch,
    compiled,
    each_dtype,
    of_the_definition,
    results,
)
from tests.support.properties import for_any

pytestmark = [pytest.mark.triton, pytest.mark.cpp]

SHAPES = [(1, 2), (5, 31), (3, 384), (127, 65), (2, 768), (3, 769), (1, 8192)]  # rows per CTA: 2,048 to 1


def make_leaves(shape, dtype=torch.float32, seed=0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=gen) for _ in range(2))
    return {"student_ND": student.to(DEVICE, dtype).requires_grad_(), "teacher_ND": teacher.to(DEVICE, dtype)}


def check(leaves, *, scale: float | torch.Tensor = 1.0, **options):
    """A gradient is a difference of two vectors, both no longer than t / (|s| |t|), which a GPU may round apart."""
    student, teacher = (x.detach().double() for x in leaves.values())
    squares = [x.square().sum(1, keepdim=True) + 1e-12 for x in (student, teacher)]
    size = (teacher / (squares[0] * squares[1]).sqrt()).abs().max().item() * float(scale)
    ours, reference = (functools.partial(f, scale=scale, **options) for f in (cosine_loss, cosine_loss_reference))
    assert_no_worse_than_pytorch(ours, reference, leaves, sizes={"dstudent_ND": size} if DEVICE == "cuda" else None)


@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (4097, 20)], ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype):
    check(make_leaves(shape, dtype))


@for_any(
    lambda st: {
        "shape": st.tuples(st.integers(8, 40), st.integers(8, 300)),
        "dtype": st.sampled_from(DTYPES),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 10),
    }
)
def test_any_shape_and_strides(shape, dtype, contiguous, seed):
    leaves = make_leaves(shape if contiguous else shape[::-1], dtype, seed)
    if not contiguous:
        leaves = {name: x.detach().t().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    check(leaves)


@each_dtype
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_the_gradient_is_scaled_before_it_is_rounded(as_tensor, dtype):
    scale = 1 / 3
    check(make_leaves((5, 300), dtype), scale=torch.tensor(scale, device=DEVICE) if as_tensor else scale)
    leaves = make_leaves((5, 300), dtype)
    plain, scaled = (results(functools.partial(cosine_loss, scale=s), leaves) for s in (1.0, scale))
    assert scaled["value 1"] == plain["value 1"]
    assert abs(scaled["value 0"] - plain["value 1"] / 3) <= 2.0**-23 * plain["value 1"]
    student, teacher = (leaf.detach() for leaf in leaves.values())
    total, gradient = module.forward(student, teacher, None, torch.tensor(scale, device=DEVICE))
    assert total == plain["value 1"]
    assert torch.equal(gradient.double(), scaled["dstudent_ND"])


@pytest.mark.parametrize("upstream", [1.0, 1 / 3], ids=["1", "a third"])
def test_a_gradient_from_above_is_not_rounded(upstream):
    leaves = make_leaves((5, 300), torch.bfloat16)
    (once,) = torch.autograd.grad(cosine_loss(**leaves).loss, leaves["student_ND"])
    (scaled,) = torch.autograd.grad(cosine_loss(**leaves).loss * upstream, leaves["student_ND"])
    assert torch.equal(scaled, (once.float() * upstream).bfloat16())


def test_parallel_vectors_cost_nothing():
    """The two terms of the gradient cancel, to the rounding of either: PyTorch's own error is no measure here."""
    for shape in ((3, 1), (3, 500)):
        student = make_leaves(shape)["student_ND"]
        leaves = {"student_ND": student, "teacher_ND": 2.5 * student.detach()}
        got = results(cosine_loss, leaves)
        assert (got["value 0"] - results(cosine_loss_reference, leaves)["value 0"]).abs() < 1e-6
        scale = 1 / student.detach().double().norm(dim=1, keepdim=True)
        assert (got["dstudent_ND"].abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-6])
@pytest.mark.parametrize("small", [("student_ND",), ("teacher_ND",), ("student_ND", "teacher_ND")], ids="+".join)
def test_zero_and_tiny_vectors_give_what_pytorch_gives(small, scale, dtype):
    """cosine_embedding_loss, in fp64: cosine 0, and for a student of zeros a gradient of a million times the teacher's
    direction, which its eps of 1e-12 makes."""
    leaves = make_leaves((3, 40), dtype)
    with torch.no_grad():
        for name in small:
            leaves[name][1] *= scale
    check(leaves)
    student, teacher = (x.detach().double() for x in leaves.values())
    expected = F.cosine_embedding_loss(
        student.requires_grad_(), teacher, torch.ones(3, device=DEVICE), reduction="none"
    )
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    got = results(cosine_loss, leaves)
    torch.testing.assert_close(got["value 0"], expected.sum(), rtol=1e-6, atol=1e-6)
    precision = 2 * torch.finfo(dtype).eps if not INTERPRETED else 4 * torch.finfo(dtype).eps  # it truncates
    size = gradient.detach().norm(dim=1, keepdim=True)
    assert ((got["dstudent_ND"] - gradient).abs() <= precision * size + 1e-30).all()


def test_a_teacher_in_another_precision():
    """bf16 under an fp32 student loses nothing more; fp32 over a bf16 student is rounded to bf16."""
    exact, half = make_leaves((5, 40)), make_leaves((5, 40), torch.bfloat16)
    check(exact | {"teacher_ND": half["teacher_ND"]})
    got = results(cosine_loss, half | {"teacher_ND": exact["teacher_ND"]})
    assert all(torch.equal(got[k], v) for k, v in results(cosine_loss, half).items())


def test_rows_from_num_rows_on_count_for_nothing():
    leaves, clean = make_leaves((5, 40)), make_leaves((5, 40))
    with torch.no_grad():
        leaves["student_ND"][3:] = float("nan")
    for dtype in (torch.int32, torch.int64):
        options = {"num_rows": torch.tensor(3, dtype=dtype, device=DEVICE)}
        got = results(functools.partial(cosine_loss, **options), leaves)
        assert (got["dstudent_ND"][3:] == 0).all()
        check(clean, **options)
        for name, value in results(functools.partial(cosine_loss, **options), clean).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_mapped_layers_with_a_projection():
    """Opt-in use: several layers summed, a trained linear where widths differ."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(24, 40, device=DEVICE)
    students = [torch.randn(6, 24, device=DEVICE, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(6, 40, device=DEVICE) for _ in range(2)]
    leaves = [*students, *projection.parameters()]

    def gradients(loss):
        total = torch.stack([loss(projection(s), t).loss for s, t in zip(students, teachers, strict=True)])
        return torch.autograd.grad(total.sum(), leaves)

    torch.testing.assert_close(gradients(cosine_loss), gradients(cosine_loss_reference))


def test_registration():
    leaves = make_leaves((3, 50))
    values = [leaf.detach() for leaf in leaves.values()]
    scale = torch.tensor(0.3, device=DEVICE)
    for num_rows, factor in ((None, scale), (torch.tensor(2, device=DEVICE), None)):
        torch.library.opcheck(torch.ops.fastdistil.cosine_rows.default, (*values, num_rows, factor))
        torch.library.opcheck(torch.ops.fastdistil.cosine.default, (*leaves.values(), None, num_rows, scale))
    mask = torch.arange(len(leaves["student_ND"]), device=DEVICE) % 2 == 0
    torch.library.opcheck(torch.ops.fastdistil.cosine.default, (*leaves.values(), mask, None, scale))


def test_compiles_without_graph_breaks():
    leaves = make_leaves((3, 50))
    got = results(compiled(lambda **leaves: tuple(cosine_loss(**leaves, scale=0.3))), leaves)
    for name, value in results(functools.partial(cosine_loss, scale=0.3), leaves).items():
        torch.testing.assert_close(got[name], value)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cosine_loss_reference(x, teacher).loss, student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_ND": torch.zeros(2, 4)}, r"\(2, 3\) and teacher \(2, 4\): where widths"),
        ({"student_ND": torch.zeros(2, 3).double()}, "got torch.float64"),
        ({name: torch.zeros(2, 8193) for name in ("student_ND", "teacher_ND")}, "a width of 1 to 8192, got 8193"),
        ({"num_rows": torch.tensor(1.0)}, "got torch.float32"),
        ({"scale": torch.ones(2)}, r"wants scale as a float or a 0-dim tensor on cpu, got one of shape \(2,\) on cpu"),
    ],
)
def test_errors_name_the_offender(change, message):
    with pytest.raises(ValueError, match=message):
        cosine_loss(**{"student_ND": torch.zeros(2, 3), "teacher_ND": torch.zeros(2, 3)} | change)
