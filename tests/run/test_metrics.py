"""metrics.py: what is counted, what is flagged, what a resume forgets."""

import json
import logging
import math
from collections.abc import Sequence

import pytest
import torch

from fastdistil.run import metrics
from fastdistil.run.ranks import Ranks

NAMES = ("loss", "kd")
ALONE = Ranks(0, 1, torch.device("cpu"))


def to_means(sums: list[float], counts: Sequence[int]) -> dict[str, float]:
    return {name: value / counts[0] for name, value in zip(NAMES, sums, strict=True)}


def journal(writer: metrics.MetricsWriter | None = None, **changes: object) -> metrics.Journal:
    given = {"num_sums": 2, "to_means": to_means, "flops": 3.0, "peak": 1e6, "num_updates": 100}
    return metrics.Journal(writer, ALONE, **given | changes)  # type: ignore[arg-type]


def update(record: metrics.Journal, number: int, norm: float, sums: tuple[float, float] = (8.0, 4.0)) -> None:
    record.add(torch.tensor(sums))
    counts = {"split": "train", "update": number, "tokens": 4, "masked": 1, "sequences": 1}
    record.close_update(counts, torch.tensor(norm))


def flagged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "times the median" in r.getMessage()]


def test_a_spike_is_flagged_once_enough_is_known_and_no_ordinary_norm(caplog):
    record = journal()
    for number in range(19):
        update(record, number, 1.0 + 0.1 * (number % 3))
    update(record, 19, 500.0)  # nobody knows yet what is usual
    record.flush()
    assert not flagged(caplog)
    update(record, 20, 1.1 * metrics.SPIKE - 0.1)
    record.flush()
    assert not flagged(caplog)
    update(record, 21, 1.1 * metrics.SPIKE + 1.1)
    record.flush()
    assert flagged(caplog) == ["update 21: gradient norm 12.1, 11 times the median of the last 21"]
    assert record.num_skipped == 0  # it was no reason to skip


def test_what_is_not_finite_is_counted_and_is_no_measure_of_what_is_usual(caplog):
    record = journal(num_skipped=3)
    for number in range(30):
        update(record, number, 1.0)
    for number, norm in ((30, math.inf), (31, math.nan)):
        update(record, number, norm)
        record.flush()
    assert (record.num_skipped, record.skipped_in_a_row) == (5, 2)
    assert "update 31 skipped: its gradient is not finite (5 so far)" in caplog.text
    update(record, 32, 1.0)
    record.flush()
    assert (record.num_skipped, record.skipped_in_a_row) == (5, 0)
    assert record.longest_skip == (2, 31)  # whether a run ends for it does not depend on when one looked
    assert all(map(math.isfinite, record.recent))


def test_a_line_an_update_and_valid_json(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastdistil")
    record = journal(metrics.MetricsWriter(tmp_path, resumed_at=0, trackers=(), go_on=False))
    update(record, 1, 2.5)
    record.add(torch.tensor([8.0, 4.0]))  # the second of two micro-batches
    update(record, 2, math.nan)
    record.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["loss"], first["kd"], first["gradient_norm"]) == (2.0, 1.0, 2.5)
    assert (second["loss"], second["gradient_norm"], second["skipped"]) == (4.0, None, True)
    assert first["mfu"] == pytest.approx(first["tokens_per_s"] * 3.0 / 1e6)
    assert "update 2/100  loss 4  kd 2 nats" in caplog.text


def test_a_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"update": n}) for n in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"update": 4, "lo']))  # the last one was being written
    writer = metrics.MetricsWriter(tmp_path, resumed_at=2, trackers=(), go_on=False)
    writer.write({"update": 3, "split": "train"})
    writer.close("stopped")
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_no_peak_is_made_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Nobody 3000")
    unknown = None, "no peak known for NVIDIA Nobody 3000"
    assert metrics.peak_flops(torch.device("cuda"), torch.bfloat16) == unknown
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert metrics.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == 989e12
    peak, source = metrics.peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert peak > 1e8
    assert "matrix product of 1024 in float32" in source
