"""One autograd function a layer computes what the modules of encoder.py say, and puts gradients where they belong."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.kernels.layout import SequenceLayout, sequence_layout
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.flat import FlatParameters
from fastdistil.model.functions import pooled
from fastdistil.model.masked_lm import MaskedLM
from tests.support import toy

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.*reduced precision")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [20, 31, 14, 7]
SEED = 2**40 + 7
STUDENT = {"model_type": "distilbert", "token_types": 0, "num_layers": 2}
BERT = {"model_type": "bert", "token_types": 2}
MODERNBERT = toy.MODERNBERT | {"dropout": 0.1, "attention_dropout": 0.1}
DRY = {"dropout": 0.0, "attention_dropout": 0.0}
PROJECTING = {"mlm_head": False, "embedding_size": 24}
Loss = Callable[[MaskedLM, Tensor, Tensor, SequenceLayout, Tensor], Tensor]


def model(dtype: torch.dtype = torch.float32, **changes: int | float | str) -> MaskedLM:
    """With dropout, in training mode; the same weights each time."""
    return toy.steep(toy.architecture(**{**STUDENT, **changes}), seed=3).to(DEVICE, dtype).train()


def inputs(number: int = 0) -> tuple[Tensor, Tensor, SequenceLayout, Tensor]:
    """Ids, positions, layout and dropout seed of a micro-batch."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 101, (sum(LENGTHS),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    layout = sequence_layout(LENGTHS, DEVICE, tile_step=8)
    return ids.to(DEVICE), positions.to(DEVICE), layout, torch.tensor(SEED + number, device=DEVICE)


def of_logits(student: MaskedLM, *given: object) -> Tensor:
    """A loss of the logits."""
    return student(*given).float().square().mean()


def of_every_output(student: MaskedLM, *given: object) -> Tensor:
    """A loss of every layer's output, queries, keys and values of the first attention, and the logits."""
    hidden, kept = student.encoder(*given, KeptOutputs((0, 1), qkv=0))
    return sum(x.float().square().mean() for x in (student.head(hidden), *kept))  # type: ignore[return-value]


def gradients(student: MaskedLM, loss: Loss, *numbers: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and summed gradients of micro-batches."""
    losses = []
    for number in numbers or (0,):
        value = loss(student, *inputs(number))
        value.backward()
        losses.append(value.item())
    return losses, {n: p.grad.float().clone() for n, p in student.named_parameters() if p.grad is not None}


def worst_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a gradient, and whose."""
    assert found.keys() == wanted.keys()
    return max(((found[n] - g).norm().item() / max(g.norm().item(), 1e-20), n) for n, g in wanted.items())


def of_projected(student: MaskedLM, *given: object) -> Tensor:
    """A loss of every layer's output by one projection."""
    hidden, kept = student.encoder(*given, KeptOutputs((0, 1)))
    assert student.projection is not None
    return sum(student.projection(x).float().square().mean() for x in (hidden, *kept))  # type: ignore[return-value]


def name_of(case: Any) -> str:
    """The name of a loss, or what sets an architecture apart from the other cases'."""
    if callable(case):
        return case.__name__
    return "-".join(str(case[key]) for key in ("model_type", "dropout", "embedding_size") if key in case) or "student"


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        *product(({}, BERT, DRY, MODERNBERT, MODERNBERT | DRY), (of_logits, of_every_output)),
        *product((PROJECTING, MODERNBERT | PROJECTING), (of_projected,)),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_functions_are_the_modules(dtype, changes, loss):
    """Value and gradients, with dropout; the modules' own error in bf16 is the measure of the functions'."""
    ours, modules, exact = model(dtype, **changes), model(dtype, **changes), model(**changes)
    modules.run_by_modules()
    exact.run_by_modules()
    (value,), found = gradients(ours, loss)
    (same,), wanted = gradients(modules, loss)
    assert value == pytest.approx(same, rel=1e-6 if dtype == torch.float32 else 1e-2)
    error, name = worst_error(found, wanted)
    if dtype == torch.float32:
        assert error < 1e-5, name
        return
    _, truth = gradients(exact, loss)
    for name, gradient in truth.items():
        own = (wanted[name] - gradient).norm()
        assert (found[name] - gradient).norm() <= 2 * own + 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("changes", [{}, MODERNBERT], ids=["distilbert", "modernbert"])
def test_a_last_output_that_no_term_reads(changes):
    """The relations of the last layer alone: what lies behind its attention has gradient 0."""

    def of_values(student: MaskedLM, *given: object) -> Tensor:
        _, kept = student.encoder(*given, KeptOutputs((), qkv=1))
        return kept[-1].float().square().mean()  # type: ignore[return-value]

    ours, modules = model(**changes), model(**changes)
    modules.run_by_modules()
    _, found = gradients(ours, of_values)
    _, wanted = gradients(modules, of_values)
    assert "encoder.layers.0.ffn_out.weight" in wanted
    assert "encoder.layers.1.ffn_out.weight" not in wanted
    error, name = worst_error({n: found.pop(n) for n in wanted}, wanted)
    assert error < 1e-5, name
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("loss", [of_logits, of_every_output])
@pytest.mark.parametrize("changes", [{}, MODERNBERT], ids=["distilbert", "modernbert"])
def test_checkpointing_changes_no_bit(changes, loss, backend):
    found = []
    for again in (False, True):
        student = model(**changes | {"attention_dropout": 0.1 if backend == "fused" else 0.0})
        student.encoder.attention_backend = backend
        student.encoder.activation_checkpointing = again
        found.append(gradients(student, loss))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][n]) for n, x in found[0][1].items())


@pytest.mark.parametrize(
    ("changes", "loss"), [({}, of_every_output), (PROJECTING, of_projected), (MODERNBERT, of_every_output)]
)
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_micro_batches_add_up_in_the_flat_buffer(dtype, zeroed, changes, loss):
    """In fp32 what autograd adds up; in bf16 closer to the fp32 gradient than a sum of rounded ones."""
    student, apart = model(**changes), model(**changes)
    flat = FlatParameters(student, dtype, zeroed=zeroed)
    gradients(student, loss, 3)
    flat.complete()
    flat.clear()  # the next update begins anew
    losses, found = gradients(student, loss, 0, 1, 2)
    apart_losses, wanted = gradients(apart, loss, 0, 1, 2)
    assert losses == pytest.approx(apart_losses, rel=1e-6 if dtype == torch.float32 else 1e-2)
    error, name = worst_error(found, wanted)
    assert error < (1e-5 if dtype == torch.float32 else 0.05), name
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize("changes", [{}, MODERNBERT], ids=["distilbert", "modernbert"])
def test_the_flat_buffer_holds_every_parameter_once_and_apart(changes):
    student, same = model(**changes), model(**changes)
    flat = FlatParameters(student, torch.bfloat16)
    for (name, p), q in zip(student.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() == flat.part(flat.masters, name).data_ptr()
        assert torch.equal(flat.part(flat.copies, name), q.bfloat16())
    assert student.head.weight is student.encoder.word_embeddings.weight
    places = sorted((begin, begin + shape.numel()) for begin, shape in flat.places.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert all(begin % 64 == 0 for begin, _ in places)
    names = [[n for n, p in student.named_parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    decayed, others = (flat.masters[flat.span(group)] for group in names)
    assert sum(p.numel() for p in student.parameters() if p.ndim > 1) <= decayed.numel()
    assert len(others) < len(decayed)
    assert decayed.numel() + others.numel() == flat.masters.numel()


def test_what_is_not_trained_lies_at_the_end_without_a_gradient():
    student = model()
    student.encoder.position_embeddings.weight.requires_grad_(False)
    flat = FlatParameters(student, torch.bfloat16)
    _, found = gradients(student, of_logits)
    assert "encoder.position_embeddings.weight" not in found
    assert flat.places["encoder.position_embeddings.weight"][0] == flat.trained
    copy = flat.part(flat.copies, "encoder.position_embeddings.weight")
    assert torch.equal(copy, model().encoder.position_embeddings.weight.bfloat16())


@pytest.mark.parametrize("changes", [{}, MODERNBERT], ids=["distilbert", "modernbert"])
def test_an_encoder_of_which_nothing_is_trained_keeps_nothing(changes):
    """A teacher, and the lower part of a student whose head alone is trained."""
    student = model(**changes)
    student.encoder.requires_grad_(False)
    assert not student.encoder(*inputs()).requires_grad


def test_a_parameter_that_nothing_reaches_has_gradient_0():
    """Not what the last update left there."""
    student = model()
    flat = FlatParameters(student, torch.float32)
    gradients(student, of_logits)
    flat.complete()
    flat.clear()
    student.encoder(*inputs()).square().mean().backward()  # the head takes no part
    flat.complete()
    assert student.head.dense.weight.grad is not None
    assert not student.head.dense.weight.grad.any()
    assert student.encoder.layers[0].qkv.weight.grad.any()  # type: ignore[union-attr]


def test_the_copies_follow_the_masters_once_they_are_cast():
    student = model()
    flat = FlatParameters(student, torch.bfloat16)
    with torch.no_grad():
        flat.masters.mul_(2)
    assert not torch.equal(flat.copies, flat.masters.bfloat16())
    flat.cast()
    assert torch.equal(flat.copies, flat.masters.bfloat16())


def pooled_once(mode: str, hidden: Tensor, layout: SequenceLayout, of_pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings, and the gradient of the hidden states for that of the embeddings."""
    hidden = hidden.detach().requires_grad_()
    embeddings = pooled(hidden, layout, mode)
    (embeddings * of_pooled).sum().backward()
    assert hidden.grad is not None
    return embeddings.detach(), hidden.grad


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 200, 17), (64, 64)], ids=str)
def test_pooled_is_a_loop_over_sequences(lengths, dtype, mode):
    """Empty sequences at the end of a layout are 0; twice the same bits; without a device that could say how many."""
    layout = sequence_layout(lengths, DEVICE, sequence_step=8)
    num_sequences = len(layout.cu_seqlens) - 1
    assert num_sequences == 8 > len(lengths)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), 24, generator=generator).to(DEVICE, dtype)
    of_pooled = torch.randn(num_sequences, 24, generator=generator).to(DEVICE)
    exact = hidden.double().requires_grad_()
    wanted = torch.stack([x.mean(0) if mode == "mean" else x[0] for x in exact.split(lengths)])
    (wanted * of_pooled[: len(lengths)]).sum().backward()
    assert exact.grad is not None

    embeddings, gradient = pooled_once(mode, hidden, layout, of_pooled)
    assert (embeddings.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(embeddings[: len(lengths)].double(), wanted.detach(), rtol=0, atol=1e-6)
    assert not embeddings[len(lengths) :].any()
    torch.testing.assert_close(gradient, exact.grad.to(dtype))
    again = pooled_once(mode, hidden, layout, of_pooled)
    assert torch.equal(embeddings, again[0])
    assert torch.equal(gradient, again[1])

    found = pooled_once(mode, hidden.to("meta"), layout.to("meta"), of_pooled.to("meta"))  # no values, nothing to read
    assert [x.shape for x in found] == [embeddings.shape, hidden.shape]


def test_an_empty_first_sequence_takes_no_row():
    """As in a micro-batch of padding alone."""
    layout = replace(sequence_layout([4], DEVICE), cu_seqlens=torch.tensor([0, 0, 4, 4], dtype=torch.int32).to(DEVICE))
    hidden = torch.arange(8.0, device=DEVICE).reshape(4, 2)
    for mode, row in (("mean", [3.0, 4.0]), ("cls", [0.0, 1.0])):
        assert pooled(hidden, layout, mode).tolist() == [[0.0, 0.0], row, [0.0, 0.0]]
