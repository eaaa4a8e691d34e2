"""How a sentence-transformers folder makes one embedding of a text: its files, read and written. Standard library only.

modules.json lists what stands behind the encoder: a pooling, and perhaps a normalisation. Of the poolings we compute
the two of today's models, mean and CLS. Whatever else would change an embedding is refused, so that no student learns
from other embeddings than sentence-transformers gives.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from fastdistil.model.architecture import Architecture
from fastdistil.run import files

MODULES = "modules.json"
DENSE = "2_Dense"
"""Where the projection of an export lies."""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What releases before 6 write, a flag a mode, to what newer ones call the mode."""
_NO_LIMIT = 10**6
"""A model_max_length from here on is transformers' way of saying that there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """From the last hidden states of a text's tokens to its embedding."""

    mode: Literal["mean", "cls"]
    """The mean over all tokens, [CLS] and [SEP] included, or the state of the first."""
    normalise: bool
    """Whether the embedding is scaled to length 1."""
    max_length: int | None
    """Tokens of a text that are read, [CLS] and [SEP] included; the rest is cut off. None: as many as positions."""


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling that a sentence-transformers folder describes; None where it has no modules.json.

    Old releases keep the encoder in a folder of its own, 0_Transformer: given that, modules.json is read above it.

    Raises ValueError or FileNotFoundError where a file is damaged or missing, or asks for what is not computed here.
    """
    root, path = _root(folder)
    if root is None:
        return None
    modules = [_module(root, module) for module in files.read_json(root / MODULES, kind=list)]
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        _refuse(
            root / MODULES,
            "the modules Transformer, Pooling and perhaps Normalize",
            ", ".join(kinds) or "none",
            "leave the others out and save the model again, or use another model",
        )
    (_, encoder), (_, pooling), *normalize = modules
    if encoder != path:
        raise ValueError(f"{root} keeps its encoder in a folder of its own: give {root / encoder}")
    _check_settings(root, folder, [root / path / "config.json" for _, path in normalize])
    mode = _mode(root / pooling / "config.json")
    return Pooling(mode=mode, normalise=bool(normalize), max_length=_max_length(folder))


def read_max_length(folder: Path) -> int | None:
    """Tokens of a text that the model in a sentence-transformers folder reads; None where nothing says so.

    Raises ValueError where a file is damaged.
    """
    return None if _root(folder)[0] is None else _max_length(folder)


def write_modules(out: Path, pooling: Pooling, architecture: Architecture) -> None:
    """Writes what makes the existing Hugging Face folder `out` one of sentence-transformers; no tensors.

    In the words of its release 2, which every later release reads. Raises OSError where the disk is full.
    """
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] if architecture.embedding_size else []
    kinds += ["Normalize"] if pooling.normalise else []
    path = [f"{i}_{kind}" if i else "" for i, kind in enumerate(kinds)]  # the encoder is the folder itself
    modules = [
        {"idx": i, "name": str(i), "path": path[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files.write_json(out / MODULES, modules)
    width, longest = architecture.hidden_size, architecture.max_positions
    flags = {flag: mode == pooling.mode for flag, mode in list(_FLAGS.items())[:4]}  # those that release 2 knows
    settings = {
        f"{path[1]}/config.json": {"word_embedding_dimension": width, **flags},
        "sentence_bert_config.json": {"max_seq_length": min(pooling.max_length or longest, longest)},
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    if architecture.embedding_size:
        settings[f"{DENSE}/config.json"] = {
            "in_features": width,
            "out_features": architecture.embedding_size,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    for name, record in settings.items():
        (out / name).parent.mkdir(exist_ok=True)
        files.write_json(out / name, record)


def _root(folder: Path) -> tuple[Path | None, str]:
    """The folder with modules.json, and where below it `folder` lies; (None, "") where there is none."""
    folder = folder.absolute()
    if (folder / MODULES).is_file():
        return folder, ""
    above = folder.parent / MODULES
    if above.is_file() and any(_module(above.parent, m)[1] == folder.name for m in files.read_json(above, kind=list)):
        return folder.parent, folder.name
    return None, ""


def _module(root: Path, module: Any) -> tuple[str, str]:
    """Class and folder of an entry of modules.json.

    Every release has another module path before the class, from sentence_transformers.models.Pooling to
    sentence_transformers.sentence_transformer.modules.pooling.Pooling.
    """
    kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(path, str) or Path(path).name != path:
        _refuse(root / MODULES, "a list of modules with type and path", f"{module!r:.80}", "download the model again")
    package, _, name = kind.rpartition(".")
    return (name if package.partition(".")[0] == "sentence_transformers" else kind), path


def _check_settings(root: Path, folder: Path, normalize: list[Path]) -> None:
    """Raises ValueError where sentence-transformers would read another text, or another part of the output, than we."""
    both = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    settings = {
        root / "config_sentence_transformers.json": {"default_prompt_name": None, "truncate_dim": None},
        **{path: {"transformer_task": "feature-extraction"} for path in _transformer_configs(folder)},
        **dict.fromkeys(normalize, both),
    }
    for path, wanted in settings.items():
        config = files.read_json(path) if path.is_file() else {}
        for name, value in wanted.items():
            if config.get(name, value) != value:
                got = f"{name} {config[name]!r}"
                _refuse(path, f"{name} {value!r}", got, "it is not computed here, use another model")


def _mode(path: Path) -> Literal["mean", "cls"]:
    config = files.read_json(path, fix="download the model again, with its folders")
    modes = config.get("pooling_mode")
    if modes is None:  # no flag at all is sentence-transformers' default
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["mean"], ["cls"]):
        got = " and ".join(map(str, modes)) if isinstance(modes, list) else repr(modes)
        _refuse(path, "the pooling mode mean or cls, one of them", got, "it is not computed here, use another model")
    if config.get("include_prompt", True) is not True:
        fix = "set it where your texts have no prompt, or use another model"
        _refuse(path, "include_prompt true", repr(config["include_prompt"]), fix)
    return cast(Literal["mean", "cls"], modes[0])


def _transformer_configs(folder: Path) -> list[Path]:
    """sentence_bert_config.json, or sentence_roberta_config.json and the like of old releases."""
    return sorted(folder.glob("sentence_*_config.json"))


def _max_length(folder: Path) -> int | None:
    """As sentence-transformers takes it: its own file's, or, since release 6, the tokenizer's."""
    for path, name in (
        *((path, "max_seq_length") for path in _transformer_configs(folder)),
        (folder / "tokenizer_config.json", "model_max_length"),
    ):
        value = files.read_json(path).get(name) if path.is_file() else None
        if value is None or (isinstance(value, int | float) and value >= _NO_LIMIT):
            continue
        if type(value) is not int or value < 3:  # [CLS], a token, [SEP]
            _refuse(path, f"{name} of 3 tokens or more", repr(value), "set it to what the model reads")
        return value
    return None


def _refuse(path: Path, wanted: str, got: str, fix: str) -> NoReturn:
    raise ValueError(f"{path}: wanted {wanted}, got {got}: {fix}")
