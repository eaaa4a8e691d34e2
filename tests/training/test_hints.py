"""hints.py: the opt-in losses against a reference written with transformers in fp64; any packing; every engine; resumed."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastdistil.data import batches as data
from fastdistil.data.shards import Shards
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import MaskedLM
from fastdistil.model.weights import hugging_face_state, load_masked_lm, write_hugging_face_folder
from fastdistil.run.config import LossConfig, MaskingConfig
from fastdistil.training import hints
from fastdistil.training import objective as losses
from fastdistil.training.objective import Objective
from fastdistil.training.preflight import spread
from fastdistil.training.teacher import Teacher
from tests.support import authors, launch, toy
from tests.support.launch import options

CPU = torch.device("cpu")
HIDDEN = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, hidden=3.0, relation_heads=2)
VALUES = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, values=3.0, relation_heads=2)
LAYERS = spread(2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, a teacher of 4 layers, a student as wide of 2, and a narrower one with another number of heads."""
    root = tmp_path_factory.mktemp("hints")
    toy.make_teacher(root / "teacher", toy.make_shards(root / "shards"))
    for name, sizes in (("same", {}), ("narrow", {"hidden_size": 24, "num_heads": 3})):
        off = {"dropout": 0.0, "attention_dropout": 0.0}
        architecture = toy.architecture(model_type="distilbert", num_layers=2, token_types=0, **off, **sizes)
        student = MaskedLM(architecture, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            for p in student.parameters():
                if p.ndim > 1:
                    p.mul_(5.0)  # relations that are not flat
        (root / name).mkdir()
        write_hugging_face_folder(student.state_dict(), architecture, root / "shards" / "tokenizer", root / name)
    return root


def make_batches(root, micro_batches: int, ranks: int = 1):
    """An update and its micro-batches, those of the first rank first."""
    shards, budget = Shards(root / "shards"), 1024 // micro_batches
    plan = data.Plan(
        shards.lengths, seed=3, token_budget=budget, micro_batches_per_update=micro_batches, mask_fraction=0.15
    )
    collator = data.Collator(shards, shards.counts, token_budget=budget, masking=MaskingConfig())
    update = plan.update(0)
    slots = [data.rank_slots(update, rank=rank, world_size=ranks) for rank in range(ranks)]
    return update, [collator(slot) for of_rank in slots for slot in of_rank]


def make_teacher(root, config: LossConfig, dtype=torch.float32) -> Teacher:
    model = load_masked_lm(root / "teacher", need_head=True)
    return Teacher(model, device=CPU, dtype=dtype, keep=losses.teacher_keeps(config, LAYERS))


def ours(root, name: str, micro_batches: int, config: LossConfig, dtype=torch.float32):
    """(means, gradients by Hugging Face name) of one update."""
    update, batches = make_batches(root, micro_batches)
    student = load_masked_lm(root / name, need_head=True)
    objective = Objective(student, config)
    teacher = make_teacher(root, config, dtype)
    sums = torch.zeros(len(losses.SUMS))
    for batch in batches:
        loss, part = objective(batch, teacher(batch), update.num_tokens, update.num_masked)
        loss.backward()
        sums += part
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    counts = update.num_tokens, update.num_masked
    means = losses.means(sums.tolist(), *counts, config, has_teacher=True)
    return means, hugging_face_state(gradients, student.architecture)


def reference(root, name: str, micro_batches: int, config: LossConfig):
    """(hidden, values, gradient of the weighted sum with MLM), sequence by sequence with transformers in fp64."""
    _, batches = make_batches(root, micro_batches)
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

    for batch in batches:
        begin = 0
        for length in batch.lengths:
            if begin >= batch.num_tokens:
                break
            ids = batch.input_ids[None, begin : begin + length]
            labels = batch.labels[begin : begin + length]
            with torch.no_grad():
                t = teacher(input_ids=ids, output_hidden_states=True)
            s = student(input_ids=ids, output_hidden_states=True)
            mlm.append(F.cross_entropy(s.logits[0], labels, ignore_index=-100, reduction="sum"))
            if config.hidden:
                for mine, layer in enumerate(LAYERS):
                    pair = s.hidden_states[1 + mine][0], t.hidden_states[1 + layer][0]
                    one = F.cosine_embedding_loss(*pair, torch.ones(length), reduction="sum")
                    hidden.append(one / len(LAYERS))
            log_q, log_p = (F.log_softmax(relation(seen[k]), -1) for k in "st")
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (A, L)
            values.append(kl.mean(0).sum())
            real, masked, begin = real + length, masked + int((labels >= 0).sum()), begin + length
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
    means, gradients = ours(folder, name, micro_batches, config)
    hidden, values, loss, exact = reference(folder, name, micro_batches, config)
    assert means["loss"] == pytest.approx(loss, rel=1e-5)
    if config.hidden:
        assert means["hidden"] == pytest.approx(hidden, rel=1e-5)
    if config.values:
        assert means["values"] == pytest.approx(values, rel=1e-5)
        assert means["values"] > 1e-3  # not two flat relations
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


def test_a_bf16_teacher_gives_nearly_the_same(folder):
    config = replace(VALUES, hidden=1.0)
    exact, _ = ours(folder, "same", 1, config)
    means, _ = ours(folder, "same", 1, config, dtype=torch.bfloat16)
    assert means["values"] == pytest.approx(exact["values"], rel=0.02)
    assert means["hidden"] == pytest.approx(exact["hidden"], rel=0.02)
    assert means["values"] != exact["values"]


def test_how_many_relations_are_in_memory_changes_nothing(folder, monkeypatch):
    wanted, exact = ours(folder, "narrow", 1, VALUES)
    for tokens in (1, 100):
        monkeypatch.setattr(hints, "PADDED_TOKENS", tokens)
        means, gradients = ours(folder, "narrow", 1, VALUES)
        assert means["values"] == pytest.approx(wanted["values"], rel=1e-6)
        assert authors.worst_relative_error(gradients, exact)[0] < 1e-5


def test_equal_values_cost_nothing_and_the_padding_never_counts():
    torch.manual_seed(0)
    values = torch.randn(40, 12)
    lengths = (7, 20, 5)  # 32 real rows
    bounds = sequence_layout((*lengths, 8), "cpu", sequence_step=6).cu_seqlens
    assert hints.value_relation(values, values, lengths, bounds, 3).item() == pytest.approx(0, abs=1e-5)
    other = torch.randn(40, 12)
    wanted = hints.value_relation(values, other, lengths, bounds, 3)
    values[32:] = float("nan")
    assert hints.value_relation(values, other, lengths, bounds, 3) == wanted > 0


def test_without_the_losses_nothing_is_kept(folder):
    assert losses.teacher_keeps(LossConfig(), LAYERS) is None
    _, batches = make_batches(folder, 1)
    assert make_teacher(folder, LossConfig())(batches[0]).kept == ()


def test_activation_checkpointing_changes_nothing(folder):
    config = replace(VALUES, hidden=1.0)
    _, batches = make_batches(folder, 1)
    hint = make_teacher(folder, config)(batches[0])
    found = []
    for again in (False, True):
        student = load_masked_lm(folder / "same", need_head=True)
        student.encoder.activation_checkpointing = again
        loss, _ = Objective(student, config)(batches[0], hint, 100, 10)
        loss.backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


COMMON = options(
    batch__size=24,
    batch__token_budget=256,
    optim__duration=4,
    optim__unit="updates",
    data__validation_sequences=40,
    data__num_workers=0,
    log__every=1,
    log__checkpoint_every=2,
    log__keep_checkpoints=9,
    engine__bucket_elements=10_000,
    student__num_layers=2,
    loss__relation_heads=4,
)


def metrics(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_zero_on_two_ranks_gives_the_gradient_of_one_process(folder, tmp_path):
    """Three micro-batches, so that one rank has an empty one: under ZeRO-3 it still takes part in every gathering."""
    worker = launch.ROOT / "tests" / "workers" / "hints_worker.py"
    launch.run(worker, folder, tmp_path / "results.pt", ranks=2, script=True)
    means, exact = ours(folder, "same", 3, replace(VALUES, hidden=2.0))
    update, _ = make_batches(folder, 3)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == {1, 3}
    for stage, (sums, gradients) in results.items():
        for name in ("hidden", "values"):
            found = sums[losses.SUMS.index(name)].item() / update.num_tokens
            assert found == pytest.approx(means[name], rel=1e-5), stage
        error, where = authors.worst_relative_error(gradients, exact)
        assert error < 1e-4, (stage, where)


def test_hidden_cosine_trains_and_resumes(folder, tmp_path):
    given = options(data__shards=folder / "shards", teacher__path=folder / "teacher")
    words = ["fastdistil.pretrain", "hidden_cosine", *given, *COMMON, "--out", tmp_path / "run"]
    launch.run(*words, "--loss.values", 1)
    straight = metrics(tmp_path / "run")
    train = [line for line in straight if line["split"] == "train"]
    for term in ("hidden", "values"):
        assert all(term in line for line in straight)
        assert train[-1][term] < train[0][term]
    (tmp_path / "run" / "checkpoints" / "update-00000004").rename(tmp_path / "gone")
    launch.run(*words, "--loss.values", 1, "--resume", "auto")  # after update 2
    for line, other in zip(straight, metrics(tmp_path / "run"), strict=True):
        for term in ("loss", "hidden", "values"):
            assert other[term] == line[term]


def test_minilm_trains_a_narrower_student_with_other_heads(folder, tmp_path):
    given = options(
        data__shards=folder / "shards",
        teacher__path=folder / "teacher",
        student__init="random",
        student__hidden_size=24,
        student__num_heads=3,
    )
    given = [*given, *options(optim__duration=40, optim__lr=5e-3, log__checkpoint_every=40)]
    launch.run("fastdistil.pretrain", "minilm", *COMMON, *given, "--out", tmp_path / "run")
    train = [line for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert train[-1]["values"] < train[0]["values"]
    assert train[-1]["loss"] == pytest.approx(train[-1]["mlm"] + train[-1]["values"])
    assert "hidden" not in train[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mlm", "--student.num-layers", "2", "--student.hidden-size", "32", "--student.num-heads", "4", "--loss.hidden", "1"], "--teacher.path is missing"),
        (["minilm", "--loss.relation-heads", "7"], "--loss.relation-heads 7 must divide the widths 32 of the teacher and 32"),
        (["hidden_cosine", "--student.init", "random", "--student.hidden-size", "24", "--student.num-heads", "3", "--loss.cosine", "0"], "the hidden loss compares hidden states of one width"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, tmp_path, words, message):
    given = options(data__shards=folder / "shards", out=tmp_path / "run")
    if words[0] != "mlm":
        given = [*given, *options(teacher__path=folder / "teacher")]
    done = launch.run("fastdistil.pretrain", *words, *given, ok=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_teacher_ranks_are_refused(folder, tmp_path):
    given = options(data__shards=folder / "shards", teacher__path=folder / "teacher", teacher__ranks=1)  # fmt: skip
    words = ["fastdistil.pretrain", "hidden_cosine", *given, "--out", tmp_path / "run"]
    done = launch.run(*words, "--dry-run", "--world-size", 2, ok=False)
    assert done.returncode == 2
    assert "sends last hidden states alone" in done.stderr
