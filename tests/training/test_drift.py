"""The drift of a teacher in low precision: its number against the definition, and what is done about it."""

# ruff: noqa: F811 (fixtures of other files)

import logging
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdistil.model.weights import load_masked_lm
from fastdistil.run.config import TeacherConfig
from fastdistil.run.ranks import Place
from fastdistil.training import precision as drift
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher
from tests.support import launch
from tests.test_pretrain import arguments, root  # noqa: F401
from tests.training.test_objective import DEVICE, folder, make_batches  # noqa: F401

PLACE = Place(0, 1, DEVICE, None)


def make_teacher(root, dtype: torch.dtype) -> Teacher:
    return Teacher(load_masked_lm(root / "teacher", need_head=True), device=DEVICE, dtype=dtype)


def config(root, **changes: Any) -> TeacherConfig:
    return TeacherConfig(path=root / "teacher", precision="bf16", **changes)


def definition(low: Teacher, exact: Teacher, batches) -> tuple[float, int]:
    """Whole logits, in fp64 but for the products that are a teacher's own."""
    nats = num_tokens = 0
    for batch in batches:
        n = batch.num_tokens
        assert n < len(batch.input_ids)  # there is padding to leave out
        log_p, log_q = (t.head(t.hidden(batch))[:n].double().log_softmax(-1) for t in (low, exact))
        nats, num_tokens = nats + (log_p.exp() * (log_p - log_q)).sum().item(), num_tokens + n
    return nats, num_tokens


def test_the_definition(folder):
    _, batches = make_batches(folder, 2)
    low, exact = make_teacher(folder, torch.bfloat16), make_teacher(folder, torch.float32)
    with torch.no_grad():
        for teacher in (low, exact):
            teacher.head.norm.weight.mul_(4)  # far from flat: temperatures differ
    wanted, _ = definition(low, exact, batches[:1])
    batch = batches[0]
    got = drift.kl_sum(exact(batch), low(batch), batch, vocab_size=101).item()
    assert got == pytest.approx(wanted, rel=1e-2)
    assert drift.kl_sum(exact(batch), exact(batch), batch, vocab_size=101).item() < wanted / 1000


def test_the_mean_over_two_micro_batches_of_every_rank_is_said(folder, caplog, monkeypatch):
    _, batches = make_batches(folder, 2)
    low, exact = make_teacher(folder, torch.bfloat16), make_teacher(folder, torch.float32)
    nats, num_tokens = definition(low, exact, batches)

    other = torch.tensor([nats / 2, 2.0 * num_tokens], device=DEVICE)
    monkeypatch.setattr(drift.ranks, "sum_over_ranks", lambda x: x + other)

    def no_more():
        raise AssertionError("a third micro-batch was made")
        yield

    with caplog.at_level(logging.INFO, "fastdistil"):
        drift.require(low, config(folder), chain(batches, no_more()), PLACE)
    (line,) = caplog.messages
    mean = 1.5 * nats / (3 * num_tokens)
    said = f"teacher in bf16: drift {mean:.1e} nats a token from fp32, bound 5.0e-02"
    assert line == said


def test_beyond_the_bound_is_refused(folder):
    _, batches = make_batches(folder, 2)
    low = make_teacher(folder, torch.bfloat16)
    message = (
        r"--teacher.precision bf16 wants a teacher within 1.0e-08 nats .* got drift \d.\de-0\d .*: "
        "use --teacher.precision fp32, or a larger --teacher.max-drift"
    )
    with pytest.raises(ValueError, match=message):
        drift.require(low, config(folder, max_drift=1e-8), batches, PLACE)
    with torch.no_grad():
        low.head.bias[3] = float("nan")
    with pytest.raises(ValueError, match="got drift nan"):
        drift.require(low, config(folder), batches, PLACE)


def test_fp32_is_not_measured(folder, caplog):
    with caplog.at_level(logging.INFO, "fastdistil"):
        drift.require(make_teacher(folder, torch.float32), TeacherConfig(), [], PLACE)
    assert not caplog.messages


def test_a_remote_teacher_is_asked(folder, caplog):
    """Its hidden states come over the link, for the micro-batches of the validation, from 0."""
    _, batches = make_batches(folder, 2)
    low, asked = make_teacher(folder, torch.bfloat16), []

    def ask(question, answer):
        asked.append(question)
        return lambda: answer.copy_(low.hidden(batches[question[1]]))

    model = load_masked_lm(folder / "teacher", need_head=True)
    link: Any = SimpleNamespace(ask=ask)
    remote = RemoteTeacher(model, link, device=DEVICE, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, "fastdistil"):
        drift.require(low, config(folder), batches, PLACE)
        drift.require(remote, config(folder), batches, PLACE)
    assert asked == [(Split.VALIDATION, 0), (Split.VALIDATION, 1)]
    assert caplog.messages[0] == caplog.messages[1]


def test_a_run_says_it_or_is_refused(root, tmp_path):
    """Two ranks: one line, one error, nobody left waiting, nothing written."""
    few = {"teacher__precision": "bf16", "optim__duration": 1}
    done = launch.run(*arguments(root, tmp_path / "run", **few), ranks=2)
    assert done.stdout.count("teacher in bf16: drift ") == 1
    refused = launch.run(*arguments(root, tmp_path / "no", **few, teacher__max_drift=1e-9), ranks=2, ok=False)
    assert refused.returncode != 0
    assert refused.stderr.count("error: --teacher.precision bf16 wants") == 1
    assert not (tmp_path / "no").exists()
