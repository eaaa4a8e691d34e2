"""A run in pieces is the run that never stopped: bit for bit with the same ranks, the same sequences and losses with others."""

import json

import pytest
import torch

from tests.support import launch
from tests.training.test_objective import folder  # noqa: F401 (a fixture)

WORKER = launch.ROOT / "tests" / "workers" / "resume_worker.py"


@pytest.mark.parametrize(
    ("ranks", "which"), [(None, "cells"), (2, "cells"), pytest.param(2, "everything", marks=pytest.mark.soak)]
)
def test_twelve_updates_are_six_and_six_for_every_engine(folder, tmp_path, ranks, which):  # noqa: F811
    launch.run(WORKER, folder, tmp_path, which, ranks=ranks, script=True, timeout_s=900)
    results = torch.load(tmp_path / "cells.pt", weights_only=True)
    engines = {key.split("|")[0] for key in results}
    assert len(engines) == (4 if ranks is None else 16 if which == "everything" else 8)
    for key, result in results.items():
        engine, way = key.split("|")
        straight = results[f"{engine}|straight"]
        assert result["history"] == straight["history"], (engine, way)
        assert torch.equal(result["generator"], straight["generator"]), (engine, way)
        assert result["state"].keys() == straight["state"].keys()
        for name, value in result["state"].items():
            assert torch.equal(value, straight["state"][name]), (engine, way, name)
        assert result["history"][-1]["epoch"] >= 1, engine  # an epoch ended among the updates


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_ranks_then_two_then_one_then_four(folder, tmp_path):  # noqa: F811
    """ZeRO 1, 2, 3 in fp32 against the plain engine over 50 updates: the same sequences, losses within 1e-6; none lost or repeated in three epochs."""
    launch.run(WORKER, folder, tmp_path, "plain", 0, 50, script=True)
    for ranks, first, last in ((4, 0, 9), (2, 9, 21), (1, 21, 42), (4, 42, 50)):
        launch.run(WORKER, folder, tmp_path, "1,2,3", first, last, ranks=ranks, script=True, timeout_s=500)  # fmt: skip
    for stage in ("1", "2", "3"):
        one, other = (read(tmp_path / s / "history.jsonl") for s in ("plain", stage))
        assert [line["update"] for line in other] == list(range(50))
        worst = 0.0
        for a, b in zip(one, other, strict=True):
            assert a["met"] == b["met"]
            for x, y in zip(a["sums"][:3], b["sums"][:3], strict=True):
                worst = max(worst, abs(float.fromhex(x) / float.fromhex(y) - 1))
        assert worst < 1e-6, (stage, worst)
        assert worst > 0  # another order of additions: were it zero, nothing was compared
        # an epoch's last micro-batches may share an update with the next one's first, never a micro-batch
        seen = [s for line in other for _, sequences in line["met"] for s in sequences]
        for epoch in range(len(seen) // 400):
            assert sorted(seen[400 * epoch : 400 * (epoch + 1)]) == list(range(400))
        assert len(seen) > 3 * 400
