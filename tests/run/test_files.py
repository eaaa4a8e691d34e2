"""run/files.py: old or new and never a half, and what is damaged is named."""

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from fastdistil.run import files
from tests.support import launch


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    record = {"b": [1, 2.5, None, True], "a": {"Ü": "ß"}}
    files.write_json(path, record)
    assert files.read_json(path) == record
    assert path.read_text(encoding="utf-8") == json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    files.write_json(path, [1], durable=True)
    assert files.read_json(path, kind=list) == [1]
    files.write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    files.write_bytes(path, b"\x00\xff", durable=True)
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


DAMAGED = {
    "empty": b"",
    "half": b'{"a": ',
    "no JSON": b"a: 1",
    "NUL": b"\x00" * 10,
    "no UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 100_000,
    "long number": b"1" * 5_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_json_is_refused_by_name_and_with_the_fix(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not readable as JSON \(.+\)$"):
        files.read_json(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not readable as JSON \(.+\): start again$"):
        files.read_json(path, fix="start again")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("[]", dict, "must hold a JSON object, got list"),
        ("1", dict, "must hold a JSON object, got int"),
        ("null", dict, "must hold a JSON object, got NoneType"),
        ("{}", list, "must hold a JSON array, got dict"),
        ('"x"', list, "must hold a JSON array, got str"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, content, kind, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    for fix, ending in (("", ""), ("prepare again", ": prepare again")):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}{ending}')}$"):
            files.read_json(path, kind=kind, fix=fix)


def test_no_file_is_another_error_than_a_damaged_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none.json", tmp_path / "file" / "below.json"):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} does not exist: prepare again$"):
            files.read_json(path, fix="prepare again")
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} does not exist$"):
            files.read_json(path)
    with pytest.raises(ValueError, match="is not readable as JSON"):  # there is something, and it is no file
        files.read_json(tmp_path)


def test_of_lines_those_that_are_whole_objects_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_json_lines(path) == []
    assert files.read_json_lines(tmp_path) == []
    lines = ['{"a": 1}', "", "null", "[1]", "no JSON", '{"b": "\xff"}', "[" * 100_000, '{"c": 3}', '{"d": 4, "lo']
    path.write_bytes("\n".join(lines).encode("latin-1"))
    assert files.read_json_lines(path) == [{"a": 1}, {"b": "\ufffd"}, {"c": 3}]


WRITES = {
    "bytes": lambda path, text, durable: files.write_bytes(path, text.encode(), durable=durable),
    "text": lambda path, text, durable: files.write_text(path, text),
    "json": lambda path, text, durable: files.write_json(path, text, durable=durable),
}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("exists", [False, True])
def test_killed_before_the_rename_the_old_contents_are_there_and_after_it_the_new_ones(
    tmp_path, monkeypatch, write, durable, exists
):
    """Seen at every moment at which a kill could come: by a child that is killed there."""
    path = tmp_path / "a"
    for moment in ("before", "after"):
        if exists:
            write(path, "old", durable)
        else:
            path.unlink(missing_ok=True)
        old = path.read_bytes() if exists else None
        child = os.fork()
        if child == 0:
            rename = os.replace

            def killed(source, target, rename=rename, moment=moment):
                if moment == "after":
                    rename(source, target)
                os.kill(os.getpid(), signal.SIGKILL)

            os.replace = killed
            try:
                write(path, "new" * 1000, durable)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if moment == "before":
            assert (path.read_bytes() if path.exists() else None) == old
        else:
            assert len(path.read_bytes()) >= 3000
    write(path, "third", durable)  # what a killed writer left behind is no hindrance
    assert b"third" in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_durable_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    seen, sync, rename = [], os.fsync, os.replace

    def syncing(descriptor):
        seen.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    def renaming(source, target):
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    files.write_bytes(tmp_path / "a", b"x" * 70, durable=True)
    files.write_bytes(tmp_path / "a", b"y")
    assert seen == [70, "rename", "rename"]


def test_a_write_that_fails_leaves_the_old_contents(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        with pytest.raises(OSError, match="no space"):
            files.write_bytes(path, b"new", durable=True)
    assert path.read_text() == "old"


def test_room_is_made_for_a_file_and_not_in_the_place_of_a_folder(tmp_path):
    files.make_room(tmp_path / "new/deep/file.json")
    assert (tmp_path / "new/deep").is_dir()
    with pytest.raises(ValueError, match="deep is a folder: give a file in it"):
        files.make_room(tmp_path / "new/deep")


def test_hashes_and_syncs(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1_000_000)
    assert files.sha256(path) == hashlib.sha256(b"x" * 1_000_000).hexdigest()
    files.sync(path)
    files.sync(tmp_path)  # the names in it
    for missing in (files.sync, files.sha256):
        with pytest.raises(FileNotFoundError):
            missing(tmp_path / "b")


HOLDER = """
import sys, time
from pathlib import Path
from fastdistil.run.files import Lock
lock = Lock(Path(sys.argv[1]), "it")
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


def holder(path):
    """A process that has the lock, lets it go after a line of input, and ends after another one."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], env=launch.ENVIRONMENT, **pipes)
    assert line_of(process) == "held\n"
    return process


def line_of(process):
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_lock_is_held_by_one_process_and_says_by_which(tmp_path):
    path = tmp_path / "below" / ".lock"
    with holder(path) as other:
        holder_name = f"process {other.pid} on {socket.gethostname()}"
        wanted = f"--out x is in use by {holder_name}: wait for it, stop it, or choose another --out"
        with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
            files.Lock(path, "--out x")
        assert f"process {other.pid} " in path.read_text()  # who failed to get it has changed nothing
        print(file=other.stdin, flush=True)
        assert line_of(other) == "released\n"
        with files.Lock(path, "--out x") as lock:  # while the other process still lives
            lock.file.seek(0)  # to open it a second time, and close that, would give it away
            assert lock.file.read() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert path.read_text() == ""
        print(file=other.stdin, flush=True)


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    path = tmp_path / ".lock"
    with holder(path) as other:
        other.kill()
    assert f"process {other.pid} " in path.read_text()  # it could not say goodbye
    files.Lock(path, "it").release()


def test_a_lock_whose_holder_has_not_signed_yet(tmp_path):
    path = tmp_path / ".lock"
    with holder(path):
        path.write_text("")
        with pytest.raises(ValueError, match="it is in use by another process: "):
            files.Lock(path, "it")


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    """A data worker, say: the lock is its parent's, and outlives it nowhere."""
    path = tmp_path / ".lock"
    lock = files.Lock(path, "it")
    child = os.fork()
    if child == 0:
        try:
            files.Lock(path, "it")
        except ValueError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.release()
    files.Lock(path, "it").release()


def test_a_file_system_without_locks_is_said_as_it_is(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        files.Lock(tmp_path / ".lock", "it")
