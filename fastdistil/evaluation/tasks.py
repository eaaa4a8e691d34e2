"""The tasks that models are compared on: their columns, labels, metrics, and their data from files as distributed.

Local files are Parquet, CSV, TSV or JSON; `datasets` reads them. GLUE's own TSV files and the Hugging Face ones name their columns
differently, so that a task has several layouts. Metrics are scikit-learn's and SciPy's.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where texts and label stand in a file."""

    texts: tuple[str, ...]
    """Names of one or two columns."""
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A table of labelled texts, or of pairs of texts."""

    layouts: tuple[Layout, ...]
    metrics: tuple[str, ...]
    """The task's score is their mean, as GLUE's and the paper's."""
    regression: bool = False
    spans: bool = False
    """Questions, answered by a piece of the second text (squad.py)."""
    glue: bool = True
    published: tuple[float, float] | None = None
    """BERT-base and DistilBERT in the paper (arXiv 1910.01108, tables 1 and 2), x 100."""


def _pair(first: str, second: str, label: str = "label") -> Layout:
    return Layout(texts=(first, second), label=label)


SENTENCE = Layout(texts=("sentence",), label="label")
COLA_COLUMNS = ("source", "label", "star", "sentence")
"""Of CoLA's own files, which have no header."""
SENTENCES = _pair("sentence1", "sentence2")
TASKS: dict[str, Task] = {
    "cola": Task(layouts=(SENTENCE,), metrics=("matthews",), published=(56.3, 51.3)),
    "sst2": Task(layouts=(SENTENCE,), metrics=("accuracy",), published=(92.7, 91.3)),
    "mrpc": Task(
        layouts=(SENTENCES, _pair("#1 String", "#2 String", "Quality")),
        metrics=("accuracy", "f1"),
        published=(88.6, 87.5),
    ),
    "stsb": Task(
        layouts=(SENTENCES, _pair("sentence1", "sentence2", "score")),
        metrics=("pearson", "spearman"),
        regression=True,
        published=(89.0, 86.9),
    ),
    "qqp": Task(
        layouts=(_pair("question1", "question2"), _pair("question1", "question2", "is_duplicate")),
        metrics=("accuracy", "f1"),
        published=(89.6, 88.5),
    ),
    "mnli": Task(
        layouts=(_pair("premise", "hypothesis"), _pair("sentence1", "sentence2", "gold_label")),
        metrics=("accuracy",),
        published=(86.7, 82.2),
    ),
    "qnli": Task(layouts=(_pair("question", "sentence"),), metrics=("accuracy",), published=(91.8, 89.2)),
    "rte": Task(layouts=(SENTENCES,), metrics=("accuracy",), published=(69.3, 59.9)),
    "wnli": Task(layouts=(SENTENCES,), metrics=("accuracy",), published=(53.5, 56.3)),
    "imdb": Task(
        layouts=(Layout(texts=("text",), label="label"),), metrics=("accuracy",), glue=False, published=(93.46, 92.82)
    ),
    "squad": Task(  # published: the mean of EM 81.2 and F1 88.5, of 77.7 and 85.8
        layouts=(), metrics=("exact_match", "f1"), spans=True, glue=False, published=(84.85, 81.75)
    ),
    "squad2": Task(layouts=(), metrics=("exact_match", "f1"), spans=True, glue=False),
}


def table(texts: tuple[str, ...], label: str) -> Task:
    """Any labelled texts, or pairs of them; scored by accuracy. Raises ValueError unless there are one or two columns of text."""
    if len(texts) not in (1, 2):
        raise ValueError(f"--text-columns must be one or two, got {' '.join(texts)}")
    return Task(layouts=(Layout(texts=texts, label=label),), metrics=("accuracy",), glue=False)


GLUE = tuple(name for name, task in TASKS.items() if task.glue)
READERS = {".parquet": "parquet", ".tsv": "csv", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SPLITS = {
    "train": ("train", "msr_paraphrase_train"),
    "validation": ("validation", "dev", "validation_matched", "dev_matched"),
    "test": ("test", "msr_paraphrase_test"),
}
"""What the files of a split are called, before a number or the suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a model is fine-tuned."""

    epochs: int = 3
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples an update."""
    lr: float = 5e-5
    """Highest learning rate."""
    warmup: float = 0.06
    """Share of the updates over which the rate rises; then it falls to zero, linearly."""
    weight_decay: float = 0.0
    """Decoupled, on matrices."""
    max_length: int | None = None
    """Tokens of an example; what is longer is cut, or for SQuAD made into windows. None: 128, for SQuAD 384, or what the model reads."""
    dropout: float | None = None
    """Every dropout of the model. None: as the model says."""
    max_train_examples: int | None = None
    """Train on the first so many examples only."""
    temperature: float = 2.0
    """With a teacher: of the KL."""
    kd: float = 0.5
    """With a teacher: weight of the KL, T^2 included; the cross-entropy has 1 - kd."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
        for name in ("warmup", "kd"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise ValueError(f"--lr must be in (0, 1), got {self.lr}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, slots=True)
class Examples:
    """One split: texts as a column each, and a number a row (a class, or the target of a regression)."""

    texts: tuple[Sequence[str], ...]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Examples":
        """The first `count` rows."""
        return Examples(tuple(t[:count] for t in self.texts), self.labels[:count])


@dataclass(frozen=True, slots=True)
class TaskData:
    """What a model is fine-tuned and scored on."""

    task: Task
    train: Examples
    validation: Examples
    label_names: tuple[str, ...]
    """Of the classes, by their number; empty for a regression."""


def load(name: str, task: Task, source: str) -> TaskData:
    """The data of a task in a folder (D, or D/NAME) or, as hf:NAME[:CONFIG], of a dataset on the hub.

    Rows without a label (-1, "-", none) are left out. The score is taken on the validation split, or on the test split where there
    is no other. Raises ValueError where files, columns or labels are missing.
    """
    if source.startswith("hf:"):
        tables = hub_tables(source)
    else:
        tables = {split: rows_of(paths) for split, paths in split_files(name, source).items()}
    held_out = "validation" if "validation" in tables else "test"
    columns = {split: _columns(tables[split], task, source) for split in ("train", held_out)}
    (train_texts, train_labels), (texts, labels) = columns["train"], columns[held_out]
    if not train_labels or not labels:
        raise ValueError(f"{source}: {name} has no labelled row in train or in {held_out}")
    if task.regression:
        numbers = [float(label) for label in train_labels], [float(label) for label in labels]
        return TaskData(task, Examples(train_texts, numbers[0]), Examples(texts, numbers[1]), ())
    order = {label: float(i) for i, label in enumerate(sorted(set(train_labels)))}
    if unknown := set(labels) - order.keys():
        raise ValueError(
            f"{source}: {name} has labels in {held_out} that train has not: {', '.join(map(str, sorted(unknown)[:5]))}"
        )
    if len(order) < 2:
        raise ValueError(f"{source}: every row of {name} is labelled {train_labels[0]!r}: wanted two classes")
    return TaskData(
        task,
        Examples(train_texts, [order[label] for label in train_labels]),
        Examples(texts, [order[label] for label in labels]),
        tuple(map(str, order)),
    )


def score(task: Task, predicted: Any, labels: Any) -> dict[str, float]:
    """Each of the task's metrics as a fraction, and "score", their mean: (N,) predictions against (N,) labels.

    A correlation with predictions that are all the same is 0.
    """
    import numpy as np
    from scipy import stats
    from sklearn import metrics

    found: dict[str, float] = {}
    for name in task.metrics:
        if name == "accuracy":
            found[name] = float(metrics.accuracy_score(labels, predicted))
        elif name == "f1":
            found[name] = float(metrics.f1_score(labels, predicted))
        elif name == "matthews":
            found[name] = float(metrics.matthews_corrcoef(labels, predicted))
        elif np.ptp(predicted) == 0:
            found[name] = 0.0
        else:
            correlation: Any = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
            found[name] = float(correlation(predicted, labels).statistic)
    return found | {"score": sum(found.values()) / len(found)}


def split_files(name: str, source: str) -> dict[str, list[Path]]:
    """{split: files} of the task in D/NAME, or in D. Raises ValueError unless there are training files and others."""
    folder = Path(source)
    folder = folder / name if (folder / name).is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"--data {source} is not a folder: give the one that holds {name}'s files")
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS)
    if name in ("squad", "squad2") and len({"v2" in file.name for file in files}) == 2:
        files = [file for file in files if ("v2" in file.name) == (name == "squad2")]
    found = {}
    for split, stems in SPLITS.items():
        of_split = [f for f in files if f.name.split(".")[0].split("-")[0] in stems]
        if len({f.suffix for f in of_split}) > 1:
            raise ValueError(f"{folder} holds {split} in several formats: keep one")
        if of_split:
            found[split] = of_split
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"{folder} does not hold {name}: wanted train and validation (or dev, or test) files, of {' '.join(READERS)}, "
            f"got {' '.join(f.name for f in sorted(folder.iterdir())[:8]) or 'nothing'}"
        )
    return found


def rows_of(files: list[Path]) -> Any:
    """The rows of files of one format, as a dataset. ValueError where they cannot be read."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # type: ignore  # it tells the hub, of local files too
    options: dict[str, Any] = {}
    if files[0].suffix in (".tsv", ".csv"):  # no text is a missing value, e.g. "null"
        options = {"keep_default_na": False}
    reader, paths = READERS[files[0].suffix], [str(f) for f in files]
    try:
        if files[0].suffix == ".tsv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
            if names := _names_without_header(files[0]):
                options |= {"column_names": list(names)}
        return datasets.load_dataset(reader, data_files=paths, split="train", **options)
    except Exception as error:  # its own, pandas' and pyarrow's
        raise ValueError(f"{', '.join(paths)}: not readable as {reader} ({error.__cause__ or error!r})") from error


def _names_without_header(path: Path) -> tuple[str, ...] | None:
    with path.open(encoding="utf-8") as file:
        cells = file.readline().rstrip("\n").split("\t")
    if len(cells) == len(COLA_COLUMNS) and cells[1] in ("0", "1"):
        return COLA_COLUMNS
    return None


def hub_tables(source: str) -> dict[str, Any]:
    """{split: dataset} of a name on the hub."""
    import datasets

    _, path, *rest = source.split(":")
    config = rest[0] if rest else None
    found = {}
    for split in datasets.get_dataset_split_names(path, config_name=config):
        if split in ("train", "validation", "validation_matched", "test"):
            key = split.removesuffix("_matched")
            found[key] = datasets.load_dataset(path, config, split=split)
    return found


def _columns(table: Any, task: Task, source: str) -> tuple[tuple[list[str], ...], list[Any]]:
    """(texts, labels) of the labelled rows."""
    for layout in task.layouts:
        if {*layout.texts, layout.label} <= set(table.column_names):
            labels = list(table[layout.label])
            rows = [i for i, label in enumerate(labels) if label not in (None, -1, "-1", "-", "")]
            texts = tuple([str(t) for t in table.select(rows)[name]] for name in layout.texts)
            return texts, [labels[i] for i in rows]
    wanted = " or ".join(", ".join((*layout.texts, layout.label)) for layout in task.layouts)
    raise ValueError(f"{source}: wanted the columns {wanted}, got {', '.join(table.column_names)}")
