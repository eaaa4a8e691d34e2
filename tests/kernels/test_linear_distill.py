"""linear_distill_loss against two linears and the plain loss.

CPU: TRITON_INTERPRET=1 (Triton) or unset (csrc/, else PyTorch).
"""

import functools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastdistil.kernels import linear_distill as module
from fastdistil.kernels.linear_distill import default_chunk_tokens, linear_distill_loss, linear_distill_loss_reference
from tests.support.precision import DEVICE, assert_no_worse_than_pytorch, compiled, each_dtype, results
from tests.support.properties import for_any

pytestmark = [
    pytest.mark.triton,
    pytest.mark.cpp,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, of -inf in Triton's interpreter
]

V, VOCAB = 320, 301  # padded and real vocabulary
OPTIONS: dict[str, Any] = {"temperature": 2.0, "kd_scale": 0.7, "mlm_scale": 0.3, "vocab_size": VOCAB}
TRAINED = ("student_ND", "student_weight_VD", "student_bias_V")


def make_leaves(num_tokens=13, dtype=torch.float32, *, widths=(24, 40), num_columns=V, seed=0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (1.5 * torch.randn(*shape, generator=gen) / shape[-1] ** 0.25).to(DEVICE, dtype)

    leaves: dict[str, Any] = {}
    for model, width in zip(("student", "teacher"), widths, strict=True):
        axis = "D" if model == "student" else "E"
        leaves[f"{model}_ND"] = normal(num_tokens, width)
        leaves[f"{model}_weight_V{axis}"] = normal(num_columns, width)
        leaves[f"{model}_bias_V"] = normal(num_columns)
    for name in TRAINED:
        leaves[name].requires_grad_()
    labels = torch.randint(min(VOCAB, num_columns), (num_tokens,), generator=gen)
    labels[torch.rand(num_tokens, generator=gen) > 0.3] = -100
    return leaves | {"labels_N": labels.to(DEVICE)}


def ours(**options):
    return functools.partial(linear_distill_loss, **OPTIONS | options)


def check(leaves, *, chunk_tokens=None, sizes=None, **options):
    reference = functools.partial(linear_distill_loss_reference, **OPTIONS | options)
    assert_no_worse_than_pytorch(ours(chunk_tokens=chunk_tokens, **options), reference, leaves, sizes=sizes)


ANOTHER_ORDER: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if DEVICE == "cuda" else {}
"""Of fp32 numbers that a GPU adds in another order; on a CPU the bounds of fp64 hold."""


def assert_same(got, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@each_dtype
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 64], ids=lambda c: f"chunk {c}")
def test_no_worse_than_twice_pytorch(chunk_tokens, dtype):
    """One token a chunk; chunks that do not divide the tokens; exactly one; more than there are."""
    check(make_leaves(dtype=dtype), chunk_tokens=chunk_tokens)


@each_dtype
def test_a_bias_of_minus_infinity_is_a_token_that_is_never_said(dtype):
    """Of the teacher alone, and of both models: nothing is NaN, in the loss or in any gradient."""
    leaves = make_leaves(dtype=dtype)
    with torch.no_grad():
        leaves["teacher_bias_V"][3:7] = leaves["student_bias_V"][5] = -torch.inf
    leaves["labels_N"].masked_fill_(leaves["labels_N"] == 5, -100)
    check(leaves, chunk_tokens=5)
    got = results(ours(chunk_tokens=5), leaves)
    assert all(x.isfinite().all() for x in got.values())
    assert got["dstudent_bias_V"][5] == 0
    assert (got["dstudent_bias_V"][3:5] > 0).all()  # the student is to leave what the teacher never says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_vocabulary_in_default_chunks(dtype):
    leaves = make_leaves(20, dtype, widths=(64, 32), num_columns=30528)
    check(leaves, vocab_size=30522)


@for_any(
    lambda st: {
        "num_tokens": st.integers(1, 30),
        "widths": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "num_columns": st.integers(1, 200),
        "chunk_tokens": st.integers(1, 40),
        "data": st.data(),
    }
)
def test_any_shape(num_tokens, widths, num_columns, chunk_tokens, data):
    """A number of dbias may be a small sum over tokens: of few columns, of probabilities of nearly 1 or 0."""
    import hypothesis.strategies as st

    leaves = make_leaves(num_tokens, widths=widths, num_columns=num_columns)
    vocab_size = data.draw(st.integers(1, num_columns))
    leaves["labels_N"].clamp_(max=vocab_size - 1)
    # A logit's gradient is a difference of probabilities, times these; a loss a sum of logarithms of sums of about 1.
    slope = OPTIONS["kd_scale"] * OPTIONS["temperature"] + OPTIONS["mlm_scale"]
    largest = {name: leaves[name].detach().abs().max().item() for name in ("student_ND", "student_weight_VD")}
    sizes = {
        "dstudent_ND": slope * largest["student_weight_VD"],
        "dstudent_weight_VD": num_tokens * slope * largest["student_ND"],
        "dstudent_bias_V": num_tokens * slope,
        **dict.fromkeys(("value 0", "value 1", "value 2"), num_tokens),
    }
    check(leaves, chunk_tokens=chunk_tokens, vocab_size=vocab_size, sizes=sizes)


@pytest.mark.parametrize("num_rows", [0, 4, 5, 7, 13])
def test_trailing_pad_rows_and_padded_vocabulary_get_zero_gradient(num_rows):
    leaves = make_leaves()
    options = {"num_rows": torch.tensor(num_rows, dtype=torch.int32, device=DEVICE)}
    check(leaves, chunk_tokens=5, **options)
    got = results(ours(chunk_tokens=5, **options), leaves)
    assert (got["dstudent_ND"][num_rows:] == 0).all()
    assert (got["dstudent_weight_VD"][VOCAB:] == 0).all()
    assert (got["dstudent_bias_V"][VOCAB:] == 0).all()


def test_weights_may_have_a_dtype_of_their_own():
    """fp32 master weights under bf16 hidden states: bf16 GEMMs, and fp32 gradients that no rounding touched."""
    leaves = make_leaves(dtype=torch.bfloat16)
    mixed = leaves | {name: leaves[name].detach().float().requires_grad_() for name in TRAINED[1:]}
    bf16, fp32 = results(ours(), leaves), results(ours(), mixed)
    assert torch.autograd.grad(ours()(**mixed).loss, mixed["student_bias_V"])[0].dtype == torch.float32
    assert_same({k: v.bfloat16() for k, v in fp32.items()}, {k: v.bfloat16() for k, v in bf16.items()})
    teacher_in_fp32 = leaves | {k: v.float() for k, v in leaves.items() if k.startswith("teacher")}
    assert_same(results(ours(), teacher_in_fp32), bf16, rtol=0.05, atol=0.02)


def test_a_bf16_teacher_under_an_fp32_student():
    leaves = make_leaves()
    mixed = leaves | {k: v.bfloat16() for k, v in leaves.items() if k.startswith("teacher")}
    check(mixed, chunk_tokens=5)
    assert {v.dtype for v in ours()(**mixed)} == {torch.float32}


def test_autocast():
    leaves = make_leaves()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under_autocast = results(ours(), leaves)
    half = leaves | {
        name: leaves[name].detach().bfloat16().requires_grad_(name in TRAINED)
        for name in leaves
        if name.endswith("_ND")
    }
    assert_same(under_autocast, results(ours(), half))


def test_accumulates_over_micro_batches():
    """The sum over micro-batches is the loss of them all: scales carry the global denominators."""
    whole = make_leaves(12)
    expected = results(ours(), whole)
    for name in TRAINED:
        whole[name].grad = None
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        of_tokens = {k: v[part] for k, v in whole.items() if k.endswith("N") or k.endswith("_ND")}
        ours()(**whole | of_tokens).loss.backward()
    got = {f"d{name}": whole[name].grad.double() for name in TRAINED}
    assert_same(got, {name: expected[name] for name in got}, **ANOTHER_ORDER)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    leaves = make_leaves()

    def checkpointed(**leaves):
        run = lambda *values: tuple(ours()(**dict(zip(leaves, values, strict=True))))  # noqa: E731
        return checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)

    if use_reentrant:  # it calls backward inside, so autograd.grad is refused
        checkpointed(**leaves)[0].backward()
        got = {f"d{name}": leaves[name].grad.double() for name in TRAINED}
    else:
        got = results(checkpointed, leaves)
    expected = results(ours(), leaves)
    assert_same(got, {k: v for k, v in expected.items() if k in got}, rtol=0, atol=0)


def test_tied_weight_gets_both_gradients():
    """Trap 10: the decoder is the embedding; autograd adds what each use gives."""
    leaves = make_leaves(num_columns=V)
    weight, ids = leaves["student_weight_VD"], torch.arange(13, device=DEVICE)
    expected = results(ours(), leaves)
    through_hidden = expected["dstudent_ND"]
    tied = leaves | {"student_ND": weight[ids]}
    loss = ours()(**tied).loss
    (both,) = torch.autograd.grad(loss, weight)
    apart = results(ours(), leaves | {"student_ND": weight[ids].detach().requires_grad_()})
    through_hidden = torch.zeros_like(both).index_add_(0, ids, apart["dstudent_ND"].float())
    wanted = apart["dstudent_weight_VD"] + through_hidden
    torch.testing.assert_close(both.double(), wanted, **ANOTHER_ORDER)


def test_without_gradient_only_the_values():
    leaves = make_leaves()
    loud = ours()(**leaves)
    with torch.no_grad():
        quiet = ours()(**leaves)
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(tuple(quiet), tuple(loud), rtol=0, atol=0)
    (once,) = torch.autograd.grad(loud.loss, leaves["student_ND"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loud.loss, leaves["student_ND"])
    torch.testing.assert_close(thrice, 3 * once)


def test_registration():
    leaves = make_leaves(5)
    for needs_grad in (True, False):
        values = [v.detach().requires_grad_(needs_grad and k in TRAINED) for k, v in leaves.items()]
        for rows in ((None, torch.tensor(4, device=DEVICE)), (torch.arange(5, device=DEVICE) % 2 == 0, None)):
            torch.library.opcheck(
                torch.ops.fastdistil.linear_distill.default,
                (*values, *rows, None, 2.0, torch.ones(2, device=DEVICE), VOCAB, 3, needs_grad),
            )


def raw(leaves, *, dtype, accumulate=False, chunk_tokens=5, fill=0.0) -> dict[str, torch.Tensor]:
    """linear_distill.forward with destinations of `dtype`, which hold `fill` before."""
    dweight, dbias = (torch.full_like(leaves[name].detach(), fill, dtype=dtype) for name in TRAINED[1:])
    scales = torch.tensor([OPTIONS["kd_scale"], OPTIONS["mlm_scale"]], device=DEVICE)
    num_rows = torch.tensor(11, device=DEVICE)
    arguments: list[Any] = [value.detach() for value in leaves.values()]
    arguments += [num_rows, OPTIONS["temperature"], scales, VOCAB, chunk_tokens]
    loss, _, dstudent = module.forward(*arguments, dweight=dweight, dbias=dbias, accumulate=accumulate)
    assert dstudent is not None
    return {"value 0": loss} | dict(zip((f"d{name}" for name in TRAINED), (dstudent, dweight, dbias), strict=True))


@pytest.mark.parametrize("chunk_tokens", [5, 13], ids=lambda c: f"chunk {c}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_the_operator_the_gradients_go_where_they_are_wanted(dtype, chunk_tokens):
    leaves = make_leaves(dtype=torch.bfloat16)
    num_rows = torch.tensor(11, device=DEVICE)
    mixed = leaves | {name: leaves[name].detach().to(dtype).requires_grad_() for name in TRAINED[1:]}
    expected = results(ours(num_rows=num_rows, chunk_tokens=chunk_tokens), mixed)
    # What was there is of no account.
    got = raw(leaves, dtype=dtype, chunk_tokens=chunk_tokens, fill=float("nan"))
    assert_same({k: v.double() for k, v in got.items()}, {k: expected[k] for k in got}, rtol=0, atol=0)
    added = raw(leaves, dtype=dtype, chunk_tokens=chunk_tokens, accumulate=True, fill=0.5)
    for name in ("dstudent_weight_VD", "dstudent_bias_V"):
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(added[name], got[name] + 0.5, rtol=tolerance, atol=tolerance)


def test_compiles_without_graph_breaks():
    leaves = make_leaves()
    num_rows = torch.tensor(9, device=DEVICE)
    got = results(compiled(lambda **leaves: tuple(ours(num_rows=num_rows)(**leaves))), leaves)
    assert_same(got, results(ours(num_rows=num_rows), leaves))


@pytest.mark.parametrize(("device", "memory"), [(DEVICE, None), ("cuda", 79 * 2**30)], ids=["here", "an H100"])
def test_default_chunk_depends_on_shapes_and_device_only(device, memory):
    of = functools.partial(default_chunk_tokens, device=torch.device(device), total_memory=memory)
    chunks = [of(columns, torch.bfloat16) for columns in (320, 30528, 10**8)]
    assert chunks == sorted(chunks, reverse=True)
    assert all(chunk % 256 == 0 for chunk in chunks)
    assert chunks[-1] == 256


def test_on_cuda_a_chunk_is_all_that_an_eighth_of_the_memory_holds():
    device, gib = torch.device("cuda"), 2**30
    of = functools.partial(default_chunk_tokens, 30528, device=device)
    assert of(torch.bfloat16, total_memory=79 * gib) >= 65536  # an H100's
    for dtype, total in ((torch.bfloat16, 79 * gib), (torch.float32, 24 * gib), (torch.bfloat16, 8 * gib)):
        tokens = of(dtype, total_memory=total)
        assert tokens % 256 == 0
        assert 2 * tokens * 30528 * dtype.itemsize <= total / 8 < 2 * (tokens + 256) * 30528 * dtype.itemsize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_ND": torch.zeros(13, 23)}, r"student hidden states .* got \(13, 23\) and \(320, 24\)"),
        ({"teacher_ND": torch.zeros(12, 40)}, "got 13 of the student and 12 of the teacher"),
        ({"teacher_bias_V": torch.zeros(3)}, r"one teacher bias for each of the 320 rows .* \(3,\)"),
        (
            {"teacher_weight_VE": torch.zeros(301, 40), "teacher_bias_V": torch.zeros(301)},
            "320 rows of the student and 301 of the teacher",
        ),
        ({"vocab_size": 321}, "vocab_size 321 is more than the 320 rows"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be > 0"),
    ],
)
def test_errors_name_the_offender(change, message):
    leaves = {name: leaf.cpu() for name, leaf in make_leaves().items()}
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**leaves | OPTIONS | change)
