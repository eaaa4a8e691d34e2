"""Numbers that are not finite: skipped on all ranks, counted, in the end refused; and extremes that stay finite."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistil import replay
from fastdistil.kernels.cosine import cosine_loss
from fastdistil.kernels.distill import distill_loss
from fastdistil.run.folder import STACKS
from tests.support import forked
from tests.support.runs import arguments, metrics_of, status
from tests.workers import engine_worker


@pytest.mark.parametrize(("ranks", "stages"), [(None, (0,)), (2, (0, 1, 2, 3))])
def test_a_spoilt_update_changes_nothing_on_any_rank(folder, ranks, stages):
    results, *_ = forked.call(engine_worker.spoilt, folder, stages, ranks=ranks)
    assert len(results) == 2 * len(stages)
    for engine, result in results.items():
        finite = [math.isfinite(norm) for norm in result["norms"]]
        assert finite == [True, True, False, False, True], engine
        for one, other in (("before", "after"), ("on", "without")):
            assert result[one].keys() == result[other].keys()
            for name, value in result[one].items():
                assert torch.equal(value, result[other][name]), (engine, one, name)
        changed = (not torch.equal(v, result["after"][n]) for n, v in result["on"].items())
        assert any(changed), engine  # so that the comparisons above mean something


@pytest.mark.parametrize(("layer", "value"), [("layer.", 3e38), ("layer.1.", math.nan)])
def test_three_in_a_row_end_the_run_and_a_command_shows_why(root, tmp_path, layer, value):
    """A teacher whose weights overflow, in a file that is finite; one with NaN in a layer that the student has not."""
    broken, run = shutil.copytree(root / "teacher", tmp_path / "broken"), tmp_path / "run"
    spoil(broken, layer, value)
    words = arguments(
        root, run, teacher__path=broken, teacher__check="warn", log__every=1, engine__max_skipped=2, engine__threads=1
    )
    done = forked.run(*words, ok=False)
    assert done.returncode == 1
    assert "update 1 skipped: its gradient is not finite (1 so far)" in done.stdout
    command = f"python -m fastdistil.replay {run} --update 2"
    assert "updates 1 to 2 were not finite" in done.stderr
    assert command in done.stderr
    said = status(run)
    assert (said["state"], said["update"]) == ("failed", 2)
    assert command in said["reason"]
    lines = metrics_of(run)
    assert [line["skipped"] for line in lines] == [True, True]
    assert lines[0]["gradient_norm"] is None  # strict JSON has no NaN

    again = forked.run(*command.split()[2:], ok=False)
    assert again.returncode == 1, again.stderr
    assert "gradient norm nan" in again.stdout
    assert "teacher not finite: last hidden state" in again.stdout
    found = {line.strip() for line in again.stdout.splitlines() if "weights not finite" in line}
    assert found == ({"teacher's weights not finite: encoder.layers.1.ffn_in.weight"} if math.isnan(value) else set())
    assert "[CLS] w" in again.stdout or "[MASK]" in again.stdout  # the text
    assert "weights of update" not in again.stdout  # the checkpoint holds what the update met


def spoil(teacher, layer: str, value: float) -> None:
    file = teacher / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if layer in name and "intermediate.dense.weight" in name:
            tensor.fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of three updates, with a checkpoint after the second."""
    run = tmp_path_factory.mktemp("numbers") / "run"
    forked.run(*arguments(root, run, optim__duration=3, log__every=1, log__checkpoint_every=2, engine__threads=1))
    return run


def test_an_update_that_is_fine_is_replayed_with_its_own_numbers(finished):
    third = next(line for line in metrics_of(finished) if line["split"] == "train" and line["update"] == 3)
    done = forked.run("fastdistil.replay", finished, "--update", 3)  # by the checkpoint of 2, though there is one of 3
    assert "the run's were others" not in done.stdout
    parts = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert sum(parts) == pytest.approx(third["loss"], rel=1e-5)
    assert "0 of" in done.stdout.splitlines()[-1]


def test_a_moved_run_is_replayed_and_has_no_other_updates(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "moved")
    wrong = forked.run("fastdistil.replay", moved, "--update", 4, ok=False)
    assert wrong.returncode == 2
    assert "--update must be in [1, 3], got 4" in wrong.stderr


def test_a_run_says_what_became_of_it(finished):
    said = status(finished)
    assert (said["state"], said["update"], said["updates"]) == ("finished", 3, 3)
    assert not (finished / STACKS).exists()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_temperatures_and_logits_stay_finite(temperature, scale):
    generator = torch.Generator().manual_seed(0)
    teacher = scale * torch.randn(5, 101, generator=generator)
    student = (scale * torch.randn(5, 101, generator=generator)).requires_grad_()
    labels = torch.tensor([-100, 3, -100, 100, 0])
    result = distill_loss(student, teacher, labels, temperature=temperature, kd_scale=1.0, mlm_scale=1.0)
    result.loss.backward()
    p = (teacher.double() / temperature).softmax(-1)
    log_q = (student.detach().double() / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    expected = temperature**2 * (p * (log_p - log_q)).sum()
    expected += torch.nn.functional.cross_entropy(student.detach().double(), labels, reduction="sum")
    assert result.loss.item() == pytest.approx(
        expected.item(), rel=1e-4, abs=1e-4 + temperature**2 * 2**-22
    )  # a logarithm's rounding in fp32
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_no_masked_token_and_vectors_of_zeros_stay_finite():
    student, teacher, labels = torch.randn(4, 101).requires_grad_(), torch.randn(4, 101), torch.full((4,), -100)
    result = distill_loss(student, teacher, labels, temperature=2.0, kd_scale=0.0, mlm_scale=1.0)
    result.loss.backward()
    assert result.loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
    zeros = torch.zeros(4, 32, requires_grad=True)
    loss = cosine_loss(zeros, torch.randn(4, 32), num_rows=torch.tensor(4, dtype=torch.int32)).loss
    loss.backward()
    assert loss.isfinite()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize(
    ("checkpoint", "update", "same"),
    [(4, 5, True), (4, 4, True), (4, 3, True), (4, 2, False), (2, 5, True), (2, 3, True), (1, 3, False), (6, 5, False)],
)
def test_weights_are_the_updates_own_where_all_between_were_skipped(tmp_path, checkpoint, update, same):
    """Updates 3 and 4 of 6 were skipped."""
    lines = ({"split": "train", "update": u} | ({"skipped": True} if u in (3, 4) else {}) for u in range(1, 7))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = replay.ReplayConfig(run=tmp_path, update=update)
    assert replay._same_weights(asked, checkpoint) == same
