"""What the public operators have in common: batches of any shape, masks, optional biases, numbers that change.

Each is held to itself on the rows that count, whose values the tests of that operator hold to its definition.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastdistil
from fastdistil import (
    add_layernorm,
    attention,
    bias_gelu,
    cosine_loss,
    distill_loss,
    dropout,
    dropout_add_layernorm,
    geglu,
    layernorm,
    linear,
    linear_distill_loss,
    linear_gelu,
    padded_layout,
    rope,
    rotations,
    sequence_layout,
)
from tests.support.precision import DEVICE, compiled, of_the_definition

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]

B, L, D, V = 3, 5, 16, 40
N = B * L
LENGTHS = (5, 2, 4)
SCALES: dict[str, Any] = {"temperature": 2.0, "kd_scale": 0.7, "mlm_scale": 0.3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def real() -> Tensor:
    """(B, L) bool: texts of LENGTHS tokens, padded on the right."""
    return torch.arange(L, device=DEVICE) < torch.tensor(LENGTHS, device=DEVICE)[:, None]


def labels() -> Tensor:
    found = torch.arange(N, device=DEVICE).reshape(B, L) % V
    return found.masked_fill(found % 3 != 0, -100)


def seed() -> Tensor:
    return torch.tensor(7, device=DEVICE)


def scales(temperature: Tensor) -> dict[str, Any]:
    return SCALES | {"temperature": temperature}


WEIGHT, TEACHER_WEIGHT, BIAS = normal(V, D, seed=2) / 4, normal(V, 24, seed=3) / 4, normal(V, seed=4)
Operator = Callable[..., Any]
LOSSES: dict[str, tuple[Operator, list[Tensor]]] = {
    "cosine_loss": (
        lambda s, t, y, **o: cosine_loss(s, t, scale=0.3, **o),
        [normal(B, L, D), normal(B, L, D, seed=1), labels()],
    ),
    "distill_loss": (
        lambda s, t, y, **o: distill_loss(s, t, y, **SCALES | o),
        [normal(B, L, V), normal(B, L, V, seed=1), labels()],
    ),
    "linear_distill_loss": (
        lambda s, t, y, **o: linear_distill_loss(s, WEIGHT, BIAS, t, TEACHER_WEIGHT, BIAS, y, **SCALES | o),
        [normal(B, L, D), normal(B, L, 24, seed=1), labels()],
    ),
}
LAYERS: dict[str, tuple[Operator, int]] = {
    "layernorm": (lambda x: layernorm(x, WEIGHT[0], WEIGHT[1]), D),
    "dropout_add_layernorm": (
        lambda x: dropout_add_layernorm(x, x * 2, WEIGHT[0], WEIGHT[1], seed=seed(), dropout_p=0.4),
        D,
    ),
    "add_layernorm": (
        lambda x: torch.cat(add_layernorm(x, x * 2, WEIGHT[0], WEIGHT[1], seed=seed(), dropout_p=0.4), -1),
        D,
    ),
    "bias_gelu": (lambda x: bias_gelu(x, WEIGHT[0]), D),
    "geglu": (geglu, D),
    "linear_gelu": (lambda x: linear_gelu(x, WEIGHT, BIAS), D),
    "linear": (lambda x: linear(x, WEIGHT, BIAS), D),
    "rope": (
        lambda x: rope(
            x.unflatten(-1, (3, 2, 4)), rotations(torch.arange(N, device=DEVICE).view(x.shape[:-1]), 4, 100.0)
        ),
        24,
    ),
    "dropout": (lambda x: dropout(x, seed(), stream=1, dropout_p=0.4), D),
}


def value_and_gradient(run: Operator, x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out: Any = run(leaf, *others, **options)
    value = out if isinstance(out, Tensor) else torch.stack(list(out))
    (gradient,) = torch.autograd.grad(value.square().sum() if isinstance(out, Tensor) else out.loss, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_batches_as_their_rows(name):
    run, width = LAYERS[name]
    x = normal(B, L, width)
    value, gradient = value_and_gradient(run, x)
    flat_value, flat_gradient = value_and_gradient(run, x.flatten(0, 1))
    assert value.shape[:2] == (B, L)
    assert torch.equal(value.flatten(0, 1), flat_value)
    assert torch.equal(gradient.flatten(0, 1), flat_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_take_batches_as_their_rows(name):
    run, (student, *others) = LOSSES[name]
    value, gradient = value_and_gradient(run, student, *others)
    flat = [x.flatten(0, 1) for x in others]
    flat_value, flat_gradient = value_and_gradient(run, student.flatten(0, 1), *flat)
    assert torch.equal(value, flat_value)
    assert torch.equal(gradient.flatten(0, 1), flat_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_takes_rows_out_of_every_term(name):
    """Whatever stands in them, NaN included."""
    run, (student, teacher, y) = LOSSES[name]
    keep = real()
    wanted, of_kept = value_and_gradient(run, student[keep], teacher[keep], y[keep])
    spoilt = student.masked_fill(~keep[..., None], torch.nan)
    value, gradient = value_and_gradient(run, spoilt, teacher, y, mask=keep)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[keep], of_kept, rtol=1e-6, atol=1e-7)
    assert (gradient[~keep] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_of_nothing_costs_nothing(name):
    run, (student, *others) = LOSSES[name]
    value, gradient = value_and_gradient(run, student, *others, mask=torch.zeros_like(real()))
    assert (value == 0).all()
    assert (gradient == 0).all()


def test_without_labels_there_is_the_kl_alone():
    for name in ("distill_loss", "linear_distill_loss"):
        run, (student, teacher, y) = LOSSES[name]
        found = run(student, teacher, None)
        assert found.mlm_sum == 0
        assert torch.equal(found.kd_sum, run(student, teacher, y).kd_sum)


def test_without_a_bias_it_is_zero():
    x, nothing = normal(B, L, D), torch.zeros_like(BIAS)
    torch.testing.assert_close(linear(x, WEIGHT, None), linear(x, WEIGHT, nothing))
    torch.testing.assert_close(linear_gelu(x, WEIGHT, None), linear_gelu(x, WEIGHT, nothing))
    assert torch.equal(bias_gelu(x, None), bias_gelu(x, nothing[:D]))
    assert torch.equal(layernorm(x, WEIGHT[0], None), layernorm(x, WEIGHT[0], nothing[:D]))
    for operator in (dropout_add_layernorm, lambda *given: torch.cat(add_layernorm(*given))):
        assert torch.equal(operator(x, 2 * x, WEIGHT[0], None), operator(x, 2 * x, WEIGHT[0], nothing[:D]))
    other = normal(B, L, 24)
    without = linear_distill_loss(x, WEIGHT, None, other, TEACHER_WEIGHT, None, labels(), **SCALES)
    wanted = linear_distill_loss(x, WEIGHT, nothing, other, TEACHER_WEIGHT, nothing, labels(), **SCALES)
    assert torch.equal(torch.stack(without), torch.stack(wanted))


@pytest.mark.parametrize("side", ["right", "left"])
def test_attention_of_a_padded_batch_is_that_of_its_texts(side):
    keep = real() if side == "right" else real().flip(1)
    qkv = normal(B, L, 3, 2, 8)
    value, gradient = value_and_gradient(lambda x: attention(x, padded_layout(keep))[keep], qkv)
    wanted, of_kept = value_and_gradient(lambda x: attention(x, sequence_layout(LENGTHS, DEVICE)), qkv[keep])
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[keep], of_kept, rtol=1e-5, atol=1e-6)


def test_attention_without_a_layout_is_of_whole_texts():
    qkv = normal(B, L, 3, 2, 8)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention(qkv), wanted, rtol=1e-5, atol=1e-6)


@of_the_definition
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_that_are_tensors_change_without_a_recompilation(name):
    """Dynamo raises where it would compile a second time."""
    _, (student, teacher, y) = LOSSES[name]
    if name == "cosine_loss":
        run = compiled(lambda scale, **_: cosine_loss(student, teacher, scale=scale, mask=real()).loss)
    elif name == "distill_loss":
        run = compiled(lambda **numbers: distill_loss(student, teacher, y, mask=real(), **numbers).loss)
    else:
        heads = (WEIGHT, BIAS, teacher, TEACHER_WEIGHT, BIAS)
        run = compiled(lambda **numbers: linear_distill_loss(student, *heads, y, mask=real(), **numbers).loss)
    torch._dynamo.reset()
    found = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temperature in (2.0, 3.0, 1.5):
            given = {"temperature": temperature, "kd_scale": 1 / temperature, "mlm_scale": temperature}
            given = {"scale": temperature} if name == "cosine_loss" else given
            numbers = {key: torch.tensor(value, device=DEVICE) for key, value in given.items()}
            loss = LOSSES[name][0]
            options = {"mask": real()} | ({} if name == "cosine_loss" else given)
            wanted = loss(student, teacher, y, **options).loss * (temperature / 0.3 if name == "cosine_loss" else 1)
            found.append(run(**numbers))
            torch.testing.assert_close(found[-1], wanted)
    assert len({float(x) for x in found}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cosine_loss(normal(4, D), normal(4, D), mask=torch.ones(4, device=DEVICE)),
            r"mask as bool .*mask.bool",
        ),
        (
            lambda: cosine_loss(normal(4, D), normal(4, D), mask=real()),
            r"mask as bool of shape \(4,\) .* shape \(3, 5\)",
        ),
        (
            lambda: distill_loss(
                normal(2, V),
                normal(2, V),
                None,
                mask=torch.ones(2, dtype=torch.bool, device=DEVICE),
                num_rows=torch.tensor(1, device=DEVICE),
                **SCALES,
            ),
            "got both: leave num_rows out",
        ),
        (
            lambda: distill_loss(normal(2, V), normal(2, V), None, **scales(torch.ones(2))),
            r"temperature as a float or a 0-dim tensor, got shape \(2,\)",
        ),
        (
            lambda: distill_loss(normal(2, V), normal(2, V), None, **scales(torch.tensor(0.0))),
            "temperature must be > 0, got 0.0",
        ),
        (
            lambda: linear_distill_loss(
                normal(B, L, D), WEIGHT, None, normal(B, 4, 24), TEACHER_WEIGHT, None, None, **SCALES
            ),
            r"got \(3, 5\) of the student and \(3, 4\) of the teacher",
        ),
        (lambda: attention(normal(4, 3, 2, 8)), r"wants the layout of its tokens: sequence_layout\(\[...\]\)"),
        (lambda: padded_layout(torch.tensor([[1, 0, 1]])), "side by side, got padding between them"),
        (lambda: padded_layout(torch.ones(3)), r"wants a mask \(B, L\) .* got \(3,\)"),
        (lambda: dropout(normal(4), seed(), stream=0, dropout_p=0.1), r"\(N, D\) or \(B, L, D\) tensor, got \(4,\)"),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_public_name_is_there():
    for name in fastdistil.__all__:
        assert getattr(fastdistil, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastdistil.nothing  # noqa: B018
