"""Everything that can be refused before torch is imported: folders, vocabularies, sizes, the run folder.

`resolve` turns a configuration with gaps into what the run will really use, or raises with what was wanted, what was
got and what to do. Whatever follows from that alone, and later rooms need, is a property of `Resolved`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastdistil.data import tokenizer
from fastdistil.data.shards import Meta, fetch, read_meta, together
from fastdistil.model import sentence
from fastdistil.model.architecture import Architecture, FlopsPerToken, flops_per_token, from_record
from fastdistil.remote import hub
from fastdistil.remote.storage import url_of
from fastdistil.run import folder
from fastdistil.run.command import gpu_bytes, is_installed, require
from fastdistil.run.config import LOSS_TERMS, NO_PATHS, Config
from fastdistil.training import trackers
from fastdistil.training.models import has_head, layers_and_student, read_model, read_source, spread, spread_layers

if TYPE_CHECKING:
    import torch

ENCODER_SHARE = 0.3
"""Of the head's learning rate, for a pretrained encoder whose head is fresh. 20 updates of 8,192 tokens, MiniLM-L6:
at 1 it keeps 95 % of its zero-shot STS-B, at 0.3 99 %, at 0.1 all; masked-LM loss 8.46, 8.95, 9.34."""
H100_BYTES = 80 * 2**30  # of the GPU that is meant where a dry run has none


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A configuration that was found consistent, with what follows from it."""

    config: Config
    teacher: Architecture | None
    others: tuple[Architecture, ...] = ()
    """More teachers, for the mixture of their distributions."""
    source_path: Path | None
    """The model that the student takes its weights from; None for random ones."""
    layers: tuple[int, ...]
    """Which layers of that model; empty for random weights."""
    fresh_head: bool = False
    """Whether that model has no masked-LM head, and the student gets one."""
    student: Architecture
    metas: tuple[Meta, ...]
    """Of each folder of the training shards."""
    world_size: int
    """Ranks that train."""
    micro_batches_per_update: int
    """Over all ranks, the same for any number of them."""
    pooling: sentence.Pooling | None = None
    """How the student's embeddings are made, as the teacher's; None where nobody says and no term wants them."""
    notes: tuple[str, ...]
    """What of the models is not used as it is in their folders, for the log."""
    inputs: dict[str, str | None]
    """Digests of the contents of the text, by the options that name it; of the models once they are loaded."""

    @property
    def meta(self) -> Meta:
        """Of the training shards, those of several folders as if they were one."""
        return together(self.metas)

    @property
    def drawn(self) -> tuple[float, float]:
        """Tokens and sequences of an epoch in proportion, as the weights of a mix have it."""
        return drawn(self.config, self.metas)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that the shards were made with."""
        return self.config.data.texts[0].folder / "tokenizer"

    @property
    def teachers(self) -> tuple[Architecture, ...]:
        """All of them, that of --teacher.path first."""
        return () if self.teacher is None else (self.teacher, *self.others)

    @property
    def imitated_layers(self) -> tuple[int, ...]:
        """For each student layer that of the teacher which it began as, or would have, at the same relative depth."""
        if self.teacher is None:
            return ()
        if self.config.student.init == "teacher":
            return self.layers
        if self.student.global_every == self.teacher.global_every:
            return spread_layers(self.student.num_layers, self.teacher)
        return spread(self.student.num_layers, self.teacher.num_layers)

    @property
    def relation_layer(self) -> int:
        """Of the teacher, whose relations the student imitates."""
        assert self.teacher is not None
        asked = self.config.loss.relation_layer
        return self.teacher.num_layers - 1 if asked is None else asked

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch."""
        assert self.config.batch.token_budget is not None  # resolve
        return self.config.batch.token_budget

    @property
    def micro_batches_per_rank(self) -> int:
        """Of an update; where the ranks do not divide it, some of a rank's are empty."""
        return -(-self.micro_batches_per_update // self.world_size)

    @property
    def zero_stage(self) -> int:
        """The plain engine is stage 0, on any number of ranks.

        Unless the configuration says, several ranks have stage 1, where DeepSpeed is installed.
        """
        asked = self.config.engine.zero_stage
        return asked if asked is not None else int(self.world_size > 1 and is_installed("deepspeed"))

    @property
    def head_fraction(self) -> float:
        """Share of the tokens that pass the vocabulary: all with kd on all rows, else the masked ones, or none."""
        loss = self.config.loss
        return 1.0 if loss.kd and loss.kd_rows == "all" else self.config.masking.fraction * loss.has_head

    def flops_per_token(self, attended: Callable[[int], float], *, with_heads: bool = True) -> FlopsPerToken:
        """Of a training step of all teachers and the student, for tokens that attend to so many on average, by the
        layers' windows."""
        share = self.head_fraction * with_heads
        of = partial(flops_per_token, student=self.student, attended=attended, head_fraction=share)
        return of(None)._replace(teacher=sum(of(teacher).teacher for teacher in self.teachers))

    def dtype(self, device: "torch.device") -> "torch.dtype":
        """What the arithmetic runs in: bf16 on CUDA, fp32 on CPU, unless the configuration says."""
        import torch

        on_cuda = device.type == "cuda"
        automatic = torch.bfloat16 if on_cuda else torch.float32
        return {"auto": automatic, "fp32": torch.float32, "bf16": torch.bfloat16}[self.config.engine.precision]

    def teacher_dtype(self, device: "torch.device") -> "torch.dtype":
        """What the teacher's tensors are in, which are bf16 around FP8 products.

        As the engine, unless the configuration says.
        """
        import torch

        if self.config.teacher.precision == "auto":
            return self.dtype(device)
        return torch.float32 if self.config.teacher.precision == "fp32" else torch.bfloat16


def resolve(config: Config, *, world_size: int, by_torchrun: bool = True) -> Resolved:
    """Check the configuration against the files it names. Reads only small files, and of weights the headers.

    Args:
        world_size: ranks, those of teachers included; --world-size stands for them in a dry run.
        by_torchrun: whether there is a process group.

    Raises ValueError or FileNotFoundError.
    """
    world_size = _ranks_meant(config, world_size)
    if config.data.shards is None:
        none = f"; there is no run in {config.out} to go on with" if config.resume == "auto" else ""
        raise ValueError(f"--data.shards is missing: give a folder written by `python -m fastdistil.prepare`{none}")
    trackers.chosen(config.log.to)
    _check_engine(config, world_size, by_torchrun=by_torchrun or config.dry_run)
    _check_losses(config)

    # The text, and the models that are to read it.
    config = _with_inputs_here(config)
    _check_inputs_are_here(config)
    metas = tuple(read_meta(text.folder) for text in config.data.texts)
    _check_one_tokenizer(config, metas)
    _check_two_sequences(config, metas)
    meta = together(metas)
    _check_own_tokenizer(config.data.texts[0].folder / "tokenizer", meta)
    notes: list[str] = []
    path = config.teacher.path
    teacher = read_model("--teacher.path", path, meta, notes, head=config.loss.kd > 0) if path else None
    others = tuple(read_model("--teacher.others", other, meta, notes, head=True) for other in config.teacher.others)
    record = folder.resumed(config)
    if record and folder.has_checkpoint(config.out) and config.student.init not in NO_PATHS:
        # The checkpoint has its weights, whatever became of those that it started from.
        source_path, source, layers, student = None, None, (), from_record(record["student"])
    else:
        source_path, source = read_source(config, teacher, meta, notes)
        begun = record if record and folder.has_checkpoint(config.out) else {}
        layers, student = layers_and_student(config, begun, teacher, source, meta)
    notes += _defaults_said(config, world_size - config.teacher.ranks, source, student)
    fresh_head = student.mlm_head and source_path is not None and not has_head(source_path)
    if fresh_head and teacher is None and config.optim.encoder_lr is None and not record:
        config = _with_encoder_lr(config, notes)
    _check_widths(config, teacher, student)
    _check_nested(config, student)
    pooling = _pooling(config, meta, notes)
    if config.batch.token_budget is None:
        update_tokens = _update_tokens(config, metas)
        budget = token_budget(config, student, update_tokens, world_size - config.teacher.ranks)
        budget = max(budget, -(-meta.max_length // 64) * 64)
        config = replace(config, batch=replace(config.batch, token_budget=budget))
    _check_lengths(config, metas, teacher, others, student)
    resolved = Resolved(
        config=config,
        teacher=teacher,
        others=others,
        source_path=source_path,
        layers=layers if source else (),
        fresh_head=fresh_head,
        student=student,
        metas=metas,
        world_size=world_size - config.teacher.ranks,
        micro_batches_per_update=_micro_batches(config, metas, world_size - config.teacher.ranks),
        pooling=pooling,
        notes=(*notes, *_without_effect(config, student)),
        inputs={
            "data.shards": _digest(config, meta),
            "data.validation": read_meta(config.data.validation).digest if config.data.validation else None,
        },
    )
    folder.check(config, resolved.inputs)
    return resolved


def _digest(config: Config, meta: Meta) -> str:
    """Of the text; that of a mix knows its weights, too."""
    weights = config.data.weights
    return hashlib.sha256(f"{meta.digest} {weights}".encode()).hexdigest() if weights else meta.digest


def drawn(config: Config, metas: tuple[Meta, ...]) -> tuple[float, float]:
    """Tokens and sequences of an epoch in proportion, as the weights of a mix have it."""
    weights = config.data.weights
    if weights is None:
        return sum(meta.num_tokens for meta in metas), sum(meta.num_sequences for meta in metas)
    return sum(weights), sum(w * m.num_sequences / m.num_tokens for w, m in zip(weights, metas, strict=True))


def _ranks_meant(config: Config, world_size: int) -> int:
    if config.world_size is None:
        return world_size
    if not config.dry_run:
        raise ValueError(
            f"--world-size {config.world_size} has no effect without --dry-run: torchrun says how many ranks a run has"
        )
    if config.world_size < 1:
        raise ValueError(f"--world-size must be 1 or more, got {config.world_size}")
    return config.world_size


def _defaults_said(
    config: Config, num_students: int, source: Architecture | None, student: Architecture
) -> Iterator[str]:
    """What a reader of the log should know of what was not asked for."""
    if source is not None and 0 < source.token_types != student.token_types > 0:
        yield (
            f"--student.token-types {student.token_types}, of a model with {source.token_types}: their first rows are "
            "copied, and others start as its row 0, the type of every token"
        )
    if num_students > 1 and config.engine.zero_stage is None and not is_installed("deepspeed"):
        yield (
            "DeepSpeed is not installed: every rank keeps the optimiser's state of the whole student (ZeRO stage 0); "
            'pip install "fastdistil[deepspeed]" shares it between the ranks'
        )


def _with_inputs_here(config: Config) -> Config:
    """With folders of this machine in the place of URLs of shards, and of models' names on the hub.

    A run that goes on has the weights that it started from.
    """
    data, teacher, student = config.data, config.teacher, config.student
    texts = []
    for text in data.texts:
        url = url_of(text.folder)
        there = text.folder if url is None else fetch("--data.shards", url, data.cache)
        texts.append(str(there) if text.weight is None else f"{there}:{text.weight!r}")
    data = replace(data, shards=tuple(texts))
    if data.validation is not None and (url := url_of(data.validation)) is not None:
        data = replace(data, validation=fetch("--data.validation", url, data.cache))
    if teacher.path is not None:
        others = tuple(hub.folder_of("--teacher.others", path) for path in teacher.others)
        teacher = replace(teacher, path=hub.folder_of("--teacher.path", teacher.path), others=others)
    if student.init not in NO_PATHS and not folder.has_checkpoint(config.out):
        student = replace(student, init=str(hub.folder_of("--student.init", student.init)))
    return replace(config, data=data, teacher=teacher, student=student)


def _check_inputs_are_here(config: Config) -> None:
    """Of a run that goes on: its configuration may come from another machine."""
    named = [("data.shards", text.folder) for text in config.data.texts]
    named += [("data.validation", config.data.validation), ("teacher.path", config.teacher.path)]
    named += [("teacher.others", path) for path in config.teacher.others]
    for option, path in named:
        if path is not None and not path.exists() and folder.resumed(config):
            raise ValueError(
                f"--{option} {path} is not here, and the run in {config.out} wants it to go on: give --{option} where "
                "it lies now; it is known by its contents"
            )


def _check_engine(config: Config, world_size: int, *, by_torchrun: bool) -> None:
    stage, ranks = config.engine.zero_stage, config.teacher.ranks
    if stage and not config.dry_run:
        require(f"--engine.zero-stage {stage}", "deepspeed", "deepspeed")
    if stage and not by_torchrun:
        raise ValueError(
            f"--engine.zero-stage {stage} wants a process group: start with "
            "`torchrun --nproc-per-node N -m fastdistil.pretrain ...`, or leave it out for the plain engine"
        )
    if stage == 3 and config.engine.compile:
        raise ValueError(
            "--engine.compile does not go with --engine.zero-stage 3, which gathers parameters in hooks that a "
            "compiled encoder does not run: use stage 2 or lower, or leave --engine.compile out"
        )
    if ranks and (not by_torchrun or ranks >= world_size):
        raise ValueError(
            f"--teacher.ranks {ranks} wants {ranks + 1} ranks or more, of which one trains, got {world_size}: "
            f"start with `torchrun --nproc-per-node {ranks + 1} -m fastdistil.pretrain ...`, or leave it out"
        )
    if ranks and (config.teacher.path is None or config.teacher.device == "second"):
        raise ValueError(
            f"--teacher.ranks {ranks} wants a teacher, on the devices of those ranks: give a --teacher.path and leave "
            "--teacher.device out"
        )


def _check_losses(config: Config) -> None:
    teacher, terms = config.teacher, config.loss.terms
    distils = any(term.wants != "nothing" for term in terms)
    beyond = [f"--loss.{term.name}" for term in terms if term.wants in ("layers", "qkv")]
    if teacher.ranks and beyond:
        raise ValueError(
            f"--teacher.ranks {teacher.ranks} sends last hidden states alone, and {' and '.join(beyond)} want more: "
            "leave out the one or the others"
        )
    if config.loss.kd_rows != "all" and not config.loss.kd:
        raise ValueError(
            f"--loss.kd-rows {config.loss.kd_rows} has no effect: give --loss.kd a weight, or leave it out"
        )
    if config.loss.relation_layer is not None and not any(term.wants == "qkv" for term in terms):
        raise ValueError(
            f"--loss.relation-layer {config.loss.relation_layer} has no effect: give --loss.queries, --loss.keys or "
            "--loss.values a weight (recipe minilm does), or leave it out"
        )
    if distils and teacher.path is None:
        raise ValueError(
            f"recipe {config.recipe} imitates a teacher ({_weights(config)}) and --teacher.path is missing: give a "
            f"Hugging Face folder{' with a masked-LM head (the mlm recipe trains one)' * bool(config.loss.kd)}, or "
            "train without a teacher by the mlm recipe"
        )
    if config.loss.has_head and not config.masking.fraction:
        raise ValueError(
            f"--masking.fraction 0 leaves nothing to predict, and {_weights(config)} wants masked tokens: use 0.15, or "
            "give --loss.kd and --loss.mlm no weight"
        )
    if teacher.others and (teacher.path is None or not config.loss.kd):
        raise ValueError(
            f"--teacher.others {' '.join(map(str, teacher.others))} has no effect without --teacher.path and a weight "
            "of --loss.kd, the one term that compares distributions: give both, or leave it out"
        )
    if teacher.path is None and teacher.precision != "auto":
        raise ValueError(f"--teacher.precision {teacher.precision} has no effect without --teacher.path: leave it out")
    if teacher.path is not None and not distils:
        raise ValueError(
            f"--teacher.path has no effect in recipe {config.recipe} with {_weights(config)} alone: leave it out, or "
            f"give one of {' '.join(f'--loss.{t.name}' for t in LOSS_TERMS if t.wants != 'nothing')} a weight (recipe "
            "distilbert does)"
        )


def _weights(config: Config) -> str:
    return ", ".join(f"--loss.{term.name} {config.loss.weight(term):g}" for term in config.loss.terms)


def _check_widths(config: Config, teacher: Architecture | None, student: Architecture) -> None:
    if teacher is None:
        return
    loss, widths = config.loss, (teacher.hidden_size, student.hidden_size)
    for term in loss.terms:
        if term.same_width and widths[0] != widths[1] and not student.embedding_size:
            raise ValueError(
                f"the {term.name} loss compares hidden states of one width, the teacher's is {widths[0]} and the "
                f"student's {widths[1]}: use --student.projection, --loss.{term.name} 0, or the teacher's width"
            )
    if not any(term.wants == "qkv" for term in loss.terms):
        return
    if any(width % loss.relation_heads for width in widths):
        raise ValueError(
            f"--loss.relation-heads {loss.relation_heads} must divide the widths {widths[0]} of the teacher and "
            f"{widths[1]} of the student: use {math.gcd(*widths)} or a divisor of it"
        )
    if loss.relation_layer is not None and loss.relation_layer >= teacher.num_layers:
        raise ValueError(
            f"--loss.relation-layer must be a layer of the teacher, from 0 to {teacher.num_layers - 1}, got "
            f"{loss.relation_layer}"
        )


def _check_nested(config: Config, student: Architecture) -> None:
    """Students within the student."""
    loss, width = config.loss, student.embedding_size or student.hidden_size
    nested = {
        "layers": (loss.nested_layers, student.num_layers, loss.embedding or loss.similarity, "--loss.embedding"),
        "dimensions": (loss.nested_dimensions, width, loss.similarity, "--loss.similarity"),
    }
    for name, (asked, whole, weight, option) in nested.items():
        if asked and not weight:
            raise ValueError(f"--loss.nested-{name} has no effect without {option}: give that a weight, e.g. 1")
        if not all(1 <= n < whole for n in asked):
            raise ValueError(
                f"--loss.nested-{name} must be fewer than the student's {whole}, and 1 or more, got "
                f"{' '.join(map(str, asked))}"
            )


def _without_effect(config: Config, student: Architecture) -> Iterator[str]:
    """A note on each setting that changes nothing here."""
    loss, teacher = config.loss, config.teacher
    embeds = not loss.has_head or any(term.wants == "embedding" for term in loss.terms)
    settings = {
        "--teacher.pooling": (teacher.pooling is not None and not embeds, "no term reads embeddings"),
        "--teacher.normalise": (teacher.normalise is not None and not embeds, "no term reads embeddings"),
        "--loss.embedding-distance": (
            loss.embedding_distance != "cosine" and not loss.embedding,
            "--loss.embedding is 0",
        ),
        "--student.fold-token-types": (
            config.student.fold_token_types and student.token_types > 0,
            "the student has a table of token types of its own",
        ),
        "--student.freeze-positions": (
            config.student.freeze_positions and student.rotates,
            "the student has no table of positions, it rotates queries and keys",
        ),
    }
    for name, (is_idle, why) in settings.items():
        if is_idle:
            yield f"{name} has no effect: {why}"


def _pooling(config: Config, meta: Meta, notes: list[str]) -> sentence.Pooling | None:
    """How embeddings are made of hidden states. Raises ValueError where a term wants them and nobody says."""
    path, asked = config.teacher.path, config.teacher
    wanted = [f"--loss.{term.name}" for term in config.loss.terms if term.wants == "embedding"]
    if path is None or (config.loss.has_head and not wanted):
        return None
    try:
        found = sentence.read_pooling(path)
    except (ValueError, OSError) as error:
        if asked.pooling is None and wanted:
            raise ValueError(f"--teacher.path: {error}") from None
        instead = f"--teacher.pooling {asked.pooling} stands instead" if asked.pooling else "the student has no pooling"
        notes.append(f"--teacher.path: {error}; {instead}")
        found = None
    mode = asked.pooling or (found and found.mode)
    if mode is None:
        if not wanted:
            return None
        raise ValueError(
            f"{' and '.join(wanted)} read{'s' * (len(wanted) == 1)} the embeddings of --teacher.path {path}, which "
            "does not say how they are made of its hidden states (no modules.json): give --teacher.pooling mean or "
            "cls, as its authors do"
        )
    longest = found.max_length if found else None
    if longest is not None and meta.max_length > longest:
        notes.append(
            f"--teacher.path {path} embeds texts of up to {longest} tokens, the shards have sequences of up to "
            f"{meta.max_length}: prepare with --max-length {longest} what it will see"
        )
    normalise = asked.normalise if asked.normalise is not None else found is None or found.normalise
    return sentence.Pooling(mode=mode, normalise=normalise, max_length=longest)


def _texts(config: Config, metas: tuple[Meta, ...]) -> list[tuple[str, Path, Meta]]:
    """Option, folder and meta.json of all text, that of training first."""
    texts = [("--data.shards", text.folder, meta) for text, meta in zip(config.data.texts, metas, strict=True)]
    if config.data.validation is not None:
        texts.append(("--data.validation", config.data.validation, read_meta(config.data.validation)))
    return texts


def _check_one_tokenizer(config: Config, metas: tuple[Meta, ...]) -> None:
    (_, first, meta), *others = _texts(config, metas)
    for option, path, other in others:
        if (meta.tokenizer_sha256, meta.special_ids) != (other.tokenizer_sha256, other.special_ids):
            raise ValueError(
                f"{option} {path} was made with tokenizer {other.tokenizer_sha256[:12]}, --data.shards {first} with "
                f"{meta.tokenizer_sha256[:12]}: prepare both with one tokenizer"
            )


def _check_two_sequences(config: Config, metas: tuple[Meta, ...]) -> None:
    """One is held out where no validation text is given."""
    for text, meta in zip(config.data.texts, metas, strict=True):
        if config.data.validation is None and meta.num_sequences < 2:
            raise ValueError(
                f"{text.folder} holds {meta.num_sequences} sequence(s), too few to train on and validate with: "
                "prepare more text"
            )


def _check_lengths(
    config: Config,
    metas: tuple[Meta, ...],
    teacher: Architecture | None,
    others: tuple[Architecture, ...],
    student: Architecture,
) -> None:
    mixed = [(f"teacher {path}", model) for path, model in zip(config.teacher.others, others, strict=True)]
    longer = f", or give a longer --student.max-positions than {student.max_positions}"
    for option, path, text in _texts(config, metas):
        for name, model in (("teacher", teacher), *mixed, ("student", student)):
            if model is not None and text.max_length > model.max_positions:
                asked = name == "student" and config.student.max_positions
                raise ValueError(
                    f"{option} {path} holds sequences of up to {text.max_length} tokens, the {name} reads "
                    f"{model.max_positions}: prepare with --max-length {model.max_positions}{longer if asked else ''}"
                )
        least = -(-text.max_length // 64) * 64
        assert config.batch.token_budget is not None  # resolve
        if config.batch.token_budget < text.max_length:
            raise ValueError(
                f"--batch.token-budget {config.batch.token_budget} cannot hold a sequence of {text.max_length} tokens, "
                f"as {option} {path} has: use at least {least}, or prepare shorter sequences"
            )


def _check_own_tokenizer(path: Path, meta: Meta) -> None:
    """The run and its export get a copy of it."""
    found = tokenizer.vocabulary_sha256(path), tokenizer.special_ids(path)
    if found != (meta.tokenizer_sha256, meta.special_ids):
        raise ValueError(
            f"{path} is not the tokenizer that these shards were made with (hash {found[0][:12]}, wanted "
            f"{meta.tokenizer_sha256[:12]}; special ids {found[1]}, wanted {meta.special_ids}): prepare them again"
        )


def _with_encoder_lr(config: Config, notes: list[str]) -> Config:
    """With the rate of an encoder that knows something under a head that does not yet."""
    optim = replace(config.optim, encoder_lr=ENCODER_SHARE * config.optim.lr)
    notes.append(
        f"the encoder, which knows more than its fresh head, trains at {optim.encoder_lr:g} and the head at "
        f"{optim.lr:g}: --optim.encoder-lr chooses another rate"
    )
    return replace(config, optim=optim)


LEAST_BUDGET, MOST_BUDGET = 16384, 65536
"""Tokens of a micro-batch that are chosen: on an H100 more gain nothing that was estimated."""
ACTIVATIONS_SHARE = 1 / 4
"""Of a GPU's memory, for what the student keeps for its backward."""
UNEVEN = 0.05
"""Share of an update by which its micro-batches may miss the size asked for, or the ranks may stand idle."""


def token_budget(config: Config, student: Architecture, update_tokens: float, world_size: int) -> int:
    """Tokens of a micro-batch where nobody says: large ones keep a GPU busy, and there must be enough for all ranks."""
    assumed = config.engine.device == "cuda" or (config.engine.device == "auto" and config.world_size is not None)
    memory = None if config.engine.device == "cpu" else gpu_bytes() or (H100_BYTES if assumed else None)
    if memory is None:
        return LEAST_BUDGET
    kept = 8 * student.hidden_size + (2 + student.family.gated) * student.ffn_size
    bytes_per_token = 2 * student.num_layers * kept
    budget = MOST_BUDGET
    while budget > LEAST_BUDGET:
        count = max(1, round(update_tokens / budget))
        rounds = -(-count // world_size)
        missed = abs(count * budget / update_tokens - 1)
        idle = rounds * world_size / count - 1
        fits = budget * bytes_per_token <= ACTIVATIONS_SHARE * memory
        if fits and missed <= UNEVEN and idle <= UNEVEN:
            break
        budget //= 2
    return budget


def _update_tokens(config: Config, metas: tuple[Meta, ...]) -> float:
    """Tokens of an update, as asked for."""
    if config.batch.unit == "sequences":
        num_tokens, num_sequences = drawn(config, metas)
        return config.batch.size * num_tokens / num_sequences
    return config.batch.size


def _micro_batches(config: Config, metas: tuple[Meta, ...], world_size: int) -> int:
    """Micro-batches an update, the same for any number of ranks."""
    tokens, budget = _update_tokens(config, metas), config.batch.token_budget
    assert budget is not None  # resolve
    count = max(1, round(tokens / budget))
    if count < world_size:
        least = -(-max(meta.max_length for meta in metas) // 64) * 64  # a sequence must fit
        smaller = max(least, int(tokens / world_size) // 64 * 64)
        fits = round(tokens / smaller) >= world_size
        fix = f"--batch.token-budget {smaller} or less, a larger --batch.size" if fits else "a larger --batch.size"
        raise ValueError(
            f"--batch.size {config.batch.size} {config.batch.unit} is an update of {round(tokens):,} tokens, {count} "
            f"micro-batch(es) of {budget:,}, which {world_size} ranks cannot divide: use {fix}, or fewer ranks"
        )
    return count
