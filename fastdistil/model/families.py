"""What Hugging Face's families of encoders call the parts of the one encoder that we compute. Standard library only.

BERT, DistilBERT and RoBERTa compute the same thing (encoder.py) under different names: of the fields in config.json, of
the tensors in the weights file, of the class in transformers. One entry of FAMILIES is all that this package knows
about a family, so another family of the same computation is one more entry and nothing else.
"""

from dataclasses import dataclass, field, replace
from typing import Any

_EMBEDDINGS = {
    "encoder.word_embeddings": "embeddings.word_embeddings",
    "encoder.position_embeddings": "embeddings.position_embeddings",
    "encoder.token_type_embeddings": "embeddings.token_type_embeddings",
    "encoder.embedding_norm": "embeddings.LayerNorm",
}
"""Our module -> theirs below Family.prefix, the same in every family."""

_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Below Family.prefix, in files of old releases: 0, 1, 2, ... and zeros."""
_WRAPPERS = ("module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DistributedDataParallel, Lightning, torch.compile and FSDP write before a name or into it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The names of one family."""

    title: str
    """What people call it, for messages."""
    masked_lm: str
    """The class of transformers that computes encoder and MLM head."""
    pooler: str = "pooler.dense"
    """A layer over the first token's state that AutoModel's class has and we have not; empty without one."""
    students: dict[bool, str]
    """A student's family by whether it has token types; empty where students are of their teacher's family."""

    fields: dict[str, str]
    """Field of Architecture -> its name in config.json."""
    defaults: dict[str, Any]
    """What transformers assumes where an old config.json lacks a field. The others must be there."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of Architecture that config.json cannot name, because all models of the family have these values."""
    activation: str = "hidden_act"
    """What config.json calls the activation, which must be gelu."""
    constants: dict[str, Any]
    """What else an exported config.json says."""
    positions_after_pad: bool = False
    """Whether positions count from pad_id + 1. The rows of the position table before that are never used."""

    prefix: str
    """Where ...ForMaskedLM keeps the encoder."""
    layers: str = "encoder.layer"
    """Where the encoder keeps its layers."""
    layer: dict[str, tuple[str, ...]]
    """Our module of a layer -> those that it is stacked from: q, k and v are one matrix here and three there."""
    head: dict[str, str]
    """Our module of the MLM head -> theirs. `head` itself holds the bias; its weight is the word embeddings."""
    decoder: str
    """Where old files hold the decoder, a second copy of the word embeddings and perhaps of the bias."""

    @property
    def encoder(self) -> str:
        """The class of transformers that computes the encoder alone."""
        return self.masked_lm.replace("ForMaskedLM", "Model")

    def tensor_names(self, num_layers: int, *, with_head: bool = True) -> dict[str, tuple[str, ...]]:
        """Key of our state dict -> the keys in the weights file that it is stacked from, for the whole model."""
        modules: dict[str, tuple[str, ...]] = {ours: (self.prefix + theirs,) for ours, theirs in _EMBEDDINGS.items()}
        if self.fixed.get("token_types") == 0:
            del modules["encoder.token_type_embeddings"]
        for i in range(num_layers):
            for ours, theirs in self.layer.items():
                modules[f"encoder.layers.{i}.{ours}"] = tuple(
                    f"{self.prefix}{self.layers}.{i}.{name}" for name in theirs
                )
        modules |= {ours: (theirs,) for ours, theirs in self.head.items() if with_head}
        names = {}
        for ours, theirs in modules.items():
            if ours != "head":
                names[f"{ours}.weight"] = tuple(f"{name}.weight" for name in theirs)
            if not ours.endswith("_embeddings"):
                names[f"{ours}.bias"] = tuple(f"{name}.bias" for name in theirs)
        return names

    def canonical_name(self, key: str) -> str | None:
        """What today's ...ForMaskedLM calls the tensor that a file calls `key`; None for a buffer of constants."""
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")  # TensorFlow's, in the first releases
        if name.startswith(("embeddings.", "pooler.", f"{self.layers.partition('.')[0]}.")):
            name = self.prefix + name  # saved from the bare encoder
        return None if name.removeprefix(self.prefix) in _BUFFERS else name

    def is_part(self, name: str) -> bool:
        """Whether a tensor with this canonical name is of the encoder or the MLM head, and of no other head."""
        head = tuple(f"{module}." for module in (*self.head.values(), self.decoder))
        return name.startswith((self.prefix, *head)) and not name.startswith(f"{self.prefix}pooler.")

    @property
    def aliases(self) -> dict[str, str]:
        """Second name of a tensor, which old files hold -> its first. Where both are there, they must be equal."""
        words = f"{self.prefix}{_EMBEDDINGS['encoder.word_embeddings']}.weight"
        return {f"{self.decoder}.weight": words, f"{self.decoder}.bias": f"{self.head['head']}.bias"}


_BERT = Family(
    title="BERT",
    masked_lm="BertForMaskedLM",
    students={False: "distilbert", True: "bert"},
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "layer_norm_eps": "layer_norm_eps",
        "pad_id": "pad_token_id",
    },
    defaults={"token_types": 2, "dropout": 0.1, "attention_dropout": 0.1, "layer_norm_eps": 1e-12, "pad_id": 0},
    constants={"position_embedding_type": "absolute"},
    prefix="bert.",
    layer={
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention_out": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "ffn_in": ("intermediate.dense",),
        "ffn_out": ("output.dense",),
        "ffn_norm": ("output.LayerNorm",),
    },
    head={  # other names and another order than DistilBERT's
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    },
    decoder="cls.predictions.decoder",
)
_DISTILBERT = Family(
    title="DistilBERT",
    masked_lm="DistilBertForMaskedLM",
    pooler="",
    students=_BERT.students,
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "ffn_size": "hidden_dim",
        "max_positions": "max_position_embeddings",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "pad_id": "pad_token_id",
    },
    defaults={"dropout": 0.1, "attention_dropout": 0.1, "pad_id": 0},
    fixed={"token_types": 0, "layer_norm_eps": 1e-12},
    activation="activation",
    constants={"sinusoidal_pos_embds": False, "tie_weights_": True},
    prefix="distilbert.",
    layers="transformer.layer",
    layer={
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention_out": ("attention.out_lin",),
        "attention_norm": ("sa_layer_norm",),
        "ffn_in": ("ffn.lin1",),
        "ffn_out": ("ffn.lin2",),
        "ffn_norm": ("output_layer_norm",),
    },
    head={"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head": "vocab_projector"},
    decoder="vocab_projector",
)
_ROBERTA = Family(
    title="RoBERTa",
    masked_lm="RobertaForMaskedLM",
    students={},
    fields=_BERT.fields,
    defaults=_BERT.defaults | {"pad_id": 1},
    constants=_BERT.constants,
    positions_after_pad=True,
    prefix="roberta.",
    layer=_BERT.layer,
    head={"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head": "lm_head"},
    decoder="lm_head.decoder",
)
FAMILIES = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, title="XLM-RoBERTa", masked_lm="XLMRobertaForMaskedLM"),
    "camembert": replace(_ROBERTA, title="CamemBERT", masked_lm="CamembertForMaskedLM"),
}
"""By the model_type of config.json."""


def find(model_type: Any) -> Family:
    """The family of a model_type. Raises ValueError where we do not know it."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        fix = "only these encoders are supported" if model_type is not None else "add what the model is"
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}: {fix}")
    return FAMILIES[model_type]


def unused_positions(model_type: str, pad_id: int) -> int:
    """Rows of a position table before that of the first token; 0 for a model_type that is not in FAMILIES, too."""
    family = FAMILIES.get(model_type)
    return pad_id + 1 if family is not None and family.positions_after_pad else 0
