"""A run becomes a folder that Hugging Face loads: `python -m fastdistil.export RUN --out DIR`.

The folder holds config.json, model.safetensors (fp32), the tokenizer's files and a model card; where the student
learned embeddings, also what sentence-transformers reads. It appears under its name only when it is whole. torch is
imported after the command line and the run have been checked.
"""

import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from fastdistil import __version__
from fastdistil.data import tokenizer
from fastdistil.model.architecture import Architecture, from_record
from fastdistil.model.sentence import DENSE, Pooling, write_modules
from fastdistil.remote import hub, mirror
from fastdistil.remote.storage import url_of
from fastdistil.run import console, files, folder, options
from fastdistil.run.command import command, leave
from fastdistil.run.config import LOSS_TERMS, NO_PATHS, LossConfig, flatten

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from torch import Tensor

_CARD_SECTIONS = ("loss", "masking", "optim", "batch", "student")
"""What of a run's configuration its model card shows: what shaped the weights, no paths."""

_UNKNOWN = "unknown"
"""The hub's word for a licence."""
_UNLICENSED = """
No licence is stated: it is the publisher's to choose, and those of the models and texts it comes from may bind them.
"""
_OF_THE_WHOLE = "These figures are of the whole run, not of this part of its student alone."


class _Use(NamedTuple):
    """What a kind of export is for."""

    library: str
    task: str
    """The hub's pipeline_tag."""
    load: str
    """What loads it; {} stands for its name in quotes."""
    snippet: str
    """The card's example; {} stands for its name in quotes."""
    score: str
    """Arguments of evaluate; {} stands for the teacher."""


_FILL_MASK = _Use(
    "transformers",
    "fill-mask",
    "AutoModelForMaskedLM.from_pretrained({})",
    """from transformers import pipeline

fill_mask = pipeline("fill-mask", model={})""",
    "--task glue --data GLUE",
)
_HIDDEN_STATES = _Use(
    "transformers",
    "feature-extraction",
    "AutoModel.from_pretrained({})",
    """from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained({0}), AutoModel.from_pretrained({0})
states = model(**tokenizer("The river is quiet.", return_tensors="pt")).last_hidden_state""",
    "{}--task sts --data PAIRS --card",
)
_EMBEDDINGS = _Use(
    "sentence-transformers",
    "sentence-similarity",
    "SentenceTransformer({})",
    """from sentence_transformers import SentenceTransformer

model = SentenceTransformer({})
embeddings = model.encode(["The river is quiet.", "Still waters.", "A loud street."])
print(model.similarity(embeddings, embeddings))""",
    "{}--task sts --data PAIRS --card",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Turn a run of fastdistil.pretrain into a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or the URL that was its --mirror."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    checkpoint: int | None = None
    """Export the checkpoint made after this many updates. None: the newest."""
    layers: int | None = None
    """Export the first of the student's layers alone: of a run with --loss.nested-layers, one of these numbers."""
    dimensions: int | None = None
    """Cut the embeddings to their first numbers: of a run with --loss.nested-dimensions, one of these."""
    overwrite: bool = False
    """Replace --out if it holds an earlier export, and what --push names."""
    license: str | None = None
    """The model's licence in its card, as the hub writes it: apache-2.0. None: that of the models it comes from, where
    their cards say it."""
    push: str | None = None
    """Push the folder to USER/NAME on the Hugging Face hub, with the login of `hf auth login`."""
    private: bool = False
    """Make what --push makes visible to you alone."""


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: the folder is there, and pushed. 1: it could not be pushed. 2: a wrong command line or run, or
    no right to push; nothing was written."""
    logging.getLogger("fastdistil.kernels").setLevel(logging.ERROR)  # that they are slow here: none of them runs
    print(export(options.parse(ExportConfig, args, "export")))
    return 0


def export(config: ExportConfig) -> str:
    """Writes the folder and returns two lines: what it is and how to load it, and how to see what the student kept.

    A third one says where it was pushed to. Raises ValueError or OSError where the run cannot be exported or --out not
    be used; --out is then unchanged; and Failed where it could not be pushed.
    """
    if (url := url_of(config.run)) is not None:
        with TemporaryDirectory() as here:
            mirror.fetch(url, Path(here, "run"))
            return export(replace(config, run=Path(here, "run")))
    record = folder.read(config.run)
    student = _architecture(config.run, record, "student")
    teacher = _architecture(config.run, record, "teacher") if record.get("teacher") else None
    pooling = _pooling(config.run, record)
    exported = _cut(config, record, student)
    if not (config.run / "tokenizer").is_dir():
        raise ValueError(f"{config.run} is not a whole run: wanted its tokenizer in {config.run / 'tokenizer'}")
    _check_out(config.out, overwrite=config.overwrite)
    if config.push is not None:
        hub.require_place(config.push, overwrite=config.overwrite)
    elif config.private:
        raise ValueError("--private has no effect without --push: leave it out")

    # Two seconds of torch, so only when nothing above was wrong.
    from fastdistil.run import checkpoint

    state, progress = checkpoint.load_weights(config.run, config.checkpoint)
    metrics = _last_metrics(config.run / "metrics.jsonl", progress["update"])
    with _replacing(config.out) as part:
        write_hugging_face_folder(_first(state, student, exported), exported, config.run / "tokenizer", part, pooling)
        try:
            name = config.push or config.out.name
            card = model_card(name, record, exported, teacher, progress, metrics, pooling, licence=config.license)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config.run / 'config.json'} does not describe a run: {error!r}") from error
        files.write_text(part / "README.md", card)
    use, teacher_path = _use(exported, pooling), flatten(record["config"]).get("teacher.path")
    reference = f"--reference {shlex.quote(teacher_path)} " if teacher_path else ""
    pushed = f"{hub.push(config.out, config.push, private=config.private)}\n" if config.push else ""
    return (
        f"{config.out}: {_class_name(exported)}, {exported.num_parameters:,} parameters, after update "
        f"{progress['update']:,}{_skipped(progress)}; load it with "
        f"{use.load.format(repr(str(config.out)))}\n"
        f"{pushed}next: {console.command_line('evaluate', config.out)} {use.score.format(reference)}"
    )


def write_hugging_face_folder(
    state: "Mapping[str, Tensor]", architecture: Architecture, words: Path, out: Path, pooling: Pooling | None = None
) -> None:
    """Writes model and tokenizer into the existing folder `out`; with a pooling also what sentence-transformers reads.

    `state` holds our names; its dtype is kept. transformers, 4 and 5, loads the model with no missing and no unexpected
    key, and the tokenizer, that of the folder `words`, to the same ids, with the inputs that the model takes. Raises
    ValueError or OSError where `state` or `words` is not whole, and OSError where the disk is full.
    """
    from fastdistil.model.weights import write_model

    tables = {"max_positions": architecture.max_positions, "token_types": architecture.token_types}
    tokenizer.export(words, out, **tables)
    write_model(state, architecture, out)
    if pooling is not None:
        write_modules(out, pooling, architecture)


def _pooling(run: Path, record: dict[str, Any]) -> Pooling | None:
    """How the student's hidden states become embeddings; None of a run that knows of none."""
    try:
        return Pooling(**record["pooling"]) if record.get("pooling") else None
    except TypeError as error:
        raise ValueError(f"{run / 'config.json'} does not describe a pooling: {error}") from None


def _cut(config: ExportConfig, record: dict[str, Any], student: Architecture) -> Architecture:
    """What of the student is exported. Raises ValueError for a part that was not trained to be a model by itself."""
    whole = {"layers": student.num_layers, "dimensions": student.embedding_size or student.hidden_size}
    trained = flatten(record["config"])
    for name, all_of_it in whole.items():
        asked, offered = getattr(config, name), [*(trained.get(f"loss.nested_{name}") or ()), all_of_it]
        if asked is not None and asked not in offered:
            raise ValueError(
                f"--{name} must be one of {', '.join(map(str, sorted({*offered})))}, which this run trained to be used "
                f"alone, got {asked}: give one of these, or train with --loss.nested-{name} {asked}"
            )
    embedding_size = student.embedding_size
    if config.dimensions not in (None, whole["dimensions"]):
        embedding_size = config.dimensions
    return replace(student, num_layers=config.layers or student.num_layers, embedding_size=embedding_size)


def _first(state: "Mapping[str, Tensor]", student: Architecture, part: Architecture) -> "dict[str, Tensor]":
    """The weights of the first layers, and a projection to the first dimensions where the embeddings are cut.

    sentence-transformers' truncate_dim would cut after the embeddings have got the length 1, and old releases do not
    read it.
    """
    import torch

    left_out = tuple(f"encoder.layers.{i}." for i in range(part.num_layers, student.num_layers))
    first = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    if part.embedding_size != student.embedding_size:
        projection = state.get("projection.weight", torch.eye(student.hidden_size))
        first["projection.weight"] = projection[: part.embedding_size]
    return first


def _class_name(student: Architecture) -> str:
    return student.family.masked_lm if student.mlm_head else student.family.encoder


def _architecture(run: Path, record: dict[str, Any], role: str) -> Architecture:
    try:
        return from_record(record[role])
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'} does not describe a {role}: {error}") from None


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.name:
        raise ValueError(f"--out must name a folder to make, got {str(out)!r}")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out must be a folder, got the file or link {out}: choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty: choose another, or replace it by --overwrite")
    if not all((out / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ValueError(f"--out {out} holds no export, so --overwrite does not delete it: choose another")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end, or is deleted after an exception."""
    part, replaced = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.replaced")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)  # kept until the new one is in its place
        part.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _last_metrics(path: Path, update: int) -> dict[str, dict[str, Any]]:
    """The last record of each split in metrics.jsonl not later than `update`; none without the file."""
    last: dict[str, dict[str, Any]] = {}
    for record in files.read_json_lines(path):
        split, at = record.get("split"), record.get("update")
        if isinstance(split, str) and isinstance(at, int) and at <= update:
            last[split] = record
    return last


def model_card(
    name: str,
    record: dict[str, Any],
    student: Architecture,
    teacher: Architecture | None,
    progress: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
    pooling: Pooling | None = None,
    licence: str | None = None,
) -> str:
    """The README.md of the exported folder: what the model is, how it was trained, how to load it.

    `record` is the run's config.json, `student` what of its student is exported, `progress` the state of the exported
    checkpoint, `metrics` the last record of each split, `pooling` that of a student of embeddings, `licence` None for
    that of the models it comes from.
    Raises AttributeError, KeyError, TypeError or ValueError where `record` is not what a run writes.
    """
    config, data = record["config"], record.get("data") or {}
    origins = _origins(config, distilled=teacher is not None)
    metadata = _metadata(origins, data.get("sources"), _use(student, pooling), licence)
    facts = _facts(record, student, teacher, progress, pooling, origins)
    titles = {term.name: term.title for term in LOSS_TERMS}
    measured = [
        (split, key, "not finite" if value is None else f"{value:.4g}", titles.get(key, ""))
        for split, values in metrics.items()
        for key, value in values.items()
        if isinstance(value, float | None) and not key.endswith(("_per_s", "mfu", "seconds", "_gib"))
    ]
    settings = flatten({key: config[key] for key in _CARD_SECTIONS if key in config})
    settings.pop("student.init", None)  # may be a path; the teacher's row says what it was
    use = _use(student, pooling)
    return f"""---
{metadata.to_yaml()}
---
# {name}

{_introduction(_class_name(student), use, distilled=teacher is not None)}

```python
{use.snippet.format(repr(name))}
```

## Training
{_table(("", ""), facts.items())}

{_UNLICENSED if metadata.license == _UNKNOWN else ""}
## Losses
{_losses(config.get("loss") or {}, distilled=teacher is not None)}

{_table(("split", "measure", "value", ""), measured) if measured else "No metrics were recorded."}
{_OF_THE_WHOLE if student != from_record(record["student"]) else ""}

## Settings
{_table(("setting", "value"), ((k, f"`{json.dumps(v)}`") for k, v in settings.items()))}
"""


def _facts(
    record: dict[str, Any],
    student: Architecture,
    teacher: Architecture | None,
    progress: dict[str, Any],
    pooling: Pooling | None,
    origins: dict[str, Path],
) -> dict[str, str]:
    """The card's table of what the model is and where it comes from."""
    config, data = record["config"], record.get("data") or {}
    return {
        "recipe": f"`{config.get('recipe', 'unknown')}`",
        "student": f"{_sizes(student)}; {student.num_parameters:,} parameters",
        **_about_embeddings(record, student, pooling),
        "starts from": _start(config, record, origins),
        "teacher": f"{_named(origins['teacher'])}, {_sizes(teacher)}" if teacher and "teacher" in origins else "none",
        **_mixture(config, record, origins),
        "updates": f"{progress['update']:,}{_skipped(progress)}",
        "training tokens": f"{progress['tokens']:,}" if "tokens" in progress else "not recorded",
        "data": f"{_sources(data.get('sources'))}: {data.get('num_sequences', 0):,} sequences, "
        f"{data.get('num_tokens', 0):,} tokens" + (f"; tokens mixed as {data['mix']}" if data.get("mix") else ""),
        "tokenizer sha256": f"`{data.get('tokenizer_sha256', 'not recorded')}`",
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()) or "not recorded",
        "exported by": f"fastdistil {__version__}",
    }


def _skipped(progress: dict[str, Any]) -> str:
    skipped = progress.get("skipped", 0)
    return f" ({skipped:,} of them skipped: their gradients were not finite)" if skipped else ""


def _use(student: Architecture, pooling: Pooling | None) -> _Use:
    return _EMBEDDINGS if pooling else _FILL_MASK if student.mlm_head else _HIDDEN_STATES


def _origins(config: dict[str, Any], *, distilled: bool) -> dict[str, Path]:
    """The folders of the models that the student learnt from: its teachers, and what its weights start from."""
    teacher, init = config.get("teacher") or {}, (config.get("student") or {}).get("init", "teacher")
    found = {"teacher": Path(teacher["path"])} if distilled and teacher.get("path") else {}
    found |= {f"other {number}": Path(path) for number, path in enumerate(teacher.get("others") or ())}
    return found | ({"init": Path(init)} if init not in NO_PATHS else {})


def _metadata(origins: dict[str, Path], sources: Any, use: _Use, licence: str | None) -> "ModelCardData":
    """What the hub reads of a card. Licence and language are those of the cards of the origins, where they are here."""
    from huggingface_hub import ModelCardData

    tags = ["fastdistil", "knowledge-distillation" if "teacher" in origins else "masked-language-modeling"]
    tags += ["sentence-transformers", "feature-extraction"] if use is _EMBEDDINGS else []
    cards = [hub.card_of(path) for path in origins.values()]
    languages = dict.fromkeys(one for card in cards for one in _listed(card.get("language")))
    about: dict[str, Any] = {
        name: card[name] for card in cards for name in ("license", "license_name", "license_link") if name in card
    }
    if licence is not None or len({card.get("license") for card in cards}) != 1:
        about = {"license": licence or _UNKNOWN}
    # Where the weights come from, else what was imitated: the hub's tree of models has one root, and "finetune" for it.
    named = [found[0] for role in ("init", "teacher") if role in origins and (found := hub.snapshot(origins[role]))]
    about.setdefault("license", _UNKNOWN)
    if named:
        about |= {"base_model": named[0], "base_model_relation": "finetune"}
    names = [str(s.get("name", "")) if isinstance(s, dict) else str(s) for s in sources or ()]
    on_hub = (re.match("hf:([^/:]+/[^/:]+)", name) for name in names)
    return ModelCardData(
        **about,
        language=list(languages) or None,
        library_name=use.library,
        pipeline_tag=use.task,
        datasets=list(dict.fromkeys(found[1] for found in on_hub if found)) or None,
        tags=tags,
    )


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value] if isinstance(value, list) else []


def _named(origin: Path) -> str:
    """What a card calls a model: its name on the hub with the commit, else that of its folder."""
    found = hub.snapshot(origin)
    return f"`{found[0]}` (commit {found[1][:12]})" if found else f"`{origin.name}`"


def _start(config: dict[str, Any], record: dict[str, Any], origins: dict[str, Path]) -> str:
    """The row of the card about the first weights."""
    init, layers = (config.get("student") or {}).get("init", "teacher"), record.get("layers")
    if init == "random":
        return "random weights"
    of = "the teacher" if init == "teacher" else _named(origins["init"])
    return f"layers {' '.join(map(str, layers))} of {of}" if layers else of


def _mixture(config: dict[str, Any], record: dict[str, Any], origins: dict[str, Path]) -> dict[str, str]:
    """The row of the card about teachers beside the first."""
    sizes = [_sizes(from_record(other)) for other in record.get("others") or ()]
    if not sizes:
        return {}
    others = "; ".join(f"{_named(origins[f'other {number}'])}, {about}" for number, about in enumerate(sizes))
    weights = config["teacher"].get("weights") or [1] * (1 + len(sizes))
    return {"other teachers": f"{others}. All distributions are averaged, {' : '.join(f'{w:g}' for w in weights)}"}


def _about_embeddings(record: dict[str, Any], student: Architecture, pooling: Pooling | None) -> dict[str, str]:
    """Rows of the card about what the student's embeddings are, and about what of the student this is."""
    rows = {}
    if pooling is not None:
        state = "mean of the last hidden states" if pooling.mode == "mean" else "last hidden state of the first token"
        dense = f", times the {student.embedding_size} rows of {DENSE}" if student.embedding_size else ""
        reads = min(pooling.max_length or student.max_positions, student.max_positions)
        length = ", scaled to length 1" if pooling.normalise else ""
        rows["embedding"] = f"{state}{dense}{length}; of a text its first {reads} tokens are read"
    whole = from_record(record["student"])
    if student.num_layers < whole.num_layers:
        rows["layers"] = f"the first {student.num_layers} of {whole.num_layers}, trained to be a model by themselves"
    size = whole.embedding_size or whole.hidden_size
    if student.embedding_size and student.embedding_size < size:
        rows["dimensions"] = f"the first {student.embedding_size} of {size}, trained to be used alone (Matryoshka)"
    return rows


def _introduction(class_name: str, use: _Use, *, distilled: bool) -> str:
    if use is _EMBEDDINGS:
        return (
            f"A `{class_name}` that was distilled from a larger encoder to give its embeddings of texts. "
            "transformers' `AutoModel` loads the same folder; the table says what to make of its hidden states."
        )
    if use is _HIDDEN_STATES:
        return f"A `{class_name}`, without a head, that was distilled from a larger encoder to give its hidden states."
    if not distilled:
        return f"A `{class_name}` pre-trained by masked language modelling, without a teacher."
    return (
        f"A `{class_name}` distilled from a larger encoder during pre-training, as "
        "[DistilBERT](https://arxiv.org/abs/1910.01108) was."
    )


def _losses(loss: dict[str, Any], *, distilled: bool) -> str:
    if not distilled:
        return "Cross-entropy of the masked tokens."
    weighed = [(loss.get(term.name), term.formula) for term in LOSS_TERMS]
    loss = asdict(LossConfig()) | loss  # of a run that is older than an option
    return " + ".join(f"{weight} x {formula.format_map(loss)}" for weight, formula in weighed if weight) + "."


def _sizes(model: Architecture) -> str:
    windows = f" ({model.windows})" if model.windows else ""
    return (
        f"{model.num_layers} layers{windows}, {model.hidden_size} wide, {model.num_heads} heads, "
        f"{'gated ' * model.family.gated}feed-forward {model.ffn_size}, vocabulary {model.vocab_size:,}, "
        f"{model.max_positions} positions"
    )


def _sources(sources: Any) -> str:
    """The names of the texts, without the folders they lay in."""
    names = [s.get("name", "?") if isinstance(s, dict) else s for s in sources or ()]
    return ", ".join(Path(str(name)).name for name in names) or "not recorded"


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


if __name__ == "__main__":
    leave(main())
