"""The command line: recipes, overrides, typos, mistakes, and all of it before torch is imported."""

import argparse
import json
import math
import re
import resource
import subprocess
import sys
import time

import pytest

from fastdistil.run import config, recipes
from fastdistil.run.recipes import parse
from tests.support import launch


def test_distilbert_is_the_paper():
    c = recipes.named("distilbert")
    assert (c.loss.kd, c.loss.mlm, c.loss.cosine, c.loss.temperature) == (5.0, 2.0, 1.0, 2.0)
    assert (c.optim.lr, c.optim.betas, c.optim.eps, c.optim.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.0)
    assert (c.optim.clip_norm, c.optim.warmup, c.optim.duration, c.optim.unit) == (5.0, 0.05, 3.0, "epochs")
    assert (c.batch.size, c.batch.unit, c.seed) == (4000, "sequences", 56)
    assert (c.masking.fraction, c.masking.keep, c.masking.random, c.masking.smoothing) == (0.15, 0.1, 0.1, 0.7)
    assert (c.student.init, c.student.dropout, c.student.attention_dropout) == ("teacher", 0.1, 0.1)
    assert (c.student.copy_transform, c.student.freeze_positions) == (False, False)


@pytest.mark.parametrize("name", list(recipes.NAMES))
def test_every_recipe_says_its_name_and_parses(name):
    c = parse([name, "--optim.lr", "3e-4", "--student.layers", "0", "3"])
    assert c.recipe == name
    assert c.optim.lr == 3e-4
    assert c.student.layers == (0, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.lr", "5"], "must be in (0, 1), got 5.0"),
        (["--loss.temperature", "0"], "must be above 0, got 0"),
        (["--loss.kd", "-1"], "must be 0 or more"),
        (["--batch.token-budget", "100"], "multiple of 64"),
        (["--batch.size", "0"], "must be 1 or more"),
        (["--masking.fraction", "0.9"], "must be in [0, 0.4]"),
        (["--masking.keep", "0.6", "--masking.random", "0.6"], "at most 1 together"),
        (["--optim.duration", "1.5", "--optim.unit", "updates"], "whole number"),
        (["--student.dropout", "1"], "must be in [0, 1)"),
        (["--log.every", "0"], "must be a time (30s, 15min, 1.5h) or a number of updates (1 or more), got 0"),
        (["--log.every", "0.0s"], "or a number of updates (1 or more), got '0.0s'"),
        (["--log.validate-every", "15m"], "--log.validate-every must be a time (30s, 15min, 1.5h)"),
        (["--log.checkpoint-every", "-5min"], "got '-5min'"),
        (["--log.checkpoint-every", "2.5"], "got '2.5'"),
        (["--log.to", "auto", "wandb"], "--log.to must be auto, none, or one or more of tensorboard wandb mlflow"),
        (["--max-hours", "0"], "--max-hours must be above 0, got 0"),
        (["--seed", "-3"], "must be in [0, 2^32)"),
        (["--engine.zero-stage", "4"], "4"),
        (["--student.num-layers", "3", "--student.layers", "0", "1"], "must be 3 numbers"),
    ],
)
def test_bad_values_say_what_was_wanted(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["distilbert", *args])


@pytest.mark.parametrize(
    ("word", "updates", "seconds"),
    [("10", 10, math.inf), ("30s", math.inf, 30), ("15min", math.inf, 900), ("1.5h", math.inf, 5400)],
)
def test_an_interval_is_updates_or_a_time(word, updates, seconds):
    c = parse(["distilbert", "--log.every", word])
    assert config.updates_and_seconds(c.log.every) == (updates, seconds)
    again = config.from_json(json.loads(json.dumps(config.to_json(c))))
    assert again == c


def test_defaults_are_times_and_the_intervals_of_older_runs_are_read():
    defaults = config.to_json(recipes.named("distilbert"))
    assert [defaults["log"][name] for name in ("every", "checkpoint_every", "validate_every")] == [
        "30s",
        "15min",
        "30min",
    ]
    saved = defaults | {"log": defaults["log"] | {"every": 10, "validate_every": 500, "checkpoint_every": 500}}
    assert config.from_json(saved).log.every == 10
    assert config.resume_differences(saved, defaults) == []
    for wrong in (["30s"], 2.5, {"s": 30}):
        with pytest.raises(ValueError, match="this is no configuration of a run"):
            config.from_json(defaults | {"log": defaults["log"] | {"every": wrong}})


def test_no_option_of_ours_is_taken_by_torchrun():
    """argparse looks at every word for its own options and their beginnings: `--run` would be refused as ambiguous."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    theirs = list(parser._option_string_actions)
    ours = {"--" + n.replace("_", "-") for n in config.flatten(config.to_json(recipes.named("distilbert")))}
    taken = {o for o in ours for t in theirs if t.startswith(o)}
    assert not taken


def seconds_and_output(*args):
    # user time of the child does not depend on what else the machine is doing
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    words = [sys.executable, "-X", "importtime", "-m", *args]
    done = subprocess.run(words, capture_output=True, text=True, env=launch.ENVIRONMENT)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(wall, cpu), done


@pytest.mark.parametrize(
    "args",
    [
        ("fastdistil.pretrain", "--help"),
        ("fastdistil.pretrain", "distilbert", "--optim.lrr", "1"),
        ("fastdistil.pretrain", "distilbert", "--data.shards", "nowhere"),
        ("fastdistil.export", "--help"),
        ("fastdistil.export", "nowhere", "--out", "x"),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_come_before_torch(args):
    bound, taken = 0.75, []  # half a second, and what -X importtime itself costs
    while len(taken) < 3 and min(taken, default=bound) >= bound:  # the machine may have been busy
        seconds, done = seconds_and_output(*args)
        taken.append(seconds)
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        assert len(lines) > 50
        assert "torch" not in {line.split("|")[-1].strip().split(".")[0] for line in lines}
        assert done.returncode == (0 if "--help" in args else 2)
    assert min(taken) < bound


def test_the_configuration_of_an_older_run_is_read():
    """Which had log.tensorboard in the place of log.to."""
    saved = config.to_json(recipes.named("distilbert"))
    del saved["log"]["to"], saved["max_hours"]
    saved["log"]["tensorboard"] = False
    assert config.from_json(saved) == recipes.named("distilbert")
    assert config.resume_differences(saved, config.to_json(recipes.named("distilbert"))) == []


def test_a_resumed_run_may_change_what_computes_nothing_and_nothing_else():
    base = recipes.named("distilbert")
    saved = config.to_json(base)
    changes = {"resume": "auto", "log__every": 3, "data__num_workers": 0, "engine__zero_stage": 3, "out": "elsewhere"}
    changes |= {"max_hours": 2.5, "log__to": ("wandb", "mlflow")}
    free = parse(["distilbert", *launch.options(**changes)])
    assert config.resume_differences(saved, config.to_json(free)) == []
    changes = {"optim__lr": 1e-4, "seed": 7, "engine__precision": "bf16", "engine__attention": "sdpa"}
    bound = parse(["distilbert", *launch.options(**changes)])
    assert config.resume_differences(saved, config.to_json(bound)) == [
        "--engine.attention: was 'auto', now 'sdpa'",
        "--engine.precision: was 'auto', now 'bf16'",
        "--optim.lr: was 0.0005, now 0.0001",
        "--seed: was 56, now 7",
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"data__shards": "a", "teacher__path": "teacher"}, {"data__shards": "/b", "teacher__path": "teachers/1"}, []),
        ({"data__validation": "a"}, {"data__validation": "b"}, []),
        ({}, {"data__validation": "b"}, ["--data.validation: was None, now 'b'"]),
        ({"student__init": "models/a"}, {"student__init": "models/b"}, []),
        ({"student__init": "models/a"}, {}, ["--student.init: was 'models/a', now 'teacher'"]),
        ({"optim__duration": 3}, {"optim__duration": 3.5}, []),
        (
            {"optim__duration": 3},
            {"optim__duration": 2},
            ["--optim.duration: was 3.0, now 2.0 (a run can be made longer, not shorter)"],
        ),
        (
            {"optim__duration": 3},
            {"optim__duration": 9, "optim__unit": "updates"},
            ["--optim.unit: was 'epochs', now 'updates'"],
        ),
    ],
)
def test_paths_are_free_at_a_resume_and_a_duration_may_grow(before, after, said):
    one, other = (config.to_json(parse(["distilbert", *launch.options(**x)])) for x in (before, after))
    assert config.resume_differences(one, other) == said


class TestGoingOnWithARun:
    """--resume auto and an --out that holds a run: what is not given is as the run has it."""

    @pytest.fixture
    def run(self, tmp_path):
        given = {"optim__lr": 1e-4, "data__shards": "wiki", "log__every": 7, "profile": "2:3"}
        made = parse(["quickstart", *launch.options(**given)])
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text(json.dumps({"config": config.to_json(made), "student": {}}))
        return tmp_path / "run"

    @pytest.mark.parametrize("recipe", [["quickstart"], ["distilbert"], []])
    def test_its_own_recipe_counts(self, run, recipe, caplog):
        caplog.set_level("WARNING", "fastdistil")
        c = parse([*recipe, "--resume", "auto", f"--out={run}", "--log.every", "3"])
        assert (c.recipe, c.optim.lr, c.batch.size, c.data.shards) == ("quickstart", 1e-4, 8192, ("wiki",))
        assert (c.out, c.resume, c.log.every, c.profile) == (run, "auto", 3, None)
        assert caplog.messages == [f"going on with the run in {run}, whose recipe is quickstart, not distilbert"] * (
            recipe == ["distilbert"]
        )

    def test_in_the_folder_that_the_recipe_names(self, run, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        run.rename(tmp_path / "runs/quickstart")
        assert parse(["quickstart", "--resume=auto"]).optim.lr == 1e-4

    def test_not_without_resume_and_not_where_there_is_none(self, run, tmp_path):
        assert parse(["distilbert", "--out", str(run)]).optim.lr == 5e-4
        assert parse(["distilbert", "--out", str(tmp_path / "new"), "--resume", "auto"]).optim.lr == 5e-4
        with pytest.raises(ValueError, match="the recipe comes first"):
            parse(["--out", str(tmp_path / "new"), "--resume", "auto"])

    def test_a_mistake_is_a_mistake_there_too(self, run):
        with pytest.raises(ValueError, match=r"there is no --optim\.lrr"):
            parse(["--resume", "auto", "--out", str(run), "--optim.lrr", "1"])
        (run / "config.json").write_text("{")
        with pytest.raises(ValueError, match="is not a run's configuration"):
            parse(["--resume", "auto", "--out", str(run)])
