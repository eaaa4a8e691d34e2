"""How the benchmarks of operators check and time: ours and its peers, in turn, with the same inputs.

Every provider has the arguments of the public function. First its value and gradients are compared with the definition
in fp64 (`Judge`), then all that are right take turns, round by round: nothing else runs between a round of ours and a
round of a peer, so a machine that slows down slows all of them. Medians are reported, with an interval.

A benchmark is a command (`_cli.benchmark`), and the same cases are pytest-benchmark tests (`_cli.compare`), whose own
statistics are of ours alone. `python -m benchmarks._harness [FOLDER]` prints one short table of the results that are
kept for this device.
"""

import contextlib
import inspect
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._options import Case
from fastdistil.run.command import Failed

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "fastdistil"


def device_name(device: str = DEVICE) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def stamp(device: str = DEVICE) -> dict[str, str]:
    """What a result depends on besides the code: device, versions, commit."""
    from fastdistil.kernels._backend import CPU_BACKEND

    # A copy of the tree on a GPU machine is without its history, or has an older one: it is told its commit (carry.sh).
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(device),
        "cpu_backend": CPU_BACKEND,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": os.environ.get("FASTDISTIL_COMMIT") or git.stdout.strip() or "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def results_file(benchmark: str, folder: Path = RESULTS, device: str = DEVICE) -> Path:
    """Where results of this device are kept: step.h100.json, step.cpu.json."""
    words = re.findall(r"[a-z0-9]+", device_name(device).lower())
    model = next((word for word in words if re.search(r"\d", word)), words[-1])
    return folder / f"{benchmark}.{model if device == 'cuda' else 'cpu'}.json"


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call, on the device's clock."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_mib(call: Callable[[], object], device: str) -> dict[str, float]:
    """{"peak_mib": MiB of device memory that a call takes at its peak, over what was allocated before}; {} on a CPU."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


class Provider(NamedTuple):
    """One way to compute what a benchmark is about."""

    title: str
    """Under which its results are kept."""
    call: Callable[..., Any]
    """A function with the arguments of the public one."""
    unchecked: str = ""
    """Why its results are not compared with the definition's, in a word or two."""
    is_bare: bool = False
    """`call` takes no arguments, and makes the gradients itself. Such a one is unchecked."""


@dataclass(kw_only=True, slots=True)
class Problem:
    """Inputs of one size, and who computes what from them. Of the values that come back the first is looked at, or as
    many as have a gradient."""

    arguments: Sequence[Any] = ()
    """Of the public function."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the public function, by name."""
    trained: Sequence[int] = ()
    """Which arguments get gradients; none for the forward alone."""
    dout: Tensor | tuple[Tensor | None, ...] | None = None
    """Gradient of the result, or of each of several. None: the result is a loss."""
    definition: Callable[..., Any] | None = None
    """In fp64 for fp64 arguments. None where all providers are unchecked."""
    plain: Callable[..., Any] | None = None
    """What a PyTorch user would write, every step in the dtype of the input, by whose error others are judged. None:
    the definition."""
    rowwise: Sequence[int] = ()
    """Arguments of whose rows those of the result, or the addends of the loss, are made one by one, so that the
    definition may be taken in parts. None: as a whole."""
    providers: Mapping[str, Provider]
    """By the name for --providers."""
    baseline: str = "eager"
    """The provider that speed-ups are over."""
    num_bytes: float
    """The least that any implementation must move."""
    num_flops: float
    """The least that any implementation must compute."""
    floor: Callable[[], object]
    """The plainest call that moves as many bytes, or computes as many FLOP, on this machine."""
    budget_s: float = 5.0
    """So long rounds go on, where nobody says how many."""

    def results(self, function: Callable[..., Any]) -> list[Tensor]:
        """What `function` makes of the arguments, and the gradient of every argument that gets one."""
        out, douts = function(*self.arguments, **self.options), self.douts
        outs = [out] if isinstance(out, Tensor) else [*out[: len(douts)]]
        if not self.trained:
            return outs
        return [*outs, *torch.autograd.grad(outs, [self.arguments[i] for i in self.trained], douts)]

    @property
    def douts(self) -> list[Tensor | None]:
        """One for each value that is looked at."""
        return [*self.dout] if isinstance(self.dout, tuple) else [self.dout]


def pytorch_and_ours(ours: Callable[..., Any], eager: Callable[..., Any], unchecked: str = "") -> dict[str, Provider]:
    """Ours beside what a PyTorch user would write, as it is and compiled. `unchecked`: why it cannot be compared."""
    # A graph for each size, as somebody has it who trains with one: not one of all sizes, which is slower.
    compiled = torch.compile(eager, dynamic=False)
    return {
        "ours": Provider(OURS, ours),
        "eager": Provider("eager PyTorch", eager, unchecked),
        "compile": Provider("torch.compile", compiled, unchecked),
    }


def copy_of(num_bytes: float, device: str) -> Callable[[], object]:
    """A copy that reads and writes `num_bytes` in all."""
    source = torch.randn(int(num_bytes) // 8, device=device)
    return partial(torch.empty_like(source).copy_, source)


SLACK = 4.0
"""So many times PyTorch's own error is right. The tests of the operators ask for more."""
LEAST = 8 * 2.0**-24
"""Of the largest number, by which two right ways of summing thousands of numbers may differ."""
PART = 1024
"""Rows that the definition takes at a time."""


class Wrong(Exception):
    """Says in which way results are not those of the definition."""


class Judge:
    """Holds results against the definition in fp64: its value and gradients, and what PyTorch errs by."""

    def __init__(self, problem: Problem) -> None:
        assert problem.definition is not None
        self.problem = problem
        self.num_values = len(problem.douts)
        self.names = [
            *(["the value"] if self.num_values == 1 else [f"value {i + 1}" for i in range(self.num_values)]),
            *(f"the gradient of {list(inspect.signature(problem.definition).parameters)[i]}" for i in problem.trained),
        ]
        self.truth = self._truth(problem.definition)
        plain = problem.results(problem.plain or problem.definition)
        self.dtypes = [x.dtype for x in plain]
        self.sizes = [x.abs().max().item() for x in self.truth]
        self.allowed = [
            SLACK * _distance(x, exact) + max(LEAST, torch.finfo(x.dtype).eps) * size
            for x, exact, size in zip(plain, self.truth, self.sizes, strict=True)
        ]

    def _truth(self, definition: Callable[..., Any]) -> list[Tensor]:
        given, trained, rowwise = self.problem.arguments, self.problem.trained, self.problem.rowwise
        num_rows = len(given[0])
        parts = []
        for begin in range(0, num_rows, PART if rowwise else num_rows):
            rows = slice(begin, begin + PART if rowwise else num_rows)
            arguments = [_double(x[rows] if i in rowwise else x) for i, x in enumerate(given)]
            for i in trained:
                arguments[i].requires_grad_()
            dout = tuple(None if x is None else _double(x[rows]) for x in self.problem.douts)
            part = Problem(
                arguments=arguments, options=self.problem.options, trained=trained, dout=dout, providers={},
                num_bytes=0, num_flops=0, floor=bool,
            )  # fmt: skip
            parts.append([x.detach() for x in part.results(definition)])
        are_rows = [*(x.ndim > 0 for x in parts[0][: self.num_values]), *(i in rowwise for i in trained)]
        return [
            torch.cat(several) if of_rows else torch.stack(several).sum(0)
            for several, of_rows in zip(zip(*parts, strict=True), are_rows, strict=True)
        ]

    def errors(self, function: Callable[..., Any]) -> dict[str, float]:
        """Largest errors, of the value and of all gradients, as shares of the largest number. Raises Wrong."""
        tensors = [x for x in self.problem.arguments if isinstance(x, Tensor)]
        before = [x.detach().clone() for x in tensors]
        results = self.problem.results(function)
        wrong, shares = [], []
        for name, got, exact, dtype, size, allowed in zip(
            self.names, results, self.truth, self.dtypes, self.sizes, self.allowed, strict=True
        ):
            if got.shape != exact.shape or got.dtype != dtype:
                wanted = f"{tuple(exact.shape)} {str(dtype).removeprefix('torch.')}"
                raise Wrong(f"{name} is {tuple(got.shape)} {str(got.dtype).removeprefix('torch.')}, wanted {wanted}")
            distance = _distance(got, exact)
            shares.append(distance / (size or 1.0))
            if not distance <= allowed:  # NaN is not
                wrong.append(f"{name} is off by {distance:.1e}, allowed {allowed:.1e} (its largest number: {size:.1e})")
        for tensor, was in zip(tensors, before, strict=True):
            if not torch.equal(tensor, was):
                wrong.append("it writes over its arguments")
                with torch.no_grad():
                    tensor.copy_(was)
        if wrong:
            raise Wrong("; ".join(wrong))
        found, n = {"error_value": max(shares[: self.num_values])}, self.num_values
        return found | ({"error_gradient": max(shares[n:])} if self.problem.trained else {})


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _distance(got: Tensor, exact: Tensor) -> float:
    """The largest difference; NaN if one is."""
    return (got.detach().double() - exact).abs().max().item() if exact.numel() else 0.0


class Flush:
    """Empties the L2 cache of a GPU, and keeps it busy while the host gets the next call ready.

    So what is timed is the call with its inputs in memory, as it finds them in a step, and nothing of the host's time.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.room = torch.empty(max(2**28, 2 * torch.cuda.get_device_properties(0).L2_cache_size), dtype=torch.int8)
        self.room = self.room.to("cuda")
        fill_s = statistics.median(time_call(self.room.zero_) for _ in range(5))
        # A call that waits for the GPU itself would never be ready before.
        self.times = min(50, 1 + math.ceil(max(map(self._host_s, calls)) / fill_s))

    def __call__(self) -> None:
        for _ in range(self.times):
            self.room.zero_()

    @staticmethod
    def _host_s(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


def _round_on_gpu(calls: Sequence[Callable[[], object]], flush: Callable[[], None]) -> list[float]:
    """Seconds of every call on the device's clock; the host waits only at the end, so that it is never late."""
    events = []
    for call in calls:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _round_on_cpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    seconds = []
    for call in calls:
        # PyTorch and Inductor keep a thread pool each, whose idle threads spin: not in the next one's time.
        time.sleep(0.02)
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


@contextlib.contextmanager
def device_to_itself(*, shared: bool = False) -> Iterator[None]:
    """On a GPU a user's benchmarks wait for each other here: what one times, no other one that is timed disturbs.

    `shared`: with others that time nothing either.
    """
    if DEVICE != "cuda" or sys.platform == "win32":
        yield
        return
    import fcntl

    with open(Path(tempfile.gettempdir()) / f"fastdistil-benchmarks-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: str, *, rounds: int | None, budget_s: float
) -> dict[str, list[float]]:
    """Seconds of every call, taken in turn `rounds` times; without a number 5 to 100 times, while `budget_s` lasts."""
    every = list(calls.values())
    if rounds == 0:
        return {}
    with device_to_itself():
        one = partial(_round_on_gpu, every, Flush(every)) if device == "cuda" else partial(_round_on_cpu, every)
        one()  # caches, clocks
        deadline, found = time.perf_counter() + budget_s, []
        while len(found) < (rounds or 5) or (rounds is None and time.perf_counter() < deadline and len(found) < 100):
            found.append(one())
    return dict(zip(calls, map(list, zip(*found, strict=True)), strict=True))


def interval(seconds: Sequence[float]) -> tuple[float, float]:
    """Between which the median lies with 95 %, whatever the distribution: order statistics. Of fewer than 6, all."""
    ordered, n = sorted(seconds), len(seconds)
    half = 0.98 * math.sqrt(n)
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]


@dataclass(kw_only=True, slots=True)
class Ready:
    """A case whose providers have been checked and warmed up."""

    case: Case
    device: str
    problem: Problem
    calls: dict[str, Callable[[], object]]
    """By title, those to be timed; the floor last."""
    rows: dict[str, dict[str, Any]]
    """By title; {"error": why} of one that fails, {"wrong": in which way} of one that is."""
    titles: dict[str, str]
    """Of the providers by name."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """A case that has been timed."""

    case: str
    sizes: dict[str, Any]
    num_bytes: float
    num_flops: float
    device: str
    baseline: str
    """Title of the provider that speed-ups are over."""
    rows: dict[str, dict[str, Any]]
    """By title: median_ms and its interval, min_ms, rates, speedup, errors; `seconds` of each round."""
    titles: dict[str, str]
    """Of the providers by name."""

    def as_json(self, *, rounds: bool = False) -> dict[str, Any]:
        """What is kept of it; with `rounds` also each round's seconds."""
        rows = {k: {n: x for n, x in row.items() if rounds or n != "seconds"} for k, row in self.rows.items()}
        return {"bytes": self.num_bytes, "flops": self.num_flops, "providers": rows}

    def failures(self, names: Sequence[str]) -> list[str]:
        """Those of these providers that failed or are wrong."""
        rows = {name: self.rows[self.titles[name]] for name in names if name in self.titles}
        return [name for name, row in rows.items() if row.keys() & {"wrong", "error"}]


def prepare(
    case: Case,
    device: str,
    wanted: Sequence[str] = (),
    also: Mapping[str, Callable[..., Any]] | None = None,
    time_wrong: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Ready:
    """Make a case's inputs, and check and warm up its providers: those that are `wanted`, and `also` these functions.

    One that fails or is wrong is a row of its own, and does not keep the others. ValueError where there is none of
    those that are wanted, or `also` has nothing to be compared with.
    """
    torch.compiler.reset()  # else the second size gets a graph of any size
    torch.manual_seed(0)
    problem = case.build(device=device, **case.sizes)
    if also and problem.definition is None:
        raise ValueError(f"--also is for public functions, which {case.name} is not: leave it or that option out")
    chosen = {k: p for k, p in problem.providers.items() if not wanted or k in wanted or k.split("-")[0] in wanted}
    if not chosen:
        raise ValueError(
            f"--providers {','.join(wanted)}: not on this machine, or not for {case.name}, which has "
            f"{','.join(problem.providers)}"
        )
    chosen |= {spec: Provider(spec, call) for spec, call in (also or {}).items()}
    say("the definition in fp64")
    judge = Judge(problem) if problem.definition is not None else None
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for title, call, unchecked, is_bare in chosen.values():
        say(title)
        row = rows[title] = {"unchecked": unchecked} if unchecked else {}
        run = call if is_bare else partial(problem.results, call)
        try:
            if judge is not None and not unchecked:
                row |= judge.errors(call)
            run()
            row |= peak_mib(run, device)
            calls[title] = run
        except Wrong as error:
            row["wrong"] = str(error)
            if time_wrong:
                calls[title] = run
        except Exception as error:
            row["error"] = _said(error)
            if "CUDA error" in str(error):
                raise Failed(f"{case.name}: after {title} nothing can use the GPU in this process: {error}") from error
    problem.floor()
    rows["floor"] = peak_mib(problem.floor, device)
    titles = {name: provider.title for name, provider in chosen.items()}
    calls["floor"] = problem.floor
    return Ready(case=case, device=device, problem=problem, calls=calls, rows=rows, titles=titles)


def _said(error: Exception) -> str:
    """The first line of an error, and where in the file of a kernel it was raised."""
    first = (str(error).splitlines() or [""])[0][:200]
    if "active drivers" in first:
        first += " Triton finds no GPU: TRITON_INTERPRET=1 before the command runs its kernels on this CPU, slowly"
    here = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != here]
    frames = [f for f in frames if "site-packages" not in f.filename]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{place}"


def measure(ready: Ready, rounds: int | None = None) -> Measured:
    """Time what is ready."""
    problem, rows = ready.problem, ready.rows
    times = in_turn(ready.calls, ready.device, rounds=rounds, budget_s=problem.budget_s)
    baseline = problem.providers[problem.baseline].title
    for title, seconds in times.items():
        median, (low, high) = statistics.median(seconds), interval(seconds)
        rows[title] |= {
            "median_ms": median * 1e3,
            "low_ms": low * 1e3,
            "high_ms": high * 1e3,
            "min_ms": min(seconds) * 1e3,
            "max_ms": max(seconds) * 1e3,
            "mean_ms": statistics.fmean(seconds) * 1e3,
            "std_ms": statistics.stdev(seconds) * 1e3 if len(seconds) > 1 else 0.0,
            "rounds": len(seconds),
            "gb_per_s": problem.num_bytes / median / 1e9,
            "gflop_per_s": problem.num_flops / median / 1e9,
            "seconds": seconds,
        }
        # Of the same round each: what a machine with other work to do disturbs least.
        if OURS in times:
            rows[title]["times_ours"] = _ratio(seconds, times[OURS])
        if baseline in times:
            rows[title]["speedup"] = _ratio(times[baseline], seconds)
    return Measured(
        case=ready.case.name, sizes=ready.case.sizes, num_bytes=problem.num_bytes, num_flops=problem.num_flops,
        device=ready.device, baseline=baseline, rows=rows, titles=ready.titles,
    )  # fmt: skip


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(seconds, others, strict=True))


def keep(name: str, case: str, record: dict[str, Any], *, folder: Path, device: str = DEVICE) -> None:
    """Put a case among the benchmark's results of this device, with what it depends on."""
    path = results_file(name, folder, device)
    folder.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[case] = stamp(device) | record
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main(folder: Path = RESULTS) -> None:
    """One line for each case kept for this device: ours, the floor and the best peer."""
    print(f"{device_name()}, torch {torch.__version__}")
    print(f"{'case':<58}{'ours ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'floor':>7}  best peer")
    for path in sorted(folder.glob(results_file("*").name)):
        for case, kept in json.loads(path.read_text()).items():
            found = kept.get("providers", {}) if isinstance(kept, dict) else {}
            rows = {k: row for k, row in found.items() if "median_ms" in row}
            if OURS not in rows:
                continue  # step, data and first_light print tables of their own
            ours, floor = rows[OURS], rows.get("floor")
            peers = {k: v for k, v in rows.items() if k != "floor" and not k.startswith(OURS)}
            best = min(peers, key=lambda k: peers[k]["median_ms"], default=None)
            ratio = f"{1 / floor['times_ours']:.2f}x" if floor else ""
            peer = f"{best} {peers[best]['times_ours']:.2f} x ours" if best else ""
            print(
                f"{path.name.split('.')[0] + ': ' + case:<58}{ours['median_ms']:>9.3f}{ours['gb_per_s']:>8.0f}"
                f"{ours['gflop_per_s'] / 1e3:>9.2f}{ratio:>7}  {peer}"
            )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
