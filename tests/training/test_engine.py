"""Every engine computes the same update: plain and ZeRO 0, 1, 2, 3, on 1 and on 2 ranks, in fp32 and bf16; and resumes exactly."""

from dataclasses import replace

import pytest
import torch

from fastdistil.run.config import Config, OptimConfig
from fastdistil.training.engine import Bf16Compute, learning_rate, make_optimizer
from tests.support import authors, launch, toy
from tests.training.test_objective import folder, make_batches, make_student  # noqa: F401 (a fixture)

WORKER = launch.ROOT / "tests" / "workers" / "engine_worker.py"


@pytest.fixture(scope="module", params=[(1, "fp32"), (2, "fp32"), (2, "bf16")], ids=lambda p: f"{p[0]}-{p[1]}")
def results(request, folder, tmp_path_factory):  # noqa: F811
    ranks, precision = request.param
    out = tmp_path_factory.mktemp("engine") / "results.pt"
    launch.run(WORKER, folder, out, precision, ranks=ranks, script=True, timeout_s=500)
    return folder, precision, torch.load(out, weights_only=True)


def test_one_update_equals_the_authors(results):
    """Trap 13: gradients of the global batch, accumulated in fp32, with no hidden division by steps or ranks."""
    root, precision, by_stage = results
    _, batches = make_batches(root, 4, torch.device("cpu"))
    terms, exact = authors.one_update(root / "teacher", root / "student", batches)
    for stage, result in by_stage.items():
        for name, value in terms.items():
            assert result["means"][name] == pytest.approx(value, rel=1e-4 if precision == "fp32" else 0.05), (
                stage,
                name,
            )
        error, where = authors.worst_relative_error(result["gradients"], exact)
        assert error < (1e-4 if precision == "fp32" else 0.03), (stage, where)  # bf16 arithmetic


def test_stopped_and_resumed_is_bitwise_the_run_that_never_stopped(results):
    _, _, by_stage = results
    for stage, result in by_stage.items():
        as_hex = [[x.hex() for x in row] for row in result["history"]]
        assert [[x.hex() for x in row] for row in result["resumed"]] == as_hex[3:], stage
        straight, resumed = result["straight_state"], result["resumed_state"]
        assert straight.keys() == resumed.keys()
        assert any(k.startswith("exp_avg_sq.") for k in straight)
        for name, value in straight.items():
            assert torch.equal(value, resumed[name]), (stage, name)
            if name.startswith("exp_avg."):
                assert value.dtype == torch.float32


def test_all_engines_agree(results):
    """After six updates with dropout, clipping and weight decay: the same weights and moments, whatever the stage."""
    _, _, by_stage = results
    first = next(iter(by_stage.values()))["straight_state"]
    for stage, result in by_stage.items():
        for name, value in result["straight_state"].items():
            # in bf16 too: sums over micro-batches and ranks are fp32, and every engine sees the same rounded weights
            bound = 2e-5 * first[name].norm() + 1e-7
            assert (value - first[name]).norm() <= bound, (stage, name)


def test_all_engines_report_the_same_gradient_norm(results):
    _, _, by_stage = results
    first = [row[-1] for row in next(iter(by_stage.values()))["history"]]
    assert min(first) > 0
    for stage, result in by_stage.items():
        assert [row[-1] for row in result["history"]] == pytest.approx(first, rel=1e-4), stage


def test_training_went_somewhere(results):
    _, _, by_stage = results
    for result in by_stage.values():
        start, end = result["half_state"], result["straight_state"]
        assert any(not torch.equal(v, end[k]) for k, v in start.items() if k.startswith("weight."))


def test_learning_rate_is_the_authors_schedule():
    """transformers' get_linear_schedule_with_warmup, value by value."""
    import transformers

    config = replace(Config(), optim=OptimConfig(lr=5e-4, warmup=0.05))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 50, 1000)
    for update in range(1000):
        assert learning_rate(config, update, 1000) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_biases_and_layernorm_are_not_decayed():
    from fastdistil.model.encoder import MaskedLM

    model = MaskedLM(toy.architecture())
    decayed, free = make_optimizer(model, Config(optim=OptimConfig(weight_decay=0.1))).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in free["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])


def test_bf16_arithmetic_accumulates_in_fp32():
    """Trap 13 without DeepSpeed: 300 contributions of 1/256 on top of 1 would all be lost in a bf16 accumulator."""
    linear = torch.nn.Linear(1, 1, bias=False)
    wrapped = Bf16Compute(linear)
    wrapped(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    for _ in range(300):
        wrapped(torch.full((1, 1), 1 / 256, dtype=torch.bfloat16)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.item() == 1 + 300 / 256


def test_tied_weights_stay_tied_in_bf16(folder):  # noqa: F811
    student = make_student(folder, torch.device("cpu"))
    seen = []
    student.head.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    student.encoder.word_embeddings.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    from fastdistil.kernels.layout import sequence_layout

    layout = sequence_layout([4], "cpu")
    Bf16Compute(student)(torch.arange(4), torch.arange(4), layout)
    assert seen[0] is seen[1]
    assert seen[0].dtype == torch.bfloat16
