"""A program of stages on a device, such as first_light.py: none hides behind the failure of another.

Stages run in a process of their own, which is ended at a stage's limit or by a broken CUDA context; a fresh one goes on
with the next stage. Those that time something run alone, then the others side by side. Each stage is one short line on
stdout, one JSON line of OUT/stages.jsonl, and then part of OUT/PROGRAM.DEVICE.json, which holds device, versions and
commit as well; logs and curves are packed anew in OUT/logs.tgz. So what was found is in OUT, in few and small files,
whenever the machine is taken away. What is large, runs and models, lies in --scratch.
"""

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._harness import results_file, stamp

ROOT = Path(__file__).resolve().parents[1]
RECORD = "RECORD "
"""Begins the lines by which the process of the stages hands its records over."""
START_S = 60.0
"""For so long a process of the stages may say nothing between two of them, and at its start."""


class Stage(NamedTuple):
    name: str
    work: Callable[[Any], Any]
    limit_s: float
    by_default: bool = True
    beside: str = ""
    """The row of stages that it has its place in, beside other rows; "" for one that runs alone."""
    compares: bool = False
    """What its kernels compute is looked at: they run in a rehearsal too."""


def stage(limit_s: float, **options: Any) -> Callable[[Callable[[Any], Any]], Stage]:
    """Makes a function of the setting a stage, ended after so many seconds; a rehearsal has three times as many."""
    return lambda work: Stage(work.__name__, work, limit_s, **options)


class Setting:
    """Where the stages work, and the clock of their device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.scratch, self.shards, self.glue = args.out, args.scratch, args.shards, args.glue
        self.on_gpu = not args.rehearse
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], object], rounds: int = 20, *, recorded: bool = False) -> float:
        """Median milliseconds of a call, on the device's clock.

        `recorded`: of ten calls in a CUDA graph, where the host is never late; the call must be one that can be.
        """
        for _ in range(3 if self.on_gpu else 1):
            call()
        self.sync()
        if recorded and self.on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(10):
                    call()
            return round(self.ms(graph.replay, rounds) / 10, 4)
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return round(1e3 * (time.perf_counter() - begin), 4)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        self.sync()
        return round(statistics.median(begin.elapsed_time(end) for begin, end in events), 4)


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton's interpreter does nothing inside."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.__getitem__
    InterpretedFunction.__getitem__ = lambda self, grid: lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        InterpretedFunction.__getitem__ = launch  # type: ignore[method-assign]


def work_through(stages: Sequence[Stage], setting: Setting) -> None:
    """The process of the stages: a record on stdout when a stage begins, and one when it ends."""
    handed, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")

    def hand_over(record: dict[str, Any]) -> None:
        print(RECORD + json.dumps(record, default=str), file=handed, flush=True)

    for stage in stages:
        hand_over({"stage": stage.name})
        begin, record = time.monotonic(), {"stage": stage.name, "ok": True}
        try:
            # In the interpreter they would take minutes, so where nobody looks at the results launches do nothing.
            with contextlib.nullcontext() if setting.on_gpu or stage.compares else without_launches():
                record["found"] = stage.work(setting)
            setting.sync()
        except Exception as error:  # a stage may not end the others
            trace = traceback.format_exc()[-3000:].replace(f"{ROOT}{os.sep}", "")
            record |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:600]}", "trace": trace}
        hand_over(record | {"seconds": round(time.monotonic() - begin, 1)})
        if "CUDA error" in record.get("error", ""):
            return  # the context is broken


class Report:
    """Lines and files of what the stages found."""

    def __init__(self, program: str, out: Path, scratch: Path, *, rehearsed: bool) -> None:
        for folder in (out, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.out, self.scratch, self.begin = out, scratch, time.monotonic()
        self.path = results_file(program, out)
        self.whole: dict[str, Any] = stamp() | {"rehearsed": rehearsed, "stages": {}}
        if self.path.is_file():  # stages of before, by --only
            self.whole["stages"] = json.loads(self.path.read_text())["stages"]
        self.failed: list[str] = []
        self.lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        name, ok = record["stage"], record["ok"]
        if not ok:
            self.failed.append(name)
        with (self.out / "stages.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.whole["stages"][name] = record
        self.path.write_text(json.dumps(self.whole, indent=1) + "\n")
        with tarfile.open(self.out / "logs.tgz", "w:gz") as archive:
            for pattern in ("logs/*", "*/metrics.jsonl", "*/*/metrics.jsonl", "*/profile/table.json"):
                for path in sorted(self.scratch.glob(pattern)):
                    archive.add(path, path.relative_to(self.scratch))
        said = json.dumps(record.get("found", record.get("error")))
        passed = time.monotonic() - self.begin
        print(f"[{passed:4.0f} s] {name} {'ok' if ok else 'FAILED'} {record.get('seconds')} s {said[:900]}", flush=True)


def supervise(stages: Sequence[Stage], command: Sequence[str], report: Report, *, patience: float) -> None:
    """Has the stages worked through by processes of a command, as many as it takes, and reports each."""
    left = list(stages)
    while left:
        errors = (report.out / "errors.log").open("ab")
        words = [*command, "--work", ",".join(stage.name for stage in left)]
        # Without a buffer, in which a second line would lie unseen by select.
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, start_new_session=True, bufsize=0
        )
        assert process.stdout is not None
        begun, readable, limit_s = False, [], START_S * patience
        while left:
            readable, _, _ = select.select([process.stdout], [], [], limit_s)
            line = process.stdout.readline().decode() if readable else ""
            if not line:  # it is late, or dead
                break
            record = json.loads(line.removeprefix(RECORD)) if line.startswith(RECORD) else {}
            if "ok" in record:
                report.add(record)
                left.pop(0)
                begun, limit_s = False, START_S * patience
            elif record:
                begun, limit_s = True, left[0].limit_s * patience
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        status = process.wait()
        if left and (begun or not readable or status):
            error = f"no word in {limit_s:.0f} s" if not readable else f"status {status}"
            error = f"the process of the stages ended: {error}, see errors.log"
            report.add({"stage": left.pop(0).name, "ok": False, "error": error})


def main(stages: Sequence[Stage], setting: type[Setting], module: str, about: str | None) -> int:
    """Exit status 1 where a stage failed. `module` is what a process of the stages is started by; its last part names
    the results. `about` is its docstring."""
    known = {stage.name: stage for stage in stages}
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder of runs and models; OUT/work")
    parser.add_argument("--only", help="stages, separated by commas, of: " + " ".join(known))
    parser.add_argument("--shards", type=Path, help="prepared text; else the documentation of installed packages")
    parser.add_argument("--glue", type=Path, help="folder of GLUE, for the stage learn")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on a CPU")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.scratch = (args.scratch or args.out / "work").resolve()
    by_default = ",".join(stage.name for stage in stages if stage.by_default or args.rehearse)
    names = (args.work or args.only or by_default).split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--only wants stages of {' '.join(known)}, got {' '.join(unknown)}")
    asked = [known[name] for name in names]
    if args.work:
        work_through(asked, setting(args))
        return 0
    # Passed on to the processes of the stages, and by these to the commands that they start.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, str(args.out), "--scratch", str(args.scratch)]
    for name, path in (("--shards", args.shards), ("--glue", args.glue)):
        command += [name, str(path.resolve())] if path else []
    command += ["--rehearse"] if args.rehearse else []
    report = Report(module.rpartition(".")[2], args.out, args.scratch, rehearsed=args.rehearse)
    rows: dict[str, list[Stage]] = {"": []}
    for stage in asked:
        rows.setdefault(stage.beside, []).append(stage)
    work = partial(supervise, command=command, report=report, patience=3.0 if args.rehearse else 1.0)
    work(rows.pop(""))
    beside = [threading.Thread(target=work, args=(row,)) for row in rows.values()]
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    print(f"{len(asked) - len(report.failed)} of {len(asked)} stages ok; {report.path}")
    return 1 if report.failed else 0
