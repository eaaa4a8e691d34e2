"""`fastdistil COMMAND`: one name for every command."""

import subprocess
import sys

import pytest

from fastdistil import __main__
from fastdistil.__main__ import COMMANDS, main
from tests.support import launch

NO_COMMANDS = {"__init__", "__main__", "api"}


def said(capsys, monkeypatch, *words):
    """(exit status, stdout, stderr) of `fastdistil WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["fastdistil", *words])
    monkeypatch.setattr(__main__, "leave", sys.exit)  # which would ignore signals from here on
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_every_command_is_listed():
    assert {p.stem for p in (launch.ROOT / "fastdistil").glob("*.py")} - NO_COMMANDS == set(COMMANDS)


def test_without_a_command_it_lists_them(capsys, monkeypatch):
    status, out, err = said(capsys, monkeypatch)
    assert (status, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("pretrian", "there is no command 'pretrian': did you mean pretrain?"),
        ("fastdistil.exprot", "there is no command 'fastdistil.exprot': did you mean export?"),
        ("--help-me", "there is no command '--help-me'\n"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(capsys, monkeypatch, word, answer):
    status, _, err = said(capsys, monkeypatch, word)
    assert status == 2
    assert answer in err
    assert ", ".join(COMMANDS) in err


def test_a_command_gets_its_words_and_its_status_is_the_end():
    done = subprocess.run(
        [sys.executable, "-m", "fastdistil", "export", "--otu", "x"],
        env=launch.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: there is no --otu: did you mean --out?")
