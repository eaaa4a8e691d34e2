"""Damaged files: our error, naming the file, or a valid result; never a crash, a hang, wild memory or unnoticed damage.

Every test run makes the same 250 executions of each target (support/fuzz_targets.py); `make soak` makes a million in
all, and more led by coverage where atheris is installed.
FASTDISTIL_FUZZ_EXECUTIONS changes their number.
"""

import os
import random
import time

import pytest

from tests.support import fuzz_targets, launch

NAMES = (
    *("meta", "counts", "offsets", "tokens"),
    *("run", "manifest", "state", "moments", "metrics"),
    *("architecture", "safetensors", "safetensors index", "pickle of weights"),
    *("tokenizer", "tokenizer config", "special tokens", "vocabulary"),
    *("squad", "results", "progress"),
)
EXECUTIONS = int(os.environ.get("FASTDISTIL_FUZZ_EXECUTIONS", "1000000"))


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, fuzz_targets.Target]:
    made = fuzz_targets.make(tmp_path_factory.mktemp("fuzz"))
    assert sorted(made) == sorted(NAMES)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_some_mutations(targets, name):
    """By seeds and not by Hypothesis, whose draws depend on the constants in whatever modules are loaded."""
    target = targets[name]
    with fuzz_targets.bounded_memory():
        refused = [target.run(random.Random(f"{name} {seed}")) for seed in range(250)]
    assert sum(refused) >= target.least_refused * len(refused)


@pytest.mark.soak
def test_a_million_mutations(targets):
    for name in NAMES:
        count, refused = EXECUTIONS // len(NAMES), 0
        begin = time.perf_counter()
        with fuzz_targets.bounded_memory():
            for seed in range(count):
                try:
                    refused += targets[name].run(random.Random(seed))
                except BaseException as error:
                    raise AssertionError(f"{name}, seed {seed}") from error
        speed = count / (time.perf_counter() - begin)
        print(f"{name}: {count:,} executions, {refused / count:.1%} refused, {speed:,.0f} a second")
        assert refused >= targets[name].least_refused * count


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_mutations_led_by_coverage(name, tmp_path):
    pytest.importorskip("atheris", reason="atheris (coverage-guided fuzzing) is not installed")
    count = EXECUTIONS // 100
    done = launch.run("tests.workers.atheris_worker", name, count, tmp_path, ok=False, timeout_s=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {count} runs" in done.stderr
