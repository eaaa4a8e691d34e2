"""One autograd function a layer computes what the modules of encoder.py say, and puts gradients where they belong."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastdistil.kernels.layout import SequenceLayout, sequence_layout
from fastdistil.model.encoder import KeptOutputs, MaskedLM
from fastdistil.model.flat import FlatParameters
from tests.support import toy

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.*reduced precision")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [20, 31, 14, 7]
SEED = 2**40 + 7
STUDENT = {"model_type": "distilbert", "token_types": 0, "num_layers": 2}
BERT = {"model_type": "bert", "token_types": 2}
DRY = {"dropout": 0.0, "attention_dropout": 0.0}
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


@pytest.mark.parametrize("loss", [of_logits, of_every_output])
@pytest.mark.parametrize("changes", [{}, BERT, DRY], ids=["student", "bert", "dry"])
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


def test_a_last_output_that_no_term_reads():
    """The relations of the last layer alone: what lies behind its attention has gradient 0."""

    def of_values(student: MaskedLM, *given: object) -> Tensor:
        _, kept = student.encoder(*given, KeptOutputs((), qkv=1))
        return kept[-1].float().square().mean()  # type: ignore[return-value]

    ours, modules = model(), model()
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
def test_checkpointing_changes_no_bit(loss, backend):
    found = []
    for again in (False, True):
        student = model(attention_dropout=0.1 if backend == "fused" else 0.0)
        student.encoder.attention_backend = backend
        student.encoder.activation_checkpointing = again
        found.append(gradients(student, loss))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][n]) for n, x in found[0][1].items())


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_micro_batches_add_up_in_the_flat_buffer(dtype, zeroed):
    """In fp32 what autograd adds up; in bf16 closer to the fp32 gradient than a sum of rounded ones."""
    student, apart = model(), model()
    flat = FlatParameters(student, dtype, zeroed=zeroed)
    gradients(student, of_every_output, 3)
    flat.complete()
    flat.clear()  # the next update begins anew
    losses, found = gradients(student, of_every_output, 0, 1, 2)
    apart_losses, wanted = gradients(apart, of_every_output, 0, 1, 2)
    assert losses == pytest.approx(apart_losses, rel=1e-6 if dtype == torch.float32 else 1e-2)
    error, name = worst_error(found, wanted)
    assert error < (1e-5 if dtype == torch.float32 else 0.05), name
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())


def test_the_flat_buffer_holds_every_parameter_once_and_apart():
    student, same = model(), model()
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
