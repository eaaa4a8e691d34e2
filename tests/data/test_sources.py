"""Reading text: every kind of source, in order, and what is said of broken ones."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistil.data.sources import Options, resolve


def read(*specs, **options):
    return [document for source in resolve(tuple(map(str, specs)), Options(**options)) for document in source.documents()]


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
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    texts = [f"text {index}\nécole" for index in range(1000)]
    column = pa.array([*texts, None, "", "  "]).cast(kind)
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
        "import sys; from fastdistil.data.sources import *; (s,) = resolve(('hf:' + sys.argv[1],));"
        "print([list(s.documents(Options(split=split, streaming=streaming)))"
        " for split in ('train', 'test') for streaming in (False, True)], s.record(Options()))"
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
        ("a.txt", "text".encode("utf-16"), r"line 1: byte 0 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 24 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not JSON .*one object a line"),
        ("a.json", b'[{"text": "a"}]', r"line 1: wanted one object a line, got list"),
        ("a.json", b"[" * 10**5, r"line 1: not JSON"),
        ("a.jsonl", b'{"body": "a"}', r"no field 'text'; there are 'body'.*--text-field"),
        ("a.jsonl", b'{"text": 3}', r"line 1: 'text' is not text but int"),
        ("a.txt.gz", gzip.compress(b"a\n" * 999)[:-9], r"a\.txt\.gz: cannot be read to its end"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read to its end"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
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


def test_sources_that_are_not(tmp_path):
    (tmp_path / "a.zip").touch()
    (tmp_path / "a.parquet.gz").touch()
    for spec, message in (
        (tmp_path / "missing", "does not exist: wanted a file, a folder or hf:NAME"),
        (tmp_path / "a.zip", r"cannot read a file of this kind; wanted \.txt .* \.json\.gz \.parquet"),
        (tmp_path / "a.parquet.gz", "cannot read a file of this kind"),
        (tmp_path, r"no \.txt .* file in this folder"),
        ("hf:", "wanted hf:NAME or hf:NAME:CONFIG"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            resolve((str(spec),))
