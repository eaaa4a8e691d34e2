"""What an encoder looks like: its sizes, its parameters, its FLOPs. Standard library only.

Configuration errors have to come before torch is imported, so this module knows sizes and no tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastdistil.model import families
from fastdistil.model.families import Family
from fastdistil.run import files

VOCABULARY_MULTIPLE = 64
"""Vocabulary rows are padded to this: one 128-byte load of bf16."""
INITIALIZER_RANGE = 0.02
"""Standard deviation of fresh linear and embedding weights, that of BERT and DistilBERT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes of a BERT or ModernBERT encoder, with a tied MLM head or without. ValueError where they do not fit."""

    model_type: str = "bert"
    """Its family, one of families.FAMILIES, by Hugging Face's name."""
    vocab_size: int
    """Word pieces, without padding."""
    hidden_size: int
    """Width D of a hidden state."""
    num_layers: int
    num_heads: int
    """Attention heads; divides hidden_size."""
    ffn_size: int
    """Width of the feed-forward layer."""
    max_positions: int
    """Tokens of the longest sequence."""
    token_types: int
    """Rows of the token-type table, of which only row 0 is added: 2 for BERT, 0 for DistilBERT, which has none."""
    dropout: float = 0.1
    """After the embeddings, the attention and the feed-forward layer."""
    attention_dropout: float = 0.1
    """On the attention weights, and in a ModernBERT on what its attention adds to the stream."""
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    """The id of [PAD]."""
    mlm_head: bool = True
    """Whether there is an MLM head; an encoder that only hands out hidden states has none."""
    embedding_size: int = 0
    """Width of a linear projection behind the last hidden states, 0 without one."""
    global_every: int = 0
    """Of a ModernBERT: of so many layers the first attends to the whole sequence, the others to a window. 0: all do."""
    local_attention: int = 0
    """Tokens of that window: half of them on either side."""
    global_theta: float = 0.0
    """Base of the angles by which queries and keys of those layers are rotated, and 0 of a model with positions."""
    local_theta: float = 0.0
    """Of the others."""

    def __post_init__(self) -> None:
        family = self.family
        fixed = dict.fromkeys({*OF_WINDOWS} - {*family.fields}, 0) | family.fixed
        may_be_0 = {"pad_id", "embedding_size", *fixed}
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in may_be_0 else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} must be an integer of {least} or more, got {value!r}")
            low, high = (least, math.inf) if field.name.endswith("theta") else (0, 1)
            if field.type is float and (type(value) not in (int, float) or not low <= value < high):
                wanted = f"a number of at least {low} and below {high}"
                raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
            if value != fixed.get(field.name, value):
                raise ValueError(
                    f"this is a {family.title}, whose {field.name} is {fixed[field.name]}, got {value}: "
                    "its config.json has no field for another, use that value or another model_type"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size, got {self.num_heads} heads for a width of {self.hidden_size}"
            )
        if self.rotates and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"num_heads must leave heads of an even width, which are rotated in pairs, got {self.num_heads} heads "
                f"for a width of {self.hidden_size}"
            )
        if self.local_attention % 2:
            raise ValueError(
                f"local_attention must be even, half of it on either side of a token, got {self.local_attention}"
            )
        if self.pad_id >= self.vocab_size:
            raise ValueError(f"pad_id must lie below vocab_size {self.vocab_size}, got {self.pad_id}")

    @property
    def family(self) -> Family:
        """What Hugging Face calls its parts."""
        return families.find(self.model_type)

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions, in place of a table of position embeddings."""
        return self.global_theta > 0

    def window(self, layer: int) -> int:
        """How far the tokens of a layer, counted from 0, see on either side; 0: the whole sequence."""
        return self.local_attention // 2 if self.global_every and layer % self.global_every else 0

    @property
    def windows(self) -> str:
        """What its layers see, in words; empty where all see everything."""
        everything = [i for i in range(self.num_layers) if not self.window(i)]
        if len(everything) == self.num_layers:
            return ""
        side = self.local_attention // 2
        return f"{' '.join(map(str, everything))} see everything, the others {side} tokens on either side"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embeddings and of the decoder in memory: the next multiple of 64."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def unused_positions(self) -> int:
        """Rows before the first position in Hugging Face's table; we do not keep them."""
        return families.unused_positions(self.model_type, self.pad_id)

    @property
    def widest_window(self) -> int:
        """Of all layers that have one; 0 where none has."""
        return max(map(self.window, range(self.num_layers)))

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor of our state dict as files hold it: all positions, no vocabulary padding, what is stacked of
        several of theirs apart."""
        width, ffn, family = self.hidden_size, self.ffn_size, self.family
        weights = {
            "word_embeddings": (self.vocab_size, width),
            "position_embeddings": (self.unused_positions + self.max_positions, width),
            "token_type_embeddings": (self.token_types, width),
            "qkv": (3 * width // len(family.layer["qkv"]), width),
            **dict.fromkeys(("attention_out", "dense"), (width, width)),
            "ffn_in": ((1 + family.gated) * ffn, width),
            "ffn_out": (width, ffn),
            "head": (self.vocab_size, width),
            "projection": (self.embedding_size, width),
        }
        module, kind = key.split(".")[-2:]
        weight = weights.get(module, (width,))  # a LayerNorm's
        return weight if kind == "weight" else weight[:1]

    @property
    def num_parameters(self) -> int:
        """Parameters of encoder, head and projection; the tied decoder once, vocabulary padding not at all."""
        names = self.family.tensor_names(self.num_layers, with_head=self.mlm_head)
        held = sum(len(theirs) * math.prod(self.shape(ours)) for ours, theirs in names.items())
        return held + (self.embedding_size - self.unused_positions) * self.hidden_size

    @property
    def layer_products(self) -> int:
        """Elements of the matrices of a layer."""
        return (4 * self.hidden_size + (2 + self.family.gated) * self.ffn_size) * self.hidden_size


OF_WINDOWS = ("global_every", "local_attention", "global_theta", "local_theta")


def from_record(record: dict[str, Any]) -> Architecture:
    """The architecture that a run's config.json holds under "student" or "teacher": dataclasses.asdict of it.

    Runs of older versions hold `roberta`, true or false, in place of model_type: then what is no RoBERTa is a BERT with
    token types and a DistilBERT without. Raises ValueError where the record is no architecture.
    """
    try:
        sizes: dict[str, Any] = dict(record)
        roberta = sizes.pop("roberta", False)
        older = "roberta" if roberta else "bert" if sizes.get("token_types") else "distilbert"
        sizes.setdefault("model_type", older)
        return Architecture(**sizes)
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that the config.json of a Hugging Face folder describes.

    Raises ValueError if the folder has no readable config.json, if its model_type is not in families.FAMILIES, or if it
    asks for something this encoder does not compute: another activation, other positions, a decoder.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() or (path.parent / "adapter_config.json").is_file():
        raise ValueError(f"not a Hugging Face folder: wanted config.json in {folder}{_what_it_is(path.parent)}")
    config = files.read_json(path)
    if {"config", "student"} <= config.keys():
        raise ValueError(f"{folder} is a run: give its export, `python -m fastdistil.export {folder} --out DIR`")
    family = None
    try:
        model_type = config.get("model_type")
        family = families.find(model_type)
        config = family.read(config)
        _refuse_what_is_not_computed(config, family)
        sizes = dict(family.fixed)
        for field, name in family.fields.items():
            sizes[field] = family.defaults.get(field) if config.get(name) is None else config[name]
            if sizes[field] is None:
                raise ValueError(f"it has no {name!r}: a {model_type} config.json must give it")
        whole = Architecture(model_type=model_type, **sizes)
        if whole.max_positions <= whole.unused_positions:
            raise ValueError(
                f"max_positions must be above the {whole.unused_positions} rows that are never used, "
                f"got {whole.max_positions}"
            )
        return replace(whole, max_positions=whole.max_positions - whole.unused_positions)
    except ValueError as error:
        # Where it begins with a field of Architecture, the file has another name for that.
        first, blank, rest = str(error).partition(" ")
        name = family.fields.get(first, first) if family else first
        raise ValueError(f"{path}: {name}{blank}{rest}") from None


def _what_it_is(folder: Path) -> str:
    """What a folder without a model is instead, and what to give in its place; the end of a message."""
    if (folder / "adapter_config.json").is_file():
        return (
            " and no adapter_config.json, got a PEFT adapter: merge it into its model (merge_and_unload, then "
            "save_pretrained) and give that"
        )
    if not folder.exists():
        return ", which does not exist: a model on the hub is fetched by `hf download NAME --local-dir DIR`"
    if folder.is_file():
        return f", which is a file: give the folder {folder.parent}"
    # As the hub's cache, the Trainer and old versions of sentence-transformers lay models out.
    inside = sorted((*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    models = [str(path.parent) for path in inside if "model_type" in files.read_json(path)]
    return f": give {' or '.join(models)}" if models else ""


def _refuse_what_is_not_computed(config: dict[str, Any], family: Family) -> None:
    for activation in family.activations:
        if config.get(activation, "gelu") not in ("gelu", "gelu_python"):  # two names of one function
            raise ValueError(
                f"{activation} must be 'gelu' (exact erf), got {config[activation]!r}: "
                "such a model cannot be computed exactly here, use another checkpoint"
            )
    for name, value in family.must_be.items():
        if bool(config.get(name, value)) is not value:
            raise ValueError(
                f"{name} must be {str(value).lower()}, got {config[name]!r}: such a model cannot be computed exactly "
                "here, use another checkpoint"
            )
    if config.get("position_embedding_type") not in (None, "absolute"):
        raise ValueError(f"position_embedding_type must be 'absolute', got {config['position_embedding_type']!r}")
    for flag in ("is_decoder", "add_cross_attention"):
        if config.get(flag):
            raise ValueError(f"{flag} must be false, got {config[flag]!r}: only bidirectional encoders")


class FlopsPerToken(NamedTuple):
    """FLOPs of a training step per real token: a multiply-add is 2, elementwise work is 0."""

    teacher: float
    """Forward of the teacher, its head included; 0 without one."""
    student: float
    """Forward and backward of the student, its head included: three times its forward."""

    @property
    def total(self) -> float:
        """FLOPs of teacher and student together, the numerator of MFU."""
        return self.teacher + self.student


def attended(lengths_S: Any, window: int) -> float:
    """Tokens that a token attends to, on average over those of sequences of these lengths, (S,) of NumPy.

    With w on either side, which is less than L - 1 for a window and else that, a sequence of L has L (2 w + 1) - w
    (w + 1) pairs: L^2 without a window, which is 0.
    """
    length_S = lengths_S.astype(float)
    farthest_S = (length_S - 1).clip(max=window or None)
    pairs_S = length_S * (2 * farthest_S + 1) - farthest_S * (farthest_S + 1)
    return float(pairs_S.sum() / length_S.sum())


def flops_per_token(
    teacher: Architecture | None, student: Architecture, attended: Callable[[int], float], *, head_fraction: float = 1.0
) -> FlopsPerToken:
    """The cost model: matrix products, attention scores and vocabulary heads.

    Args:
        teacher: None where the student trains without one.
        student: the architecture that is trained.
        attended: window -> tokens that a token attends to, on average; see the function of this name.
        head_fraction: share of the tokens that pass the MLM heads, of the models that have one: 1 in distillation, the
            masked share where only masked tokens are predicted.
    """

    def forward(model: Architecture) -> float:
        width = model.hidden_size
        products = 2 * model.num_layers * model.layer_products
        # q with k, and the weights with v
        scores = sum(4 * attended(model.window(layer)) * width for layer in range(model.num_layers))
        head = 2 * width * (model.vocab_size + width) * model.mlm_head
        return products + scores + head_fraction * head + 2 * width * model.embedding_size

    return FlopsPerToken(teacher=forward(teacher) if teacher else 0.0, student=3 * forward(student))
