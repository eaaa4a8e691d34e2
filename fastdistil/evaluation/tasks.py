"""The tasks that models are compared on: their columns, labels and metrics, and their data from files as distributed.

Local files are Parquet, CSV, TSV or JSON; `datasets` reads them. GLUE's own TSV files and those of Hugging Face give
their columns other names, so that a task may know several. Metrics are scikit-learn's and SciPy's.
"""

import csv
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdistil.run.command import require

log = logging.getLogger("fastdistil.evaluate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A table of labelled texts, or of pairs of texts."""

    columns: tuple[tuple[str, ...], ...] = ()
    """Names of the columns: one or two of texts, then that of the label. A file has all of one of these sets."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The task's score is their mean, as GLUE's and the paper's."""
    regression: bool = False
    spans: bool = False
    """Questions, each answered by a piece of a passage (squad.py)."""
    published: tuple[float, float] | None = None
    """BERT-base and DistilBERT in the paper (arXiv 1910.01108, tables 1 and 2), x 100."""
    num_published: int = 0
    """Examples that these were fine-tuned on: the whole training set."""


SENTENCE = ("sentence", "label")
SENTENCES = ("sentence1", "sentence2", "label")
COLA_COLUMNS = ("source", "label", "star", "sentence")
"""Of CoLA's own files, which have no header."""
TASKS: dict[str, Task] = {
    "cola": Task(columns=(SENTENCE,), metrics=("matthews",), published=(56.3, 51.3), num_published=8_551),
    "sst2": Task(columns=(SENTENCE,), published=(92.7, 91.3), num_published=67_349),
    "mrpc": Task(
        columns=(SENTENCES, ("#1 String", "#2 String", "Quality")),
        metrics=("accuracy", "f1"),
        published=(88.6, 87.5),
        num_published=3_668,
    ),
    "stsb": Task(
        columns=(SENTENCES, ("sentence1", "sentence2", "score")),
        metrics=("pearson", "spearman"),
        regression=True,
        published=(89.0, 86.9),
        num_published=5_749,
    ),
    "qqp": Task(
        columns=(("question1", "question2", "label"), ("question1", "question2", "is_duplicate")),
        metrics=("accuracy", "f1"),
        published=(89.6, 88.5),
        num_published=363_846,
    ),
    "mnli": Task(
        columns=(("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label")),
        published=(86.7, 82.2),
        num_published=392_702,
    ),
    "qnli": Task(columns=(("question", "sentence", "label"),), published=(91.8, 89.2), num_published=104_743),
    "rte": Task(columns=(SENTENCES,), published=(69.3, 59.9), num_published=2_490),
    "wnli": Task(columns=(SENTENCES,), published=(53.5, 56.3), num_published=635),
    "imdb": Task(columns=(("text", "label"),), published=(93.46, 92.82), num_published=25_000),
    # Published: the mean of EM 81.2 and F1 88.5, and that of 77.7 and 85.8.
    "squad": Task(metrics=("exact_match", "f1"), spans=True, published=(84.85, 81.75), num_published=87_599),
    "squad2": Task(metrics=("exact_match", "f1"), spans=True),
}


def table(texts: tuple[str, ...], label: str) -> Task:
    """A task of any labelled texts, or pairs of texts, scored by accuracy.

    Raises ValueError unless there are one or two columns of texts.
    """
    if len(texts) not in (1, 2):
        raise ValueError(f"--text-columns must be one or two, got {' '.join(texts)}")
    return Task(columns=((*texts, label),))


MISSING = ("", "-", "-1", "nan")
"""What stands in place of a label, in small letters, where a file of text has none."""
MOST_FRACTIONS = 20
"""Classes called 0.5, 1.5, ... may be as many as this; more are the numbers of a regression."""
MOST_MINUS = 0.1
"""Share of the rows that may be labelled -1 beside others; more look like a class."""
PACKAGES = ["transformers", "sklearn", "scipy"]
"""What fine-tuning and scoring import."""
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
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
    lr: float | None = None
    """Highest learning rate. None: by the model's size, 5e-5 for BERT-base and more for a smaller one."""
    warmup: float = 0.06
    """Share of the updates over which the rate rises; then it falls to zero, linearly."""
    weight_decay: float = 0.0
    """Decoupled, on matrices."""
    max_length: int | None = None
    """Tokens of an example; what is longer is cut, or for SQuAD made into windows.
    None: 128, for SQuAD 384, or what the model reads."""
    dropout: float | None = None
    """Every dropout of the model. None: as the model says."""
    max_train_examples: int | None = None
    """Train on the first so many examples only."""
    temperature: float = 2.0
    """With a teacher: of the KL."""
    kd: float = 0.5
    """With a teacher: weight of the KL, T^2 included; the cross-entropy has 1 - kd."""

    def __post_init__(self) -> None:
        for name, is_right, wanted in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("max_length", self.max_length is None or self.max_length >= 8, "8 or more"),
            ("max_train_examples", self.max_train_examples is None or self.max_train_examples > 0, "1 or more"),
            ("warmup", 0 <= self.warmup <= 1, "in [0, 1]"),
            ("kd", 0 <= self.kd <= 1, "in [0, 1]"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("lr", self.lr is None or 0 < self.lr < 1, "in (0, 1)"),
            ("dropout", self.dropout is None or 0 <= self.dropout < 1, "in [0, 1)"),
        ):
            if not is_right:
                raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Examples:
    """One split: texts as a column each, and a number a row (a class, or the target of a regression)."""

    texts: tuple[Sequence[str], ...]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Examples":
        return Examples(tuple(texts[rows] for texts in self.texts), self.labels[rows])


@dataclass(frozen=True, slots=True)
class TaskData:
    """What a model is fine-tuned and scored on: splits of Examples, for SQuAD lists of squad.Question."""

    task: Task
    train: Any
    validation: Any
    label_names: tuple[str, ...] = ()
    """Of the classes, by their number; empty for a regression and for SQuAD."""

    def first(self, number: int | None) -> "TaskData":
        """The same with the first so many training examples. Raises ValueError where these are of one class."""
        data = replace(self, train=self.train[:number])
        if self.label_names and len(set(data.train.labels)) < 2:
            raise ValueError(
                f"--max-train-examples {number}: the first are all of the class "
                f"{self.label_names[int(data.train.labels[0])]}: give more, or a file that is not sorted by class"
            )
        return data

    def describe(self) -> str:
        """How many examples and classes there are, for a person."""
        names = f", {len(self.label_names)} classes ({', '.join(self.label_names[:5])})" if self.label_names else ""
        return f"{len(self.train):,} / {len(self.validation):,} examples{names}"


def require_packages(tasks: Iterable[Task] = (), *others: str) -> None:
    """Raises ValueError where a package that fine-tunes or scores these tasks, or one of `others`, is not installed."""
    of_spans = ["torchmetrics"] if any(task.spans for task in tasks) else []
    require("evaluation", "eval", *PACKAGES, *of_spans, *others)


def load(name: str, task: Task, source: str) -> TaskData:
    """The data of a task in a folder (D, or D/NAME) or, as hf:NAME[:CONFIG], of a dataset on the hub.

    Rows without a label (-1, "-", NaN, none) are left out, and counted in the log. The score is taken on the validation
    split, or on the test split where there is no other. Raises ValueError where files, columns or labels are missing.
    """
    if source.startswith("hf:"):
        tables = hub_tables(source, to_train=True)
    else:
        tables = {split: rows_of(paths) for split, paths in split_files(name, source).items()}
    held_out = "validation" if "validation" in tables else "test"
    (train_texts, train_labels, names), (texts, labels, _) = (
        labelled(tables[split], task, f"{source}: {split} of {name}") for split in ("train", held_out)
    )
    if task.regression:
        numbers = {label: number(label, f"{source}: {name}") for label in (*train_labels, *labels)}
        classes = ()
        if len({numbers[label] for label in labels}) < 2:
            raise ValueError(
                f"{source}: every row of {held_out} of {name} is {labels[0]}: nothing correlates with that"
            )
    else:
        numbers = {label: float(i) for i, label in enumerate(_ordered(set(train_labels), names))}
        classes = tuple(numbers)
        if unknown := set(labels) - numbers.keys():
            wrong = ", ".join(sorted(unknown)[:5])
            raise ValueError(
                f"{source}: {name} has labels in {held_out} that train has not: {wrong}; it has "
                f"{', '.join(classes[:10])}: leave those rows out, or add some like them to train"
            )
        if len(numbers) < 2:
            raise ValueError(f"{source}: every row of {name} is labelled {train_labels[0]}: wanted two classes")
        fractions = [
            label for label in classes if not math.isnan(_as_number(label)) and not label.lstrip("-").isdigit()
        ]
        # F1 is that of class 1. Of words the alphabet would decide which that is.
        known = [classes] if names else [("0", "1"), ("False", "True")]
        if "f1" in task.metrics and (len(classes) != 2 or classes not in known):
            raise ValueError(
                f"{source}: {name} is scored by F1, of the label 1 beside 0, got the labels {', '.join(classes[:5])}: "
                "call them 0 and 1; --task table takes any, scored by accuracy"
            )
        if len(fractions) > MOST_FRACTIONS:
            raise ValueError(
                f"{source}: {name} has {len(classes)} labels like {', '.join(fractions[:3])}, which are numbers, not "
                "classes: give the column of the classes (a regression is --task stsb: sentence1, sentence2, score)"
            )
    return TaskData(
        task,
        Examples(train_texts, [numbers[label] for label in train_labels]),
        Examples(texts, [numbers[label] for label in labels]),
        classes,
    )


def score(task: Task, predicted: Any, labels: Any) -> dict[str, float]:
    """Each of the task's metrics as a fraction, and "score", their mean: (N,) predictions against (N,) labels.

    A correlation with predictions that are all the same is 0.
    """
    import numpy as np
    from scipy import stats
    from sklearn import metrics

    functions: dict[str, Any] = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
        "pearson": lambda labels, predicted: stats.pearsonr(predicted, labels)[0],
        "spearman": lambda labels, predicted: stats.spearmanr(predicted, labels)[0],
    }
    undefined = task.regression and np.ptp(predicted) == 0
    found = {name: 0.0 if undefined else float(functions[name](labels, predicted)) for name in task.metrics}
    return found | {"score": sum(found.values()) / len(found)}


def split_files(name: str, source: str) -> dict[str, list[Path]]:
    """{split: files} of the task in D/NAME, or in D. Raises ValueError unless there are training files and others."""
    folder, found = files_by_split(name, source)
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"{folder} does not hold {name}: wanted train and validation (or dev, or test) files, of "
            f"{' '.join(READERS)}, got {' '.join(f.name for f in sorted(folder.iterdir())[:8]) or 'nothing'}"
        )
    return found


def files_by_split(name: str, source: str) -> tuple[Path, dict[str, list[Path]]]:
    """D/NAME, or D where there is none, and {split: files} of what it holds.

    Raises ValueError where there is no such folder, or where a split is there in several formats.
    """
    folder = Path(source)
    folder = folder / name if (folder / name).is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"--data {source} is not a folder: give the one that holds {name}'s files")
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS)
    # A folder may hold both versions of SQuAD.
    if name in ("squad", "squad2") and len({"v2" in file.name for file in files}) == 2:
        files = [file for file in files if ("v2" in file.name) == (name == "squad2")]
    found = {}
    for split, stems in SPLITS.items():
        of_split = [f for f in files if f.name.split(".")[0].split("-")[0] in stems]
        if len({f.suffix for f in of_split}) > 1:
            raise ValueError(f"{folder} holds {split} in several formats: keep one")
        if of_split:
            found[split] = of_split
    return folder, found


def rows_of(files: list[Path]) -> Any:
    """The rows of files of one format, as a dataset. ValueError where they cannot be read."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # type: ignore  # it tells the hub, of local files too
    suffix, paths = files[0].suffix, [str(file) for file in files]
    try:
        if READERS[suffix] == "csv":
            return datasets.Dataset.from_pandas(_cells(files), preserve_index=False)
        return datasets.load_dataset(READERS[suffix], data_files=paths, split="train")
    except Exception as error:  # its own, pandas' and pyarrow's
        reason = error.__cause__ or error
        raise ValueError(f"{', '.join(paths)}: not readable as {READERS[suffix]} ({reason!r})") from error


def _cells(files: list[Path]) -> Any:
    """The rows of CSV or TSV files as a frame of text, each cell as it stands there.

    A column of numbers with one empty cell would be another kind of column than the same one without. A row of more
    cells than the header is an error: pandas would take the first column for row names, or drop the last cell.
    """
    import pandas as pd

    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False}
    if files[0].suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE, "names": _names_without_header(files[0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.concat([pd.read_csv(file, **options) for file in files], ignore_index=True)


def _names_without_header(path: Path) -> list[str] | None:
    """CoLA's columns where the first line is already a row of its own files; None where it names the columns."""
    with path.open(encoding="utf-8-sig") as file:
        cells = file.readline().rstrip("\n").split("\t")
    return list(COLA_COLUMNS) if len(cells) == len(COLA_COLUMNS) and cells[1] in ("0", "1") else None


def hub_tables(source: str, *, to_train: bool = False) -> dict[str, Any]:
    """{split: dataset} of a name on the hub.

    Raises ValueError where it has no split of a known name or, to train, lacks training examples or others.
    """
    import datasets

    _, path, *rest = source.split(":")
    config = rest[0] if rest else None
    names = datasets.get_dataset_split_names(path, config_name=config)
    wanted = [name for name in names if name in ("train", "validation", "validation_matched", "test")]
    if not wanted or (to_train and ("train" not in wanted or len(wanted) < 2)):
        least = "train and validation (or test)" if to_train else "train, validation or test"
        raise ValueError(
            f"{source} has the splits {', '.join(names)}: wanted {least}; give files, called so, in a folder"
        )
    return {name.removesuffix("_matched"): datasets.load_dataset(path, config, split=name) for name in wanted}


def columns_of(table: Any, known: tuple[tuple[str, ...], ...], where: str) -> tuple[str, ...]:
    """The first of the known sets of columns that the table has. Raises ValueError where it has none."""
    columns = next((columns for columns in known if set(columns) <= set(table.column_names)), None)
    if columns is None:
        wanted = " or ".join(", ".join(columns) for columns in known)
        raise ValueError(f"{where}: wanted the columns {wanted}, got {', '.join(table.column_names)}")
    return columns


def texts_of(table: Any, name: str, where: str) -> list[str]:
    """A column of texts, "" where there is none. Raises ValueError where no row has any."""
    column = [_text(value, f"{where}: the column {name}") for value in table[name]]
    if not any(map(str.strip, column)):
        raise ValueError(f"{where}: the column {name} has no text in any row: give the column that has")
    if num_empty := column.count(""):
        log.info("%s: %d of %d rows have nothing in the column %s", where, num_empty, len(column), name)
    return column


def labelled(table: Any, task: Task, where: str) -> tuple[tuple[list[str], ...], list[str], list[str]]:
    """(texts, labels) of the rows that have a label, and what the file calls its classes 0, 1, ... if it says so.

    Raises ValueError where there are none.
    """
    *of_texts, of_label = columns_of(table, task.columns, where)
    names = getattr(table.features[of_label], "names", None) or []
    labels = [_label(value, names, f"{where}: the column {of_label}") for value in table[of_label]]
    rows = [i for i, label in enumerate(labels) if label is not None]
    if not rows:
        raise ValueError(
            f"{where} has no labelled row: all {len(labels):,} are empty, -1 or - (as in GLUE's test files): "
            "give files with labels"
        )
    num_minus = sum(str(value).strip() in ("-1", "-1.0") for value in table[of_label])
    if not names and num_minus > MOST_MINUS * len(labels):
        raise ValueError(
            f"{where}: {num_minus} of {len(labels)} rows are labelled -1, which stands for no label: if it is a class, "
            "call it something else; if not, leave these rows out"
        )
    if len(rows) < len(labels):
        log.info("%s: %d of %d rows have no label and are left out", where, len(labels) - len(rows), len(labels))
    kept = table.select(rows)
    texts = tuple(texts_of(kept, name, where) for name in of_texts)
    return texts, [label for label in labels if label is not None], names


def _label(value: Any, names: list[str], where: str) -> str | None:
    """A label as text, the same from whatever column: 1, 1.0, "1" and " 1 " are one class. None where it is missing."""
    cell = _text(value, where, wanted="one label a row (where rows have several: a column of 0 and 1 for each class)")
    label = unicodedata.normalize("NFC", cell.strip())
    if whole := re.fullmatch(r"(-?\d+)\.0*", label):
        label = whole[1]
    if label.lower() in MISSING:
        return None
    if label.lower() in ("true", "false"):
        return label.capitalize()
    if not (names and label.isdigit()):
        return label
    if int(label) >= len(names):
        raise ValueError(f"{where} has the class {label}, of {len(names)} classes that the file names")
    return names[int(label)]


def _text(value: Any, where: str, wanted: str = "text") -> str:
    """A cell as text, "" where it is missing. ValueError for lists and the like."""
    if isinstance(value, list | tuple | dict):
        raise ValueError(f"{where} holds {str(value)[:40]}, a {type(value).__name__}: wanted {wanted}")
    if value is None or value != value:  # NaN
        return ""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _ordered(found: set[str], names: list[str]) -> list[str]:
    """The classes: in the file's own order, else by number where all are numbers, else by name."""
    if names:
        return [name for name in names if name in found]
    by_name = sorted(found)
    return by_name if any(math.isnan(_as_number(label)) for label in found) else sorted(by_name, key=float)


def _as_number(label: str) -> float:
    """NaN where it is none."""
    return float(label) if re.fullmatch(r"-?\d+(\.\d+)?", label) else math.nan


def number(label: str, where: str) -> float:
    """The target of a regression. ValueError where it is none, or infinite."""
    try:
        found = float(label)
    except ValueError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{where} is a regression, got the label {label!r}: wanted a number")
    return found
