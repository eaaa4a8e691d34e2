"""What a Hugging Face folder's weights are, by the headers of their files: names, types, shapes. Standard library only.

A folder that is not the model that its config.json describes is refused by this in milliseconds, before torch is
imported and before any weight is read.
"""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastdistil.model.architecture import Architecture
from fastdistil.run import files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a folder's weights may be: the first of these that is there."""
_FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Types that weights may have, with their bytes. FP8 and integers are nothing without scales that we do not know."""
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
_NOT_OURS = (".h5", ".msgpack", ".index", ".ckpt", ".onnx", ".ot", ".gguf", ".pt", ".pth", ".bin", ".safetensors")


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """As torch spells the floating types: float32."""
    shape: tuple[int, ...]


class Contents(NamedTuple):
    """Which of a folder's tensors make its model."""

    sources: dict[str, tuple[str, ...]]
    """Key of our state dict -> the file's keys that it is stacked from; those of the head where there is one."""
    copies: dict[str, str]
    """The file's key of the tied decoder, or of its bias -> that of the tensor which it must equal."""
    left_out: tuple[str, ...]
    """Modules of no use to encoder and MLM head: a pooler, the head of another task."""

    @property
    def has_head(self) -> bool:
        """Whether there is an MLM head."""
        return "head.bias" in self.sources


def weight_files(folder: Path) -> list[Path]:
    """The files with the folder's weights. Raises ValueError where there are none or not all of them."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to a file that is not there: download the model again")
        if path.is_file():
            return _of_index(path) if path.suffix == ".json" else [path]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _NOT_OURS)
    other_framework = any(name.endswith((".h5", ".msgpack")) for name in others)
    fix = "save the model there by save_pretrained of transformers"
    if other_framework:
        fix = (
            "convert them by transformers 4: from_pretrained(DIR, from_tf=True or from_flax=True).save_pretrained(NEW)"
        )
    raise ValueError(
        f"no weights in {folder}: wanted {' or '.join(WEIGHTS)}, got {', '.join(others) or 'none of them'}: {fix}"
    )


def _of_index(index: Path) -> list[Path]:
    other = "this is not an index of weight files, save the model again"
    weight_map = files.read_json(index, fix=other).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must hold a weight_map of names to files: {other}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} must name files beside itself, got {name!r}")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing, and {index.name} names it: download or copy it too")
    return paths


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the folder.

    Raises ValueError for a file that is damaged, cut short, or holds more than tensors.
    """
    found: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        refuse_pointer(path)
        found |= _safetensors_header(path) if path.suffix == ".safetensors" else _pickle_header(path)
    return found


def refuse_pointer(path: Path) -> None:
    """Raises ValueError where Git LFS has left a pointer in the place of the file."""
    with path.open("rb") as file:
        if file.read(len(files.LFS_POINTER)) == files.LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer of some bytes, not the weights: {files.LFS_FIX}")


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """The file: 8 bytes that say how long the header is, the header in JSON, the tensors."""
    size = path.stat().st_size
    found, end = {}, 0
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"it should have a header of {length:,} bytes and has {size:,} altogether")
            record = json.loads(file.read(length))
        for name, entry in record.items():
            if name != "__metadata__":
                dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
                found[name] = TensorInfo(_SAFETENSORS.get(dtype) or str(dtype), shape)
                end = max(end, int(entry["data_offsets"][1]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if size != 8 + length + end:
        raise ValueError(
            f"{path} is not a readable safetensors file: it has {size:,} bytes and its header describes "
            f"{8 + length + end:,}: download or copy it again"
        )
    return found


class _TensorNames(pickle.Unpickler):
    """Reads torch's pickles without torch. Nothing that a pickle names is called but what stands here."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[Any, int] = {}  # the bytes of each, which tied tensors share

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda dtype, _offset, shape, *_: TensorInfo(dtype, tuple(shape))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            kind = name.removesuffix("Storage")
            return _STORAGES.get(kind, kind.lower())
        raise ValueError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, _location, count, *_ = pid
        self.storages[key] = count * _FLOATS.get(dtype, 1)
        return dtype


def _pickle_header(path: Path) -> dict[str, TensorInfo]:
    """Of a file by torch.save: a zip archive with data.pkl, or, before torch 1.6, four pickles and the storages."""
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    (entry,) = (e for e in archive.infolist() if e.filename.split("/")[1:] == ["data.pkl"])
                    reader = _TensorNames(archive.open(entry))
                    state, begin = reader.load(), 0
            else:
                file.seek(0)
                for _ in range(3):  # a magic number, the version, the byte order
                    _TensorNames(file).load()
                reader = _TensorNames(file)
                state, begin = reader.load(), file.tell()
    except Exception as error:  # whatever the damage leads to
        raise ValueError(refusal_of_pickle(path, error)) from None
    check_state_dict(path, state, TensorInfo)
    size, named = path.stat().st_size, sum(reader.storages.values())
    if begin + named > size:
        raise ValueError(
            f"{path} was cut short: it has {size:,} bytes and names {named:,} of tensors: download or copy it again"
        )
    return dict(state)


def refusal_of_pickle(path: Path, error: Exception) -> str:
    """What is said of a .bin file that is not read."""
    return (
        f"{path} was refused, because it holds more than tensors or is damaged; it is never loaded in a "
        f"less safe way: save the model as safetensors where you trust it ({repr(error).splitlines()[0]:.200})"
    )


def check_state_dict(path: Path, state: Any, kind: type) -> None:
    """Raises ValueError unless `state` maps names to tensors, which are of this `kind`."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, kind):
            raise ValueError(
                f"{path} must hold a state dict, names to tensors, got {type(value).__name__} as {key!r:.80}: save the "
                "model's state_dict() alone"
            )


def match(folder: Path, architecture: Architecture, found: Mapping[str, TensorInfo], *, need_head: bool) -> Contents:
    """Which tensors of the folder are which of the model's.

    Args:
        folder: for messages, and for what its config.json says of the decoder.
        architecture: what its config.json describes.
        found: the tensors of its files.
        need_head: refuse a folder without MLM head.

    Raises ValueError where the folder is not exactly such a model.
    """
    family = architecture.family
    if architecture.num_layers > len(found):
        raise ValueError(f"{folder} describes {architecture.num_layers:,} layers and holds {len(found):,} tensors")
    keys: dict[str, str] = {}
    for key in found:
        name = family.canonical_name(key)
        if name is None:
            continue
        if name in keys:
            raise ValueError(f"{folder} holds {name} twice, as {keys[name]!r} and {key!r}: keep one of them")
        keys[name] = key
    tied = files.read_json(folder / "config.json").get("tie_word_embeddings", True) is not False
    has_decoder = f"{family.decoder}.weight" in keys
    copies = {}
    for alias, name in family.aliases.items():
        key = keys.pop(alias, None)
        if key is not None and (first := keys.setdefault(name, key)) != key:
            if found[key] != found[first]:
                raise ValueError(differs(key, first))
            copies[key] = first

    # A folder without a single tensor of the head is a bare encoder. One with a part of the head is incomplete, unless
    # models of other tasks have that part, too.
    names = family.tensor_names(architecture.num_layers)
    head = {ours for ours in names if ours.startswith("head.")}
    telling = {"head.bias"} if family.classifiers_have_head else head
    without_head = not any(name in keys for ours in telling for name in names[ours])
    if without_head:
        if need_head:
            raise ValueError(_no_head_message(folder))
        names = {ours: theirs for ours, theirs in names.items() if ours not in head}
    elif not tied and not has_decoder:
        raise ValueError(f"{folder} says that tie_word_embeddings is false, and has no {family.decoder}.weight")

    others = {name for name in keys if not family.is_part(name)}
    if without_head and family.classifiers_have_head:
        others |= {name for name in keys if not name.startswith(family.prefix)}
    wanted = {name for theirs in names.values() for name in theirs}
    part = keys.keys() - others
    fix = "save it without them, by save_pretrained of transformers" if wanted <= part else "download or save it again"
    refuse_other_keys(f"{folder} does not hold this model", wanted, part if wanted <= part else keys.keys(), fix)
    for ours, theirs in names.items():
        shape = architecture.shape(ours)
        for name in theirs:
            got = found[keys[name]]
            if got.shape != shape or got.dtype not in _FLOATS:
                raise ValueError(
                    f"{folder}: {keys[name]} must be floats of shape {shape} according to config.json, "
                    f"got {got.dtype} of shape {got.shape}"
                )
    return Contents(
        sources={ours: tuple(keys[name] for name in theirs) for ours, theirs in names.items()},
        copies=copies,
        left_out=tuple(sorted({name.rpartition(".")[0] or name for name in others})),
    )


def differs(copy: str, first: str) -> str:
    """What is said of a decoder that is not the word embeddings, or has two biases."""
    return f"{copy} differs from {first}: only an MLM head whose decoder is tied to the word embeddings is supported"


def _no_head_message(folder: Path) -> str:
    classes = files.read_json(folder / "config.json").get("architectures")
    return (
        f"wanted a model with a masked-LM head in {folder}, got {classes or 'an encoder'} without one: train a head "
        f"with the mlm recipe (python -m fastdistil.pretrain mlm --student.init {folder} ...) and use its export"
    )


def refuse_other_keys(what: str, wanted: Iterable[str], found: Iterable[str], fix: str = "") -> None:
    """Raises ValueError, naming some, where keys are missing or left over; `fix` says what to do about it."""
    missing, unexpected = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{what}: {' and '.join(parts)}{f': {fix}' if fix else ''}")
