"""--profile: a trace, a table whose parts are the step, and no number changed."""

import json

import pytest
import torch

from fastdistil import profiling
from fastdistil.config import Config
from tests import launch, toy

PRETRAIN = "fastdistil.pretrain"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    shards = toy.make_shards(root / "shards", num_sequences=120)
    teacher = toy.make_teacher(root / "teacher", shards)
    return launch.options(
        data__shards=shards, teacher__path=teacher, batch__size=512, batch__unit="tokens",
        batch__token_budget=128, optim__unit="updates", optim__duration=5, log__every=1,
        data__num_workers=0, data__validation_sequences=4,
    )  # fmt: skip


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(r["update"], r["loss"].hex()) for r in map(json.loads, lines) if r["split"] == "train"]


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_profiled_run(arguments, tmp_path, ranks):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    launch.run(PRETRAIN, "distilbert", *arguments, "--out", plain, ranks=ranks)
    assert not (plain / "profile").exists()
    log = launch.run(
        PRETRAIN, "distilbert", *arguments, "--out", profiled, "--profile", "2:4", ranks=ranks
    ).stdout
    assert losses(profiled) == losses(plain)

    found = json.loads((profiled / "profile" / "table.json").read_text())
    assert found["updates"] == 2
    parts = {name: row["seconds"] for name, row in found["parts"].items()}
    assert set(parts) == {*profiling.PARTS, "other"}
    assert sum(parts.values()) == pytest.approx(found["seconds_an_update"], rel=0.1)
    for part in ("teacher", "student forward", "loss", "backward", "optimiser"):
        assert parts[part] > 0
        assert found["parts"][part]["floor"] > 0
        assert f"profile: {part}" in log
    assert (parts["communication"] > 0) == (ranks == 2)
    trace = json.loads((profiled / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    micro_batches = 4 // (ranks or 1)
    assert names.count("backward") == names.count("teacher") == 2 * micro_batches
    assert names.count("optimiser") == 2


def test_a_window_beyond_the_run_is_refused(arguments, tmp_path):
    done = launch.run(
        PRETRAIN, "distilbert", *arguments, "--out", tmp_path / "run", "--profile", "5:7", ok=False
    )
    assert done.returncode == 2
    assert "goes beyond the run's 5 updates" in done.stderr


@pytest.mark.parametrize("window", ["0:2", "3:3", "13:10", "abc", "1", "1:2:3", "-1:2", "1:2x"])
def test_what_is_no_window(window):
    with pytest.raises(ValueError, match=r"--profile must be FIRST:END"):
        Config(profile=window)


def test_windows_count_from_one_for_people():
    assert Config(profile="10:13").profile_window == range(9, 12)
    assert not Config().profile_window


def test_spans_and_what_is_written_where_a_run_ends_early(tmp_path, caplog):
    caplog.set_level("INFO", logger="fastdistil")
    profile = profiling.Profile(range(1, 5), tmp_path, torch.device("cpu"), lambda: {"loss": 0.5})
    for update in range(3):
        profile.begin_update(update)
        with profiling.span("loss"):
            torch.ones(3).sum()
        assert list(profiling.spanned([1, 2], "waiting for data")) == [1, 2]
        profile.end_update()
    assert not (tmp_path / "table.json").exists()
    profile.close()
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["updates"] == 2
    assert found["parts"]["loss"]["floor"] == 0.5
    assert found["parts"]["waiting for data"]["seconds"] > 0
    assert "500.0" in caplog.text
    profile.close()  # a second time there is nothing left to write


def test_outside_a_window_spans_do_nothing():
    with pytest.raises(RuntimeError, match="through"), profiling.span("teacher"):
        raise RuntimeError("through")
    assert profiling._recorder is None
