"""The objective against the authors': each loss term and every gradient of an update, in fp32, within 1e-4 relative."""

import pytest
import torch

from fastdistil.data.shards import Shards
from fastdistil.model.weights import load_masked_lm
from fastdistil.run import recipes
from fastdistil.run.config import LossConfig
from fastdistil.training.objective import SUMS, Objective, means
from fastdistil.training.teacher import Teacher
from tests.support import authors, toy
from tests.support.updates import DEVICE, gradients_of, make_batches, make_student, make_teacher, one_update

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_one_update_equals_the_authors(of_each, micro_batches, temperature):
    """Traps 1, 2, 3, 5: real tokens as the denominator, T^2, sums over the update, T that is not a power of two."""
    _, batches = make_batches(of_each, micro_batches)
    terms, exact = authors.one_update(of_each / "teacher", of_each / "student", batches, temperature=temperature)
    losses, gradients = one_update(of_each, "student", micro_batches, LossConfig(temperature=temperature))
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_kl_of_the_masked_rows_alone_equals_the_authors(of_each, micro_batches):
    """Their restrict_ce_to_mask; rows that fill a micro-batch up count for nothing."""
    _, batches = make_batches(of_each, micro_batches)
    assert any(len(b.masked_rows) > b.num_masked for b in batches)
    terms, exact = authors.one_update(of_each / "teacher", of_each / "student", batches, restrict_ce_to_mask=True)
    losses, gradients = one_update(of_each, "student", micro_batches, LossConfig(kd_rows="masked"))
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where
    every_row, _ = one_update(of_each, "student", micro_batches, LossConfig())
    assert every_row["mlm"] == pytest.approx(losses["mlm"], rel=1e-6)
    assert abs(every_row["kd"] / losses["kd"] - 1) > 1e-3
    assert "agreement" not in losses
    assert "masked_agreement" not in every_row


def test_a_modernbert_with_the_masking_of_its_recipe_equals_the_authors(modern):
    """30 % of the tokens, whatever they are; most sequences are longer than the window, and it is seen to be there."""
    recipe = recipes.named("modernbert")
    update, batches = make_batches(modern, 4, masking=recipe.masking)
    assert sum(b.num_masked for b in batches) == pytest.approx(0.3 * update.num_tokens, rel=0.02)
    assert sum(n > 16 for b in batches for n in b.real_lengths) > 20
    terms, exact = authors.one_update(modern / "teacher", modern / "student", batches)
    losses, gradients = one_update(modern, "student", 4, recipe.loss, masking=recipe.masking)
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    assert gradients.keys() == exact.keys()
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


@pytest.mark.parametrize(("of_teacher", "of_student"), [("folder", "modern"), ("modern", "folder")])
def test_teacher_and_student_of_two_families_equal_the_authors(request, tmp_path, of_teacher, of_student):
    teacher, student = (request.getfixturevalue(name) for name in (of_teacher, of_student))
    for path in (teacher / "shards", teacher / "teacher", student / "student"):
        (tmp_path / path.name).symlink_to(path)
    _, batches = make_batches(tmp_path, 4)
    terms, exact = authors.one_update(tmp_path / "teacher", tmp_path / "student", batches)
    losses, gradients = one_update(tmp_path, "student", 4, LossConfig())
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value, rel=1e-4), name
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


def test_agreement_on_masked_rows_is_their_share(folder):
    """Of a student that is the teacher every one, whatever fills the rows up."""
    model = load_masked_lm(folder / "teacher", need_head=True).eval().to(DEVICE)
    config = LossConfig(kd_rows="masked")
    update, batches = make_batches(folder, 4)
    teacher, sums = make_teacher(folder), torch.zeros(len(SUMS), device=DEVICE)
    for batch in batches:
        sums += Objective(model, config)(batch, teacher(batch))[1]
    reported = means(sums.tolist(), update.counts, config)
    assert reported["masked_agreement"] == 1
    assert reported["kd"] == pytest.approx(0, abs=1e-6)


def test_micro_batches_add_up_to_one_update_not_to_a_mean_of_means(folder):
    """Trap 3, the other way round: dividing each micro-batch by its own counts gives another gradient."""
    _, batches = make_batches(folder, 4)
    _, exact = authors.one_update(folder / "teacher", folder / "student", batches)
    objective, teacher = Objective(make_student(folder), LossConfig()), make_teacher(folder)
    for batch in batches:
        loss, _ = objective(batch, teacher(batch))
        (loss / len(batches)).backward()
    error, _ = authors.worst_relative_error(gradients_of(objective.student), exact)
    assert error > 1e-3  # so that the test above would notice


@pytest.mark.parametrize("part", ["kd", "mlm", "cosine"])
def test_each_term_alone_equals_the_authors(folder, part):
    _, batches = make_batches(folder, 1)
    only = {name: float(name == part) for name in ("kd", "mlm", "cosine")}
    _, exact = authors.one_update(
        folder / "teacher", folder / "student", batches, weights=(only["kd"], only["mlm"], only["cosine"])
    )
    config = LossConfig(kd=only["kd"], mlm=only["mlm"], cosine=only["cosine"])
    _, gradients = one_update(folder, "student", 1, config)
    if part == "cosine":  # the head gets none
        exact = {n: g for n, g in exact.items() if not n.startswith("vocab") and g.abs().max() > 0}
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


def test_padding_counts_for_nothing(folder):
    """The same sequences in a micro-batch with four times the padding: the same losses and gradients."""
    shards = Shards(folder / "shards")
    plan = make_batches(folder, 4)[0].micro_batches[0]
    results = []
    for budget in (256, 1024):
        batch = toy.make_collator(shards, token_budget=budget)(plan).to(DEVICE)
        objective = Objective(make_student(folder), LossConfig())
        loss, sums = objective(batch, make_teacher(folder)(batch))
        loss.backward()
        results.append((sums, objective.student.get_parameter("encoder.layers.0.qkv.weight").grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(*[g for _, g in results], rtol=1e-4, atol=1e-7)


def test_vocabulary_padding_gets_no_gradient(folder):
    """Trap 9: columns 101 to 127 count in neither softmax."""
    _update, batches = make_batches(folder, 1)
    objective = Objective(make_student(folder), LossConfig())
    assert objective.student.architecture.padded_vocab_size == 128
    loss, sums = objective(batches[0], make_teacher(folder)(batches[0]))
    with torch.no_grad():
        objective.student.head.bias[101:] = 50.0  # would dominate every softmax
    again, same = objective(batches[0], make_teacher(folder)(batches[0]))
    assert torch.equal(sums, same)
    again.backward()
    assert loss.item() == again.item()
    head = objective.student.head
    for parameter in (head.weight, head.bias):
        assert parameter.grad is not None
        assert parameter.grad[101:].abs().max() == 0
        assert parameter.grad[:101].abs().max() > 0


def test_identical_models_have_no_kl_in_bf16(folder):
    """Trap 4: the KL of identical logits is 0 and never negative, in bf16 too."""
    model = load_masked_lm(folder / "teacher", need_head=True).bfloat16().eval().to(DEVICE)
    objective = Objective(model, LossConfig())
    teacher = Teacher(load_masked_lm(folder / "teacher", need_head=True), device=DEVICE, dtype=torch.bfloat16)
    _, batches = make_batches(folder, 1)
    _, sums = objective(batches[0], teacher(batches[0]))
    of = dict(zip(SUMS, sums.tolist(), strict=True))
    assert of["kd"] == 0
    assert of["cosine"] == pytest.approx(0, abs=0.05)
    assert of["agree"] == batches[0].num_tokens


def test_tied_weight_gets_both_gradients(folder):
    """Trap 10: one parameter for the optimiser, the sum of its use as embedding and as decoder."""
    _update, batches = make_batches(folder, 1)
    gradients = []
    for frozen_decoder in (False, True):
        student = make_student(folder)
        assert student.head.weight is student.encoder.word_embeddings.weight
        assert sum(p is student.head.weight for p in student.parameters()) == 1
        if frozen_decoder:
            student.head.weight = torch.nn.Parameter(student.head.weight.detach(), requires_grad=False)
        output = make_teacher(folder)(batches[0])
        loss, _ = Objective(student, LossConfig())(batches[0], output)
        loss.backward()
        gradients.append(student.encoder.word_embeddings.weight.grad)
    both, embedding = gradients
    assert both is not None
    assert embedding is not None
    assert (both - embedding).norm() > 0.1 * both.norm()


def test_the_teacher_stays_in_evaluation_mode_and_out_of_reach(folder):
    """Trap 11: no `.train()`, no optimiser and no state_dict of what is trained reaches it."""
    teacher = make_teacher(folder)
    objective = Objective(make_student(folder), LossConfig())
    objective.train()
    assert not isinstance(teacher, torch.nn.Module)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    batch = make_batches(folder, 1)[1][0]
    state = torch.get_rng_state()
    assert torch.equal(*(teacher(batch).encoder.hidden_ND for _ in range(2)))  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    teacher.model.train()
    with pytest.raises(AssertionError, match="training mode"):
        teacher(batch)


def test_without_a_teacher_only_masked_rows_count(folder):
    update, batches = make_batches(folder, 1)
    config = LossConfig(kd=0, mlm=1, cosine=0)
    objective = Objective(make_student(folder).eval(), config)
    loss, sums = objective(batches[0], None)
    terms, _ = authors.one_update(folder / "teacher", folder / "student", batches)
    assert loss.item() == pytest.approx(terms["mlm"], rel=1e-5)
    losses = means(sums.tolist(), update.counts, config)
    assert losses["loss"] == losses["mlm"] == pytest.approx(terms["mlm"], rel=1e-5)
    assert 0 <= losses["accuracy"] <= 1
