"""study.py: the whole chain at toy size, for real; what is refused before it begins."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastdistil import study
from tests.support import toy

OPTIONS = (
    "--batch.unit tokens --batch.size 512 --batch.token-budget 512 --log.validate-every 2 "
    "--data.num-workers 0 --log.no-tensorboard --student.num-layers 2"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(shards, teacher, data): data is CoLA's own files, whose texts are words of the toy vocabulary."""
    root = tmp_path_factory.mktemp("study")
    shards, teacher = (toy.make_shards(root / "shards"), toy.make_teacher(root / "teacher", root / "shards"))
    for split, count in (("train", 40), ("dev", 20)):
        file = root / "data" / "cola" / f"{split}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = (f"x\t{i % 2}\t\tw{i} w{i % 2}" for i in range(count))
        file.write_text("\n".join(rows) + "\n")
    return shards, teacher, root / "data"


def command(folders, out, **changes) -> list[str]:
    shards, teacher, data = folders
    words = {
        "shards": shards,
        "teacher": teacher,
        "data": data,
        "tasks": "cola",
        "out": out,
        "options": OPTIONS,
        "tokens": 2560,
        "seeds": 1,
        "points": 2,
        "evaluate-options": "--epochs 1 --batch-size 8 --device cpu",
    } | changes
    return [f"--{key}={value}" for key, value in words.items() if value is not None]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "fastdistil.study"]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "study"
    words = [*command(folders, out), "--variants", "distilbert", "no-teacher"]
    done = run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, words


def test_every_step_is_done_and_measured(finished):
    out, _ = finished
    measured = json.loads((out / "study.json").read_text())
    assert measured["complete"] == "2 of 2 pre-trainings, 5 of 5 evaluations"
    runs = measured["runs"]
    assert runs.keys() == {"distilbert-1", "no-teacher-1"}
    assert {r["updates"] for r in runs.values()} == {5}  # 2560 tokens of 512 an update: not a whole number of `points`
    assert runs["distilbert-1"]["tokens"] == runs["no-teacher-1"]["tokens"] > 2250
    assert set(measured["scores"]) == {
        "teacher-1", "distilbert-1", "no-teacher-1", "distilbert-1-at-3", "no-teacher-1-at-3",
    }  # fmt: skip
    for name, scores in measured["scores"].items():
        kept = json.loads((out / "scores" / f"{name}.json").read_text())["tasks"]["cola"]
        assert scores == {"cola": kept["seeds"]["1"]["score"]}
    text = (out / "study.md").read_text()
    assert "## Scores" in text
    assert "## Efficiency" in text
    student = json.loads((out / "models" / "no-teacher-1" / "config.json").read_text())
    teacher = measured["efficiency"]["models"][0]
    assert student["n_layers"] == 2  # --options came first, the sizes of the others with it
    assert teacher["num_parameters"] > measured["efficiency"]["models"][1]["num_parameters"]


def test_variants_see_the_same_text_with_other_losses(finished):
    out, _ = finished
    configs = {
        name: json.loads((out / "runs" / name / "config.json").read_text())["config"]
        for name in ("distilbert-1", "no-teacher-1")
    }
    ours, other = configs.values()
    assert (ours["seed"], ours["data"], ours["batch"], ours["masking"]) == (
        other["seed"], other["data"], other["batch"], other["masking"],
    )  # fmt: skip
    assert (ours["loss"]["kd"], other["loss"]["kd"], other["teacher"]["path"]) == (5.0, 0.0, None)


def test_a_second_start_does_nothing_again(finished):
    out, words = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix != ".png"}
    begin = time.monotonic()
    assert run(words).returncode == 0
    assert time.monotonic() - begin < 60
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"settings.json", "study.json", "study.md"}


def test_a_step_whose_log_is_gone_is_done_again(finished, tmp_path):
    out, words = finished
    copied = tmp_path / "study"
    shutil.copytree(out, copied)
    (copied / "logs" / "evaluate-distilbert-1.log").unlink()
    (copied / "scores" / "distilbert-1.json").unlink()
    words = [word.replace(str(out), str(copied)) for word in words]
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((copied / "study.json").read_text())["scores"]["distilbert-1"]
        == (json.loads((out / "study.json").read_text())["scores"]["distilbert-1"])
    )  # fine-tuning is exactly repeatable


def test_other_settings_are_refused(finished):
    _, words = finished
    done = run([*words, "--tokens", "4096"])
    assert done.returncode == 2
    assert "--tokens 2560, now 4096" in done.stderr


def test_a_failing_step_is_named_with_its_last_words(folders, tmp_path):
    words = command(folders, tmp_path / "study", tasks="rte")  # not in the data
    done = run([*words, "--variants", "distilbert"])
    assert done.returncode == 1
    assert "evaluate-teacher-1 ended with status 2" in done.stderr
    assert "does not hold rte" in done.stderr
    assert "the same command goes on" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
        ({"variants": "no-kd"}, "--variants must be distilbert and others"),
        ({"data": "nowhere"}, "--data nowhere is not a folder"),
        ({"teacher": "nowhere"}, "wanted config.json in nowhere"),
        ({"shards": "nowhere"}, "nowhere/meta.json does not exist"),
        ({"launcher": "torchrun", "jobs": 2}, "takes the devices of several --jobs"),
        ({"teacher-options": "--seed 3"}, "has no effect with --teacher"),
        ({"teacher": None}, "--student.num-layers"),
    ],
)
def test_mistakes_are_refused_at_once(folders, tmp_path, capsys, changes, message):
    try:
        status = study.main(command(folders, tmp_path / "study", **changes))
    except SystemExit as ended:  # by tyro, before the program began
        status = ended.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()


def test_a_folder_of_something_else_is_left_alone(folders, tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert study.main(command(folders, tmp_path)) == 2
    assert "holds no study" in capsys.readouterr().err


def test_jobs_share_cores_and_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert study._devices(1) == [{}]
    assert study._devices(4) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in "5757"]


def test_a_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="no-such"):
        replace(study.StudyConfig(shards=Path("s"), out=Path("o"), data=Path("d"), tasks=("cola",)), variants=("no-such",))  # fmt: skip
