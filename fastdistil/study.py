"""Command: the paper's experiment on any teacher and corpus, from pre-training to tables.

    python -m fastdistil.study --shards data/wiki --teacher teacher/ --data glue/ --tasks sst2 cola mrpc --out runs/study

Each variant of the objective is pre-trained once a seed, on the same sequences with the same masks, exported, and fine-tuned on
every task. A step is a command of this package that a user could have typed: OUT/logs/STEP.log holds it and what it printed,
and whoever deletes that file has the step done again. OUT/study.json holds what was measured, OUT/study.md the tables
and plots made of it (study_tables.py), also where some steps are still to be done.
"""

import json
import logging
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from fastdistil.run import command as launcher
from fastdistil.run.config import Config
from fastdistil.run.recipes import RECIPES
from fastdistil.training.preflight import Resolved, resolve

log = logging.getLogger("fastdistil.study")

VARIANTS: dict[str, str] = {
    "distilbert": "distilbert",
    "no-kd": "distilbert --loss.kd 0",
    "no-mlm": "distilbert --loss.mlm 0",
    "no-cosine": "distilbert --loss.cosine 0",
    "random-init": "distilbert --student.init random --student.layers None",
    "no-teacher": "mlm --loss.kd 0 --loss.cosine 0 --student.init random --student.layers None",
}
"""The rows of the ablation: a recipe, and what it changes. All students have the sizes of the first."""
FREE_AT_RESUME = ("out", "seeds", "variants", "jobs", "launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Distil with all terms, without each, from random weights, and train without a teacher; fine-tune all and compare."""

    shards: Path
    """Folder written by fastdistil.prepare."""
    out: Path
    """Folder of the study; the same command goes on with it."""
    data: Path
    """Folder of the tasks' data, as fastdistil.evaluate wants it."""
    tasks: tuple[str, ...]
    """Tasks to fine-tune on, e.g. sst2 cola mrpc, or glue."""
    teacher: Path | None = None
    """Hugging Face folder with a masked-LM head. None: one is trained by the mlm recipe and --teacher-options."""
    teacher_options: str = ""
    """Options of fastdistil.pretrain for that teacher (size, batch, rate, duration), as one string after an equals sign: --teacher-options="--student.num-layers 4 ..."."""
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
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Rows of the ablation; distilbert, with which the others are compared, must be one."""
    jobs: int = 1
    """Steps at a time, each with its share of the cores and, where there are GPUs, one of them."""
    launcher: str = ""
    """Starts each pre-training in place of python, e.g. "torchrun --nproc-per-node 8"."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seeds", "points", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or "distilbert" not in self.variants:
            raise ValueError(
                f"--variants must be distilbert and others of {' '.join(VARIANTS)}, got {' '.join(self.variants)}"
            )
        if self.jobs > 1 and self.launcher:
            raise ValueError(f"--launcher {self.launcher!r} takes the devices of several --jobs: give one of the two")
        if self.teacher is not None and self.teacher_options:
            raise ValueError("--teacher-options has no effect with --teacher: give one of the two")


class StepFailed(Exception):
    """A command of the study ended with an error."""


def main(args: list[str] | None = None) -> int:
    """Exit status 0: all measured, tables written. 1: a step failed or was interrupted. 2: a wrong command line."""
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        study = Study(tyro.cli(StudyConfig, args=args, prog="python -m fastdistil.study"))
        study.check()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        study.run()
    except (StepFailed, ValueError, OSError, KeyboardInterrupt) as error:
        print(f"error: {error or 'interrupted'}; the same command goes on", file=sys.stderr)
        return 1
    finally:
        study.write()
    return 0


class Study:
    """The steps of a study. Names: VARIANT-SEED, VARIANT-SEED-at-UPDATE for an earlier checkpoint, teacher-SEED.

    OUT/runs/NAME is a run of pretrain, OUT/models/NAME its export, OUT/scores/NAME.json the result of evaluate.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.out = config, config.out
        self.teacher = config.teacher or self.out / "models" / "teacher"
        self.devices: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()

    def check(self) -> None:
        """Refuse what would fail hours later, and what belongs to another study. Raises ValueError or OSError."""
        config, path = self.config, self.out / "settings.json"
        if not config.data.is_dir():
            raise ValueError(f"--data {config.data} is not a folder: give that of the tasks' data")
        if config.teacher is None:
            resolve(self._teacher_config(), world_size=1, by_torchrun=True)
        else:
            for variant in config.variants:
                self._resolve(variant, 1)
        settings = json.loads(json.dumps(asdict(config), default=str))
        bound = {k: v for k, v in settings.items() if k not in FREE_AT_RESUME}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            for key, value in bound.items():
                if old.get(key) != value:
                    raise ValueError(
                        f"--out {self.out} is a study with --{key.replace('_', '-')} {old.get(key)!r}, now {value!r}: "
                        "use the old value, or another --out"
                    )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} is not empty and holds no study: give a new folder")
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def run(self) -> None:
        """Every step that is still to be done, `jobs` at a time. Raises StepFailed at the first that fails."""
        if self.config.teacher is None:
            self._pretrain_and_export("teacher", self._teacher_arguments())
            for variant in self.config.variants:
                self._resolve(variant, 1)
        for device in _devices(self.config.jobs):
            self.devices.put(device)
        with ThreadPoolExecutor(self.config.jobs) as pool:
            futures = [pool.submit(chain) for chain in self._chains()]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        models = (self.teacher, self.out / "models" / "distilbert-1")
        self._step("efficiency", "efficiency", *models, "--out", self.out / "efficiency.json")

    def _chains(self) -> Iterator[Callable[[], None]]:
        """Steps that follow from one another, as functions; different ones may run at the same time."""
        seeds = range(1, self.config.seeds + 1)
        for seed in seeds:
            yield lambda seed=seed: self._evaluate(f"teacher-{seed}", self.teacher, seed)
            for variant in self.config.variants:
                yield lambda variant=variant, seed=seed: self._variant(variant, seed)
        for variant in self.config.variants:
            yield lambda variant=variant: self._earlier(variant)

    def _variant(self, variant: str, seed: int) -> None:
        name = f"{variant}-{seed}"
        self._pretrain_and_export(name, self._arguments(variant, seed))
        self._evaluate(name, self.out / "models" / name, seed)

    def _earlier(self, variant: str) -> None:
        every = self._every(variant, 1)
        for update in (every * k for k in range(1, self.config.points)):
            name = f"{variant}-1-at-{update}"
            run, model = self.out / "runs" / f"{variant}-1", self.out / "models" / name
            self._step(f"export-{name}", "export", run, "--out", model, "--checkpoint", update)
            self._evaluate(name, model, 1)

    def _pretrain_and_export(self, name: str, arguments: list[str]) -> None:
        run, model = self.out / "runs" / name, self.out / "models" / name
        threads = ("--engine.threads", _cores(self.config.jobs)) if self.config.jobs > 1 else ()
        self._step(
            f"pretrain-{name}", "pretrain", *arguments, "--out", run, "--resume", "auto", *threads,
            launcher=self.config.launcher,
        )  # fmt: skip
        self._step(f"export-{name}", "export", run, "--out", model, "--overwrite")

    def _evaluate(self, name: str, model: Path, seed: int) -> None:
        config = self.config
        options = ("--task", *config.tasks, "--data", config.data, "--first-seed", seed, "--seeds", 1)
        result = self.out / "scores" / f"{name}.json"
        result.parent.mkdir(exist_ok=True)
        words = (model, *options, "--out", result, *shlex.split(config.evaluate_options))
        self._step(f"evaluate-{name}", "evaluate", *words)

    def _teacher_arguments(self) -> list[str]:
        shards = ("--data.shards", str(self.config.shards))
        return ["mlm", *shards, *shlex.split(self.config.teacher_options)]

    def _teacher_config(self) -> Config:
        return _parse([*self._teacher_arguments(), "--out", str(self.out / "runs" / "teacher")])

    def _arguments(self, variant: str, seed: int) -> list[str]:
        """What follows `fastdistil.pretrain` for a variant, but the run folder."""
        updates = self._updates(variant, seed)
        duration = ["--optim.unit", "updates", "--optim.duration", str(updates)]
        every = str(self._every(variant, seed))
        kept = ["--log.checkpoint-every", every, "--log.keep-checkpoints", str(self.config.points)]
        return [*self._recipe(variant, seed), *duration, *(kept if self.config.points > 1 else ())]

    def _every(self, variant: str, seed: int) -> int:
        """Updates between two checkpoints: rounded up, or the last one would come beside an unasked one and push out the first."""
        return -(-self._updates(variant, seed) // self.config.points)

    def _recipe(self, variant: str, seed: int) -> list[str]:
        recipe, *changes = VARIANTS[variant].split()
        words = ["--data.shards", str(self.config.shards), *shlex.split(self.config.options)]
        if recipe == "mlm":  # sizes that the others have from their teacher
            student = self._resolve("distilbert", seed).student
            for name in ("num_layers", "hidden_size", "num_heads", "ffn_size", "max_positions"):
                changes += [f"--student.{name.replace('_', '-')}", str(getattr(student, name))]
        else:
            changes += ["--teacher.path", str(self.teacher)]
        return [recipe, *words, *changes, "--seed", str(seed)]

    def _resolve(self, variant: str, seed: int) -> Resolved:
        out = self.out / "runs" / f"{variant}-{seed}"
        config = _parse([*self._recipe(variant, seed), "--out", str(out / "checked")])
        return resolve(config, world_size=1, by_torchrun=bool(self.config.launcher))

    def _updates(self, variant: str, seed: int) -> int:
        resolved = self._resolve(variant, seed)
        size = resolved.micro_batches_per_update * resolved.config.batch.token_budget
        return max(1, round(self.config.tokens / size))

    def _step(self, name: str, module: str, *words: object, launcher: str = "") -> None:
        """Run one command of the package unless its log says that it is done. Raises StepFailed."""
        done = self.out / "logs" / f"{name}.log"
        if done.is_file():
            return
        start = shlex.split(launcher) or [sys.executable]
        command = [*start, "-m", f"fastdistil.{module}", *map(str, words)]
        log.info("%s", name)
        part = done.with_suffix(".part")
        device = self.devices.get() if not self.devices.empty() else {}
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(f"$ {shlex.join(command)}\n")
                file.flush()
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | device
                ).returncode
        finally:
            if device:
                self.devices.put(device)
        text = part.read_text(encoding="utf-8", errors="replace")
        stopped = module == "pretrain" and "--resume auto goes on" in text  # by a signal: status 0
        if status or stopped:
            tail = "\n".join(text.splitlines()[-8:])
            raise StepFailed(f"{name} ended with status {status}; {part} ends in\n{tail}\n")
        part.replace(done)

    def write(self) -> None:
        """Gather what was measured in OUT/study.json and make OUT/study.md of it."""
        from fastdistil.evaluation import tables  # SciPy and Matplotlib: a second and a half

        try:
            measured = gather(self.config, self.teacher)
            tables.write(self.out, measured)
        except (ValueError, OSError) as error:
            print(f"error: no tables: {error}", file=sys.stderr)
            return
        print(f"{self.out / 'study.md'}: {measured['complete']}")


def gather(config: StudyConfig, teacher: Path) -> dict[str, Any]:
    """What the steps that are done have measured, as OUT/study.json holds it; study_tables.py reads nothing else."""
    out = config.out
    names = {f"{variant}-{seed}": (variant, seed) for seed in range(1, config.seeds + 1) for variant in config.variants}
    runs = {
        name: {"variant": variant, "seed": seed, **_curves(out / "runs" / name)}
        for name, (variant, seed) in names.items()
        if (out / "logs" / f"pretrain-{name}.log").is_file()
    }
    scores: dict[str, dict[str, float]] = {}
    tasks: dict[str, Any] = {}
    for path in sorted((out / "scores").glob("*.json")):
        if not (out / "logs" / f"evaluate-{path.stem}.log").is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        tasks = {
            task: {k: found[k] for k in ("metrics", "num_train", "num_validation")}
            for task, found in record["tasks"].items()
        }
        scores[path.stem] = {
            task: next(iter(found["seeds"].values()))["score"] for task, found in record["tasks"].items()
        }
    efficiency = out / "efficiency.json"
    wanted = len(names) + config.seeds + len(config.variants) * (config.points - 1)
    measured = {
        "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
        "teacher": str(teacher),
        "tasks": tasks,
        "runs": runs,
        "scores": scores,
        "efficiency": json.loads(efficiency.read_text()) if efficiency.is_file() else None,
        "complete": f"{len(runs)} of {len(names)} pre-trainings, {len(scores)} of {wanted} evaluations",
    }
    (out / "study.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured


def _curves(run: Path) -> dict[str, Any]:
    """Of a run's metrics: tokens and updates in all, and each validation as {"tokens", "update", losses}."""
    tokens, update, validations = 0, 0, []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] == "train":
            tokens, update = tokens + record["tokens"], record["update"]
        else:
            validations.append({k: v for k, v in record.items() if k != "split"} | {"tokens": tokens})
    return {"tokens": tokens, "updates": update, "validations": validations}


def _parse(arguments: list[str]) -> Config:
    """The configuration that fastdistil.pretrain would make of these words; a mistake ends the program as it does there."""
    recipe, *options = arguments
    return tyro.cli(Config, args=options, default=RECIPES[recipe](), prog="--options of fastdistil.pretrain")


def _cores(jobs: int) -> int:
    """Those of one job of several at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def _devices(jobs: int) -> list[dict[str, str]]:
    """For each job that runs at the same time, the environment that gives it its share of the machine."""
    import torch

    num_gpus = torch.cuda.device_count()
    visible = launcher.visible_gpus(num_gpus)
    shares: list[dict[str, str]] = []
    for job in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": visible[job % num_gpus]} if num_gpus else {}
        shares.append({"OMP_NUM_THREADS": str(_cores(jobs))} | gpu)
    return shares if jobs > 1 else [{}]


if __name__ == "__main__":
    sys.exit(main())
