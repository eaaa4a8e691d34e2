"""What a run reports: metrics.jsonl (a line an update), its trackers, a progress line.

MFU = real tokens/s x FLOPs a token (teacher forward, student forward and backward; architecture.flops_per_token) / peak
FLOP/s of all devices. Padding does not count as work.
"""

import contextlib
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from fastdistil.run.config import LOSS_TERMS
from fastdistil.run.console import clock
from fastdistil.run.files import read_json_lines, sync, write_text
from fastdistil.run.ranks import Ranks

log = logging.getLogger("fastdistil")

COUNTS = ("tokens", "masked", "sequences")
"""What a record calls what of its update is counted (config.COUNTED)."""
UNITS = {"kd": " nats", "mlm": " nats", "queries": " nats", "keys": " nats", "values": " nats"}
SHARES = ("agreement", "masked_agreement", "accuracy")
"""Means that are no losses: the part of the tokens for which the student's first guess is right."""
SPIKE = 10.0
"""Times the median of the last gradient norms: more is worth a look."""
# Dense bf16 FLOP/s without sparsity, from the makers' data sheets.
_PEAK_BF16 = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """(FLOP/s that MFU is measured against, where the figure comes from); (None, reason) where nobody knows.

    A GPU's is its data sheet's for dense bf16. A CPU's is what a matrix product of 1024 reaches now, the best of five.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key in sorted(_PEAK_BF16, key=len, reverse=True):
            if key in name:
                return _PEAK_BF16[key], f"{name}, dense bf16, data sheet"
        return None, f"no peak known for {name}"
    a = torch.randn(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - begin)
    return (
        2 * 1024**3 / min(times),
        f"matrix product of 1024 in {str(dtype).removeprefix('torch.')} on {torch.get_num_threads()} threads",
    )


class Tracker(Protocol):
    """Where a run is watched beside its folder (training/trackers.py)."""

    def put(self, record: dict[str, Any] | str) -> None:
        """Take a line of metrics.jsonl, or at the end what became of the run; returns at once."""

    def close(self) -> None:
        """Wait until it has everything, not for ever."""


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl and hands them to trackers. Rank 0 only.

    Args:
        go_on: where they cannot be written, say so, keep the lines and try again at the next flush; otherwise OSError.
    """

    def __init__(self, run: Path, *, resumed_at: int, trackers: Sequence[Tracker], go_on: bool) -> None:
        self.path, self.trackers, self.go_on = run / "metrics.jsonl", trackers, go_on
        _drop_after(self.path, resumed_at)
        self.lines = b""

    def write(self, record: dict[str, Any]) -> None:
        """One line; numbers go to the trackers under split/name at step `update`."""
        line = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}  # fmt: skip
        self.lines += json.dumps(line).encode() + b"\n"  # JSON knows no NaN
        for tracker in self.trackers:
            tracker.put(record)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        try:
            with self.path.open("ab", buffering=0) as file:  # opened anew: the folder may have been removed
                while self.lines:
                    self.lines = self.lines[file.write(self.lines) :]  # less than all just before a disk is full
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk says no name
            if not self.go_on and not isinstance(error, FileNotFoundError):  # the loop makes a removed folder anew
                raise
            log.error("going on without writing metrics: %s", error)

    def close(self, state: str) -> None:
        """Flush and sync; trackers hear what became of the run."""
        self.flush()
        with contextlib.suppress(OSError):  # said by flush
            sync(self.path)
        for tracker in self.trackers:
            tracker.put(state)
        for tracker in self.trackers:
            tracker.close()


def _drop_after(path: Path, update: int) -> None:
    """Forget lines of updates after the checkpoint that the run goes on from, and a half-written last one."""
    if path.is_file():
        found = [line for line in read_json_lines(path) if isinstance(line.get("update"), int)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in found if line["update"] <= update))


class Journal:
    """The record of a run. Loss sums are gathered on the device; `flush`, once every --log.every, is the one host sync.

    Every rank must call `flush` equally often; rank 0 writes.

    Args:
        writer: None on the other ranks.
        to_means: turns summed losses and the counts of an update (config.COUNTED) into reported losses
            (objective.means).
        flops: of one token.
        peak: FLOP/s of all devices together, None if unknown.
        num_updates: of the whole run, for the time that is left.
        num_skipped: updates skipped before a restart, see `num_skipped` below.
        seconds: of training before a restart, validations and checkpoints not counted.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        ranks: Ranks,
        *,
        num_sums: int,
        to_means: Callable[[list[float], Sequence[int]], dict[str, float]],
        flops: float,
        peak: float | None,
        num_updates: int,
        num_skipped: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.writer, self.ranks = writer, ranks
        self.to_means, self.num_updates = to_means, num_updates
        self.flops, self.peak = flops, peak
        # In fp64 sums of fp32 numbers are exact: the order of micro-batches, ranks and flushes leaves no trace.
        self.sums = torch.zeros(num_sums, device=ranks.device, dtype=torch.float64)
        self.open: list[tuple[dict[str, Any], Tensor, Tensor]] = []  # record, sums, gradient norm
        self.num_skipped = num_skipped  # updates whose gradient was not finite: they changed nothing
        self.skipped_in_a_row = 0  # as of the last flush
        self.longest_skip = (0, 0)  # so many in a row at most, and the last of them
        self.recent: deque[float] = deque(maxlen=100)  # gradient norms
        self.seconds = seconds  # of training, as of the last flush
        self.begin = time.perf_counter()

    def add(self, sums: Tensor) -> None:
        """Add the loss sums of one micro-batch to the open update; no sync."""
        self.sums += sums

    def close_update(self, record: dict[str, Any], gradient_norm: Tensor) -> None:
        """End an update: what was added belongs to it. `record` needs "update" and its counts; no sync."""
        self.open.append((record | self.now(), self.sums, gradient_norm))
        self.sums = torch.zeros_like(self.sums)

    def now(self) -> dict[str, Any]:
        """When it is, and how many seconds of training there were so far; on CUDA by the host, which is ahead."""
        seconds = self.seconds + time.perf_counter() - self.begin
        return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "seconds": seconds}

    def restart_clock(self) -> None:
        """What happened since the last flush (a validation, a checkpoint) is not training time."""
        self.begin = time.perf_counter()

    def flush(self) -> None:
        """Sum over the ranks, bring to the host, write a line an update and a progress line."""
        if not self.open:
            return
        records, sums, norms = zip(*self.open, strict=True)
        self.open = []
        totals = self.ranks.sum(torch.stack(sums)).tolist()  # the sync
        values = torch.stack([n.float() for n in norms]).tolist()  # the same one
        seconds = max(1e-9, time.perf_counter() - self.begin)
        self.seconds += seconds
        records[-1]["seconds"] = self.seconds  # after the sync
        num_tokens = sum(r["tokens"] for r in records)
        speed = {"tokens_per_s": num_tokens / seconds}
        if self.peak:
            speed["mfu"] = speed["tokens_per_s"] * self.flops / self.peak
        speed["memory_gib"] = memory_bytes(self.ranks.device) / 2**30
        last: dict[str, Any] = {}
        for record, total, norm in zip(records, totals, values, strict=True):
            losses = self.to_means(total, [record[name] for name in COUNTS])
            last = record | losses | {"gradient_norm": norm} | speed
            if not math.isfinite(norm):
                last["skipped"] = True
            self._write(last)
            self._judge(record["update"], norm)
        if self.writer is not None:
            figures, left = progress_line(last), (self.num_updates - last["update"]) * seconds / len(records)
            line = "update %d/%d  %s  %s left"
            log.info(line, last["update"], self.num_updates, figures, clock(left), extra={"live": figures})
            self.writer.flush()
        self.restart_clock()

    def _judge(self, update: int, norm: float) -> None:
        """Count what was skipped, flag what is out of the ordinary."""
        if not math.isfinite(norm):
            self.num_skipped += 1
            self.skipped_in_a_row += 1
            self.longest_skip = max(self.longest_skip, (self.skipped_in_a_row, update))
            log.warning("update %d skipped: its gradient is not finite (%d so far)", update, self.num_skipped)
            return
        self.skipped_in_a_row = 0
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        if norm > SPIKE * usual:
            times = f"{norm / usual:.0f} times the median of the last {len(self.recent)}"
            log.warning("update %d: gradient norm %.3g, %s", update, norm, times)
        self.recent.append(norm)

    def validation(self, record: dict[str, Any]) -> None:
        """Write the losses of a validation."""
        when = self.now() | {"seconds": self.seconds}
        self._write(record | when)
        log.info("%s after update %d  %s", record["split"], record["update"], _losses(record))

    def _write(self, record: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(record)

    def close(self, state: str = "finished") -> None:
        """Write what is open and close the files; `state` is what became of the run."""
        self.flush()
        if self.writer is not None:
            self.writer.close(state)


def memory_bytes(device: torch.device) -> int:
    """The most that PyTorch has had of a GPU's memory; of a CPU's what this process has now. No sync."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def progress_line(record: dict[str, Any]) -> str:
    """The figures of an update for a person: how well and how fast it goes, and the memory it takes."""
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    speed = f"{record['tokens_per_s']:,.0f} tokens/s{mfu}"
    return f"{_losses(record)}  {speed}  {record['memory_gib']:.2f} GiB"


def _losses(record: dict[str, Any]) -> str:
    """What the sum of the loss is made of, in nats where it is a divergence; what was guessed right, in per cent."""
    names = ("loss", *(term.name for term in LOSS_TERMS))
    losses = [f"{name} {record[name]:.4g}{UNITS.get(name, '')}" for name in names if name in record]
    shares = [f"{name} {record[name]:.1%}" for name in SHARES if name in record]
    return "  ".join(losses + shares).replace("_", " ")


def counted(
    num_rounds: int, what: str, *, every_s: float, move: Callable[[float], None] | None = None
) -> Iterator[int]:
    """Counts the micro-batches of an update or a validation, and says every `every_s` seconds how far it is.

    By the host's clock: on CUDA the device is some micro-batches behind. `move` is told the share that is done, for a
    bar; where there is one, it says it all.
    """
    began = said = time.perf_counter()
    for done in range(num_rounds):
        now = time.perf_counter()
        if move is not None:
            move(done / num_rounds)
        if now - said >= every_s:
            said, left = now, (now - began) / done * (num_rounds - done)
            line = f"{what}: micro-batch {done} of {num_rounds}, {clock(left)} left"
            log.info(line, extra={"live": ""} if move else None)
        yield done
