"""Reading text: every kind of source, in order, and what is said of broken ones."""

import bz2
import gzip
import json
import logging
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from fastdistil.data import readers
from fastdistil.data.sources import Options, resolve


def read(*specs, **options):
    return [
        document for source in resolve(tuple(map(str, specs)), Options(**options)) for document in source.documents()
    ]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(path, column, **options):
    pq.write_table(pa.table({"id": range(len(column)), "text": column}), path, **options)
    return path


def test_lines_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\n  \ttwo é\x00\u2028still two \n \n\nthree\x0cthree".encode())
    assert read(path) == ["one", "  \ttwo é\x00\u2028still two ", "three\x0cthree"]
    packed = tmp_path / "b.text.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == read(path)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + jsonl({"text": "one\ntwo"}, {"text": None}, {"text": ""}, {"text": "é", "x": 1}))
    with open(path, "a") as file:
        file.write('\n{"text": "\\ud800 lone"}')
    assert read(path) == ["one\ntwo", "é", "\ud800 lone"]
    path.write_text(jsonl({"body": "b", "text": "t"}))
    assert read(path, text_field="body") == ["b"]
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == ["t"]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    ],
)
def test_parquet(tmp_path, kind):
    texts = [f"text {index}\nécole" for index in range(1000)]
    if pa.types.is_dictionary(kind) and kind.index_type == pa.int8():
        texts = texts[:100]
    column = pa.array([*texts, None, "", "  "])
    column = column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)
    path = parquet(tmp_path / "a.parquet", column, row_group_size=300)
    assert read(path) == texts


def test_a_folder_is_read_by_name_whatever_the_order_on_the_disk(tmp_path):
    for name in ("b/1.txt", "a/2.jsonl", "a/10.txt", "a.txt", "B.TXT", ".git/x.txt", "a/.x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = jsonl({"text": name}) if name.endswith("jsonl") else name
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("no")
    parquet(tmp_path / "c.parquet", ["p"])
    assert read(tmp_path) == ["B.TXT", "a/10.txt", "a/2.jsonl", "a.txt", "b/1.txt", "p"]


def test_the_record_has_names_and_sizes_but_no_place(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("hello")
    (source,) = resolve((f"{tmp_path}/corpus/",))
    assert source.record() == {"name": "corpus", "files": [["a.txt", 5]]}
    assert source.num_bytes == 5
    list(source.documents())
    assert source.num_bytes_read == 5


def test_a_data_set_by_name_streaming_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", ["one", None, " ", "two"])
    parquet(tmp_path / "set" / "test.parquet", ["three"])
    # In a process of its own: datasets reads its settings at import.
    code = (
        "import sys; from fastdistil.data.sources import *; all = [Options(split=split, streaming=streaming)"
        " for split in ('train', 'test') for streaming in (False, True)];"
        "read = [source for options in all for source in resolve(('hf:' + sys.argv[1],), options)];"
        "print([list(source.documents()) for source in read], read[0].record())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    wanted = [["one", "two"], ["one", "two"], ["three"], ["three"]]
    record = {"name": "hf:set", "split": "train"}
    assert run.stdout.splitlines()[-1:] == [f"{wanted} {record}"], run.stderr


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"hf:.*nothing: cannot be loaded .*check the name"):
        read(f"hf:{tmp_path}/nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xe9 x\n", r"a\.txt, line 2: byte 9 \(0xe9\) is not UTF-8.*--errors"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 24 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not JSON .*one object a line"),
        ("a.json", b'[{"text": "a"}, {"text": ', r"a\.json, object 2: not JSON"),
        ("a.json", b'{\n "text": "a",\n}', r"a\.json, object 1: not JSON"),
        ("a.json", b"[" * 10**5, r"object 1: not JSON"),
        (
            "a.jsonl",
            b'{"text": {"a": "b"}}',
            r"line 1: 'text' is not text but an object of 'a'.* such as content\.text",
        ),
        ("a.jsonl", b'{"body": "a"}', r"no field 'text'; there are 'body'.*--text-field"),
        ("a.jsonl", b'{"text": 3}', r"line 1: 'text' is not text but int"),
        ("a.txt.gz", gzip.compress(b"a\n" * 999)[:-9], r"a\.txt\.gz: cannot be read to its end"),
        ("a.txt.bz2", bz2.compress(b"a\n" * 999)[:-9], r"a\.txt\.bz2: cannot be read to its end"),
        ("a.txt.xz", lzma.compress(b"a\n" * 999)[:-9], r"a\.txt\.xz: cannot be read to its end"),
        ("a.txt.zst", pa.Codec("zstd").compress(b"a\n" * 999, asbytes=True)[:-3], r"zst: cannot be read to its end"),
        ("a.txt.gz", bytes(99), r"a\.txt\.gz is neither \.gz nor text"),
        ("a.parquet", b"PAR1\0 no", r"a\.parquet: not a readable Parquet file"),
        ("a.parquet", b"<html>", r"a\.parquet is not what its name says: it begins with b'<html>'"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"a\.parquet is .*git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"a\.jsonl is .*git lfs pull"),
        ("a.parquet", b"", r"a\.parquet: not a readable Parquet file"),
        ("a.arrow", b"\xff\xff\xff\xff\0\0\1\0", r"a\.arrow: not a readable Arrow file"),
        ("a.txt", b"PK\x03\x04rest", r"a\.txt is an archive: unpack it"),
        ("a.zip", b"PK\x03\x04\0\0", r"a\.zip is an archive: unpack it"),
        ("a.tgz", gzip.compress(b"a/b.txt".ljust(257, b"\0") + b"ustar\0"), r"a\.tgz is a tar archive: unpack it"),
        ("a.tar.bz2", bz2.compress(b"a/b.txt".ljust(257, b"\0") + b"ustar "), r"a\.tar\.bz2 is a tar archive"),
        ("a.bin", b"\x7fELF\0\0", r"a\.bin is not text .*wanted \.txt .*\.parquet"),
        ("a.csv", b"id,text\n1,a\n", r"a\.csv is a table of a kind that is not read: .*to_parquet"),
        ("dump.xml.bz2", bz2.compress(b"<mediawiki>"), r"dump\.xml\.bz2 is markup: extract its text"),
        ("page", b"<!DOCTYPE html><p>", r"page is markup"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_broken_utf8_can_be_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xe9 x\n")
    assert read(tmp_path, errors="replace") == ["good", "bad \ufffd x"]
    raw = pa.array([b"ok", b"\xff!"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    path = parquet(tmp_path / "b.parquet", broken)
    with pytest.raises(ValueError, match=r"row 2: byte 0 \(0xff\)"):
        read(path)
    assert read(path, errors="replace") == ["ok", "\ufffd!"]


def test_parquet_columns_that_are_not_there_or_not_text(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match=r"no field 'body'; there are 'id', 'text'"):
        read(path, text_field="body")
    with pytest.raises(ValueError, match=r"column 'id' is not text but int64"):
        read(path, text_field="id")
    path = parquet(tmp_path / "b.parquet", pa.array([{"value": "x", "lang": "en"}]))
    with pytest.raises(ValueError, match=r"'text' is not text but struct<.*such as content\.text"):
        read(path)
    with pytest.raises(
        ValueError, match=r"column 'text': no field 'text\.body'; there are 'lang', 'value'|'value', 'lang'"
    ):
        read(path, text_field="text.body")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text"] * 2), path)
    with pytest.raises(ValueError, match="2 columns are called 'text'"):
        read(path)


def test_sources_that_are_not(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "a.zip").touch()
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1\0"))
    os.mkfifo(tmp_path / "pipe")
    for spec, message in (
        (tmp_path / "missing", "does not exist: wanted a file, a folder or hf:NAME"),
        (tmp_path / "a.parquet.gz", "is compressed as a whole, which no table is read from: decompress it"),
        (tmp_path / "empty", r"no file in this folder; wanted \.txt .* \.zst"),
        (tmp_path / "zip", r"1 of 1 files, .* are not read: a\.zip \(\.zip\); wanted \.txt"),
        (tmp_path / "pipe", "is a pipe or a device, and sources are read more than once"),
        ("hf:", "wanted hf:NAME or hf:NAME:CONFIG"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            resolve((str(spec),))


LINES = b"".join(b"the line %d\n" % number for number in range(3000))
COMPRESSED = {
    ".gz": gzip.compress(LINES[:9000]) + gzip.compress(LINES[9000:]),  # as pigz and `cat a.gz b.gz` make it
    ".bz2": bz2.compress(LINES[:9000]) + bz2.compress(LINES[9000:]),
    ".xz": lzma.compress(LINES),
    ".zst": b"\x50\x2a\x4d\x18\x04\0\0\0skip" + pa.Codec("zstd").compress(LINES, asbytes=True),  # as pzstd
    ".lz4": pa.Codec("lz4").compress(LINES, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_by_what_it_holds_whatever_it_is_called(tmp_path, suffix):
    texts = LINES.decode().split("\n")[:-1]
    for name in (f"a.txt{suffix}", f"A.TXT{suffix.upper()}", f"wiki_00{suffix}", "b.txt", "c.txt.gz", "part-00000"):
        (tmp_path / name).write_bytes(COMPRESSED[suffix])
        assert read(tmp_path / name) == texts, name
    (tmp_path / "d.jsonl").write_bytes(COMPRESSED[suffix])
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: not JSON"):
        read(tmp_path / "d.jsonl")


def test_not_compressed_though_it_is_called_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "a.txt.gz").write_bytes(LINES)
    assert len(read(tmp_path / "a.txt.gz")) == 3000
    assert "a.txt.gz (not compressed, though it is called .gz; lines of" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_with_its_mark(tmp_path, encoding):
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "a.txt").write_bytes(f"{mark}one é\r\ntwo\u2028two\r\n".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(f'{mark}{{"text": "three"}}\r\n'.encode(encoding))
    (tmp_path / "c.json").write_bytes(f'{mark}[{{"text": "four"}}]'.encode(encoding))
    assert read(tmp_path) == ["one é", "two\u2028two", "three", "four"]


def test_json_that_is_an_array_or_over_several_lines(tmp_path):
    records = [{"text": f"text {number}, " + "x" * number, "n": [number]} for number in range(2000)]
    texts = [record["text"] for record in records]
    forms = {
        "array.json": json.dumps(records),
        "pretty.json": json.dumps(records, indent=2),
        "line.jsonl": json.dumps(records) + "\n",
        "one_after_another.json": "\n".join(json.dumps(record, indent=1) for record in records),
        "strings.json": json.dumps(texts),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == texts, name
    assert sum(map(len, texts)) > 2**20  # more than is read at a time


def test_a_field_by_its_path(tmp_path):
    records = [
        {"content": {"text": "one", "n": 1}, "parts": ["a", "b"], "turns": [{"said": "x"}, {"said": "y"}]},
        {"content": None, "parts": [], "turns": None},
        {"content": {"text": "two", "n": 2}, "parts": ["c", None], "turns": [{"said": "z"}]},
    ]
    (tmp_path / "a.jsonl").write_text(jsonl(*records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    feather.write_feather(pa.Table.from_pylist(records), str(tmp_path / "c.feather"))
    for name in ("a.jsonl", "b.parquet", "c.feather"):
        assert read(tmp_path / name, text_field="content.text") == ["one", "two"], name
        assert read(tmp_path / name, text_field="parts") == ["a\nb", "c"], name
        assert read(tmp_path / name, text_field="turns.said") == ["x\ny", "z"], name
    # A name with a dot is a name before it is a path.
    (tmp_path / "a.jsonl").write_text(jsonl({"content.text": "whole", "content": {"text": "part"}}))
    pq.write_table(pa.table({"content.text": ["whole"]}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert read(tmp_path / name, text_field="content.text") == ["whole"]


def test_a_column_of_nulls_among_others(tmp_path):
    parquet(tmp_path / "a.parquet", ["one"])
    parquet(tmp_path / "b.parquet", pa.nulls(5))
    parquet(tmp_path / "c.parquet", pa.array([None, "two"]))
    assert read(tmp_path) == ["one", "two"]


def test_a_hive_partitioned_folder_with_what_spark_leaves(tmp_path):
    for day in ("2024-01-02", "2024-01-01"):
        (tmp_path / f"day={day}").mkdir()
        parquet(tmp_path / f"day={day}" / "part-00000.snappy.parquet", [day])
        (tmp_path / f"day={day}" / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_delta_log/0.json", "_temporary/0/part-00000.parquet", "_committed_1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'{"commit": 1}')
    assert read(tmp_path) == ["2024-01-01", "2024-01-02"]


def saved(folder, *splits):
    """A data set, or a dictionary of splits, as `save_to_disk` leaves it and what its users leave beside it."""
    rows = {split: datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(30)]}) for split in splits}
    if len(rows) == 1:
        rows[splits[0]].save_to_disk(folder, num_shards=3)
        kept = folder
    else:
        datasets.DatasetDict(rows).save_to_disk(folder)
        kept = folder / splits[0]
    (kept / "cache-0123.arrow").write_bytes((kept / "data-00000-of-00003.arrow" if len(rows) == 1 else
                                             kept / "data-00000-of-00001.arrow").read_bytes())  # fmt: skip
    return folder


def test_what_datasets_has_saved_to_disk(tmp_path):
    one, two = saved(tmp_path / "one", "train"), saved(tmp_path / "two", "train", "test")
    train, test = ([f"{split} {i}" for i in range(30)] for split in ("train", "test"))
    assert read(one) == read(f"hf:{one}") == read(one, split="test") == train
    assert read(two) == read(f"hf:{two}") == train
    assert read(two, split="test") == read(f"hf:{two}", split="test") == test
    assert read(tmp_path, split="test") == [*train, *test]
    assert read(one / "data-00001-of-00003.arrow") == train[10:20]
    with pytest.raises(ValueError, match=r"two has no split 'valid': name one of test, train with --split"):
        read(two, split="valid")
    (one / "data-00002-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"one lacks data-00002-of-00003\.arrow"):
        read(one)


@pytest.mark.parametrize("state", [{"_data_files": [{"filename": "../a.arrow"}]}, {"_data_files": ["../a.arrow"]}, [1]])
def test_a_state_that_names_files_elsewhere_or_is_none(tmp_path, state):
    saved(tmp_path / "one", "train")
    shutil.move(tmp_path / "one" / "data-00000-of-00003.arrow", tmp_path / "a.arrow")
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"one lacks \.\./a\.arrow|state\.json must hold a JSON object"):
        read(tmp_path / "one")


def test_what_is_not_read_of_a_folder_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, size in (
        ("a.html", 300),
        ("b.csv", 200),
        ("c", 100),
        ("README.md", 9000),
        ("a.txt.md5", 32),
        ("x.py", 1),
    ):
        (tmp_path / name).write_bytes(b"\0" * size)
    for name in ("state.json", "meta.json"):
        (tmp_path / name).write_text(json.dumps({"version": 1, "names": ["x"]}, indent=1))
    (tmp_path / ".hidden").write_bytes(b"x" * 10**5)
    (tmp_path / "a.txt").write_text("text " * 200)
    assert read(tmp_path) == ["text " * 200]
    said = next(message for message in caplog.messages if "are not read" in message)
    assert "8 of 9 files, 91% of its bytes, are not read: a.html (.html), b.csv (.csv), c (not text" in said
    assert "meta.json (one object without 'text', the --text-field)" in said
    assert said.endswith("and 3 more")
    (tmp_path / "a.txt").write_text("text " * 20)
    with pytest.raises(ValueError, match=r"8 of 9 files, .*a\.html.*; wanted .*: give by name what is text"):
        read(tmp_path)


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a.txt").write_text("linked")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "b.txt").write_text("own")
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "else")
    (tmp_path / "corpus" / "c").symlink_to(tmp_path / "corpus")
    assert read(tmp_path / "corpus") == ["linked", "own"]


def test_text_without_a_suffix_is_known_by_what_it_holds(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / "wiki_00").write_text("one line\nanother\n")
    (tmp_path / "AA" / "wiki_01").write_text(jsonl({"id": "1", "text": "from JSON"}))
    (tmp_path / "AA" / "wiki_02").write_text('<doc id="1" title="A">\nA\n\nText.\n</doc>\n<doc id="2">\nB\n</doc>\n')
    (tmp_path / "AA" / "wiki_03").write_bytes(bytes(20))
    parquet(tmp_path / "AA" / "part-4", ["from Parquet"])
    assert read(tmp_path) == ["from Parquet", "one line", "another", "from JSON", "A\n\nText.", "B"]
    for said in ("AA/wiki_03 (not text", "AA/wiki_01 (JSON by its beginning)", "between <doc ...> and </doc>"):
        assert said in caplog.text
    (tmp_path / "wiki.train.raw").write_text("by name\n")
    assert read(tmp_path / "wiki.train.raw") == ["by name"]


BOOK = """\ufeffThe Project Gutenberg eBook of Moby Dick; Or, The Whale

This ebook is for the use of anyone anywhere in the United States and
most other parts of the world at no cost and with almost no restrictions
whatsoever.



Call me Ishmael. Some years ago--never mind how long precisely--having
little or no money in my purse, and nothing particular to interest me on
shore, I thought I would sail about a little and see the watery part of
the world.

  It is a way I have of driving off the spleen and regulating the
circulation.
"""
PARAGRAPHS = [" ".join(part.split()) for part in BOOK.removeprefix("\ufeff").split("\n\n") if part.strip()]


@pytest.mark.parametrize("name", ["book.txt", "book.md", "book", "book.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_hard_wrapped_book_is_read_by_paragraphs(tmp_path, name, end, caplog):
    caplog.set_level(logging.INFO)
    data = BOOK.replace("\n", end).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(path) == PARAGRAPHS
    assert f"a document is the lines between blank ones (--documents says otherwise): {name} (lines of" in caplog.text
    lines = [line for line in BOOK.removeprefix("\ufeff").split("\n") if line]
    assert read(path, documents="line") == lines
    assert read(path, documents="file") == [BOOK.removeprefix("\ufeff").removesuffix("\n")]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one short line\n" * 50, "line"),  # titles, queries: nothing says that they belong together
        ("one short line\n\n" * 50, "line"),  # each between blank ones already
        (("A sentence.\n" * 12 + "\n") * 9, "paragraph"),  # as BERT's own text
        (("w " * 300 + "\n") * 40, "line"),
        (("w " * 300 + "\nHeading\n\n") * 40, "line"),  # WikiText: most of the text is in long lines
        (("a query\n" * 1000 + "\n") * 9, "line"),  # lists of thousands are no paragraphs
        ("", "line"),
    ],
)
def test_what_a_document_is_by_the_beginning_of_a_text(text, documents):
    assert readers._documents(text, whole=True)[0] == documents


def test_the_choice_is_in_the_record_where_it_is_not_lines(tmp_path):
    (tmp_path / "a.txt").write_text(BOOK)
    (tmp_path / "b.txt").write_text("w " * 300)
    (source,) = resolve((str(tmp_path),))
    sizes = [(tmp_path / name).stat().st_size for name in ("a.txt", "b.txt")]
    assert source.record()["files"] == [["a.txt", sizes[0], "paragraph"], ["b.txt", sizes[1]]]


def test_a_choice_without_effect_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "a.jsonl").write_text(jsonl({"text": "one\n\ntwo"}))
    assert read(tmp_path, documents="paragraph") == ["one\n\ntwo"]
    assert "--documents paragraph has no effect" in caplog.text


def test_joined_lines_are_a_document_once_they_are_many(tmp_path):
    line = "word " * 20
    (tmp_path / "a.txt").write_text(f"{line}\n" * 25_000)
    documents = read(tmp_path / "a.txt", documents="file")
    assert "\n".join(documents) == "\n".join([line] * 25_000)
    assert len(documents) == 3
    assert max(map(len, documents)) < readers.LONGEST_JOINED + 25_000


def test_bad_records_can_be_skipped_and_are_counted_and_named(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": \n[1]\n{"body": 3}\n\n{"text": "\xff"}\n{"text": "two"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"three\n\xff\nfour\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"five\n" * 3)[:-4])
    (tmp_path / "d.json").write_text('[{"text": "six"}, {"text": 6}, {"text": "seven"}, {"text" ')
    (source,) = resolve((str(tmp_path),), Options(on_bad_record="skip"))
    assert list(source.documents()) == ["one", "two", "three", "four", "five", "five", "five", "six", "seven"]
    assert source.num_bad == 8
    named = [record.message for record in caplog.records if record.message.startswith("skipped")]
    assert len(named) == 5
    assert "a.jsonl, line 2: not JSON" in named[0]
    assert "b.txt, line 2: byte 6 (0xff)" in named[4]
    assert named[4].endswith("further ones are counted")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .* or leave such records out with --on-bad-record skip"):
        read(tmp_path)
