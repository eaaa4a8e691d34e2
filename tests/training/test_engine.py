"""Every engine computes the same update: plain and ZeRO 1, 2 and 3, on 1 and on 2 ranks, in fp32 and bf16."""

from dataclasses import replace

import pytest
import torch
import transformers

from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run.config import Config, LossConfig, OptimConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training.engine import Bf16Compute, PlainEngine, learning_rate, make_optimizer
from fastdistil.training.objective import Objective
from tests.support import authors, forked, toy
from tests.support.updates import CPU, make_batches, make_student, make_teacher, one_update
from tests.workers import engine_worker


@pytest.fixture(scope="module")
def exact(of_each):
    """The authors' terms and gradients of one update of four micro-batches."""
    _, batches = make_batches(of_each, 4, CPU)
    return authors.one_update(of_each / "teacher", of_each / "student", batches)


@pytest.fixture(scope="module")
def alone(of_each):
    """Losses and gradients of the same update in one process, without an engine."""
    return one_update(of_each, "student", 4, LossConfig())


@pytest.fixture(scope="module", params=[(1, "fp32"), (2, "fp32"), (2, "bf16")], ids=lambda p: f"{p[0]}-{p[1]}")
def computed(request, of_each):
    """(ranks, precision, {ZeRO stage: (losses, gradients)}) of the same update."""
    ranks, precision = request.param
    stages = (0, 3) if ranks == 1 else (0, 1, 2, 3)
    found, *_ = forked.call(engine_worker.gradients, of_each, "student", precision, stages, 4, ranks=ranks)
    return ranks, precision, found


def test_one_update_equals_the_authors(computed, exact):
    """Trap 13: gradients of the global batch, accumulated in fp32, with no hidden division by steps or ranks."""
    ranks, precision, by_stage = computed
    assert by_stage.keys() == ({0, 3} if ranks == 1 else {0, 1, 2, 3})
    terms, gradients = exact
    for stage, (losses, found) in by_stage.items():
        for name, value in terms.items():
            assert losses[name] == pytest.approx(value, rel=1e-4 if precision == "fp32" else 0.05), (stage, name)
        error, where = authors.worst_relative_error(found, gradients)
        assert error < (1e-4 if precision == "fp32" else 0.03), (stage, where)  # bf16 arithmetic


def test_the_engines_of_fp32_have_the_gradient_of_one_process(computed, alone):
    """But for the order of additions; the plain engine, which is ZeRO stage 0, on several ranks too."""
    _, precision, by_stage = computed
    if precision == "bf16":
        return
    losses, gradients = alone
    for stage, (found_losses, found) in by_stage.items():
        assert found_losses == pytest.approx(losses, rel=1e-6), stage
        error, where = authors.worst_relative_error(found, gradients)
        assert error < 1e-5, (stage, where)


def test_learning_rate_is_the_authors_schedule():
    """transformers' get_linear_schedule_with_warmup, value by value."""
    config = replace(Config(), optim=OptimConfig(lr=5e-4, warmup=0.05))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 50, 1000)
    for update in range(1000):
        assert learning_rate(config, update, 1000) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_biases_and_layernorm_are_not_decayed():
    model = MaskedLM(toy.architecture())
    decayed, free = make_optimizer(model, Config(optim=OptimConfig(weight_decay=0.1))).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in free["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])


def test_an_encoder_with_a_rate_of_its_own():
    """Both rates follow one schedule; everything outside the encoder has --optim.lr, the tied table the encoder's."""
    model = MaskedLM(toy.architecture())
    optimizer = make_optimizer(model, Config(optim=OptimConfig(lr=1e-3, encoder_lr=1e-4, weight_decay=0.1)))
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["rate"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == {*names.values()}
    for name, p in model.named_parameters():
        rate = 0.1 if name.startswith("encoder.") else 1.0
        assert found[name] == pytest.approx((rate, 0.1 if p.ndim > 1 else 0.0)), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_of_rate_0_stays_as_it_is(folder, precision):
    config = Config(optim=OptimConfig(encoder_lr=0.0))
    objective = Objective(make_student(folder, "student", CPU), config.loss).train()
    before = {name: p.clone() for name, p in objective.student.named_parameters()}
    engine = PlainEngine(objective, config, Ranks(0, 1, CPU), engine_worker.DTYPES[precision])
    _, (batch,) = make_batches(folder, 1, CPU)
    engine.forward_backward(batch, make_teacher(folder, CPU, dtype=engine_worker.DTYPES[precision])(batch))
    engine.step(1e-3)
    for name, p in objective.student.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("encoder."), name


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


def test_tied_weights_stay_tied_in_bf16(folder):
    student = make_student(folder, device=CPU)
    student.run_by_modules()
    seen = []
    student.head.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    student.encoder.word_embeddings.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    layout = sequence_layout([4], "cpu")
    Bf16Compute(student)(torch.arange(4), torch.arange(4), layout)
    assert seen[0] is seen[1]
    assert seen[0].dtype == torch.bfloat16
