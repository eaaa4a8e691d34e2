"""squad.py: files as distributed, windows that keep their answers, the best span against all spans, official scores."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from fastdistil import evaluate
from fastdistil.evaluation import squad, tasks
from tests.support.encoders import make_encoder
from tests.support.models import MINILM

pytestmark = pytest.mark.usefixtures("one_thread")
SQUAD = tasks.TASKS["squad"]
PASSAGE = "Néstor sailed from Bergen in 1921. The ship, the Vega, was lost near Spitsbergen; nobody drowned."


def official(path: Path, questions: list[dict], passage: str = PASSAGE) -> None:
    """A file in SQuAD's own JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qas = [{"id": str(i), **q} for i, q in enumerate(questions)]
    article = {"title": "t", "paragraphs": [{"context": passage, "qas": qas}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}), encoding="utf-8")


def asked(question: str, *answers: str) -> dict:
    spans = [{"text": a, "answer_start": PASSAGE.index(a)} for a in answers]
    return {"question": question, "answers": spans}


WHEN = asked("When did he sail?", "1921", "in 1921")
WHO = asked("Who drowned?")


def test_official_files_of_both_versions_in_one_folder(tmp_path):
    for split in ("train", "dev"):
        official(tmp_path / f"{split}-v1.1.json", [WHEN])
        official(tmp_path / f"{split}-v2.0.json", [WHEN, WHO | {"is_impossible": True}])
    one = squad.load("squad", SQUAD, str(tmp_path))
    two = squad.load("squad2", tasks.TASKS["squad2"], str(tmp_path))
    expected = squad.Question(WHEN["question"], PASSAGE, ("1921", "in 1921"), (29, 26))
    assert one.train == one.validation == [expected]
    assert two.validation == [expected, squad.Question("Who drowned?", PASSAGE, (), ())]


def test_parquet_as_the_hub_distributes_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "id": ["a"],
        "context": [PASSAGE],
        "question": ["When?"],
        "answers": [{"text": ["1921"], "answer_start": [29]}],
    }
    for split in ("train", "validation"):
        pq.write_table(pa.table(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    data = squad.load("squad", SQUAD, str(tmp_path))
    assert data.train == [squad.Question("When?", PASSAGE, ("1921",), (29,))]


def wrong_start(path: Path) -> None:
    spans = [{"text": "1921", "answer_start": 3}]
    official(path, [{"question": "When?", "answers": spans}])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text('{"version": "1.1"}'), "is not SQuAD's JSON"),
        (lambda path: path.write_text("{"), "is not SQuAD's JSON"),
        (lambda path: path.write_text('{"data": [{"paragraphs": [{"context": "x", "qas": [{}]}]}]}'), "KeyError"),
        (
            lambda path: official(path, [{"question": "When?", "answers": [{"text": None, "answer_start": 3}]}]),
            "AttributeError",
        ),
        (wrong_start, "'1921' is not at character 3"),
        (lambda path: official(path, [WHO]), "no question of train has an answer"),
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path, write, message):
    official(tmp_path / "dev.json", [WHEN])
    write(tmp_path / "train.json")
    with pytest.raises(ValueError, match=message):
        squad.load("squad", SQUAD, str(tmp_path))


def span(text: str, start: int) -> dict:
    return {"question": "When?", "answers": [{"text": text, "answer_start": start}]}


def test_answers_beside_their_offsets_are_skipped_and_counted(tmp_path, caplog):
    """One or two characters beside is where it is; scoring goes by words, and keeps what cannot be learnt."""
    caplog.set_level("INFO", logger="fastdistil.evaluate")
    at = PASSAGE.index("1921")
    both = {"question": "When?", "answers": [{"text": "in 1922", "answer_start": 3}, WHEN["answers"][0]]}
    questions = [
        span("1921", at),
        span("1921", at + 1),
        span("1921", at - 2),
        span("BERGEN", 19),
        span("1921", 3),
        both,
    ]
    for split in ("train", "dev"):
        official(tmp_path / f"{split}.json", questions)
    data = squad.load("squad", SQUAD, str(tmp_path))
    assert [(q.answers, q.starts) for q in data.train] == [(("1921",), (at,))] * 4  # no question became one without
    assert [q.answers for q in data.validation] == [
        ("1921",), ("1921",), ("1921",), ("BERGEN",), ("1921",), ("in 1922", "1921"),
    ]  # fmt: skip
    assert (
        "train of squad: 3 of 7 answers are beside their offset, they are skipped; the first: 'BERGEN'" in caplog.text
    )
    assert "2 answers are taken from one or two characters beside" in caplog.text


def test_a_byte_order_mark_and_answers_of_nothing(tmp_path):
    """Some files say of what the passage does not say that its answer is "", at -1."""
    for split in ("train", "dev"):
        official(tmp_path / f"{split}.json", [WHEN, span("", -1), {"question": "Who?", "is_impossible": True}])
        file = tmp_path / f"{split}.json"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = squad.load("squad2", tasks.TASKS["squad2"], str(tmp_path))
    assert [q.answers for q in data.train] == [("1921", "in 1921"), (), ()]


@pytest.mark.parametrize(
    ("questions", "cause"),
    [
        ([span("1921", 3), span("Vega", 3), WHEN], "2 of 4 answers"),
        ([span("1921", 3)], "offsets are of another version of the passages, or count bytes or words"),
        ([span("MCMXXI", 29), span("Oslo", 22)], "the answers are of other passages, or in another language"),
    ],
)
def test_a_file_of_wrong_offsets_is_refused_with_the_cause(tmp_path, questions, cause):
    official(tmp_path / "dev.json", [WHEN])
    official(tmp_path / "train.json", questions)
    if cause.startswith("2 of 4"):
        assert len(squad.load("squad", SQUAD, str(tmp_path)).train) == 1
    else:
        with pytest.raises(ValueError, match=cause):
            squad.load("squad", SQUAD, str(tmp_path))


def test_every_answer_stands_whole_in_a_window_and_in_no_other_place():
    """A passage of many windows; real word pieces, where offsets differ from characters (an accent, a capital)."""
    rng = random.Random(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    words = ["the", "Vega,", "Néstor's", "harbour;", "(1921)", "unbelievably", "naïve", "ships", "were", "lost"]
    passage = " ".join(rng.choice(words) for _ in range(300))
    questions = []
    for _ in range(40):
        start = rng.randrange(len(passage) - 30)
        start = passage.index(" ", start) + 1
        answer = passage[start:].split(" ")[0]
        questions.append(squad.Question("Where was it lost?", passage, (answer,), (start,)))
    questions.append(squad.Question("Never? " * 40, passage, (), ()))  # longer than a window
    windows = squad.Windows(tokenizer, questions, 64)
    assert int(windows.lengths.max()) <= 64
    found = set()
    for row, question in enumerate(windows.question_of):
        first, last = windows.labels[row].tolist()
        if (first, last) == (0, 0):
            continue
        span = windows.spans[row]
        asked = questions[question]
        assert (span[first, 0], span[last, 1]) == (asked.starts[0], asked.starts[0] + len(asked.answers[0]))
        found.add(question)
    assert found == set(range(40))


def test_the_best_span_is_that_of_a_search_through_all():
    torch.manual_seed(0)
    starts, ends = torch.randn(5, 50), torch.randn(5, 50)
    allowed = torch.rand(5, 50) < 0.6
    sums, firsts, lasts = squad.best_spans(starts, ends, allowed)
    for b in range(5):
        spans = [
            (float(starts[b, i] + ends[b, j]), i, j)
            for i in range(50)
            for j in range(i, min(50, i + squad.LONGEST_ANSWER))
            if allowed[b, i] and allowed[b, j]
        ]
        assert (sums[b], firsts[b], lasts[b]) == pytest.approx(max(spans))


@pytest.mark.parametrize(
    ("answer", "people", "exact", "f1"),
    [
        ("The Vega!", ("vega",), 1, 1),  # case, articles, punctuation do not count
        ("Vega ship", ("Vega", "the ship"), 0, 2 / 3),
        ("1921", ("in 1921", "1921"), 1, 1),  # the best of several
        ("Bergen", ("Vega",), 0, 0),
        ("", (), 1, 1),
        ("Vega", (), 0, 0),
        ("", ("Vega",), 0, 0),
    ],
)
def test_scores_are_the_official_ones(answer, people, exact, f1):
    found = squad.score([answer], [squad.Question("?", PASSAGE, people, (0,) * len(people))])
    assert found["exact_match"] == exact
    assert found["f1"] == pytest.approx(f1)
    assert found["score"] == pytest.approx((exact + f1) / 2)


def make_squad(folder: Path, *, marked: bool, none: bool) -> Path:
    """The answer is w0, w1 or w2 in a passage of several windows, or with marked=False any word.

    With `none` every third question has no answer.
    """
    rng = random.Random(1)
    for split, count in (("train", 300), ("dev", 60)):
        paragraphs = []
        for i in range(count):
            words = [f"w{rng.randrange(9, 60)}" for _ in range(rng.randrange(10, 40))]
            answers = []
            place = rng.randrange(len(words) - 1)
            if not none or i % 3:
                if marked:
                    words[place] = f"w{rng.randrange(3)}"
                answers = [{"text": words[place], "answer_start": sum(len(w) + 1 for w in words[:place])}]
            qas = [{"id": f"{split}{i}", "question": "w3 w4", "answers": answers}]
            paragraphs.append({"context": " ".join(words), "qas": qas})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


@pytest.mark.parametrize(("marked", "none"), [(True, False), (True, True), (False, False)])
def test_answers_are_learnt_where_they_can_be(tmp_path, marked, none, capsys):
    model = make_encoder(tmp_path / "model")
    data = make_squad(tmp_path / "data", marked=marked, none=none)
    name = "squad2" if none else "squad"
    words = [model, "--task", name, "--data", data, "--seeds", 1, "--epochs", 4, "--batch-size", 8]
    words += ["--lr", "3e-3", "--max-length", 32, "--device", "cpu", "--save", tmp_path / "kept"]
    assert evaluate.main(list(map(str, words))) == 0
    record = json.loads((model / "evaluation.json").read_text())
    found = record["tasks"][name]["seeds"]["1"]
    assert found["exact_match"] > 0.9 if marked else found["exact_match"] < 0.3
    assert found["exact_match"] <= found["f1"]
    assert record["class"] == "BertForQuestionAnswering"
    assert ("84.8" in capsys.readouterr().out) == (name == "squad")  # published, for 1.1 only
    if none:  # the paper's second distillation, by the same operator
        words += ["--teacher", tmp_path / "kept" / name, "--out", tmp_path / "second.json"]
        assert evaluate.main(list(map(str, words))) == 0
        second = json.loads((tmp_path / "second.json").read_text())["tasks"][name]
        assert second["median"] > 0.9


def test_more_tokens_than_the_model_reads_are_refused(tmp_path, capsys):
    model = make_encoder(tmp_path / "model")
    data = make_squad(tmp_path / "data", marked=True, none=False)
    words = [model, "--task", "squad", "--data", data, "--max-length", 65, "--device", "cpu"]
    assert evaluate.main(list(map(str, words))) == 2
    assert "--max-length 65 is more than the 64 tokens" in capsys.readouterr().err
