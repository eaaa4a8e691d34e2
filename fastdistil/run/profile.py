"""Where a step's time goes: `--profile 10:13` writes RUN/profile/.

    trace.json    Chrome trace of rank 0 (chrome://tracing, Perfetto), with the spans below as rows
    memory.pickle on CUDA, allocations with their stacks for pytorch.org/memory_viz, of the update before the window:
                  to note them takes time that must not be in the table. On a CPU they are in the trace
    table.json    what is logged as a table: milliseconds an update, share, and floor of every part

The parts are the spans that the code is marked with. An update is its own span: validations, checkpoints and lines of
the log are in none. Communication happens inside other parts, and includes the wait for other ranks.

    CPU     Spans are timed by the clock. The time in which a collective runs is taken out of the part around it, so
            that the parts add up to the update.
    CUDA    Spans are timed by events on the stream they are on. A teacher on its side stream and NCCL's kernels overlap
            the rest: they have their own time, what is waited for them is in the part that waits, and the parts may add
            up to more than the update. "other" is what the student's stream spends outside every part.

The floor of a part is what it cannot do without (training/forecast.py). A teacher on ranks of its own is waited for;
its floor is what this device would take instead.
"""

import atexit
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from fastdistil.run import console
from fastdistil.run.files import read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("fastdistil")

Part = Literal[
    "waiting for data", "teacher", "student forward", "loss", "backward", "optimiser", "communication"
]  # fmt: skip
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]
UPDATE = "update"
Item = TypeVar("Item")

_OFF = nullcontext()
_recorder: "_Recorder | None" = None


def is_recording() -> bool:
    """Whether the work of now is timed by its parts."""
    return _recorder is not None


def span(part: Part) -> AbstractContextManager[None]:
    """Marks the work inside as `part` while an update is profiled; otherwise 0.3 microseconds."""
    return _OFF if _recorder is None else _recorder.timed(part)


def spanned(items: Iterable[Item], part: Part) -> Iterator[Item]:
    """`items`, each obtained in a span."""
    iterator, end = iter(items), object()
    while True:
        with span(part):
            item = next(iterator, end)
        if item is end:
            return
        yield item  # type: ignore[misc]


class _Recorder:
    """Begins and ends of spans: seconds on a CPU, events on CUDA, which are read when all is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.home = self._stream()
        self.spans: list[tuple[str, Any, Any, bool]] = []  # name, begin, end, on the home stream

    def _stream(self) -> Any:
        return torch.cuda.current_stream() if self.on_cuda else None

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        with record_function(name):
            begin = self._now()
            yield
            self.spans.append((name, begin, self._now(), self._stream() == self.home))

    @property
    def num_updates(self) -> int:
        return sum(name == UPDATE for name, *_ in self.spans)

    def seconds(self) -> tuple[dict[str, float], float]:
        """(in each kind of span, on the home stream in an update but in none of its parts), all updates together."""
        if self.on_cuda:
            torch.cuda.synchronize()  # once a profile
        sums: dict[str, float] = defaultdict(float)
        other = 0.0
        for name, begin, end, at_home in self.spans:
            seconds = begin.elapsed_time(end) / 1e3 if self.on_cuda else end - begin
            sums[name] += seconds
            other += seconds * at_home * (1 if name == UPDATE else -1)
        return sums, other


@contextmanager
def _said() -> Iterator[None]:
    """What cannot be written inside is said, and no more: the run is worth more than its profile."""
    try:
        yield
    except (OSError, ValueError) as error:
        log.error("profile: going on without it: %s", error)


class Profile:
    """Profiles the updates of `window`, numbered from 0, and writes `folder`.

    Args:
        folder: None on all ranks but the first: they profile nothing.
        floors: makes, at the end, the seconds an update that each part cannot do without.
    """

    def __init__(
        self, window: range, folder: Path | None, device: torch.device, floors: Callable[[], dict[Part, float]]
    ) -> None:
        self.window, self.folder, self.device, self.floors = window, folder, device, floors
        self.on_cuda = device.type == "cuda"
        self.recorder, self.profiler = _Recorder(device), None
        self.has_snapshot = self.closed = False

    @contextmanager
    def update(self, update: int) -> Iterator[None]:
        """Around the work of every update. In the one before the window, which is not timed, the profiler warms up and
        allocations are noted. Where a run has none, from its first update on or resumed inside the window, they are
        not.
        """
        global _recorder
        is_next = update + 1 == self.window.start
        if self.folder is None or not (is_next or update in self.window):
            yield
            return
        if self.profiler is None:
            self.profiler = self._start(warm_up=is_next)
        if is_next:
            with self._memory_history():
                yield
            self.profiler.step()
            return
        _recorder = self.recorder
        try:
            with _recorder.timed(UPDATE):
                yield
        finally:
            _recorder = None
        if update == self.window[-1]:
            self.close()

    def close(self) -> None:
        """Write what there is, also where the run ended inside the window; a second time, nothing."""
        if self.folder is None or not self.window or self.closed:
            return
        self.closed = True
        if self.profiler is not None:
            self.profiler.stop()
        n = self.recorder.num_updates
        if self.profiler is None or not n:
            log.warning("profile: this run made none of the updates to profile: there is no trace and no table")
            return
        with _said():
            self._write(self.folder, self.profiler, n)
        for litter in self.folder.glob("trace.json.*"):  # Kineto's half of a trace, which keeps a full disk full
            os.truncate(litter, 0)  # it has the file open
            litter.unlink()

    def _write(self, folder: Path, profiler: profile, n: int) -> None:
        """Trace and table of `n` updates."""
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))  # which raises nothing on a full disk
        seconds, other = self.recorder.seconds()
        # not by the profiler's own events(), which takes 15 times longer and minutes for a large update
        trace = read_json(folder / "trace.json", fix="the disk may be full")["traceEvents"]
        if self.on_cuda:
            seconds["communication"] = nccl_seconds(trace)
        else:
            collectives = gloo_seconds(trace)
            seconds["communication"] = collectives[UPDATE]
            other -= collectives.pop(UPDATE)
            for part, waited in collectives.items():
                seconds[part] -= waited
                other += waited
        rows = table({k: v / n for k, v in seconds.items()}, other / n, self.floors())
        record = {"updates": n, "seconds_an_update": seconds[UPDATE] / n, "parts": rows}
        write_json(folder / "table.json", record)
        for line in console.lines(drawn(seconds[UPDATE] / n, rows)):
            log.info("profile: %s", line)
        if self.on_cuda:
            log.info("profile: teacher and communication may overlap the rest, on streams of their own")
        memory = "memory.pickle" if self.has_snapshot else "no update before it whose memory could be noted"
        log.info("profile: %s/trace.json, table.json, %s", folder, memory if self.on_cuda else "memory in the trace")

    @contextmanager
    def _memory_history(self) -> Iterator[None]:
        """On CUDA, memory.pickle of the work inside."""
        if not self.on_cuda:
            yield
            return
        assert self.folder is not None
        torch.cuda.memory._record_memory_history(max_entries=200_000)
        try:
            yield
            with _said():
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
                self.has_snapshot = True
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self, *, warm_up: bool) -> profile:
        activities = [ProfilerActivity.CPU]
        if self.on_cuda:
            activities.append(ProfilerActivity.CUDA)

        def action(step: int) -> ProfilerAction:
            return ProfilerAction.WARMUP if step == 0 and warm_up else ProfilerAction.RECORD

        profiler = profile(activities=activities, schedule=action, profile_memory=not self.on_cuda)
        profiler.start()
        atexit.register(self.close)  # a process that an error ends would crash in a running profiler
        return profiler


def gloo_seconds(trace: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds in which at least one of gloo's collectives runs, in the spans of each name.

    From the events of a Chrome trace.
    """
    complete = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in trace if e.get("ph") == "X"]
    running = sorted((begin, end) for name, begin, end in complete if name.startswith("gloo:"))
    begins, ends = np.array(running).reshape(-1, 2).T
    ends = np.maximum.accumulate(ends)
    begins[1:] = np.maximum(begins[1:], ends[:-1])  # of several at once, what is not yet counted
    found: dict[str, float] = defaultdict(float)
    for name, begin, end in complete:
        if name == UPDATE or name in PARTS:
            shared = np.minimum(ends, end) - np.maximum(begins, begin)
            found[name] += float(shared.clip(min=0).sum()) / 1e6
    return found


def nccl_seconds(trace: list[dict[str, Any]]) -> float:
    """Seconds of NCCL's kernels in the events of a Chrome trace."""
    kernels = (e for e in trace if e.get("cat") == "kernel" and e["name"].startswith("nccl"))
    return sum(e["dur"] for e in kernels) / 1e6


def table(seconds: dict[str, float], other: float, floors: dict[Part, float]) -> dict[str, dict[str, float | None]]:
    """{part: {seconds, share, floor}} an update; "other" is what no span covers."""
    rows = {part: seconds[part] for part in PARTS if part in seconds} | {"other": max(0.0, other)}
    return {
        part: {"seconds": s, "share": s / seconds[UPDATE], "floor": floors.get(part)}  # type: ignore[call-overload]
        for part, s in rows.items()
    }


def drawn(total: float, rows: dict[str, dict[str, float | None]]) -> "Table":
    """The table for people."""
    cells: list[tuple[str, ...]] = []
    for part, row in rows.items():
        floor = "-" if row["floor"] is None else f"{1e3 * row['floor']:.1f}"
        cells.append((part, f"{1e3 * (row['seconds'] or 0):.1f}", f"{row['share']:.1%}", floor))
    return console.table(("part", "ms an update", "share", "floor, ms"), [*cells, (UPDATE, f"{1e3 * total:.1f}")])


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by copies of 256 MiB, the best of five."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        recorder = _Recorder(device)
        with recorder.timed(UPDATE):
            target.copy_(source)
        best = min(best, recorder.seconds()[0][UPDATE])
    return 2 * source.numel() * source.itemsize / best
