"""Predicted memory against the peaks of real updates, and what is refused for want of it."""

import logging
from dataclasses import replace

import pytest
import torch

from fastdistil.model.architecture import Architecture
from fastdistil.run.config import LossConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training import memory
from tests.support import forked
from tests.support.updates import CPU
from tests.workers import memory_worker
from tests.workers.memory_worker import Case


def model(num_layers: int, width: int, **changes) -> Architecture:
    plain = Architecture(
        vocab_size=4096,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=width // 32,
        ffn_size=4 * width,
        max_positions=128,
        model_type="distilbert",
        token_types=0,
    )
    return replace(plain, **changes)


MINILM = Case(student=model(2, 256), teacher=model(3, 256, model_type="bert", token_types=2), tokens=1024)
MINILM_V2 = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, queries=1.0, keys=1.0, values=1.0, relation_heads=8)
WINDOWS = dict(global_every=3, local_attention=64, global_theta=160000.0, local_theta=10000.0)
MODERN = dict(model_type="modernbert", token_types=0, dropout=0.0, attention_dropout=0.0, **WINDOWS)
MODERNBERT = Case(student=model(2, 256, **MODERN), teacher=model(4, 256, **MODERN), tokens=1024)
DEEP_MODERNBERT = replace(MODERNBERT, student=model(8, 128, **MODERN), teacher=model(2, 128, **MODERN), tokens=2048)
DEEP = replace(MINILM, student=model(8, 128), teacher=model(2, 128), tokens=2048)
ALONE = {
    "fp32": MINILM,
    "twice the tokens": replace(MINILM, tokens=2048),
    "bf16": replace(MINILM, rounds=2, engine={"precision": "bf16"}),
    "sdpa": replace(MINILM, engine={"attention": "sdpa"}),
    "no dropout": replace(MINILM, student=model(2, 256, dropout=0.0, attention_dropout=0.0)),
    "deep": DEEP,
    "checkpointing": replace(DEEP, engine={"activation_checkpointing": True}),
    "relations": replace(MINILM, loss=MINILM_V2),
    "KL of masked rows": replace(MINILM, loss=LossConfig(kd_rows="masked")),
    "no teacher": replace(MINILM, teacher=None, tokens=2048),
    "embed": Case(
        student=model(2, 256, mlm_head=False, dropout=0.0, attention_dropout=0.0),
        teacher=model(4, 256, model_type="bert", token_types=2, mlm_head=False),
        tokens=2048,
        loss=LossConfig(kd=0.0, mlm=0.0, cosine=0.0, hidden=1.0, embedding=1.0),
    ),
    "similarities": Case(  # of 2,048 sequences: most of what it needs
        student=model(2, 64, mlm_head=False, dropout=0.0, attention_dropout=0.0),
        teacher=model(2, 64, mlm_head=False),
        tokens=8192,
        length=4,
        loss=LossConfig(kd=0.0, mlm=0.0, cosine=0.0, similarity=1.0, nested_layers=(1,), nested_dimensions=(32,)),
    ),
    "three teachers": replace(MINILM, others=(model(1, 384), model(4, 128))),
    "wide": Case(student=model(2, 512), teacher=model(2, 512), tokens=256),
    "ModernBERT": MODERNBERT,
    "ModernBERT bf16": replace(MODERNBERT, rounds=2, engine={"precision": "bf16"}),
    "ModernBERT with dropout": replace(
        MODERNBERT, student=model(2, 256, **MODERN | {"dropout": 0.1, "attention_dropout": 0.1})
    ),
    "ModernBERT deep": DEEP_MODERNBERT,
    "ModernBERT checkpointing": replace(DEEP_MODERNBERT, engine={"activation_checkpointing": True}),
    "ModernBERT, one long sequence": replace(MODERNBERT, tokens=4096, length=2048),
    "BERT's vocabulary": Case(
        student=model(2, 384, vocab_size=30522), teacher=model(2, 384, vocab_size=30522), tokens=1024
    ),
}
ZERO = {
    f"stage {stage} {precision}": replace(
        MINILM,
        tokens=256,
        rounds=2,
        ranks=2,
        engine={"zero_stage": stage, "precision": precision, "bucket_elements": 1_000_000},
    )
    for stage, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))
}


@pytest.fixture(scope="module")
def measured():
    """Peaks of all cases: those of one process in two that share the work, and the others on two ranks."""
    names, found = list(ALONE), {}
    for rank, peaks in enumerate(forked.call(memory_worker.peaks_alone, list(ALONE.values()), ranks=2)):
        found |= zip(names[rank::2], peaks, strict=True)
    peaks, _ = forked.call(memory_worker.peaks, list(ZERO.values()), ranks=2)
    return found | dict(zip(ZERO, peaks, strict=True))


def predicted(case: Case) -> memory.Footprint:
    return memory.predict(case.resolved(), device=torch.device(case.device), device_bytes=2**34)


@pytest.mark.parametrize("name", [*ALONE, *ZERO])
def test_the_peak_is_as_predicted(measured, name):
    """Within the 10 % by which a run is refused."""
    need = predicted((ALONE | ZERO)[name])
    assert need.total == pytest.approx(measured[name], rel=memory.ACCURACY), need


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("twice the tokens", "fp32"),
        ("no dropout", "fp32"),
        ("sdpa", "fp32"),
        ("deep", "checkpointing"),
        ("ModernBERT deep", "ModernBERT checkpointing"),
        ("three teachers", "fp32"),
    ],
)
def test_what_makes_the_difference(measured, more, less):
    """A difference of two runs shows an error that 10 % of a whole run would hide."""
    need = predicted(ALONE[more]).total - predicted(ALONE[less]).total
    assert need == pytest.approx(measured[more] - measured[less], rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu(checkpointing):
    sizes = dict(vocab_size=30522, max_positions=512)
    case = Case(
        student=model(6, 768, **sizes),
        teacher=model(12, 768, **sizes),
        tokens=16384,
        rounds=2,
        device="cuda",
        engine={"activation_checkpointing": checkpointing},
    )
    ((peak,),) = forked.call(memory_worker.peaks, [case], device="cuda")
    device_bytes = torch.cuda.get_device_properties(0).total_memory
    need = memory.predict(case.resolved(), device=torch.device("cuda"), device_bytes=device_bytes)
    # the allocator does not see CUDA's own part
    assert need.total - memory.CUDA_CONTEXT == pytest.approx(peak, rel=memory.ACCURACY), need


def on_cuda(**changes) -> memory.Footprint:
    """DistilBERT's on a GPU of 80 GB that need not exist."""
    sizes = dict(vocab_size=30522, max_positions=512)
    case = Case(student=model(6, 768, **sizes), teacher=model(12, 768, **sizes), tokens=16384, ranks=4)
    resolved = case.resolved()
    teacher = replace(resolved.config.teacher, **changes)
    resolved = replace(resolved, config=replace(resolved.config, teacher=teacher))
    return memory.predict(resolved, device=torch.device("cuda"), device_bytes=80 * 10**9)


class TestTeacher:
    """Where it runs and in what decides what the student's rank holds of it."""

    def test_fp8_takes_a_byte_of_its_layers_matrices(self):
        bf16, fp8 = on_cuda(precision="bf16").parts, on_cuda(precision="fp8").parts
        assert bf16["teacher"] - fp8["teacher"] == 12 * 12 * 768 * 768

    @pytest.mark.parametrize("elsewhere", [{"ranks": 1}, {"device": "second"}])
    def test_elsewhere_it_leaves_its_vocabulary_and_hidden_states(self, elsewhere):
        handed, vocabulary = 2 * 16384 * 768 * 2, 30528 * 768 * 2
        assert on_cuda(**elsewhere).parts["teacher"] == handed + vocabulary

    def test_on_a_side_stream_its_memory_is_its_own(self):
        alone, beside = on_cuda(overlap=False).parts, on_cuda(overlap=True).parts
        hidden = 16384 * 768 * 2
        assert beside["teacher"] - alone["teacher"] == (12 + 2 * 2) * hidden


class TestRefusal:
    resolved = MINILM.resolved()

    def require(self, device_bytes: int, *, resolved=resolved) -> memory.Footprint:
        return memory.require(resolved, device=CPU, device_bytes=device_bytes)

    def test_the_budget_it_names_is_the_largest_that_fits(self):
        there = int(0.8 * predicted(MINILM).total)
        fix = r"use --batch.token-budget (\d+) or less, or --engine.activation-checkpointing"
        with pytest.raises(ValueError, match=rf"needs .* GB \(weights .*\) and has .* GB: {fix}") as caught:
            self.require(there)
        budget = int(str(caught.value).split("token-budget ")[1].split()[0])

        def of(tokens: int):
            return replace(MINILM, tokens=tokens, rounds=2).resolved()

        self.require(there, resolved=of(budget))
        with pytest.raises(ValueError, match=f"use --batch.token-budget {budget} or less"):
            self.require(there, resolved=of(budget + 64))

    def test_where_none_fits(self):
        with pytest.raises(ValueError, match=r"no --batch.token-budget fits: use a smaller"):
            self.require(10_000_000)

    def test_a_prediction_may_be_wrong_by_its_accuracy(self):
        total = predicted(MINILM).total
        self.require(int(0.91 * total))
        with pytest.raises(ValueError, match="token-budget"):
            self.require(int(0.89 * total))

    def test_a_rank_gets_its_share_of_the_machine(self, monkeypatch, caplog):
        total = predicted(MINILM).total
        monkeypatch.setattr(memory, "host_bytes", lambda: int(1.9 * total))
        with caplog.at_level(logging.INFO, logger="fastdistil"):
            memory.check(self.resolved, Ranks(0, 1, CPU), local_world_size=2)
        assert f"memory: {total / 1e9:.2f} GB a rank predicted (weights " in caplog.text
        with pytest.raises(ValueError, match="a rank of this run needs"):
            memory.check(self.resolved, Ranks(0, 1, CPU), local_world_size=3)


@pytest.mark.parametrize(("limit", "least"), [("max", 10_000_000), ("9000000", 8_000_000)])
def test_a_control_group_may_leave_less(monkeypatch, tmp_path, limit, least):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nfile 5000000\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    got = memory.host_bytes()
    assert got == least if limit != "max" else got > least
