"""Hugging Face folders <-> our state dict, and a student's first weights out of its teacher.

Nothing is guessed: a tensor that is missing, left over or of the wrong shape is an error that names it. Files are read
as safetensors, else as a pickle with `weights_only=True`, and never in any less safe way.

Shapes: D hidden width, V vocabulary (padded to a multiple of 64 in our state dict, not in a folder).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from fastdistil.model import headers, sentence
from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture, read_architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run import files

_VOCAB_ROWS = ("encoder.word_embeddings.weight", "head.bias")
"""Tensors of our state dict whose rows are padded."""
_POSITIONS = "encoder.position_embeddings.weight"
"""The tensor whose table has unused rows in some families."""
_PROJECTION = "projection.weight"
"""The tensor that lies in a file of its own, which transformers does not read and sentence-transformers does."""
_TOKEN_TYPES = "encoder.token_type_embeddings.weight"
"""The tensor of which only row 0 is used here."""


@torch.no_grad()
def load_masked_lm(
    folder: str | Path,
    *,
    need_head: bool,
    with_head: bool = True,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> MaskedLM:
    """The model of a Hugging Face folder, in fp32 on the CPU, in training mode.

    Reads every class of transformers that is an encoder of the families in families.py with heads on it; poolers, heads
    of other tasks and position buffers are left out, preflight says which.

    Args:
        folder: with config.json and model.safetensors, else pytorch_model.bin, whole or in shards with an index.
        need_head: refuse a folder without MLM head. Otherwise such a folder gets a fresh head.
        with_head: whether the model has one, whatever the folder has.
        vocab_size: leave out the rows of the vocabulary from this one on, which no token has.
        generator: draws that fresh head; seed 0 if none is given.

    Raises ValueError where the folder is not exactly such a model.
    """
    folder = Path(folder)
    whole = read_architecture(folder)
    tensors: dict[str, Tensor] = {}
    for path in headers.weight_files(folder):
        headers.refuse_pointer(path)
        tensors |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    found = {key: headers.TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in tensors.items()}
    contents = headers.match(folder, whole, found, need_head=need_head)
    for copy, first in contents.copies.items():
        if not torch.equal(tensors[copy], tensors[first]):  # on the CPU, once a load
            raise ValueError(headers.differs(copy, first))

    # A padding id only says which row gets no gradient. One that is cut off is not the one that is used.
    rows = vocab_size or whole.vocab_size
    used = replace(whole, vocab_size=rows, pad_id=whole.pad_id if whole.pad_id < rows else 0, mlm_head=with_head)
    model = MaskedLM(used, generator=generator)
    # What is copied into the state dict is in the model: they share their memory. Padding and unused rows are left out.
    own = model.state_dict()
    for ours, keys in contents.sources.items():
        if ours not in own:  # of a head that is not wanted
            continue
        target = own[ours][:rows] if ours in _VOCAB_ROWS else own[ours]
        unused = whole.unused_positions if ours == _POSITIONS else 0
        target.copy_(torch.cat([tensors[key][unused:] for key in keys])[: len(target)])
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(headers.refusal_of_pickle(path, error)) from None
    headers.check_state_dict(path, state, Tensor)
    return state


@torch.no_grad()
def student_from_teacher(
    teacher: MaskedLM,
    layers: Sequence[int],
    architecture: Architecture,
    *,
    copy_transform: bool,
    fold_token_types: bool = False,
    generator: torch.Generator | None = None,
) -> MaskedLM:
    """A student that starts as copies of the teacher's weights, as the authors' did.

    Copied: word and position embeddings, the embedding LayerNorm, the teacher's layers named in `layers`, the decoder
    bias, and the first rows of the token-type table if the student has one; rows that the teacher has not start as its
    row 0, the type of every token. Without a table, the teacher's row 0 is left out, as in the authors' script, unless
    it is folded into the positions.

    Args:
        teacher: source of the weights; it is not changed and shares no memory with the student.
        layers: the teacher's layer for each of the student's, counted from 0.
        architecture: the student's; widths, heads, vocabulary and positions as the teacher's.
        copy_transform: copy the dense layer and LayerNorm of the MLM head too; otherwise they start fresh.
        fold_token_types: add the teacher's row 0 to the positions of a student without a table: the same sums.
        generator: draws what is fresh; seed 0 if none is given.

    Raises ValueError where `layers` or `architecture` do not fit the teacher.
    """
    source = teacher.architecture
    if len(layers) != architecture.num_layers or not all(0 <= i < source.num_layers for i in layers):
        raise ValueError(
            f"the layer map must name {architecture.num_layers} layers, one for each of the student's, "
            f"from 0 to {source.num_layers - 1} of the teacher, got {list(layers)}"
        )
    sizes = ("vocab_size", "hidden_size", "num_heads", "ffn_size", "max_positions", "global_theta", "local_theta")
    same = all(getattr(architecture, name) == getattr(source, name) for name in sizes)
    same &= all(architecture.window(i) == source.window(layer) for i, layer in enumerate(layers))
    # The student is what its teacher is, or the same without token types where the family has such students.
    has_types = architecture.token_types > 0
    kind = source.family.students.get(has_types, source.model_type)
    if not same or architecture.model_type != kind or (has_types and not source.token_types):
        raise ValueError(
            "a student that starts from teacher layers must have the teacher's widths, heads, vocabulary, positions "
            f"and windows, got {architecture} for {source}: change them back, or start from random weights"
        )
    student = MaskedLM(architecture, generator=generator)
    teacher_state = teacher.state_dict()
    for name, target in student.state_dict().items():
        if name.startswith("encoder.layers."):
            index, _, rest = name.removeprefix("encoder.layers.").partition(".")
            target.copy_(teacher_state[f"encoder.layers.{layers[int(index)]}.{rest}"])
        elif name == _TOKEN_TYPES:
            table = teacher_state[name][: len(target)]
            target.copy_(table[:1].expand_as(target))
            target[: len(table)].copy_(table)
        elif name in teacher_state and (copy_transform or not name.startswith(("head.dense.", "head.norm."))):
            target.copy_(teacher_state[name])
        if name == _POSITIONS and fold_token_types and source.token_types and not architecture.token_types:
            target.add_(teacher_state[_TOKEN_TYPES][0])
    return student


@torch.no_grad()
def start_head(model: MaskedLM, frequencies_V: Tensor) -> None:
    """Have a fresh MLM head begin with what is known: which word embeddings a hidden state is similar to, on top of how
    often each token is a label. Its dense layer becomes the identity, its bias the logarithm of `frequencies_V`."""
    assert model.head is not None
    torch.nn.init.eye_(model.head.dense.weight)
    model.head.bias[: len(frequencies_V)] = frequencies_V.log()


def hugging_face_config(architecture: Architecture) -> dict[str, Any]:
    """The content of config.json for the exported model."""
    family = architecture.family
    sizes = {name: getattr(architecture, field) for field, name in family.fields.items()}
    sizes[family.fields["max_positions"]] += architecture.unused_positions
    return {
        "architectures": [family.masked_lm if architecture.mlm_head else family.encoder],
        "model_type": architecture.model_type,
        "dtype": "float32",
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        **dict.fromkeys(family.activations, "gelu"),
        **family.must_be,
        **family.constants,
        **sizes,
        **{name: getattr(architecture, field) for name, field in family.copies.items()},
    }


def hugging_face_state(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names: q, k and v apart, no vocabulary padding, unused positions as zeros.

    Without MLM head they are those of AutoModel's class, as its own save_pretrained writes them. A projection is left
    out, which no class of transformers has. Every tensor owns its memory and the tied decoder weight appears once, as
    the word embeddings: safetensors refuses aliases, and transformers ties the decoder again when it loads. Raises
    ValueError where `state` has other keys.
    """
    family, width = architecture.family, architecture.hidden_size
    names = family.tensor_names(architecture.num_layers, with_head=architecture.mlm_head)
    wanted = {*names, _PROJECTION} if architecture.embedding_size else {*names}
    headers.refuse_other_keys("these are not the weights of this architecture", wanted, state)
    result, above = {}, "" if architecture.mlm_head else family.prefix
    for ours, theirs in names.items():
        tensor = state[ours][: architecture.vocab_size] if ours in _VOCAB_ROWS else state[ours]
        if ours == _POSITIONS:
            tensor = F.pad(tensor, (0, 0, architecture.unused_positions, 0))
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[name.removeprefix(above)] = part.detach().clone(memory_format=torch.contiguous_format)
    if family.pooler and not architecture.mlm_head:
        # Zeros instead of the random numbers that transformers would draw: what nothing trained is not to look trained.
        zeros = state[_POSITIONS].new_zeros(width + 1, width)
        result |= {f"{family.pooler}.weight": zeros[:width].clone(), f"{family.pooler}.bias": zeros[width].clone()}
    return result


def write_model(state: Mapping[str, Tensor], architecture: Architecture, out: str | Path) -> None:
    """Writes config.json and model.safetensors into the existing folder `out`; a projection into a folder in it.

    `state` holds our names; its dtype is kept. transformers' AutoModelForMaskedLM, or AutoModel where there is no MLM
    head, loads the result with no missing and no unexpected key. Raises ValueError where `state` is not whole, OSError
    where the disk is full.
    """
    out = Path(out)
    tensors = hugging_face_state(state, architecture)
    files.write_json(out / "config.json", hugging_face_config(architecture))
    _write_safetensors(tensors, out / "model.safetensors")
    if architecture.embedding_size:
        (out / sentence.DENSE).mkdir(exist_ok=True)
        projection = state[_PROJECTION].detach().clone(memory_format=torch.contiguous_format)
        _write_safetensors({"linear.weight": projection}, out / sentence.DENSE / "model.safetensors")


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without it
    except SafetensorError as error:  # its own type on a full disk
        raise OSError(f"cannot write {path}: {error}") from None
