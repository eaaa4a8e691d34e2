"""An update of a toy run: micro-batches, teacher, students, and what our objective makes of them in one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdistil.data.batches import MicroBatch
from fastdistil.data.plan import UpdatePlan
from fastdistil.data.shards import Shards
from fastdistil.export import write_hugging_face_folder
from fastdistil.model.architecture import Architecture, read_architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.sentence import Pooling
from fastdistil.model.weights import hugging_face_state, load_masked_lm, student_from_teacher
from fastdistil.run.config import LossConfig, MaskingConfig
from fastdistil.training.models import spread_layers
from fastdistil.training.objective import SUMS, Objective, kept_outputs, means
from fastdistil.training.teacher import Teacher
from tests.support import precision, toy

CPU = torch.device("cpu")
DEVICE = torch.device(precision.DEVICE)  # CUDA runs the Triton kernels

Gradients = dict[str, torch.Tensor]
"""By the names of Hugging Face."""


def imitated_layers(root: Path) -> tuple[int, ...]:
    """Of the teacher: those that a student of two layers begins as and imitates."""
    return spread_layers(2, read_architecture(root / "teacher"))


def write_students(root: Path) -> None:
    """Beside `shards` and `teacher`, folders of two-layer students of its family, of DistilBERT's where it is a BERT.

    student       two of the teacher's layers, no dropout
    dropping      the same weights, with dropout
    same, narrow  random weights, no dropout; as wide as the teacher, and not
    """
    teacher = load_masked_lm(root / "teacher", need_head=True)
    bare = toy.student_of(teacher.architecture, num_layers=2, dropout=0.0, attention_dropout=0.0)

    def of_teacher(architecture: Architecture) -> MaskedLM:
        generator = torch.Generator().manual_seed(5)
        layers = imitated_layers(root)
        return student_from_teacher(teacher, layers, architecture, copy_transform=False, generator=generator)

    students = {
        "student": of_teacher(bare),
        "dropping": of_teacher(replace(bare, dropout=0.1, attention_dropout=0.1)),
        "same": toy.steep(bare, seed=5),
        "narrow": toy.steep(replace(bare, hidden_size=24, num_heads=3), seed=5),
    }
    for name, student in students.items():
        (root / name).mkdir()
        write_hugging_face_folder(
            student.state_dict(), student.architecture, root / "shards" / "tokenizer", root / name
        )


def make_student(
    root: Path, name: str = "student", device: torch.device = DEVICE, *, loss: LossConfig | None = None
) -> MaskedLM:
    """One of `write_students`, with the head that `loss` wants, and with the projection where it compares widths."""
    loss = loss or LossConfig()
    student, width = (
        load_masked_lm(root / name, need_head=True, with_head=loss.has_head),
        toy.architecture().hidden_size,
    )
    if student.architecture.hidden_size != width and any(term.same_width for term in loss.terms):
        projecting = toy.steep(replace(student.architecture, embedding_size=width), seed=6)
        projecting.load_state_dict(projecting.state_dict() | student.state_dict())
        student = projecting
    return student.to(device)


def make_teacher(
    root: Path, device: torch.device = DEVICE, *, loss: LossConfig | None = None, dtype: torch.dtype = torch.float32
) -> Teacher:
    """The toy teacher, which hands over what `loss` wants: it has a head for --loss.kd alone."""
    loss = loss or LossConfig()
    model = load_masked_lm(root / "teacher", need_head=True, with_head=bool(loss.kd))
    qkv = model.architecture.num_layers - 1 if loss.relation_layer is None else loss.relation_layer
    kept = kept_outputs(loss, imitated_layers(root), qkv)
    return Teacher(model, device=device, dtype=dtype, kept_outputs=kept)


def make_batches(
    root: Path,
    micro_batches: int,
    device: torch.device = DEVICE,
    *,
    ranks: int = 1,
    masking: MaskingConfig = toy.PAPERS,
) -> tuple[UpdatePlan, list[MicroBatch]]:
    """An update of about 1,024 tokens and its micro-batches, those of the first rank first."""
    shards, budget = Shards(root / "shards"), 1024 // micro_batches
    settings = {"token_budget": budget, "masking": masking}
    update = toy.make_plan(shards.lengths, seed=3, micro_batches=micro_batches, **settings).update(0)
    collator = toy.make_collator(shards, **settings)
    return update, [collator(plan).to(device) for rank in range(ranks) for plan in update.of_rank(rank, ranks)]


def one_update(
    root: Path,
    name: str,
    micro_batches: int,
    loss: LossConfig,
    *,
    pooling: Pooling | None = None,
    dtype: torch.dtype = torch.float32,
    masking: MaskingConfig = toy.PAPERS,
) -> tuple[dict[str, float], Gradients]:
    """(reported losses, gradients) of an update of a student, from a teacher in `dtype`."""
    update, batches = make_batches(root, micro_batches, masking=masking)
    objective = Objective(make_student(root, name, loss=loss), loss, pooling)
    teacher = make_teacher(root, loss=loss, dtype=dtype)
    sums, total = torch.zeros(len(SUMS), device=DEVICE), 0.0
    for batch in batches:
        part, more = objective(batch, teacher(batch))
        part.backward()
        sums, total = sums + more, total + part.item()
    reported = means(sums.tolist(), update.counts, loss)
    assert reported["loss"] == pytest.approx(total, rel=1e-5)
    return reported, gradients_of(objective.student)


def gradients_of(student: MaskedLM) -> Gradients:
    """Of every trained parameter."""
    return by_their_names({name: p.grad for name, p in student.named_parameters() if p.grad is not None}, student)


def by_their_names(gradients: Gradients, student: MaskedLM) -> Gradients:
    """The names of Hugging Face, which has none for a projection; of a head that the student has not gradients of 0."""
    whole = replace(student.architecture, mlm_head=True, embedding_size=0)
    projection = {name: g for name, g in gradients.items() if name.startswith("projection.")}
    found = {name: g for name, g in gradients.items() if name not in projection}
    if student.head is None:
        found = {name: torch.zeros_like(p) for name, p in MaskedLM(whole).named_parameters()} | found
    return hugging_face_state(found, whole) | projection
