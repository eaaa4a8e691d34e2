"""checkpoint.py under faults: killed at every step of a save, damaged in every way, on disks that are full or fail."""

import errno
import itertools
import json
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdistil.run import checkpoint
from tests.support import launch
from tests.support.checkpoints import save, tensors


class Killer:
    """Numbers what a save does to the disk, before and after each step, and kills the process at number `at`."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def point(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner, name: str, *, half: bool = False) -> None:
        """Three points for what writes a file: before, with half of it, after."""
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.point()
            result = real(*args, **kwargs)
            if half:
                path = next(a for a in args if isinstance(a, Path))
                whole = path.read_bytes()
                os.truncate(path, len(whole) // 2)
                self.point()
                path.write_bytes(whole)
            self.point()
            return result

        setattr(owner, name, call)


def killed_save(run: Path, at: int) -> bool:
    """Whether a save of update 15 was killed, in a child process, at point `at`."""
    child = os.fork()
    if child == 0:
        killer = Killer(at)
        steps = (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir"), (shutil, "rmtree")
        for owner, name in steps:
            killer.around(owner, name)
        killer.around(checkpoint, "save_file", half=True)
        killer.around(Path, "write_text", half=True)
        try:
            save(run, 15)
        finally:
            os._exit(0 if checkpoint.verify(checkpoint.folder_of(run, 15)) is None else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_every_step_of_a_save_the_old_or_the_new_one_is_there(tmp_path, again):
    """`again`: a damaged checkpoint of the same update lies there, passed over when the run went on."""
    base = tmp_path / "base"
    for update in (5, 10):
        save(base, update)
    if again:
        (save(base, 15, keep=3) / "state.json").write_text("")
    stale = base / "checkpoints" / "update-00000007.part"  # of an earlier killed save
    shutil.copytree(checkpoint.folder_of(base, 5), stale)
    found, at = [], 0
    while True:
        at += 1
        run = tmp_path / "run"
        shutil.copytree(base, run)
        killed = killed_save(run, at)
        newest = checkpoint.newest(run)
        assert newest is not None
        assert newest.name in ("update-00000010", "update-00000015")
        state = checkpoint.load_weights(run)[0]
        expected = tensors(int(newest.name[-2:]))
        assert all(torch.equal(state[n], expected[f"weight.{n}"]) for n in ("a", "b"))
        if not killed:
            break
        found.append(newest.name)
        save(run, 20)  # the next one succeeds and leaves nothing lying about
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert names in (["update-00000010", "update-00000020"], ["update-00000015", "update-00000020"]) or (
            again and names == ["update-00000010", "update-00000015", "update-00000020"]
        )
        shutil.rmtree(run)
    assert len(found) >= 50
    assert found == sorted(found)  # the old one until some point, the new one after it
    assert len(set(found)) == 2


def test_all_is_synced_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    """What a loss of power would show, and SIGKILL does not."""
    save(tmp_path, 5)
    seen, rename = [], os.rename
    monkeypatch.setattr(checkpoint, "sync", lambda path: seen.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), rename(a, b)))
    save(tmp_path, 10)
    assert sorted(seen[:3]) == sorted(checkpoint.FILES)
    assert seen[3:] == ["manifest.json", "update-00000010.part", "rename", "checkpoints"]


def damage(folder: Path, rng: random.Random, *, cut: bool) -> str:
    """Flip a bit of a random file, or cut it; its name and place."""
    name = rng.choice([*checkpoint.FILES, "manifest.json"])
    content = bytearray((folder / name).read_bytes())
    if cut:
        length = rng.randrange(len(content))
        (folder / name).write_bytes(content[:length])
        return f"{name} cut to {length}"
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    (folder / name).write_bytes(content)
    return f"{name} bit {bit} of byte {at}"


def test_200_flipped_bits_and_40_cuts_are_all_found_and_passed_over(tmp_path, caplog):
    save(tmp_path, 5)
    good = tmp_path / "good"
    shutil.copytree(save(tmp_path, 10), good)
    rng = random.Random(0)
    for i in range(240):
        folder = checkpoint.folder_of(tmp_path, 10)
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        what = damage(folder, rng, cut=i >= 200)
        caplog.clear()
        assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5), what
        assert f"passing over {folder}: " in caplog.text, what
        # a manifest that was changed names what no longer agrees with it
        assert what.split()[0] in caplog.text or what.startswith("manifest.json"), what


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_file_of_another_checkpoint_is_named_though_the_manifest_was_made_to_fit(tmp_path, name):
    save(tmp_path, 5)
    folder, other = save(tmp_path, 10), save(tmp_path / "other", 10)
    shutil.copy(other / name, folder / name)
    assert name in str(checkpoint.verify(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = json.loads((other / "manifest.json").read_text())["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{name} belongs to another checkpoint" in str(checkpoint.verify(folder))
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)


def test_files_that_changed_places_are_named_though_the_manifest_was_made_to_fit(tmp_path):
    folder = save(tmp_path, 10)
    first, second = checkpoint.FILES[:2]
    (folder / first).rename(folder / "x")
    (folder / second).rename(folder / first)
    (folder / "x").rename(folder / second)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]
    files[first], files[second] = files[second], files[first]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{first} belongs to another" in str(checkpoint.verify(folder))


@pytest.mark.parametrize("what", ["empty folder", "pipe", "unreadable"])
def test_what_cannot_be_read_is_passed_over_and_nothing_hangs(tmp_path, monkeypatch, what, caplog):
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    if what == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == "pipe":
        (folder / "manifest.json").unlink()
        os.mkfifo(folder / "manifest.json")
    else:
        real = checkpoint.sha256

        def broken_disk(path):
            if path.parent == folder:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path)

        monkeypatch.setattr(checkpoint, "sha256", broken_disk)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    assert f"passing over {folder}: " in caplog.text


def test_a_link_in_place_of_a_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.verify(folder) == "it is a link"
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["mkdir", "fsync", "rename"])
def test_a_disk_that_fails_is_said_and_leaves_the_earlier_one(tmp_path, monkeypatch, number, step):
    save(tmp_path, 5)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    owners = {"mkdir": Path, "fsync": os, "rename": os}
    with monkeypatch.context() as patch:
        patch.setattr(owners[step], step, fail)
        with pytest.raises(OSError, match=os.strerror(number)) as error:
            save(tmp_path, 10)
    assert "update-00000010 (16,000 bytes" in str(error.value)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-00000005"]
    save(tmp_path, 10)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_is_named(tmp_path, monkeypatch, caplog):
    for update in (5, 10):
        save(tmp_path, update)
    real = os.rename

    def rename(source, target):
        if str(source).endswith("update-00000005"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 15)
    assert "update-00000005 stays" in caplog.text
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 15)


def in_child(code: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Run Python after the command words `before`; it knows `Path`, `checkpoint` and `save`."""
    imports = (
        "from pathlib import Path",
        "from fastdistil.run import checkpoint",
        "from tests.support.checkpoints import save",
    )
    code = "\n".join((*imports, code))
    words = [*before, sys.executable, "-c", code]
    return subprocess.run(words, env=launch.ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_a_disk_that_is_really_full(tmp_path):
    """A tmpfs in a namespace of its own, gone with the process, of which a checkpoint takes 32 KiB.

    That it is full is found by writing, then by asking.
    """
    mount = f"mount -t tmpfs -o size=48k tmpfs {shlex.quote(str(tmp_path))}"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this system lets us mount no tmpfs")
    done = in_child(
        f"""
run, ask = Path({str(tmp_path)!r}), checkpoint.require_space
for checkpoint.require_space in (lambda *_: None, ask):
    if checkpoint.newest(run) is None:
        save(run, 5)
    try:
        save(run, 10)
    except OSError as error:
        print(error)
    print(checkpoint.newest(run).name, *(p.name for p in (run / "checkpoints").iterdir()))
""",
        *namespace,
    )
    assert done.returncode == 0, done.stderr
    by_writing, whole, by_asking, still_whole = done.stdout.splitlines()
    folder = f"{tmp_path}/checkpoints"
    assert by_writing.startswith(f"cannot write the checkpoint {folder}/update-00000010 (16,000 bytes, ")
    assert "No space left on device" in by_writing
    assert by_asking.startswith(f"{folder} has 16,384 bytes free, a checkpoint needs 1,064,576: ")
    assert whole == still_whole == "update-00000005 update-00000005"


@pytest.mark.soak
@pytest.mark.parametrize("call", ["mkdir", "ftruncate", "fsync", "rename", "unlinkat", "rmdir"])
def test_killed_by_strace_at_every_system_call_of_a_save(tmp_path, call):
    traced = ["strace", "-f", "-qq", "-o", "/dev/null"]
    if not shutil.which("strace") or subprocess.run([*traced, "true"]).returncode:
        pytest.skip("strace is not installed, or may not trace")
    for when in itertools.count(1):
        run = tmp_path / str(when)
        for update in (5, 10):
            save(run, update)
        kill = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}"]
        done = in_child(f"save(Path({str(run)!r}), 15)", *traced, *kill)
        newest = checkpoint.newest(run)
        assert newest is not None
        assert newest.name in ("update-00000010", "update-00000015")
        got = checkpoint.load_weights(run)[0]
        expected = tensors(int(newest.name[-2:]))
        assert all(torch.equal(got[n], expected[f"weight.{n}"]) for n in ("a", "b"))
        save(run, 20)
        assert len(list((run / "checkpoints").iterdir())) == 2
        if done.returncode == 0:  # there is no such call any more
            assert when > 1
            break
        assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_number_that_is_not_finite_is_never_saved(tmp_path):
    save(tmp_path, 5)
    for bad in (float("nan"), float("inf")):
        state = tensors(1)
        state["exp_avg.a"][3, 4] = bad
        with pytest.raises(checkpoint.CheckpointError, match=r"exp_avg\.a is not finite"):
            checkpoint.save(tmp_path, state, {"update": 10}, keep=2)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    large = tensors(1)
    large["exp_avg.a"].fill_(3e38)  # finite, though the sum is not
    checkpoint.save(tmp_path, large, {"update": 10}, keep=2)


def test_the_saver_works_behind_the_run_and_says_what_failed(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastdistil")
    saver = checkpoint.Saver(tmp_path, keep=2, go_on=False)
    saver.save(tensors(5), {"update": 5})
    saver.save(tensors(10), {"update": 10})  # after the first is done
    assert checkpoint.newest(tmp_path) is not None
    saver.close()
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)
    assert "wrote" in caplog.text

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    for go_on in (True, False):
        saver = checkpoint.Saver(tmp_path, keep=2, go_on=go_on)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            saver.save(tensors(15), {"update": 15})
            saver.save(tensors(15), {"update": 15})  # tried again, whatever becomes of the run
            assert f"{'going on' if go_on else 'saving once more'} without this checkpoint" in caplog.text
            with pytest.raises(checkpoint.CheckpointError, match="no space"):
                saver.close()  # the last one is never given up
            assert go_on == (saver.failure() is None)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)
