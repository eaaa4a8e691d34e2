"""benchmarks/scaling.py: the bytes that its formulas claim are those that the engines send; the ring model by hand."""

import pytest
import torch

from benchmarks.scaling import INFINIBAND_NDR, Link, Messages, messages, predict, ring_s, update_s
from tests.support import forked
from tests.workers import communication_worker

HALF_RINGS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_every_stage_sends(dtype):
    """No gradient travels before the boundary in stages 0 and 1, and elsewhere what the formulas say."""
    by_stage, _ = forked.call(communication_worker.sent, dtype, ranks=2)
    assert by_stage.keys() == {0, 1, 2, 3}
    for stage, counted in by_stage.items():
        inner, boundary = (
            sum(HALF_RINGS[kind] * n for kind, n in counted[phase].items()) for phase in ("inner", "boundary")
        )
        want = messages(stage, counted["num_parameters"], dtype.itemsize)
        if stage in (0, 1):
            assert counted["inner"] == {}, stage
        # norms and flags are a few bytes; stage 3 gathers its smallest weights (6 %) once an update instead
        assert inner == pytest.approx(want.a_micro_batch, rel=0.05, abs=64), stage
        assert boundary == pytest.approx(want.a_micro_batch + want.boundary, rel=0.05, abs=64), stage


def test_a_ring_by_hand():
    link = Link(bytes_per_s=100.0, latency_s=1.0)
    assert ring_s(800, 1, link) == 0
    assert ring_s(0, 4, link) == 0
    assert ring_s(800, 4, link) == 3 * (1 + 2)  # three steps of 200 bytes


def test_an_update_by_hand():
    link = Link(bytes_per_s=100.0, latency_s=1.0)
    sent = Messages(a_micro_batch=400, boundary=800)
    seconds = update_s(num_ranks=4, num_micro_batches=10, micro_batch_s=5.0, optimiser_s=0.5, sent=sent, link=link)
    assert seconds == 3 * (5 + 3 * (1 + 1)) + 0.5 + 3 * (1 + 2)  # ten on four: the slowest has three


def test_predictions_are_sane():
    rows = predict(
        500_000, num_parameters=67_000_000, num_micro_batches=60, token_budget=16384,
        inside=INFINIBAND_NDR, across=INFINIBAND_NDR,
    )  # fmt: skip
    by = {(r["gpus"], r["stage"]): r for r in rows}
    assert {gpus for gpus, _ in by} == {1, 2, 4, 8, 16, 32}  # 64 would leave ranks without work
    for stage in (0, 1, 2, 3):
        assert by[1, stage]["tokens_per_s"] == pytest.approx(500_000)
        assert all(by[n, stage]["efficiency"] <= 1 + 1e-9 for n in (2, 4, 8, 16, 32))
        assert by[16, stage]["updates_per_s"] < by[32, stage]["updates_per_s"]
    assert by[8, 1]["updates_per_s"] > by[8, 2]["updates_per_s"]
    assert by[32, 1]["efficiency"] < 60 / 64  # 60 micro-batches on 32 ranks: 4 places of 64 stay empty
