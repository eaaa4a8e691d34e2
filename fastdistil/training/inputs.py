"""What a run reads, verified: text with its plan, teacher, student. Made alike on every rank, without a word between them."""

from dataclasses import dataclass

import numpy as np
import torch

from fastdistil.data.batches import Collator, Plan, UpdatePlan, seed_of, validation_plan
from fastdistil.data.shards import Shards
from fastdistil.model import weights
from fastdistil.model.encoder import Encoder, MaskedLM
from fastdistil.run.config import Config
from fastdistil.run.ranks import Place
from fastdistil.training import fp8
from fastdistil.training.objective import teacher_keeps
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import RemoteTeacher, Teacher


@dataclass(frozen=True, slots=True)
class Text:
    """The shards of a run and what follows from them."""

    plan: Plan
    collator: Collator
    validation: UpdatePlan
    validation_collator: Collator
    num_updates: int
    mean_attended_length: float
    """Tokens a token attends to, on average: sum(L^2) / sum(L)."""


def load_text(resolved: Resolved, *, rank: int, world_size: int) -> Text:
    """Open and verify the shards, hold out the validation sequences, plan the run.

    Each rank hashes its part of the files. Raises ValueError naming a file that is damaged or too small.
    """
    config = resolved.config
    assert config.data.shards is not None  # preflight
    shards = Shards(config.data.shards, verify=config.data.verify, verify_part=(rank, world_size))
    if config.data.validation is None:
        held_out = min(config.data.validation_sequences, max(1, len(shards) // 10))
        num_train, other = len(shards) - held_out, shards
        validation = np.arange(num_train, len(shards))
    else:
        num_train, other = len(shards), Shards(config.data.validation, verify=config.data.verify)
        validation = np.arange(min(len(other), config.data.validation_sequences))
    if num_train < 1:
        raise ValueError(
            f"{shards.folder} holds {len(shards)} sequence(s), too few to train on and validate with: prepare more text"
        )
    budget, masking = config.batch.token_budget, config.masking
    lengths = shards.lengths[:num_train]
    plan = Plan(
        lengths,
        seed=config.seed,
        token_budget=budget,
        micro_batches_per_update=resolved.micro_batches_per_update,
        mask_fraction=masking.fraction,
    )
    duration = config.optim.duration
    return Text(
        plan=plan,
        collator=Collator(shards, shards.counts, token_budget=budget, masking=masking),
        validation=validation_plan(validation, other.lengths, token_budget=budget, mask_fraction=masking.fraction),
        validation_collator=Collator(other, shards.counts, token_budget=budget, masking=masking),
        num_updates=int(duration) if config.optim.unit == "updates" else plan.updates_of(duration),
        mean_attended_length=float(np.square(lengths, dtype=np.float64).sum() / lengths.sum()),
    )


def load_models(
    resolved: Resolved, *, place: Place, dtype: torch.dtype
) -> tuple[Teacher | RemoteTeacher | None, MaskedLM]:
    """(frozen teacher in `dtype` where its place is, student in fp32 on the CPU with its first weights).

    Raises ValueError where a folder does not hold what its config.json says, e.g. no MLM head, and where FP8 is asked for
    and cannot be had.
    """
    config = resolved.config
    teacher = weights.load_masked_lm(config.teacher.path, need_head=True) if config.teacher.path else None
    student = _student(resolved, teacher)
    student.encoder.activation_checkpointing = config.engine.activation_checkpointing
    for model in (student, teacher):
        if model is not None:
            model.encoder.attention_backend = config.engine.attention
            if config.engine.compile:
                compile_encoder(model.encoder)
    student.encoder.position_embeddings.weight.requires_grad_(not config.student.freeze_positions)
    if teacher is None:
        return None, student
    if place.teacher_link is not None and not place.is_teacher:
        link = place.teacher_link
        return RemoteTeacher(teacher, link, device=place.device, dtype=dtype), student
    elsewhere = place.second_device
    keep = teacher_keeps(config.loss, resolved.imitated_layers)
    frozen = Teacher(teacher, device=place.device, dtype=dtype, encoder_device=elsewhere, keep=keep)
    if config.teacher.precision == "fp8":
        fp8.require_device(frozen.encoder_device)
        fp8.quantise(frozen.model.encoder)
    return frozen, student


def compile_encoder(encoder: Encoder, mode: str | None = None) -> None:
    """Have torch.compile run this encoder from its first call on, under the same parameter names; `mode` is torch.compile's.

    One graph for all layouts of a token budget; some a layer where sdpa or flash-attn, which are not traced, cut it up. In training it
    draws other dropout masks than without torch.compile, whose random numbers are Inductor's own.
    """
    # The layers' places of dropout are constants of their graphs, of which Dynamo makes 8 before it runs the rest eagerly.
    torch._dynamo.config.recompile_limit = 64
    encoder.compile(mode=mode)


def _student(resolved: Resolved, teacher: MaskedLM | None) -> MaskedLM:
    config: Config = resolved.config
    generator = torch.Generator().manual_seed(seed_of(config.seed, "student"))
    if resolved.source_path is None:
        return MaskedLM(resolved.student, generator=generator)
    source = teacher
    if config.student.init != "teacher":
        source = weights.load_masked_lm(resolved.source_path, need_head=False, generator=generator)
    assert source is not None  # preflight: init=teacher has a teacher
    return weights.student_from_teacher(
        source,
        resolved.layers,
        resolved.student,
        # a model that goes on training keeps its head; a student starts with a fresh transform, as the authors' did
        copy_transform=config.student.copy_transform or config.student.init != "teacher",
        generator=generator,
    )
