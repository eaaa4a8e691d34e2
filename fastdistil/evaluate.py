"""Command: score encoders, as a user of the model would: by their embeddings, or fine-tuned on tasks.

    python -m fastdistil.evaluate student/ --reference teacher/ --task sts:stsb pairs:mrpc few-shot:sst2 --data glue/
    python -m fastdistil.evaluate student/ --task sst2 cola mrpc --data glue/

By embeddings (evaluation/zero_shot.py) it takes seconds, and models stand side by side. Fine-tuned, by transformers,
every task is learnt once a seed, and its score is the median over the seeds; the results are written to a JSON file
after every seed, and the same command goes on where it stopped. torch is imported after the command line was checked.
"""

import logging
import math
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import fastdistil
from fastdistil.data import sources
from fastdistil.data.readers import Options
from fastdistil.evaluation import tasks, zero_shot
from fastdistil.evaluation.tasks import Settings
from fastdistil.run import console, folder, options
from fastdistil.run.command import command, leave
from fastdistil.run.files import make_room, read_json, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("fastdistil.evaluate")

OF_EMBEDDINGS = ("card", "split", "pooling", "max_examples", "shots", "draws")
"""Options that fine-tuning does not know."""
SECTION = "## What it kept"
"""Of a model card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score encoders by their embeddings, or fine-tune one on tasks and score it."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Hugging Face folder of an encoder, e.g. an export, or its name on the hub; by embeddings also several.
    --dry-run needs none."""
    task: tuple[str, ...]
    """By embeddings: sts (texts and a score), pairs (texts and 0 or 1), retrieval (queries and texts, or documents),
    few-shot (labelled texts); sts:NAME for the folder NAME of --data. Fine-tuned: cola sst2 mrpc stsb qqp mnli qnli
    rte wnli imdb squad squad2, `glue` for those of GLUE that --data holds, or `table` for any labelled texts."""
    data: str
    """Folder of the files (Parquet, TSV, CSV or JSON), of one task or with a folder for each; hf:NAME[:CONFIG];
    by embeddings also a file, for retrieval also documents in files of text."""
    text_columns: tuple[str, ...] = ()
    """One column, or two for pairs; of task table, and by embeddings where the names are others than the usual."""
    label_column: str | None = None
    """Likewise."""
    reference: str | None = None
    """By embeddings: the model, e.g. the teacher, of whose score the others' is given in %."""
    card: bool = False
    """By embeddings: put the scores into the README.md of each model that is a folder with one, the reference apart."""
    split: str | None = None
    """By embeddings. None: validation, or test, or train, the first that there is."""
    pooling: Literal["mean", "cls"] | None = None
    """By embeddings, of models whose folders say nothing. None: mean."""
    max_examples: int | None = None
    """By embeddings: the first so many rows only."""
    shots: int = 16
    """Of few-shot: examples of each class."""
    draws: int = 20
    """Of few-shot: how often they are drawn."""
    seeds: int = 3
    """How often each task is learnt."""
    first_seed: int = 1
    """The first of these seeds."""
    teacher: str | None = None
    """Distil a second time: folder of a model fine-tuned on the task, or of an encoder to be fine-tuned first."""
    out: Path | None = None
    """JSON file of the results. None: evaluation.json in the folder of the model; by embeddings, none."""
    save: Path | None = None
    """Keep the model of the last seed in SAVE/TASK."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    dry_run: bool = False
    """Check packages, data, labels and how long a text the model reads; train and write nothing."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(
                f"--seeds must be 1 or more and --first-seed 0 or more, got {self.seeds} and {self.first_seed}"
            )
        kinds = [task.partition(":")[0] for task in self.task if task.partition(":")[0] in zero_shot.KINDS]
        others = [task for task in self.task if task.partition(":")[0] not in zero_shot.KINDS]
        unknown = set(others) - tasks.TASKS.keys() - {"glue", "table"}
        if unknown or not self.task:
            known = " ".join((*zero_shot.KINDS, "glue", "table", *tasks.TASKS))
            raise ValueError(f"--task {' '.join(sorted(unknown))}: wanted some of {known}")
        if not self.models and not self.dry_run:
            raise ValueError("wanted a model: give its folder, or its name on the hub")
        for path in (*self.models, *filter(None, (self.reference,))):
            folder.require_model(Path(path))
        if kinds and others:
            raise ValueError(
                f"--task {' '.join(self.task)}: what is scored by embeddings and what is fine-tuned want a command each"
            )
        if kinds:
            self._check_embeddings(kinds)
        else:
            self._check_fine_tuning()

    def _check_embeddings(self, kinds: list[str]) -> None:
        for name, given, instead in (("teacher", self.teacher, "use --reference"), ("save", self.save, "leave it out")):
            if given is not None:
                raise ValueError(f"--{name} is of tasks that are fine-tuned on: {instead}")
        for name, least in (("shots", 1), ("draws", 2), ("max_examples", 2)):
            if (getattr(self, name) or least) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(self, name)}")
        for kind in kinds:
            zero_shot.KINDS[kind].check_columns(kind, self.text_columns, self.label_column)
        if not self.data.startswith("hf:") and not Path(self.data).exists():
            raise ValueError(f"--data {self.data} does not exist: give a file, a folder or hf:NAME")

    def _check_fine_tuning(self) -> None:
        is_table = "table" in self.task
        if is_table != (self.label_column is not None) or is_table != bool(self.text_columns):
            raise ValueError("--task table wants --text-columns and --label-column; other tasks have their own")
        if len(self.models) > 1 or self.reference is not None:
            raise ValueError("models stand side by side by embeddings alone: fine-tune one after another")
        if not self.data.startswith("hf:") and not Path(self.data).is_dir():
            raise ValueError(f"--data {self.data} is not a folder: give the one of the tasks' files, or hf:NAME")

    @property
    def model(self) -> str:
        """The one that is fine-tuned; "" where none was given."""
        return self.models[0] if self.models else ""

    @property
    def by_embeddings(self) -> bool:
        """Whether nothing is fine-tuned."""
        return self.task[0].partition(":")[0] in zero_shot.KINDS


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: all scored. 1: a fine-tuning failed. 2: a wrong command line, model or data."""
    console.start(sys.stderr)
    config = options.parse(EvaluateConfig, args, "evaluate")
    if config.by_embeddings:
        score_embeddings(config)
        return 0
    if idle := [f.name for f in fields(config) if f.name in OF_EMBEDDINGS and getattr(config, f.name) != f.default]:
        log.warning("without effect on what is fine-tuned: %s", ", ".join(f"--{n.replace('_', '-')}" for n in idle))
    asked = chosen_tasks(config)
    tasks.require_packages(asked.values())
    results = None if config.dry_run else Results(result_file(config), config)
    from fastdistil.evaluation import finetune, squad  # torch and transformers: some seconds

    # All that is still to be learnt is read and checked before the first task is.
    finetune.quiet()
    asked = {name: task for name, task in asked.items() if results is None or missing_seeds(config, name, results)}
    lengths = {name: sequence_length(config, task) for name, task in asked.items()}
    number = config.settings.max_train_examples
    data = {
        name: (squad.load if task.spans else tasks.load)(name, task, config.data).first(number)
        for name, task in asked.items()
    }
    if results is None:
        for name, found in data.items():
            print(f"{name}: {found.describe()}, {lengths[name]} tokens")
        return 0
    for name, found in data.items():
        evaluate(config, name, found, lengths[name], results)
    kept = f"{results.path}: {len(results.record['tasks'])} task(s)"
    console.show(table(results.record), *sources_of(results.record), kept, next_line(config))
    return 0


def next_line(config: EvaluateConfig) -> str:
    """How to see what the model costs, beside the one that it is compared with."""
    beside = config.reference or config.teacher
    in_run = config.out is not None and folder.is_run(config.out.parent)  # where the report looks for both
    kept = ("--out", config.out.with_name("efficiency.json")) if config.out is not None and in_run else ()
    return f"next: {console.command_line('efficiency', *filter(None, (beside,)), *config.models, *kept)}"


def score_embeddings(config: EvaluateConfig) -> None:
    """Print what the embeddings of each model are worth on each table; with --out keep it."""
    tasks.require_packages((), "sentence_transformers")
    from fastdistil.evaluation import finetune  # torch and transformers: some seconds

    finetune.quiet()
    tables = {name: read_table(config, name) for name in config.task}
    if config.dry_run:
        for name, found in tables.items():
            print(zero_shot.describe(name, len(found), found.split))
        return
    make_room(config.out)
    # The reference comes first, since the others' shares are of its scores.
    records: list[dict[str, Any]] = []
    reference: dict[str, zero_shot.Score] = {}
    for path in dict.fromkeys((*filter(None, (config.reference,)), *config.models)):
        encoder = zero_shot.load_encoder(path, config.pooling, config.settings.max_length, device_of(config))
        log.info("%s: pooling %s, up to %s tokens", path, encoder.pooling, encoder.model.max_seq_length)
        for name, found in tables.items():
            begin = time.perf_counter()
            score = zero_shot.score(name.partition(":")[0], encoder, found, shots=config.shots, draws=config.draws)
            about = {"task": name, "model": path, "split": found.split, "num_rows": len(found)}
            took = {"seconds": time.perf_counter() - begin, "pooling": encoder.pooling}
            records.append(about | score.record(reference.get(name)) | took)
            if path == config.reference:
                reference[name] = score
    for name in tables:
        of_table = [record for record in records if record["task"] == name]
        print(zero_shot.describe(name, of_table[0]["num_rows"], of_table[0]["split"]))
        console.show(zero_shot.drawn(of_table), *zero_shot.why_undefined(of_table))
    if config.out is not None:
        write_json(config.out, {"data": config.data, "reference": config.reference, "scores": records})
        print(f"{config.out}: {len(records)} score(s)")
    for path in dict.fromkeys(config.models) if config.card else ():
        if path == config.reference:
            continue
        put_into_card(Path(path) / "README.md", [record for record in records if record["model"] == path], config)
    print(next_line(config))


def put_into_card(card: Path, records: list[dict[str, Any]], config: EvaluateConfig) -> None:
    """Replace or add the section "What it kept" of a model card, and the scores among its metadata."""
    if not card.is_file():
        log.warning("%s is not there: the scores are not kept in it", card)
        return
    reference = f" `{Path(config.reference).name}`" if config.reference else ""
    lines = [SECTION, "", f"| scored by embeddings, x 100 | score (95 %) | of{reference or ' a reference'} (95 %) |"]
    lines.append("| --- | --- | --- |")
    for record in records:
        (name, value), *_ = record["metrics"].items()
        low, high = record["interval"]
        kept = "{} ({})".format(*zero_shot.share_of(record, " to ")) if "of_reference" in record else "not measured"
        what = f"{record['task']}, {name}, {record['num_rows']:,} rows"
        lines.append(f"| {what} | {value:.1f} ({low:.1f} to {high:.1f}) | {kept} |")
    lines += (f"\n{why[0].upper()}{why[1:]}." for why in zero_shot.why_undefined(records))
    before, _, after = card.read_text(encoding="utf-8").partition(SECTION)
    rest = re.search("^## ", after, re.MULTILINE)
    kept_after = after[rest.start() :] if rest else ""
    text = "\n".join([before.rstrip(), "", *lines, "", kept_after]).rstrip() + "\n"
    write_text(card, with_results(text, card.parent.resolve().name, records, config))


def with_results(text: str, name: str, records: list[dict[str, Any]], config: EvaluateConfig) -> str:
    """The text of a card with `records` as the hub reads scores (model-index), in the place of those of their tasks."""
    from huggingface_hub import EvalResult, ModelCard

    try:
        card = ModelCard(text)
    except ValueError as error:
        log.warning("the metadata of the card cannot be read (%s): the scores stand in its text alone", error)
        return text
    data = config.data if config.data.startswith("hf:") else Path(config.data).name
    found = [
        EvalResult(
            task_type="few-shot-classification" if record["task"].startswith("few-shot") else "sentence-similarity",
            task_name=record["task"],
            dataset_type=data.removeprefix("hf:").partition(":")[0],
            dataset_name=f"{data.removeprefix('hf:')}, {record['task']}",
            dataset_split=record["split"],
            metric_type=metric,
            metric_value=round(value, 2),
        )
        for record in records
        for metric, value in record["metrics"].items()
    ]
    tasks_now = {one.task_name for one in found}
    about: Any = card.data  # ModelCardData, which its class does not say
    about.eval_results = [r for r in about.eval_results or () if r.task_name not in tasks_now] + found
    about.model_name = about.model_name or name
    return str(card)


def read_table(config: EvaluateConfig, task: str) -> zero_shot.Table:
    """The table of a task that is scored by embeddings, or what documents make of one. Raises ValueError or OSError."""
    kind, _, name = task.partition(":")
    name = name or kind
    if kind == "retrieval" and not zero_shot.is_table(config.data):
        inside = Path(config.data) / name
        path = inside if inside.exists() else config.data
        found = sources.resolve((str(path),), Options(text_field=(*config.text_columns, "text")[0]))
        documents = (document for source in found for document in source.documents())
        return zero_shot.made_pairs(documents, config.data, config.max_examples)
    return zero_shot.load(
        kind,
        name,
        config.data,
        text_columns=config.text_columns,
        label_column=config.label_column,
        split=config.split,
        max_examples=config.max_examples,
    )


def device_of(config: EvaluateConfig) -> str:
    """Where models run."""
    import torch

    wants_cuda = config.device == "auto" and torch.cuda.is_available()
    return "cuda" if wants_cuda or config.device == "cuda" else "cpu"


def chosen_tasks(config: EvaluateConfig) -> dict[str, tasks.Task]:
    """The tasks that were asked for, by name; `glue` stands for those that have a folder in --data."""
    in_data = [task for task in tasks.GLUE if (Path(config.data) / task).is_dir()]
    if "glue" in config.task and not in_data:
        raise ValueError(f"--data {config.data} has none of the folders {' '.join(tasks.GLUE)}")
    names = [name for given in config.task for name in (in_data if given == "glue" else [given])]
    if len(names) > 1 and config.data.startswith("hf:"):
        raise ValueError(f"--data {config.data} holds one task, got --task {' '.join(names)}: give one")
    known = tasks.TASKS
    if config.label_column is not None:
        known = known | {"table": tasks.table(config.text_columns, config.label_column)}
    return {name: known[name] for name in names}


def result_file(config: EvaluateConfig) -> Path:
    """Where the results go."""
    if config.out is None and not Path(config.model).is_dir():
        raise ValueError(f"--out is missing: {config.model} is not a folder to keep the results in")
    return config.out or Path(config.model) / "evaluation.json"


class Results:
    """The results of a model in a JSON file, written anew after each seed.

    Raises ValueError where the file holds results of other settings, or none.
    """

    def __init__(self, path: Path, config: EvaluateConfig) -> None:
        self.path = path
        make_room(path)
        settings = asdict(config.settings) | {"data": config.data, "teacher": config.teacher}
        self.record: dict[str, Any] = {"model": config.model, "settings": settings, "tasks": {}}
        if not path.is_file():
            return
        old = read_json(path, fix="give another --out")
        try:
            differing = [k for k in settings if old["settings"].get(k) != settings[k]]
            if old["model"] != config.model:
                differing.append("model")
            columns = [*config.text_columns, config.label_column]
            if {"table"} & old["tasks"].keys() & set(config.task) and old["tasks"]["table"].get("columns") != columns:
                differing.append("text-columns or --label-column")
            for task in old["tasks"].values():  # the numbers that are read again
                math.fsum([task["median"], task["num_train"], *(s["score"] for s in task["seeds"].values())])
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            raise ValueError(f"{path} is no evaluation: give another --out") from None
        if differing:
            option = f"--{differing[0].replace('_', '-')}"
            raise ValueError(f"{path} holds results of another {option}: give another --out, or delete it")
        self.record = old

    def seeds(self, task: str) -> dict[str, Any]:
        """{seed: metrics} of a task so far."""
        return self.record["tasks"].get(task, {}).get("seeds", {})

    def add(self, task: str, seed: int, found: dict[str, float], about: dict[str, Any]) -> None:
        """Keep the metrics of one seed, on disk when this returns."""
        kept = self.record["tasks"].setdefault(task, about | {"seeds": {}})
        kept["seeds"][str(seed)] = found
        kept["median"] = statistics.median(s["score"] for s in kept["seeds"].values())
        write_json(self.path, self.record)


def missing_seeds(config: EvaluateConfig, name: str, results: Results) -> list[int]:
    """The seeds of a task that have no result yet."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [seed for seed in seeds if str(seed) not in results.seeds(name)]


def evaluate(config: EvaluateConfig, name: str, data: tasks.TaskData, length: int, results: Results) -> None:
    """Learn one task, by texts of `length` tokens, with each seed that has no result yet, and keep the scores."""
    import torch
    import transformers

    from fastdistil.evaluation import finetune, squad

    device = torch.device(device_of(config))

    # The examples become token ids once for all seeds.
    settings, task = config.settings, data.task
    encode = squad.Windows if task.spans else finetune.Encoded.texts
    tokenizer = finetune.pretrained(transformers.AutoTokenizer, config.model)
    if task.spans or math.isfinite(finetune.longest_input(finetune.skeleton(config.model))):
        tokenizer.padding_side = "right"  # else as the model was trained: XLNet reads its last token as the summary
    train = encode(tokenizer, data.train, length)
    validation = encode(tokenizer, data.validation, length)
    about: dict[str, Any] = {"metrics": list(task.metrics), "num_train": len(train), "num_validation": len(validation)}
    if name == "table":
        about["columns"] = task.columns[0]
    missing = missing_seeds(config, name, results)
    for seed in missing:
        # The encoder is fine-tuned anew with each seed, after its teacher where there is one.
        begin = time.perf_counter()
        title = f"{name}, seed {seed}"
        teacher = None
        if config.teacher is not None:
            teacher = finetune.task_teacher(config.teacher, tokenizer, data, train, settings, seed, device)
        model = finetune.load_model(config.model, data, settings, seed=seed)
        if seed == missing[0]:
            about["lr"] = finetune.learning_rate(model, settings)
            log.info("%s: learning rate %g%s", name, about["lr"], "" if settings.lr else ", by the model's size (--lr)")
            for examples in (train, validation):
                finetune.require_readable(model, config.model, examples.longest())
                if teacher is not None:
                    finetune.require_readable(teacher, f"--teacher {config.teacher}", examples.longest())
        finetune.fine_tune(model, train, settings, seed=seed, device=device, teacher=teacher, title=title)

        # It is scored on the validation split, in batches of four times as many examples, since it needs no gradients.
        batch_size = 4 * settings.batch_size
        if isinstance(validation, squad.Windows):
            found = squad.score(squad.answer(model, validation, batch_size, device), data.validation)
        else:
            predicted = finetune.predict(model, validation, batch_size, device)
            found = tasks.score(task, predicted, validation.labels.numpy())
        log.info("%s: %s", title, "  ".join(f"{metric} {value:.4f}" for metric, value in found.items()))

        # The scores, and what gave them, are on disk before the next seed begins.
        versions = {package.__name__: package.__version__ for package in (fastdistil, torch, transformers)}
        results.record |= {"class": type(model).__name__, "num_parameters": model.num_parameters()}
        results.record |= {"device": str(device), "versions": versions}
        results.add(name, seed, found | {"seconds": time.perf_counter() - begin}, about)
        if config.save is not None and seed == config.first_seed + config.seeds - 1:
            model.save_pretrained(config.save / name)
            tokenizer.save_pretrained(config.save / name)


def sequence_length(config: EvaluateConfig, task: tasks.Task) -> int:
    """Tokens of an example. Raises ValueError where the model, or its teacher, does not read so many."""
    from fastdistil.evaluation import finetune

    given = config.settings.max_length
    length = given or (384 if task.spans else 128)
    for path in filter(None, (config.model, config.teacher)):
        longest = finetune.longest_input(finetune.skeleton(path))
        if given is not None and given > longest:
            raise ValueError(
                f"--max-length {given} is more than the {longest} tokens that {path} reads: give {longest} or less"
            )
        length = int(min(length, longest))
    return length


def table(record: dict[str, Any]) -> "Table":
    """The paper's table, scores x 100, a row a task: the model's medians with their range, and what was published."""
    import pandas as pd

    # A column a task with the scores of its seeds; then a column a model with its score on each task.
    model, found = Path(record["model"]).name, record["tasks"]
    by_task = {name: {seed: 100 * s["score"] for seed, s in task["seeds"].items()} for name, task in found.items()}
    scores = pd.DataFrame(by_task, dtype=float)
    medians = pd.DataFrame({model: scores.median()})
    published = _published(found)
    if published:
        medians[["BERT-base, published", "DistilBERT, published"]] = published

    # The numbers as text, the model's with their range; the mean over several tasks comes first.
    cells = medians.map("{:.1f}".format)
    ranges = scores.agg(["count", "min", "max"]).T.itertuples(index=False)
    cells[model] += [f" ({low:.1f}-{high:.1f})" if num_seeds > 1 else "" for num_seeds, low, high in ranges]
    if len(found) > 1:
        mean = medians.mean().map("{:.1f}".format).rename("score").to_frame().T
        cells = pd.concat([mean, cells])
    return console.table(("", *cells.columns), cells.itertuples(name=None))


def _published(found: dict[str, Any]) -> list[tuple[float, float]]:
    """What the paper says of the tasks; nothing where it does not know one of them."""
    published = [tasks.TASKS[name].published if name in tasks.TASKS else None for name in found]
    return [pair for pair in published if pair] if all(published) else []


def sources_of(record: dict[str, Any]) -> list[str]:
    """What each column of the table was trained on, since a score is of a model and of its examples."""
    model, found, epochs = Path(record["model"]).name, record["tasks"], record["settings"]["epochs"]
    lines = [
        f"{model}: {epochs} epochs of {_amounts({name: task['num_train'] for name, task in found.items()})} examples"
    ]
    if _published(found):
        whole = _amounts({name: tasks.TASKS[name].num_published for name in found})
        lines.append(f"published: the whole training sets, {whole} examples, epochs not stated (arXiv 1910.01108)")
    return lines


def _amounts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


if __name__ == "__main__":
    leave(main())
