"""training/trackers.py and --max-hours: the real clients, offline and read back; one that fails; a run that ends itself."""

import json
import sqlite3
import time
from pathlib import Path

import pytest

from fastdistil.run import checkpoint
from fastdistil.run.command import STOPPED
from fastdistil.training import trackers
from tests.support import forked, runs
from tests.support.runs import arguments, exact_metrics, metrics_of


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
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = tmp_path / "run"
    stopped_and_resumed(root, run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(wanted(run, "loss"))
    assert [e.step for e in events.Scalars("validation/loss")] == [6, 12]
    about = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(about).session_start_info.hparams
    assert values["optim.lr"].number_value == pytest.approx(5e-4)
    assert values["recipe"].string_value == "distilbert"


def test_wandb(root, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    run = tmp_path / "run"
    stopped_and_resumed(root, run, "wandb", WANDB_MODE="offline")
    found, ids, config = {}, set(), {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
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
    with pytest.raises(ValueError, match="--log.to mlflow wants the package mlflow, .*: pip install mlflow"):
        trackers.chosen(("mlflow", "wandb"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    assert trackers.chosen(("auto",)) == ("tensorboard",)
    assert trackers.chosen(("wandb", "mlflow", "wandb")) == ("wandb", "mlflow")


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_run_ends_itself_in_time_and_goes_on(root, tmp_path, ranks):
    """After 9 s, of which a tenth is kept for the checkpoint."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    changes = {"optim__duration": 3000, "log__every": "1s", "resume": "auto", "max_hours": 9 / 3600}
    changes |= {"log__validate_every": 10_000, "log__checkpoint_every": "1h", "engine__zero_stage": 0}
    begin = time.monotonic()
    done = forked.run(*arguments(root, run, **changes), ranks=ranks, ok=False)
    assert done.returncode == STOPPED
    assert time.monotonic() - begin < 60
    assert done.stdout.count("--max-hours 0.0025: stopping") == 1
    state, update = runs.status(run), metrics_of(run)[-1]["update"]
    assert (state["state"], state["reason"], state["update"]) == ("stopped", "--max-hours 0.0025", update)
    assert checkpoint.folder_of(run, update).is_dir()
    assert f"stopped after update {update:,} of 3,000" in done.stdout
    assert done.stdout.rstrip().endswith("--resume auto")
    if ranks is None:  # another limit is free, and what was lost by the stop is nothing
        forked.run(*arguments(root, run, **changes | {"max_hours": 1}), stop_at=f"update {update + 1}/")
        forked.run(*arguments(root, straight, **changes | {"max_hours": 1}), stop_at=f"update {update + 1}/")
        one, other = ([x for x in exact_metrics(r) if ("update", update + 1) in x] for r in (run, straight))
        assert one == other != []
