"""What Hugging Face's families of encoders call the parts of the encoders that we compute. Standard library only.

BERT, DistilBERT and RoBERTa compute the same thing (bert.py) under different names: of the fields in config.json, of
the tensors in the weights file, of the class in transformers. ModernBERT computes another (modernbert.py). One entry of
FAMILIES is all that this package knows of a family's names, so another family of a computation that we have is one more
entry and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

_BERT_MODULES = {
    "encoder.word_embeddings": "embeddings.word_embeddings",
    "encoder.position_embeddings": "embeddings.position_embeddings",
    "encoder.token_type_embeddings": "embeddings.token_type_embeddings",
    "encoder.embedding_norm": "embeddings.LayerNorm",
}
"""Our module -> theirs below Family.prefix, of every family that computes what BERT does."""

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
    """What transformers assumes where a config.json lacks a field. The others must be there."""
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The config.json, with the fields of `fields` where today's transformers spells them in another way."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of Architecture that config.json cannot name, because all models of the family have these values."""
    activations: tuple[str, ...] = ("hidden_act",)
    """What config.json calls the activations, which must be gelu."""
    constants: dict[str, Any]
    """What else an exported config.json says."""
    must_be: dict[str, Any] = field(default_factory=dict)
    """What of it a config.json that is read must not say otherwise, for that is not computed here."""
    copies: dict[str, str] = field(default_factory=dict)
    """Other fields of an exported config.json -> the fields of Architecture whose values they have."""
    positions_after_pad: bool = False
    """Whether positions count from pad_id + 1. The rows of the position table before that are never used."""

    prefix: str
    """Where ...ForMaskedLM keeps the encoder."""
    modules: dict[str, str] = field(default_factory=_BERT_MODULES.copy)
    """Our module of the encoder beside its layers -> theirs below `prefix`."""
    layers: str = "encoder.layer"
    """Where the encoder keeps its layers."""
    layer: dict[str, tuple[str, ...]]
    """Our module of a layer -> those that it is stacked from: q, k and v are one matrix here and three there."""
    head: dict[str, str]
    """Our module of the MLM head -> theirs. `head` itself holds the bias; its weight is the word embeddings."""
    decoder: str
    """Where old files hold the decoder, a second copy of the word embeddings and perhaps of the bias."""
    not_in_first_layer: tuple[str, ...] = ()
    """Our modules of a layer that the first one has not."""
    biases: bool = True
    """Whether linear layers and LayerNorms have one; that of the decoder is always there."""
    gated: bool = False
    """Whether the feed-forward layer is a gated one, whose first matrix has twice its width."""
    classifiers_have_head: bool = False
    """Whether models of other tasks have the MLM head's dense layer and LayerNorm, too, under the same names."""

    @property
    def encoder(self) -> str:
        """The class of transformers that computes the encoder alone."""
        return self.masked_lm.replace("ForMaskedLM", "Model")

    def tensor_names(self, num_layers: int, *, with_head: bool = True) -> dict[str, tuple[str, ...]]:
        """Key of our state dict -> the keys in the weights file that it is stacked from, for the whole model."""
        modules: dict[str, tuple[str, ...]] = {ours: (self.prefix + theirs,) for ours, theirs in self.modules.items()}
        if self.fixed.get("token_types") == 0:
            modules.pop("encoder.token_type_embeddings", None)
        for i in range(num_layers):
            for ours, theirs in self.layer.items():
                if i > 0 or ours not in self.not_in_first_layer:
                    modules[f"encoder.layers.{i}.{ours}"] = tuple(
                        f"{self.prefix}{self.layers}.{i}.{name}" for name in theirs
                    )
        modules |= {ours: (theirs,) for ours, theirs in self.head.items() if with_head}
        names = {}
        for ours, theirs in modules.items():
            if ours != "head":
                names[f"{ours}.weight"] = tuple(f"{name}.weight" for name in theirs)
            if ours == "head" or (self.biases and not ours.endswith("_embeddings")):
                names[f"{ours}.bias"] = tuple(f"{name}.bias" for name in theirs)
        return names

    def canonical_name(self, key: str) -> str | None:
        """What today's ...ForMaskedLM calls the tensor that a file calls `key`; None for a buffer of constants."""
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")  # TensorFlow's, in the first releases
        parts = {"pooler", *(module.partition(".")[0] for module in (self.layers, *self.modules.values()))}
        if name.partition(".")[0] in parts:
            name = self.prefix + name  # saved from the bare encoder
        return None if name.removeprefix(self.prefix) in _BUFFERS else name

    def is_part(self, name: str) -> bool:
        """Whether a tensor with this canonical name is of the encoder or the MLM head, and of no other head."""
        head = tuple(f"{module}." for module in (*self.head.values(), self.decoder))
        return name.startswith((self.prefix, *head)) and not name.startswith(f"{self.prefix}pooler.")

    @property
    def aliases(self) -> dict[str, str]:
        """Second name of a tensor, which old files hold -> its first. Where both are there, they must be equal."""
        words = f"{self.prefix}{self.modules['encoder.word_embeddings']}.weight"
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
    activations=("activation",),
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
_MODERNBERT_ROPE = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def _modernbert(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a ModernBERT as transformers 4 writes it and the hub has it.

    transformers 5 has a list of layer types in the place of the distance between global layers, and a dictionary of
    angles. Raises ValueError where they say what the older form cannot.
    """
    found, types = dict(config), config.get("layer_types")
    if types is not None:
        everywhere = [i for i, kind in enumerate(types) if kind == "full_attention"]
        every = everywhere[1] if len(everywhere) > 1 else len(types)
        regular = ["sliding_attention" if i % every else "full_attention" for i in range(len(types))]
        if types != regular or len(types) != config.get("num_hidden_layers"):
            raise ValueError(
                "layer_types must name num_hidden_layers layers, those of full_attention at one distance from the "
                f"first on, got {types}: such a model cannot be computed exactly here, use another checkpoint"
            )
        found["global_attn_every_n_layers"] = every
    for kind, name in _MODERNBERT_ROPE.items():
        ropes = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
        ropes += [rope.get(kind) or {} for rope in ropes[1:] if isinstance(rope, dict)]
        for rope in ropes:  # the older of its two names is "type"
            if not isinstance(rope, dict) or {rope.get("rope_type"), rope.get("type")} - {None, "default"}:
                raise ValueError(
                    f"rope_scaling and rope_parameters must have the rope_type 'default', got {rope}: such a model "
                    "cannot be computed exactly here, use another checkpoint"
                )
        found[name] = ropes[-1].get("rope_theta", config.get(name))
    if found["local_rope_theta"] is None:  # then transformers takes the other
        found["local_rope_theta"] = found["global_rope_theta"] if "local_rope_theta" in config else None
    return found


_MODERNBERT = Family(
    title="ModernBERT",
    masked_lm="ModernBertForMaskedLM",
    pooler="",
    students={},
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "dropout": "mlp_dropout",
        "attention_dropout": "attention_dropout",
        "layer_norm_eps": "norm_eps",
        "pad_id": "pad_token_id",
        "global_every": "global_attn_every_n_layers",
        "local_attention": "local_attention",
        "global_theta": "global_rope_theta",
        "local_theta": "local_rope_theta",
    },
    defaults={
        "max_positions": 8192,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "pad_id": 50283,
        "global_every": 3,
        "local_attention": 128,
        "global_theta": 160000.0,
        "local_theta": 10000.0,
    },
    read=_modernbert,
    fixed={"token_types": 0},
    activations=("hidden_activation", "classifier_activation"),
    # The ids that it assumes without these lie beyond a smaller vocabulary; no encoder reads them. Classifiers on the
    # authors' models take the mean, transformers' own default is the first token.
    constants={
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        "classifier_pooling": "mean",
    },
    must_be={
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
    },
    copies={"embedding_dropout": "dropout"},
    prefix="model.",
    modules={
        "encoder.word_embeddings": "embeddings.tok_embeddings",
        "encoder.embedding_norm": "embeddings.norm",
        "encoder.final_norm": "final_norm",
    },
    layers="layers",
    layer={
        "attention_norm": ("attn_norm",),
        "qkv": ("attn.Wqkv",),
        "attention_out": ("attn.Wo",),
        "ffn_norm": ("mlp_norm",),
        "ffn_in": ("mlp.Wi",),
        "ffn_out": ("mlp.Wo",),
    },
    head={"head.dense": "head.dense", "head.norm": "head.norm", "head": "decoder"},
    decoder="decoder",
    not_in_first_layer=("attention_norm",),
    biases=False,
    gated=True,
    classifiers_have_head=True,
)
FAMILIES = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, title="XLM-RoBERTa", masked_lm="XLMRobertaForMaskedLM"),
    "camembert": replace(_ROBERTA, title="CamemBERT", masked_lm="CamembertForMaskedLM"),
    "modernbert": _MODERNBERT,
}
"""By the model_type of config.json."""


_DISENTANGLED = (
    "its disentangled attention adds two products with relative positions to every score, which the kernels for packed "
    "sequences do not compute, use another model"
)
_REASONS = {"None": "add what the model is", "deberta": _DISENTANGLED, "deberta-v2": _DISENTANGLED}
"""What is said of a model_type beside that it is none of FAMILIES."""


def find(model_type: Any) -> Family:
    """The family of a model_type. Raises ValueError where we do not know it."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        fix = _REASONS.get(str(model_type), "only these encoders are supported")
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}: {fix}")
    return FAMILIES[model_type]


def unused_positions(model_type: str, pad_id: int) -> int:
    """Rows of a position table before that of the first token; 0 for a model_type that is not in FAMILIES, too."""
    family = FAMILIES.get(model_type)
    return pad_id + 1 if family is not None and family.positions_after_pad else 0
