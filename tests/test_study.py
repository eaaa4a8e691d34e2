"""study.py: the whole chain at toy size, for real; what is refused before it begins."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tyro

from fastdistil import study
from tests.support import launch, toy

OPTIONS = (
    "--batch.unit tokens --batch.size 512 --batch.token-budget 512 --log.validate-every 2 "
    "--data.num-workers 0 --log.to none --student.num-layers 2"
)


@pytest.fixture(scope="module")
def folders(root, tmp_path_factory):
    """(shards, teacher, data): data is CoLA's own files, whose texts are words of the toy vocabulary."""
    data = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("dev", 20)):
        file = data / "cola" / f"{split}.tsv"
        file.parent.mkdir(exist_ok=True)
        rows = (f"x\t{i % 2}\t\tw{i} w{i % 2}" for i in range(count))
        file.write_text("\n".join(rows) + "\n")
    return root / "shards", root / "teacher", data


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


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Of the steps."""
    for name, value in launch.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """(folder, command line) of a study that a process of its own has made."""
    out = tmp_path_factory.mktemp("finished") / "study"
    words = [*command(folders, out, jobs=2), "--variants", "distilbert", "no-teacher"]
    launch.run("fastdistil.study", *words, timeout_s=400)
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


def test_embeddings_are_scored_beside_the_teacher_and_tasks_beside_them(folders, tmp_path):
    shards, teacher, data = folders
    out = tmp_path / "study"
    mixed = tmp_path / "data"
    shutil.copytree(data, mixed)
    (mixed / "sts").mkdir()
    texts = [" ".join(f"w{i + j}" for j in range(6)) for i in range(20)]
    lines = "".join(f"{text}\t{texts[i - i % 2]}\t{5 * (i % 2 == 0)}\n" for i, text in enumerate(texts))
    (mixed / "sts" / "train.tsv").write_text("sentence1\tsentence2\tscore\n" + lines)
    words = command((shards, teacher, mixed), out, options=f"{OPTIONS} --teacher.pooling mean", points=None, tasks=None)
    launch.run("fastdistil.study", *words, "--tasks", "sts", "cola", "--variants", "embed", "pooled", timeout_s=400)
    measured = json.loads((out / "study.json").read_text())
    assert measured["complete"] == "2 of 2 pre-trainings, 6 of 6 evaluations"
    assert measured["scores"]["embed-1"].keys() == {"sts", "cola"}
    kept = json.loads((out / "embeddings" / "pooled-1.json").read_text())["scores"]
    assert [row["model"] for row in kept] == [str(teacher), str(out / "models" / "pooled-1")]
    assert measured["scores"]["pooled-1"]["sts"] == pytest.approx(kept[1]["metrics"]["spearman"] / 100)
    assert measured["scores"]["teacher-1"]["sts"] == pytest.approx(kept[0]["metrics"]["spearman"] / 100)
    assert measured["shares"]["pooled-1"]["sts"]["of_reference"] == kept[1]["of_reference"]
    text = (out / "study.md").read_text()
    assert "## What is kept: sts" in text
    assert f"| {kept[1]['of_reference']:.2f} % |" in text


def test_the_rows_follow_from_the_teacher(folders, tmp_path):
    """One without a masked-LM head cannot teach the paper's objective."""
    import transformers

    teacher = folders[1]
    assert study.default_variants(None) == study.default_variants(teacher) == tuple(study.PAPER)
    transformers.AutoModel.from_pretrained(teacher).save_pretrained(tmp_path)
    assert study.default_variants(tmp_path) == tuple(study.EMBED)


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


def test_it_ends_with_the_report_on_a_run_of_each_variant(finished, capsys):
    out, words = finished
    assert study.main(words) == 0
    runs = f"{out}/runs/distilbert-1 {out}/runs/no-teacher-1"
    assert capsys.readouterr().out.endswith(f"next: python -m fastdistil.report {runs} --out {out}/report.html\n")


def test_a_second_start_does_nothing_again(finished):
    out, words = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix != ".png"}
    begin = time.monotonic()
    assert study.main(words) == 0
    assert time.monotonic() - begin < 60
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"settings.json", "study.json", "study.md"}


def test_the_student_without_a_teacher_is_of_the_others_family(folders, tmp_path):
    shards, _, data = folders
    sizes: dict[str, Any] = {"token_types": 0, "num_layers": 4, "global_every": 3, "local_attention": 8}
    sizes |= {"model_type": "modernbert", "global_theta": 160000.0, "local_theta": 10000.0}
    teacher = toy.make_teacher(tmp_path / "teacher", shards, **sizes)
    made = parsed(command((shards, teacher, data), tmp_path / "study"))
    students = [made._resolve(made._words(name, 1)).student for name in ("distilbert", "random-init", "no-teacher")]
    assert {student.model_type for student in students} == {"modernbert"}
    first, *others = ([getattr(student, size) for size in study.SIZES] for student in students)
    assert others == [first, first]


def test_a_step_whose_log_is_gone_is_done_again(finished, tmp_path):
    out, words = finished
    copied = tmp_path / "study"
    shutil.copytree(out, copied)
    (copied / "logs" / "evaluate-distilbert-1.log").unlink()
    (copied / "scores" / "distilbert-1.json").unlink()
    words = [word.replace(str(out), str(copied)) for word in words]
    assert study.main(words) == 0
    again, first = (json.loads((folder / "study.json").read_text())["scores"] for folder in (copied, out))
    assert again["distilbert-1"] == first["distilbert-1"]  # fine-tuning is exactly repeatable


def test_other_settings_are_refused(finished, capsys):
    _, words = finished
    assert study.main([*words, "--tokens", "4096"]) == 2
    assert "--tokens 2560, now 4096" in capsys.readouterr().err


def test_a_failing_step_is_named_with_its_last_words(folders, tmp_path, capsys):
    out = tmp_path / "study"
    assert study.main([*command(folders, out, launcher="ls /no-such"), "--variants", "distilbert"]) == 1
    error = capsys.readouterr().err
    assert "pretrain-distilbert-1 ended with status 2" in error
    assert "/no-such" in error
    assert "the same command goes on" in error
    assert not list((out / "logs").glob("export-*"))  # nothing else was begun
    assert "0 of 1 pre-trainings" in (out / "study.md").read_text()


def test_an_interrupted_study_says_so_and_has_its_tables(folders, tmp_path, capsys, monkeypatch):
    def interrupt(_: study.Study) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study.Study, "run", interrupt)
    monkeypatch.setattr(study.Study, "_check_tasks", lambda _: None)
    assert study.main(command(folders, tmp_path / "study")) == 130
    interrupted = "interrupted by SIGINT: what was finished is kept, and the same command does the rest\n"
    assert capsys.readouterr().err == interrupted
    assert (tmp_path / "study" / "study.md").is_file()


def test_tables_that_cannot_be_made_are_no_success(finished, tmp_path, capsys):
    out, words = finished
    copied = tmp_path / "study"
    shutil.copytree(out, copied)
    (copied / "runs" / "no-teacher-1" / "metrics.jsonl").unlink()
    assert study.main([word.replace(str(out), str(copied)) for word in words]) == 1
    assert "error: no tables: " in capsys.readouterr().err


def parsed(words: list[str]) -> study.Study:
    return study.Study(tyro.cli(study.StudyConfig, args=words))


def test_an_earlier_checkpoint_waits_for_its_run(folders, tmp_path):
    """Steps of different lists may run at the same time."""
    lists = [[step.name for step in steps] for steps in parsed(command(folders, tmp_path, seeds=2))._chains()]
    (names,) = (names for names in lists if "export-no-kd-1-at-3" in names)
    assert names == [
        "pretrain-no-kd-1",
        "export-no-kd-1",
        "evaluate-no-kd-1",
        "export-no-kd-1-at-3",
        "evaluate-no-kd-1-at-3",
    ]
    assert sum(map(len, lists)) == 2 + 6 * (2 * 3 + 2)


def test_a_study_that_trains_its_own_teacher_goes_on(folders, tmp_path, monkeypatch):
    """At its second start the teacher's run folder is there."""
    monkeypatch.setattr(study.Study, "_check_tasks", lambda _: None)  # tried above
    size = "--student.num-layers 2 --student.hidden-size 32 --student.num-heads 2"
    begun = parsed(command(folders, tmp_path / "study", teacher=None, **{"teacher-options": size}))
    begun.check()
    (run,) = [Path(str(word)) for word in begun._pretraining("teacher", [])[0].words if str(word).endswith("teacher")]
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    begun.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "rte"}, "does not hold rte"),
        ({"tasks": "cola", "teacher": None, "data": "DATA"}, "labels in validation that train has not: 2"),
        ({"evaluate-options": "--max-length 99999"}, "--max-length 99999 is more than the"),
        ({"evaluate-options": "--epoch 3"}, "--epoch"),
    ],
)
def test_what_evaluate_would_refuse_is_refused_before_anything_is_trained(folders, tmp_path, capsys, changes, message):
    if changes.get("data"):
        (tmp_path / "cola").mkdir()
        for split, label in (("train", 1), ("dev", 2)):
            (tmp_path / "cola" / f"{split}.tsv").write_text(f"sentence\tlabel\na\t0\nb\t{label}\n")
        changes = changes | {"data": tmp_path}
    size = {"teacher-options": "--student.num-layers 2 --student.hidden-size 32 --student.num-heads 2"}
    changes = changes | (size if "teacher" in changes else {})
    assert study.main(command(folders, tmp_path / "study", **changes)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "error: the tasks cannot be evaluated: " in error
    assert message in error
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
        ({"variants": "no-kid"}, "--variants must be some of distilbert no-kd"),
        ({"data": "nowhere"}, "--data nowhere is not a folder"),
        ({"teacher": "nowhere"}, "--teacher nowhere: there is no such folder, and the hub does not give"),
        ({"shards": "nowhere"}, "nowhere/meta.json does not exist"),
        ({"launcher": "torchrun", "jobs": 2}, "takes the devices of several --jobs"),
        ({"teacher-options": "--seed 3"}, "has no effect with --teacher"),
        ({"teacher": None}, "--student.num-layers"),
    ],
)
def test_mistakes_are_refused_at_once(folders, tmp_path, capsys, changes, message):
    assert study.main(command(folders, tmp_path / "study", **changes)) == 2
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
        study.StudyConfig(shards=Path("s"), out=Path("o"), data=Path("d"), tasks=("cola",), variants=("no-such",))
