"""The copy of a run on an object store: whole or absent whatever fails, and never in the way of the run."""

import hashlib
import importlib.util
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fastdistil.remote import mirror
from fastdistil.remote.mirror import Mirror
from fastdistil.remote.storage import storage
from fastdistil.run import checkpoint
from fastdistil.run.checkpoint import Saver
from fastdistil.run.command import Launched
from fastdistil.run.config import Config, to_json
from tests.support import launch, runs, stores
from tests.support.checkpoints import save, tensors
from tests.support.stores import Faulty

ALONE = Launched(by_torchrun=False, rank=0, world_size=1, local_rank=0, local_world_size=1, num_restarts=0)


@pytest.fixture(autouse=True)
def no_fault():
    yield
    Faulty.set()


@pytest.fixture
def run(tmp_path):
    """A run folder without checkpoints."""
    folder = tmp_path / "run"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("a\n")
    record = {"config": to_json(Config(out=folder)), "student": {"num_layers": 2}}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text('{"update": 1}\n')
    return folder


def mirror_of(run: Path, keep: int = 2) -> Mirror:
    """Into the folder store beside the run."""
    return Mirror(f"faulty://{run.parent}/store", run, keep=keep)


def sent(to: Mirror, folder: Path) -> str | None:
    """Send a checkpoint and wait; why it failed, or None."""
    to.send(folder)
    assert not to.is_uploading(30)
    return to.failure


def brought(run: Path) -> list[str]:
    """The names of the checkpoints in a fresh folder that was made of the store, all of them whole."""
    there = run.parent / "elsewhere"
    shutil.rmtree(there, ignore_errors=True)
    mirror.fetch(f"faulty://{run.parent}/store", there)
    folders = sorted((there / "checkpoints").iterdir())
    assert [checkpoint.verify(folder) for folder in folders] == [None] * len(folders)
    return [folder.name for folder in folders]


def bring(config: Config, here: Launched = ALONE) -> tuple[Config, int]:
    """What comes of it, and how often the command line was read."""
    read: list[Config] = []

    def parse() -> Config:
        read.append(config)
        return config

    return mirror.bring(parse, here), len(read)


def test_it_is_a_run_folder(run):
    to = mirror_of(run)
    for update in (5, 10, 15):
        (run / "metrics.jsonl").write_text(f'{{"update": {update}}}\n')
        assert sent(to, save(run, update)) is None
    to.end()
    store = run.parent / "store"

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert contents(store) == contents(run)
    assert [p.name for p in sorted((store / "checkpoints").iterdir())] == ["update-00000010", "update-00000015"]
    assert brought(run) == ["update-00000015"]
    there = contents(run.parent / "elsewhere")
    assert there.items() <= contents(run).items()
    assert {"config.json", "metrics.jsonl", "tokenizer/vocab.txt"} < there.keys()


NUM_WRITES = 10
"""Of a second checkpoint: config.json, metrics.jsonl and manifest, written and moved, the three files, and one more."""


@pytest.mark.parametrize("number", range(1, NUM_WRITES + 1))
def test_a_fault_leaves_the_last_good_one_and_the_next_makes_up_for_it(run, number, caplog):
    to = mirror_of(run)
    assert sent(to, save(run, 5)) is None
    Faulty.set(stores.fail_at(number))
    failure = sent(to, save(run, 10))
    assert (failure is None) == (number == NUM_WRITES)
    assert (Faulty.writes, Faulty.on_write is None) == (min(number, NUM_WRITES - 1), False)
    if failure is not None:
        assert "lacks update-00000010 (OSError: no more room for" in failure
        assert "the run goes on, and the next checkpoint is tried" in caplog.text
    assert brought(run) == ["update-00000005" if failure else "update-00000010"]
    Faulty.set()
    assert sent(to, save(run, 15)) is None
    assert brought(run) == ["update-00000015"]
    kept = sorted(p.name for p in (run.parent / "store" / "checkpoints").iterdir())
    assert kept == (["update-00000005"] if failure else ["update-00000010"]) + ["update-00000015"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("number", range(1, NUM_WRITES, 2))
def test_a_death_leaves_the_last_good_one(run, number, again):
    """Also where the checkpoint of the same update is written anew, with other contents."""
    first = mirror_of(run)
    assert sent(first, save(run, 5)) is None
    if again:
        assert sent(first, save(run, 10)) is None
        shutil.rmtree(run / "checkpoints" / "update-00000010")
    save(run, 10)
    first.end()  # no thread is left at the fork
    child = os.fork()
    if child == 0:
        Faulty.set(stores.die_at(number))
        to = mirror_of(run)
        to.has_begun = True
        sent(to, run / "checkpoints" / "update-00000010")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    records_alone = again and number <= 4
    assert brought(run) == ["update-00000010" if records_alone else "update-00000005"]


@pytest.mark.parametrize("name", ["weights", "optimizer", "manifest", "metrics"])
def test_what_is_cut_on_its_way_is_seen(run, name):
    to = mirror_of(run)
    assert sent(to, save(run, 5)) is None
    Faulty.set(cut=name)
    assert "bytes after" in (sent(to, save(run, 10)) or "")
    Faulty.set()
    assert brought(run) == ["update-00000005"]


def test_what_is_damaged_there_is_passed_over(run, caplog):
    to = mirror_of(run)
    for update in (5, 10):
        assert sent(to, save(run, update)) is None
    checkpoints = run.parent / "store" / "checkpoints"
    weights = checkpoints / "update-00000010" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert brought(run) == ["update-00000005"]
    assert "passing over update-00000010" in caplog.text
    assert "differs from its SHA-256" in caplog.text
    (checkpoints / "update-00000005" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be used"):
        brought(run)
    for manifest in checkpoints.glob("*/manifest.json"):
        names = {"../../../planted": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
        manifest.write_text(json.dumps({"set": "", "files": names}))
        (manifest.parents[2].with_name("planted")).write_text("x")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be used"):
        brought(run)
    assert "names '../../../planted', which is no file of a checkpoint" in caplog.text
    for manifest in checkpoints.glob("*/manifest.json"):
        manifest.write_text("[]")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be used"):
        brought(run)
    shutil.rmtree(checkpoints)
    with pytest.raises(ValueError, match="holds no run with a whole checkpoint"):
        brought(run)


def test_a_slow_store_holds_nothing_up_and_gets_the_newest(run):
    """While the first upload hangs, its checkpoint is removed and three others are written."""
    free, reached = threading.Event(), threading.Event()

    def on_write(number: int, path: str) -> None:
        if "weights" in path:
            reached.set()
            assert free.wait(60)

    Faulty.set(on_write)
    to = mirror_of(run, keep=1)
    saver = Saver(run, keep=1, go_on=False, then=to.send)
    for update in (5, 10, 15, 20):
        saver.save(tensors(update), {"update": update})
        if update == 5:
            assert reached.wait(60)
    saver.close()  # the run's own disk
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["update-00000020"]
    assert to.is_uploading(0.1)
    free.set()
    assert not to.is_uploading(60)
    assert to.failure is None
    assert to.seconds > 0
    assert [p.name for p in (run.parent / "store" / "checkpoints").iterdir()] == ["update-00000020"]
    assert brought(run) == ["update-00000020"]


def test_a_place_that_is_no_good_is_refused_before_the_work(run, tmp_path):
    config = Config(out=run, mirror=f"faulty://{tmp_path}/store", resume="auto")
    assert bring(config) == (config, 1)
    Faulty.set(stores.fail_at(1))
    with pytest.raises(ValueError, match=r"cannot be read and written \(OSError: no more room .* the login are right"):
        bring(config)
    Faulty.set()
    assert sent(mirror_of(run), save(run, 5)) is None
    with pytest.raises(
        ValueError, match="already holds a run: use --resume auto to go on with it, or another --mirror"
    ):
        bring(replace(config, out=tmp_path / "new", resume="never"))
    record = json.loads((run / "config.json").read_text())
    record["config"]["seed"] = 1
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds another run than --out .*--seed: was 56, now 1\): give another one"):
        bring(config)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        bring(replace(config, out=tmp_path))
    for mine, here in ((replace(config, dry_run=True), ALONE), (config, ALONE._replace(rank=2, local_rank=0))):
        assert bring(mine, here) == (mine, 1)


def test_a_machine_that_is_behind_gets_what_is_newer(run, tmp_path):
    config = Config(out=run, mirror=f"faulty://{tmp_path}/store", resume="auto")
    to = mirror_of(run)
    behind = tmp_path / "behind"
    for update in (5, 10):
        assert sent(to, save(run, update)) is None
        if update == 5:
            shutil.copytree(run, behind)
    assert bring(config) == (config, 1)  # has it already
    mine = replace(config, out=behind)
    assert bring(mine) == (mine, 2)
    assert checkpoint.newest(behind) == behind / "checkpoints" / "update-00000010"


@pytest.mark.parametrize("at", ["weights.safetensors", "config.json"])
def test_brought_in_part_and_then_whole(run, tmp_path, monkeypatch, at):
    """The machine is preempted while it copies; the same command begins again."""
    config = Config(out=tmp_path / "new", mirror=f"faulty://{tmp_path}/store", resume="auto")
    assert sent(mirror_of(run), save(run, 5)) is None

    class Preempted(BaseException):
        pass

    def preempted(*_: object, **__: object) -> None:
        raise Preempted

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_fetch_records" if at == "config.json" else "write_bytes", preempted)
        with pytest.raises(Preempted):
            bring(config)
    assert list((config.out / "checkpoints").iterdir())
    assert bring(config) == (config, 2)
    assert checkpoint.newest(config.out) == checkpoint.folder_of(config.out, 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a", "wants a package that is not installed .*gcsfs.*: `pip install gcsfs`"),
        ("nosuch://bucket/a", "Protocol not known: nosuch: use s3://, gs://"),
        ("sftp://me:secret@host/a", "wants a URL without a password, which would be kept"),
    ],
)
def test_urls_that_cannot_be_used(url, message):
    with pytest.raises(ValueError, match=f"--mirror {message}|--mirror {url}:? {message}") as refused:
        storage("--mirror", url)
    assert "secret" not in str(refused.value)


needs_s3 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("s3fs", "moto", "boto3", "flask")),
    reason="no s3fs with moto's server here: pip install s3fs 'moto[server]'",
)


@needs_s3
def test_from_s3_to_s3_bit_for_bit(root, quiet, tmp_path):
    """Shards from a bucket, checkpoints into it; another machine goes on from there, and exports from there."""
    port = stores.free_port()
    with stores.s3(port) as client:
        for path in sorted((root / "shards").rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"wiki/{path.relative_to(root / 'shards')}")
        more = {"data__shards": "s3://bucket/wiki", "mirror": "s3://bucket/runs/a", "resume": "auto"}
        more |= {"data__cache": tmp_path / "cache"}

        def pretrain(run: Path) -> str:
            return launch.run(*runs.arguments(root, run, **more), environment=stores.s3_environment(port)).stdout

        printed = pretrain(tmp_path / "first")
        assert "copying 0.0 MB in 5 files" in printed
        assert "mirror: update-00000012 is in s3://bucket/runs/a" in printed
        assert "of-a-test" not in printed
        config = (tmp_path / "first" / "config.json").read_text()
        assert "of-a-test" not in config
        runs.same_ends(tmp_path / "first", quiet.run)

        # As if the machine had died before the last upload.
        client.delete_object(Bucket="bucket", Key="runs/a/checkpoints/update-00000012/manifest.json")
        printed = pretrain(tmp_path / "second")
        assert "brought update-00000010 of s3://bucket/runs/a" in printed
        assert "copying" not in printed
        assert "resuming after update 10 of 12" in printed
        runs.same_ends(tmp_path / "second", quiet.run)
        assert runs.exact_metrics(tmp_path / "second") == runs.exact_metrics(quiet.run)
        words = ("fastdistil.export", "s3://bucket/runs/a", "--out", tmp_path / "student")
        done = launch.run(*words, environment=stores.s3_environment(port))
        assert "after update 12" in done.stdout


@needs_s3
def test_a_store_that_is_gone_at_the_end(root, tmp_path):
    """The run ends whole, says so, and has failed; the same command sends what lacks."""
    port, words = stores.free_port(), runs.arguments(root, tmp_path / "run", resume="auto", mirror="s3://bucket/a")
    environment = stores.s3_environment(port)
    with stores.s3(port):
        process = launch.start_until(
            "mirror: update-00000005 is in", ["env", *_assignments(environment), *launch.command(*words)]
        )
    rest = launch.rest_of(process)
    assert process.returncode == 1
    assert "mirror: s3://bucket/a lacks update-000000" in rest
    assert "the run is finished, and whole in" in rest.splitlines()[-1]
    assert runs.status(tmp_path / "run")["state"] == "failed"
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "update-00000012"
    with stores.s3(port) as client:
        printed = launch.run(*words, environment=environment).stdout
        assert "mirror: update-00000012 is in s3://bucket/a" in printed
        assert runs.status(tmp_path / "run")["state"] == "finished"
        there = client.get_object(Bucket="bucket", Key="a/status.json")["Body"].read()
        assert json.loads(there)["state"] == "finished"


def _assignments(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]
