"""training/trackers.py and --max-hours: the real clients, offline and read back; one that fails; a timely end."""

import json
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdistil.run import checkpoint
from fastdistil.run.command import STOPPED, StopRequest
from fastdistil.training import loop, trackers
from tests.support import forked, runs
from tests.support.runs import arguments, metrics_of


def wanted(run: Path, name: str) -> dict[int, float]:
    """{update: value} of a figure of training, as metrics.jsonl has it."""
    return {line["update"]: line[name] for line in metrics_of(run) if line["split"] == "train"}


def stopped_and_resumed(root: Path, run: Path, name: str, **environment: str) -> None:
    """A run that is watched by `name`, in two parts."""
    words = [*arguments(root, run, log__every=1, resume="auto"), "--log.to", name]
    forked.run(*words, stop_at="update 7/12", environment=environment)
    forked.run(*words, environment=environment)
    assert len(wanted(run, "loss")) == 12


def test_tensorboard_has_the_hyper_parameters(root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    run = tmp_path / "run"
    stopped_and_resumed(root, run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(wanted(run, "loss"))
    assert [e.step for e in events.Scalars("validation/loss")] == [6, 12]
    about = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = pb2.HParamsPluginData.FromString(about).session_start_info.hparams
    assert values["optim.lr"].number_value == pytest.approx(5e-4)
    assert values["recipe"].string_value == "distilbert"


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a log of LevelDB (blocks of 32 KiB, parts with a checksum, a length and a kind)."""
    place, whole = 7, b""  # behind the header
    while place + 7 <= len(log):
        if (room := 2**15 - place % 2**15) < 7:
            place += room
            continue
        size, kind = struct.unpack("<HB", log[place + 4 : place + 7])
        whole += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb(root, tmp_path):
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    run = tmp_path / "run"
    stopped_and_resumed(root, run, "wandb", WANDB_MODE="offline")
    found, ids, config = {}, set(), {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of(path.read_bytes()):
            record = pb2.Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            config |= {item.key: item.value_json for item in record.run.config.update}
            items = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            if "train/loss" in items:
                found[int(float(items["update"]))] = json.loads(items["train/loss"])
    assert found == pytest.approx(wanted(run, "loss"))
    assert ids == {(run / "trackers/wandb").read_text()}  # one run, in two parts
    assert json.loads(config["optim.lr"]) == 5e-4


def test_mlflow(root, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny alone keeps nothing without a server")
    run, base = tmp_path / "run", tmp_path / "mlflow.db"
    stopped_and_resumed(root, run, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{base}")
    with sqlite3.connect(base) as store:
        of_run = (run / "trackers/mlflow").read_text()
        assert store.execute("select run_uuid, status, name from runs").fetchall() == [(of_run, "FINISHED", "run")]
        values = dict(store.execute("select step, value from metrics where key = 'train/loss'").fetchall())
        parameters = dict(store.execute("select key, value from params").fetchall())
    assert values == pytest.approx(wanted(run, "loss"))
    assert parameters["optim.lr"] == "0.0005"


def test_trackio(root, tmp_path):
    pytest.importorskip("trackio")
    run, folder = tmp_path / "run", tmp_path / "trackio"
    stopped_and_resumed(root, run, "trackio", TRACKIO_DIR=str(folder))
    with sqlite3.connect(next(folder.glob("*.db"))) as store:
        rows = store.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{(run / 'trackers/trackio').read_text()}"}
    found = {step: values["train/loss"] for _, step, line in rows if "train/loss" in (values := json.loads(line))}
    assert found == pytest.approx(wanted(run, "loss"))


class Client:
    """A tracker that keeps what it gets, until it fails or hangs."""

    def __init__(self, run: Path, about: dict[str, object], resumed_at: int) -> None:
        self.seen: list[object] = []
        assert about == {"optim.lr": 1}

    def log(self, update: int, values: dict[str, float]) -> None:
        if "train/fail" in values:
            raise ConnectionError("no route to host\nand more")
        if "train/hang" in values:
            time.sleep(20)
        SEEN.append((update, values))

    def close(self, state: str) -> None:
        SEEN.append(state)


SEEN: list[object] = []


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    SEEN.clear()
    monkeypatch.setitem(trackers._CLIENTS, "wandb", Client)
    return trackers.Tracker("wandb", tmp_path, {"optim": {"lr": 1}}, 0)


def test_what_a_tracker_gets(tracker):
    tracker.put(
        {"split": "train", "update": 3, "loss": 2.5, "tokens": 7, "gradient_norm": float("nan"), "skipped": True}
    )
    tracker.put("stopped")
    tracker.close()
    assert SEEN == [(3, {"train/loss": 2.5, "train/tokens": 7.0}), "stopped"]


def test_a_tracker_that_fails_says_so_once(tracker, caplog):
    for _ in range(3):
        tracker.put({"split": "train", "update": 1, "fail": 1.0})
    tracker.join(10)
    tracker.put({"split": "train", "update": 2, "loss": 1.0})
    tracker.put("finished")
    tracker.close()
    assert caplog.messages == ["the run goes on without wandb (--log.to): no route to host"]


def test_a_tracker_that_hangs_holds_nothing_up(tracker, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    begin = time.monotonic()
    for _ in range(3):
        tracker.put({"split": "train", "update": 1, "hang": 1.0})
    tracker.put("finished")
    tracker.close()
    assert time.monotonic() - begin < 10
    assert caplog.messages == ["wandb (--log.to) has not taken everything within 0.1 s: the run ends"]


def test_a_package_that_is_missing_is_refused_and_none_is_silent(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert trackers.chosen(("auto",)) == trackers.chosen(("none",)) == trackers.chosen(()) == ()
    with pytest.raises(ValueError, match=r"--log[.]to mlflow wants the package mlflow, which is not installed: pip"):
        trackers.chosen(("mlflow", "wandb"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    assert trackers.chosen(("auto",)) == ("tensorboard",)
    assert trackers.chosen(("wandb", "mlflow", "wandb")) == ("wandb", "mlflow")


def test_a_run_ends_itself_in_time_and_goes_on(root, tmp_path):
    """After 12 s, of which a tenth is kept for the checkpoint."""
    run, seldom = tmp_path / "run", {f"log__{name}": "1h" for name in ("validate_every", "checkpoint_every")}
    changes = {"optim__duration": 9000, "log__every": "1s", "resume": "auto", **seldom}
    begin = time.monotonic()
    done = forked.run(*arguments(root, run, max_hours=12 / 3600, **changes), "--log.to", "none", ok=False)
    assert done.returncode == STOPPED
    assert time.monotonic() - begin < 60
    assert done.stdout.count("--max-hours 0.00333333: stopping") == 1
    state, update = runs.status(run), metrics_of(run)[-1]["update"]
    assert (state["state"], state["reason"], state["update"]) == ("stopped", "--max-hours 0.00333333", update)
    assert checkpoint.folder_of(run, update).is_dir()
    assert f"stopped after update {update:,} of 9,000" in done.stdout
    assert done.stdout.rstrip().endswith("--log.to none --resume auto")
    assert done.stdout.count("--resume auto") == 1  # that of the first command was put where it belongs
    resumed = forked.run(*arguments(root, run, max_hours=1e-9, **changes), ok=False)  # another limit is free
    assert f"resuming after update {update} of 9000" in resumed.stdout
    assert (resumed.returncode, metrics_of(run)[-1]["update"]) == (STOPPED, update)  # at once


def test_the_end_leaves_time_for_an_update_and_the_checkpoint(monkeypatch):
    now, clock = [1000.0], [5e9]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])
    monkeypatch.setattr(loop, "started_at", lambda: 5e9 - 100)
    deadline, stop, saver = loop.Deadline(1.0), StopRequest(), SimpleNamespace(seconds=0.0)
    clock[0] += 1e6  # somebody sets it
    mirror = SimpleNamespace(seconds=0.0)
    for at, seconds, is_asked in ((1000, 0, False), (1100, 0, False), (4330, 40, False), (4345, 40, True)):
        now[0], saver.seconds, mirror.seconds = float(at), float(seconds), seconds / 2
        deadline.since = max(deadline.since, at - 100.0)  # an update took 100 s, a checkpoint takes 40, its upload 20
        deadline.ask(stop, saver, mirror)  # type: ignore[arg-type]
        assert stop.asked == is_asked, at
    assert stop.reason == "--max-hours 1"
    never = loop.Deadline(None)
    now[0] = 1e12
    never.ask(other := StopRequest(), saver, None)  # type: ignore[arg-type]
    assert not other.asked
