"""report.py: what the page says is what metrics.jsonl says; unfinished and hostile runs; no request to anywhere."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdistil import report
from fastdistil.run.config import LOSS_TERMS

STUDENT = {
    "vocab_size": 101, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64,
    "max_positions": 64, "token_types": 0,
}  # fmt: skip


def make_run(folder: Path, *, updates: int = 20, validated: bool = True, lr: float = 1e-3, **record: object) -> Path:
    folder.mkdir(parents=True)
    config = {"recipe": "distilbert", "optim": {"lr": lr, "eps": 1e-6}, "out": str(folder)}
    contents = {"config": config, "student": STUDENT, "teacher": None, "versions": {"torch": "2.13"}}
    (folder / "config.json").write_text(json.dumps(contents | record))
    lines = []
    for update in range(1, updates + 1):
        lines.append({
            "split": "train", "update": update, "tokens": 1000, "masked": 150, "loss": 10.0 - update / 10,
            "mlm": 5.0 - update / 20, "gradient_norm": 1.5, "tokens_per_s": 500.0 * update, "mfu": 0.25,
        })  # fmt: skip
        if validated and update % 10 == 0:
            lines.append({"split": "validation", "update": update, "loss": 9.0, "mlm": 4.4321})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Tables as {first cell: other cells}; tags and attributes as they come."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells = []
        if tag in ("th", "td"):
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.inside = False
        if tag == "tr" and self.cells:
            self.rows[self.cells[0]] = self.cells[1:]

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def make_page(tmp_path: Path, *runs: Path) -> str:
    out = tmp_path / "report.html"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    return out.read_text()


def test_the_summary_is_what_the_runs_measured(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", updates=30, lr=2e-3)
    rows = Page(make_page(tmp_path, one, two)).rows
    assert rows["updates"] == ["20", "30"]
    assert rows["tokens"] == ["20,000", "30,000"]
    assert rows["tokens/s, median"] == ["5,250", "7,750"]
    assert rows["MFU, median"] == ["25.0%", "25.0%"]
    assert rows["validation masked LM: cross-entropy, nats a masked token"] == ["4.4321", "4.4321"]
    seconds = sum(1000 / (500.0 * u) for u in range(1, 21))
    assert rows["training time"][0] == f"0:00:{round(seconds):02d}"
    assert rows["optim.lr"] == ["0.001", "0.002"]
    assert "optim.eps" not in rows  # the same in both
    assert "out" not in rows


def test_one_page_without_any_request(tmp_path):
    text = make_page(tmp_path, make_run(tmp_path / "one"))
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4  # loss, mlm, gradient norm, tokens/s
    assert text == make_page(tmp_path, tmp_path / "one")  # the same bytes again


def test_ids_of_the_plots_do_not_collide(tmp_path):
    page = Page(make_page(tmp_path, make_run(tmp_path / "one")))
    clips = [a["id"] for tag, a in page.tags if tag == "clippath"]
    assert len(clips) == len(set(clips)) > 1


def test_hostile_words_are_text(tmp_path):
    evil = "<script>alert(1)</script>"
    config = {"recipe": evil, "optim": {"lr": evil}}
    one = make_run(tmp_path / "one", config=config, versions={evil: evil})
    two = make_run(tmp_path / "two")
    text = make_page(tmp_path, one, two)
    assert "<script" not in text
    assert Page(text).rows["optim.lr"] == [json.dumps(evil), "0.001"]


def test_runs_that_go_on_or_have_just_begun(tmp_path):
    cut = make_run(tmp_path / "cut", validated=False)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "upd')
    fresh = make_run(tmp_path / "fresh")
    (fresh / "metrics.jsonl").unlink()
    rows = Page(make_page(tmp_path, cut, fresh)).rows
    assert rows["updates"] == ["20", "-"]
    assert rows["validation loss, all terms weighted"] == ["-", "-"]
    assert "validation masked LM: cross-entropy, nats a masked token" not in rows  # neither has the term
    assert "Nothing was measured yet" in make_page(tmp_path, fresh)


def test_every_term_of_the_loss_has_a_curve_and_a_row(tmp_path):
    """The recipes minilm and hidden_cosine measure `values` and `hidden`."""
    run = make_run(tmp_path / "one")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {term.name: 0.1234 + line["update"] for term in LOSS_TERMS}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = make_page(tmp_path, run)
    rows = Page(text).rows
    assert {"values", "hidden"} < {term.name for term in LOSS_TERMS}
    for term in LOSS_TERMS:
        assert f"<h3>{term.title}</h3>" in text
        assert rows[f"validation {term.title}"] == ["20.1234"]


def test_profile_and_evaluation(tmp_path):
    run = make_run(tmp_path / "one")
    text = make_page(tmp_path, run)
    assert "--profile 10:13" in text
    assert "fastdistil.evaluate" in text
    (run / "profile").mkdir()
    parts = {"teacher": {"seconds": 0.1234, "share": 0.25, "floor": None}}
    (run / "profile" / "table.json").write_text(json.dumps({"parts": parts}))
    seeds = {"1": {"score": 0.812}, "2": {"score": 0.834}}
    found = {"median": 0.823, "seeds": seeds, "num_train": 10, "num_validation": 5}
    (run / "evaluation.json").write_text(json.dumps({"tasks": {"sst2": found}}))
    rows = Page(make_page(tmp_path, run)).rows
    assert rows["teacher"] == ["123.40", "25.0 %", "-"]
    assert rows["sst2"][0] == "82.3"
    assert rows["sst2"][1].split() == ["1:", "81.2", "2:", "83.4"]


def test_a_long_curve_is_means_of_what_was_measured():
    lines = [{"update": u, "loss": float(u)} for u in range(1, 1001)]
    curve = report.stretches(report.measured(lines, "loss"))
    assert len(curve) == 200
    assert (curve.index[0], curve.iloc[0], curve.index[-1], curve.iloc[-1]) == (3.0, 3.0, 998.0, 998.0)
    short = report.stretches(report.measured(lines[:7], "loss"))
    assert list(short.items()) == [(u, u) for u in range(1, 8)]
    assert report.stretches(report.measured(lines, "kd")).empty


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    runs = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert report.names(runs) == [str(runs[0]), str(runs[1])]
    assert report.names((runs[0],)) == ["run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["nowhere", "--out", "page.pdf"], "must end in .html"),
        ([], "wanted one run folder or more"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("older")
    assert report.main(words) == 2
    assert message.lower() in " ".join(capsys.readouterr().err.split()).lower()
    assert (tmp_path / "report.html").read_text() == "older"


def test_a_run_that_met_nan(tmp_path):
    """JSON has null for what was not finite: a gap in the curve, not a line across it; what was skipped is said."""
    run = make_run(tmp_path / "run", updates=6, validated=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[2:4]:
        line |= {"loss": None, "gradient_norm": None, "skipped": True}
    lines.append({"split": "validation", "update": 6, "loss": None, "mlm": 4.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = report.measured(lines[:6], "loss")
    assert losses.isna().tolist() == [False, False, True, True, False, False]
    out = tmp_path / "report.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.rows["updates skipped, not finite"] == ["2"]
    assert page.rows["validation loss, all terms weighted"] == ["-"]
    assert "nan" not in re.sub("<svg.*?</svg>", "", out.read_text(), flags=re.DOTALL).lower()


@pytest.mark.parametrize("contents", [None, "", '{"split": "tr'])
def test_a_run_that_ended_before_its_first_line(tmp_path, contents):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    if contents is not None:
        (run / "metrics.jsonl").write_text(contents)
    assert report.main([str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert Page((tmp_path / "report.html").read_text()).rows["updates"] == ["-"]


def test_a_run_whose_every_loss_was_infinite_or_nan(tmp_path):
    """As another version may have written them, beside null: no curve of it, and the page is there."""
    run = make_run(tmp_path / "run", updates=6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, value in zip(lines, [math.inf, math.nan, None, -math.inf, math.inf, None], strict=True):
        line |= {"loss": value, "gradient_norm": value}
    lines.append({"split": "validation", "update": 6, "loss": math.nan, "mlm": math.inf})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Page(make_page(tmp_path, run)).rows
    assert rows["tokens"] == ["6,000"]
    assert rows["validation loss, all terms weighted"] == ["-"]
    assert "<h3>loss, all terms weighted</h3>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("contents", ['{"task": {}}', '{"tasks": {"sst2": {"median": null}}}'])
def test_results_of_something_else_are_named(tmp_path, capsys, contents):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(contents)
    assert report.main([str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert "evaluation.json of one of run is not what this version writes" in capsys.readouterr().err
