"""What a run reports: metrics.jsonl (a line an update), TensorBoard, a progress line.

Loss sums stay on the device and cross to the host once every `log.every` updates, for all of these updates at once.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil import dist
from fastdistil.architecture import FlopsPerToken

log = logging.getLogger("fastdistil")

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


class Accumulator:
    """Loss sums of the updates since the last flush, on the device: no host sync inside a step."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_sums, device=device)
        self.updates: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, sums: Tensor) -> None:
        """Add the sums of one micro-batch."""
        self.sums += sums

    def close_update(self, gradient_norm: Tensor) -> None:
        """End the update: what was added belongs to it."""
        self.updates.append(self.sums)
        self.norms.append(gradient_norm)
        self.sums = torch.zeros_like(self.sums)

    def flush(self) -> list[tuple[list[float], float]]:
        """(sums over all ranks, gradient norm) of every closed update; a host sync. Every rank must call it."""
        if not self.updates:
            return []
        sums = dist.sum_over_ranks(
            torch.stack(self.updates)
        ).tolist()  # the sync, once every log.every updates
        norms = torch.stack([n.float() for n in self.norms]).tolist()
        self.updates, self.norms = [], []
        return list(zip(sums, norms, strict=True))


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl and TensorBoard. Rank 0 only."""

    def __init__(self, run: Path, *, resumed_at: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        _drop_after(self.path, resumed_at)
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # half a second; only where it is wanted

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One line; numbers go to TensorBoard under split/name at step `update`."""
        self.file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['split']}/{name}", value, record["update"])

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.file.flush()
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Flush, sync and close."""
        self.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()


def _drop_after(path: Path, update: int) -> None:
    """Forget lines of updates after the checkpoint that the run goes on from, and a half-written last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


class Clock:
    """Tokens/s and MFU between two flushes, and the time that is left.

    MFU = real tokens/s x FLOPs a token (teacher forward, student forward and backward; architecture.flops_per_token)
    / (peak FLOP/s x devices). Padding does not count as work.
    """

    def __init__(
        self,
        *,
        flops: FlopsPerToken,
        peak: float | None,
        num_devices: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops, self.peak, self.num_devices, self.now = flops.total, peak, num_devices, now
        self.tokens, self.begin = 0, now()

    def restart(self) -> None:
        """Begin anew: what happened since the last lap (a validation, a checkpoint) is not training time."""
        self.tokens, self.begin = 0, self.now()

    def lap(self) -> dict[str, float]:
        """tokens_per_s and, where the peak is known, mfu since the last lap."""
        speed = self.tokens / max(1e-9, self.now() - self.begin)
        self.restart()
        return {"tokens_per_s": speed} | (
            {"mfu": speed * self.flops / (self.peak * self.num_devices)} if self.peak else {}
        )


def progress_line(record: dict[str, Any], *, num_updates: int, tokens_left: float) -> str:
    """One line for a person: where the run is, how well and how fast it goes, when it ends."""
    names = ("loss", "kd", "mlm", "cosine", "agreement", "accuracy")
    losses = "  ".join(f"{n} {record[n]:.4g}" for n in names if n in record)
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    seconds = int(tokens_left / max(1.0, record["tokens_per_s"]))
    eta = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"update {record['update']}/{num_updates}  {losses}  {record['tokens_per_s']:,.0f} tokens/s{mfu}  ETA {eta}"
