"""A run in pieces is the run that never stopped: bit for bit with the same ranks, the same sequences and losses with others."""

import json
from collections import Counter

import pytest
import torch

from tests import launch
from tests.test_losses import folder  # noqa: F401 (a fixture)

WORKER = launch.ROOT / "tests" / "resume_worker.py"


@pytest.mark.parametrize(
    ("ranks", "which"),
    [(None, "cells"), (2, "cells"), pytest.param(2, "everything", marks=pytest.mark.soak)],
)
def test_twelve_updates_are_six_and_six_for_every_engine(folder, tmp_path, ranks, which):  # noqa: F811
    launch.run(WORKER, folder, tmp_path, which, ranks=ranks, script=True, timeout_s=900)
    results = torch.load(tmp_path / "cells.pt", weights_only=True)
    engines = {key.split("|")[0] for key in results}
    assert len(engines) == (4 if ranks is None else 16)
    for key, result in results.items():
        engine, way = key.split("|")
        straight = results[f"{engine}|straight"]
        assert result["history"] == straight["history"], (engine, way)
        assert result["state"].keys() == straight["state"].keys()
        for name, value in result["state"].items():
            assert torch.equal(value, straight["state"][name]), (engine, way, name)
    epochs = {line["epoch"] for key, r in results.items() if "-4|" in key for line in r["history"]}
    assert len(epochs) > 1  # an end of an epoch was among the updates


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.soak
def test_four_ranks_then_two_then_one_then_four(folder, tmp_path):  # noqa: F811
    """ZeRO 1, 2 and 3 in fp32 over 50 updates: the same sequences, losses within 1e-6; nothing lost or repeated in two epochs."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    for out, launches in (
        (straight, [(4, 0, 50)]),
        (changed, [(4, 0, 13), (2, 13, 26), (1, 26, 38), (4, 38, 50)]),
    ):
        for ranks, first, last in launches:
            launch.run(WORKER, folder, out, first, last, ranks=ranks, script=True, timeout_s=500)
    for stage in (1, 2, 3):
        one, other = (read(out / str(stage) / "history.jsonl") for out in (straight, changed))
        assert [line["update"] for line in other] == list(range(50))
        worst = 0.0
        for a, b in zip(one, other, strict=True):
            assert a["sequences"] == b["sequences"]
            for x, y in zip(a["sums"][:3], b["sums"][:3], strict=True):
                worst = max(worst, abs(float.fromhex(x) / float.fromhex(y) - 1))
        assert worst < 1e-6, (stage, worst)
        assert worst > 0  # another order of additions: were it zero, nothing was compared
        # micro-batches of an epoch's end may share an update with the next one's first: count over whole epochs
        counts = Counter(s for line in other for s in line["sequences"])
        assert set(counts) == set(range(400))
        seen: list[int] = [s for line in other for s in line["sequences"]]
        for epoch in (0, 1):
            assert sorted(seen[400 * epoch : 400 * (epoch + 1)]) == list(range(400))
