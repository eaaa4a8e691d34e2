"""A whole micro-batch (teacher, student, loss, backward) as one CUDA graph: the host's work is one replay.

About 300 launches a micro-batch take the host milliseconds, in which a GPU that is done with the last one waits. What
changes from one micro-batch to the next lies in tensors: ids, layout, denominators, the dropout seed. So the launches
are recorded once for the shapes of these tensors, which are the same for all micro-batches of a run but for about one
in 10^9 (data/batches.py), and replayed on buffers that the next micro-batch is copied into.

    side stream        teacher ----------+
    main stream        student's forward +-- loss -- backward          both inside the graph

Gradients are added to the engine's flat buffer, which an update clears; nothing else is left behind, so that running,
recording and replaying give the same numbers. Overlapping the teacher with the student's forward is timed against one
after the other, and what is faster stays.

Where a step cannot be recorded, `reason` says why, and it runs as it is. So does every step on a CPU, and one that
--profile looks into, because a graph has no parts that could be timed.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels.attention_backends import capturable, resolve_backend, seed_generator
from fastdistil.run.profile import is_recording, spanned
from fastdistil.training.engine import Engine, PlainEngine
from fastdistil.training.objective import TeacherOutput
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import RemoteTeacher, Teacher

log = logging.getLogger("fastdistil")

WARM_UP = 3
"""Micro-batches before recording: kernels are compiled, libraries choose their algorithms."""
TIMED = 5
"""Replays of each variant, whose median decides."""


def reason(engine: Engine, teacher: Teacher | RemoteTeacher | None, resolved: Resolved) -> str | None:
    """Why a step of this run is not recorded; None where it is."""
    config = resolved.config
    backend = resolve_backend(
        config.engine.attention,
        engine.ranks.device,
        dropout_p=resolved.student.attention_dropout,
        training=True,
        dtype=resolved.dtype(engine.ranks.device),
        window=resolved.student.widest_window,
    )
    reasons = {
        "--engine.graph is off": not config.engine.graph,
        f"{engine.description} has hooks of its own (--engine.zero-stage 0 has none)": not isinstance(
            engine, PlainEngine
        ),
        "--engine.compile makes graphs of its own": config.engine.compile,
        "relations (--loss.queries, keys, values) depend on the lengths of the sequences": any(
            term.wants == "qkv" for term in config.loss.terms
        ),
        "the teacher is on another device": isinstance(teacher, RemoteTeacher) or config.teacher.device == "second",
        capturable(backend) or "": capturable(backend) is not None,
    }
    return next((why for why, applies in reasons.items() if applies), None)


def recorded(engine: Engine, teacher: Teacher | RemoteTeacher | None, resolved: Resolved) -> "Step | None":
    """What runs the micro-batches of a run on CUDA; None, with a word in the log, where they run launch by launch."""
    if engine.ranks.device.type != "cuda":
        return None
    why = reason(engine, teacher, resolved)
    if why is not None:
        log.info("the step runs launch by launch, not as a CUDA graph: %s", why)
        return None
    assert isinstance(engine, PlainEngine)
    assert not isinstance(teacher, RemoteTeacher)
    return Step(engine, teacher, overlap=resolved.config.teacher.overlap)


class Step:
    """Forward and backward of micro-batches with the teacher inside, recorded for each of their shapes.

    Args:
        overlap: let the teacher and the student's forward run at once, where that is faster.
    """

    def __init__(self, engine: PlainEngine, teacher: Teacher | None, *, overlap: bool) -> None:
        self.engine, self.teacher, self.overlap = engine, teacher, overlap and teacher is not None
        self.device = engine.ranks.device
        self.side = torch.cuda.Stream(self.device)
        self.recorded: dict[tuple[torch.Size, ...], Recorded] = {}
        self.failed = False

    def ahead(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, None]]:
        """As TeacherPrefetcher.ahead: the micro-batches stay on the host, and the teacher's output is made inside."""
        return ((batch, None) for batch in spanned(batches, "waiting for data"))

    def forward_backward(self, batch: MicroBatch, _: object) -> Tensor:
        """As PlainEngine.forward_backward, for a micro-batch on the host.

        What it returns is overwritten by the next call.
        """
        seed_generator(self.device, batch.generator_seed)
        if self.failed or is_recording():
            return self.run(batch.to(self.device), overlap=False)
        shapes = tuple(x.shape for x in batch.tensors())
        if shapes not in self.recorded:
            try:
                self.recorded[shapes] = Recorded(self, batch)
            except RuntimeError as error:
                self.failed = True
                log.warning("the step could not be recorded as a CUDA graph and runs launch by launch: %s", error)
                return self.run(batch.to(self.device), overlap=False)
        sums = self.recorded[shapes].replay(batch)
        self.engine.forward_ended = time.perf_counter()
        return sums

    def run(self, batch: MicroBatch, *, overlap: bool) -> Tensor:
        """Launch by launch, for a micro-batch on the device."""
        if self.teacher is None:
            return self.engine.forward_backward(batch, None)
        if not overlap:
            return self.engine.forward_backward(batch, self.teacher(batch))
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            output = self.teacher(batch)

        def answer() -> TeacherOutput:
            main.wait_stream(self.side)
            return output

        return self.engine.forward_backward(batch, answer)


class Recorded:
    """The graph of micro-batches of one shape, and the buffers that it reads."""

    def __init__(self, step: Step, batch: MicroBatch) -> None:
        self.batch = copy.deepcopy(batch.to(step.device))  # no tensor of the caller
        self.buffers = [*self.batch.tensors()]
        gradient = step.engine.flat.gradient
        before = gradient.clone()  # what this micro-batch has to be added to, once
        ways = [False, True] if step.overlap else [False]
        variants: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        try:
            warm_up(lambda: [step.run(self.batch, overlap=way) for way in ways], step.device)
            for way in ways:  # they share their memory: they are never replayed at once
                pool = variants[0][0].pool() if variants else None
                variants.append(capture(partial(step.run, self.batch, overlap=way), pool))
            times = [milliseconds(graph) for graph, _ in variants]
        finally:
            gradient.copy_(before)
        self.graph, self.sums = variants[times.index(min(times))]
        how = "teacher, then student" if step.teacher else "no teacher"
        if step.overlap:
            how = f"teacher beside the student's forward {times[1]:.2f} ms, before it {times[0]:.2f} ms"
        log.info(f"the step is one CUDA graph for {len(self.batch.input_ids):,} tokens, {min(times):.2f} ms: {how}")

    def replay(self, batch: MicroBatch) -> Tensor:
        """The sums of another micro-batch of this shape, whose gradient is added."""
        torch._foreach_copy_(self.buffers, [*batch.tensors()], non_blocking=True)  # type: ignore[attr-defined]
        self.graph.replay()
        return self.sums


def warm_up(work: Callable[[], object], device: torch.device) -> None:
    """Run `work` some times, on a stream of its own, as recording wants it."""
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    main.wait_stream(stream)


def capture(work: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of what `work` launches, and the tensor that it returns, which every replay writes anew."""
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: the one that pins micro-batches goes on meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of a replay, on the device; a sync."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()  # once a shape
    return median(begin.elapsed_time(end) for begin, end in events)
