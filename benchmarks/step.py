"""The whole training step against Hugging Face models with PyTorch losses, in turn, on the same real tokens.

    python -m benchmarks.step                    MiniLM size on a CPU, BERT-base size on a GPU; sequences of one length
    python -m benchmarks.step --shards wiki      the packed micro-batches of prepared text
    python -m benchmarks.step --precision bf16
    python -m benchmarks.step --size modernbert-base --length 8192
    python -m benchmarks.step --kd-rows masked   what it gains that the KL is of the masked rows alone

A round is one update: teacher forward, student forward, loss and backward of every micro-batch, then clipping and
AdamW. What the peers get is in hugging_face.py. Before anything of a provider is timed, it must agree with the first
one on the loss without dropout.

Every provider has a process of its own: ours as the trainer sets one up, a peer's as PyTorch leaves it. They take
turns, round by round, since what else the machine has to do, or the heat of its chip, comes and goes. On a GPU, where
getting ready is what takes the time, they take their turns beside ours in four groups: those that are ready in
seconds; Hugging Face as it is, which holds the logits in fp32 many times over; compiled layer by layer, each kind of
layer once, with the losses; and compiled whole, which gets ready from the beginning on and may take minutes. With
--apart the memory of every one is given back before the next one starts. A provider that fails, ours too, is a line of
the table. With --results they are kept whenever a line is printed. On a CPU the trainer keeps the memory that it frees
(ranks.keep_freed_memory); "memory kept" are the peers if they did the same, which says how much of our lead is the
allocator's. torch.compile may not compile again once the rounds begin; it compiles for any batch and length, as it does
of itself from the second shape on, and its loss without dropout is that of the function that it compiles. MFU counts
real tokens, the teacher's forward included (metrics.py). Peak memory is all that a process holds: of the GPU's memory
what is allocated, on a CPU what is resident, its libraries' included. On a GPU what is sustained, mJ/token and MHz
(NVML) are of some seconds of updates without a pause: at the limit of its power a chip lowers its clock, and a round
among those of slower providers finds it rested.
"""

import argparse
import atexit
import importlib.util
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks._harness import DEVICE, OURS, device_name, device_to_itself, keep, time_call
from benchmarks.hugging_face import HuggingFace
from benchmarks.workload import DTYPES, SIZES, architectures, made_again, make_batches, models
from fastdistil.model.architecture import attended, flops_per_token
from fastdistil.run import recipes
from fastdistil.run.metrics import peak_flops
from fastdistil.run.ranks import init_ranks
from fastdistil.training.engine import PlainEngine
from fastdistil.training.graph import Step
from fastdistil.training.inputs import compile_encoder
from fastdistil.training.objective import SUMS, Objective, means
from fastdistil.training.precision import quantise_encoder, require_fp8
from fastdistil.training.teacher import Teacher, TeacherPrefetcher

Row = dict[str, Any]  # of the table, or {"error": what a provider died of}
PAPER_TOKENS = 13e9
ENERGY_S = 3.0  # NVML's counter moves some ten times a second


class Ours:
    """The trainer's own parts; `compile_mode` is torch.compile's for both encoders, `graph` --engine.graph, `overlap`
    --teacher.overlap, `fp8_teacher` --teacher.precision fp8, `kd_rows` --loss.kd-rows. With `num_workers` that many
    processes make the micro-batches meanwhile."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        compile_mode: str | None = None,
        graph: bool = True,
        overlap: bool = True,
        fp8_teacher: bool = False,
        kd_rows: Literal["all", "masked"] = "all",
        num_workers: int = 0,
    ) -> None:
        config, dtype = recipes.named("distilbert"), DTYPES[args.precision]
        config = replace(config, loss=replace(config.loss, kd_rows=kd_rows))
        # before the first tensor, or no memory comes in large pages
        ranks = init_ranks(DEVICE, timeout_s=config.engine.timeout_s, threads=None)
        self.batches = make_batches(args)
        teacher, student = models(args.size)
        for model in (teacher, student) if compile_mode else ():
            compile_encoder(model.encoder, compile_mode)
        self.teacher = Teacher(teacher, device=ranks.device, dtype=dtype)
        if fp8_teacher:
            require_fp8(ranks.device)
            quantise_encoder(self.teacher.model.encoder)
        self.engine = PlainEngine(Objective(student, config.loss).train(), config, ranks, dtype)
        self.loss, self.device = config.loss, ranks.device
        self.num_tokens = sum(b.num_tokens for b in self.batches)
        self.counts = [int(n) for n in self.batches[0].denominators.tolist()]
        self.padding = 1 - self.num_tokens / sum(len(b.input_ids) for b in self.batches)
        if DEVICE == "cuda":
            self.batches = [b.pin_memory() for b in self.batches]
        again = made_again(args, num_workers) if num_workers else itertools.cycle(self.batches)
        if DEVICE == "cuda" and graph and not compile_mode:
            step = Step(self.engine, self.teacher, overlap=overlap)
            self.pairs, self.forward_backward = step.ahead(again), step.forward_backward
        else:
            prefetcher = TeacherPrefetcher(self.teacher, ranks.device, overlap=overlap)
            self.pairs, self.forward_backward = prefetcher.ahead(again), self.engine.forward_backward

    def evaluate(self) -> float:
        sums = torch.zeros(len(SUMS), device=self.device)
        for b in self.batches:
            here = b.to(self.device)
            sums += self.engine.evaluate(here, self.teacher(here))
        return means(sums.tolist(), self.counts, self.loss)["loss"]

    def run(self) -> None:
        for batch, output in itertools.islice(self.pairs, len(self.batches)):
            self.forward_backward(batch, output)
        self.engine.step(1e-5)


FP8, LIGER = f"{OURS}, FP8 teacher", "HF + Liger"
EAGER, COMPILED = "HF eager", "HF torch.compile"
BY_LAYER = f"{COMPILED} by layer"
MASKED = ", masked rows"
MEMORY_KEPT = (f"{EAGER}, memory kept", "HF compiled, memory kept")
PROVIDERS: dict[str, Callable[..., Any]] = {
    OURS: Ours,
    f"{OURS}, 2 data workers": partial(Ours, num_workers=2),
    f"{OURS}, compiled": partial(Ours, compile_mode="default"),
    f"{OURS}, launch by launch": partial(Ours, graph=False),
    FP8: partial(Ours, fp8_teacher=True),
    EAGER: HuggingFace,
    COMPILED: partial(HuggingFace, compiled="whole"),
    BY_LAYER: partial(HuggingFace, compiled="by layer"),
    MEMORY_KEPT[0]: partial(HuggingFace, keep_memory=True),
    MEMORY_KEPT[1]: partial(HuggingFace, compiled="whole", keep_memory=True),
    LIGER: partial(HuggingFace, liger=True),
    OURS + MASKED: partial(Ours, kd_rows="masked"),
    EAGER + MASKED: partial(HuggingFace, restrict_ce_to_mask=True),
}
ON_CPU = (OURS, f"{OURS}, 2 data workers", f"{OURS}, compiled", EAGER, COMPILED, *MEMORY_KEPT)
ON_GPU = (OURS, f"{OURS}, launch by launch", FP8, LIGER, EAGER, BY_LAYER, COMPILED)
"""What is worth a GPU's minutes: the step, what its graph and FP8 are worth, and the ways to do without us."""
OF_MASKED = (OURS, OURS + MASKED, EAGER + MASKED)


def serve(connection: Connection, name: str, args: argparse.Namespace) -> None:
    """A provider's process: what it starts with, then a round's seconds or joules as often as it is asked."""
    try:
        provider = PROVIDERS[name](args)
        loss = provider.evaluate()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # it took whole logits in fp32, and others get ready beside this one
        provider.run()  # compiles, allocates the moments
        commands = {"seconds": time_call, "energy": energy}
        with torch.compiler.set_stance("fail_on_recompile"):
            connection.send((loss, provider.padding, peak_mib(provider.run)))
            while True:
                connection.send(commands[connection.recv()](provider.run))
    except EOFError:
        pass  # no more questions
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error)[:200]}")


def peak_mib(call: Callable[[], object]) -> float | None:
    """MiB that this process has held at its peak, on the GPU, or resident during a call; None where nobody counts.

    On a GPU since its start: the memory of a CUDA graph counts while it is recorded, not while it is replayed.
    """
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    call()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) / 2**10 if peak else None


class Energy(NamedTuple):
    """Of one call among others without a pause, how long it took then, and the GPU's clock."""

    joules: float
    seconds: float
    mhz: float


def energy(call: Callable[[], object]) -> Energy | None:
    """By NVML, from as many calls as fill some seconds; None where nobody counts."""
    if DEVICE != "cuda" or not importlib.util.find_spec("pynvml"):
        return None
    import pynvml  # pyright: ignore[reportMissingImports]

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        before, begin, clocks = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.monotonic(), []
        while time.monotonic() - begin < ENERGY_S:
            time_call(call)  # which waits for the GPU
            clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        seconds = time.monotonic() - begin
        used = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
        return Energy(used / len(clocks), seconds / len(clocks), statistics.median(clocks))
    except pynvml.NVMLError as error:  # a driver or a share of a GPU that does not count it
        print(f"no energy: {error}", flush=True)
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--size", choices=SIZES, default="bert-base" if on_gpu else "minilm")
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 1024)
    parser.add_argument("--length", type=int, default=512 if on_gpu else 128)
    parser.add_argument("--shards", type=Path, help="prepared text, instead of sequences of one length")
    parser.add_argument(
        "--batches", type=int, help="micro-batches a round; more of them give the peers less padding to sort out"
    )
    parser.add_argument("--kd-rows", choices=("all", "masked"), default="all", help="masked: both, in turn")
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 5)
    parser.add_argument(
        "--only", nargs="+", help="providers to run, of all there are, or parts of their names; keeps no results"
    )
    parser.add_argument("--apart", action="store_true", help="no two providers at once, on a GPU")
    parser.add_argument(
        "--limit-s", type=float, default=360 if on_gpu else 900, help="a provider may take for an answer"
    )
    parser.add_argument("--results", type=Path, help="put the results into this folder; without it they are printed")
    args = parser.parse_args()
    args.batches = args.batches or (4 if on_gpu or args.shards else 1)
    return args


class Process:
    """A provider's process that waits for questions, once it is `ready`."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.limit_s = args.limit_s
        self.loss: float | None = None  # until it is ready
        self.connection, there = context.Pipe()
        # not a daemon, which may have no data workers: its connection's end ends it
        self.process: BaseProcess = context.Process(target=serve, args=(there, name, args))
        atexit.register(self.close)
        if name.startswith(OURS):  # as for every command of ours; peers wait as OpenMP does by itself
            os.environ["OMP_WAIT_POLICY"] = "passive"
        self.process.start()
        os.environ.pop("OMP_WAIT_POLICY", None)
        there.close()

    def ready(self) -> "Process":
        """Raises RuntimeError with what the provider died of."""
        if self.loss is None:
            self.loss, self.padding, self.peak_mib = self._answer()
        return self

    def ask(self, command: str) -> Any:
        """Raises RuntimeError with what the provider died of."""
        self.connection.send(command)
        return self._answer()

    def _answer(self) -> Any:
        answer: Any = f"no answer in {self.limit_s:.0f} s"
        if self.connection.poll(self.limit_s):
            try:
                answer = self.connection.recv()
            except EOFError:
                answer = "the process ended without a word"
        if isinstance(answer, str):
            self.close()
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """Give its memory back."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


class Measured(NamedTuple):
    """What providers that took turns have shown."""

    processes: dict[str, Process]
    seconds: dict[str, list[float]]
    energy: dict[str, Energy | None]
    failed: dict[str, dict[str, Any]]


def measure(
    names: Sequence[str], begun: dict[str, Process], args: argparse.Namespace, losses: dict[str, float]
) -> Measured:
    """Providers that take turns, round by round; each must agree with the first of `losses`, to which theirs are added.

    One that fails, at whatever it is asked, is left out from then on, and of those that have `begun`.
    """
    found = Measured({}, {}, {}, {})

    def tried(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:
            found.failed[name] = {"error": str(error)}
            begun.pop(name).close()
            found.processes.pop(name, None)

    new = [name for name in names if name not in losses]
    for name in names:  # on a CPU one after the other: compiling takes both time and cores
        begun[name] = begun.get(name) or Process(name, args)
        if process := tried(name, begun[name].ready):
            found.processes[name], losses[name] = process, process.loss
            tried(name, partial(require_agreement, name, losses, args.precision))
    with device_to_itself():
        for _ in range(args.rounds):
            for name, process in tuple(found.processes.items()):
                time.sleep(0.05)  # idle threads of another process spin: not in this one's time
                if seconds := tried(name, partial(process.ask, "seconds")):
                    found.seconds.setdefault(name, []).append(seconds)
        for name in found.processes.keys() & set(new):
            found.energy[name] = tried(name, partial(found.processes[name].ask, "energy"))
    return found


def in_groups(names: Sequence[str]) -> list[list[str]]:
    """Who takes turns with whom: all of them, on a GPU ours with those that are ready soon, and with each other one."""
    late = [name for name in names if DEVICE == "cuda" and name.startswith((EAGER, COMPILED))]
    first = [name for name in names if name not in late]
    return [*filter(None, [first]), *([*({OURS} & set(first)), name] for name in late)]


def require_agreement(name: str, losses: dict[str, float], precision: str) -> None:
    """Raises RuntimeError where a provider's loss without dropout is not the first's of its rows but for rounding."""
    same = {other: loss for other, loss in losses.items() if other.endswith(MASKED) == name.endswith(MASKED)}
    first, reference = next(iter(same.items()))
    tolerance = 5e-3 if precision == "bf16" else 1e-5
    if name == FP8:  # another teacher in the last digits: what precision.py bounds
        tolerance *= 10
    if not abs(losses[name] / reference - 1) < tolerance:
        raise RuntimeError(f"loss {losses[name]:.6f} without dropout, {first} has {reference:.6f}: not timed")


def row_of(name: str, found: Measured, ours: list[float] | None, *, num_tokens: int, flops: float, ceiling: Any) -> Row:
    """A provider's line of the table."""
    seconds, energy = found.seconds[name], found.energy[name]
    speed = num_tokens / statistics.median(seconds)
    # The ratio of a round to ours of the same round: what a machine with other work to do disturbs least.
    ratios = [x / y for x, y in zip(seconds, ours or (), strict=False)]
    return {
        "tokens_per_s": speed,
        "mfu": speed * flops / ceiling if ceiling else None,
        "times_ours": statistics.median(ratios) if ratios else None,
        "padding": found.processes[name].padding,
        "peak_mib": found.processes[name].peak_mib,
        "sustained": None if energy is None else num_tokens / energy.seconds,
        "mj_per_token": None if energy is None else 1e3 * energy.joules / num_tokens,
        "mhz": None if energy is None else energy.mhz,
        "hours_for_13e9_tokens": PAPER_TOKENS / speed / 3600,
        "seconds": seconds,
    }


COLUMNS = (  # title, key, width, format
    ("tokens/s", "tokens_per_s", 10, ",.0f"),
    ("MFU", "mfu", 7, ".1%"),
    ("x ours", "times_ours", 8, ".2f"),
    ("padding", "padding", 9, ".1%"),
    ("peak MiB", "peak_mib", 10, ".0f"),
    ("sustained", "sustained", 11, ",.0f"),
    ("mJ/token", "mj_per_token", 10, ".3f"),
    ("MHz", "mhz", 6, ".0f"),
    ("hours for 13 B", "hours_for_13e9_tokens", 16, ",.1f"),
)


def line_of(name: str, row: Row) -> str:
    """A row as it is printed; an empty cell for what nobody counts."""
    if "error" in row:
        return f"{name:<26}{row['error']}"
    cells = (("" if row[key] is None else f"{row[key]:{form}}").rjust(width) for _, key, width, form in COLUMNS)
    return f"{name:<26}" + "".join(cells)


def main() -> int:
    """Exit status 1 where our own step could not be measured, or a provider had another loss."""
    args = arguments()
    batches = make_batches(args)
    num_tokens = sum(b.num_tokens for b in batches)
    lengths = np.concatenate([b.real_lengths for b in batches])
    share = sum(b.num_masked for b in batches) / num_tokens
    all_rows, masked = (
        flops_per_token(*architectures(args.size), partial(attended, lengths), head_fraction=f).total
        for f in (1.0, share)
    )
    del batches
    ceiling, source = peak_flops(torch.device(DEVICE), DTYPES[args.precision])
    text = "packed text" if args.shards else f"sequences of {args.length}"
    what = f"{args.size} {args.precision}, {args.batches} x {args.tokens:,} tokens, {text}"
    of_masked = args.kd_rows == "masked"
    if of_masked:
        what += ", all and masked rows"
        print(
            f"FLOPs a token: {all_rows / 1e6:,.1f} M of all rows, {all_rows / masked:.2f} x those of masked rows alone"
        )
    print(
        f"{what}; {device_name()}; MFU of {all_rows / 1e6:,.1f} MFLOP a token "
        f"against {(ceiling or 0) / 1e9:,.0f} GFLOP/s ({source})"
    )
    names = OF_MASKED if of_masked else ON_GPU if DEVICE == "cuda" else ON_CPU
    if args.only:
        names = [n for n in PROVIDERS if any(n == asked for asked in args.only)]
        names = names or [n for n in PROVIDERS if any(asked in n for asked in args.only)]
    print(" " * 26 + "".join(title.rjust(width) for title, _, width, _ in COLUMNS), flush=True)
    rows: dict[str, Row] = {}
    losses: dict[str, float] = {}
    ours = None
    groups = [[name] for name in names] if args.apart else in_groups(names)
    early = [name for name in names if DEVICE == "cuda" and not args.apart and not name.startswith(EAGER)]
    begun = {name: Process(name, args) for name in early}
    for number, group in enumerate(groups):
        found = measure(group, begun, args, losses)
        ours = found.seconds.get(OURS, ours)
        for name in group:
            if name in rows:  # ours, measured again beside others
                continue
            flops = masked if name.endswith(MASKED) else all_rows
            given = {"num_tokens": num_tokens, "flops": flops, "ceiling": ceiling}
            rows[name] = found.failed.get(name) or row_of(name, found, ours, **given)
            print(line_of(name, rows[name]), flush=True)
        for name in set(group).difference(*groups[number + 1 :]) & set(begun):
            begun.pop(name).close()
        if args.results and not args.only:
            record = {"providers": rows, "peak_flops": ceiling, "flops_per_token": {"all": all_rows, "masked": masked}}
            keep("step", what, record, folder=args.results)
    print("loss without dropout:", ", ".join(f"{k} {v:.6f}" for k, v in losses.items()))
    disagree = any("without dropout" in row.get("error", "") for row in rows.values())
    return int(disagree or "error" in rows.get(OURS, {}))


if __name__ == "__main__":
    sys.exit(main())
