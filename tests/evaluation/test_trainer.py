"""DistilTrainer against the objective in plain PyTorch, on padded batches of models of transformers."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from fastdistil import DistilTrainer
from fastdistil.run.config import LossConfig
from tests.support.models import random_model

pytest.importorskip("accelerate", reason="the Trainer of transformers wants accelerate")

V, T = 101, 2.0
STUDENTS = {
    "BertForMaskedLM": {"num_hidden_layers": 2},
    "DistilBertForMaskedLM": {"n_layers": 2},
    "RobertaForMaskedLM": {"num_hidden_layers": 2},
    "ModernBertForMaskedLM": {"num_hidden_layers": 3, "local_attention": 8},
}


def batch(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Padded on the right, every fourth token of a text masked, as DataCollatorForLanguageModeling makes it."""
    gen = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, V, shape, generator=gen).masked_fill(~real, 1)
    masked = real & (torch.arange(shape[1]) % 4 == 1)
    return {
        "input_ids": ids.masked_fill(masked, 4),
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": real.long(),
        "labels": ids.masked_fill(~masked, -100),
    }


def trainer_of(folder: Any, student: str, args: dict[str, Any] | None = None, **given: Any) -> DistilTrainer:
    """Of a student without dropout, whose gradient is then a function of the batch."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0}
    if student != "DistilBertForMaskedLM":
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = random_model(student, seed=1, **STUDENTS[student], **rates)
    teacher = given.pop("teacher", None) or random_model(student.replace("DistilBert", "Bert"), seed=2)
    usual = {"output_dir": folder, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return DistilTrainer(model, transformers.TrainingArguments(**usual | (args or {})), teacher=teacher, **given)


def plain(trainer: DistilTrainer, batches: list[dict[str, Tensor]]) -> Tensor:
    """The objective of an update in PyTorch's own functions, from logits."""
    model: Any = trainer.model
    kd = mlm = cosine = torch.zeros(())
    num_tokens = num_masked = 0
    for inputs in batches:
        real, labels = inputs["attention_mask"].bool(), inputs["labels"]
        read = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        student = model(**read, output_hidden_states=True)
        with torch.no_grad():
            teacher = trainer.teacher(**read, output_hidden_states=True)
        z, y = student.logits[real], teacher.logits[real]
        kd = kd + T**2 * F.kl_div(F.log_softmax(z / T, -1), F.log_softmax(y / T, -1), log_target=True, reduction="sum")
        mlm = mlm + F.cross_entropy(z, labels[real], reduction="sum")
        states = student.hidden_states[-1][real], teacher.hidden_states[-1][real]
        cosine = cosine + F.cosine_embedding_loss(*states, torch.ones(len(z)), reduction="sum")
        num_tokens, num_masked = num_tokens + int(real.sum()), num_masked + int((labels >= 0).sum())
    return 5 * kd / num_tokens + 2 * mlm / num_masked + cosine / num_tokens


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("student", STUDENTS)
def test_loss_and_gradients_are_those_of_the_plain_objective(tmp_path, student):
    """Of two batches of different lengths, accumulated: the means are over both."""
    trainer = trainer_of(tmp_path, student, {"gradient_accumulation_steps": 2})
    model: Any = trainer.model
    model.train()
    parts, counts = trainer.get_batch_samples(iter([batch((9, 4, 12)), batch((5, 7), seed=1)]), 2, torch.device("cpu"))
    total = torch.stack([trainer.compute_loss(model, part, num_items_in_batch=counts) for part in parts]).sum()
    wanted = plain(trainer, parts)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    found, of_plain = gradients(model, total), gradients(model, wanted)
    assert len(found) == len(of_plain) > 20
    for mine, theirs in zip(found, of_plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_tokens_times_vocabulary_is_made(tmp_path, monkeypatch):
    from fastdistil.kernels import linear_distill

    monkeypatch.setattr(linear_distill, "default_chunk_tokens", lambda *_: 32)
    sizes = {"vocab_size": 5000, "hidden_size": 12, "num_attention_heads": 1, "num_hidden_layers": 1}
    student, teacher = (random_model("BertForMaskedLM", seed=seed, **sizes) for seed in (1, 2))
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer, inputs = DistilTrainer(student, args, teacher=teacher), batch((64,) * 8)
    largest = {}
    for name, run in (("ours", trainer.compute_loss), ("theirs", lambda _, given: plain(trainer, [given]))):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(student, inputs).backward()
        largest[name] = max(event.self_cpu_memory_usage for event in profile.events() or ())
    logits = 4 * 8 * 64 * 5000
    assert largest["theirs"] >= logits  # the measure sees them
    assert largest["ours"] < logits / 4


def test_it_trains_evaluates_and_saves(tmp_path):
    rows = [{k: v[0, :n] for k, v in batch((n,), seed=n).items()} for n in range(6, 22)]

    def collate(examples):
        fill = {"input_ids": 1, "token_type_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            k: torch.nn.utils.rnn.pad_sequence([e[k] for e in examples], batch_first=True, padding_value=fill[k])
            for k in examples[0]  # the Trainer leaves out what the model does not take
        }

    args = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "logging_steps": 4,
        "warmup_steps": 0,
        "save_strategy": "no",
    }
    trainer = trainer_of(
        str(tmp_path), "DistilBertForMaskedLM", args, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    for line in (record for record in trainer.state.log_history if "loss" in record):
        assert line["loss"] == pytest.approx(5 * line["kd"] + 2 * line["mlm"] + line["cosine"], rel=0.1)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    inputs = batch((7,))
    read = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    logits = loaded.eval()(**read).logits
    assert logits.shape == (1, 7, V)
    model: Any = trainer.model
    torch.testing.assert_close(logits, model.eval()(**read).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": random_model("BertForMaskedLM", vocab_size=99)}, "teacher has 99 rows and the model 101"),
        (
            {"teacher": random_model("BertForMaskedLM", hidden_size=30)},
            "teacher's is 30 and the model's 60: .*cosine=0",
        ),
        ({"teacher": random_model("BertModel")}, "teacher with a vocabulary, got BertModel: load it by AutoModelFor"),
        ({"loss": LossConfig(hidden=1.0)}, "has the terms kd, mlm, cosine, got hidden"),
        ({"compute_metrics": lambda _: {}}, "makes no logits, which compute_metrics wants"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(str(tmp_path), "BertForMaskedLM", **given)


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = trainer_of(str(tmp_path), "BertForMaskedLM")
    with pytest.raises(ValueError, match="wants batches with labels: use DataCollatorForLanguageModeling"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
