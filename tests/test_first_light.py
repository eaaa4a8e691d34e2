"""The staged program for a GPU: nothing hides behind a failure, and every stage runs at toy size on a CPU."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from benchmarks.first_light import STAGES
from tests.support import launch


def run(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=launch.ENVIRONMENT)


def records(out: Path) -> dict[str, dict]:
    return {r["stage"]: r for r in map(json.loads, (out / "stages.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    out = tmp_path_factory.mktemp("staged")
    return run("tests.workers.stages_worker", out, "--rehearse"), out


def test_nothing_hides_behind_a_stage_that_fails_hangs_or_dies(staged):
    done, out = staged
    found = records(out)
    assert list(found) == ["good", "wrong", "late", "broken", "dies", "last"]
    assert [name for name, record in found.items() if record["ok"]] == ["good", "last"]
    assert found["good"]["found"] == "found"
    assert found["wrong"]["error"] == "ValueError: not equal"
    assert "no word in 2" in found["late"]["error"]  # a rehearsal has three times as long
    assert "CUDA error" in found["broken"]["error"]
    assert "status" in found["dies"]["error"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert done.returncode == 1
    assert "2 of 6 stages ok" in done.stdout


def test_what_a_late_stage_has_started_ends_with_it(staged):
    _, out = staged
    assert not psutil.pid_exists(int((out / "child").read_text()))


def test_results_are_kept_stage_by_stage_with_what_they_depend_on(staged):
    _, out = staged
    (path,) = out.glob("stages_worker.*.json")
    kept = json.loads(path.read_text())
    assert kept["stages"] == records(out)
    assert {"device", "torch", "triton", "commit", "time", "rehearsed"} <= kept.keys()
    assert run("tests.workers.stages_worker", out, "--rehearse", "--only", "good").returncode == 0
    assert list(json.loads(path.read_text())["stages"]) == list(kept["stages"])  # those of before stay


def test_an_unknown_stage_is_refused(tmp_path):
    done = run("benchmarks.first_light", tmp_path, "--only", "kernel")
    assert done.returncode == 2
    assert "--only wants stages of env" in done.stderr


def test_every_stage_can_be_rehearsed(tmp_path):
    done = run("benchmarks.first_light", tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + (tmp_path / "errors.log").read_text()[-2000:]
    found = records(tmp_path)
    assert found.keys() == {stage.name for stage in STAGES}
    assert found["program"]["found"]["resumed differs from the run in one go by"] == {}
    assert all("embedding" in found["embed"]["found"][name]["last update"] for name in ("embed", "relations"))
    assert len(found["zero"]["found"]) == 2
    assert found["tests"]["found"]["status"] == 0


def test_the_stages_of_one_command_fit_its_five_minutes():
    """Were each to take half of its limit, which is what they are set to, and the rows of stages run side by side."""
    rows: dict[str, float] = defaultdict(float)
    for stage in STAGES:
        rows[stage.beside] += stage.limit_s * stage.by_default
    assert (rows.pop("") + max(rows.values())) / 2 <= 300
