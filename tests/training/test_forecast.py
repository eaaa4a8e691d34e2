"""What --dry-run says is what the run then does; nothing is written, and mistakes are refused as in a run."""

import json
import re
from dataclasses import replace

import pytest
import torch

from fastdistil.run import config as c
from fastdistil.run import recipes
from fastdistil.training import forecast, inputs
from fastdistil.training.preflight import resolve
from tests.support import launch, toy


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("dry_run")
    toy.make_teacher(root / "teacher", toy.make_shards(root / "shards", num_sequences=400))
    for weights in (root / "teacher").glob("*.safetensors"):
        weights.unlink()  # none are read
    return root


@pytest.fixture
def config(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a laptop
    monkeypatch.setattr(forecast, "STEP_RESULTS", root / "none")
    return replace(
        recipes.distilbert(),
        dry_run=True,
        out=root / "run",
        data=c.DataConfig(shards=root / "shards"),
        batch=c.BatchConfig(size=40, token_budget=256),
        teacher=c.TeacherConfig(path=root / "teacher"),
    )


def rows(config: c.Config, world_size: int = 1) -> dict[str, str]:
    resolved = resolve(config, world_size=world_size)
    lines = forecast.report(resolved, world_size=world_size).splitlines()
    return {name.strip(): value for name, value in (re.split(r"  +", x.lstrip(), maxsplit=1) for x in lines)}


def test_the_command(root):
    words = launch.options(
        data__shards=root / "shards", teacher__path=root / "teacher", out=root / "run",
        batch__size=40, batch__token_budget=64, world_size=8,
    )  # fmt: skip
    before = sorted(root.rglob("*"))
    done = launch.run("fastdistil.pretrain", "distilbert", "--dry-run", *words)
    assert re.search(r"^ranks +8 x .*, bfloat16$", done.stdout, re.M)
    assert re.search(r"^hours +\S+ of arithmetic, at ", done.stdout, re.M)
    assert sorted(root.rglob("*")) == before
    refused = launch.run("fastdistil.pretrain", "distilbert", *words, ok=False)
    assert refused.returncode == 2
    assert "--world-size 8 has no effect without --dry-run" in refused.stderr


def test_updates_and_tokens_are_those_of_the_run(config):
    resolved = resolve(config, world_size=1)
    text = inputs.load_text(resolved, rank=0, world_size=1)
    said = rows(config)
    assert said["updates"] == f"{text.num_updates:,}"
    tokens = sum(text.plan.update(u).num_tokens for u in range(text.num_updates))
    updates, tokens_per_update, _ = forecast._length(resolved, text.plan)
    assert updates * tokens_per_update == pytest.approx(tokens, rel=0.02)  # the last micro-batches
    assert said["student"].startswith(f"{resolved.student.num_parameters:,} parameters (2 layers")


def test_a_large_corpus_is_estimated_from_a_sample(config, monkeypatch):
    exact = rows(config)
    monkeypatch.setattr(forecast, "EXACT_SEQUENCES", 600)
    about = rows(config)
    assert about["updates"].startswith("about ")
    assert int(about["updates"].split()[1]) == pytest.approx(int(exact["updates"]), rel=0.1)


def test_messages_of_every_stage(config):
    """Stages 2 and 3 communicate in every micro-batch, here two a rank."""
    size = replace(config, world_size=2, batch=c.BatchConfig(size=1024, unit="tokens", token_budget=256))  # fmt: skip
    said = rows(size, world_size=2)
    times = [re.findall(r"(\d) x", said[name]) for name in sorted(said) if name.startswith("mess")]
    assert times == [["1", "0"], ["1", "1"], ["2", "1"], ["2", "2"]]
    assert "messages, ZeRO 1 (this run)" in said


def test_hours_are_measured_or_said_to_be_assumed(config, monkeypatch, tmp_path):
    cluster = replace(config, world_size=2)
    assumed = rows(cluster, world_size=2)["hours"]
    assert "at 50% (assumed, not measured) of 989 TFLOP/s a rank (H100, dense bf16" in assumed
    record = {"device": "NVIDIA H100 80GB HBM3", "commit": "c0ffee", "providers": {"fastdistil": {"mfu": 0.25}}}  # fmt: skip
    monkeypatch.setattr(forecast, "STEP_RESULTS", tmp_path)
    (tmp_path / "step.nvidia-h100.json").write_text(
        json.dumps({"bert-base bf16, 1 x": record, "bert-base fp32, 1 x": record})
    )
    measured = rows(cluster, world_size=2)["hours"]
    assert "at 25% (measured: bert-base bf16, 1 x, NVIDIA H100 80GB HBM3, commit c0ffee)" in measured  # fmt: skip
    hours = [float(line.split()[0]) for line in (assumed, measured)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01)


def test_what_cannot_fit_is_refused(config):
    huge = replace(config, world_size=1, batch=c.BatchConfig(size=10**10, unit="tokens", token_budget=64 * 10**7))  # fmt: skip
    with pytest.raises(ValueError, match=r"a rank of this run needs .* use --batch.token-budget \d+ or less"):  # fmt: skip
        rows(huge)


def test_a_world_of_no_rank(config):
    with pytest.raises(ValueError, match="--world-size must be 1 or more, got 0"):
        resolve(replace(config, world_size=0), world_size=1)
