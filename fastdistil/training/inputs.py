"""What a run reads, verified: corpus with its plan, teacher, student.

Made alike on every rank, without a word between them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastdistil.data.batches import Collator, MicroBatch, micro_batches
from fastdistil.data.plan import Plan, Pool, UpdatePlan, joined, pools_of, seed_of, validation_plan
from fastdistil.data.shards import Mix, Shards
from fastdistil.kernels.attention import check_heads
from fastdistil.kernels.attention_backends import resolve_backend
from fastdistil.kernels.mixture import running_shares
from fastdistil.model.architecture import attended
from fastdistil.model.encoder import Encoder
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import load_masked_lm, start_head, student_from_teacher
from fastdistil.run.config import Config
from fastdistil.run.ranks import Ranks
from fastdistil.training.objective import kept_outputs
from fastdistil.training.precision import quantise_encoder, require_fp8
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher


@dataclass(frozen=True, slots=True)
class Corpus:
    """The shards of a run and what follows from them."""

    plan: Plan
    collator: Collator
    folders: tuple[str, ...]
    """What the folders of a mix are called, or that of the run."""
    validations: tuple[UpdatePlan, ...]
    """Of each folder of a mix, or of the run."""
    validation: UpdatePlan
    """Of all of them."""
    validation_collator: Collator
    num_updates: int
    attended: Callable[[int], float]
    """Window -> tokens that a token attends to, on average over an epoch; see `architecture.attended`."""
    num_workers: int | None
    """Processes that make micro-batches for training; None: as the device wants."""

    def is_of(self, number: int) -> int:
        """The place in `validations` of micro-batch `number` of the validation; 0 for an empty one beyond the last."""
        ends = np.cumsum([len(plan.micro_batches) for plan in self.validations])
        return int(np.searchsorted(ends, number, side="right")) % len(ends)

    def shares(self) -> str:
        """A mix in words: each folder's share of the tokens, and how often an epoch reads it."""
        total = sum(pool.epoch_tokens for pool in self.plan.pools)
        return ", ".join(
            f"{pool.epoch_tokens / total:.1%} {name} (read {pool.passes:.3g} times an epoch)"
            for name, pool in zip(self.folders, self.plan.pools, strict=True)
        )

    def micro_batches(self, split: Split, ranks: Ranks, *, rank: int, first: int = 0) -> Iterator[MicroBatch]:
        """Those of a rank from number `first` on, which begins an update: of all the training, or of a validation."""
        if split == Split.VALIDATION:
            return map(self.validation_collator, self.validation.of_rank(rank, ranks.world_size)[first:])
        per_rank = -(-self.plan.micro_batches_per_update // ranks.world_size)
        on_cuda = ranks.device.type == "cuda"
        # On a CPU they are 2 % of the work, and the training's threads, which wait for one another, wait for theirs.
        num_workers = self.num_workers if self.num_workers is not None else 2 if on_cuda else 0
        return micro_batches(
            (self.plan.update(u) for u in range(first // per_rank, self.num_updates)),
            self.collator,
            rank=rank,
            world_size=ranks.world_size,
            num_workers=num_workers,
            pin_memory=on_cuda,
        )


def plan_of(resolved: Resolved, lengths: NDArray[np.int32], pools: Sequence[Pool] | None = None) -> Plan:
    """The run's plan for sequences of so many tokens, of which it trains on those in `pools`, or all."""
    return Plan(
        lengths,
        seed=resolved.config.seed,
        token_budget=resolved.token_budget,
        micro_batches_per_update=resolved.micro_batches_per_update,
        mask_fraction=resolved.config.masking.fraction,
        pools=pools,
    )


def updates_of(duration: float, config: Config, plan: Plan) -> int:
    """Updates of so many epochs or updates, as --optim.unit says."""
    return int(duration) if config.optim.unit == "updates" else plan.updates_of(duration)


def load_corpus(resolved: Resolved, *, rank: int, world_size: int) -> Corpus:
    """Open and verify the shards, hold out the validation sequences, plan the run.

    Each rank hashes its part of the files. Raises ValueError naming a file that is damaged or too small, and where
    there is nothing to profile at the updates that --profile names.
    """
    config, data = resolved.config, resolved.config.data
    parts = [Shards(t.folder, verify=data.verify, verify_part=(rank, world_size)) for t in data.texts]
    held_out = _held_out(resolved, parts) if data.validation is None else [0] * len(parts)
    # The sequences of all folders, one folder after the other; those held out end each folder.
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    trained = [part.lengths[: len(part) - count] for part, count in zip(parts, held_out, strict=True)]
    pools = pools_of(trained, firsts[:-1], data.weights)
    shards = parts[0] if len(parts) == 1 else Mix(parts, [pool.passes for pool in pools])
    if data.validation is None:
        other, validation = shards, [np.arange(end - n, end) for end, n in zip(firsts[1:], held_out, strict=True)]
    else:
        other = Shards(data.validation, verify=data.verify)
        validation = [np.arange(min(len(other), data.validation_sequences))]
    budget, masking = resolved.token_budget, config.masking
    plan = plan_of(resolved, shards.lengths, pools)
    num_updates = updates_of(config.optim.duration, config, plan)
    if config.profile_window.stop > num_updates:
        raise ValueError(
            f"--profile {config.profile} goes beyond the run's {num_updates} updates: profile earlier ones"
        )
    validations = [
        validation_plan(sequences, other.lengths, token_budget=budget, mask_fraction=masking.fraction)
        for sequences in validation
    ]
    drawn = plan.drawn_lengths()
    collate = partial(Collator, counts=shards.counts, token_budget=budget, masking=masking)
    return Corpus(
        plan=plan,
        collator=collate(shards, lengths=drawn if len(parts) > 1 else None),
        folders=_names([part.folder for part in parts]),
        validations=tuple(validations),
        validation=joined(validations),
        validation_collator=collate(other, lengths=drawn if other is shards and len(parts) > 1 else None),
        num_updates=num_updates,
        attended=cache(partial(attended, drawn)),  # of millions of lengths, and asked for every layer
        num_workers=data.num_workers,
    )


def _held_out(resolved: Resolved, parts: Sequence[Shards]) -> list[int]:
    """How many sequences of each folder are kept for validation: as its share of the mix, at most a tenth of it."""
    asked = resolved.config.data
    weights = asked.weights or [part.meta.num_tokens for part in parts]
    rates = [w * len(part) / part.meta.num_tokens for w, part in zip(weights, parts, strict=True)]  # of sequences
    counts = [max(1, round(asked.validation_sequences * rate / sum(rates))) for rate in rates]
    return [min(count, max(1, len(part) // 10)) for count, part in zip(counts, parts, strict=True)]


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders' own names, or their paths where two are the same."""
    short = tuple(folder.name or folder.resolve().name for folder in folders)
    return short if len({*short}) == len(short) else tuple(map(str, folders))


@dataclass(frozen=True, slots=True)
class Models:
    """What a run works with."""

    teacher: Teacher | RemoteTeacher | None
    """Frozen, where its place is."""
    student: MaskedLM
    """In fp32 on the CPU, with its first weights."""
    digests: dict[str, str]
    """Of the models that were read, by the options that name them."""


def load_models(resolved: Resolved, ranks: Ranks, corpus: Corpus) -> Models:
    """Read teacher and student. A fresh head begins with the frequencies of the corpus.

    Raises ValueError where a folder does not hold what its config.json says, e.g. no MLM head, and where the attention
    backend or FP8 is asked for and cannot be had.
    """
    config, dtype = resolved.config, resolved.teacher_dtype(ranks.device)
    of_teachers = [(dtype, model) for model in resolved.teachers]
    for arithmetic, model in ((resolved.dtype(ranks.device), resolved.student), *of_teachers):
        for dropout_p in (0.0, resolved.student.attention_dropout):
            how = {"dropout_p": dropout_p, "dtype": arithmetic, "window": model.widest_window}
            backend = resolve_backend(config.engine.attention, ranks.device, **how)
            check_heads(backend, model.hidden_size // model.num_heads, ranks.device)
    path = config.teacher.path
    generator = torch.Generator().manual_seed(seed_of(config.seed, "student"))
    # A head where the student has one, whose first weights may be the teacher's.
    with_head = {"with_head": resolved.student.mlm_head, "vocab_size": resolved.meta.vocab_size}
    teacher = load_masked_lm(path, need_head=bool(config.loss.kd), **with_head) if path else None
    source = teacher if resolved.source_path else None
    if resolved.source_path and config.student.init != "teacher":
        source = load_masked_lm(resolved.source_path, need_head=False, **with_head, generator=generator)
    others = [load_masked_lm(other, need_head=True, **with_head) for other in config.teacher.others]
    digests = {} if teacher is None else {"teacher.path": digest(teacher)}
    if others:
        digests["teacher.others"] = hashlib.sha256(" ".join(map(digest, others)).encode()).hexdigest()
    if source is not None and source is not teacher:
        digests["student.init"] = digest(source)
    student = _student(resolved, source, generator)
    if resolved.fresh_head:
        start_head(student, torch.from_numpy(corpus.collator.label_frequencies()))
    student.encoder.activation_checkpointing = config.engine.activation_checkpointing
    for model in (student, teacher, *others):
        if model is not None:
            model.encoder.attention_backend = config.engine.attention
            if config.engine.compile:
                compile_encoder(model.encoder)
    if config.student.freeze_positions and not resolved.student.rotates:
        student.encoder.position_embeddings.requires_grad_(False)
    if teacher is None:
        return Models(None, student, digests)
    if not config.loss.kd:  # its distribution is not asked for
        teacher.head = None
    return Models(_frozen(resolved, ranks, teacher, others), student, digests)


def _frozen(
    resolved: Resolved, ranks: Ranks, model: MaskedLM, other_models: Sequence[MaskedLM]
) -> Teacher | RemoteTeacher:
    """The teachers where their place is, as one."""
    config, place = resolved.config, {"device": ranks.device, "dtype": resolved.teacher_dtype(ranks.device)}
    shares = running_shares(config.teacher.weights or [1.0] * len(config.teacher.paths))
    if ranks.link is not None and not ranks.is_teacher:
        return RemoteTeacher(model, ranks.link, **place, others=other_models, shares=shares)
    others = [Teacher(other, **place, encoder_device=ranks.second_device) for other in other_models]
    frozen = Teacher(
        model,
        **place,
        encoder_device=ranks.second_device,
        kept_outputs=kept_outputs(config.loss, resolved.imitated_layers, resolved.relation_layer),
        others=others,
        shares=shares,
    )
    if config.teacher.precision == "fp8":
        require_fp8(frozen.encoder_device)
        for teacher in (frozen, *others):
            quantise_encoder(teacher.model.encoder)
    return frozen


def compile_encoder(encoder: Encoder, mode: str | None = None) -> None:
    """Have torch.compile run this encoder from its first call on, under the same parameter names.

    `mode` is torch.compile's.

    One graph serves all layouts of a token budget; sdpa and flash-attn are not traced, and cut it into some a layer.
    """
    # The layers' streams of dropout are constants of their graphs. Dynamo makes 8 of these before it runs the rest
    # eagerly.
    torch._dynamo.config.recompile_limit = 64
    encoder.by_modules = True
    encoder.compile(mode=mode)


def _student(resolved: Resolved, source: MaskedLM | None, generator: torch.Generator) -> MaskedLM:
    if source is None:
        return MaskedLM(resolved.student, generator=generator)
    init = resolved.config.student
    return student_from_teacher(
        source,
        resolved.layers,
        resolved.student,
        # A model that goes on training keeps its head. A student starts with a fresh transform, as the authors' did.
        copy_transform=init.copy_transform or init.init != "teacher",
        fold_token_types=init.fold_token_types,
        generator=generator,
    )


def digest(model: MaskedLM) -> str:
    """SHA-256 of what a model computes: its tensors in fp32, heads, epsilon, windows, whatever the format of its files.

    0.6 s for the 440 MB of a BERT-base, on every rank alike.
    """
    shape = model.architecture
    found = hashlib.sha256(f"{shape.num_heads} {shape.layer_norm_eps}".encode())
    if shape.rotates:
        windows = [shape.window(layer) for layer in range(shape.num_layers)]
        found.update(f"{windows} {shape.global_theta} {shape.local_theta}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy())
    return found.hexdigest()


def require_same(ranks: Ranks, inputs: Mapping[str, str | None]) -> None:
    """Raises ValueError, on every rank alike, where ranks have read other files: hosts may have copies of their own."""
    first, *others = (json.loads(said) for said in ranks.gather_text(json.dumps(inputs), with_teachers=True))
    for rank, other in enumerate(others, start=1):
        for option in first.keys() & other.keys():
            if first[option] != other[option]:
                raise ValueError(
                    f"--{option} is not the same on rank 0 and rank {rank} (SHA-256 {first[option]!s:.12} and "
                    f"{other[option]!s:.12}): copy it to every machine again"
                )
