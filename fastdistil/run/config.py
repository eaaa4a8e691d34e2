"""What a run is: frozen, validated dataclasses. Standard library only, so that errors come before torch.

The command line is made from these fields by tyro; the docstring under a field is its help text. A field that is
`None` is resolved by preflight.py (from the teacher, the shards or the machine) and saved resolved with the run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """What a number must be, in the words of the error; stands beside the type of its field."""

    wanted: str
    holds: Callable[[Any], bool]


AT_LEAST_0 = Range("0 or more", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = Range("1 or more", lambda x: 1 <= x < math.inf)
ABOVE_0 = Range("above 0", lambda x: 0 < x < math.inf)
BELOW_1 = Range("in [0, 1)", lambda x: 0 <= x < 1)
ALL_ABOVE_0 = Range("numbers above 0", lambda x: all(0 < w < math.inf for w in x))
BOTH_BELOW_1 = Range("two numbers in [0, 1)", lambda x: all(0 <= b < 1 for b in x))
Interval = int | str
"""How often: updates, or a time."""
_TIME = re.compile("(?=.*[1-9])([0-9]{1,6}(?:[.][0-9]{1,3})?)(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
AN_INTERVAL = Range(
    "a time (30s, 15min, 1.5h) or a number of updates (1 or more)",
    lambda x: x >= 1 if isinstance(x, int) else _TIME.fullmatch(x) is not None,
)


def updates_and_seconds(interval: Interval) -> tuple[float, float]:
    """What an interval within AN_INTERVAL says; infinite is the one that it does not speak of."""
    if isinstance(interval, int):
        return interval, math.inf
    time = _TIME.fullmatch(interval)
    assert time is not None
    return math.inf, float(time[1]) * _SECONDS[time[2]]


@functools.cache
def _ranges(section: type) -> dict[str, Range]:
    hints = get_type_hints(section, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


class _Section:
    """Checks the ranges of its fields when it is made. None, where a field may be it, is in every range."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, (wanted, holds) in _ranges(type(self)).items():
            value = getattr(self, name)
            _check(value is None or holds(value), self, name, wanted)
        self._check_together()

    def _check_together(self) -> None:
        """What fields must be to one another."""


def _check(ok: bool, section: _Section, name: str, wanted: str, got: object = None) -> None:
    if not ok:
        prefix = type(section).__name__.removesuffix("Config").lower()  # "" for Config itself
        option = f"{prefix}.{name}".strip(".").replace("_", "-")
        raise ValueError(f"--{option} must be {wanted}, got {getattr(section, name) if got is None else got!r}")


class Text(NamedTuple):
    """A folder of --data.shards."""

    folder: Path
    weight: float | None
    """Its share of the tokens, as a part of the sum of all weights."""


_WEIGHTED = re.compile(r"(.+):([-+]?(?:[0-9]+[.]?[0-9]*|[.][0-9]+)(?:[eE][-+]?[0-9]+)?)", re.DOTALL)


def _text(word: str) -> Text:
    """FOLDER or FOLDER:WEIGHT; what is there under the whole word is a folder whose name has a colon."""
    found = _WEIGHTED.fullmatch(word)
    if found is None or Path(word).exists():
        return Text(Path(word), None)
    return Text(Path(found[1]), float(found[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    """The text, as folders written by `python -m fastdistil.prepare`."""

    shards: tuple[str, ...] | None = None
    """Folder of prepared shards to train on, or its URL (s3://bucket/wiki); or several as a mix: all with a weight,
    their share of the tokens (wiki:0.7 pubmed:0.3), or none, which reads every sequence once an epoch."""
    validation: Path | None = None
    """Folder of prepared shards to validate on; without it the last `validation-sequences` of --data.shards are held
    out, of a mix as many of each folder as its share."""
    validation_sequences: Annotated[int, AT_LEAST_1] = 1024
    """Sequences used for validation, from the end of the folder; never trained on. At most a tenth of the training
    shards, of a mix of each folder."""
    num_workers: Annotated[int | None, AT_LEAST_0] = None
    """Processes that mask and pack ahead of the device; 0 does it in the training process. None: 2 beside a GPU, 0 on
    a CPU, whose cores they would take. Never changes results."""
    cache: Path | None = None
    """Where shards that lie at a URL are copied to; a disk of this machine is best. None: ~/.cache/fastdistil."""
    verify: bool = True
    """Compare the SHA-256 of every shard with meta.json at the start; each rank hashes its part."""

    def _check_together(self) -> None:
        if self.shards is None:
            return
        given = " ".join(self.shards)
        folders = [text.folder for text in self.texts]
        _check(bool(folders), self, "shards", "one folder or more", "none")
        _check(len({*folders}) == len(folders), self, "shards", "different folders", given)
        weights = [text.weight for text in self.texts if text.weight is not None]
        _check(len(weights) in (0, len(folders)), self, "shards", "folders that all have a weight, or none", given)
        _check(all(0 < w < math.inf for w in weights), self, "shards", "folders with weights above 0", given)

    @property
    def texts(self) -> tuple[Text, ...]:
        """What --data.shards names; nothing where it is missing."""
        return tuple(map(_text, self.shards or ()))

    @property
    def weights(self) -> list[float] | None:
        """Of the folders, where they have any."""
        found = [text.weight for text in self.texts if text.weight is not None]
        return found or None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig(_Section):
    """What one update averages over, whatever the number of ranks."""

    size: Annotated[int, AT_LEAST_1] = 4000
    """Sequences (or tokens) an update, about: an update is a whole number of packed micro-batches."""
    unit: Literal["sequences", "tokens"] = "sequences"
    """What --batch.size counts."""
    token_budget: Annotated[int | None, Range("a positive multiple of 64", lambda x: x >= 64 and x % 64 == 0)] = None
    """Tokens of one packed micro-batch; a multiple of 64, and at least one whole sequence. None: 16384 on a CPU; on a
    GPU up to 65536, as its memory and --batch.size have room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig(_Section):
    """The frozen model that is imitated."""

    path: Path | None = None
    """Hugging Face folder of a BERT, DistilBERT, RoBERTa or ModernBERT, or its name on the hub (NAME, NAME@REVISION),
    with a masked-LM head where --loss.kd has a weight. None trains without a teacher (recipe mlm)."""
    others: tuple[Path, ...] = ()
    """More teachers of the same tokenizer, of any size and family, whose distributions are averaged with that of
    --teacher.path for --loss.kd. The other terms, and what a student starts from, know --teacher.path alone."""
    weights: Annotated[tuple[float, ...] | None, ALL_ABOVE_0] = None
    """What each teacher counts in that average, --teacher.path first: 2 1 is two parts of it and one of the other.
    None: all alike."""
    pooling: Literal["mean", "cls"] | None = None
    """How its last hidden states become the embedding of a text. None: as its folder says (sentence-transformers)."""
    normalise: bool | None = None
    """Whether its embeddings have length 1. None: as its folder says, or yes."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Arithmetic of the teacher. auto: as --engine.precision; fp8: on GPUs of compute capability 8.9 and newer."""
    max_drift: Annotated[float, ABOVE_0] = 0.05
    """Largest mean KL, in nats a token of validation text, of the teacher's distribution in --teacher.precision from
    its own in fp32, or 1 - cos of its hidden states where no head is run; beyond it the run is refused."""
    check: Literal["refuse", "warn"] = "refuse"
    """What becomes of a teacher that knows nothing: one whose own masked-LM loss on validation text is near
    ln(vocabulary) or not a number, for want of trained weights or for another tokenizer."""
    overlap: bool = True
    """On CUDA, infer beside the student: in a CUDA graph during its forward, else the next micro-batch ahead, on a side
    stream, where that is faster. Never changes results."""
    device: Literal["same", "second"] = "same"
    """second: on another GPU than the student's, local rank + processes of this machine."""
    ranks: Annotated[int, AT_LEAST_0] = 0
    """Set aside the last so many ranks for teachers, which send hidden states to the others. 0: every rank infers for
    itself."""

    def _check_together(self) -> None:
        count, given = 1 + len(self.others), self.weights
        _check(given is None or count > 1, self, "weights", "left out without --teacher.others")
        _check(given is None or len(given) == count, self, "weights", f"{count} numbers, one a teacher")

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all teachers, that of --teacher.path first; empty without one."""
        return () if self.path is None else (self.path, *self.others)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(_Section):
    """The model that is trained, and what it starts from."""

    init: str = "teacher"
    """Where the weights start: `teacher` (layers of it), `random`, or a Hugging Face folder or name on the hub (layers
    of that)."""
    family: str | None = None
    """Of a student with random weights: what it is, by the model_type of config.json (modernbert, bert, ...). None: as
    its teacher, without one a DistilBERT."""
    num_layers: Annotated[int | None, AT_LEAST_1] = None
    """Layers of the student. None: half of the model it starts from (all of it for a folder without a teacher)."""
    layers: tuple[int, ...] | None = None
    """Which layers it takes. None: evenly spread from the first to the last ([0 2 4 7 9 11] for 6 of 12); of a
    ModernBERT each in the place of one that sees as much ([0 2 4 6 8 11 12 14 17 18 20] for 11 of 22)."""
    copy_transform: bool = False
    """Take the dense layer and LayerNorm of the masked-LM head too, not only its bias."""
    freeze_positions: bool = False
    """Do not train the position embeddings (the authors' run did not, by accident of a flag)."""
    hidden_size: Annotated[int | None, AT_LEAST_1] = None
    """Width. None: as the model it starts from, or as the teacher."""
    num_heads: Annotated[int | None, AT_LEAST_1] = None
    """Attention heads. None: as the model it starts from, or as the teacher."""
    ffn_size: Annotated[int | None, AT_LEAST_1] = None
    """Width of the feed-forward layer. None: as the source, or 4 x hidden-size (of a ModernBERT 1.5 x, with gates)."""
    max_positions: Annotated[int | None, AT_LEAST_1] = None
    """Longest sequence it can read. None: as the source, or the longest sequence of the shards."""
    token_types: Annotated[int | None, AT_LEAST_0] = None
    """Rows of the token-type table: with some it exports a BERT, with 0 a DistilBERT. None: 0, or as the folder that
    goes on training without a teacher."""
    fold_token_types: bool = False
    """Add the token type of the model it starts from to the positions, where it has no table of its own: the same
    numbers. The authors' student lost it."""
    projection: bool = False
    """A linear map of its hidden states to the teacher's width, where the widths differ, for terms that compare
    vectors."""
    dropout: Annotated[float, BELOW_1] = 0.1
    """Dropout after embeddings, attention and feed-forward."""
    attention_dropout: Annotated[float, BELOW_1] = 0.1
    """Dropout of the attention probabilities, and in a ModernBERT of what its attention returns."""

    def _check_together(self) -> None:
        if self.layers is not None and self.num_layers is not None:
            _check(len(self.layers) == self.num_layers, self, "layers", f"{self.num_layers} numbers")


Counted = Literal["tokens", "masked tokens", "sequences"]
"""What of an update is counted, and a term may be a mean over."""


class LossTerm(NamedTuple):
    """What the whole program knows of one term of the loss.

    Its function, of the same name, is in training/objective.py.
    """

    name: str
    """The field of LossConfig that holds its weight, and its key in metrics.jsonl."""
    title: str
    """What the report calls it, with its unit."""
    formula: str
    """What the model card multiplies by the weight; may name fields of LossConfig in braces."""
    mean_over: Counted = "tokens"
    """What the sum over a whole update is divided by, unless LossConfig.mean_over says otherwise."""
    wants: Literal["nothing", "logits", "last hidden states", "layers", "qkv", "embedding"] = "last hidden states"
    """What the teacher hands over for it: layers are the outputs of the imitated layers, qkv the queries, keys and
    values of the attention of one layer, the embedding is pooled from the last hidden states."""
    same_width: bool = False
    """Whether it compares vectors of teacher and student, which then must have one width."""


LOSS_TERMS = (
    LossTerm(
        "kd",
        title="KD: T²KL to the teacher, nats a token",
        formula="T² KL(teacher, student) at temperature {temperature} over {kd_rows} tokens",
        wants="logits",
    ),
    LossTerm(
        "mlm",
        title="masked LM: cross-entropy, nats a masked token",
        formula="cross-entropy of the masked tokens",
        mean_over="masked tokens",
        wants="nothing",
    ),
    LossTerm(
        "cosine",
        title="1 - cos of the last hidden states",
        formula="(1 - cos) of the last hidden states",
        same_width=True,
    ),
    LossTerm(
        "hidden",
        title="1 - cos of the outputs of every layer",
        formula="(1 - cos) of the outputs of every layer",
        wants="layers",
        same_width=True,
    ),
    *(
        LossTerm(
            name,
            title=f"KL of the {one} relations (MiniLMv2), nats a token",
            formula=f"KL of the {one} relations (MiniLMv2)",
            wants="qkv",
        )
        for name, one in (("queries", "query"), ("keys", "key"), ("values", "value"))
    ),
    LossTerm(
        "embedding",
        title="distance of the pooled embeddings, a sequence",
        formula="{embedding_distance} distance of the pooled embeddings",
        mean_over="sequences",
        wants="embedding",
        same_width=True,
    ),
    LossTerm(
        "similarity",
        title="squared error of the similarities of embeddings, a pair",
        formula="squared error of the cosine similarities of all pairs of a micro-batch",
        mean_over="sequences",
        wants="embedding",
    ),
)
MASKED_AGREEMENT = "top-1 agreement with the teacher on masked tokens"
COUNTED: tuple[Counted, ...] = get_args(Counted)
"""In this order wherever they are numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(_Section):
    """L = kd * T^2 * KL + mlm * cross-entropy + cosine * (1 - cos), each a mean over the whole update."""

    kd: Annotated[float, AT_LEAST_0] = 5.0
    """Weight of the temperature-KL to the teacher, over the tokens of --loss.kd-rows. Without a teacher it has no
    effect."""
    kd_rows: Literal["all", "masked"] = "all"
    """Tokens that this KL is a mean over. masked: those that are predicted alone (the authors' restrict_ce_to_mask),
    and the vocabularies of both models are run on no others."""
    mlm: Annotated[float, AT_LEAST_0] = 2.0
    """Weight of the masked-LM cross-entropy, over the masked tokens."""
    cosine: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of 1 - cos(student, teacher) of the last hidden states, over every real token."""
    temperature: Annotated[float, ABOVE_0] = 2.0
    """Temperature of the KL; T^2 is part of the term."""
    hidden: Annotated[float, AT_LEAST_0] = 0.0
    """Beyond the paper: weight of 1 - cos of the outputs of every student layer and of the teacher layer it began
    as."""
    queries: Annotated[float, AT_LEAST_0] = 0.0
    """Beyond the paper: weight of the KL of the relations among a sequence's queries (MiniLMv2); widths may differ."""
    keys: Annotated[float, AT_LEAST_0] = 0.0
    """Likewise among its keys."""
    values: Annotated[float, AT_LEAST_0] = 0.0
    """Likewise among its values."""
    relation_heads: Annotated[int, AT_LEAST_1] = 12
    """Heads that queries, keys and values are cut into for these relations; divides both widths."""
    relation_layer: Annotated[int | None, AT_LEAST_0] = None
    """Which layer of the teacher, counted from 0, has the relations that the student's last layer imitates. None: the
    last."""
    embedding: Annotated[float, AT_LEAST_0] = 0.0
    """Beyond the paper: weight of the distance of the pooled embeddings of a sequence."""
    embedding_distance: Literal["cosine", "l2"] = "cosine"
    """cosine: 1 - cos; l2: the squared distance, of embeddings as the teacher hands them out."""
    similarity: Annotated[float, AT_LEAST_0] = 0.0
    """Beyond the paper: weight of the squared error of the cosine similarities of the embeddings of all pairs of
    sequences of a micro-batch; widths may differ."""
    nested_layers: tuple[int, ...] = ()
    """Make the student several in one: its first so many layers are held to the teacher's embeddings, too, by the terms
    above, and `export --layers` takes them."""
    nested_dimensions: tuple[int, ...] = ()
    """Likewise the first so many dimensions of its embeddings (Matryoshka), by --loss.similarity; `export --dimensions`
    takes them."""

    def _check_together(self) -> None:
        if not self.terms:
            raise ValueError("--loss must be at least one weight above 0, got 0")

    def weight(self, term: LossTerm) -> float:
        """What `term` is multiplied by."""
        return getattr(self, term.name)

    def mean_over(self, term: LossTerm) -> Counted:
        """What the sum of `term` over a whole update is divided by: one of COUNTED."""
        return "masked tokens" if term.name == "kd" and self.kd_rows == "masked" else term.mean_over

    @property
    def has_head(self) -> bool:
        """Whether the student has a masked-LM head: without weights of its terms none is built or run."""
        return bool(self.kd or self.mlm)

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms whose weight is above 0."""
        return tuple(term for term in LOSS_TERMS if self.weight(term))


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig(_Section):
    """Which tokens are predicted (as the authors chose them)."""

    fraction: Annotated[float, Range("in [0, 0.4]", lambda x: 0 <= x <= 0.4)] = 0.15
    """Share of the real tokens of a micro-batch that is predicted; 0 masks nothing."""
    keep: Annotated[float, AT_LEAST_0] = 0.1
    """Of these, the share left as it is."""
    random: Annotated[float, AT_LEAST_0] = 0.1
    """Of these, the share replaced by a random word piece; the rest becomes [MASK]."""
    smoothing: Annotated[float, AT_LEAST_0] = 0.7
    """Tokens are drawn with probability ~ max(count, 1)^-smoothing; 0 draws uniformly."""

    def _check_together(self) -> None:
        _check(self.keep + self.random <= 1, self, "keep", "at most 1 together with random", (self.keep, self.random))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Section):
    """AdamW, linear warm-up, linear decay to zero."""

    lr: Annotated[float, Range("in (0, 1)", lambda x: 0 < x < 1)] = 5e-4
    """Highest learning rate, reached at the end of the warm-up."""
    encoder_lr: Annotated[float | None, BELOW_1] = None
    """That of the encoder, word embeddings included. None: --optim.lr; 0.3 of it where an encoder goes on training
    without a teacher and its head is fresh."""
    betas: Annotated[tuple[float, float], BOTH_BELOW_1] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: Annotated[float, ABOVE_0] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.0
    """Decoupled; not applied to biases and LayerNorm."""
    clip_norm: Annotated[float, AT_LEAST_0] = 5.0
    """Global norm that gradients are scaled down to; 0 does not clip."""
    warmup: Annotated[float, BELOW_1] = 0.05
    """Share of the updates over which the rate rises."""
    duration: Annotated[float, ABOVE_0] = 3.0
    """How long the run is, in --optim.unit. A resumed run may be made longer: from the update where it is, its rate
    then follows the schedule of the longer run, warm-up included."""
    unit: Literal["epochs", "updates"] = "epochs"
    """What --optim.duration counts: passes over the shards, or updates."""

    def _check_together(self) -> None:
        whole = self.unit == "epochs" or self.duration == int(self.duration)
        _check(whole, self, "duration", "a whole number of updates")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig(_Section):
    """Where and how the arithmetic runs. Nothing here changes the objective."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on CPU. bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    attention: Literal["auto", "fused", "sdpa", "torch-flash", "cudnn", "flash-attn"] = "auto"
    """Backend of the attention. auto: what measured fastest on the device; fused: our kernels; sdpa: PyTorch's choice;
    torch-flash and cudnn: the flash attention and the cuDNN inside PyTorch, on CUDA; flash-attn: that package, where
    installed. They draw different dropout masks."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. 0: every rank holds all, without DeepSpeed. None: 0 for one process, 1 for several, if DeepSpeed is
    installed."""
    bucket_elements: Annotated[int, Range("1000 or more", lambda x: x >= 1000)] = 20_000_000
    """Elements DeepSpeed reduces or gathers at once (its own default of 5e8 costs 2 GB a rank)."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward: slower, and the memory of one layer instead of all."""
    graph: bool = True
    """On CUDA, run a whole micro-batch (teacher, student, loss, backward) as one CUDA graph, where it can be recorded;
    the log says why where not. The numbers are the same."""
    compile: bool = False
    """Run both encoders through torch.compile. No gain on a CPU (benchmarks/step.py); not measured on a GPU."""
    timeout_s: Annotated[int, AT_LEAST_1] = 600
    """A collective that takes longer than this ends the run."""
    max_skipped: Annotated[int, AT_LEAST_1] = 3
    """An update whose gradient is not finite is skipped; so many in a row end the run."""
    threads: Annotated[int | None, AT_LEAST_1] = None
    """CPU threads a process. None: the cores of the machine shared between its processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(_Section):
    """What is reported and kept. Nothing here changes results."""

    every: Annotated[Interval, AN_INTERVAL] = "30s"
    """Between two lines of the log, a time (30s, 15min, 1.5h) or a number of updates (10). The first update has a line
    of its own, and an update that takes longer says how far it is."""
    validate_every: Annotated[Interval, AN_INTERVAL] = "30min"
    """Between two validations, a time or a number of updates; there is always one at the end. Give a number where the
    curves of several runs are to be compared."""
    checkpoint_every: Annotated[Interval, AN_INTERVAL] = "15min"
    """Between two checkpoints, a time or a number of updates; there is always one at the end."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """How many of the latest checkpoints stay on disk."""
    failed_save: Literal["end", "go-on"] = "end"
    """Where a checkpoint, metrics or status cannot be written: end the run (with another checkpoint of where it is, if
    that can be written), or say so and try again at the next one. The last checkpoint must succeed."""
    to: tuple[Literal["auto", "none", "tensorboard", "wandb", "mlflow", "trackio"], ...] = ("auto",)
    """Where the run can be watched beside metrics.jsonl: any of these, each by its own package and its own settings.
    auto: TensorBoard, where that is installed. One that fails does not stop the run."""

    def _check_together(self) -> None:
        alone = not self.to or len(self.to) == 1 or not {"auto", "none"} & set(self.to)
        _check(alone, self, "to", "auto, none, or one or more of tensorboard wandb mlflow trackio")

    @property
    def go_on(self) -> bool:
        """Whether a run outlives what cannot be written."""
        return self.failed_save == "go-on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(_Section):
    """One run of `fastdistil.pretrain`."""

    recipe: str = "distilbert"
    """The recipe these values started from."""
    out: Path = Path("runs/distilbert")
    """Folder of this run: configuration, metrics, checkpoints."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint in the run folder or of --mirror, or start if there is none."""
    mirror: str | None = None
    """URL on an object store (s3://bucket/runs/a, or another that fsspec knows) that gets each checkpoint, metrics and
    configuration in the background. --resume auto on another machine goes on from there."""
    seed: Annotated[int, Range("in [0, 2^32)", lambda x: 0 <= x < 2**32)] = 56
    """Decides order, masks, dropout and random initial weights."""
    profile: str | None = None
    """Updates to profile, counted from 1, e.g. 10:13 for 10, 11 and 12: writes RUN/profile/ with a Chrome trace, a
    memory snapshot and a table of where a step's time goes."""
    max_hours: Annotated[float | None, ABOVE_0] = None
    """Stop by itself after so many hours, with a checkpoint and exit status 75, a little earlier so that there is time
    for it. None: as long as it takes."""
    dry_run: bool = False
    """Say what the run will be (memory, updates, tokens, FLOPs, checkpoint size) and stop. Needs neither GPUs nor
    torchrun."""
    world_size: int | None = None
    """With --dry-run: the number of ranks of the run that is meant."""
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def _check_together(self) -> None:
        if self.profile is not None:
            ok = re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", self.profile) is not None
            ok = ok and 1 <= int(self.profile.split(":")[0]) < int(self.profile.split(":")[1])
            _check(ok, self, "profile", "FIRST:END, two updates counted from 1")

    @property
    def profile_window(self) -> range:
        """The updates to profile, counted from 0; empty without --profile."""
        first, end = map(int, (self.profile or "1:1").split(":"))
        return range(first - 1, end - 1)


# A run may go on with other values of these: none of them changes which numbers are computed.
FREE_AT_RESUME = (
    "out",
    "resume",
    "mirror",
    "profile",
    "max_hours",
    "dry_run",
    "world_size",
    "data.num_workers",
    "data.cache",
    "data.verify",
    "teacher.max_drift",
    "teacher.check",
    "teacher.overlap",
    "teacher.device",
    "teacher.ranks",
    "engine",
    "log",
)
BOUND_AT_RESUME = ("engine.precision", "engine.attention", "engine.compile")  # but these do

PATHS = ("data.shards", "data.validation", "teacher.path", "teacher.others", "student.init")
"""What these name is known by its contents ("inputs" of RUN/config.json): it may lie elsewhere at a resume."""
NO_PATHS = ("teacher", "random")
"""Words of --student.init that are no folders."""


PER_HOST = (
    "out",
    "data.shards",
    "data.validation",
    "data.num_workers",
    "data.cache",
    "data.verify",
    "teacher.path",
    "teacher.others",
    "student.init",
    "engine.threads",
)
"""What the ranks of a run may have different: where files lie on a host, and what the host can do."""


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values; paths as strings, tuples as lists."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    result = plain(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def from_json(saved: dict[str, Any]) -> Config:
    """The configuration that `to_json` wrote. Raises ValueError for one that is none, or is out of range."""

    def build(value: Any, like: Any) -> Any:
        if not dataclasses.is_dataclass(like):
            return value
        hints = get_type_hints(type(like))
        given = {}
        for name, stored in value.items():
            if (type(like), name) == (LogConfig, "tensorboard"):  # of a run of an older version, now --log.to
                continue
            path = hints[name] is Path or Path in get_args(hints[name])
            # A run of before there were mixes has the one folder as a string.
            item: Any = [stored] if name == "shards" and isinstance(stored, str) else stored
            if dataclasses.is_dataclass(default := getattr(like, name)):
                given[name] = build(item, default)
            elif item is not None and path:
                given[name] = tuple(map(Path, item)) if isinstance(default, tuple) else Path(item)
            else:
                given[name] = tuple(item) if isinstance(item, list) else item
        return dataclasses.replace(like, **given)  # type: ignore[type-var]

    try:
        return build(saved, Config())
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"this is no configuration of a run: {error!r}") from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _weights(shards: object) -> list[float | None] | None:
    """Of --data.shards in a saved configuration, a weight a folder; None where there is none."""
    words = [shards] if isinstance(shards, str) else shards
    return [_text(word).weight for word in words] if isinstance(words, list) else None


def resume_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Fields of two `to_json` configurations that differ though a resumed run may not change them."""
    # an older version's run lacks what was added since, and ran as the defaults do
    old, new = flatten(to_json(Config())) | flatten(saved), flatten(now)

    def free(name: str) -> bool:
        was, now = old.get(name), new.get(name)
        if name == "data.shards":
            return _weights(was) == _weights(now)
        if name == "teacher.others":
            return isinstance(was, list) and isinstance(now, list) and len(was) == len(now)
        if name in PATHS:  # another text or model, or none, is found by its contents
            words = NO_PATHS if name == "student.init" else ()
            return all(isinstance(path, str) and path not in words for path in (was, now))
        if name == "optim.duration":
            return isinstance(was, int | float) and isinstance(now, int | float) and now > was
        return name not in BOUND_AT_RESUME and any(name == f or name.startswith(f + ".") for f in FREE_AT_RESUME)

    why = {"optim.duration": " (a run can be made longer, not shorter)"}
    return [
        f"--{name.replace('_', '-')}: was {old.get(name)!r}, now {new.get(name)!r}{why.get(name, '')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not free(name)
    ]
