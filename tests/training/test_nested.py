"""Students within the student: the first layers and dimensions are held to the teacher's embeddings, too."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastdistil import export
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.sentence import Pooling
from fastdistil.run.config import LossConfig
from fastdistil.training.objective import SUMS, Objective
from tests.support.updates import CPU, make_batches, make_student, make_teacher

POOLING = Pooling(mode="mean", normalise=True, max_length=None)
LOSS = LossConfig(kd=0.0, mlm=0.0, cosine=0.0, embedding=1.0, similarity=1.0)


def sums_of(folder, loss: LossConfig) -> dict[str, float]:
    """Of a micro-batch of the student of two layers."""
    _, (batch,) = make_batches(folder, 1, CPU)
    objective = Objective(make_student(folder, "same", CPU), loss, POOLING).eval()
    _, sums = objective(batch, make_teacher(folder, CPU, loss=loss)(batch))
    return dict(zip(SUMS, sums.tolist(), strict=True))


@torch.no_grad()
def embeddings(folder, num_layers: int | None = None) -> torch.Tensor:
    """(sequences, width) fp64, of the teacher, or of so many layers of the student, as an export has them alone."""
    _, (batch,) = make_batches(folder, 1, CPU)
    if num_layers is None:
        states = make_teacher(folder, CPU)(batch).encoder.hidden_ND
    else:
        student = make_student(folder, "same", CPU)
        part = replace(student.architecture, num_layers=num_layers)
        alone = MaskedLM(part).eval()
        alone.load_state_dict(export._first(student.state_dict(), student.architecture, part))
        states = alone.encoder(batch.input_ids, batch.position_ids, batch.layout)
    return torch.stack([x.double().mean(0) for x in states[: batch.num_tokens].split(batch.real_lengths)])


def error_of(mine: torch.Tensor, example: torch.Tensor) -> float:
    """The similarity term, pair by pair."""
    first, second = (F.cosine_similarity(x[:, None], x, dim=-1) for x in (mine, example))
    return ((first - second).square().sum() / (len(mine) - 1)).item()


def test_a_term_is_the_mean_over_the_nested_students(of_each):
    teacher, whole, half = embeddings(of_each), embeddings(of_each, 2), embeddings(of_each, 1)
    found = sums_of(of_each, replace(LOSS, nested_layers=(1,), nested_dimensions=(8, 3)))
    distance = [(1 - F.cosine_similarity(x, teacher)).sum().item() for x in (whole, half)]
    assert found["embedding"] == pytest.approx(sum(distance) / 2, rel=1e-4)
    errors = [error_of(x[:, :width], teacher) for x in (whole, half) for width in (x.shape[1], 8, 3)]
    assert found["similarity"] == pytest.approx(sum(errors) / 6, rel=1e-4)
    assert len({round(e, 6) for e in (*errors, *distance)}) == 8  # each has a part of its own


def test_hidden_states_of_layers_are_the_same_beside_nested_ones(of_each):
    with_hidden = replace(LOSS, hidden=1.0)
    alone = sums_of(of_each, with_hidden)
    beside = sums_of(of_each, replace(with_hidden, nested_layers=(1,)))
    assert beside["hidden"] == alone["hidden"] > 0
    assert beside["embedding"] == sums_of(of_each, replace(LOSS, nested_layers=(1,)))["embedding"] != alone["embedding"]
