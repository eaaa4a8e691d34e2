"""run/options.py: what a command line becomes, and what a mistake in it is answered with."""

import os
from pathlib import Path

import pytest

from fastdistil import efficiency, evaluate, export, prepare, report
from fastdistil.remote.storage import url_of
from fastdistil.run import options, recipes
from fastdistil.run.options import parse
from fastdistil.run.recipes import NAMES


def answer(*words, kind=None, command=""):
    """The lines that a command line of pretrain, or of another command, is refused with."""
    try:
        got = parse(kind, words, command) if kind else recipes.parse(words)
    except ValueError as refused:
        return str(refused).splitlines()
    raise AssertionError(f"not refused: {got}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pretrain wants a recipe first, or --config FILE: distilbert distilroberta"),
        (["distilbret"], "there is no recipe distilbret: did you mean distilbert?"),
        (["hiden-cosine", "--seed", "3"], "there is no recipe hiden-cosine: did you mean hidden_cosine?"),
        (["xyzzy"], "there is no recipe xyzzy: there are distilbert distilroberta embed"),
        (
            ["--seed", "3", "mlm", "--out", "a b"],
            "recipe comes first: python -m fastdistil.pretrain mlm --seed 3 --out 'a b'",
        ),
        (["--recipe", "mlm", "--seed", "3"], "the recipe comes first: python -m fastdistil.pretrain mlm --seed 3"),
        (["--seed", "3"], "the recipe comes first: python -m fastdistil.pretrain RECIPE --seed 3"),
    ],
)
def test_a_recipe_that_is_none(words, said):
    (line,) = answer(*words)
    assert said in line


def test_a_recipe_may_be_spelt_with_hyphens():
    assert recipes.parse(["hidden-cosine"]) == recipes.named("hidden_cosine")


# What people type who know Hugging Face's Trainer, DistilBERT's own script or DeepSpeed, and what is meant here.
FROM_ELSEWHERE = {
    "--epochs": "--optim.duration",
    "--num-train-epochs": "--optim.duration",
    "--n_epoch": "--optim.duration",
    "--max-steps": "--optim.unit updates --optim.duration N",
    "--learning-rate": "--optim.lr",
    "--learning_rate": "--optim.lr",
    "--lr": "--optim.lr",
    "--batch.lr": "--optim.lr",
    "--optim.learning-rate": "--optim.lr",
    "--optim.learning-rte": "--optim.lr",
    "--optim.lrr": "--optim.lr",
    "-lr": "--optim.lr",
    "-optim.lr": "--optim.lr",
    "\u2013optim.lr": "--optim.lr",
    "--weight-decay": "--optim.weight-decay",
    "--warmup-steps": "--optim.warmup",
    "--warmup_prop": "--optim.warmup",
    "--output-dir": "--out",
    "--dump_path": "--out",
    "--fp16": "--engine.precision bf16",
    "--bf16": "--engine.precision bf16",
    "--batch-size": "--batch.size",
    "--per-device-train-batch-size": "--batch.token-budget",
    "--gradient-accumulation-steps": "--batch.size",
    "--gradient_checkpointing": "--engine.activation-checkpointing",
    "--teacher-model": "--teacher.path",
    "--teacher_name": "--teacher.path",
    "--student_type": "--student.family",
    "--temperature": "--loss.temperature",
    "--alpha-ce": "--loss.kd",
    "--alpha_mlm": "--loss.mlm",
    "--alpha_cos": "--loss.cosine",
    "--mlm_mask_prop": "--masking.fraction",
    "--num_workers": "--data.num-workers",
    "--data_file": "--data.shards",
    "--log_interval": "--log.every",
    "--save-steps": "--log.checkpoint-every",
    "--resume_from_checkpoint": "--resume auto",
    "--deepspeed": "--engine.zero-stage",
    "--nproc-per-node": "torchrun --nproc-per-node N",
    "--no-tensorboard": "--log.to none",
    "--device": "--engine.device",
    "--chekpoint-every": "--log.checkpoint-every",
    "--optim.no-compile": "--engine.no-compile",
}


@pytest.mark.parametrize("typed", FROM_ELSEWHERE)
def test_what_others_call_it_is_answered_with_ours(typed):
    line, end = answer("distilbert", typed, "1")
    assert line.startswith(("there is no ", "an option begins with two hyphens"))
    assert FROM_ELSEWHERE[typed] in line
    assert end == "  `python -m fastdistil.pretrain distilbert --help` shows all options"
    (same, _) = answer("distilbert", f"{typed}=1")
    assert same == line


def test_every_answer_names_an_option_of_some_command():
    kinds = (prepare.PrepareConfig, export.ExportConfig, evaluate.EvaluateConfig, report.ReportConfig, recipes.Config)
    known = {option for kind in kinds for option in options.known_options(kind)[0]} | {"--shards"}  # study's
    for answers in options._ANSWERS.values():
        assert {answer.split()[0] for answer in answers} <= known, answers


def test_many_mistakes_are_still_one_screen():
    lines = answer("distilbert", *(f"--{name}" for name in ("epochs", "fp16", "bf16", "lr", "xyzzy", "alpha", "steps")))
    assert lines[4:] == [
        "  there is no --xyzzy",
        "  ... and 2 more",
        "  `python -m fastdistil.pretrain distilbert --help` shows all options",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lr", "abc"], "wanted --optim.lr FLOAT, got abc. Highest learning rate"),
        (["--optim.lr=1e-3x"], "wanted --optim.lr FLOAT, got 1e-3x."),
        (["--batch.size", "7.5"], "wanted --batch.size INT, got 7.5."),
        (["--student.layers", "0", "x"], "got 0 x. Which layers it takes"),
        (["--optim.lr"], "--optim.lr wants 1 value(s), got none"),
        (["--out", "--seed", "3"], "--out wants 1 value(s), got none"),
        (["--optim.betas", "0.9"], "--optim.betas wants 2 value(s), got 0.9"),
        (["--engine.precision", "fp16"], "--engine.precision wants one of auto bf16 fp32, got fp16"),
        (["--engine.zero_stage", "4"], "--engine.zero-stage wants one of 0 1 2 3 None, got 4"),
        (["--optim.lr", "5e-4", "--optim.lr=5"], "--optim.lr must be in (0, 1), got 5.0"),
        (["--profile", "3"], "--profile must be FIRST:END, two updates counted from 1, got '3'"),
        (["--engine.compile", "True"], "takes no value, got True: use --engine.compile, or --engine.no-compile"),
        (["--dry-run=false"], "--dry-run takes no value, got false: use --dry-run, or --no-dry-run"),
        (["mlm"], "'mlm' is no value of an option: leave it out"),
    ],
)
def test_a_value_that_is_wrong_or_missing(words, said):
    line, end = answer("distilbert", *words)
    assert said in line
    assert end.endswith("shows all options")


def test_of_one_option_twice_the_last_counts_and_underscores_are_hyphens():
    got = recipes.parse(["mlm", "--optim.lr", "1e-3", "--data.num_workers=0", "--optim.lr=2e-3", "--seed", "3"])
    assert (got.optim.lr, got.data.num_workers, got.seed) == (2e-3, 0, 3)


def test_the_deepspeed_launchers_rank_is_not_ours(monkeypatch):
    assert recipes.parse(["--local_rank=1", "mlm", "--local-rank=0"]) == recipes.named("mlm")


@pytest.mark.parametrize(
    ("kind", "command", "words", "said"),
    [
        (prepare.PrepareConfig, "prepare", ["a", "--tokenizer_name", "t"], "no --tokenizer_name: use --tokenizer"),
        (prepare.PrepareConfig, "prepare", ["a", "--num-proc", "2"], "there is no --num-proc: use --workers"),
        (prepare.PrepareConfig, "prepare", ["a", "--max_seq_length=5"], "use --max-length"),
        (prepare.PrepareConfig, "prepare", ["--sources", "a"], "is given without an option"),
        (prepare.PrepareConfig, "prepare", [], "missing: --tokenizer STR A Hugging Face folder"),
        (prepare.PrepareConfig, "prepare", ["--tokenizer", "t", "--out", "o"], "no source: give files, folders or"),
        (
            export.ExportConfig,
            "export",
            [],
            "missing: PATH Folder of the run, or the URL that was its --mirror.; --out PATH Folder to write",
        ),
        (export.ExportConfig, "export", ["a", "--output", "b"], "there is no --output: use --out"),
        (evaluate.EvaluateConfig, "evaluate", ["a", "--tasks", "b"], "no --tasks: did you mean --task?"),
        (evaluate.EvaluateConfig, "evaluate", ["a", "--learning_rate", "1"], "use --lr"),
        (evaluate.EvaluateConfig, "evaluate", ["a", "--num_train_epochs", "1"], "use --epochs N"),
        (
            evaluate.EvaluateConfig,
            "evaluate",
            ["a", "--task", "cola", "--data", "d", "--seeds", "x"],
            "--seeds INT, got x.",
        ),
        (report.ReportConfig, "report", ["a", "--output-dir", "b"], "there is no --output-dir: use --out"),
    ],
)
def test_other_commands(kind, command, words, said):
    line, end = answer(*words, kind=kind, command=command)
    assert said in line
    assert end == f"  `python -m fastdistil.{command} --help` shows all options"


def test_options_in_one_word_want_an_equals_sign():
    from fastdistil.study import StudyConfig

    line, _ = answer("--options", "--optim.lr 3", kind=StudyConfig, command="study")
    assert line == '--options wants its value after an equals sign: --options="--optim.lr 3"'


@pytest.mark.parametrize(
    "value",
    [
        *("s3://bucket/run", "gs://bucket/run", "hdfs:///run", "abfss://box@host/run", "dbfs:/run", "me@host:/run"),
        *("C:\\runs", "file:///tmp/run"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_nothing_is_written_to_a_url(tmp_path, monkeypatch, value, joined):
    monkeypatch.chdir(tmp_path)
    words = [f"--out={value}"] if joined else ["--out", value]
    (line,) = answer("mlm", *words)
    fix = "use /tmp/run" if value.startswith("file:") else f"use a folder of this machine, and --mirror {value} to have"
    assert line.startswith(f"{value} is not on this machine: {fix}")
    (line,) = answer("a", *words, kind=export.ExportConfig, command="export")
    assert line.endswith("use /tmp/run" if value.startswith("file:") else "and copy it there afterwards")
    assert not list(tmp_path.iterdir())


def test_what_is_read_from_a_url():
    (line,) = answer("mlm", "--teacher.path", "https://huggingface.co/bert-base-uncased")
    assert "give the model's name alone" in line
    got = recipes.parse(["mlm", "--data.shards=s3://bucket/wiki", "--data.validation", "hf://datasets/lab/wiki"])
    (shards,) = got.data.texts
    assert list(map(url_of, (shards.folder, got.data.validation or ""))) == [
        "s3://bucket/wiki",
        "hf://datasets/lab/wiki",
    ]
    for words in (["--mirror", "file:///mnt/a"], ["--mirror=s3://bucket/a"], ["--mirror", "/mnt/a"]):
        assert recipes.parse(["mlm", *words]).mirror == words[-1].removeprefix("--mirror=")
    given = parse(export.ExportConfig, ["s3://bucket/a", "--out", "o"], "export")
    assert url_of(given.run) == "s3://bucket/a"
    for value, fix in (("host:/wiki", "a URL begins with s3://"), ("file:///data/wiki", "use /data/wiki")):
        (line,) = answer("mlm", "--data.shards", value)
        assert fix in line
    given = ("https://host/a.txt", "--tokenizer", "t", "--out", "o")
    assert "https://host/a.txt is not on" in answer(*given, kind=prepare.PrepareConfig, command="prepare")[0]


@pytest.mark.parametrize("source", ["hf:name", "hf:org/name:config", "hf:/a/folder", "a:b.txt", "odd:name/x"])
def test_a_name_with_a_colon_is_no_url(tmp_path, source):
    words = [source, "--tokenizer", "train:100", "--out", str(tmp_path / "out")]
    assert parse(prepare.PrepareConfig, words, "prepare").sources == (source,)


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    got = recipes.parse(["mlm", "--out=~/run", "--data.shards", "~/a", "--student.init=~/b"])
    assert (got.out, got.data.shards, got.student.init) == (
        tmp_path / "run",
        (str(tmp_path / "a"),),
        str(tmp_path / "b"),
    )


class TestOut:
    """A place that cannot be written is refused before the work."""

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        (line,) = answer("mlm", "--out", str(tmp_path / "file/deep/run"))
        assert (
            line == f"--out {tmp_path}/file/deep/run cannot be made: {tmp_path}/file is no folder: name another place"
        )

    @pytest.mark.parametrize("below", ["run", "deep/run", "."])
    def test_without_permission(self, tmp_path, monkeypatch, below):
        """By `os.access`, which knows read-only file systems, too; root, as which tests run, may write anywhere."""
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        out = tmp_path / below
        (line,) = answer("mlm", "--out", str(out))
        assert line == f"--out {out} cannot be written: no permission to write in {tmp_path}: name another place"
        assert recipes.parse(["mlm", "--out", str(out), "--dry-run"]).out == out  # of a run on another machine

    def test_a_file_that_is_replaced(self, tmp_path):
        page = tmp_path / "report.html"
        page.touch()
        assert parse(report.ReportConfig, ["run", "--out", str(page)], "report").out == page


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        recipes.parse(["--help"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in NAMES)
    assert printed.count("\n") < 24  # one screen
    with pytest.raises(SystemExit) as ended:
        recipes.parse(["mlm", "--help"])
    assert not ended.value.code
    assert "--optim.weight-decay" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipes.parse(["mlm", "--help"], quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [evaluate.EvaluateConfig, efficiency.EfficiencyConfig])
def test_a_run_where_a_model_is_wanted(tmp_path, kind):
    (tmp_path / "checkpoints").mkdir()
    for name in ("status.json", "config.json"):
        (tmp_path / name).write_text("{}")
    words = [str(tmp_path), *(["--task", "cola", "--data", str(tmp_path)] if kind is evaluate.EvaluateConfig else [])]
    line, _ = answer(*words, kind=kind, command="evaluate")
    assert f"export it first, by `python -m fastdistil.export {tmp_path} --out FOLDER`" in line
