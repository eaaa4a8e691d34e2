"""Everything that can be refused before torch is imported: folders, vocabularies, sizes, the run folder.

`resolve` turns a configuration with gaps into what the run will really use, or raises with what was wanted, what was got and what to do.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from fastdistil.data import tokenizer
from fastdistil.data.shards import Meta, read_meta
from fastdistil.model.architecture import Architecture, read_architecture
from fastdistil.run import folder as run_folder
from fastdistil.run.config import Config, LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A configuration that was found consistent, with what follows from it."""

    config: Config
    teacher: Architecture | None
    source: Architecture | None  # of the model that the student takes its weights from
    source_path: Path | None
    layers: tuple[int, ...]  # which layers of the source; empty for random weights
    student: Architecture
    meta: Meta
    tokenizer_path: Path
    micro_batches_per_update: int

    @property
    def imitated_layers(self) -> tuple[int, ...]:
        """For each layer of the student the one of the teacher that it began as, or would have, at the same relative depth."""
        if self.teacher is None:
            return ()
        if self.config.student.init == "teacher":
            return self.layers
        return spread(self.student.num_layers, self.teacher.num_layers)


def resolve(config: Config, *, world_size: int, by_torchrun: bool = True) -> Resolved:
    """Check the configuration against the files it names. Reads only small files.

    Raises ValueError or FileNotFoundError.
    """
    if config.data.shards is None:
        raise ValueError("--data.shards is missing: give a folder written by `python -m fastdistil.prepare`")
    if config.world_size is not None:
        if not config.dry_run:
            raise ValueError(
                f"--world-size {config.world_size} has no effect without --dry-run: torchrun says how many ranks a run has"
            )
        if config.world_size < 1:
            raise ValueError(f"--world-size must be 1 or more, got {config.world_size}")
        world_size = config.world_size
    if config.engine.zero_stage is not None and not (by_torchrun or config.dry_run):
        raise ValueError(
            f"--engine.zero-stage {config.engine.zero_stage} wants a process group: start with "
            "`torchrun --nproc-per-node N -m fastdistil.pretrain ...`, or leave it out for the plain engine"
        )
    _check_teacher_ranks(config, world_size, by_torchrun=by_torchrun or config.dry_run)
    if config.engine.compile and config.engine.zero_stage == 3:
        raise ValueError(
            "--engine.compile does not go with --engine.zero-stage 3, which gathers parameters in hooks that a compiled encoder "
            "does not run: use stage 2 or lower, or leave --engine.compile out"
        )
    meta = read_meta(config.data.shards)
    _check_own_tokenizer(config.data.shards / "tokenizer", meta)
    _check_losses(config)
    teacher = _read_teacher(config, meta)
    source_path, source = _source(config, teacher, meta)
    student, layers = _student(config, teacher, source, meta)
    for name, architecture in (("teacher", teacher), ("student", student)):
        if architecture is not None and meta.max_length > architecture.max_positions:
            raise ValueError(
                f"the shards hold sequences of up to {meta.max_length} tokens, the {name} reads {architecture.max_positions}: "
                f"prepare with --max-length {architecture.max_positions}"
            )
    if teacher is not None:
        _check_widths(config.loss, teacher, student)
    if config.batch.token_budget < meta.max_length:
        raise ValueError(
            f"--batch.token-budget {config.batch.token_budget} cannot hold a sequence of {meta.max_length} tokens: "
            f"use at least {-(-meta.max_length // 64) * 64}, or prepare shorter sequences"
        )
    if config.data.validation is not None:
        validation = read_meta(config.data.validation)
        _same_tokenizer(
            f"--data.validation {config.data.validation}", validation, f"--data.shards {config.data.shards}", meta
        )
        if validation.max_length > student.max_positions:
            raise ValueError(
                f"--data.validation holds sequences of up to {validation.max_length} tokens, the student reads {student.max_positions}"
            )
    resolved = Resolved(
        config=config,
        teacher=teacher,
        source=source,
        source_path=source_path,
        layers=layers,
        student=student,
        meta=meta,
        tokenizer_path=config.data.shards / "tokenizer",
        micro_batches_per_update=_micro_batches(config, meta, world_size - config.teacher.ranks),
    )
    run_folder.check(config)
    return resolved


def _check_teacher_ranks(config: Config, world_size: int, *, by_torchrun: bool) -> None:
    ranks = config.teacher.ranks
    if not ranks:
        return
    if not by_torchrun or ranks >= world_size:
        raise ValueError(
            f"--teacher.ranks {ranks} wants {ranks + 1} ranks or more, of which one trains, got {world_size}: "
            f"start with `torchrun --nproc-per-node {ranks + 1} -m fastdistil.pretrain ...`, or leave it out"
        )
    if config.teacher.path is None or config.teacher.device == "second":
        raise ValueError(
            f"--teacher.ranks {ranks} wants a teacher, on the devices of those ranks: give a --teacher.path and leave --teacher.device out"
        )


def _check_losses(config: Config) -> None:
    loss = config.loss
    distils = max(loss.kd, loss.cosine, loss.hidden, loss.values) > 0
    if config.teacher.ranks and (loss.hidden or loss.values):
        raise ValueError(
            f"--teacher.ranks {config.teacher.ranks} sends last hidden states alone, and --loss.hidden and --loss.values want more: "
            "leave out the one or the others"
        )
    if distils and config.teacher.path is None:
        raise ValueError(
            f"recipe {config.recipe} imitates a teacher and --teacher.path is missing: give a Hugging Face folder with a masked-LM head "
            "(the mlm recipe trains one), or train without a teacher by the mlm recipe"
        )
    if config.teacher.path is None and config.teacher.precision != "auto":
        raise ValueError(
            f"--teacher.precision {config.teacher.precision} has no effect without --teacher.path: leave it out"
        )
    if config.teacher.path is not None and not distils:
        raise ValueError(
            "--teacher.path has no effect with --loss.kd 0 and --loss.cosine 0 (and no --loss.hidden or --loss.values): leave it out, "
            "or give one of them a weight"
        )


def _check_widths(loss: LossConfig, teacher: Architecture, student: Architecture) -> None:
    widths = teacher.hidden_size, student.hidden_size
    for name in ("cosine", "hidden"):
        if getattr(loss, name) and widths[0] != widths[1]:
            raise ValueError(
                f"the {name} loss compares hidden states of one width, the teacher's is {widths[0]} and the student's {widths[1]}: "
                f"use --loss.{name} 0, or the teacher's width"
            )
    if loss.values and any(width % loss.relation_heads for width in widths):
        raise ValueError(
            f"--loss.relation-heads {loss.relation_heads} must divide the widths {widths[0]} of the teacher and {widths[1]} of the student: "
            f"use {math.gcd(*widths)} or a divisor of it"
        )


def _read_teacher(config: Config, meta: Meta) -> Architecture | None:
    if config.teacher.path is None:
        return None
    architecture = read_architecture(config.teacher.path)
    _matches_shards("--teacher.path", config.teacher.path, architecture, meta)
    return architecture


def _source(config: Config, teacher: Architecture | None, meta: Meta) -> tuple[Path | None, Architecture | None]:
    init = config.student.init
    if init == "random":
        return None, None
    if init == "teacher":
        if teacher is None:
            raise ValueError(
                "--student.init teacher wants a --teacher.path: without a teacher use `random` or a Hugging Face folder"
            )
        return config.teacher.path, teacher
    architecture = read_architecture(init)
    _matches_shards("--student.init", Path(init), architecture, meta)
    return Path(init), architecture


def _matches_shards(option: str, folder: Path, architecture: Architecture, meta: Meta) -> None:
    """A model reads the shards only if both mean the same by every id (recipe.md, trap 16)."""
    fix = "prepare the shards with its tokenizer: `python -m fastdistil.prepare ... --tokenizer " + str(folder) + "`"
    if architecture.vocab_size != meta.vocab_size:
        raise ValueError(
            f"{option} {folder} has a vocabulary of {architecture.vocab_size}, the shards have {meta.vocab_size}: {fix}"
        )
    if architecture.pad_id != meta.special_ids["pad"]:
        raise ValueError(
            f"{option} {folder} pads with id {architecture.pad_id}, the shards with {meta.special_ids['pad']}: {fix}"
        )
    try:
        digest = tokenizer.vocabulary_sha256(folder)
        ids = tokenizer.special_ids(folder)
    except FileNotFoundError:
        return  # weights without a tokenizer: the size is all there is to compare, and export says whose tokenizer it was
    if ids != meta.special_ids:
        raise ValueError(f"{option} {folder} has the special ids {ids}, the shards {meta.special_ids}: {fix}")
    if digest != meta.tokenizer_sha256:
        raise ValueError(
            f"{option} {folder} has a tokenizer with hash {digest[:12]}, the shards were made with {meta.tokenizer_sha256[:12]}: {fix}"
        )


def _check_own_tokenizer(folder: Path, meta: Meta) -> None:
    """The run and its export get a copy of it."""
    found = tokenizer.vocabulary_sha256(folder), tokenizer.special_ids(folder)
    if found != (meta.tokenizer_sha256, meta.special_ids):
        raise ValueError(
            f"{folder} is not the tokenizer that these shards were made with (hash {found[0][:12]}, wanted {meta.tokenizer_sha256[:12]}; "
            f"special ids {found[1]}, wanted {meta.special_ids}): prepare them again"
        )


def _same_tokenizer(name: str, meta: Meta, other_name: str, other: Meta) -> None:
    if (meta.tokenizer_sha256, meta.special_ids) != (other.tokenizer_sha256, other.special_ids):
        raise ValueError(
            f"{name} was made with tokenizer {meta.tokenizer_sha256[:12]}, {other_name} with {other.tokenizer_sha256[:12]}: prepare both with one tokenizer"
        )


def spread(num_layers: int, num_source: int) -> tuple[int, ...]:
    """`num_layers` of `num_source` layers, evenly from the first to the last: (6, 12) -> 0 2 4 7 9 11, as the authors took."""
    if num_layers == 1:
        return (0,)
    return tuple(round(i * (num_source - 1) / (num_layers - 1)) for i in range(num_layers))


def _student(
    config: Config, teacher: Architecture | None, source: Architecture | None, meta: Meta
) -> tuple[Architecture, tuple[int, ...]]:
    wanted = config.student
    model = source or teacher
    widths = {
        "hidden_size": wanted.hidden_size,
        "num_heads": wanted.num_heads,
        "ffn_size": wanted.ffn_size,
        "max_positions": wanted.max_positions,
    }
    if source is not None:
        for name, value in widths.items():
            if value is not None and value != getattr(source, name):
                raise ValueError(
                    f"--student.{name.replace('_', '-')} {value} differs from the {getattr(source, name)} of the model it starts from: leave it out, or use --student.init random"
                )
    if model is None and None in (wanted.num_layers, wanted.hidden_size, wanted.num_heads):
        raise ValueError(
            "a student from nothing needs its size: --student.num-layers, --student.hidden-size and --student.num-heads"
        )
    if wanted.layers is not None and source is None:
        raise ValueError(
            "--student.layers has no effect with --student.init random: leave it out, or use --student.num-layers"
        )
    hidden_size = wanted.hidden_size or _of(model, "hidden_size")
    same_width = model is not None and hidden_size == model.hidden_size
    if model is not None and not same_width and wanted.num_heads is None:
        raise ValueError(
            f"--student.hidden-size {hidden_size} differs from the teacher's {model.hidden_size}: give --student.num-heads too"
        )
    if wanted.layers is not None:
        num_layers = len(wanted.layers)
    elif wanted.num_layers is not None:
        num_layers = wanted.num_layers
    else:
        num_layers = max(1, _of(model, "num_layers") // 2) if teacher is not None else _of(model, "num_layers")
    layers: tuple[int, ...] = ()
    if source is not None:
        layers = wanted.layers if wanted.layers is not None else spread(num_layers, source.num_layers)
        if not layers or min(layers) < 0 or max(layers) >= source.num_layers or num_layers > source.num_layers:
            raise ValueError(
                f"--student.layers {' '.join(map(str, layers))} wants layers that the source with 0..{source.num_layers - 1} does not have"
            )
    token_types, roberta = wanted.token_types, model is not None and model.roberta
    if roberta:
        if token_types is not None:
            raise ValueError(
                f"--student.token-types {token_types} is for students of BERT and DistilBERT: those of a RoBERTa are RoBERTas, leave it out"
            )
        token_types = _of(model, "token_types")
    if token_types is None:  # a teacher in the making stays what it was; a student is a DistilBERT
        token_types = 2 if source is not None and teacher is None and source.token_types else 0
    if token_types and source is not None and not source.token_types:
        raise ValueError(
            "--student.token-types 2 wants a source with a token-type table, and it has none: leave it out, or use --student.init random"
        )
    student = Architecture(
        vocab_size=meta.vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=wanted.num_heads or _of(model, "num_heads"),
        ffn_size=wanted.ffn_size or (model.ffn_size if same_width and model is not None else 4 * hidden_size),
        max_positions=wanted.max_positions or (model.max_positions if model is not None else meta.max_length),
        token_types=token_types,
        dropout=wanted.dropout,
        attention_dropout=wanted.attention_dropout,
        layer_norm_eps=1e-12,
        pad_id=meta.special_ids["pad"],
        roberta=roberta,
    )
    same_norm = model if roberta else source if token_types else None
    if same_norm is not None:
        student = replace(student, layer_norm_eps=same_norm.layer_norm_eps)
    return student, layers


def _of(model: Architecture | None, name: str) -> int:
    assert model is not None  # checked by the caller: sizes are given where there is no model
    return getattr(model, name)


def _micro_batches(config: Config, meta: Meta, world_size: int) -> int:
    """Micro-batches an update, the same for any number of ranks."""
    tokens: float = config.batch.size
    if config.batch.unit == "sequences":
        tokens *= meta.num_tokens / meta.num_sequences
    count = max(1, round(tokens / config.batch.token_budget))
    if count < world_size:
        raise ValueError(
            f"an update of {round(tokens):,} tokens is {count} micro-batch(es) of {config.batch.token_budget:,}, which {world_size} ranks cannot divide: "
            f"use --batch.token-budget {max(64, int(tokens / world_size) // 64 * 64)} or less, a larger batch, or fewer ranks"
        )
    return count
