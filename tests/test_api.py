"""fastdistil.distil: one call in somebody else's process, which is as it was before when it ends, however it ends."""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastdistil
from fastdistil import api, export, prepare, pretrain
from tests.support import runs
from tests.support.launch import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [" ".join(f"w{(i + step * j) % 96}" for j in range(12 + i % 20)) for i in range(150) for step in (1, 2)]
SMALL = {
    "batch": {"size": 24, "token_budget": 256},
    "optim": {"duration": 6, "unit": "updates"},
    "engine": {"threads": 1},
    "log": {"to": "none"},
    "prepare": {"workers": 1, "max_length": 48},
}


def distil(root: Path, out: Path, texts=TEXTS, **changes):
    return fastdistil.distil(root / "teacher", texts, out=out, **SMALL | changes)


def surroundings():
    """What a process would notice of a call: handlers, logging, threads of PyTorch, workers, dumps of crashes."""
    log = logging.getLogger("fastdistil")
    return (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        (log.level, list(log.handlers)),
        torch.get_num_threads(),
        faulthandler.is_enabled(),
        sys.modules["__main__"],
    ), {t for t in threading.enumerate() if "tqdm" not in t.name}


def is_as(before):
    """Whether the process is as it was, but for threads that have ended; one that was told to takes a moment."""

    def now():
        others, running = surroundings()
        return others == before[0] and running <= before[1]

    until = time.monotonic() + 10
    while not now() and time.monotonic() < until:
        time.sleep(0.05)
    return now()


@pytest.fixture(scope="module")
def student(root, tmp_path_factory):
    """Of a call that nothing disturbed; read only."""
    return distil(root, tmp_path_factory.mktemp("distil") / "out")


def test_it_makes_what_the_commands_make(root, student, tmp_path):
    """The same weights to the last bit, of the same texts in a file."""
    words = ["--tokenizer", root / "teacher", "--out", tmp_path / "shards", "--workers", 1, "--max-length", 48]
    assert prepare.main([str(w) for w in (student.path.parent / "texts.jsonl", *words)]) == 0
    options = ["--batch.size", 24, "--batch.token-budget", 256, "--optim.duration", 6, "--optim.unit", "updates"]
    options += ["--teacher.path", root / "teacher", "--data.shards", tmp_path / "shards", "--out", tmp_path / "run"]
    assert pretrain.main(["distilbert", *map(str, options), "--log.to", "none", "--engine.threads", "1"]) == 0
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "student")]) == 0
    assert runs.same(*(load_file(p / "model.safetensors") for p in (student.path, tmp_path / "student")))
    model = transformers.AutoModelForMaskedLM.from_pretrained(student.path)
    assert type(model).__name__ == "DistilBertForMaskedLM"


def test_what_comes_back_shows_itself(student):
    train = [record for record in student.metrics if record["split"] == "train"]
    assert [record["update"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert set(student.frame()["split"]) == {"train", "validation"}
    for text in (repr(student), student._repr_html_()):
        assert "DistilBertForMaskedLM" in text
        assert "KD: T²KL to the teacher, nats a token" in text
    losses, speed = student.plot().axes
    assert {line.get_label() for line in losses.lines} >= {"loss", "kd", "mlm", "cosine"}
    assert speed.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]


def test_the_process_is_as_it_was_and_a_second_call_finds_all_done(root, student, caplog):
    before, begin = surroundings(), time.perf_counter()
    with caplog.at_level(logging.INFO, "fastdistil"):
        again = distil(root, student.path.parent)
    assert is_as(before)
    assert again.metrics == student.metrics
    assert "is finished" in caplog.text
    assert time.perf_counter() - begin < 30


def test_a_larger_duration_goes_on(root, tmp_path):
    short = distil(root, tmp_path / "out", optim={"duration": 2, "unit": "updates"})
    long = distil(root, tmp_path / "out", optim={"duration": 4, "unit": "updates"})
    assert (short.path, short.run) == (long.path, long.run)
    assert [r["update"] for r in long.metrics if r["split"] == "train"] == [1, 2, 3, 4]


class _After(logging.Handler):
    """Does something once, when a line with these words comes."""

    def __init__(self, words, what):
        super().__init__()
        self.words, self.what, self.done = words, what, False

    def emit(self, record):
        if self.words in record.getMessage() and not self.done:
            self.done = True
            self.what()


@pytest.fixture
def when():
    """when(words, what): what is done once the log says these words."""
    log, added = logging.getLogger("fastdistil"), []

    def add(words, what):
        added.append(_After(words, what))
        log.addHandler(added[-1])

    yield add
    for handler in added:
        log.removeHandler(handler)


@pytest.mark.parametrize("words", ["update 1/6", "teacher: precedes", "shard-00000"], ids=["training", "setup", "text"])
def test_ctrl_c_ends_it_and_the_same_call_goes_on(root, student, tmp_path, when, words):
    """In training with a checkpoint, before that without; the end is that of a call that nothing disturbed."""
    when(words, lambda: signal.raise_signal(signal.SIGINT))
    before = surroundings()
    with pytest.raises(KeyboardInterrupt):
        distil(root, tmp_path / "out", log={"every": 1, "to": "none"})
    assert is_as(before)
    if words.startswith("update"):
        assert runs.status(tmp_path / "out" / "run")["state"] == "stopped"
    again = distil(root, tmp_path / "out", log={"every": 1, "to": "none"})
    assert runs.same(*(load_file(s.path / "model.safetensors") for s in (student, again)))


def test_another_signal_reaches_whoever_handles_it(root, tmp_path, when):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        when("update 1/6", lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="with a checkpoint: the same call goes on"):
            distil(root, tmp_path / "out", log={"every": 1, "to": "none"})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_after_an_error_all_is_as_it_was(root, tmp_path, when, monkeypatch):
    from fastdistil.training import loop

    before = surroundings()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            distil(root, tmp_path / "out")
    assert is_as(before)  # though the error, and its frames, are still there
    assert caught.value.__traceback__ is not None
    assert distil(root, tmp_path / "out").path.is_dir()


def test_a_script_without_a_main_guard(root, tmp_path):
    """Its workers do not run it again, and it has imported no torch before it was asked for work."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, fastdistil\n"
        "assert 'torch' not in sys.modules\n"
        f"print('once')\ntexts = {TEXTS[:200]!r}\n"
        f"student = fastdistil.distil({str(root / 'teacher')!r}, texts, out='out', "
        "optim={'duration': 1, 'unit': 'updates'}, prepare={'workers': 2, 'max_length': 48}, "
        "engine={'threads': 1}, batch={'size': 24, 'token_budget': 256})\n"
        "print(student)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once\n") == 1
    assert "out/student: DistilBertForMaskedLM" in done.stdout


def test_texts_of_every_kind(tmp_path):
    import datasets
    import pandas as pd

    rows = [{"body": text, "number": i} for i, text in enumerate(TEXTS[:5])]
    path = tmp_path / "texts.jsonl"

    def written(texts, field="text"):
        assert api._sources(texts, path, field) == [str(path)]
        return path.read_text()

    of_strings = written(TEXTS[:5])
    assert written(iter(TEXTS[:5])) == of_strings
    for table in (rows, datasets.Dataset.from_list(rows), pd.DataFrame(rows)):
        assert written(table, "body") == of_strings
    streamed = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert written(streamed, "body") == of_strings
    assert written(pd.DataFrame(rows)["body"]) == of_strings

    for given in ("wiki/", Path("wiki/"), "hf:wikitext"):
        assert api._sources(given, path, "text") == [str(given)]
    assert api._sources([Path("a.txt"), Path("b.txt")], path, "text") == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there are no texts"),
        (["a", None], r"texts\[1\] is None: wanted a string, or a row with a string 'text'"),
        ([{"body": "a"}], r"texts\[0\] is {'body': 'a'}: wanted"),
        ({"train": ["a"], "test": ["b"]}, r"several splits \(train, test\): give one"),
        ([__file__], r"is the name of a file, .*test_api.py: give files as Path\("),
    ],
)
def test_what_are_no_texts_is_refused(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        api._sources(texts, tmp_path / "out" / "texts.jsonl", "text")
    assert not (tmp_path / "out" / "texts.jsonl").exists()


def test_a_table_without_the_column_is_refused(tmp_path):
    import datasets

    with pytest.raises(ValueError, match=r"no column 'text', but body, number: name it by prepare="):
        api._sources(datasets.Dataset.from_dict({"body": ["a"], "number": [1]}), tmp_path / "texts.jsonl", "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "distillbert"}, "there is no recipe distillbert: did you mean distilbert"),
        ({"lr": 1e-3}, "there is no --lr: use --optim.lr"),
        ({"optim": {"lr": 2.0}}, r"--optim.lr must be in \(0, 1\), got 2.0"),
        ({"optim": {"rate": 2.0}}, "there is no --optim.rate"),
        ({"prepare": {"max_len": 3}}, "there is no --max-len: .*--max-length"),
        ({"dry_run": True}, "distil trains: for a forecast use"),
    ],
)
def test_mistakes_are_answered_as_the_commands_answer_them(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distil(root, tmp_path / "out", **changes)


def test_a_teacher_that_will_not_do_is_refused_before_a_text_is_read(root, tmp_path):
    texts = iter(TEXTS)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        fastdistil.distil(tmp_path / "nowhere", texts, out=tmp_path / "out")
    from tests.support.models import MINILM

    with pytest.raises(ValueError, match="masked-LM head"):
        fastdistil.distil(MINILM, texts, out=tmp_path / "out")
    assert next(texts) == TEXTS[0]
    assert not (tmp_path / "out").exists()


def test_other_texts_in_the_same_folder_are_refused(root, student):
    with pytest.raises(ValueError, match="was begun with other texts: give those, or another out"):
        distil(root, student.path.parent, TEXTS[1:])


def test_no_command_is_named_that_the_call_goes_on_to_do_itself(root, student, caplog):
    assert distil(root, student.run.parent).path == student.path
    assert "is prepared already" in caplog.text
    assert "next: python -m fastdistil.pretrain" not in caplog.text


def test_nothing_is_put_into_the_teachers_folder(root):
    before = sorted((root / "teacher").iterdir())
    with pytest.raises(ValueError, match="teacher is a model: give a new folder"):
        distil(root, root / "teacher")
    assert sorted((root / "teacher").iterdir()) == before


def test_it_does_not_work_as_one_of_several(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of several: use `torchrun"):
        distil(root, tmp_path / "out")
