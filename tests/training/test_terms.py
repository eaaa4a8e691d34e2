"""The terms beyond DistilBERT's against a reference by transformers in fp64; any packing; every engine; resumed."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.sentence import Pooling
from fastdistil.run.config import LOSS_TERMS, LossConfig
from fastdistil.training import relations
from fastdistil.training.objective import FUSED, SUMS, Objective, kept_outputs, terms_of
from fastdistil.training.relations import relation_loss
from tests.support import authors, forked, runs
from tests.support.launch import options
from tests.support.updates import CPU, DEVICE, imitated_layers, make_batches, make_student, make_teacher, one_update
from tests.workers import engine_worker

POOLING = Pooling(mode="mean", normalise=True, max_length=None)
HIDDEN = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, hidden=3.0, relation_heads=2)
VALUES = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, values=3.0, relation_heads=2)
RELATIONS = ("queries", "keys", "values")
MINILM = replace(VALUES, queries=1.5, keys=0.7, relation_layer=2)  # not the last of four


def test_every_term_has_one_home():
    """A weight in LossConfig, an entry of LOSS_TERMS and, unless the fused operator has it, a function in terms_of."""
    settings = {
        "temperature",
        "kd_rows",
        "relation_heads",
        "relation_layer",
        "embedding_distance",
        "nested_layers",
        "nested_dimensions",
    }
    names = {term.name for term in LOSS_TERMS}
    assert len(names) == len(LOSS_TERMS)
    assert {field.name for field in fields(LossConfig)} == names | settings
    assert terms_of(LossConfig(), POOLING).keys() == names - set(FUSED)
    assert (*(term.name for term in LOSS_TERMS), "agree", "correct") == SUMS
    for term in LOSS_TERMS:
        weights: dict[str, Any] = {name: 3.0 * (name == term.name) for name in names}
        config = LossConfig(**weights)
        assert config.terms == (term,)
        assert config.weight(term) == 3.0
        term.formula.format_map({field.name: 1 for field in fields(LossConfig)})  # names fields alone


def reference(root, name: str, micro_batches: int, config: LossConfig):
    """(unweighted terms, their weighted sum with MLM and its gradient), sequence by sequence in fp64."""
    _, batches = make_batches(root, micro_batches, CPU)
    teacher, student = authors.load(root / "teacher"), authors.load(root / name)
    layers = imitated_layers(root)
    sums: dict[str, list[torch.Tensor]] = {term: [] for term in ("hidden", *RELATIONS, "mlm")}
    real = masked = 0

    def log_relation(x_LD):
        heads = x_LD.reshape(len(x_LD), config.relation_heads, -1).transpose(0, 1)
        return F.log_softmax((heads @ heads.transpose(1, 2)) / heads.shape[-1] ** 0.5, -1)

    for ids, labels in authors.sequences(batches):
        authors.ATTENDED.clear()
        with torch.no_grad():
            t = teacher(input_ids=ids, output_hidden_states=True)
        example_qkv = authors.ATTENDED[-1 if config.relation_layer is None else config.relation_layer]
        s = student(input_ids=ids, output_hidden_states=True)
        sums["mlm"].append(F.cross_entropy(s.logits[0], labels, ignore_index=-100, reduction="sum"))
        mine, examples = authors.layer_outputs(student, s), authors.layer_outputs(teacher, t)
        for state, layer in zip(mine, layers if config.hidden else (), strict=False):
            one = F.cosine_embedding_loss(state, examples[layer], torch.ones(len(labels)), reduction="sum")
            sums["hidden"].append(one / len(layers))
        for kind, mine_LD, example_LD in zip(RELATIONS, authors.ATTENDED[-1], example_qkv, strict=True):
            log_q, log_p = log_relation(mine_LD), log_relation(example_LD)
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (A, L)
            sums[kind].append(kl.mean(0).sum())
        real, masked = real + len(labels), masked + int((labels >= 0).sum())
    terms = {k: torch.stack(v).sum() / (masked if k == "mlm" else real) for k, v in sums.items() if v}
    loss = torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, loss.item(), gradients


CASES = {
    "hidden": ("same", HIDDEN),
    "values": ("same", VALUES),
    "values of another width": ("narrow", VALUES),
    "queries": ("narrow", replace(VALUES, queries=3.0, values=0.0)),
    "keys of the first layer": ("same", replace(VALUES, keys=3.0, values=0.0, relation_layer=0)),
    "all of MiniLMv2": ("narrow", MINILM),
    "all there is": ("same", replace(MINILM, hidden=2.0)),
}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("name", "config"), CASES.values(), ids=list(CASES))
def test_terms_and_gradients_equal_the_reference(of_each, name, config, micro_batches):
    losses, gradients = one_update(of_each, name, micro_batches, config)
    terms, loss, exact = reference(of_each, name, micro_batches, config)
    assert losses["loss"] == pytest.approx(loss, rel=1e-5)
    for term in ("hidden", *RELATIONS):
        assert (term in losses) == bool(getattr(config, term))
        if term in losses:
            assert losses[term] == pytest.approx(terms[term], rel=1e-5)
            assert losses[term] > 1e-3  # not two flat relations
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where
    bias = "distilbert.transformer.layer.1.attention.k_lin.bias"
    if config.keys and bias in exact:  # attention alone gives it no gradient
        assert (gradients[bias].double().cpu() - exact[bias]).norm() < 1e-4 * exact[bias].norm()


def test_a_bf16_teacher_gives_nearly_the_same(folder):
    config = replace(VALUES, hidden=1.0)
    exact, _ = one_update(folder, "same", 1, config)
    losses, _ = one_update(folder, "same", 1, config, dtype=torch.bfloat16)
    assert losses["values"] == pytest.approx(exact["values"], rel=0.02)
    assert losses["hidden"] == pytest.approx(exact["hidden"], rel=0.02)
    assert losses["values"] != exact["values"]


def test_how_many_relations_are_in_memory_changes_nothing(folder, monkeypatch):
    wanted, exact = one_update(folder, "narrow", 1, VALUES)
    for tokens in (1, 100):
        monkeypatch.setitem(relations.PADDED_TOKENS, DEVICE.type, tokens)
        losses, gradients = one_update(folder, "narrow", 1, VALUES)
        assert losses["values"] == pytest.approx(wanted["values"], rel=1e-6)
        assert authors.worst_relative_error(gradients, exact)[0] < 1e-5


def test_equal_values_cost_nothing_and_the_padding_never_counts():
    torch.manual_seed(0)
    values = torch.randn(40, 12)
    lengths = (7, 20, 5)  # 32 real rows
    bounds = sequence_layout((*lengths, 8), "cpu", sequence_step=6).cu_seqlens
    options = {"lengths": lengths, "cu_seqlens": bounds, "num_heads": 3, "scale": torch.tensor(2.0), "at_end": True}
    assert relation_loss(values, values, **options)[1].item() == pytest.approx(0, abs=1e-5)
    other = torch.randn(40, 12)
    loss, wanted = relation_loss(values, other, **options)
    assert loss == 2 * wanted > 0
    values[32:] = float("nan")
    values.requires_grad_()
    loss, total = relation_loss(values, other, **options)
    loss.backward()
    assert total == wanted
    assert values.grad is not None
    assert values.grad[:32].isfinite().all()
    assert not values.grad[32:].any()


def test_the_gradient_is_that_of_plain_pytorch_whatever_the_loss_is_multiplied_by():
    """Odd lengths, a sequence of one token, and what stands behind the loss."""
    generator = torch.Generator().manual_seed(1)
    lengths, heads = (1, 33, 7, 19), 3
    student, teacher = (torch.randn(64, width, generator=generator, dtype=torch.float64) for width in (12, 24))
    exact = student.clone().requires_grad_()
    parts = []
    for x, y in zip(exact[:60].split(lengths), teacher[:60].split(lengths), strict=True):
        scores = ((z.unflatten(1, (heads, -1)).transpose(0, 1)) for z in (x, y))
        log_q, log_p = (F.log_softmax(z @ z.mT / z.shape[-1] ** 0.5, -1) for z in scores)
        parts.append(F.kl_div(log_q, log_p, log_target=True, reduction="sum") / heads)
    wanted = torch.stack(parts).sum()
    (0.25 * wanted * 5).backward()
    bounds = sequence_layout((*lengths, 4), "cpu").cu_seqlens
    for at_end, factor in ((True, 1.0), (False, 5.0)):
        ours = student.float().requires_grad_()
        scale = torch.tensor(0.25 * 5 / factor)
        loss, total = relation_loss(ours, teacher.float(), lengths, bounds, heads, scale, at_end=at_end)
        (loss * factor).backward()
        assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert ours.grad is not None
        assert (ours.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()  # type: ignore[union-attr]


def test_without_the_losses_nothing_is_kept(folder):
    assert kept_outputs(LossConfig(), (0, 3), 3) == KeptOutputs()
    _, batches = make_batches(folder, 1)
    output = make_teacher(folder)(batches[0])
    assert output.encoder.tensors() == (output.encoder.hidden_ND,)


def test_relations_alone_need_no_head(of_each):
    """Nor anything of the last layer behind its queries, keys and values, whose gradient is 0."""
    _, batches = make_batches(of_each, 1)
    config = replace(MINILM, mlm=0.0)
    output, found = make_teacher(of_each, loss=config)(batches[0]), []
    for heads in (MINILM, config):
        student = make_student(of_each, "narrow", loss=heads)
        loss, _ = Objective(student, config)(batches[0], output)
        loss.backward()
        found.append({n: p.grad for n, p in student.encoder.named_parameters() if p.grad is not None})
    assert all(torch.allclose(x, found[1][n], rtol=1e-6, atol=1e-12) for n, x in found[0].items())
    assert found[1]["layers.1.qkv.weight"].any()
    assert not found[1]["layers.1.ffn_in.weight"].any()


def test_activation_checkpointing_changes_nothing(of_each):
    config = replace(MINILM, hidden=1.0)
    _, batches = make_batches(of_each, 1)
    output = make_teacher(of_each, loss=config)(batches[0])
    found = []
    for again in (False, True):
        student = make_student(of_each, "same")
        student.encoder.activation_checkpointing = again
        loss, _ = Objective(student, config)(batches[0], output)
        loss.backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


ON_TWO_RANKS = {
    "MiniLMv2 and hidden": replace(MINILM, hidden=2.0),
    "relations alone, no head": replace(MINILM, mlm=0.0),
    "KL of masked rows": LossConfig(kd_rows="masked"),
}


@pytest.mark.parametrize("loss", ON_TWO_RANKS.values(), ids=list(ON_TWO_RANKS))
def test_every_engine_on_two_ranks_gives_the_gradient_of_one_process(of_each, loss):
    """Three micro-batches, so that one rank has an empty one: under ZeRO-3 it still takes part in every gathering."""
    stages = (0, 1, 3)
    losses, exact = one_update(of_each, "same", 3, loss)
    exact = {name: gradient for name, gradient in exact.items() if gradient.any()}  # not of what has no part in it
    results, *_ = forked.call(engine_worker.gradients, of_each, "same", "fp32", stages, 3, loss, ranks=2)
    for stage in stages:
        found, gradients = results[stage]
        for name in losses:
            assert found[name] == pytest.approx(losses[name], rel=1e-5), stage
        error, where = authors.worst_relative_error(gradients, exact)
        assert error < 1e-4, (stage, where)


# --- whole runs


def arguments(root, recipe: str, out, **changes: object) -> list[str]:
    module, _, *words = runs.arguments(
        root, out, **{"log__every": 1, "engine__threads": 1, "loss__relation_heads": 4} | changes
    )
    return [module, recipe, *words]


def test_hidden_cosine_trains_and_resumes(root, tmp_path):
    run = tmp_path / "run"
    given = {"loss__values": 1, "loss__queries": 1, "loss__relation_layer": 1}
    given |= {"student__num_layers": 2, "optim__duration": 4, "log__checkpoint_every": 2}
    forked.run(*arguments(root, "hidden_cosine", run, **given))
    straight = runs.metrics_of(run)
    train = [line for line in straight if line["split"] == "train"]
    for term in ("hidden", "queries", "values"):
        assert all(term in line for line in straight)
        assert train[-1][term] < train[0][term]
    (run / "checkpoints" / "update-00000004").rename(tmp_path / "gone")
    forked.run(*arguments(root, "hidden_cosine", run, **given, resume="auto"))  # after update 2
    for line, other in zip(straight, runs.metrics_of(run), strict=True):
        for term in ("loss", "hidden", "queries", "values"):
            assert other[term] == line[term]


def test_minilm_trains_a_narrower_student_with_other_heads(root, tmp_path):
    sizes = {"init": "random", "num_layers": 2, "hidden_size": 24, "num_heads": 3}
    student = {f"student__{name}": value for name, value in sizes.items()}
    forked.run(*arguments(root, "minilm", tmp_path / "run", **student, optim__duration=40, optim__lr=5e-3))
    train = [line for line in runs.metrics_of(tmp_path / "run") if line["split"] == "train"]
    for term in RELATIONS:
        assert train[-1][term] < train[0][term]
    assert train[-1]["loss"] == pytest.approx(sum(train[-1][term] for term in ("mlm", *RELATIONS)))
    assert "hidden" not in train[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "mlm --student.num-layers 2 --student.hidden-size 32 --student.num-heads 4 --loss.hidden 1",
            "--teacher.path is missing",
        ),
        ("minilm --loss.relation-heads 7", "--loss.relation-heads 7 must divide the widths 32 of the teacher and 32"),
        (
            "minilm --loss.relation-heads 4 --loss.relation-layer 4",
            "--loss.relation-layer must be a layer of the teacher, from 0 to 3, got 4",
        ),
        ("distilbert --loss.kd 0 --loss.kd-rows masked", "--loss.kd-rows masked has no effect"),
        ("distilbert --loss.relation-layer 1", "--loss.relation-layer 1 has no effect"),
        (
            "hidden_cosine --student.init random --student.hidden-size 24 --student.num-heads 3 --loss.cosine 0",
            "the hidden loss compares hidden states of one width",
        ),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, words, message):
    given = options(data__shards=root / "shards", out=tmp_path / "run")
    if not words.startswith("mlm"):
        given = [*given, *options(teacher__path=root / "teacher")]
    done = forked.run("fastdistil.pretrain", *words.split(), *given, ok=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_teacher_ranks_are_refused(root, tmp_path):
    given = options(data__shards=root / "shards", teacher__path=root / "teacher", teacher__ranks=1)
    words = ["fastdistil.pretrain", "hidden_cosine", *given, "--out", tmp_path / "run"]
    done = forked.run(*words, "--dry-run", "--world-size", 2, ok=False)
    assert done.returncode == 2
    assert "sends last hidden states alone" in done.stderr
