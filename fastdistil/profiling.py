"""Where a step's time goes: `--profile 10:13` writes RUN/profile/.

    trace.json    Chrome trace of rank 0 (chrome://tracing, Perfetto), with the spans below as rows
    memory.pickle on CUDA, allocations with their stacks for pytorch.org/memory_viz; on a CPU they are in the trace
    table.json    what is logged as a table: milliseconds an update, share, and floor of every part

The parts are the spans that the code is marked with. A span is timed by the clock on a CPU and by events on its own stream on
CUDA, so that a teacher on its side stream has its own time and the parts add up to more than the update takes. Communication
happens inside the backward and the optimiser: its time, that of the collectives the profiler saw, is taken out of theirs.

Floors: matrix products at the peak that MFU is measured against (architecture.flops_per_token; student forward : backward = 1 : 2,
and the loss has both heads, forward and gradient); the optimiser's 32 bytes a parameter, or its share of one, at the speed of a
copy measured here: AdamW reads weight, gradient and moments and writes all but the gradient, clipping reads the gradient.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from fastdistil.architecture import Architecture, flops_per_token

log = logging.getLogger("fastdistil")

Part = Literal[
    "waiting for data", "teacher", "student forward", "loss", "backward", "optimiser", "communication"
]  # fmt: skip
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]
COLLECTIVES = ("gloo:", "nccl:")  # what PyTorch's process groups call their work in a profile
BYTES_A_PARAMETER = 32
Item = TypeVar("Item")

_recorder: "_Recorder | None" = None


@contextmanager
def span(part: Part) -> Iterator[None]:
    """Marks the work inside as `part` while an update is profiled; otherwise half a microsecond."""
    if _recorder is None:
        yield
        return
    with record_function(part), _recorder.timed(part):
        yield


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
        self.spans: list[tuple[Part, Any, Any]] = []
        self.begin, self.num_updates = self._synchronised(), 0

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronised(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()  # twice in a profile
        return time.perf_counter()

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        begin = self._now()
        yield
        self.spans.append((part, begin, self._now()))

    def seconds(self) -> tuple[float, dict[str, float]]:
        """(an update, each part of it)."""
        total = self._synchronised() - self.begin
        sums: dict[str, float] = defaultdict(float)
        for part, begin, end in self.spans:
            sums[part] += begin.elapsed_time(end) / 1e3 if self.on_cuda else end - begin
        return total / self.num_updates, {k: v / self.num_updates for k, v in sums.items()}


class Profile:
    """Profiles the updates of `window`, numbered from 0, and writes `folder`.

    Args:
        folder: None on all ranks but the first: they profile nothing.
        floors: makes, at the end, the seconds an update that each part cannot do without.
    """

    def __init__(
        self,
        window: range,
        folder: Path | None,
        device: torch.device,
        floors: Callable[[], dict[Part, float]],
    ) -> None:
        self.window, self.folder, self.device, self.floors = window, folder, device, floors
        self.profiler: profile | None = None

    def begin_update(self, update: int) -> None:
        """Before every update. The profiler itself warms up in the one before the window."""
        global _recorder
        if self.folder is None or not self.window:
            return
        if self.profiler is None and update in (self.window.start - 1, self.window.start):
            self.profiler = self._start(warm_up=update < self.window.start)
        if self.profiler is not None and update in self.window and _recorder is None:
            _recorder = _Recorder(self.device)

    def end_update(self) -> None:
        """After every update; writes after the last one of the window."""
        if _recorder is not None:
            _recorder.num_updates += 1
            if _recorder.num_updates == len(self.window):
                self.close()
        elif self.profiler is not None:
            self.profiler.step()

    def close(self) -> None:
        """Write what there is; also where the run ended inside the window."""
        global _recorder
        recorder, _recorder = _recorder, None
        profiler, self.profiler = self.profiler, None
        if recorder is None or profiler is None or not recorder.num_updates:
            return
        assert self.folder is not None
        total, parts = recorder.seconds()
        profiler.stop()
        communication, inside = _collectives(profiler)
        for part, seconds in inside.items():
            parts[part] -= seconds / recorder.num_updates
        parts["communication"] = communication / recorder.num_updates
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        memory = "memory in the trace"
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            memory = "memory.pickle"
        rows = table(total, parts, self.floors())
        record = {"updates": recorder.num_updates, "seconds_an_update": total, "parts": rows}
        (self.folder / "table.json").write_text(json.dumps(record, indent=1))
        for line in lines(total, rows):
            log.info("%s", line)
        log.info("profile: %s/trace.json, table.json, %s", self.folder, memory)

    def _start(self, *, warm_up: bool) -> profile:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)

        def action(step: int) -> ProfilerAction:
            return ProfilerAction.WARMUP if step == 0 and warm_up else ProfilerAction.RECORD

        profiler = profile(
            activities=activities, schedule=action, profile_memory=self.device.type != "cuda"
        )
        profiler.start()
        return profiler


def _collectives(profiler: profile) -> tuple[float, dict[str, float]]:
    """Seconds of (all collectives, those begun inside each part)."""
    events = profiler.events() or []
    spans = [e for e in events if e.name in PARTS and e.device_type.name == "CPU"]
    total, inside = 0.0, defaultdict(float)
    for event in events:
        if not event.name.startswith(COLLECTIVES):
            continue
        seconds = (event.device_time_total or event.time_range.elapsed_us()) / 1e6
        total += seconds
        for outer in spans:
            if outer.time_range.start <= event.time_range.start <= outer.time_range.end:
                inside[outer.name] += seconds
                break
    return total, inside


def table(
    total: float, parts: dict[str, float], floors: dict[Part, float]
) -> dict[str, dict[str, float | None]]:
    """{part: {seconds, share, floor}} an update; "other" is what no span covers."""
    rows = {part: parts[part] for part in PARTS if part in parts}
    rows["other"] = max(0.0, total - sum(rows.values()))
    return {
        part: {"seconds": s, "share": s / total, "floor": floors.get(part)}  # type: ignore[call-overload]
        for part, s in rows.items()
    }


def lines(total: float, rows: dict[str, dict[str, float | None]]) -> Iterator[str]:
    """The table for people."""
    yield f"profile: {'part':<18}{'ms an update':>13}{'share':>8}{'floor, ms':>11}"
    for part, row in rows.items():
        floor = "-" if row["floor"] is None else f"{1e3 * row['floor']:.1f}"
        yield f"profile: {part:<18}{1e3 * (row['seconds'] or 0):>13.1f}{row['share']:>8.1%}{floor:>11}"
    yield f"profile: {'update':<18}{1e3 * total:>13.1f}"


def floors(
    teacher: Architecture | None,
    student: Architecture,
    mean_attended_length: float,
    *,
    head_fraction: float,
    num_tokens: float,
    num_stepped: int,
    peak: float | None,
    device: torch.device,
) -> dict[Part, float]:
    """Seconds an update on one device, for its `num_tokens` real tokens and the `num_stepped` parameters its optimiser moves.

    Parts that nobody knows a floor of are left out: communication, and all products where `peak` FLOP/s is None.
    """
    found: dict[Part, float] = {
        "waiting for data": 0.0,
        "optimiser": BYTES_A_PARAMETER * num_stepped / _copy_bytes_per_s(device),
    }
    if peak is None:
        return found
    with_heads, without = (
        flops_per_token(teacher, student, mean_attended_length, head_fraction=fraction)
        for fraction in (head_fraction, 0.0)
    )
    flops: dict[Part, float] = {
        "teacher": without.teacher,
        "student forward": without.student / 3,
        "loss": with_heads.total - without.total,
        "backward": without.student * 2 / 3,
    }
    for part, f in flops.items():
        found[part] = f * num_tokens / peak
    return found


def _copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by copies of 256 MiB, the best of five."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        recorder = _Recorder(device)
        target.copy_(source)
        best = min(best, recorder._synchronised() - recorder.begin)
    return 2 * source.numel() * source.itemsize / best
