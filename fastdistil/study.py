"""Command: the paper's experiment on any teacher and corpus, from pre-training to tables.

    python -m fastdistil.study --shards wiki --teacher teacher/ --data glue/ --tasks sst2 cola mrpc --out runs/study
    python -m fastdistil.study --shards wiki --teacher MINILM --data glue/ --tasks sts:stsb pairs:mrpc --out runs/embed

Each variant of the objective is pre-trained once a seed, on the same sequences with the same masks, exported, and
scored on every task: fine-tuned, or by its embeddings beside the teacher's. A step is a command of this package that a
user could have typed: OUT/logs/STEP.log holds it and what it printed, and whoever deletes that file has the step done
again. OUT/study.json holds what was measured, OUT/study.md the tables and plots made of it (evaluation/tables.py), also
where some steps are still to be done.
"""

import functools
import json
import logging
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastdistil.evaluation import zero_shot
from fastdistil.model import headers
from fastdistil.model.architecture import read_architecture
from fastdistil.remote import hub
from fastdistil.run import console, options, recipes
from fastdistil.run.command import Failed, command, leave, num_cores, require, visible_gpus
from fastdistil.run.files import read_json, read_json_lines, write_json
from fastdistil.training.preflight import Resolved, resolve

log = logging.getLogger("fastdistil.study")

PAPER: dict[str, str] = {
    "distilbert": "distilbert",
    "no-kd": "distilbert --loss.kd 0",
    "no-mlm": "distilbert --loss.mlm 0",
    "no-cosine": "distilbert --loss.cosine 0",
    "random-init": "distilbert --student.init random --student.layers None",
    "no-teacher": "mlm --loss.kd 0 --loss.cosine 0 --student.init random --student.layers None",
}
"""The rows of the paper's ablation: a recipe, and what it changes. All students have the sizes of the first."""
_RELATIONS = "embed --loss.hidden 0 --loss.embedding 0"
EMBED: dict[str, str] = {
    "embed": "embed",
    "hidden": "embed --loss.embedding 0",
    "pooled": "embed --loss.hidden 0",
    "last-layer": "embed --loss.hidden 0 --loss.embedding 0 --loss.cosine 1",
    "similarity": "embed --loss.similarity 1",
    "relations": f"{_RELATIONS} --loss.values 1",
    "minilmv2": f"{_RELATIONS} --loss.queries 1 --loss.keys 1 --loss.values 1",
}
"""Those of a teacher without a masked-LM head; with one, both kinds can stand in one study."""
VARIANTS = PAPER | EMBED
SIZES = ("num_layers", "hidden_size", "num_heads", "ffn_size", "max_positions")
"""Of a student, which the variants with a teacher have from it and the others are given, as they are its family."""
FREE_AT_RESUME = ("out", "seeds", "variants", "jobs", "launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Distil with all terms, without each, from random weights; train without a teacher; fine-tune all and compare."""

    shards: Path
    """Folder written by fastdistil.prepare."""
    out: Path
    """Folder of the study; the same command goes on with it."""
    data: Path
    """Folder of the tasks' data, as fastdistil.evaluate wants it."""
    tasks: tuple[str, ...]
    """As of fastdistil.evaluate, e.g. sst2 cola mrpc, or glue, to fine-tune on; sts:stsb pairs:mrpc by embeddings."""
    teacher: Path | None = None
    """Hugging Face folder, for the paper's rows with a masked-LM head. None: one is trained by the mlm recipe and
    --teacher-options."""
    teacher_options: str = ""
    """Options of fastdistil.pretrain for that teacher (size, batch, rate, duration), as one string after an equals
    sign: --teacher-options="--student.num-layers 4 ..."."""
    options: str = ""
    """Options of fastdistil.pretrain for every student, likewise; the duration is --tokens."""
    tokens: int = 100_000_000
    """Tokens each student is pre-trained on, to the nearest update."""
    evaluate_options: str = ""
    """Options of fastdistil.evaluate for every model, likewise."""
    seeds: int = 3
    """Pre-trainings of each variant, from seed 1; the fine-tuning of each has the seed of its pre-training."""
    points: int = 1
    """Evaluate the first seed of each variant also after 1/points, 2/points, ... of its tokens."""
    variants: tuple[str, ...] = ()
    """Rows of the ablation; the others are compared with the first. None: the paper's (distilbert no-kd no-mlm
    no-cosine random-init no-teacher), or those of a teacher without a masked-LM head (embed hidden pooled last-layer
    similarity relations minilmv2)."""
    jobs: int = 1
    """Steps at a time, each with its share of the cores and, where there are GPUs, one of them."""
    launcher: str = ""
    """Starts each pre-training in place of python, e.g. "torchrun --nproc-per-node 8"."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seeds", "points", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown:
            raise ValueError(f"--variants must be some of {' '.join(VARIANTS)}, got {' '.join(self.variants)}")
        if self.jobs > 1 and self.launcher:
            raise ValueError(f"--launcher {self.launcher!r} takes the devices of several --jobs: give one of the two")
        if self.teacher is not None and self.teacher_options:
            raise ValueError("--teacher-options has no effect with --teacher: give one of the two")


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: all measured, tables written. 1: not all, or no tables. 2: a wrong command line."""
    console.start(sys.stdout)
    study = Study(options.parse(StudyConfig, args, "study"))
    require("study", "eval", "jinja2", "matplotlib", "pandas")  # of tables, which come last
    study.check()
    try:
        study.run()
    except (Failed, ValueError, OSError) as error:
        raise Failed(f"{error}; the same command goes on") from None
    finally:
        has_tables = study.write()
    runs = [study.out / "runs" / f"{variant}-1" for variant in study.config.variants]
    print(f"next: {console.command_line('report', *runs, '--out', study.out / 'report.html')}")
    return 0 if has_tables else 1


class Step(NamedTuple):
    """`python -m fastdistil.MODULE WORDS`, which has been done where OUT/logs/NAME.log exists."""

    name: str
    module: str
    words: tuple[object, ...]


class Study:
    """The steps of a study. Models are called VARIANT-SEED, VARIANT-SEED-at-UPDATE (earlier checkpoints), teacher-SEED.

    OUT/runs/NAME is a run of pretrain, OUT/models/NAME its export, OUT/scores/NAME.json the result of evaluate.
    """

    def __init__(self, config: StudyConfig) -> None:
        if config.teacher is not None:
            config = replace(config, teacher=hub.folder_of("--teacher", config.teacher))
        if not config.variants:
            config = replace(config, variants=default_variants(config.teacher))
        self.config, self.out = config, config.out
        self.teacher = config.teacher or self._model("teacher")
        self.devices: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self.is_ending = False  # before all is done: then no further step begins
        self.running: list[subprocess.Popen[bytes]] = []

    def check(self) -> None:
        """Refuse what would fail hours later, and what belongs to another study. Raises ValueError or OSError."""
        config, path = self.config, self.out / "settings.json"
        if not config.data.is_dir():
            raise ValueError(f"--data {config.data} is not a folder: give that of the tasks' data")
        if config.teacher is None:
            self._resolve(self._teacher_words())
        else:
            self._resolve_students()

        # A study goes on with the settings it began with, but for some.
        settings = json.loads(json.dumps(asdict(config), default=str))
        if path.is_file():
            old = read_json(path)
            for key, value in settings.items():
                if key not in FREE_AT_RESUME and old.get(key) != value:
                    raise ValueError(
                        f"--out {self.out} is a study with --{key.replace('_', '-')} {old.get(key)!r}, now {value!r}: "
                        "use the old value, or another --out"
                    )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} is not empty and holds no study: give a new folder")
        if not any((self.out / "logs").glob("evaluate-*.log")):
            self._check_tasks()
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def _check_tasks(self) -> None:
        """Let evaluate check tasks, options and packages, and the teacher where there is one. Raises ValueError."""
        for step in self._evaluations("check", 1, self.config.teacher or ""):
            line = [sys.executable, "-m", f"fastdistil.{step.module}", *(str(w) for w in step.words if w), "--dry-run"]
            ended = subprocess.run(line, capture_output=True, text=True, errors="replace")
            if ended.returncode:
                reason = ended.stderr.rpartition("error: ")[2].strip()
                raise ValueError(f"the tasks cannot be evaluated: {reason} (asked by `{shlex.join(line[1:])}`)")
            log.info("tasks: %s", "; ".join(ended.stdout.splitlines()))

    def run(self) -> None:
        """Every step that is still to be done, `jobs` at a time. Raises Failed at the first that fails."""
        for device in _devices(self.config.jobs):
            self.devices.put(device)
        pool = ThreadPoolExecutor(self.config.jobs)
        try:
            if self.config.teacher is None:
                self._do(self._pretraining("teacher", self._teacher_words()))
                self._resolve_students()
            list(pool.map(self._do, self._chains()))
            models = (self.teacher, self._model(f"{self.config.variants[0]}-1"))
            self._do([Step("efficiency", "efficiency", (*models, "--out", self.out / "efficiency.json"))])
        except BaseException as error:
            self.is_ending = True
            if isinstance(error, KeyboardInterrupt):  # a run makes its checkpoint then
                for process in self.running:
                    process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
            raise
        finally:
            pool.shutdown()
            for process in self.running:
                process.wait()

    def write(self) -> bool:
        """Gather what was measured in OUT/study.json and make OUT/study.md of it; says whether that was possible."""
        from fastdistil.evaluation import tables  # pandas, SciPy and Matplotlib: two seconds

        try:
            measured = gather(self.config, self.teacher)
            tables.write(self.out, measured)
        except (ValueError, OSError) as error:
            print(f"error: no tables: {error}", file=sys.stderr)
            return False
        print(f"{self.out / 'study.md'}: {measured['complete']}")
        return True

    def _chains(self) -> Iterator[list[Step]]:
        """Lists of steps that follow from one another; steps of different lists may run at the same time."""
        config, student = self.config, self._first
        updates = max(1, round(config.tokens / (student.micro_batches_per_update * student.token_budget)))
        # Rounded up: else the checkpoint at the end would come beside an unasked one, and push out the first.
        every = -(-updates // config.points)
        duration = ["--optim.unit", "updates", "--optim.duration", updates]
        kept = ["--log.checkpoint-every", every, "--log.keep-checkpoints", config.points] if config.points > 1 else []
        for seed in range(1, config.seeds + 1):
            yield self._evaluations(f"teacher-{seed}", seed, self.teacher)
            for variant in config.variants:
                name = f"{variant}-{seed}"
                steps = self._pretraining(name, [*self._words(variant, seed), *duration, *kept])
                steps += self._evaluations(name, seed)
                # The first seed is evaluated at its earlier checkpoints, too.
                for update in range(every, every * config.points, every) if seed == 1 else ():
                    earlier = f"{name}-at-{update}"
                    words = (self.out / "runs" / name, "--out", self._model(earlier), "--checkpoint", update)
                    steps += [Step(f"export-{earlier}", "export", words), *self._evaluations(earlier, seed)]
                yield steps

    def _model(self, name: str) -> Path:
        return self.out / "models" / name

    def _pretraining(self, name: str, words: list[object]) -> list[Step]:
        run = self.out / "runs" / name
        threads = ("--engine.threads", _cores(self.config.jobs)) if self.config.jobs > 1 else ()
        return [
            Step(f"pretrain-{name}", "pretrain", (*words, "--out", run, "--resume", "auto", *threads)),
            Step(f"export-{name}", "export", (run, "--out", self._model(name), "--overwrite")),
        ]

    def _evaluations(self, name: str, seed: int, model: Path | str | None = None) -> list[Step]:
        """Fine-tuned, and by embeddings: a step each where there are such tasks."""
        config, model = self.config, self._model(name) if model is None else model
        by_embeddings, fine_tuned = kinds_of(config.tasks)
        more = ("--data", config.data, *shlex.split(config.evaluate_options))
        steps = []
        if fine_tuned:
            words = ("--first-seed", seed, "--seeds", 1, "--out", self.out / "scores" / f"{name}.json")
            steps.append(Step(f"evaluate-{name}", "evaluate", (model, "--task", *fine_tuned, *more, *words)))
        if by_embeddings and (seed == 1 or model != self.teacher):  # no seed changes what it is worth
            beside = () if model == self.teacher else ("--reference", self.teacher)
            words = (*beside, "--out", self.out / "embeddings" / f"{name}.json")
            steps.append(Step(f"embeddings-{name}", "evaluate", (model, "--task", *by_embeddings, *more, *words)))
        return steps

    def _teacher_words(self) -> list[object]:
        return ["mlm", "--data.shards", self.config.shards, *shlex.split(self.config.teacher_options)]

    def _words(self, variant: str, seed: int) -> list[object]:
        """What follows `fastdistil.pretrain` for a variant, but the duration and the run folder."""
        recipe, *changes = VARIANTS[variant].split()
        words = [recipe, "--data.shards", self.config.shards, *shlex.split(self.config.options), *changes]
        if recipe == "mlm":
            words += ["--student.family", self._first.student.model_type]
            for size in SIZES:
                words += [f"--student.{size.replace('_', '-')}", getattr(self._first.student, size)]
        else:
            words += ["--teacher.path", self.teacher]
        return [*words, "--seed", seed]

    def _resolve(self, words: list[object]) -> Resolved:
        """The run that these words ask for, in a folder of its own. Raises ValueError or OSError."""
        config = recipes.parse([*map(str, words), "--out", str(self.out / "runs" / "checked")])
        return resolve(config, world_size=1, by_torchrun=bool(self.config.launcher))

    def _resolve_students(self) -> None:
        """Refuse what a run of a variant would refuse; its teacher must be there."""
        for variant in self.config.variants:
            self._resolve(self._words(variant, 1))

    @functools.cached_property
    def _first(self) -> Resolved:
        """The run of the student that the others are like."""
        return self._resolve(self._words(self.config.variants[0], 1))

    def _do(self, steps: list[Step]) -> None:
        """Run each step unless its log says that it is done. Raises Failed."""
        for name, module, words in steps:
            done = self.out / "logs" / f"{name}.log"
            if self.is_ending or done.is_file():
                continue
            launcher = shlex.split(self.config.launcher) if module == "pretrain" else []
            line = [*(launcher or [sys.executable]), "-m", f"fastdistil.{module}", *map(str, words)]
            log.info("%s", name)
            part = done.with_suffix(".part")
            device = self.devices.get()
            try:
                with part.open("w", encoding="utf-8") as file:
                    file.write(f"$ {shlex.join(line)}\n")
                    file.flush()
                    process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=os.environ | device)
                self.running.append(process)
                process.wait()
                self.running.remove(process)
            finally:
                self.devices.put(device)
            text = part.read_text(encoding="utf-8", errors="replace")
            if process.returncode:
                self.is_ending = True
                tail = "\n".join(text.splitlines()[-8:])
                raise Failed(f"{name} ended with status {process.returncode}; {part} ends in\n{tail}\n")
            part.replace(done)


def kinds_of(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Of the tasks: those that are scored by embeddings, those that are fine-tuned on."""
    by_embeddings = [name for name in names if name.partition(":")[0] in zero_shot.KINDS]
    return by_embeddings, [name for name in names if name not in by_embeddings]


def default_variants(teacher: Path | None) -> tuple[str, ...]:
    """The paper's, or those of a teacher without a masked-LM head. Raises ValueError where it is no model."""
    if teacher is None:
        return tuple(PAPER)
    found = headers.match(teacher, read_architecture(teacher), headers.read_headers(teacher), need_head=False)
    return tuple(PAPER if found.has_head else EMBED)


def gather(config: StudyConfig, teacher: Path) -> dict[str, Any]:
    """What the steps that are done have measured: the contents of OUT/study.json, from which the tables are made."""
    out = config.out
    done = {path.stem for path in (out / "logs").glob("*.log")}
    names = {f"{variant}-{seed}": (variant, seed) for seed in range(1, config.seeds + 1) for variant in config.variants}
    runs = {
        name: {"variant": variant, "seed": seed, **_curves(out / "runs" / name)}
        for name, (variant, seed) in names.items()
        if f"pretrain-{name}" in done
    }
    scores: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, Any]] = {}  # of the teacher, of what is scored by embeddings
    about = {}
    for path in sorted((out / "scores").glob("*.json")):
        if f"evaluate-{path.stem}" in done:
            for task, found in read_json(path)["tasks"].items():
                scores.setdefault(path.stem, {})[task] = next(iter(found["seeds"].values()))["score"]
                about[task] = {key: found[key] for key in ("metrics", "num_train", "num_validation")}
    for path in sorted((out / "embeddings").glob("*.json")):
        if f"embeddings-{path.stem}" in done:
            record = read_json(path)
            for found in (row for row in record["scores"] if row["model"] != record["reference"]):
                task, (metric, value) = found["task"], next(iter(found["metrics"].items()))
                scores.setdefault(path.stem, {})[task] = value / 100
                shares.setdefault(path.stem, {})[task] = {
                    key: found[key] for key in ("interval", "of_reference", "of_reference_interval") if key in found
                }
                about[task] = {"metrics": [metric], "num_train": 0, "num_validation": found["num_rows"]}
    by_embeddings, fine_tuned = map(bool, kinds_of(config.tasks))
    of_students = len(names) + len(config.variants) * (config.points - 1)
    num_wanted = fine_tuned * (of_students + config.seeds) + by_embeddings * (of_students + 1)
    num_found = sum(step.startswith(("evaluate-", "embeddings-")) for step in done)
    measured = {
        "settings": read_json(out / "settings.json"),
        "teacher": str(teacher),
        "tasks": about,
        "runs": runs,
        "scores": scores,
        "shares": shares,
        "efficiency": read_json(out / "efficiency.json") if "efficiency" in done else None,
        "complete": f"{len(runs)} of {len(names)} pre-trainings, {num_found} of {num_wanted} evaluations",
    }
    write_json(out / "study.json", measured)
    return measured


def _curves(run: Path) -> dict[str, Any]:
    """Of a run's metrics: tokens and updates in all, the median tokens/s, and each validation as {"tokens", "update",
    losses}."""
    tokens, update, validations, speeds = 0, 0, [], []
    for line in read_json_lines(run / "metrics.jsonl"):
        if line["split"] == "train":
            tokens, update = tokens + line["tokens"], line["update"]
            speeds.append(line["tokens_per_s"])
        elif line["split"] == "validation":  # of all the text
            validations.append({k: v for k, v in line.items() if k != "split"} | {"tokens": tokens})
    if not validations:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no validation: delete the log of that pre-training")
    speed = statistics.median(speeds)
    return {"tokens": tokens, "updates": update, "tokens_per_s": speed, "validations": validations}


def _cores(jobs: int) -> int:
    """Those of one job of several at the same time."""
    return max(1, num_cores() // jobs)


def _devices(jobs: int) -> list[dict[str, str]]:
    """For each job that runs at the same time, the environment that gives it its share of the machine."""
    if jobs == 1:
        return [{}]
    import torch

    gpus = visible_gpus(torch.cuda.device_count())
    threads = {"OMP_NUM_THREADS": str(_cores(jobs))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {}) for job in range(jobs)]


if __name__ == "__main__":
    leave(main())
