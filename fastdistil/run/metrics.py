"""What a run reports: metrics.jsonl (a line an update), TensorBoard, a progress line.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.run.command import is_installed
from fastdistil.run.config import LOSS_TERMS
from fastdistil.run.files import read_json_lines, sync, write_text
from fastdistil.run.ranks import Ranks

log = logging.getLogger("fastdistil")

COUNTS = ("tokens", "masked", "sequences")
"""What a record calls what of its update is counted (config.COUNTED)."""
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


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl and TensorBoard. Rank 0 only.

    Args:
        go_on: where they cannot be written, say so, keep the lines and try again at the next flush; otherwise OSError.
        TensorBoard's own may be lost.
    """

    def __init__(self, run: Path, *, resumed_at: int, tensorboard: bool, go_on: bool) -> None:
        self.path, self.go_on = run / "metrics.jsonl", go_on
        _drop_after(self.path, resumed_at)
        self.records: list[dict[str, Any]] = []  # for TensorBoard at the next flush
        self.lines = b""  # for the file
        self.board: Any = None
        if tensorboard and is_installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # half a second; only where it is wanted

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One line; numbers go to TensorBoard under split/name at step `update`."""
        line = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}  # fmt: skip
        self.lines += json.dumps(line).encode() + b"\n"  # JSON knows no NaN
        self.records.append(record)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        try:
            with self.path.open("ab", buffering=0) as file:  # opened anew: the folder may have been removed
                while self.lines:
                    self.lines = self.lines[file.write(self.lines) :]  # less than all just before a disk is full
            self._to_board()
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk says no name
            if not self.go_on and not isinstance(error, FileNotFoundError):  # the loop makes a removed folder anew
                raise
            log.error("going on without writing metrics: %s", error)

    def _to_board(self) -> None:
        records, self.records = self.records, []
        if self.board is None:
            return
        for record in records:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['split']}/{name}", value, record["update"])
        self.board.flush()

    def close(self) -> None:
        """Flush and sync."""
        self.flush()
        with contextlib.suppress(OSError):  # said by flush
            sync(self.path)
        if self.board is not None:
            self.board.close()


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
        self.begin = time.perf_counter()

    def add(self, sums: Tensor) -> None:
        """Add the loss sums of one micro-batch to the open update; no sync."""
        self.sums += sums

    def close_update(self, record: dict[str, Any], gradient_norm: Tensor) -> None:
        """End an update: what was added belongs to it. `record` needs "update" and its counts; no sync."""
        self.open.append((record, self.sums, gradient_norm))
        self.sums = torch.zeros_like(self.sums)

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
        num_tokens = sum(r["tokens"] for r in records)
        speed = {"tokens_per_s": num_tokens / seconds}
        if self.peak:
            speed["mfu"] = speed["tokens_per_s"] * self.flops / self.peak
        last: dict[str, Any] = {}
        for record, total, norm in zip(records, totals, values, strict=True):
            losses = self.to_means(total, [record[name] for name in COUNTS])
            last = record | losses | {"gradient_norm": norm} | speed
            if not math.isfinite(norm):
                last["skipped"] = True
            self._write(last)
            self._judge(record["update"], norm)
        if self.writer is not None:
            left = (self.num_updates - last["update"]) * seconds / len(records)
            log.info(progress_line(last, num_updates=self.num_updates, seconds_left=left))
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
        self._write(record)
        numbers = (f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))
        log.info("%s after update %d  %s", record["split"], record["update"], "  ".join(numbers))

    def _write(self, record: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(record)

    def close(self) -> None:
        """Write what is open and close the files."""
        self.flush()
        if self.writer is not None:
            self.writer.close()


def progress_line(record: dict[str, Any], *, num_updates: int, seconds_left: float) -> str:
    """One line for a person: where the run is, how well and how fast it goes, when it ends."""
    names = ("loss", *(term.name for term in LOSS_TERMS), "agreement", "masked_agreement", "accuracy")
    losses = "  ".join(f"{n} {record[n]:.4g}" for n in names if n in record)
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    speed = f"{record['tokens_per_s']:,.0f} tokens/s{mfu}"
    return f"update {record['update']}/{num_updates}  {losses}  {speed}  ETA {_clock(seconds_left)}"


def _clock(seconds: float) -> str:
    """3725.2 -> 1:02:05"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def counted(num_rounds: int, what: str, *, every_s: float) -> Iterator[int]:
    """Counts the micro-batches of an update or a validation, and says every `every_s` seconds how far it is.

    By the host's clock: on CUDA the device is some micro-batches behind.
    """
    began = said = time.perf_counter()
    for done in range(num_rounds):
        now = time.perf_counter()
        if now - said >= every_s:
            said, left = now, (now - began) / done * (num_rounds - done)
            log.info(f"{what}: micro-batch {done} of {num_rounds}, {_clock(left)} left")
        yield done
