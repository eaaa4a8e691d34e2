"""Checkpoints: whole or absent, verified before they are believed, never a pickle."""

import json
import os
import resource
import signal

import pytest
import torch

from fastdistil.run import checkpoint
from fastdistil.run.files import sha256
from fastdistil.run.ranks import Ranks
from tests.support.checkpoints import save, tensors

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 5)
    loaded = checkpoint.load(tmp_path, ALONE)
    assert loaded is not None
    got, state = loaded
    assert state == {"update": 5, "tokens": 50}
    assert got.keys() == tensors().keys()
    assert all(torch.equal(v, got[k]) for k, v in tensors(5).items())
    weights, _ = checkpoint.load_weights(tmp_path)
    assert sorted(weights) == ["a", "b"]


def test_the_last_ones_are_kept(tmp_path):
    for update in (5, 10, 15, 100000000):
        save(tmp_path, update)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["update-00000015", "update-100000000"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "update-100000000"


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert checkpoint.load(tmp_path, ALONE) is None
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint \(found: none\)"):
        checkpoint.load_weights(tmp_path)
    save(tmp_path, 5)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of update 7 \(found: update-00000005\)"):
        checkpoint.load_weights(tmp_path, 7)


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, name, damage, caplog):
    save(tmp_path, 5)
    path = save(tmp_path, 10) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-3])
    else:
        path.unlink()
        if damage == "link":
            other = tmp_path / "elsewhere"
            other.write_bytes(content)
            path.symlink_to(other)
    newest = checkpoint.newest(tmp_path)
    assert newest == checkpoint.folder_of(tmp_path, 5)
    assert "update-00000010" in caplog.text
    assert "makes it again; with a finished one, once it is removed" in caplog.text
    assert name in caplog.text or (name, damage) == ("manifest.json", "flip")  # then of what differs
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.load_weights(tmp_path, 10)


def test_every_flipped_byte_is_found(tmp_path):
    folder = save(tmp_path, 5)
    rng = torch.Generator().manual_seed(1)
    for name in checkpoint.FILES:
        path = folder / name
        good = path.read_bytes()
        for at in torch.randint(len(good), (25,), generator=rng).tolist():
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert checkpoint.verify(folder) is not None
        path.write_bytes(good)
    assert checkpoint.verify(folder) is None


def test_a_damaged_newer_one_does_not_push_out_what_follows_it(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 10) / "weights.safetensors").unlink()
    save(tmp_path, 6, keep=1)  # the run went on from 5
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 6)
    assert not checkpoint.folder_of(tmp_path, 5).exists()


def test_what_was_just_written_stays_though_newer_ones_can_be_read_again(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 6, keep=1)  # 10 could not be read when the run went on
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 6)) is None


def test_a_damaged_one_is_not_counted_among_those_that_are_kept(tmp_path):
    save(tmp_path, 5)
    for update in (10, 15):
        (save(tmp_path, update) / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 20)
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 5)) is None
    save(tmp_path, 25)  # now there are two good ones newer than 5
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["update-00000020", "update-00000025"]


def test_nothing_usable_is_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, 5) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.load(tmp_path, ALONE)


def test_a_renamed_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 5)
    os.rename(checkpoint.folder_of(tmp_path, 5), checkpoint.folder_of(tmp_path, 6))
    assert "holds update 5" in str(checkpoint.verify(checkpoint.folder_of(tmp_path, 6)))


FORGED = {
    "empty": lambda _: None,
    "list": lambda m: [m],
    "no files": lambda m: {"set": m["set"]},
    "no set": lambda m: {"files": m["files"]},
    "files by list": lambda m: m | {"files": list(m["files"])},
    "file left out": lambda m: m | {"files": {n: m["files"][n] for n in checkpoint.FILES[:2]}},
    "file added": lambda m: m | {"files": m["files"] | {"../x": m["files"]["state.json"]}},
    "name outside": lambda m: rename_in(m, "../update-00000005/weights.safetensors"),
    "absolute name": lambda m: rename_in(m, "/etc/passwd"),
    "numbers": lambda m: m | {"files": dict.fromkeys(m["files"], 1)},
    "wrong size": lambda m: m | {"files": m["files"] | {"state.json": m["files"]["state.json"] | {"bytes": 1}}},
    "stray key": lambda m: m | {"next": "../update-00000005"},
    "other set": lambda m: m | {"set": "0" * 32},
}


def rename_in(manifest, name):
    files = dict(manifest["files"])
    files[name] = files.pop("weights.safetensors")
    return manifest | {"files": files}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_manifest_is_refused(tmp_path, forge, caplog):
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    path = folder / "manifest.json"
    forged = forge(json.loads(path.read_text()))
    path.write_text(json.dumps(forged) if forged else "")
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    assert f"passing over {folder}: " in caplog.text


def test_a_full_disk_is_said_with_path_and_bytes_and_leaves_the_earlier_one(tmp_path):
    save(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint .*update-00000010 \(16,000 bytes, [0-9,]+ free\)"
        ):
            save(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-00000005"]


def test_too_little_space_is_said_before_work_is_lost(tmp_path):
    with pytest.raises(OSError, match=r"bytes free, a checkpoint needs 1,000,000,000,000,000,000"):
        checkpoint.require_space(tmp_path, 10**18)


@pytest.mark.parametrize("state", ["[]", "{}", "not JSON", '{"update": "x"}'])
def test_a_forged_state_with_its_own_hash_is_passed_over(tmp_path, state):
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    (folder / "state.json").write_text(state)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = sha256(folder / "state.json")
    manifest["files"]["state.json"] = {"bytes": len(state), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "a file is not a checkpoint's" in str(checkpoint.verify(folder))
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 5)


def test_state_json_is_checked_like_the_rest(tmp_path):
    folder = save(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"update": 9}))
    assert "state.json" in str(checkpoint.verify(folder))
