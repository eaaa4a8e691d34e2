"""The stages of first_light.py that run commands: the program's own, its tests and its benchmarks."""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks._harness import device_to_itself
from benchmarks.stages import ROOT, Setting, stage


class Commands:
    """The program's own commands on a small run of the scratch folder; what they say goes to its logs."""

    def __init__(self, s: Setting) -> None:
        self.work, self.logs = s.scratch, s.scratch / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.environment.pop("TRITON_INTERPRET", None)
        self.shards = s.shards or self.work / "shards"
        self.teacher = self.work / "teacher"
        self.s = s
        self.width, self.num_heads = (768, 12) if s.on_gpu else (48, 3)  # of the teacher

    def start(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        log = (self.logs / f"{name}.log").open("wb")
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=ROOT)

    def run(self, name: str, *words: object) -> str:
        """What a command's log ends with. Raises RuntimeError with it, if that is a failure."""
        status = self.start(name, *words).wait()
        last = self.text(name).strip().splitlines()[-1:]
        if status:
            raise RuntimeError(f"{name}: status {status}, {' '.join(last)[:300]}")
        return " ".join(last)[:200]

    def text(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def prepare(self) -> None:
        """Text, if none is given, and a teacher of random weights whose distribution is not flat; once, for all rows of
        stages."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._prepare()

    def _prepare(self) -> None:
        from benchmarks import docstrings
        from benchmarks.workload import architecture
        from fastdistil.data.shards import read_meta
        from fastdistil.export import write_hugging_face_folder
        from fastdistil.model.masked_lm import MaskedLM

        if self.s.shards is None and not (self.shards / "meta.json").is_file():
            docstrings.write(self.work / "docs.jsonl")
            lines = (self.work / "docs.jsonl").read_text().splitlines(keepends=True)
            (self.work / "text.jsonl").write_text("".join(lines[: 10**6 if self.s.on_gpu else 400]))
            length, vocabulary = (512, "train:30522") if self.s.on_gpu else (64, "train:500")
            words = ("--tokenizer", vocabulary, "--max-length", length, "--out", self.shards)
            self.run("prepare", "fastdistil.prepare", self.work / "text.jsonl", *words)
        if not self.teacher.is_dir():
            meta, sizes = read_meta(self.shards), architecture("bert", 12 if self.s.on_gpu else 2, self.width)
            pad = meta.special_ids["pad"]
            sizes = replace(sizes, vocab_size=meta.vocab_size, pad_id=pad, num_heads=self.num_heads)
            model = MaskedLM(sizes, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                model.head.weight.mul_(4.0)
            self.teacher.mkdir()
            write_hugging_face_folder(model.state_dict(), sizes, self.shards / "tokenizer", self.teacher)

    def pretrain(self, out: str, updates: int, *, recipe: str = "distilbert") -> list[object]:
        budget = 16384 if self.s.on_gpu else 256
        words = f"--batch.token-budget {budget} --batch.size {4 * budget} --batch.unit tokens --optim.unit updates "
        words += f"--optim.duration {updates} --log.every 2 --log.checkpoint-every 12 --log.validate-every 1000 "
        words += "--data.validation-sequences 64 --teacher.check warn --teacher.max-drift 1"
        places = ("--data.shards", self.shards, "--teacher.path", self.teacher, "--out", self.work / out)
        return ["fastdistil.pretrain", recipe, *places, *words.split()]

    def update(self, name: str, number: int) -> str:
        """What a log says of an update."""
        lines = [line for line in self.text(name).splitlines() if f" update {number}/" in line]
        return lines[0].partition(" ")[2] if lines else ""


def told(text: str) -> list[str]:
    """Lines of a log that say what only a device can."""
    words = (
        *("CUDA graph", "launch by launch", "predicted", "measured", "overlap", "attention:", "profile:", "drift"),
        "WARNING",
    )
    return [line[:160] for line in text.splitlines() if any(word in line for word in words)][:24]


@stage(130, beside="program")
def program(s: Setting) -> Any:
    """Twelve updates or some more, SIGTERM, resumed with a profile; bit for bit a run in one go; exported, and loaded
    by transformers."""
    import transformers
    from safetensors.torch import load_file

    commands = Commands(s)
    commands.prepare()
    twin = commands.start("twin", *commands.pretrain("twin", 48))
    words = commands.pretrain("run", 48)
    first = commands.start("run", *words)
    while first.poll() is None and "update 12/" not in commands.text("run"):
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    status = first.wait()
    if status != 75:
        raise RuntimeError(f"status {status}, wanted 75: {commands.text('run')[-300:]}")
    commands.run("resumed", *words, "--resume", "auto", "--profile", "40:42")
    if twin.wait():
        raise RuntimeError(f"the run in one go: status {twin.returncode}, {commands.text('twin')[-300:]}")
    students = [commands.work / f"{name}-student" for name in ("run", "twin")]
    words = [("fastdistil.export", commands.work / name, "--overwrite", "--out") for name in ("run", "twin")]
    exports = [commands.start(path.name, *w, path) for w, path in zip(words, students, strict=True)]
    if any([export.wait() for export in exports]):
        raise RuntimeError(f"export: {commands.text(students[0].name)[-300:]}")
    weights = [load_file(path / "model.safetensors") for path in students]
    _, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        students[0], output_loading_info=True, trust_remote_code=False
    )
    return {
        "resumed differs from the run in one go by": {
            name: float((x - weights[1][name]).abs().max())
            for name, x in weights[0].items()
            if not torch.equal(x, weights[1][name])
        },
        "transformers misses or does not know": [*loading["missing_keys"], *loading["unexpected_keys"]],
        "updates": [commands.update("run", 2), commands.update("run", 12), commands.update("resumed", 48)],
        "first": told(commands.text("run")),
        "log": told(commands.text("resumed")),
    }


@stage(90, beside="others")
def embed(s: Setting) -> Any:
    """Twelve updates of an embedding student, and of the terms that nothing else here computes."""
    commands = Commands(s)
    commands.prepare()
    found = {}
    relations = "--loss.queries 1 --loss.keys 1 --loss.values 1 --loss.similarity 1 --loss.relation-heads"
    for name, terms in (("embed", ""), ("relations", f"{relations} {commands.num_heads}")):
        words = [*commands.pretrain(name, 12, recipe="embed"), "--teacher.pooling", "mean", *terms.split()]
        commands.run(name, *words)
        found[name] = {"last update": commands.update(name, 12), "log": told(commands.text(name))}
    return found


@stage(90, beside="others")
def zero(s: Setting) -> Any:
    """Three updates of ZeRO 1 and 3 under torchrun, one rank: NCCL, which the default of several GPUs needs."""
    commands = Commands(s)
    commands.prepare()
    found, failed = {}, False
    for number in (1, 3):
        torchrun = ("torch.distributed.run", "--nproc-per-node", "1", "-m")
        words = [*commands.pretrain(f"zero{number}", 3), "--engine.zero-stage", number]
        try:
            commands.run(f"zero{number}", *torchrun, *words)
            found[number] = commands.update(f"zero{number}", 3)
        except RuntimeError as error:
            found[number], failed = str(error)[:300], True
    if failed:
        raise RuntimeError(json.dumps(found))
    return found


TESTS = (
    *("distill", "linear_distill", "cosine", "dropout", "attention", "layernorm", "gelu", "linear", "fp8_rows"),
    *("geglu", "rope", "mixture", "backend"),
)
TESTS_S = 150
"""After which the tests are ended, before their stage is."""


@stage(170, beside="tests")
def tests(s: Setting) -> Any:
    """The tests that a GPU runs as well, side by side where pytest-xdist is installed; logs/tests.log, failures.log."""
    commands = Commands(s)
    paths = [f"tests/kernels/test_{name}.py" for name in TESTS]
    paths += [
        f"tests/{name}.py" for name in ("model/test_functions", "training/test_objective", "training/test_teacher")
    ]
    beside = ["-n", "12", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    words = "-v --timeout 120 --timeout-method thread -p no:cacheprovider -p no:benchmark --tb=short -m"
    options = [*words.split(), "(triton or gpu) and not soak"]
    if not s.on_gpu:
        paths, beside = paths[-3:-2], []
        options += ["-k", "flat"]
    failures = commands.logs / "failures.log"
    failures.unlink(missing_ok=True)
    # Each worker's Inductor would start a process for every core.
    commands.environment |= {"FAILURES": str(failures), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = commands.start("tests", "pytest", *paths, *beside, *options)
    try:
        status: object = process.wait(TESTS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it sums up
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        status = f"cut off after {TESTS_S} s"
    # A broken CUDA context fails all that comes after it in its worker: the first of each worker says most.
    failed = [line[:200] for line in failures.read_text().splitlines()][:30] if failures.exists() else []
    found = {"status": status, "summary": commands.text("tests").splitlines()[-1:], "failed": failed}
    if status:
        raise RuntimeError(json.dumps(found))
    return found


LEARN = "--batch.size 16384 --batch.unit tokens --optim.unit updates --optim.lr 1e-3 --data.validation-sequences 1024 "
LEARN += "--masking.fraction 0.3 --masking.smoothing 0 --student.dropout 0 --student.attention-dropout 0 "
LEARN += "--log.every 100 --log.validate-every 1000 --log.checkpoint-every 100000"
FROM_NOTHING = "mlm --student.family modernbert --student.init random --student.num-layers 6 --student.hidden-size 384 "
FROM_NOTHING += "--student.num-heads 6 --student.ffn-size 576"
UPDATES = (4000, 1500)
"""Of a teacher and of its students, each of 16,384 tokens: a BERT needs many times as many to leave the frequencies of
words (docs/study.md)."""


@stage(420, by_default=False, beside="learn")
def learn(s: Setting) -> Any:
    """A small ModernBERT that learns from nothing, half of its layers by distillation, and these without a teacher.

    With --glue also fine-tuned on STS-B. Their report: OUT/report.html. Beside peers its commands wait until these have
    timed what they are at.
    """
    commands = Commands(s)
    commands.prepare()
    teacher, student = UPDATES if s.on_gpu else (6, 4)
    common = [*LEARN.split(), "--data.shards", commands.shards]
    if not s.on_gpu:
        common += ["--batch.size", "512", "--batch.token-budget", "256", "--data.validation-sequences", "64"]
    place = {name: commands.work / f"learn-{name}" for name in ("teacher", "student", "twin")}
    twin = "--student.layers 0 2 5 --optim.encoder-lr 1e-3"
    recipes = {
        "teacher": [*FROM_NOTHING.split(), "--optim.duration", teacher],
        "student": ["modernbert", "--teacher.path", place["teacher"] / "model", "--optim.duration", student],
        "twin": ["mlm", "--student.init", place["teacher"] / "model", *twin.split(), "--optim.duration", student],
    }
    for name, recipe in recipes.items():
        with device_to_itself(shared=True):
            commands.run(f"learn-{name}", "fastdistil.pretrain", *recipe, *common, "--out", place[name] / "run")
        commands.run(f"export-{name}", "fastdistil.export", place[name] / "run", "--out", place[name] / "model")
    commands.run("report", "fastdistil.report", *(p / "run" for p in place.values()), "--out", s.out / "report.html")
    found = {name: commands.text(f"learn-{name}").splitlines()[-8:] for name in place}
    if s.glue:
        words = ("--task", "stsb", "--data", s.glue / "stsb", "--seeds", 2, *(() if s.on_gpu else ("--dry-run",)))
        with device_to_itself(shared=True):
            scores = [commands.start(f"stsb-{n}", "fastdistil.evaluate", p / "model", *words) for n, p in place.items()]
            for process in scores:
                process.wait()
        for name in place:
            found[name] += commands.text(f"stsb-{name}").splitlines()[-3:]
    return found


@stage(480, by_default=False, beside="peers")
def peers(s: Setting) -> Any:
    """The whole step beside Hugging Face's (benchmarks/step.py), on prepared text if there is; keeps its results."""
    commands = Commands(s)
    size = "--tokens 16384 --batches 4" if s.on_gpu else "--size toy --tokens 256 --length 64"
    shards = ["--shards", s.shards] if s.shards and s.on_gpu else []
    words = [*size.split(), *shards, "--limit-s", 450, "--results", s.out]
    words += [] if s.on_gpu else ["--only", "fastdistil, launch"]
    commands.environment["PYTHONWARNINGS"] = "ignore"  # torch.compile's, among the table's lines
    commands.run("peers", "benchmarks.step", *words)
    return commands.text("peers").splitlines()[1:11]


@stage(210, by_default=False)
def bench(s: Setting) -> Any:
    """Operators beside their floors and their peers (benchmarks/bench_*.py); their results go to the logs."""
    if not s.on_gpu:
        return []  # on a CPU `make bench` keeps them
    commands = Commands(s)
    commands.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    chosen = "not float32 and (not attention or wikipedia-64 or 512-64)"
    words = ["-q", "-s", "--tb=short", "-p", "no:cacheprovider", "-k", chosen, "--results", commands.logs]
    names = ("distill", "layernorm", "attention", "gelu", "geglu", "rope", "cosine", "dropout", "mixture")
    failed = []
    # Side by side, since compiling the peers is what takes the time; to be timed they wait for each other. Both heads
    # with their loss want the memory of all the others.
    for beside in (("linear_distill",), names):
        begun = {n: commands.start(f"bench-{n}", "pytest", f"benchmarks/bench_{n}.py", *words) for n in beside}
        failed += [name for name, process in begun.items() if process.wait()]
    commands.start("table", "benchmarks._harness", commands.logs).wait()
    if failed:
        raise RuntimeError(json.dumps({name: commands.text(f"bench-{name}")[-200:] for name in failed}))
    return commands.text("table").splitlines()
