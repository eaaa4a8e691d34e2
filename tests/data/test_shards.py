"""The format of prepared text: round trips, and every way a folder can be damaged."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.data import shards
from fastdistil.data.shards import Meta, Shards, ShardWriter, read_meta
from tests.support import stores, toy

SPECIAL_IDS = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


def write_folder(folder, sequences_by_shard, *, vocab_size=1000, max_length=512):
    """A prepared folder of the given sequences; its Meta."""
    folder.mkdir()
    dtype = shards.token_dtype(vocab_size)
    counts = np.zeros(vocab_size, np.int64)
    written = []
    for index, sequences in enumerate(sequences_by_shard):
        with ShardWriter(folder, shards.shard_name(index), dtype) as writer:
            for sequence in sequences:
                writer.add(np.array(sequence), np.array([len(sequence)]))
                counts += np.bincount(sequence, minlength=vocab_size)
            written.append(writer.finish())
    meta = Meta(
        format_version=shards.FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        special_ids=SPECIAL_IDS,
        tokenizer_sha256="0" * 64,
        max_length=max_length,
        num_documents=3,
        num_sequences=sum(map(len, sequences_by_shard)),
        num_tokens=int(counts.sum()),
        dropped_short=0,
        dropped_unknown=0,
        text_bytes=100,
        counts_sha256=shards.write_counts(folder, counts),
        preparation={},
        shards=tuple(written),
    )
    shards.write_meta(folder, meta)
    return meta


SEQUENCES = [[[2, 9, 3], [2, 8, 8, 7, 3]], [[2, 999, 3]], [[2, 3], [2, 5, 5, 5, 5, 3], [2, 6, 3]]]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "shards", SEQUENCES)
    return tmp_path / "shards"


@given(
    data=st.lists(
        st.lists(st.lists(st.integers(0, 99999), min_size=1, max_size=9), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    small=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, data, small):
    vocab_size = 65536 if small else 100000
    data = [[[i % vocab_size for i in sequence] for sequence in shard] for shard in data]
    folder = tmp_path_factory.mktemp("shards") / "x"
    meta = write_folder(folder, data, vocab_size=vocab_size)
    read = Shards(folder)
    flat = [sequence for shard in data for sequence in shard]
    assert read.meta == meta
    assert [read.sequence(index).tolist() for index in range(len(read))] == flat
    assert read.lengths.tolist() == [len(sequence) for sequence in flat]
    assert read.lengths.dtype == np.int32
    assert read.sequence(0).dtype == np.dtype("uint16" if small else "uint32")
    wanted = np.bincount(np.concatenate([np.array(s) for s in flat]), minlength=vocab_size)
    assert np.array_equal(read.counts, wanted)


def test_an_index_out_of_range(folder):
    read = Shards(folder)
    for index in (-1, 6):
        with pytest.raises(IndexError, match="which has 6"):
            read.sequence(index)


def test_a_file_that_is_cut_while_it_is_read(folder):
    """A map of it would end the process by SIGBUS."""
    read = Shards(folder)
    read.sequence(3)
    path = folder / "shard-00002.tokens"
    os.truncate(path, path.stat().st_size - 1)
    read.sequence(3)
    with pytest.raises(ValueError, match=r"shard-00002.tokens was cut since it was opened: run .* again"):
        read.sequence(5)


def test_open_files_stay_out_of_a_pickle(folder):
    read = Shards(folder)
    read.sequence(3)
    again = pickle.loads(pickle.dumps(read))
    assert again._files == {}
    assert again.sequence(4).tolist() == SEQUENCES[2][1]
    with pytest.raises(ValueError, match="read-only"):
        again.sequence(4)[0] = 1


def test_an_unfinished_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished preparation"):
        read_meta(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.tokens", "shard-00002.offsets", "shard-00000.tokens", "counts.npy"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "flip", "remove", "folder"])
def test_a_damaged_file_is_named(folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "extend":
        path.write_bytes(data + b"\0")
    elif damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(ValueError, match="with --overwrite") as error:
        Shards(folder)
    assert str(path) in str(error.value)


def test_the_parts_of_the_hashing_cover_every_file(folder):
    path = folder / "shard-00001.tokens"
    path.write_bytes(path.read_bytes()[::-1])
    Shards(folder, verify=False)
    for rank in (1, 2):
        Shards(folder, verify_part=(rank, 3))
    with pytest.raises(ValueError, match=r"shard-00001\.tokens was changed"):
        Shards(folder, verify_part=(0, 3))


def test_offsets_that_do_not_fit_are_found_without_hashes(folder):
    path = folder / "shard-00002.offsets"
    offsets = np.fromfile(path, "<i8")
    for broken, message in (
        ([0, 12, 8, 11], "sequences of -4 to"),
        ([1, 2, 8, 11], "runs from 1"),
        ([0, 2, 8, 10], "runs from 0 to 10"),
        ([0, 0, 8, 11], "sequences of 0 to"),
    ):
        np.array(broken, "<i8").tofile(path)
        with pytest.raises(ValueError, match=message):
            Shards(folder, verify=False)
    offsets.tofile(path)
    Shards(folder)


def _broken_metas():
    yield "not readable as JSON", b"{"
    yield "not readable as JSON", b"\xff\xfe\x00"
    yield "not readable as JSON", b"[" * 10**5
    yield "must hold a JSON object", b"[]"

    def changed(**changes):
        return lambda record: {**record, **changes}

    for name in Meta.__annotations__:
        if name not in _LATER:
            yield name, lambda record, name=name: {k: v for k, v in record.items() if k != name}
        for value in (None, -1, True, 1.5, "x", [], {}, [1], 10**30):
            if not (name == "preparation" and value == {}) and not (
                (value == 10**30 and name in _UNBOUNDED) or (value == "x" and "sha256" in name)
            ):
                yield name, changed(**{name: value})
    yield "special_ids['mask']", changed(special_ids={**SPECIAL_IDS, "mask": 1000})
    yield "special_ids['pad']", changed(special_ids={**SPECIAL_IDS, "pad": False})
    yield "special_ids['unk']", changed(special_ids={"pad": 0})
    yield "uint16", changed(vocab_size=70000)
    for field, value in (
        ("name", "../shard-00000"),
        ("name", "/etc/passwd"),
        ("name", "shard-00001"),
        ("num_sequences", 0),
        ("num_sequences", "2"),
        ("num_tokens", 10**30),
        ("tokens_sha256", None),
    ):

        def change(record, field=field, value=value):
            record["shards"][0][field] = value
            return record

        yield field, change


_LATER = {"dropped_share", "bad_records"}  # folders of before have none
_UNBOUNDED = {"num_documents", "dropped_short", "dropped_unknown", "text_bytes", "bad_records"}


@pytest.mark.parametrize(("message", "damage"), list(_broken_metas()))
def test_a_hostile_meta_is_a_value_error_with_file_and_field(folder, message, damage):
    path = folder / "meta.json"
    if not isinstance(damage, bytes):
        damage = json.dumps(damage(json.loads(path.read_bytes()))).encode()
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="with --overwrite") as error:
        Shards(folder, verify=False)
    assert message in str(error.value) or "counts.npy" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_crash_leaves_the_old_file_or_the_new_one(folder, monkeypatch):
    path = folder / "counts.npy"
    old = path.read_bytes()

    def fail(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        shards.write_counts(folder, np.zeros(1000))
    assert path.read_bytes() == old


def test_a_folder_can_be_moved(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert len(Shards(tmp_path / "elsewhere")) == 6


def test_a_folder_of_before_losses_were_counted(folder):
    path = folder / "meta.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in _LATER}))
    meta = Shards(folder).meta
    assert (meta.dropped_share, meta.bad_records) == (0.0, 0)


class TestFetch:
    """A prepared folder at a URL becomes a copy on this machine."""

    @pytest.fixture(autouse=True)
    def no_fault(self):
        yield
        stores.Faulty.set()

    def test_a_copy_is_made_once(self, tmp_path, caplog):
        there = toy.make_shards(tmp_path / "wiki")
        with caplog.at_level("INFO", logger="fastdistil"):
            here = shards.fetch("--data.shards", f"faulty://{there}", tmp_path / "cache")
        assert here.parent == tmp_path / "cache"
        assert here.name.startswith("wiki-")
        assert f"copying 0.0 MB in 5 files to {here}" in caplog.text

        def contents(folder):
            return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        assert contents(here) == contents(there)
        (there / "counts.npy").unlink()  # it is not looked at again
        assert shards.fetch("--data.shards", f"faulty://{there}", tmp_path / "cache") == here
        # Another text under the same name has another copy.
        other = toy.make_shards(tmp_path / "other" / "wiki", seed=1)
        assert shards.fetch("--data.shards", f"faulty://{other}", tmp_path / "cache") != here

    @pytest.mark.parametrize("name", ["shard-00001.tokens", "shard-00000.offsets", "counts.npy"])
    def test_what_is_damaged_there_is_no_copy(self, tmp_path, name):
        there = toy.make_shards(tmp_path / "wiki")
        whole = (there / name).read_bytes()
        (there / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"--data.shards faulty://.*: {name} is not as meta.json says \(SHA-256"):
            shards.fetch("--data.shards", f"faulty://{there}", tmp_path / "cache")
        assert not list((tmp_path / "cache").glob("*/meta.json"))
        # Once it is whole there, the copy goes on with what has come.
        (there / name).write_bytes(whole)
        here = shards.fetch("--data.shards", f"faulty://{there}", tmp_path / "cache")
        assert len(shards.Shards(here)) == 400

    def test_what_is_no_preparation(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"--data.shards faulty://.*empty holds no finished preparation"):
            shards.fetch("--data.shards", f"faulty://{tmp_path}/empty", tmp_path / "cache")
        (tmp_path / "empty" / "meta.json").write_text("{}")
        with pytest.raises(ValueError, match=r"--data.shards faulty://.*empty.* lacks the field"):
            shards.fetch("--data.shards", f"faulty://{tmp_path}/empty", tmp_path / "cache")

    def test_a_disk_that_is_too_small(self, tmp_path, monkeypatch):
        there = toy.make_shards(tmp_path / "wiki")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"is [\d,]+ bytes, and .*cache has 1,000 free: give a --data.cache with"):
            shards.fetch("--data.shards", f"faulty://{there}", tmp_path / "cache")
