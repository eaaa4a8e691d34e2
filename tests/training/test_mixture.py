"""Several teachers: one update against plain transformers, what is refused, and runs from the command line to the card.

A BERT 32 wide and a DistilBERT 24 wide teach, of 4 and 2 layers and one vocabulary.
"""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

import fastdistil
from fastdistil import replay, report
from fastdistil.export import write_hugging_face_folder
from fastdistil.kernels.mixture import running_shares
from fastdistil.model.weights import load_masked_lm
from fastdistil.run import config as c
from fastdistil.run import recipes
from fastdistil.run.ranks import Ranks
from fastdistil.training import forecast, memory
from fastdistil.training import teacher as teachers
from fastdistil.training.objective import SUMS, Objective, means
from fastdistil.training.precision import require_small_drift
from fastdistil.training.preflight import Resolved, resolve
from fastdistil.training.teacher import Teacher
from tests.support import authors, forked, toy
from tests.support.runs import arguments, exact_metrics, metrics_of, same_ends, take_head_away
from tests.support.updates import DEVICE, gradients_of, make_batches, make_student, make_teacher

WEIGHTS = (2.0, 1.0)
ORDERS = [("teacher", "narrow"), ("narrow", "teacher")]
NO_COSINE = c.LossConfig(cosine=0.0)
"""The widths of the narrow teacher and of the student differ."""


def mixed(folder, names=ORDERS[0], weights=WEIGHTS, dtype=torch.float32) -> Teacher:
    """The first of these teachers, with the others in its mixture."""
    settings = {"device": DEVICE, "dtype": dtype}
    first, *others = (load_masked_lm(folder / name, need_head=True) for name in names)
    others = [Teacher(model, **settings) for model in others]
    return Teacher(first, **settings, others=others, shares=running_shares(weights))


def one_update(folder, teacher: Teacher, loss: c.LossConfig, micro_batches: int = 4):
    """(reported losses, gradients by Hugging Face's names)."""
    update, batches = make_batches(folder, micro_batches)
    objective, sums = Objective(make_student(folder, loss=loss), loss), torch.zeros(len(SUMS), device=DEVICE)
    for batch in batches:
        part, more = objective(batch, teacher(batch))
        part.backward()
        sums += more
    return means(sums.tolist(), update.counts, loss), gradients_of(objective.student)


@pytest.mark.gpu
@pytest.mark.parametrize("kd_rows", ["all", "masked"])
@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_one_update_equals_plain_transformers(folder, names, kd_rows):
    """In fp64, with whole logits, and the probabilities averaged; the order decides whose hidden states count."""
    _, batches = make_batches(folder, 4)
    with_cosine = names[0] == "teacher"
    loss = c.LossConfig(kd_rows=kd_rows, cosine=float(with_cosine), temperature=3.0)
    # transformers' cosine of two widths would be an error, so it is taken of a teacher that does not count.
    first, weights = (names[0], (5.0, 2.0, 1.0)) if with_cosine else ("teacher", (5.0, 2.0, 0.0))
    others = [(folder / "narrow", 0.5 if with_cosine else 2.0)]
    terms, exact = authors.one_update(
        folder / first, folder / "student", batches, temperature=3.0, weights=weights,
        restrict_ce_to_mask=kd_rows == "masked", others=others,
    )  # fmt: skip
    losses, gradients = one_update(folder, mixed(folder, names), loss)
    for name in ("kd", "mlm", "cosine")[: 2 + with_cosine]:
        assert losses[name] == pytest.approx(terms[name], rel=1e-4), name
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where
    alone, _ = one_update(folder, make_teacher(folder), c.LossConfig(kd_rows=kd_rows, temperature=3.0))
    assert abs(alone["kd"] / losses["kd"] - 1) > 1e-3  # so that the second teacher is seen


@pytest.mark.gpu
def test_a_teacher_mixed_with_itself_is_the_teacher_alone(folder):
    """Within some roundings of fp32: the logarithms of its probabilities stand for its logits."""
    twice, gradients = one_update(folder, mixed(folder, ("teacher", "teacher", "teacher"), (1, 2, 3)), c.LossConfig())
    alone, wanted = one_update(folder, make_teacher(folder), c.LossConfig())
    assert twice == pytest.approx(alone, rel=1e-5)
    error, where = authors.worst_relative_error(gradients, {n: g.double().cpu() for n, g in wanted.items()})
    assert error < 1e-5, where


def test_each_teacher_is_looked_at(folder, monkeypatch, caplog):
    """Its own masked-LM loss and its own drift, by its path; one that knows nothing is refused by its option."""
    monkeypatch.setattr(teachers, "KNOWS_NOTHING", 1e9)
    _, batches = make_batches(folder, 2)
    paths = c.TeacherConfig(path=folder / "teacher", others=(folder / "narrow",))
    config, alone = c.Config(teacher=paths), Ranks(0, 1, DEVICE)
    with caplog.at_level(logging.INFO, "fastdistil"):
        teachers.require_knowledge(mixed(folder), config, batches, alone)
        require_small_drift(mixed(folder, dtype=torch.bfloat16), paths, batches, alone, vocab_size=101)
        for name in ORDERS[0]:
            one = c.Config(teacher=c.TeacherConfig(path=folder / name))
            teachers.require_knowledge(mixed(folder, (name,), (1,)), one, batches, alone)
            low = mixed(folder, (name,), (1,), torch.bfloat16)
            require_small_drift(low, one.teacher, batches, alone, vocab_size=101)
    of_both, of_first, of_second = caplog.messages[:4], caplog.messages[4:6], caplog.messages[6:]
    wanted = [*zip(of_first, of_second, strict=True)]
    paths_of_both = [f"teacher {folder / name}" for name in ORDERS[0]] * 2
    unnamed = [said.replace(path, "teacher") for said, path in zip(of_both, paths_of_both, strict=True)]
    assert unnamed == [*wanted[0], *wanted[1]]
    assert all(said.startswith(path) for said, path in zip(of_both, paths_of_both, strict=True))
    monkeypatch.setattr(teachers, "KNOWS_NOTHING", -1.0)
    monkeypatch.setattr(teachers, "TOY_VOCABULARY", 0)
    with pytest.raises(ValueError, match=r"^--teacher.path .*/teacher knows nothing"):
        teachers.require_knowledge(mixed(folder), config, batches, alone)
    low = mixed(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^--teacher.precision bf16 wants a teacher .*/teacher within 1.0e-08 nats"):
        require_small_drift(low, replace(paths, max_drift=1e-8), batches, alone, vocab_size=101)


# --- what is refused, and what a run will be


def config(folder, *others, loss: c.LossConfig = NO_COSINE, **teacher) -> c.Config:
    return replace(
        recipes.named("distilbert"),
        out=folder / "run",
        data=c.DataConfig(shards=(str(folder / "shards"),)),
        batch=c.BatchConfig(size=40, token_budget=256),
        teacher=c.TeacherConfig(path=folder / "teacher", others=tuple(folder / name for name in others), **teacher),
        loss=loss,
    )


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"weights": (1.0,)}, r"--teacher.weights must be left out without --teacher.others, got \(1.0,\)"),
        ({"others": ("a",), "weights": (1.0,)}, r"--teacher.weights must be 2 numbers, one a teacher, got \(1.0,\)"),
        ({"others": ("a",), "weights": (1.0, 0.0)}, r"--teacher.weights must be numbers above 0, got \(1.0, 0.0\)"),
        ({"others": ("a",), "weights": (1.0, float("inf"))}, r"--teacher.weights must be numbers above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(teacher, message):
    with pytest.raises(ValueError, match=message):
        c.TeacherConfig(**teacher)


def test_others_without_the_term_that_compares_distributions(folder):
    for given in (
        config(folder, "narrow", loss=c.LossConfig(kd=0.0)),
        replace(
            config(folder, "narrow"),
            teacher=c.TeacherConfig(others=(folder / "narrow",)),
            loss=c.LossConfig(kd=0, cosine=0),
        ),
    ):
        with pytest.raises(ValueError, match=r"--teacher.others .*narrow has no effect without --teacher.path and a"):
            resolve(given, world_size=1)


def test_teachers_of_another_vocabulary_or_without_a_head(folder, tmp_path):
    """Distributions over other words cannot be averaged, whatever the architecture; hidden states alone neither."""
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "narrow" / "tokenizer.json").unlink()  # its vocab.txt is simple to edit
    words = root / "narrow" / "vocab.txt"
    words.write_text(words.read_text().replace("w17\n", "v17\n"))
    reason = "distributions are averaged word by word, which wants one vocabulary for all teachers: leave this one out"
    with pytest.raises(ValueError, match=rf"^--teacher.others .*has a tokenizer with hash .* the shards .*: {reason}"):
        resolve(config(root, "narrow"), world_size=1)
    take_head_away(shutil.copytree(root / "teacher", root / "headless"))
    with pytest.raises(ValueError, match=r"^--teacher.others: .*masked-LM head"):
        resolve(config(root, "headless"), world_size=1)
    others = {"teacher.others": [root / "headless"]}  # from Python, before a text is read
    with pytest.raises(ValueError, match=r"^--teacher.others: .*masked-LM head"):
        fastdistil.distil(root / "teacher", ["w1 w2"], out=root / "out", **others)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--teacher.others: not a Hugging Face folder"):
        resolve(config(root, "nowhere"), world_size=1)
    short = toy.steep(toy.architecture(max_positions=40), seed=3)
    (root / "short").mkdir()
    write_hugging_face_folder(short.state_dict(), short.architecture, root / "shards" / "tokenizer", root / "short")
    with pytest.raises(ValueError, match=r"sequences of up to 48 tokens, the teacher .*short reads 40"):
        resolve(config(root, "short"), world_size=1)


def test_a_dry_run_counts_every_teacher(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one, two, both = (
        resolve(x, world_size=1)
        for x in (
            config(folder),
            replace(config(folder), teacher=c.TeacherConfig(path=folder / "narrow")),
            config(folder, "narrow", weights=(3.0, 1.0)),
        )
    )
    flops = [resolved.flops_per_token(lambda _window: 20.0) for resolved in (one, two, both)]
    assert flops[2].teacher == flops[0].teacher + flops[1].teacher
    assert flops[2].student == flops[0].student
    rows = [*forecast._models(both)]
    assert [name for name, _ in rows] == ["teacher", "teacher", "student", "mixture"]
    assert rows[1][1].endswith(f"from {folder / 'narrow'}")
    assert rows[3][1] == "of the teachers' distributions, 3 : 1"

    def held(resolved: Resolved, device: str) -> dict[str, int]:
        return memory.predict(resolved, device=torch.device(device), device_bytes=2**34).parts

    weights = [memory._num_elements(resolved.teacher) * 4 for resolved in (one, two) if resolved.teacher]
    handed = 256 * 24 * 4  # what the head of the second makes
    assert held(both, "cpu")["teacher"] == held(one, "cpu")["teacher"] + weights[1] + handed
    assert held(both, "cpu")["loss"] > held(one, "cpu")["loss"]


# --- runs


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A short run of two teachers in one go; its last words."""
    run = tmp_path_factory.mktemp("two") / "run"
    return run, forked.run(*words(folder, run))


def words(folder, run, **changes) -> list[str]:
    """A run of six updates of three micro-batches, by a BERT that counts twice what the DistilBERT does."""
    fixed = {"optim__duration": 6, "engine__threads": 1, "log__every": 1, "log__checkpoint_every": 2}
    mixture = ["--teacher.others", str(folder / "narrow"), "--teacher.weights", "2", "1"]
    return [*arguments(folder, run, **fixed | changes), *mixture]


def test_a_run_learns_from_both_and_says_so(run, folder, tmp_path):
    """Losses unlike those of one teacher; the log, the record, the card and the report name both."""
    run, done = run
    assert f"from {folder / 'narrow'}" in done.stdout
    assert "mixture: of the teachers' distributions, 2 : 1" in done.stdout
    assert len(metrics_of(run)) > 6
    record = json.loads((run / "config.json").read_text())
    assert [other["hidden_size"] for other in record["others"]] == [24]
    assert record["inputs"]["teacher.others"] != record["inputs"]["teacher.path"]
    exported = forked.run("fastdistil.export", run, "--out", tmp_path / "student")
    assert exported.returncode == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert "other teachers | `narrow`, 2 layers, 24 wide" in card
    assert "All distributions are averaged, 2 : 1" in card
    read = report.read("two", run)
    assert "teacher teacher + narrow" in report.about(read)
    said = report.verdict(read, report.ReportConfig(runs=(run,)))
    assert "The student agrees with the mixture of its teachers on" in said


def test_it_goes_on_bit_for_bit_and_only_with_the_same_teachers(run, folder, tmp_path, capsys):
    """Stopped in the middle; the others may lie elsewhere, and are known by their contents."""
    straight, stopped = run[0], tmp_path / "run"
    forked.run(*words(folder, stopped), stop_at="update 3/6")
    assert 3 <= metrics_of(stopped)[-1]["update"] < 6
    moved = shutil.copytree(folder, tmp_path / "moved")
    for changes, message in (
        (["--teacher.weights", "1", "1"], "--teacher.weights: was [2.0, 1.0], now [1.0, 1.0]"),
        (["--teacher.others", str(folder / "same")], "is not the model that the run in"),
        (["--teacher.others", str(folder / "same"), str(folder / "same")], "--teacher.weights must be 3 numbers"),
    ):
        refused = forked.run(*words(folder, stopped, resume="auto"), *changes, ok=False)
        assert refused.returncode == 2
        assert message in refused.stderr
    forked.run(*words(moved, stopped, resume="auto"))
    assert exact_metrics(stopped) == exact_metrics(straight)
    same_ends(stopped, straight)
    assert replay.main([str(stopped), "--update", "6", "--teacher", str(folder / "teacher")]) == 0
    assert "0 of 3 micro-batches of update 6 are not finite" in capsys.readouterr().out


def test_every_engine_and_a_teacher_rank_give_the_same_losses(run, folder, tmp_path):
    """On two ranks at every ZeRO stage, and with both teachers on a third: bit for bit what each rank makes itself."""
    wanted = [line["loss"] for line in metrics_of(run[0]) if line["split"] == "train"]
    for stage in range(4):
        forked.run(*words(folder, tmp_path / str(stage), engine__zero_stage=stage), ranks=2)
        losses = [line["loss"] for line in metrics_of(tmp_path / str(stage)) if line["split"] == "train"]
        assert losses == pytest.approx(wanted, rel=1e-4), stage
    done = forked.run(*words(folder, tmp_path / "apart", engine__zero_stage=1, teacher__ranks=1), ranks=3)
    assert "teacher: on 1 rank(s) of its own" in done.stdout
    assert exact_metrics(tmp_path / "apart") == exact_metrics(tmp_path / "1")
    same_ends(tmp_path / "apart", tmp_path / "1")
