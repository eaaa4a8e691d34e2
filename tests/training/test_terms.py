"""The terms beyond the paper's against a reference by transformers in fp64; any packing; every engine; resumed."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import KeptOutputs
from fastdistil.run.config import LOSS_TERMS, LossConfig
from fastdistil.training import objective
from fastdistil.training.objective import FUSED, SUMS, Objective, kept_outputs, terms_of, value_relation
from tests.support import authors, forked, runs
from tests.support.launch import options
from tests.support.updates import CPU, LAYERS, make_batches, make_student, make_teacher, one_update
from tests.workers import engine_worker

HIDDEN = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, hidden=3.0, relation_heads=2)
VALUES = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, values=3.0, relation_heads=2)


def test_every_term_has_one_home():
    """A weight in LossConfig, an entry of LOSS_TERMS and, unless the fused operator has it, a function in terms_of."""
    settings = {"temperature", "relation_heads"}
    names = {term.name for term in LOSS_TERMS}
    assert len(names) == len(LOSS_TERMS)
    assert {field.name for field in fields(LossConfig)} == names | settings
    assert terms_of(LossConfig()).keys() == names - set(FUSED)
    assert (*(term.name for term in LOSS_TERMS), "agree", "correct") == SUMS
    for term in LOSS_TERMS:
        weights: dict[str, Any] = {name: 3.0 * (name == term.name) for name in names}
        config = LossConfig(**weights)
        assert config.terms == (term,)
        assert config.weight(term) == 3.0
        term.formula.format_map({field.name: 1 for field in fields(LossConfig)})  # names fields alone


def reference(root, name: str, micro_batches: int, config: LossConfig):
    """(hidden, values, gradient of the weighted sum with MLM), sequence by sequence with transformers in fp64."""
    _, batches = make_batches(root, micro_batches, CPU)
    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    teacher = load(root / "teacher", attn_implementation="eager").double().eval()
    student = load(root / name, attn_implementation="eager").double().eval()
    seen: dict[str, torch.Tensor] = {}

    def remember(key):
        return lambda _module, _inputs, output: seen.__setitem__(key, output[0])

    teacher.bert.encoder.layer[-1].attention.self.value.register_forward_hook(remember("t"))
    student.distilbert.transformer.layer[-1].attention.v_lin.register_forward_hook(remember("s"))
    hidden, values, mlm, real, masked = [], [], [], 0, 0

    def relation(values_LD):
        heads = values_LD.reshape(len(values_LD), config.relation_heads, -1).transpose(0, 1)
        return (heads @ heads.transpose(1, 2)) / heads.shape[-1] ** 0.5

    for ids, labels in authors.sequences(batches):
        with torch.no_grad():
            t = teacher(input_ids=ids, output_hidden_states=True)
        s = student(input_ids=ids, output_hidden_states=True)
        mlm.append(F.cross_entropy(s.logits[0], labels, ignore_index=-100, reduction="sum"))
        if config.hidden:
            for mine, layer in enumerate(LAYERS):
                pair = s.hidden_states[1 + mine][0], t.hidden_states[1 + layer][0]
                one = F.cosine_embedding_loss(*pair, torch.ones(len(labels)), reduction="sum")
                hidden.append(one / len(LAYERS))
        log_q, log_p = (F.log_softmax(relation(seen[k]), -1) for k in "st")
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (A, L)
        values.append(kl.mean(0).sum())
        real, masked = real + len(labels), masked + int((labels >= 0).sum())
    terms = [torch.stack(v).sum() / real if v else torch.zeros(()) for v in (hidden, values)]
    loss = config.mlm * torch.stack(mlm).sum() / masked
    loss = loss + config.hidden * terms[0] + config.values * terms[1]
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return terms[0].item(), terms[1].item(), loss.item(), gradients


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    ("name", "config"), [("same", HIDDEN), ("same", VALUES), ("narrow", VALUES), ("same", replace(VALUES, hidden=2.0))]
)
def test_terms_and_gradients_equal_the_reference(folder, name, config, micro_batches):
    losses, gradients = one_update(folder, name, micro_batches, config)
    hidden, values, loss, exact = reference(folder, name, micro_batches, config)
    assert losses["loss"] == pytest.approx(loss, rel=1e-5)
    if config.hidden:
        assert losses["hidden"] == pytest.approx(hidden, rel=1e-5)
    if config.values:
        assert losses["values"] == pytest.approx(values, rel=1e-5)
        assert losses["values"] > 1e-3  # not two flat relations
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


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
        monkeypatch.setattr(objective, "PADDED_TOKENS", tokens)
        losses, gradients = one_update(folder, "narrow", 1, VALUES)
        assert losses["values"] == pytest.approx(wanted["values"], rel=1e-6)
        assert authors.worst_relative_error(gradients, exact)[0] < 1e-5


def test_equal_values_cost_nothing_and_the_padding_never_counts():
    torch.manual_seed(0)
    values = torch.randn(40, 12)
    lengths = (7, 20, 5)  # 32 real rows
    bounds = sequence_layout((*lengths, 8), "cpu", sequence_step=6).cu_seqlens
    assert value_relation(values, values, lengths, bounds, 3).item() == pytest.approx(0, abs=1e-5)
    other = torch.randn(40, 12)
    wanted = value_relation(values, other, lengths, bounds, 3)
    values[32:] = float("nan")
    assert value_relation(values, other, lengths, bounds, 3) == wanted > 0


def test_without_the_losses_nothing_is_kept(folder):
    assert kept_outputs(LossConfig(), LAYERS) == KeptOutputs()
    _, batches = make_batches(folder, 1)
    output = make_teacher(folder)(batches[0])
    assert output.encoder.tensors() == (output.encoder.hidden_ND,)


def test_activation_checkpointing_changes_nothing(folder):
    config = replace(VALUES, hidden=1.0)
    _, batches = make_batches(folder, 1)
    output = make_teacher(folder, loss=config)(batches[0])
    found = []
    for again in (False, True):
        student = make_student(folder, "same")
        student.encoder.activation_checkpointing = again
        loss, _ = Objective(student, config)(batches[0], output)
        loss.backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_every_engine_on_two_ranks_gives_the_gradient_of_one_process(folder):
    """Three micro-batches, so that one rank has an empty one: under ZeRO-3 it still takes part in every gathering."""
    loss, stages = replace(VALUES, hidden=2.0), (0, 1, 3)
    losses, exact = one_update(folder, "same", 3, loss)
    results, *_ = forked.call(engine_worker.gradients, folder, "same", "fp32", stages, 3, loss, ranks=2)
    for stage in stages:
        found, gradients = results[stage]
        for name in ("hidden", "values"):
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
    given = {"loss__values": 1, "student__num_layers": 2, "optim__duration": 4, "log__checkpoint_every": 2}
    forked.run(*arguments(root, "hidden_cosine", run, **given))
    straight = runs.metrics_of(run)
    train = [line for line in straight if line["split"] == "train"]
    for term in ("hidden", "values"):
        assert all(term in line for line in straight)
        assert train[-1][term] < train[0][term]
    (run / "checkpoints" / "update-00000004").rename(tmp_path / "gone")
    forked.run(*arguments(root, "hidden_cosine", run, **given, resume="auto"))  # after update 2
    for line, other in zip(straight, runs.metrics_of(run), strict=True):
        for term in ("loss", "hidden", "values"):
            assert other[term] == line[term]


def test_minilm_trains_a_narrower_student_with_other_heads(root, tmp_path):
    sizes = {"init": "random", "num_layers": 2, "hidden_size": 24, "num_heads": 3}
    student = {f"student__{name}": value for name, value in sizes.items()}
    forked.run(*arguments(root, "minilm", tmp_path / "run", **student, optim__duration=40, optim__lr=5e-3))
    train = [line for line in runs.metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert train[-1]["values"] < train[0]["values"]
    assert train[-1]["loss"] == pytest.approx(train[-1]["mlm"] + train[-1]["values"])
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
