"""checkpoint.py under faults: killed at every step of a save, every kind of damage, shards of another checkpoint, disks that are full or fail."""

import errno
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fastdistil import checkpoint
from tests.test_checkpoint import save, tensors


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
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir"), (shutil, "rmtree")):  # fmt: skip
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


def test_killed_at_every_step_of_a_save_the_old_or_the_new_one_is_there(tmp_path):
    base = tmp_path / "base"
    for update in (5, 10):
        save(base, update)
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
        assert names[-1] == "update-00000020"
        assert len(names) == 2
        shutil.rmtree(run)
    assert len(found) >= 50
    assert found == sorted(found)  # the old one until some point, the new one after it
    assert len(set(found)) == 2


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
        assert "passing over" in caplog.text, what


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_file_of_another_checkpoint_is_named_though_the_manifest_was_made_to_fit(tmp_path, name):
    save(tmp_path, 5)
    folder, other = save(tmp_path, 10), save(tmp_path / "other", 10)
    shutil.copy(other / name, folder / name)
    assert name in str(checkpoint.verify(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = json.loads((other / "manifest.json").read_text())["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) == f"{name} belongs to another checkpoint"
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)


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

    with monkeypatch.context() as patch:
        patch.setattr(*{"mkdir": (Path, "mkdir"), "fsync": (os, "fsync"), "rename": (os, "rename")}[step], fail)  # fmt: skip
        with pytest.raises(OSError, match=os.strerror(number)) as error:
            save(tmp_path, 10)
    assert "update-00000010 (16,000 bytes" in str(error.value)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-00000005"]
    save(tmp_path, 10)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)


def test_a_number_that_is_not_finite_is_never_saved(tmp_path):
    save(tmp_path, 5)
    for bad in (float("nan"), float("inf")):
        state = tensors(1)
        state["exp_avg.a"][3, 4] = bad
        with pytest.raises(checkpoint.CheckpointError, match=r"exp_avg\.a is not finite"):
            checkpoint.save(tmp_path, state, {"update": 10}, keep=2)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)


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
            if go_on:
                saver.save(tensors(15), {"update": 15})
                assert "going on without this checkpoint" in caplog.text
            with pytest.raises(checkpoint.CheckpointError, match="no space"):
                saver.close()  # the last one is never given up
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)
