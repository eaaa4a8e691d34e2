"""Hugging Face folders <-> our state dict, and a student's first weights out of its teacher.

Nothing is guessed: a tensor that is missing, left over or of the wrong shape is an error that names it. Files are read
as safetensors, else as a pickle with `weights_only=True`, and never in any less safe way.

Shapes: D hidden width, V vocabulary (padded to a multiple of 64 in our state dict, not in a folder).
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture, read_architecture
from fastdistil.model.encoder import MaskedLM
from fastdistil.model.families import Family
from fastdistil.run import files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
"""What of a tokenizer folder belongs to an export."""

_VOCAB_ROWS = ("encoder.word_embeddings.weight", "head.bias")
"""Tensors of our state dict whose rows are padded."""
_POSITIONS = "encoder.position_embeddings.weight"
"""The tensor whose table has unused rows in some families."""


@torch.no_grad()
def load_masked_lm(folder: str | Path, *, need_head: bool, generator: torch.Generator | None = None) -> MaskedLM:
    """The model of a Hugging Face folder, in fp32 on the CPU, in training mode.

    Reads the ...Model, ...ForMaskedLM and ...ForPreTraining of the families in families.py; poolers, next-sentence
    heads and position buffers are left out.

    Args:
        folder: with config.json and model.safetensors (or its shards), else pytorch_model.bin.
        need_head: refuse a folder without MLM head. Otherwise such a folder gets a fresh head.
        generator: draws that fresh head; seed 0 if none is given.

    Raises ValueError where the folder is not exactly such a model.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    found = _canonical(_read_tensors(folder), architecture.family)
    _refuse_wild_sizes(folder, architecture, found)
    model = MaskedLM(architecture, generator=generator)

    # A folder without a single tensor of the head is a bare encoder. One with a part of the head is incomplete.
    names = architecture.family.tensor_names(architecture.num_layers)
    head = {ours for ours in names if ours.startswith("head.")}
    if not any(name in found for ours in head for name in names[ours]):
        if need_head:
            raise ValueError(_no_head_message(folder))
        names = {ours: theirs for ours, theirs in names.items() if ours not in head}

    wanted = {name for theirs in names.values() for name in theirs}
    _refuse_other_keys(f"{folder} does not hold this model", wanted, found)

    # What is copied into the state dict is in the model: they share their memory. Padding and unused rows are left out.
    own = model.state_dict()
    for ours, theirs in names.items():
        target = own[ours][: architecture.vocab_size] if ours in _VOCAB_ROWS else own[ours]
        unused = architecture.unused_positions if ours == _POSITIONS else 0
        shape = (unused + len(target) // len(theirs), *target.shape[1:])
        for name in theirs:
            if found[name].shape != shape or not found[name].is_floating_point():
                raise ValueError(
                    f"{folder}: {name} must be floats of shape {shape} according to config.json, "
                    f"got {found[name].dtype} of shape {tuple(found[name].shape)}"
                )
        target.copy_(torch.cat([found[name][unused:] for name in theirs]))
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
    classes = files.read_json(folder / "config.json").get("architectures")
    return (
        f"wanted a model with a masked-LM head in {folder}, got {classes or 'an encoder'} without one: train a head "
        f"with the mlm recipe (python -m fastdistil.pretrain mlm --student.init {folder} ...) and use its export"
    )


def _canonical(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors by the names that today's ...ForMaskedLM gives them, without aliases and without what is ignored."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = family.canonical_name(key)
        if name is None:
            continue
        if name in found:
            raise ValueError(f"the folder holds {name} twice, once as {key!r}: keep one of them")
        found[name] = tensor
    for alias, name in family.aliases.items():
        if alias not in found:
            continue
        tensor = found.pop(alias)
        if name in found and not torch.equal(tensor, found[name]):
            raise ValueError(
                f"{alias} differs from {name}: only an MLM head whose decoder is tied to the word embeddings is "
                "supported"
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
    single, index, pickled = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    )
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        return _read_shards(index)
    if pickled.is_file():
        return _read_pickle(pickled)
    raise ValueError(
        f"no weights in {folder}: wanted model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    other = "this is not an index of safetensors files, save the model again"
    weight_map = files.read_json(index, fix=other).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must hold a weight_map of names to files: {other}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} must name files beside itself, got {name!r}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors |= _read_safetensors(index.parent / name)
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(
            f"{path} was refused, because it holds more than tensors or is damaged; it is never loaded in a "
            f"less safe way: save the model as safetensors where you trust it ({repr(error).splitlines()[0]:.200})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} must hold a state dict, names to tensors, got {type(state).__name__}")
    return state


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

    Copied: word and position embeddings, the embedding LayerNorm, the teacher's layers named in `layers`, the decoder
    bias, and a token-type table if the student has one. Without one, the teacher's token-type row 0 is not folded into
    the positions: the authors' script leaves it out too.

    Args:
        teacher: source of the weights; it is not changed and shares no memory with the student.
        layers: the teacher's layer for each of the student's, counted from 0.
        architecture: the student's; widths, heads, vocabulary and positions as the teacher's.
        copy_transform: copy the dense layer and LayerNorm of the MLM head too; otherwise they start fresh.
        generator: draws what is fresh; seed 0 if none is given.

    Raises ValueError where `layers` or `architecture` do not fit the teacher.
    """
    source = teacher.architecture
    if len(layers) != architecture.num_layers or not all(0 <= i < source.num_layers for i in layers):
        raise ValueError(
            f"the layer map must name {architecture.num_layers} layers, one for each of the student's, "
            f"from 0 to {source.num_layers - 1} of the teacher, got {list(layers)}"
        )
    sizes = ("vocab_size", "hidden_size", "num_heads", "ffn_size", "max_positions")
    same = all(getattr(architecture, name) == getattr(source, name) for name in sizes)
    # The student is what its teacher is, or the same without token types where the family has such students.
    kinds = [(source.model_type, source.token_types), (source.family.students.get(0), 0)]
    if not same or (architecture.model_type, architecture.token_types) not in kinds:
        raise ValueError(
            "a student that starts from teacher layers must have the teacher's widths, heads, vocabulary and "
            f"positions, got {architecture} for {source}: change them back, or start from random weights"
        )
    student = MaskedLM(architecture, generator=generator)
    teacher_state = teacher.state_dict()
    for name, target in student.state_dict().items():
        if name.startswith("encoder.layers."):
            index, _, rest = name.removeprefix("encoder.layers.").partition(".")
            target.copy_(teacher_state[f"encoder.layers.{layers[int(index)]}.{rest}"])
        elif copy_transform or not name.startswith(("head.dense.", "head.norm.")):
            target.copy_(teacher_state[name])
    return student


def hugging_face_config(architecture: Architecture) -> dict[str, Any]:
    """The content of config.json for the exported model."""
    family = architecture.family
    sizes = {name: getattr(architecture, field) for field, name in family.fields.items()}
    sizes[family.fields["max_positions"]] += architecture.unused_positions
    return {
        "architectures": [family.masked_lm],
        "model_type": architecture.model_type,
        "dtype": "float32",
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        family.activation: "gelu",
        **family.constants,
        **sizes,
    }


def hugging_face_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: q, k and v apart, no vocabulary padding, unused positions as zeros.

    Every tensor owns its memory and the tied decoder weight appears once, as the word embeddings: safetensors refuses
    aliases, and transformers ties the decoder again when it loads. Raises ValueError where `state` has other keys.
    """
    names = architecture.family.tensor_names(architecture.num_layers)
    _refuse_other_keys("these are not the weights of this architecture", set(names), state)
    result = {}
    for ours, theirs in names.items():
        tensor = state[ours][: architecture.vocab_size] if ours in _VOCAB_ROWS else state[ours]
        if ours == _POSITIONS:
            tensor = F.pad(tensor, (0, 0, architecture.unused_positions, 0))
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[name] = part.detach().clone(memory_format=torch.contiguous_format)
    return result


def write_hugging_face_folder(
    state: Mapping[str, Tensor], architecture: Architecture, tokenizer: str | Path, out: str | Path
) -> None:
    """Writes config.json, model.safetensors and tokenizer files into the existing folder `out`.

    `state` holds our names; its dtype is kept. transformers' AutoModelForMaskedLM loads the result with no missing and
    no unexpected key. Raises ValueError where `state` or the tokenizer's folder is not whole, OSError where the disk is
    full.
    """
    tokenizer, out = Path(tokenizer), Path(out)
    copied = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not copied:
        raise ValueError(f"no tokenizer in {tokenizer}: wanted at least one of {', '.join(TOKENIZER_FILES)}")
    files.write_json(out / "config.json", hugging_face_config(architecture))
    tensors, path = hugging_face_state(state, architecture), out / "model.safetensors"
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without it
    except SafetensorError as error:  # its own type on a full disk
        raise OSError(f"cannot write {path}: {error}") from None
    for file in copied:
        shutil.copyfile(file, out / file.name)
    # auto_map would name code for transformers to run.
    if (out / "tokenizer_config.json").is_file():
        record = files.read_json(out / "tokenizer_config.json")
        if record.pop("auto_map", None) is not None:
            files.write_json(out / "tokenizer_config.json", record)
