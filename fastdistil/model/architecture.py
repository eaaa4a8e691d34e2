"""What an encoder looks like: its sizes, its parameters, its FLOPs. Standard library only.

Configuration errors have to come before torch is imported, so this module knows sizes and no
tensors.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

VOCABULARY_MULTIPLE = 64
"""Vocabulary rows are padded to this: one 128-byte load of bf16 (recipe.md, trap 9)."""
INITIALIZER_RANGE = 0.02
"""Standard deviation of fresh linear and embedding weights, that of BERT and DistilBERT."""

MODEL_TYPES = ("bert", "distilbert", "roberta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes of a post-LN BERT encoder with a tied MLM head. ValueError where they do not fit."""

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
    """Rows of the token-type table: 0 for DistilBERT, which has none; 2 for BERT, 1 for RoBERTa. Only row 0 is added."""
    dropout: float = 0.1
    """After the embeddings, the attention and the feed-forward layer."""
    attention_dropout: float = 0.1
    """On the attention weights."""
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    """The id of [PAD]."""
    roberta: bool = False
    """Hugging Face's RoBERTa: the same encoder under other names, whose positions begin at pad_id + 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                if type(value) is not bool or (value and not self.token_types):
                    raise ValueError(f"{field.name} must be true or false, and true wants token types, got {value!r}")
                continue
            if field.type is int:
                least = 0 if field.name in ("token_types", "pad_id") else 1
                if type(value) is not int or value < least:
                    raise ValueError(f"{field.name} must be an integer of {least} or more, got {value!r}")
            elif type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{field.name} must be a number of at least 0 and below 1, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size, got {self.num_heads} heads for a width of {self.hidden_size}"
            )
        if self.pad_id >= self.vocab_size:
            raise ValueError(f"pad_id must lie below vocab_size {self.vocab_size}, got {self.pad_id}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embeddings and of the decoder in memory: the next multiple of 64."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def model_type(self) -> str:
        """What Hugging Face calls it, one of MODEL_TYPES."""
        if self.roberta:
            return "roberta"
        return "bert" if self.token_types else "distilbert"

    @property
    def unused_positions(self) -> int:
        """Rows before the first position in Hugging Face's table: RoBERTa counts from pad_id + 1. We do not keep them."""
        return self.pad_id + 1 if self.roberta else 0

    @property
    def num_parameters(self) -> int:
        """Parameters of encoder and MLM head; the tied decoder once, vocabulary padding not at all."""
        width = self.hidden_size
        embeddings = (self.vocab_size + self.max_positions + self.token_types + 2) * width
        attention = 4 * width * width + 4 * width
        feed_forward = 2 * width * self.ffn_size + self.ffn_size + width
        head = width * width + width + 2 * width + self.vocab_size
        return embeddings + self.num_layers * (attention + feed_forward + 4 * width) + head


# Field of Architecture -> (name in config.json, what transformers assumes where an old file lacks
# it). Sizes have no default here: a config.json without them is not one of these models.
_BERT_NAMES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("hidden_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "ffn_size": ("intermediate_size", None),
    "max_positions": ("max_position_embeddings", None),
    "token_types": ("type_vocab_size", 2),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "pad_id": ("pad_token_id", 0),
}
_DISTILBERT_NAMES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("dim", None),
    "num_layers": ("n_layers", None),
    "num_heads": ("n_heads", None),
    "ffn_size": ("hidden_dim", None),
    "max_positions": ("max_position_embeddings", None),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "pad_id": ("pad_token_id", 0),
}
_ROBERTA_NAMES = _BERT_NAMES | {"pad_id": ("pad_token_id", 1), "layer_norm_eps": ("layer_norm_eps", 1e-5)}  # fmt: skip


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that the config.json of a Hugging Face folder describes.

    Raises ValueError if the folder has no readable config.json, if it is neither BERT nor
    DistilBERT nor RoBERTa, or if it asks for something this encoder does not compute: another activation, other
    positions, a decoder.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"not a Hugging Face folder: wanted config.json in {folder}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}: only these encoders are supported"
        )
    _refuse_what_is_not_computed(path, config)

    sizes: dict[str, Any] = {"roberta": model_type == "roberta"}
    if model_type == "distilbert":
        sizes["token_types"] = 0
    names = {"bert": _BERT_NAMES, "distilbert": _DISTILBERT_NAMES, "roberta": _ROBERTA_NAMES}
    for field, (name, default) in names[model_type].items():
        sizes[field] = default if config.get(name) is None else config[name]
        if sizes[field] is None:
            raise ValueError(f"{path} has no {name!r}: a {model_type} config.json must give it")
    try:
        if model_type == "roberta":
            sizes["max_positions"] -= sizes["pad_id"] + 1
        return Architecture(**sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_what_is_not_computed(path: Path, config: dict[str, Any]) -> None:
    name = "activation" if config["model_type"] == "distilbert" else "hidden_act"
    if config.get(name, "gelu") != "gelu":
        raise ValueError(
            f"{path}: {name} must be 'gelu' (exact erf, trap 6 of the recipe), got {config[name]!r}: "
            "such a model cannot be computed exactly here, use another checkpoint"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{path}: position_embedding_type must be 'absolute', got {config['position_embedding_type']!r}"
        )
    for flag in ("is_decoder", "add_cross_attention"):
        if config.get(flag):
            raise ValueError(f"{path}: {flag} must be false, got {config[flag]!r}: only bidirectional encoders")
    if config.get("tie_word_embeddings", True) is False:
        raise ValueError(f"{path}: tie_word_embeddings is false: the MLM decoder must be the word embeddings")


class FlopsPerToken(NamedTuple):
    """FLOPs of a training step per real token: a multiply-add is 2, elementwise work is 0."""

    teacher: float
    """Forward of the teacher, its head included; 0 without one."""
    student: float
    """Forward and backward of the student, its head included: three times its forward."""
    heads: float
    """The part of both that the two vocabulary projections make up."""
    scores: float
    """The part of both that grows with length: attention scores, and their product with v."""

    @property
    def total(self) -> float:
        """FLOPs of teacher and student together, the numerator of MFU."""
        return self.teacher + self.student


def flops_per_token(
    teacher: Architecture | None, student: Architecture, mean_attended_length: float, *, head_fraction: float = 1.0
) -> FlopsPerToken:
    """The cost model of performance.md.

    Args:
        teacher: None where the student trains without one.
        student: the architecture that is trained.
        mean_attended_length: tokens that a token attends to, on average: sum(L^2) / sum(L) over
            sequences.
        head_fraction: share of the tokens that pass the MLM heads: 1 in distillation, the masked
            share where only masked tokens are predicted.
    """

    def forward(model: Architecture) -> tuple[float, float, float]:
        width = model.hidden_size
        layers = model.num_layers * 2 * (4 * width * width + 2 * width * model.ffn_size)
        scores = model.num_layers * 4 * mean_attended_length * width
        projection = head_fraction * 2 * width * model.vocab_size
        return layers + scores + projection + head_fraction * 2 * width * width, projection, scores

    teacher_all, teacher_head, teacher_scores = forward(teacher) if teacher else (0.0, 0.0, 0.0)
    student_all, student_head, student_scores = forward(student)
    return FlopsPerToken(
        teacher=teacher_all,
        student=3 * student_all,
        heads=teacher_head + 3 * student_head,
        scores=teacher_scores + 3 * student_scores,
    )
