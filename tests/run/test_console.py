"""run/console.py: a bar on a terminal, dated lines elsewhere, the file in the run folder, tables, commands to type."""

import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fastdistil.run import console
from tests.support import forked, launch, runs
from tests.support.runs import arguments, metrics_of

DATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return runs.make_inputs(tmp_path_factory.mktemp("inputs"))


def on_a_terminal(words: list[str], columns: int = 80, *, hang_up_at: str = "", **environment: str) -> tuple[int, str]:
    """(exit status, everything that it wrote) of a command on a terminal of so many columns.

    The terminal goes away when `hang_up_at` was written.
    """
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = launch.ENVIRONMENT | {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, env=env, start_new_session=True)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # the other end is closed
            break
        written += part
        if not part or (hang_up_at and hang_up_at.encode() in written):
            break
    os.close(mine)
    return process.wait(timeout=120), written.decode()


def shown(written: str) -> str:
    return CONTROL.sub("", written).replace("\r", "\n")


def test_a_terminal_shows_a_bar_below_the_lines_and_each_thing_once(root, tmp_path):
    run = tmp_path / "run"
    status, written = on_a_terminal(launch.command(*arguments(root, run, log__every=1)))
    assert status == 0
    text = shown(written)
    assert "\x1b[2K" in written  # a line was drawn anew
    assert "12 of 12" in text
    assert re.search("^loss .* nats .* agreement", text, re.MULTILINE)
    assert "GiB" in text
    assert "update 12/12" not in text  # that is the bar's
    assert text.count("validation after update 12") == text.count("wrote ") / 3 == 1
    assert f"next: python -m fastdistil.export {run} --out {run}-model" in text  # not wrapped
    bars = [line for line in text.splitlines() if " of 12" in line]
    assert all(len(line) <= 80 for line in bars)
    # The file has all lines, also those that the bar showed.
    kept = (run / console.KEPT).read_text()
    assert "\x1b" not in kept
    assert kept.count("update 12/12  loss") == 1
    assert all(DATED.match(line) for line in kept.splitlines())


def test_no_colour_and_a_dumb_terminal(root, tmp_path):
    status, written = on_a_terminal(launch.command(*arguments(root, tmp_path / "a")), NO_COLOR="1")
    assert status == 0
    assert "\x1b[38" not in written
    assert "12 of 12" in written
    status, written = on_a_terminal(launch.command(*arguments(root, tmp_path / "b")), TERM="dumb")
    assert status == 0
    assert "\x1b" not in written
    lines = written.splitlines()
    assert all(DATED.match(line) for line in lines)
    assert sum("update 12/12  loss" in line for line in lines) == 1


def test_a_terminal_that_goes_away_does_not_end_a_run(root, tmp_path):
    words = launch.command(*arguments(root, tmp_path / "run", log__every=1, optim__duration=60))
    status, _ = on_a_terminal(words, hang_up_at="loss")
    assert status == 0
    assert metrics_of(tmp_path / "run")[-1]["update"] == 60


def test_the_log_of_a_run_is_kept_over_restarts(root, tmp_path):
    run = tmp_path / "run"
    forked.run(*arguments(root, run))
    first = (run / console.KEPT).read_text()
    assert forked.run(*arguments(root, run), ok=False).returncode == 2
    assert (run / console.KEPT).read_text() == first  # what was refused is no part of the run
    forked.run(*arguments(root, run, optim__duration=16, resume="auto"))
    kept = (run / console.KEPT).read_text()
    assert kept.startswith(first)
    assert "resuming after update 12 of 16" in kept[len(first) :]


def test_the_log_of_a_run_has_the_traceback_of_its_failure(root, tmp_path):
    run = tmp_path / "run"
    words = arguments(root, run, log__every=1)[1:]
    assert forked.run("tests.workers.faulty_worker", "fail", 0, 3, *words, ok=False).returncode == 1
    kept = (run / console.KEPT).read_text()
    assert "Traceback (most recent call last):" in kept
    assert DATED.match(kept.splitlines()[-1])
    assert kept.endswith(" error: the run failed: rank 0, update 3: planted failure\n")


def test_where_no_terminal_is_a_line_says_how_far_it_has_come(monkeypatch, caplog):
    times = iter([0.0, 1.0, 10.0, 31.0, 40.0, 70.0, 71.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    caplog.set_level(logging.INFO, "fastdistil")
    assert list(console.progress("abcde", 5, "sst2, seed 1")) == list("abcde")
    assert caplog.messages == ["sst2, seed 1: 2 of 5, 0:00:46 left", "sst2, seed 1: 4 of 5, 0:00:17 left"]


def test_the_log_of_the_process_is_left_as_it_was(tmp_path, capsys, monkeypatch):
    root = logging.getLogger()
    before = list(root.handlers)
    console.start(sys.stderr, keeps=True)
    assert len(root.handlers) == len(before) + 1  # pytest has its own: only the file's is new
    console.end()
    assert root.handlers == before
    monkeypatch.setattr(root, "handlers", [])
    console.start(sys.stderr)
    logging.getLogger("fastdistil.prepare").info("once")
    console.end()
    assert root.handlers == []
    assert re.fullmatch(DATED.pattern + "once\n", capsys.readouterr().err)


def test_a_table_fits_80_columns_and_takes_what_looks_like_markup_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "a/very/long/path/" * 4 + "[red]x"
    console.show(console.table(("", "figure", "another"), [(long, 1, "2.50"), ("short", 10, "100 to 200")]), "next: x")
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in printed)
    words = [line.split()[0] for line in printed if line]
    assert long in "".join(words)  # folded, not cut
    assert printed[-1] == "next: x"
    assert any(re.fullmatch(r"short +10 +100 to 200", line) for line in printed)


def test_a_command_to_type_is_quoted():
    assert console.command_line("export", Path("my runs/a"), "--out", "b") == (
        "python -m fastdistil.export 'my runs/a' --out b"
    )


def test_nobody_reads_a_table_to_its_end(root, tmp_path):
    """`| head`: status 141, without a word."""
    words = launch.command(*arguments(root, tmp_path / "run"), "--dry-run")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=launch.ENVIRONMENT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_a_line_of_metrics_says_of_time_and_memory(root, tmp_path):
    run = tmp_path / "run"
    forked.run(*arguments(root, run))
    train = [line for line in metrics_of(run) if line["split"] == "train"]
    assert [line["tokens_seen"] for line in train] == [sum(x["tokens"] for x in train[: i + 1]) for i in range(12)]
    for name in ("time", "seconds"):
        assert [line[name] for line in train] == sorted(line[name] for line in train)
    assert train[0]["time"].endswith("+00:00")
    assert all(0.05 < line["memory_gib"] < 100 for line in train)
    before = train[-1]["seconds"]
    forked.run(*arguments(root, run, optim__duration=16, resume="auto"))
    train = [line for line in metrics_of(run) if line["split"] == "train"]
    assert train[11]["seconds"] == before < train[12]["seconds"]
    assert train[12]["seconds"] < before + 60
    assert train[15]["tokens_seen"] == sum(line["tokens"] for line in train)
    assert json.loads((run / "checkpoints/update-00000016/state.json").read_text())["seconds"] == train[15]["seconds"]
