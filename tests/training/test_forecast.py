"""What --dry-run says is what the run then does; nothing is written, and mistakes are refused as in a run."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch

from fastdistil.run import config as c
from fastdistil.run import console, recipes
from fastdistil.training import forecast, inputs
from fastdistil.training.preflight import resolve
from tests.support import forked
from tests.support.launch import options


@pytest.fixture(scope="module")
def bare(root, tmp_path_factory):
    """The toy corpus and a teacher whose weights are a hole behind their header: none are read."""
    copy = shutil.copytree(root, tmp_path_factory.mktemp("bare"), dirs_exist_ok=True)
    path = copy / "teacher/model.safetensors"
    size, length = path.stat().st_size, int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, 8 + length)
    os.truncate(path, size)
    return copy


@pytest.fixture
def config(bare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a laptop
    monkeypatch.setattr(forecast, "STEP_RESULTS", bare / "none")
    return replace(
        recipes.named("distilbert"),
        dry_run=True,
        out=bare / "run",
        data=c.DataConfig(shards=(str(bare / "shards"),)),
        batch=c.BatchConfig(size=40, token_budget=256),
        teacher=c.TeacherConfig(path=bare / "teacher"),
    )


def rows(config: c.Config, world_size: int = 1) -> dict[str, str]:
    lines = console.lines(forecast.report(resolve(config, world_size=world_size)), width=400)
    return {name.strip(): value for name, value in (re.split(r"  +", x.lstrip(), maxsplit=1) for x in lines)}


def test_the_command(bare):
    words = options(
        data__shards=bare / "shards",
        teacher__path=bare / "teacher",
        out=bare / "run",
        batch__size=40,
        batch__token_budget=64,
        world_size=8,
    )
    before = sorted(bare.rglob("*"))
    done = forked.run("fastdistil.pretrain", "distilbert", "--dry-run", *words)
    assert re.search(r"^ranks +8 x .*, bfloat16$", done.stdout, re.M)
    assert re.search(r"^hours +\S+ of arithmetic, at ", done.stdout, re.M)
    assert sorted(bare.rglob("*")) == before
    refused = forked.run("fastdistil.pretrain", "distilbert", *words, ok=False)
    assert refused.returncode == 2
    assert "--world-size 8 has no effect without --dry-run" in refused.stderr


def test_updates_and_tokens_are_those_of_the_run(config):
    resolved = resolve(config, world_size=1)
    corpus = inputs.load_corpus(resolved, rank=0, world_size=1)
    said = rows(config)
    assert said["updates"] == f"{corpus.num_updates:,}"
    tokens = sum(corpus.plan.update(u).num_tokens for u in range(corpus.num_updates))
    updates, tokens_per_update, _ = forecast._length(resolved, corpus.plan)
    assert updates * tokens_per_update == pytest.approx(tokens, rel=0.02)  # the last micro-batches
    assert said["student"].startswith(f"{resolved.student.num_parameters:,} parameters (2 layers")


@pytest.mark.parametrize(
    ("batch", "optim", "said"),
    [
        ({"size": 10**5}, {"duration": 1}, "one update trains nothing, since it is all warm-up, whose first rate is 0"),
        ({"size": 10**5}, {"duration": 1, "warmup": 0.0}, "1 updates are few: lower --batch.size 100000 sequences"),
        ({"size": 10**5}, {"duration": 1, "unit": "updates"}, "one update trains nothing"),
        ({"size": 10**5}, {"duration": 2, "unit": "updates"}, None),  # as asked for
        ({"size": 8}, {"duration": 10}, None),
    ],
)
def test_too_little_text_is_said_before_the_run_and_in_it(config, caplog, batch, optim, said):
    config = replace(config, batch=replace(config.batch, **batch), optim=replace(config.optim, **optim))
    resolved = resolve(config, world_size=1)
    warnings = [value for name, value in forecast._rows(resolved) if name == "warning"]
    assert any((said or "updates") in warning for warning in warnings) == bool(said)
    corpus = inputs.load_corpus(resolved, rank=0, world_size=1)
    assert list(forecast._warnings(resolved, corpus.plan, corpus.num_updates)) == warnings


def test_what_layers_see_and_which_they_were(config, modern):
    taught = replace(config, teacher=c.TeacherConfig(path=modern / "teacher"))
    said = dict(forecast._models(resolve(taught, world_size=1)))
    windows = "see everything, the others 8 tokens on either side"
    assert f" parameters (4 layers, 32 wide; 0 3 {windows}) from " in said["teacher"]
    assert f" parameters (2 layers, 32 wide; 0 {windows}) from layers 0 2 of " in said["student"]


def test_a_large_corpus_is_estimated_from_a_sample(config, monkeypatch):
    exact = rows(config)
    monkeypatch.setattr(forecast, "EXACT_SEQUENCES", 600)
    about = rows(config)
    assert about["updates"].startswith("about ")
    assert int(about["updates"].split()[1]) == pytest.approx(int(exact["updates"]), rel=0.1)


def test_messages_of_every_stage(config):
    """Stages 2 and 3 communicate in every micro-batch, here two a rank."""
    size = replace(config, world_size=2, batch=c.BatchConfig(size=1024, unit="tokens", token_budget=256))
    said = rows(size, world_size=2)
    times = [re.findall(r"(\d) x", said[name]) for name in sorted(said) if name.startswith("mess")]
    assert times == [["1", "0"], ["1", "1"], ["2", "1"], ["2", "2"]]
    assert "messages, ZeRO 1 (this run)" in said


def test_hours_are_measured_or_said_to_be_assumed(config, monkeypatch, tmp_path):
    cluster = replace(config, world_size=2)
    assumed = rows(cluster, world_size=2)["hours"]
    assert "at 50% (assumed, not measured) of 989 TFLOP/s a rank (H100, dense bf16" in assumed
    providers = {"fastdistil": {"mfu": 0.30, "tokens_per_s": 600.0, "sustained": 500.0}}
    record = {"device": "NVIDIA H100 80GB HBM3", "commit": "c0ffee", "providers": providers}
    monkeypatch.setattr(forecast, "STEP_RESULTS", tmp_path)
    failed = [record | {"providers": {"fastdistil": row}} for row in ({"error": "out of memory"}, {"mfu": None})]
    names = ("bf16, 1 x", "fp32, 1 x", "bf16, 2 x", "bf16, 3 x", "bf16, 4 x")
    records = (record, record, *failed, record | {"providers": {"HF eager": {"mfu": 0.1}}})
    kept = {f"bert-base {name}": found for name, found in zip(names, records, strict=True)}
    (tmp_path / "step.nvidia-h100.json").write_text(json.dumps(kept))
    measured = rows(cluster, world_size=2)["hours"]
    assert "at 25% (measured: bert-base bf16, 1 x, NVIDIA H100 80GB HBM3, commit c0ffee)" in measured
    hours = [float(line.split()[0]) for line in (assumed, measured)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01)


def test_hours_are_those_of_the_device_that_all_wait_for(config):
    """Places that stay empty and teachers that many students ask cost what they cost."""
    size = c.BatchConfig(size=1024, unit="tokens", token_budget=256)  # 4 micro-batches an update
    text = replace(config, batch=size, optim=c.OptimConfig(duration=10**9, unit="updates"))

    def hours(num_ranks: int, **teacher: object) -> tuple[float, dict[str, str]]:
        asked = replace(text, world_size=num_ranks, teacher=replace(config.teacher, **teacher))
        said = rows(asked, world_size=num_ranks)
        return float(said["hours"].split()[0]), said

    resolved = resolve(replace(text, world_size=4), world_size=4)
    attended = inputs.load_corpus(resolved, rank=0, world_size=1).attended
    total = resolved.flops_per_token(attended).total
    teacher = resolved.flops_per_token(attended, with_heads=False).teacher
    four, said = hours(4)
    assert said["an update"] == "4 micro-batches of 256 tokens, 1 a rank"
    three, said = hours(3)
    assert said["an update"] == "4 micro-batches of 256 tokens, 2 a rank, 2 of 6 places empty"
    assert three == pytest.approx(2 * four, rel=0.01)
    of_one, said = hours(5, ranks=1)  # four students ask one teacher
    assert said["ranks"].startswith("5 x H100")
    assert of_one / four == pytest.approx(max(4 * teacher, total - teacher) / total, rel=0.01)
    apart, said = hours(4, device="second")
    assert said["ranks"].startswith("4 x 2 x H100")
    assert apart / four == pytest.approx(max(teacher, total - teacher) / total, rel=0.01)


def test_what_cannot_fit_is_refused(config):
    huge = c.BatchConfig(size=10**10, unit="tokens", token_budget=64 * 10**7)
    with pytest.raises(ValueError, match=r"a rank of this run needs .* use --batch.token-budget \d+ or less"):
        rows(replace(config, world_size=1, batch=huge))


def test_a_world_of_no_rank(config):
    with pytest.raises(ValueError, match="--world-size must be 1 or more, got 0"):
        resolve(replace(config, world_size=0), world_size=1)
