"""Scores encoders by their embeddings alone, without training them: similarity, paraphrases, retrieval, few examples.

An embedding is what sentence-transformers makes of a text, by a folder of its own or by any encoder and a pooling. A
score comes with its 95 % interval and, beside a reference (the teacher), with the share of it that is kept: percentile
bootstrap over the rows of the table, both models on the same rows.

Shapes: N rows, D width of an embedding.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastdistil.evaluation import tasks
from fastdistil.remote import hub
from fastdistil.run import console

if TYPE_CHECKING:
    import rich.table

log = logging.getLogger("fastdistil.evaluate")

Statistic = Callable[..., float]
"""(N,) of a model, (N,) labels -> the score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What is asked of the embeddings of a table."""

    columns: tuple[tuple[str, ...], ...]
    """Names of the columns where none are given: texts, then the label if there is one."""
    num_texts: tuple[int, ...]
    """How many columns of texts there may be."""
    has_label: bool = True
    rows: str = "pairs"
    """What a row of the table is."""

    def check_columns(self, name: str, texts: tuple[str, ...], label: str | None) -> None:
        """Raises ValueError where the columns that were given are not those of this kind, or only some of them."""
        if texts and len(texts) not in self.num_texts:
            wanted = " or ".join(map(str, self.num_texts))
            raise ValueError(f"--task {name} wants {wanted} --text-columns, got {' '.join(texts)}")
        if self.has_label and bool(texts) != (label is not None):
            raise ValueError(f"--task {name} wants --text-columns and --label-column together, or neither")
        if label is not None and not self.has_label:
            raise ValueError(f"--task {name} has no label: leave out --label-column {label}")


KINDS = {
    "sts": Kind(columns=tasks.TASKS["stsb"].columns, num_texts=(2,)),
    "pairs": Kind(columns=(*tasks.TASKS["mrpc"].columns, *tasks.TASKS["qqp"].columns), num_texts=(2,)),
    "retrieval": Kind(
        columns=(("query", "text"), ("query", "positive"), ("anchor", "positive"), ("question", "answer"), ("text",)),
        num_texts=(1, 2),
        has_label=False,
    ),
    "few-shot": Kind(columns=(tasks.SENTENCE, ("text", "label")), num_texts=(1, 2), rows="examples"),
}
UNDEFINED = "undefined"
"""A share of a score of 0 or less, and its interval where the reference scores so little on rows that were drawn."""
SPLITS = ("validation", "test", "train")
"""Where a score is taken: the first that there is, as of fine-tuning; where nothing is trained, train is fair, too."""
NUM_RESAMPLES = 1000
NUM_QUERIES = 1000
"""Rows of the matrix of similarities that is in memory at a time."""
BATCH_SIZE = 32
SLICE = 32 * BATCH_SIZE
"""Texts between two lines of progress."""


@dataclass(frozen=True, slots=True)
class Table:
    """Texts and labels of the rows that are scored."""

    texts: tuple[list[str], ...]
    """One column or two."""
    labels: np.ndarray
    """(N,) numbers, or the classes as text; empty for retrieval."""
    split: str
    train: "Table | None" = None
    """Of few-shot: where the examples are drawn. None: there is no such split, and those of the table itself are."""

    def __len__(self) -> int:
        return len(self.texts[0])


@dataclass(frozen=True, slots=True)
class Score:
    """What a model's embeddings are worth on a table."""

    metrics: dict[str, float]
    """Fractions; the first is the score."""
    rows: np.ndarray
    """(N,) what `statistic` makes the score of: of every pair, query or draw."""
    labels: np.ndarray
    statistic: Statistic

    def record(self, reference: "Score | None") -> dict[str, Any]:
        """Everything x 100, for a table: the metrics, the score's interval, and its share of the reference's.

        A share, or its interval, that is undefined is None.
        """
        found: dict[str, Any] = {"metrics": {name: 100 * value for name, value in self.metrics.items()}}
        found["interval"] = [100 * end for end in self.interval()]
        if reference is None:
            return found
        ours, theirs = (next(iter(score.metrics.values())) for score in (self, reference))
        ends = self.interval(reference) if theirs > 0 else (math.nan, math.nan)
        found["of_reference"] = 100 * ours / theirs if theirs > 0 else None  # of nothing there is no share
        found["of_reference_interval"] = None if any(map(math.isnan, ends)) else [100 * end for end in ends]
        return found

    def interval(self, reference: "Score | None" = None) -> tuple[float, float]:
        """95 % of the score or, beside a reference, of their ratio: the same rows are drawn for both.

        NaN where the reference scores 0 or less on rows that were drawn: the ratio then has no bounds.
        """
        from scipy import stats

        of_one = self.statistic
        if reference is None:
            columns, statistic = (self.rows, self.labels), of_one
        else:
            columns = (self.rows, reference.rows, self.labels)

            def statistic(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> float:
                below = of_one(theirs, labels)
                return of_one(ours, labels) / below if below > 0 else math.nan

        with warnings.catch_warnings():  # of a score that is the same whatever is drawn: the interval is a point
            warnings.simplefilter("ignore", RuntimeWarning)
            found = stats.bootstrap(
                columns,
                statistic,
                paired=True,
                vectorized=False,
                n_resamples=NUM_RESAMPLES,
                method="percentile",
                batch=20,  # draws in memory at a time
                rng=np.random.default_rng(0),
            ).confidence_interval
        return float(found.low), float(found.high)


# ----------------------------------------------------------------------------------------------------------- the tables
def load(
    kind: str,
    name: str,
    source: str,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str | None = None,
    split: str | None = None,
    max_examples: int | None = None,
) -> Table:
    """The rows of a table (a file, D or D/NAME, hf:NAME[:CONFIG]) in the columns given, or those that `kind` knows.

    Raises ValueError where files, splits, columns or labels are missing.
    """
    tables = _tables(kind, name, source)
    chosen = split or next((s for s in SPLITS if s in tables), next(iter(tables)))
    if chosen not in tables:
        raise ValueError(f"{source}: there is no split {chosen} of {name}: give one of {' '.join(tables)}")
    label = (label_column,) if label_column is not None else ()
    columns = ((*text_columns, *label),) if text_columns else KINDS[kind].columns
    where = f"{source}: {chosen} of {name}"
    if kind == "retrieval":
        rows = tables[chosen]
        found = tasks.columns_of(rows, columns, where)
        texts = tuple(tasks.texts_of(rows, column, where) for column in found)
        if len(texts) == 1:
            return made_pairs(texts[0], where, max_examples, chosen)
        return _retrievable(tuple(column[:max_examples] for column in texts), where, chosen)
    table = _labelled(kind, tables[chosen], columns, where, chosen, max_examples)
    if kind == "few-shot" and chosen != "train" and "train" in tables:
        train = _labelled(kind, tables["train"], columns, f"{source}: train of {name}", "train")
        if unknown := sorted(set(table.labels) - set(train.labels)):
            raise ValueError(
                f"{where}: train has no examples of {', '.join(unknown[:5])}: leave those rows out, or add examples"
            )
        return replace(table, train=train)
    return table


def _tables(kind: str, name: str, source: str) -> dict[str, Any]:
    """{split: dataset}; a file, or files that are not called after a split, are the split `all`."""
    if source.startswith("hf:"):
        return tasks.hub_tables(source)
    if Path(source).is_file():
        return {"all": tasks.rows_of([Path(source)])}
    folder, files = tasks.files_by_split(name, source)
    others = sorted(f for f in folder.iterdir() if f.suffix in tasks.READERS)
    if not files and len({f.suffix for f in others}) == 1:
        files = {"all": others}
    if not files:
        inside = sorted(f.name for f in folder.iterdir() if f.is_dir())
        fix = f"; its folders are asked for as {kind}:{'|'.join(inside)}" if inside else ""
        raise ValueError(f"{folder} holds no table: wanted files of one format of {' '.join(tasks.READERS)}{fix}")
    return {split: tasks.rows_of(paths) for split, paths in files.items()}


def is_table(source: str) -> bool:
    """Whether `load` reads it: a table, not documents in files of text."""
    path = Path(source)
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return source.startswith("hf:") or any(file.suffix in tasks.READERS for file in files)


def _labelled(
    kind: str, rows: Any, columns: tuple[tuple[str, ...], ...], where: str, split: str, number: int | None = None
) -> Table:
    """The first `number` rows that have a label, whose labels alone are looked at."""
    texts, labels, names = tasks.labelled(rows, tasks.Task(columns=columns), where)
    texts, labels = tuple(column[:number] for column in texts), labels[:number]
    if kind == "few-shot":
        return Table(texts, np.array(labels), split)
    of_class = {name: i for i, name in enumerate(names or ("False", "True"))}
    numbers = np.array([of_class[label] if label in of_class else tasks.number(label, where) for label in labels])
    if kind == "pairs" and set(numbers) != {0.0, 1.0}:
        wrong = " ".join(sorted(set(labels))[:5])
        raise ValueError(f"{where}: wanted the labels 0 and 1, both of them, got {wrong}: a score is --task sts")
    if len(set(numbers)) < 2:
        raise ValueError(f"{where}: every row has the score {labels[0]}: nothing correlates with that")
    return Table(texts, numbers, split)


def made_pairs(documents: Iterable[str], where: str, max_examples: int | None = None, split: str = "all") -> Table:
    """Pairs for retrieval out of documents: the first sentence asks for the rest.

    Documents of one sentence are left out, as are repeated ones. Raises ValueError where fewer than two are left.
    """
    parts = (re.split(r"(?<=[.!?])\s+|\n\s*\n", document.strip(), maxsplit=1) for document in documents)
    pairs = list(islice(dict.fromkeys((p[0], p[1].strip()) for p in parts if len(p) == 2), max_examples))
    if len(pairs) < 2:
        raise ValueError(f"{where}: {len(pairs)} documents have a second sentence: wanted two or more to choose from")
    queries, texts = map(list, zip(*pairs, strict=True))
    return _retrievable((queries, texts), where, split)


def _retrievable(texts: tuple[list[str], ...], where: str, split: str) -> Table:
    if any(len(set(column)) < 2 for column in texts):
        raise ValueError(f"{where}: every row has the same query or the same text: wanted two or more to choose from")
    return Table(texts, np.array([]), split)


# ----------------------------------------------------------------------------------------------------------- the models
@dataclass(slots=True)
class Encoder:
    """A SentenceTransformer, and what is to be said of it."""

    path: str
    model: Any
    pooling: str
    """E.g. "mean + Normalize", and who said so."""

    def embed(self, texts: list[str], role: str = "") -> np.ndarray:
        """(N, D) of N texts, each embedded once; as "query" or "document" with the folder's prompt for these.

        Raises ValueError where one is not finite.
        """
        encode = getattr(self.model, f"encode_{role}" if role else "encode")
        different = sorted(dict.fromkeys(texts), key=len)  # so that little is padded
        starts = range(0, len(different), SLICE)
        parts = [
            encode(different[i : i + SLICE], batch_size=BATCH_SIZE, show_progress_bar=False)
            for i in console.progress(starts, len(starts), f"embeddings of {Path(self.path).name}")
        ]
        rows = {text: i for i, text in enumerate(different)}
        embeddings = np.concatenate(parts)
        if broken := np.flatnonzero(~np.isfinite(embeddings).all(1)).tolist():
            raise ValueError(
                f"{self.path} makes embeddings that are not finite of {len(broken)} of {len(different)} texts, e.g. of "
                f"{different[broken[0]][:40]!r}: give a model whose weights, and sums in their dtype, are finite"
            )
        return embeddings[[rows[text] for text in texts]]


def load_encoder(path: str, pooling: Literal["mean", "cls"] | None, max_length: int | None, device: str) -> Encoder:
    """The model in a folder or of a hub name, with the pooling that it says, else `pooling`, else the mean.

    Raises ValueError where it cannot be loaded, or reads fewer than max_length tokens.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model

    from fastdistil.evaluation import finetune

    here = hub.folder_of("model", path)
    for folder in (here, *here.glob("*_Transformer")):
        if not here.is_dir() or (folder / "config.json").is_file():
            finetune.configuration(folder)
    try:
        if is_sentence_transformer_model(str(here)):
            model, said_by = SentenceTransformer(str(here), device=device), "the folder's"
        else:
            encoder = Transformer(str(here))
            modules: list[Any] = [encoder, Pooling(encoder.get_embedding_dimension(), pooling or "mean")]
            model = SentenceTransformer(modules=modules, device=device)
            said_by = "--pooling" if pooling else "the folder says nothing"
    except Exception as error:  # it raises whatever a file leads to
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be loaded by sentence-transformers ({reason})") from error

    # What a model of transformers reads is less than its tokenizer says where positions are counted otherwise.
    longest = finetune.longest_input(model[0].auto_model) if hasattr(model[0], "auto_model") else np.inf
    if max_length is not None and max_length > longest:
        raise ValueError(
            f"--max-length {max_length} is more than the {longest} tokens that {path} reads: give {longest} or less"
        )
    length = min(max_length or model.max_seq_length or np.inf, longest)
    model.max_seq_length = int(length) if np.isfinite(length) else None
    names = [getattr(module, "pooling_mode", type(module).__name__) for module in list(model)[1:]]
    described = " + ".join(name if isinstance(name, str) else " and ".join(name) for name in names)
    return Encoder(path, model, f"{described} ({said_by})")


# ----------------------------------------------------------------------------------------------------------- the scores
def score(kind: str, encoder: Encoder, table: Table, *, shots: int, draws: int) -> Score:
    """What a model's embeddings are worth on a table. Raises ValueError where a class has too few examples."""
    if kind == "few-shot":
        return _few_shot(encoder, table, shots, draws)
    if kind == "retrieval":
        return _retrieval(encoder, table)
    both = encoder.embed(table.texts[0] + table.texts[1])
    cosine = (_unit(both[: len(table)]) * _unit(both[len(table) :])).sum(1)
    return (_similarity if kind == "sts" else _pairs)(cosine, table.labels)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """(N, D) of length 1; zeros stay zeros. In fp64: ties of fp32 would be broken by rounding."""
    exact = embeddings.astype(np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)


def _similarity(cosine: np.ndarray, labels: np.ndarray) -> Score:
    metrics = {"spearman": _spearman(cosine, labels), "pearson": _pearson(cosine, labels)}
    return Score(metrics, cosine, labels, _spearman)


def _spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy import stats

    return _pearson(stats.rankdata(predicted), stats.rankdata(labels))


def _pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """0 where one of them never changes."""
    centred, of_labels = predicted - predicted.mean(), labels - labels.mean()
    size = np.linalg.norm(centred) * np.linalg.norm(of_labels)
    return float(centred @ of_labels / size) if size else 0.0


def _pairs(cosine: np.ndarray, labels: np.ndarray) -> Score:
    """Average precision, and the best that a threshold reaches: as sentence-transformers' evaluator has them."""
    from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator as Evaluator
    from sklearn import metrics

    def average_precision(cosine: np.ndarray, labels: np.ndarray) -> float:
        return float(metrics.average_precision_score(labels, cosine)) if labels.any() else 0.0

    found = {
        "ap": average_precision(cosine, labels),
        "best f1": float(Evaluator.find_best_f1_and_threshold(cosine, labels, True)[0]),
        "best accuracy": float(Evaluator.find_best_acc_and_threshold(cosine, labels, True)[0]),
    }
    return Score(found, cosine, labels, average_precision)


def _retrieval(encoder: Encoder, table: Table) -> Score:
    """Every query asks for its text among all different texts of the table.

    One with several texts: recall is the share of them, the reciprocal rank that of the first. A tie counts as lost, so
    that a model of one embedding finds nothing.
    """
    queries, texts = list(dict.fromkeys(table.texts[0])), list(dict.fromkeys(table.texts[1]))
    row, column = ({text: i for i, text in enumerate(found)} for found in (queries, texts))
    wanted = np.array(sorted({(row[q], column[t]) for q, t in zip(*table.texts, strict=True)}))
    queries_ND, texts_ND = _unit(encoder.embed(queries, "query")), _unit(encoder.embed(texts, "document"))
    ranks = np.empty(len(wanted))
    for begin in range(0, len(wanted), NUM_QUERIES):
        of_query, of_text = wanted[begin : begin + NUM_QUERIES].T
        similarity = queries_ND[of_query] @ texts_ND.T
        own = similarity[np.arange(len(of_query)), of_text]
        ranks[begin : begin + NUM_QUERIES] = (similarity >= own[:, None]).sum(1)
    per_query = np.bincount(wanted[:, 0])
    recall = {k: np.bincount(wanted[:, 0], ranks <= k) / per_query for k in (1, 10)}
    reciprocal = np.zeros(len(queries))
    np.maximum.at(reciprocal, wanted[:, 0], 1 / ranks)
    metrics = {"mrr": reciprocal.mean(), "recall@1": recall[1].mean(), "recall@10": recall[10].mean()}
    found = {name: float(value) for name, value in metrics.items()}
    return Score(found, reciprocal, np.zeros(len(queries)), _mean)


def _mean(rows: np.ndarray, _: np.ndarray) -> float:
    return float(rows.mean())


def _few_shot(encoder: Encoder, table: Table, shots: int, draws: int) -> Score:
    """Logistic regression on the embeddings of `shots` examples of each class, drawn anew `draws` times.

    Accuracy on the table, without the examples where they come from it. The interval is over the draws.
    """
    from sklearn.linear_model import LogisticRegression

    source = table.train or table
    classes = sorted(set(source.labels))
    members = [np.flatnonzero(source.labels == label) for label in classes]
    left = shots + (table.train is None)
    if len(classes) < 2 or min(map(len, members)) < left:
        sizes = ", ".join(f"{len(rows)} of {label}" for label, rows in zip(classes, members, strict=True))
        raise ValueError(f"--shots {shots} wants two classes of {left} examples or more, got {sizes}: give fewer")
    rng = np.random.default_rng(0)
    drawn = [np.concatenate([rng.choice(rows, shots, replace=False) for rows in members]) for _ in range(draws)]
    features = _features(encoder, table)
    used = np.unique(np.concatenate(drawn))
    examples = features
    if table.train is not None:
        texts = tuple([column[i] for i in used] for column in source.texts)
        examples = np.empty((len(source), features.shape[1]))
        examples[used] = _features(encoder, Table(texts, source.labels[used], source.split))
    accuracy = np.empty(draws)
    for i, rows in enumerate(drawn):
        model = LogisticRegression(max_iter=1000).fit(examples[rows], source.labels[rows])
        right = model.predict(features) == table.labels
        accuracy[i] = (np.delete(right, rows) if table.train is None else right).mean()
    found = {"accuracy": float(accuracy.mean()), "deviation": float(accuracy.std(ddof=1)) if draws > 1 else 0.0}
    return Score(found, accuracy, np.zeros(draws), _mean)


def _features(encoder: Encoder, table: Table) -> np.ndarray:
    """(N, D) of texts; (N, 2 D) of pairs: |u - v| and u v, as SentEval's (arXiv 1803.05449)."""
    u, *others = (_unit(encoder.embed(column)) for column in table.texts)
    return np.concatenate((np.abs(u - others[0]), u * others[0]), axis=1) if others else u


# ------------------------------------------------------------------------------------------------------------- the page
def describe(task: str, num_rows: int, split: str) -> str:
    """What is scored, for a person."""
    return f"{task}: {num_rows:,} {KINDS[task.partition(':')[0]].rows}, split {split}"


def drawn(records: list[dict[str, Any]]) -> "rich.table.Table":
    """The scores of several models on one table, a row each."""
    number = "{:.1f}".format
    rows = []
    for record in records:
        (score, value), *others = record["metrics"].items()
        row = {"model": record["model"], score: number(value), "95 %": "–".join(map(number, record["interval"]))}
        row |= {name: number(value) for name, value in others}
        if any("of_reference" in other for other in records):
            row["kept"], row["95 % of that"] = share_of(record, "–")
        rows.append(row)
    return console.table(tuple(rows[0]), (row.values() for row in rows))


def share_of(record: dict[str, Any], to: str) -> tuple[str, str]:
    """What a model has of the reference's score, and the ends of its interval; a dash for each without a reference."""
    if "of_reference" not in record:
        return "-", "-"
    share, ends = record["of_reference"], record["of_reference_interval"]
    return (
        UNDEFINED if share is None else f"{share:.1f} %",
        UNDEFINED if ends is None else to.join(map("{:.1f}".format, ends)),
    )


def why_undefined(records: list[dict[str, Any]]) -> list[str]:
    """A line that says why some share, or its interval, is undefined; none where all are defined."""
    if all(UNDEFINED not in share_of(record, "") for record in records):
        return []
    return [f"{UNDEFINED}: the reference scores 0 or less, on all rows or on some drawn of them; try more rows"]
