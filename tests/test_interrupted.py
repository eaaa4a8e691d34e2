"""Every command, interrupted: one line, exit status 130, nothing half-written, nobody left, and it goes on.

Real processes, each the leader of a group of its own, which gets the signal as a terminal sends it. The moments are
seconds after the start: in the imports before `main`, in those of torch, at work.
"""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import launch
from tests.support.encoders import make_encoder
from tests.support.launch import options

MOMENTS = {0.15: signal.SIGTERM, 2.0: signal.SIGINT}
MORE = (0.1, 0.2, 0.5, 0.8, 1.0, 1.5, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
LINE = "interrupted by {}: what was finished is kept, and the same command does the rest"


@pytest.fixture(scope="module")
def made(root, quiet, tmp_path_factory):
    """A folder with a text that takes some seconds to prepare, a model, and a task."""
    folder = tmp_path_factory.mktemp("interrupted")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 9))) for _ in range(2000)]
    with (folder / "text.txt").open("w") as file:
        for _ in range(20_000):
            file.write(" ".join(rng.choices(words, k=30)) + "\n")
    make_encoder(folder / "model")
    (folder / "data/sst2").mkdir(parents=True)
    for split, rows in (("train", 2000), ("validation", 60)):
        lines = "".join(f"w{rng.randrange(60)} w{i % 2}\t{i % 2}\n" for i in range(rows))
        (folder / f"data/sst2/{split}.tsv").write_text(f"sentence\tlabel\n{lines}")
    return folder


def command(name, made, root, run, out):
    """The words of a command that writes below `out` alone."""
    few = " ".join(options(batch__size=24, batch__token_budget=256, data__validation_sequences=40))
    inputs = f"--data.shards {root}/shards --teacher.path {root}/teacher"
    tune = "--epochs 1 --device cpu"
    words = {
        "prepare": f"{made}/text.txt --tokenizer train:1000 --out {out}/shards --workers 2",
        "pretrain": f"quickstart {inputs} {few} --optim.duration 2 --out {out}/run --resume auto",
        "export": f"{run} --out {out}/export",
        "evaluate": f"{made}/model --task sst2 --data {made}/data --out {out}/scores.json {tune} --seeds 1",
        "efficiency": f"{made}/model --out {out}/efficiency.json --rounds 2",
        "report": f"{run} --out {out}/page.html",
        "replay": f"{run} --update 3",
        "study": f"--shards {root}/shards --teacher {root}/teacher --data {made}/data --tasks sst2 --out {out}/study "
        f"--tokens 3000 --seeds 1 --variants distilbert '--options={few}' '--evaluate-options={tune}'",
    }
    return [f"fastdistil.{name}", *shlex.split(words[name])]


def living_in_group(group):
    """The processes of a group that have not ended, whether or not somebody has waited for them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            found += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return found


def interrupted(words, out, moment, number):
    """What a command that is interrupted at a moment leaves; whether it was (it may have been done by then)."""
    out.mkdir()
    process = subprocess.Popen(
        launch.command(*words),
        env=launch.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what a shell starts in the background ignores Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    printed, said = process.communicate(timeout=120)
    assert "Traceback" not in printed + said, moment
    assert "ignored" not in said, moment
    assert not [p for p in out.rglob("*.part") if p.parent.name != "logs"], moment  # a study's own, of what a step said
    deadline = time.monotonic() + 20
    while living_in_group(process.pid):
        assert time.monotonic() < deadline, moment
        time.sleep(0.05)
    if process.returncode in (0, 75):
        return False
    assert process.returncode == 128 + number, (moment, said)
    assert said.splitlines()[-1] == LINE.format(number.name)
    return True


NAMES = ("prepare", "pretrain", "export", "evaluate", "efficiency", "report", "replay", "study")


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_and_gone_on(made, root, quiet, tmp_path, name):
    was = False
    for moment, number in MOMENTS.items():
        out = tmp_path / str(moment)
        words = command(name, made, root, quiet.run, out)
        was = interrupted(words, out, moment, number)
        assert was or moment > 1, moment
    if was and name in ("prepare", "pretrain", "export"):  # whose results are folders
        launch.run(*command(name, made, root, quiet.run, tmp_path / "2.0"))


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_more_moments(made, root, quiet, tmp_path, name, number):
    for moment in MORE:
        out = tmp_path / str(moment)
        interrupted(command(name, made, root, quiet.run, out), out, moment, number)
