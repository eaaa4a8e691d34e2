"""Hugging Face folders <-> our state dict, and a student's first weights out of its teacher.

Nothing is guessed: a tensor that is missing, left over or of the wrong shape is an error that names
it. Files are read as safetensors, else as a pickle with `weights_only=True`, and never in any less
safe way.

Shapes: D hidden width, V vocabulary (padded to a multiple of 64 in our state dict, not in a
folder).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture, read_architecture
from fastdistil.model.encoder import MaskedLM

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
"""What of a tokenizer folder belongs to an export."""

_WORDS = "encoder.word_embeddings.weight"
_VOCAB_ROWS = (_WORDS, "head.bias")  # tensors whose rows we pad

# Our module -> theirs. qkv is one matrix here and three there, in the order of its rows. Note the
# head (trap 7).
_BERT_EMBEDDINGS = {
    "encoder.word_embeddings": ("bert.embeddings.word_embeddings",),
    "encoder.position_embeddings": ("bert.embeddings.position_embeddings",),
    "encoder.token_type_embeddings": ("bert.embeddings.token_type_embeddings",),
    "encoder.embedding_norm": ("bert.embeddings.LayerNorm",),
}
_BERT_LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
_BERT_HEAD = {
    "head.dense": ("cls.predictions.transform.dense",),
    "head.norm": ("cls.predictions.transform.LayerNorm",),
    "head": ("cls.predictions",),
}
_DISTILBERT_EMBEDDINGS = {
    "encoder.word_embeddings": ("distilbert.embeddings.word_embeddings",),
    "encoder.position_embeddings": ("distilbert.embeddings.position_embeddings",),
    "encoder.embedding_norm": ("distilbert.embeddings.LayerNorm",),
}
_DISTILBERT_LAYER = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention_out": ("attention.out_lin",),
    "attention_norm": ("sa_layer_norm",),
    "ffn_in": ("ffn.lin1",),
    "ffn_out": ("ffn.lin2",),
    "ffn_norm": ("output_layer_norm",),
}
_DISTILBERT_HEAD = {
    "head.dense": ("vocab_transform",),
    "head.norm": ("vocab_layer_norm",),
    "head": ("vocab_projector",),
}
_ROBERTA_EMBEDDINGS = {
    ours: tuple(name.replace("bert.", "roberta.") for name in theirs) for ours, theirs in _BERT_EMBEDDINGS.items()
}
_ROBERTA_HEAD = {"head.dense": ("lm_head.dense",), "head.norm": ("lm_head.layer_norm",), "head": ("lm_head",)}
# Second names of a tensor, by its first. Old files hold them; they must be equal to it.
_ALIASES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
# Parts of the known classes that neither the MLM objective nor the encoder's output uses.
_IGNORED = (
    "bert.pooler.",
    "cls.seq_relationship.",
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_ids",
    "distilbert.embeddings.position_ids",
    "roberta.pooler.",
    "roberta.embeddings.position_ids",
    "roberta.embeddings.token_type_ids",
)


def _their_names(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Our state dict key -> the Hugging Face keys it is stacked from, for the whole model."""
    embeddings, layer, head, prefix = {
        "bert": (_BERT_EMBEDDINGS, _BERT_LAYER, _BERT_HEAD, "bert.encoder.layer"),
        "roberta": (_ROBERTA_EMBEDDINGS, _BERT_LAYER, _ROBERTA_HEAD, "roberta.encoder.layer"),
        "distilbert": (_DISTILBERT_EMBEDDINGS, _DISTILBERT_LAYER, _DISTILBERT_HEAD, "distilbert.transformer.layer"),
    }[architecture.model_type]
    modules: dict[str, tuple[str, ...]] = {**embeddings, **head}
    for i in range(architecture.num_layers):
        for ours, theirs in layer.items():
            modules[f"encoder.layers.{i}.{ours}"] = tuple(f"{prefix}.{i}.{name}" for name in theirs)
    names = {}
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            # Tables have no bias, and the decoder's weight is the word embeddings.
            if not (ours.endswith("_embeddings") and kind == "bias") and (ours, kind) != ("head", "weight"):
                names[f"{ours}.{kind}"] = tuple(f"{name}.{kind}" for name in theirs)
    return names


def load_masked_lm(folder: str | Path, *, need_head: bool, generator: torch.Generator | None = None) -> MaskedLM:
    """The model of a Hugging Face folder, in fp32 on the CPU, in training mode.

    Reads BertModel, BertForMaskedLM, BertForPreTraining, DistilBertModel, DistilBertForMaskedLM, RobertaModel
    and RobertaForMaskedLM; poolers, next-sentence heads and position buffers are left out.

    Args:
        folder: with config.json and model.safetensors (or its shards), else pytorch_model.bin.
        need_head: refuse a folder without MLM head. Otherwise such a folder gets a fresh head.
        generator: draws that fresh head; seed 0 if none is given.

    Raises ValueError where the folder is not exactly such a model.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    found = _canonical_names(_read_tensors(folder), architecture)
    _refuse_wild_sizes(folder, architecture, found)
    model = MaskedLM(architecture, generator=generator)
    own = model.state_dict()

    names = _their_names(architecture)
    head = {ours: theirs for ours, theirs in names.items() if ours.startswith("head.")}
    if not any(name in found for theirs in head.values() for name in theirs):
        if need_head:
            raise ValueError(_no_head_message(folder))
        names = {ours: theirs for ours, theirs in names.items() if ours not in head}

    wanted = {name for theirs in names.values() for name in theirs}
    _refuse_other_keys(f"{folder} does not hold this model", wanted, found)
    for ours, theirs in names.items():
        rows = len(own[ours]) // len(theirs)
        target = own[ours][: architecture.vocab_size] if ours in _VOCAB_ROWS else own[ours]
        shape = (architecture.vocab_size if ours in _VOCAB_ROWS else rows, *own[ours].shape[1:])
        for name in theirs:
            if found[name].shape != shape or not found[name].is_floating_point():
                raise ValueError(
                    f"{folder}: {name} must be floats of shape {shape} according to config.json, "
                    f"got {found[name].dtype} of shape {tuple(found[name].shape)}"
                )
        target.copy_(torch.cat([found[name] for name in theirs]))  # state dict values share the parameters' memory
    return model


def _refuse_wild_sizes(folder: Path, architecture: Architecture, found: Mapping[str, Tensor]) -> None:
    """Before such a model is made: its memory is bounded by that of the file. Smaller differences are named later."""
    width, vocab_size = architecture.hidden_size, architecture.vocab_size
    held = sum(tensor.numel() for tensor in found.values())
    fresh_head = width * (width + 3) + vocab_size
    if architecture.num_parameters > 2 * (held + fresh_head):
        raise ValueError(
            f"{folder / 'config.json'} describes {architecture.num_parameters:,} parameters, the weights beside it are "
            f"{held:,} numbers: they do not belong together"
        )


def _no_head_message(folder: Path) -> str:
    classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    return (
        f"wanted a model with a masked-LM head in {folder}, got {classes or 'an encoder'} without one: train a head "
        f"with the mlm recipe (python -m fastdistil.pretrain mlm --student.init {folder} ...) and use its export"
    )


def _canonical_names(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The tensors by the names that today's ...ForMaskedLM gives them, without aliases."""
    base = f"{architecture.model_type}."
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.replace(".gamma", ".weight").replace(".beta", ".bias")  # TensorFlow's, in the first releases
        if name.startswith(("embeddings.", "encoder.", "transformer.", "pooler.")):
            name = base + name  # saved from the bare encoder
        if name.startswith(_IGNORED):
            continue
        if name.endswith(".position_embeddings.weight"):
            tensor = tensor[architecture.unused_positions :]
        if name in found:
            raise ValueError(f"the folder holds {name} twice, once as {key!r}: keep one of them")
        found[name] = tensor
    for alias, name in _ALIASES.items():
        if alias not in found:
            continue
        tensor = found.pop(alias)
        if name in found and not torch.equal(tensor, found[name]):
            raise ValueError(
                f"{alias} differs from {name}: only an MLM head whose decoder is tied to the word embeddings is supported"
            )
        found.setdefault(name, tensor)
    return found


def _refuse_other_keys(what: str, wanted: set[str], found: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{what}: {' and '.join(parts)}")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weight file or files, on the CPU."""
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
        tensors: dict[str, Tensor] = {}
        for name in files:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index} must name files beside itself, got {name!r}")
            tensors.update(_read_safetensors(folder / name))
        return tensors
    if pickled.is_file():
        try:
            state = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads to
            raise ValueError(
                f"{pickled} was refused, because it holds more than tensors or is damaged; it is never loaded in a "
                f"less safe way: save the model as safetensors where you trust it ({repr(error).splitlines()[0]:.200})"
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
        ):
            raise ValueError(f"{pickled} must hold a state dict, names to tensors, got {type(state).__name__}")
        return state
    raise ValueError(
        f"no weights in {folder}: wanted model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


@torch.no_grad()
def student_from_teacher(
    teacher: MaskedLM,
    layers: Sequence[int],
    architecture: Architecture,
    *,
    copy_transform: bool,
    generator: torch.Generator | None = None,
) -> MaskedLM:
    """A student that starts as copies of the teacher's weights, as the authors' did.

    Copied: word and position embeddings, the embedding LayerNorm, the teacher's layers named in
    `layers`, the decoder bias, and a token-type table if the student has one. Without one, the
    teacher's token-type row 0 is not folded into the positions: the authors' script leaves it out
    too.

    Args:
        teacher: source of the weights; it is not changed and shares no memory with the student.
        layers: the teacher's layer for each of the student's, counted from 0.
        architecture: the student's; widths, heads, vocabulary and positions as the teacher's.
        copy_transform: copy the dense layer and LayerNorm of the MLM head too; otherwise they start
            fresh.
        generator: draws what is fresh; seed 0 if none is given.
    """
    source = teacher.architecture
    if len(layers) != architecture.num_layers or not all(0 <= i < source.num_layers for i in layers):
        raise ValueError(
            f"the layer map must name {architecture.num_layers} layers, one for each of the student's, "
            f"from 0 to {source.num_layers - 1} of the teacher, got {list(layers)}"
        )
    free = ("num_layers", "dropout", "attention_dropout", "layer_norm_eps", "pad_id")
    same = replace(source, **{name: getattr(architecture, name) for name in free})
    allowed = [same] if same.roberta else [same, replace(same, token_types=0)]
    if architecture not in allowed:
        raise ValueError(
            "a student that starts from teacher layers must have the teacher's widths, heads, vocabulary and "
            f"positions, got {architecture} for {source}: change them back, or start from random weights"
        )
    student = MaskedLM(architecture, generator=generator)
    state, teacher_state = student.state_dict(), teacher.state_dict()
    for name, target in state.items():
        module, _, rest = name.removeprefix("encoder.layers.").partition(".")
        if name.startswith("encoder.layers."):
            target.copy_(teacher_state[f"encoder.layers.{layers[int(module)]}.{rest}"])
        elif copy_transform or not name.startswith(("head.dense.", "head.norm.")):
            target.copy_(teacher_state[name])
    return student


def hugging_face_class(architecture: Architecture) -> str:
    """The transformers class that computes this architecture. ValueError if there is none."""
    if architecture.model_type != "distilbert":
        return {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[architecture.model_type]
    if architecture.layer_norm_eps != 1e-12:
        raise ValueError(
            "a model without token types is a DistilBERT, whose layer_norm_eps is 1e-12, "
            f"got {architecture.layer_norm_eps}: train with token types or that eps"
        )
    return "DistilBertForMaskedLM"


def hugging_face_config(architecture: Architecture) -> dict[str, Any]:
    """The content of config.json for the exported model."""
    a = architecture
    common = {
        "architectures": [hugging_face_class(a)],
        "dtype": "float32",
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": a.max_positions + a.unused_positions,
        "pad_token_id": a.pad_id,
        "tie_word_embeddings": True,
        "vocab_size": a.vocab_size,
    }
    if a.model_type != "distilbert":
        return common | {
            "model_type": a.model_type,
            "attention_probs_dropout_prob": a.attention_dropout,
            "hidden_act": "gelu",
            "hidden_dropout_prob": a.dropout,
            "hidden_size": a.hidden_size,
            "intermediate_size": a.ffn_size,
            "layer_norm_eps": a.layer_norm_eps,
            "num_attention_heads": a.num_heads,
            "num_hidden_layers": a.num_layers,
            "position_embedding_type": "absolute",
            "type_vocab_size": a.token_types,
        }
    return common | {
        "model_type": "distilbert",
        "activation": "gelu",
        "attention_dropout": a.attention_dropout,
        "dim": a.hidden_size,
        "dropout": a.dropout,
        "hidden_dim": a.ffn_size,
        "n_heads": a.num_heads,
        "n_layers": a.num_layers,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
    }


def hugging_face_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: q, k and v apart, no vocabulary padding.

    Every tensor owns its memory and the tied decoder weight appears once, as the word embeddings:
    safetensors refuses aliases, and transformers ties the decoder again when it loads.
    """
    names = _their_names(architecture)
    _refuse_other_keys("these are not the weights of this architecture", set(names), state)
    result = {}
    for ours, theirs in names.items():
        tensor = state[ours][: architecture.vocab_size] if ours in _VOCAB_ROWS else state[ours]
        if ours == "encoder.position_embeddings.weight":
            tensor = F.pad(tensor, (0, 0, architecture.unused_positions, 0))
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[name] = part.detach().clone(memory_format=torch.contiguous_format)
    return result


def write_hugging_face_folder(
    state: Mapping[str, Tensor], architecture: Architecture, tokenizer: str | Path, out: str | Path
) -> None:
    """Writes config.json, model.safetensors and tokenizer files into the existing folder `out`.

    `state` holds our names; its dtype is kept. transformers' AutoModelForMaskedLM loads the result
    with no missing and no unexpected key.
    """
    tokenizer, out = Path(tokenizer), Path(out)
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not files:
        raise ValueError(f"no tokenizer in {tokenizer}: wanted at least one of {', '.join(TOKENIZER_FILES)}")
    config = json.dumps(hugging_face_config(architecture), indent=2, sort_keys=True)
    (out / "config.json").write_text(config + "\n", encoding="utf-8")
    try:
        safetensors.torch.save_file(
            hugging_face_state(state, architecture),
            out / "model.safetensors",
            metadata={"format": "pt"},  # transformers refuses a file without it
        )
    except SafetensorError as error:  # its own type on a full disk
        raise OSError(f"cannot write {out / 'model.safetensors'}: {error}") from None
    for file in files:
        if file.name == "tokenizer_config.json":  # may name code for transformers to run
            record = json.loads(file.read_text(encoding="utf-8"))
            if "auto_map" in record:
                del record["auto_map"]
                (out / file.name).write_text(json.dumps(record, indent=1), encoding="utf-8")
                continue
        shutil.copyfile(file, out / file.name)
