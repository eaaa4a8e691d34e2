"""distill_loss against its definition. CPU: TRITON_INTERPRET=1 (Triton) or unset (csrc/, else PyTorch)."""

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels.distill import distill_loss, distill_loss_reference, distill_rows_torch
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

pytestmark = [
    pytest.mark.triton,
    pytest.mark.cpp,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, of -inf in Triton's interpreter
]

# One element; below, at and across a thread's load, a lane block, the C++ block of 1,024; real vocabularies. 127 rows
# are many for the interpreter, which runs one program after the other: 4,097 would take a minute.
SHAPES = [(1, 1), (2, 7), (127, 33), (3, 1024), (2, 2049), (2, 4097), (5, 30522), (2, 30528), (1, 119547)]
OPTIONS: dict[str, Any] = {"temperature": 2.0, "kd_scale": 0.7, "mlm_scale": 0.3}


def make_leaves(shape, dtype=torch.float32, *, labelled=0.3, spread=4.0, seed=0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)
    N, V = shape
    student, teacher = (spread * torch.randn(shape, generator=gen) for _ in range(2))
    labels = torch.randint(V, (N,), generator=gen)
    labels[torch.rand(N, generator=gen) >= labelled] = -100
    return {
        "student_NV": student.to(DEVICE, dtype).requires_grad_(),
        "teacher_NV": teacher.to(DEVICE, dtype),
        "labels_N": labels.to(DEVICE),
    }


def check(leaves, *, sizes=None, **options):
    assert_no_worse_than_pytorch(
        functools.partial(distill_loss, **OPTIONS | options),
        functools.partial(distill_loss_reference, **OPTIONS | options),
        leaves,
        sizes=sizes,
    )


def sizes(num_rows: int) -> dict[str, float]:
    """A gradient is a difference of probabilities, times 1.7, and a loss a sum of logarithms of sums of about 1."""
    return {"dstudent_NV": 1.7, **dict.fromkeys(("value 0", "value 1", "value 2"), float(num_rows))}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES if INTERPRETED else [*SHAPES, (4097, 3)], ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype):
    # Of one column PyTorch's loss is 0 exactly, and the Triton kernel's but for rounding.
    of_one_column = shape[1] == 1 and (INTERPRETED or DEVICE == "cuda")
    check(make_leaves(shape, dtype), sizes=sizes(shape[0]) if of_one_column else None)


@each_dtype
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 8.0])
def test_temperatures(temperature, dtype):
    check(make_leaves((9, 1500), dtype), temperature=temperature)


@for_any(
    lambda st: {
        "shape": st.tuples(st.integers(1, 9), st.integers(1, 2100)),
        "dtype": st.sampled_from(DTYPES),
        "strides": st.sampled_from(["padded rows", "misaligned", "transposed"]),
        "seed": st.integers(0, 10),
    }
)
def test_any_shape_and_strides(shape, dtype, strides, seed):
    N, V = shape
    leaves = make_leaves(shape, dtype, seed=seed)
    for name in ("student_NV", "teacher_NV"):
        contiguous = leaves[name].detach()
        if strides == "padded rows":
            strided = contiguous.new_zeros(N, V + 5)[:, :V]
        elif strides == "misaligned":
            strided = contiguous.new_zeros(N * V + 1)[1:].view(N, V)
        else:
            strided = contiguous.new_zeros(V, N).t()
        leaves[name] = strided.copy_(contiguous).requires_grad_(leaves[name].requires_grad)
    check(leaves, sizes=sizes(N))


@pytest.mark.parametrize("labelled", [0.0, 1.0], ids=["none masked", "all masked"])
@pytest.mark.parametrize(("kd_scale", "mlm_scale"), [(1.0, 0.0), (0.0, 1.0), (5.0, 2.0)])
def test_scales_and_labels(kd_scale, mlm_scale, labelled):
    check(make_leaves((9, 700), labelled=labelled), kd_scale=kd_scale, mlm_scale=mlm_scale)


def test_scales_may_be_tensors():
    """On the device, where a recorded step finds other ones each time: the same bits as of the numbers."""
    leaves = make_leaves((9, 700))
    expected = results(functools.partial(distill_loss, **OPTIONS), leaves)
    kd_scale, mlm_scale = scales()
    for changed in ({"kd_scale": kd_scale, "mlm_scale": mlm_scale}, {"kd_scale": kd_scale}):
        got = results(functools.partial(distill_loss, **OPTIONS | changed), leaves)
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_is_the_objective_of_the_authors():
    """Trap 1 and 2: batchmean over rows times T^2, and cross-entropy at temperature 1."""
    leaves = make_leaves((6, 50), labelled=1.0)
    student, teacher, labels = leaves.values()
    kd = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean") * 9
    mlm = F.cross_entropy(student, labels)
    got = distill_loss(**leaves, temperature=3.0, kd_scale=5 / 6, mlm_scale=2 / 6)
    torch.testing.assert_close(got.loss, 5 * kd + 2 * mlm)
    torch.testing.assert_close((got.kd_sum / 6, got.mlm_sum / 6), (kd.detach(), mlm.detach()))


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identical_rows_cost_exactly_nothing(temperature, dtype):
    leaves = make_leaves((5, 3001), dtype, spread=8.0)
    leaves["teacher_NV"] = leaves["student_NV"].detach().clone()
    got = results(functools.partial(distill_loss, temperature=temperature, kd_scale=1.0, mlm_scale=0.0), leaves)
    assert got["value 1"] == 0
    assert (got["dstudent_NV"] == 0).all()
    assert got["value 3"] == 5  # all agree


def test_kl_is_never_negative():
    leaves = make_leaves((10 if INTERPRETED else 50, 500))
    student = leaves["student_NV"].detach()
    for distance in (1e-7, 1e-6, 1e-4, 1e-2):
        teacher = student + distance * torch.randn_like(student)
        rows = kernel_rows(student, teacher, leaves["labels_N"])
        assert (rows[0] >= 0).all()


def kernel_rows(student, teacher, labels, *, num_rows=None, dstudent=None, vocab_size=None):
    return torch.ops.fastdistil.distill_rows(
        student, teacher, labels, num_rows, dstudent, 0, 2.0, scales(), vocab_size or student.shape[1]
    )


def scales() -> torch.Tensor:
    return torch.tensor([OPTIONS["kd_scale"], OPTIONS["mlm_scale"]], device=DEVICE)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_extreme_logits(temperature):
    leaves = make_leaves((6, 1000), labelled=0.5)
    leaves["student_NV"] = leaves["student_NV"].detach().sign().mul_(1e4).requires_grad_()
    leaves["teacher_NV"] = leaves["teacher_NV"].sign() * -1e4
    check(leaves, temperature=temperature)
    check(leaves | {"teacher_NV": torch.full_like(leaves["teacher_NV"], 1e4)}, temperature=temperature)


@pytest.mark.parametrize("student", [-400, -90, -87, 0, 87, 90, 400])
@pytest.mark.parametrize("teacher", [-180, 0, 85])
def test_logits_far_from_0(student, teacher):
    """Around 88.7 at temperature 2 fp32 no longer holds the sum of powers of some rows."""
    leaves = make_leaves((6, 600), labelled=0.5, spread=2.0)
    with torch.no_grad():
        leaves["student_NV"] += student
        leaves["teacher_NV"] += teacher
        leaves["student_NV"][1, 1:] -= 200
    check(leaves, sizes=sizes(6))


@pytest.mark.parametrize("broken", ["student_NV", "teacher_NV"])
def test_a_nan_logit_shows(broken):
    leaves = make_leaves((3, 700))
    with torch.no_grad():
        leaves[broken][1, 600] = float("nan")
    assert distill_loss(**leaves, **OPTIONS).loss.isnan()


def never_said(shape) -> torch.Tensor:
    """Columns of rows: one; the first block and more; all from a block's border on; every second one."""
    never = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    never[0, 7] = never[1, :1100] = never[2, 1024:] = never[3, ::2] = True
    return never


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_logit_of_minus_infinity_is_a_probability_of_0(temperature, dtype):
    """Of the teacher alone: the student pays nothing for that column itself, and learns to leave it."""
    leaves = make_leaves((5, 2100), dtype, labelled=0.5)
    leaves["teacher_NV"].masked_fill_(never_said((5, 2100)), -torch.inf)
    check(leaves, temperature=temperature)
    got = results(functools.partial(distill_loss, **OPTIONS), leaves)
    assert all(x.isfinite().all() for x in got.values())


@each_dtype
def test_a_column_that_neither_model_says_is_as_if_it_were_not_there(dtype):
    never = never_said((5, 2100))
    labels = torch.tensor([8, -100, 3, 1, 2099], device=DEVICE)
    leaves = make_leaves((5, 2100), dtype) | {"labels_N": labels}
    with torch.no_grad():
        for name in ("student_NV", "teacher_NV"):
            leaves[name].masked_fill_(never, -torch.inf)
    check(leaves)
    got = results(functools.partial(distill_loss, **OPTIONS), leaves)
    assert (got["dstudent_NV"][never] == 0).all()
    for row in range(4):
        left = ~never[row]
        alone = {name: leaves[name].detach()[row : row + 1, left] for name in ("student_NV", "teacher_NV")}
        label = labels[row : row + 1] - never[row, : labels[row].clamp(min=0)].sum()
        expected = distill_loss(**alone, labels_N=label, **OPTIONS)
        ours = distill_loss(**{name: x.detach()[row : row + 1] for name, x in leaves.items()}, **OPTIONS)
        torch.testing.assert_close(tuple(ours), tuple(expected), rtol=2e-6, atol=2e-6)


@of_the_definition
def test_plain_pytorch_gives_the_same_where_the_kernels_are_not_built():
    student, teacher, labels = (x.detach() for x in make_leaves((5, 2100), labelled=0.5).values())
    teacher.masked_fill_(never_said((5, 2100)), -torch.inf)
    teacher[4] = -torch.inf
    gradients = torch.empty_like(student), torch.empty_like(student)
    expected = kernel_rows(student, teacher, labels, dstudent=gradients[0])
    got = distill_rows_torch(student, teacher, labels, None, gradients[1], 0, 2.0, scales(), 2100)
    torch.testing.assert_close(got[:, :4], expected[:, :4])
    assert got[0, 4].isnan()
    assert expected[0, 4].isnan()
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_what_the_student_never_says_and_the_teacher_may_costs_infinity():
    leaves = make_leaves((2, 1030), labelled=0.0)
    with torch.no_grad():
        leaves["student_NV"][0, 5] = -torch.inf
    got = results(functools.partial(distill_loss, **OPTIONS), leaves)
    assert got["value 1"] == torch.inf
    (expected,) = torch.autograd.grad(distill_loss_reference(**leaves, **OPTIONS).loss, leaves["student_NV"])
    torch.testing.assert_close(got["dstudent_NV"].float(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [16, 700, 1024], ids=str)
@pytest.mark.parametrize("broken", ["student_NV", "teacher_NV"])
def test_a_row_of_nothing_but_minus_infinity_shows(broken, width):
    """It is an error of the input: NaN in its loss and in its gradient, and in no other row."""
    leaves = make_leaves((3, width), labelled=0.0)
    with torch.no_grad():
        leaves[broken][1] = -torch.inf
    got = results(functools.partial(distill_loss, **OPTIONS), leaves)
    assert got["value 0"].isnan()
    assert got["dstudent_NV"][1].isnan().all()
    assert got["dstudent_NV"][[0, 2]].isfinite().all()


def test_gradient_is_written_over_the_logits():
    student, teacher, labels = (x.detach() for x in make_leaves((4, 1030), torch.bfloat16).values())
    apart = torch.full_like(student, 7.0)
    rows = kernel_rows(student, teacher, labels, dstudent=apart)
    in_place = student.clone()
    torch.testing.assert_close(rows, kernel_rows(in_place, teacher, labels, dstudent=in_place), rtol=0, atol=0)
    torch.testing.assert_close(in_place, apart, rtol=0, atol=0)
    values_only = kernel_rows(student, teacher, labels)
    torch.testing.assert_close(rows, values_only, rtol=0, atol=0)


@pytest.mark.parametrize("rubbish", [1e4, float("inf"), float("nan")])
def test_padding_counts_for_nothing(rubbish):
    """Trap 9: padded columns, and rows from num_rows on, whatever is in them."""
    leaves = make_leaves((5, 1024))
    clean = make_leaves((5, 1024))
    with torch.no_grad():
        for name in ("student_NV", "teacher_NV"):
            leaves[name][:, 1000:] = rubbish
            leaves[name][3:] = rubbish
    leaves["labels_N"] = torch.tensor([1, 999, -100, 5, 2000], device=DEVICE)
    clean["labels_N"] = leaves["labels_N"]
    for dtype in (torch.int32, torch.int64):
        num_rows = torch.tensor(3, dtype=dtype, device=DEVICE)
        options = OPTIONS | {"vocab_size": 1000, "num_rows": num_rows}
        got = results(functools.partial(distill_loss, **options), leaves)
        assert (got["dstudent_NV"][:, 1000:] == 0).all()
        assert (got["dstudent_NV"][3:] == 0).all()
        for name, value in results(functools.partial(distill_loss, **options), clean).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        check(clean, vocab_size=1000, num_rows=num_rows)


def test_agreement_counts_a_shared_largest_column():
    student = torch.tensor([[1.0, 2.0, 0.0], [3.0, 3.0, 0.0], [0.0, 1.0, 2.0]], device=DEVICE)
    teacher = torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 0.0], [2.0, 1.0, 0.0]], device=DEVICE)
    labels = torch.full((3,), -100, device=DEVICE)
    for loss in (distill_loss, distill_loss_reference):
        assert loss(student, teacher, labels, **OPTIONS).num_agree == 2


def test_upstream_gradient_scales_and_metrics_have_none():
    leaves = make_leaves((3, 40))
    got = distill_loss(**leaves, **OPTIONS)
    assert [value.requires_grad for value in got] == [True, False, False, False]
    (once,) = torch.autograd.grad(got.loss, leaves["student_NV"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * got.loss, leaves["student_NV"])
    torch.testing.assert_close(thrice, 3 * once)


def test_without_gradient_the_logits_stay_and_values_are_the_same():
    leaves = make_leaves((3, 40))
    before = leaves["student_NV"].detach().clone()
    with torch.no_grad():
        quiet = distill_loss(**leaves, **OPTIONS)
    loud = distill_loss(**leaves, **OPTIONS)
    assert not quiet.loss.requires_grad
    assert torch.equal(leaves["student_NV"], before)
    torch.testing.assert_close(tuple(quiet), tuple(loud), rtol=0, atol=0)


def test_rows_beyond_2_to_the_31_elements():
    """The third row starts at element 2^31: address space is allocated, memory is only for the rows touched."""
    V, stride = 40, 2**30
    student, teacher, labels = (x.detach() for x in make_leaves((3, V), torch.bfloat16).values())
    far = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=DEVICE).as_strided((3, V), (stride, 1))
    # A kernel is compiled for strides that are multiples of 16, or are not, and sums in another order then.
    near = torch.empty(3, 48, dtype=torch.bfloat16, device=DEVICE)[:, :V]
    far.copy_(student)
    near.copy_(student)
    rows = kernel_rows(near, teacher, labels, dstudent=near)
    torch.testing.assert_close(kernel_rows(far, teacher, labels, dstudent=far), rows, rtol=0, atol=0)
    torch.testing.assert_close(far, near, rtol=0, atol=0, check_stride=False)


def test_registration():
    student, teacher, labels = (x.detach() for x in make_leaves((3, 50)).values())
    num_rows = torch.tensor(2, device=DEVICE)
    for rows, gradient in ((None, torch.empty_like(student)), (num_rows, None)):
        torch.library.opcheck(
            torch.ops.fastdistil.distill_rows.default, (student, teacher, labels, rows, gradient, 0, 2.0, scales(), 48)
        )
    for needs_grad in (True, False):
        leaf = student.clone().requires_grad_(needs_grad)
        for rows in ((None, num_rows), (torch.arange(len(labels), device=DEVICE) % 2 == 0, None)):
            torch.library.opcheck(
                torch.ops.fastdistil.distill.default,
                (leaf, teacher, labels, *rows, torch.tensor(2.0), 0.0, scales(), 48, needs_grad),
            )


def test_compiles_without_graph_breaks():
    leaves = make_leaves((3, 50))
    loss = functools.partial(distill_loss, **OPTIONS, num_rows=torch.tensor(2, device=DEVICE))
    got = results(compiled(lambda **leaves: tuple(loss(**leaves))), leaves)
    for name, value in results(loss, leaves).items():
        torch.testing.assert_close(got[name], value)


def test_a_temperature_that_is_a_number_is_no_tensor_of_the_graph():
    """Inductor would build a C++ kernel for it where everything else is on a GPU: with a cold compiler, a minute."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, _examples):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(functools.partial(distill_loss, **OPTIONS), backend=keep, fullgraph=True)
    loss(**make_leaves((3, 50)))
    made = [node.kwargs.get("device") for graph in graphs for node in graph.graph.nodes if node.target is torch.full]
    assert made  # of the scales
    assert {torch.device(device).type for device in made} == {torch.device(DEVICE).type}
    assert torch.float64 not in [n.kwargs.get("dtype") for graph in graphs for n in graph.graph.nodes]


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([2, -100, 0])
    assert torch.autograd.gradcheck(lambda x: distill_loss_reference(x, teacher, labels, **OPTIONS).loss, student)


def test_label_outside_the_vocabulary():
    leaves = make_leaves((2, 50)) | {"labels_N": torch.tensor([-100, 48], device=DEVICE)}
    if DEVICE == "cuda" or INTERPRETED:
        assert distill_loss(**leaves, **OPTIONS, vocab_size=48).loss.isnan()
    else:
        with pytest.raises(IndexError, match="48"):
            distill_loss(**leaves, **OPTIONS, vocab_size=48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_NV": torch.zeros(2, 4)}, r"student \(2, 3\) and teacher \(2, 4\)"),
        ({"student_NV": torch.zeros(0, 3), "teacher_NV": torch.zeros(0, 3)}, "at least one row"),
        ({"teacher_NV": torch.zeros(2, 3).half()}, r"student torch.float32 and teacher torch.float16"),
        ({"student_NV": torch.zeros(2, 3).double()}, "got torch.float64"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, r"shape \(2,\), got torch.int64 of shape \(3,\)"),
        ({"labels_N": torch.zeros(2, dtype=torch.int32)}, "got torch.int32"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"vocab_size": 4}, "vocab_size 4 is more than the 3 columns"),
        ({"vocab_size": 0}, "vocab_size must be 1 or more"),
        ({"num_rows": torch.zeros(1, dtype=torch.int32)}, "0-dim int32 or int64"),
        ({"labels_N": torch.zeros(2, dtype=torch.int64, device="meta")}, "got labels on meta"),
        ({"kd_scale": torch.ones(1)}, r"kd_scale as a float or a 0-dim tensor on cpu, got one of shape \(1,\) on cpu"),
        ({"mlm_scale": torch.ones((), device="meta")}, "mlm_scale .* on cpu, got one of .* on meta"),
    ],
)
def test_errors_name_the_offender(change, message):
    arguments: dict[str, Any] = {
        "student_NV": torch.zeros(2, 3),
        "teacher_NV": torch.zeros(2, 3),
        "labels_N": torch.zeros(2, dtype=torch.int64),
        **OPTIONS,
    }
    with pytest.raises(ValueError, match=message):
        distill_loss(**arguments | change)
