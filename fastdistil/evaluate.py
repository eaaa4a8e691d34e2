"""Command: fine-tune an encoder on tasks and score it, as a user of the model would: by transformers.

    python -m fastdistil.evaluate student/ --task sst2 cola mrpc --data glue/

Every task is learnt once a seed; a task's score is the median over the seeds. The results are written to a JSON file after every
seed, and the same command goes on where it stopped. torch is imported after the command line and the data's folder were checked.
"""

import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdistil import __version__
from fastdistil.evaluation import tasks
from fastdistil.evaluation.tasks import Settings

log = logging.getLogger("fastdistil.evaluate")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Fine-tune an encoder on tasks and score it."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder of an encoder, e.g. an export, or its name on the hub."""
    task: tuple[str, ...]
    """cola sst2 mrpc stsb qqp mnli qnli rte wnli imdb squad squad2, `glue` for those of GLUE that --data holds, or `table` for any labelled texts."""
    data: str
    """Folder of the files (Parquet, TSV, CSV or JSON), of one task or with a folder for each; or hf:NAME[:CONFIG]."""
    text_columns: tuple[str, ...] = ()
    """Of task table: one column, or two for pairs."""
    label_column: str | None = None
    """Of task table."""
    seeds: int = 3
    """How often each task is learnt."""
    first_seed: int = 1
    """The first of these seeds."""
    teacher: str | None = None
    """Distil a second time: folder of a model fine-tuned on the task, or of an encoder, which is then fine-tuned first."""
    out: Path | None = None
    """JSON file of the results. None: evaluation.json in the model's folder."""
    save: Path | None = None
    """Keep the model of the last seed in SAVE/TASK."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(
                f"--seeds must be 1 or more and --first-seed 0 or more, got {self.seeds} and {self.first_seed}"
            )
        unknown = set(self.task) - tasks.TASKS.keys() - {"glue", "table"}
        if unknown or not self.task:
            raise ValueError(f"--task {' '.join(sorted(unknown))}: wanted some of glue table {' '.join(tasks.TASKS)}")
        is_table = "table" in self.task
        if is_table != (self.label_column is not None) or is_table != bool(self.text_columns):
            raise ValueError("--task table wants --text-columns and --label-column; other tasks have their own")
        if not self.data.startswith("hf:") and not Path(self.data).is_dir():
            raise ValueError(f"--data {self.data} is not a folder: give the one of the tasks' files, or hf:NAME")


def main(args: list[str] | None = None) -> int:
    """Exit status 0: all scored. 1: a fine-tuning failed. 2: a wrong command line, model or data."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        config = tyro.cli(EvaluateConfig, args=args, prog="python -m fastdistil.evaluate")
        asked = chosen_tasks(config)
        results = Results(result_file(config), config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from fastdistil.evaluation import finetune  # torch and transformers: some seconds

    finetune.quiet()
    try:
        for name, task in asked.items():
            evaluate(config, name, task, results)
    except finetune.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results.record))
    print(f"\n{results.path}")
    return 0


def chosen_tasks(config: EvaluateConfig) -> dict[str, tasks.Task]:
    """The tasks that were asked for, by name; `glue` stands for those that have a folder in --data."""
    names: list[str] = []
    for name in config.task:
        if name == "glue":
            found = [task for task in tasks.GLUE if (Path(config.data) / task).is_dir()]
            if not found:
                raise ValueError(f"--data {config.data} has none of the folders {' '.join(tasks.GLUE)}")
            names += found
        else:
            names.append(name)
    if len(names) > 1 and config.data.startswith("hf:"):
        raise ValueError(f"--data {config.data} holds one task, got --task {' '.join(names)}: give one")
    assert config.label_column is not None or "table" not in names  # checked by the configuration
    return {
        name: tasks.table(config.text_columns, config.label_column or "") if name == "table" else tasks.TASKS[name]
        for name in dict.fromkeys(names)
    }


def result_file(config: EvaluateConfig) -> Path:
    """Where the results go."""
    if config.out is not None:
        return config.out
    if not Path(config.model).is_dir():
        raise ValueError(f"--out is missing: {config.model} is not a folder to keep the results in")
    return Path(config.model) / "evaluation.json"


class Results:
    """The results of a model in a JSON file, written anew after each seed.

    Raises ValueError where the file holds results of other settings, or none.
    """

    def __init__(self, path: Path, config: EvaluateConfig) -> None:
        self.path = path
        settings = asdict(config.settings) | {"data": config.data, "teacher": config.teacher}
        self.record: dict[str, Any] = {"model": config.model, "settings": settings, "tasks": {}}
        if not path.is_file():
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            differing = [k for k in settings if old["settings"].get(k) != settings[k]]
            if old["model"] != config.model:
                differing.append("model")
            for task in old["tasks"].values():  # the numbers that are read again
                math.fsum([task["median"], *(s["score"] for s in task["seeds"].values())])
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise ValueError(f"{path} is no evaluation: give another --out") from None
        if differing:
            raise ValueError(
                f"{path} holds results of another --{differing[0].replace('_', '-')}: give another --out, or delete it"
            )
        self.record = old

    def seeds(self, task: str) -> dict[str, Any]:
        """{seed: metrics} of a task so far."""
        return self.record["tasks"].get(task, {}).get("seeds", {})

    def add(self, task: str, seed: int, found: dict[str, float], about: dict[str, Any]) -> None:
        """Keep the metrics of one seed, on disk when this returns."""
        kept = self.record["tasks"].setdefault(task, about | {"seeds": {}})
        kept["seeds"][str(seed)] = found
        kept["median"] = statistics.median(s["score"] for s in kept["seeds"].values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def evaluate(config: EvaluateConfig, name: str, task: tasks.Task, results: Results) -> None:
    """Learn one task with each seed that has no result yet, and keep the scores."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    missing = [seed for seed in seeds if str(seed) not in results.seeds(name)]
    if not missing:
        return
    import torch
    import transformers

    from fastdistil.evaluation import finetune, squad

    settings = config.settings
    wants_cuda = config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if wants_cuda or config.device == "cuda" else "cpu")
    tokenizer = finetune.pretrained(transformers.AutoTokenizer, config.model)
    length = sequence_length(config, task)
    if task.spans:
        data = squad.load(name, task, config.data)
        train = squad.Windows(tokenizer, data.train[: settings.max_train_examples], length)
        validation = squad.Windows(tokenizer, data.validation, length)
    else:
        data = tasks.load(name, task, config.data)
        examples = data.train.first(settings.max_train_examples)
        train = finetune.Encoded.texts(tokenizer, examples, length)
        validation = finetune.Encoded.texts(tokenizer, data.validation, length)
    about = {"metrics": list(task.metrics), "num_train": len(train), "num_validation": len(validation)}
    for seed in missing:
        begin = time.perf_counter()
        teacher = None
        if config.teacher is not None:
            teacher = finetune.task_teacher(config.teacher, tokenizer, data, train, settings, seed, device)
        title = f"{name}, seed {seed}"
        model = finetune.load_model(config.model, data, settings, seed=seed)
        finetune.fine_tune(model, train, settings, seed=seed, device=device, teacher=teacher, title=title)
        if isinstance(validation, squad.Windows):
            answers = squad.answer(model, validation, 4 * settings.batch_size, device)
            found = squad.score(answers, validation.questions)
        else:
            predicted = finetune.predict(model, validation, 4 * settings.batch_size, device)
            found = tasks.score(task, predicted, validation.labels.numpy())
        log.info("%s: %s", title, "  ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
        results.record |= {
            "class": type(model).__name__,
            "num_parameters": model.num_parameters(),
            "device": str(device),
            "versions": {"fastdistil": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        results.add(name, seed, found | {"seconds": time.perf_counter() - begin}, about)
        if config.save is not None and seed == seeds[-1]:
            model.save_pretrained(config.save / name)
            tokenizer.save_pretrained(config.save / name)


def sequence_length(config: EvaluateConfig, task: tasks.Task) -> int:
    """Tokens of an example. Raises ValueError where the model does not read so many."""
    from fastdistil.evaluation import finetune

    model = finetune.configuration(config.model)
    longest = model.max_position_embeddings
    if model.model_type == "roberta":  # counts from the row after [PAD]'s
        longest -= model.pad_token_id + 1
    if config.settings.max_length is None:
        return min(longest, 384 if task.spans else 128)
    if config.settings.max_length > longest:
        raise ValueError(
            f"--max-length {config.settings.max_length} is more than the {longest} tokens that {config.model} reads"
        )
    return config.settings.max_length


def table(record: dict[str, Any]) -> str:
    """The paper's table, scores x 100: this model's medians with their range, and the published rows for the same tasks."""
    found = record["tasks"]
    rows: list[list[str]] = [["", *(["score"] if len(found) > 1 else []), *found]]
    cells, medians = [], []
    for task in found.values():
        scores = sorted(100 * s["score"] for s in task["seeds"].values())
        spread = f" ({scores[0]:.1f}-{scores[-1]:.1f})" if len(scores) > 1 else ""
        cells.append(f"{100 * task['median']:.1f}{spread}")
        medians.append(100 * task["median"])
    rows.append(_row(Path(record["model"]).name, medians, cells))
    for i, name in enumerate(("BERT-base, published", "DistilBERT, published")):
        published = [tasks.TASKS[t].published for t in found if t in tasks.TASKS]
        values = [p[i] for p in published if p is not None]
        if len(values) == len(found):
            rows.append(_row(name, values, [f"{v:.1f}" for v in values]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip


def _row(name: str, values: Iterable[float], cells: list[str]) -> list[str]:
    values = list(values)
    return [name, *([f"{statistics.mean(values):.1f}"] if len(values) > 1 else []), *cells]


if __name__ == "__main__":
    sys.exit(main())
