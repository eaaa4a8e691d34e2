"""Numbers that are not finite: skipped on every rank, counted, in the end refused; extreme ones that must stay finite."""

import json
import math
import shutil

import pytest
import torch

from fastdistil.kernels.cosine import cosine_loss
from fastdistil.kernels.distill import distill_loss
from fastdistil.run import folder as run_folder
from tests.support import launch, toy
from tests.support.launch import options
from tests.training.test_objective import folder  # noqa: F401 (a fixture)

WORKER = launch.ROOT / "tests" / "workers" / "numbers_worker.py"


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_spoilt_update_changes_nothing_on_any_rank(folder, tmp_path, ranks):  # noqa: F811
    launch.run(WORKER, folder, tmp_path / "out.pt", ranks=ranks, script=True, timeout_s=500)
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(results) == (2 if ranks is None else 8)
    for engine, result in results.items():
        finite = [math.isfinite(norm) for norm in result["norms"]]
        assert finite == [True, True, False, False, True], engine
        for one, other in (("before", "after"), ("on", "without")):
            assert result[one].keys() == result[other].keys()
            for name, value in result[one].items():
                assert torch.equal(value, result[other][name]), (engine, one, name)
        changed = (not torch.equal(v, result["after"][n]) for n, v in result["on"].items())
        assert any(changed), engine  # so that the comparisons above mean something


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    toy.make_shards(root / "shards")
    toy.make_teacher(root / "teacher", root / "shards")
    return root


def given(root, out, **changes):
    values = {
        "data__shards": root / "shards",
        "teacher__path": root / "teacher",
        "out": out,
        "optim__duration": 12,
        "optim__unit": "updates",
        "batch__size": 24,
        "batch__token_budget": 256,
        "data__num_workers": 0,
        "data__validation_sequences": 40,
        "log__every": 1,
        "student__num_layers": 2,
    }
    return options(**values | changes)


def test_three_in_a_row_end_the_run_and_a_command_shows_why(toy_folder, tmp_path):
    """A learning rate that no weights survive: the first step leaves finite ones, with which nothing finite can be computed."""
    words = given(toy_folder, tmp_path / "run", optim__lr=0.5, optim__warmup=0.0, optim__clip_norm=0, engine__max_skipped=2)  # fmt: skip
    broken = toy.make_teacher(tmp_path / "broken", toy_folder / "shards")
    enlarge(broken)
    done = launch.run("fastdistil.pretrain", "quickstart", *words, "--teacher.path", broken, ok=False)
    assert done.returncode == 1
    assert "update 1 skipped: its gradient is not finite (1 so far)" in done.stdout
    command = f"python -m fastdistil.replay {tmp_path / 'run'} --update 2"
    assert "updates 1 to 2 were not finite" in done.stderr
    assert command in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["update"]) == ("failed", 2)
    assert command in status["reason"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [True, True]
    assert lines[0]["gradient_norm"] is None  # strict JSON has no NaN

    again = launch.run(*command.split()[2:], ok=False)
    assert again.returncode == 1, again.stderr
    assert "gradient norm nan" in again.stdout
    assert "teacher not finite: last hidden state" in again.stdout
    assert "[CLS] w" in again.stdout or "[MASK]" in again.stdout  # the text
    assert "weights of update" not in again.stdout  # the checkpoint holds what the update met


def enlarge(teacher) -> None:
    """Weights that overflow in the first layer, in a file that is finite."""
    from safetensors.torch import load_file, save_file

    file = teacher / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "intermediate" in name:
            value.fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_update_that_is_fine_is_replayed_with_its_own_numbers(toy_folder, tmp_path):
    run = tmp_path / "run"
    launch.run("fastdistil.pretrain", "quickstart", *given(toy_folder, run, optim__duration=3, log__checkpoint_every=2))  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    third = next(line for line in lines if line["split"] == "train" and line["update"] == 3)
    done = launch.run("fastdistil.replay", run, "--update", 3, "--checkpoint", 2)
    parts = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if "loss" in line]  # fmt: skip
    assert sum(parts) == pytest.approx(third["loss"], rel=1e-5)
    assert "0 of" in done.stdout.splitlines()[-1]
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    wrong = launch.run("fastdistil.replay", moved, "--update", 4, ok=False)
    assert wrong.returncode == 2
    assert "--update must be in [1, 3], got 4" in wrong.stderr


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_temperatures_and_logits_stay_finite(temperature, scale):
    generator = torch.Generator().manual_seed(0)
    teacher = scale * torch.randn(5, 101, generator=generator)
    student = (scale * torch.randn(5, 101, generator=generator)).requires_grad_()
    labels = torch.tensor([-100, 3, -100, 100, 0])
    result = distill_loss(student, teacher, labels, temperature=temperature, kd_scale=1.0, mlm_scale=1.0)  # fmt: skip
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
    student = torch.randn(4, 101).requires_grad_()
    result = distill_loss(student, torch.randn(4, 101), torch.full((4,), -100), temperature=2.0, kd_scale=0.0, mlm_scale=1.0)  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
    zeros = torch.zeros(4, 32, requires_grad=True)
    loss = cosine_loss(zeros, torch.randn(4, 32), num_rows=torch.tensor(4, dtype=torch.int32))
    loss.backward()
    assert loss.isfinite()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_a_run_says_what_became_of_it(toy_folder, tmp_path):
    launch.run("fastdistil.pretrain", "quickstart", *given(toy_folder, tmp_path / "run", optim__duration=1))  # fmt: skip
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["update"], status["updates"]) == ("finished", 1, 1)
    assert not (tmp_path / "run" / run_folder.STACKS).exists()
