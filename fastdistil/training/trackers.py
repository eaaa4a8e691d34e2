"""Where a run can be watched beside its folder: TensorBoard, Weights & Biases, MLflow, trackio, by their own packages.

Each works in a thread of its own behind a queue: one that has no network, or no key, neither stops nor slows the run,
and says so once. Where they write, and to whom, is what their own variables and settings say (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_DIR, ...). Standard library only until one is opened.
"""

import contextlib
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastdistil.run.config import flatten
from fastdistil.run.files import write_text

log = logging.getLogger("fastdistil")

FOLDER = "trackers"
"""In a run folder, what each tracker calls this run: a resumed one goes on there."""
PROJECT = "fastdistil"
PACKAGES = ("tensorboard", "wandb", "mlflow", "trackio")
"""The modules, and what pip calls them; for a run whose MLflow has a server `mlflow-skinny` is enough."""
MOST_WAITING = 100_000
"""Records that wait for a tracker at most; later ones are lost to it."""
CLOSE_S = 30.0
"""For so long the end of a run waits for one that still sends."""


def chosen(to: tuple[str, ...]) -> tuple[str, ...]:
    """The trackers that --log.to names. Raises ValueError where one's package is not installed."""
    if to == ("auto",):
        return ("tensorboard",) if find_spec("tensorboard") else ()
    names = tuple(name for name in dict.fromkeys(to) if name in PACKAGES)
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"--log.to {name} wants the package {name}, which is not installed: pip install {name}, or leave it out"
            )
    return names


class Client(Protocol):
    """What a thread does with a tracker's package."""

    def log(self, update: int, values: dict[str, float]) -> None:
        """Values by names like train/loss."""

    def close(self, state: str) -> None:
        """The run is finished, stopped or failed."""


class _TensorBoard:
    def __init__(self, run: Path, about: dict[str, Any], resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)
        if not resumed_at:
            # What add_hparams writes, without the event file of its own that it would make for one value.
            plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in about.items()}
            for summary in hparams(plain, {"train/loss": 0.0, "validation/loss": 0.0}):
                self.writer._get_file_writer().add_summary(summary)

    def log(self, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)

    def close(self, state: str) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run: Path, about: dict[str, Any], resumed_at: int) -> None:
        wandb = import_module("wandb")
        self.run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=run.resolve().name,
            id=_known_as(run, "wandb"),
            dir=run,
            config=about,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),  # silent: it asks nothing on the terminal
        )
        # wandb's own steps only rise; after a crash a run goes on from its last checkpoint.
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, update: int, values: dict[str, float]) -> None:
        self.run.log(values | {"update": update})

    def close(self, state: str) -> None:
        self.run.finish(exit_code=int(state == "failed"))


class _MLflow:
    def __init__(self, run: Path, about: dict[str, Any], resumed_at: int) -> None:
        self.mlflow, path = import_module("mlflow"), run / FOLDER / "mlflow"
        known = path.read_text().strip() if path.is_file() else None
        made = self.mlflow.start_run(run_id=known, run_name=None if known else run.resolve().name)
        if known is None:
            path.parent.mkdir(exist_ok=True)
            write_text(path, made.info.run_id)
            self.mlflow.log_params(about)

    def log(self, update: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=update)

    def close(self, state: str) -> None:
        self.mlflow.end_run({"finished": "FINISHED", "failed": "FAILED"}.get(state, "KILLED"))


class _Trackio:
    def __init__(self, run: Path, about: dict[str, Any], resumed_at: int) -> None:
        name = f"{run.resolve().name}-{_known_as(run, 'trackio')}"
        self.run = import_module("trackio").init(PROJECT, name=name, config=about, resume="allow", embed=False)

    def log(self, update: int, values: dict[str, float]) -> None:
        self.run.log(values, step=update)

    def close(self, state: str) -> None:
        self.run.finish()


_CLIENTS: dict[str, Callable[[Path, dict[str, Any], int], Client]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _known_as(run: Path, name: str) -> str:
    """What the tracker calls the run, made up the first time."""
    path = run / FOLDER / name
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text().strip()


class Tracker(threading.Thread):
    """Hands the records of a run to one tracker, in the order they come.

    Args:
        name: one of PACKAGES.
        config: the contents of "config" in RUN/config.json, for its hyper-parameters.
        resumed_at: the update that the run goes on from; what came after it comes again.
    """

    def __init__(self, name: str, run: Path, config: dict[str, Any], resumed_at: int) -> None:
        super().__init__(name=name, daemon=True)
        self.about = run, flatten(config), resumed_at
        self.waiting: queue.Queue[dict[str, Any] | str] = queue.Queue(MOST_WAITING)
        self.has_failed = False
        self.last_put = time.monotonic()
        self.start()

    def run(self) -> None:
        """The thread: opens the tracker, hands over what comes, closes it."""
        try:
            client = _CLIENTS[self.name](*self.about)
            while not isinstance(record := self.waiting.get(), str):
                client.log(record["update"], dict(_values(record)))
            client.close(record)
        except (Exception, SystemExit) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if not self.has_failed:  # else `close` has said it
                log.warning("the run goes on without %s (--log.to): %s", self.name, reason)
            self.has_failed = True

    def put(self, record: dict[str, Any] | str) -> None:
        """Hand over a line of metrics.jsonl, or at the end what became of the run; returns at once."""
        self.last_put = time.monotonic()
        if not self.has_failed:
            with contextlib.suppress(queue.Full):
                self.waiting.put_nowait(record)

    def close(self) -> None:
        """Wait until it has everything, for CLOSE_S after the last `put` at most."""
        self.join(max(0.0, self.last_put + CLOSE_S - time.monotonic()))
        if self.is_alive():
            self.has_failed = True
            log.warning("%s (--log.to) has not taken everything within %g s: the run ends", self.name, CLOSE_S)


def _values(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and name != "update"
        if is_number and math.isfinite(value):
            yield f"{record['split']}/{name}", float(value)
