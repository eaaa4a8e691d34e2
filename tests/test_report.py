"""report.py: what the page says is what a run folder says; unfinished and hostile runs; no request to anywhere.

tests/test_report_page.py looks at the page in a browser.
"""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdistil import report
from fastdistil.run import folder as run_folder
from fastdistil.run.config import LOSS_TERMS
from tests.support.made_runs import TEACHER, make_noisy, make_run, rewrite

FINISHED = {"state": "finished", "update": 20, "updates": 20, "time": "2026-11-27T11:45:05+0100"}


class Page(HTMLParser):
    """Tables as {first cell: other cells}; tags and attributes as they come; scripts, and the words outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = ""
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        self.words = " ".join(self.words.split())

    @property
    def data(self):
        """What the page's script reads."""
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells = []
        if tag in ("th", "td"):
            self.cells.append("")
        if tag == "script":
            self.scripts.append("")
        if tag in ("th", "td", "script", "style"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""
        if tag == "tr" and self.cells:
            self.rows[self.cells[0].strip()] = [cell.strip() for cell in self.cells[1:]]

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data
        if self.inside in ("th", "td"):
            self.cells[-1] += data


def make_page(tmp_path: Path, *runs: Path, words: tuple[str, ...] = ()) -> str:
    out = tmp_path / "report.html"
    assert report.main([*map(str, runs), "--out", str(out), *words]) == 0
    return out.read_text()


def test_the_summary_is_what_the_runs_measured(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", updates=30, lr=2e-3)
    rows = Page(make_page(tmp_path, one, two)).rows
    assert rows["updates"] == ["20", "30"]
    assert rows["tokens"] == ["20,000", "30,000"]
    assert rows["tokens/s, median"] == ["5,250", "7,750"]
    assert rows["MFU, median"] == ["25.0 %", "25.0 %"]
    assert rows["validation masked LM: cross-entropy, nats a masked token"] == ["4.432", "4.432"]
    seconds = sum(1000 / (500.0 * u) for u in range(1, 21))
    assert rows["training time"][0] == f"{seconds:.0f} s"
    assert rows["optim.lr"] == ["0.001", "0.002"]
    assert "optim.eps" not in rows  # the same in both
    assert "out" not in rows
    assert "memory at its peak" not in rows  # nobody measured it


def test_what_a_run_counts_itself_comes_before_what_its_lines_add_up_to(tmp_path):
    run = make_run(tmp_path / "run", machine="8 × NVIDIA H100", lines={"memory_gib": 3.25})
    rewrite(run, lambda x: x | {"tokens_seen": 5000 + 1000 * x["update"], "seconds": 60.0 + x["update"]})
    page = Page(make_page(tmp_path, run))
    assert page.rows["tokens"] == ["25,000"]
    assert page.rows["training time"] == ["80 s"]
    assert page.rows["memory at its peak"] == ["3.25 GiB"]
    assert page.rows["machine"] == ["8 × NVIDIA H100"]
    knots = page.data["runs"][0]["knots"]
    assert [knots[name][-1] for name in ("update", "tokens", "seconds")] == [20, 25_000, 80]


def test_the_page_lies_in_a_new_folder_and_how_to_open_it_is_said(tmp_path, capsys):
    out = tmp_path / "for others" / "report.html"
    assert report.main([str(make_run(tmp_path / "run")), "--out", str(out)]) == 0
    assert out.is_file()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python -m webbrowser {tmp_path.resolve().as_uri()}/for%20others/report.html"


def test_one_page_without_any_request(tmp_path):
    text = make_page(tmp_path, make_run(tmp_path / "one"))
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed"), tag
        assert not attributes.keys() & {"src", "href", "xlink:href", "action", "srcset", "style"}, (tag, attributes)
    assert "@import" not in text
    assert "url(" not in text
    assert [plot["key"] for plot in page.data["plots"]] == ["loss", "mlm", "gradient_norm", "tokens_per_s"]
    assert text == make_page(tmp_path, tmp_path / "one")  # the same bytes again


def test_the_browser_may_run_these_scripts_and_no_others(tmp_path):
    page = Page(make_page(tmp_path, make_run(tmp_path / "one")))
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert re.findall(r"sha256-([^']+)", policy) == hashes
    assert "uPlot (v1.6.32)" in page.scripts[1]
    assert "Permission is hereby granted" in page.scripts[1]  # uPlot's licence goes with it


def test_hostile_words_are_text(tmp_path):
    evil = "<script>alert(1)</script>"
    config = {"recipe": evil, "optim": {"lr": evil}}
    status = {"state": "failed", "reason": evil, "updates": 20}
    one = make_run(tmp_path / "<img src=x onerror=alert(1)>", config=config, versions={evil: evil}, state=status)
    two = make_run(tmp_path / "two")
    text = make_page(tmp_path, one, two, words=("--title", "</title><script>alert(2)</script>"))
    page = Page(text)
    assert len(page.scripts) == 3
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.rows["optim.lr"] == [evil, "0.001"]
    assert page.data["runs"][0]["name"] == one.name
    assert "<script>alert" not in text


def test_runs_that_go_on_or_have_just_begun(tmp_path):
    cut = make_run(tmp_path / "cut", validated=False)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "upd')
    fresh = make_run(tmp_path / "fresh")
    (fresh / "metrics.jsonl").unlink()
    rows = Page(make_page(tmp_path, cut, fresh)).rows
    assert rows["updates"] == ["20", "–"]
    assert rows["validation loss, all terms weighted"] == ["–", "–"]
    assert "validation masked LM: cross-entropy, nats a masked token" not in rows  # neither has the term
    assert "Nothing was measured yet" in make_page(tmp_path, fresh)


def test_every_term_of_the_loss_has_a_curve_and_a_row(tmp_path):
    """The recipes minilm and hidden_cosine measure `values` and `hidden`."""
    run = make_run(tmp_path / "one")
    rewrite(run, lambda line: line | {term.name: 0.123 + line["update"] for term in LOSS_TERMS})
    page = Page(make_page(tmp_path, run))
    assert {"values", "hidden"} < {term.name for term in LOSS_TERMS}
    titles = [plot["title"] for plot in page.data["plots"]]
    for term in LOSS_TERMS:
        assert term.title in titles
        assert page.rows[f"validation {term.title}"] == ["20.12"]


def test_where_the_time_went(tmp_path):
    run = make_run(tmp_path / "one")
    assert "--profile 10:13" in make_page(tmp_path, run)
    (run / "profile").mkdir()
    parts = {"teacher": {"seconds": 0.1234, "share": 0.25, "floor": None}}
    (run / "profile" / "table.json").write_text(json.dumps({"parts": parts}))
    page = Page(make_page(tmp_path, run))
    assert page.rows["teacher"] == ["123.40", "25.0 %", "–"]
    assert "Not profiled" not in page.words


# --------------------------------------------------------------------------------------- the student beside its teacher
def make_student(tmp_path: Path, **changes: object) -> Path:
    config = {"recipe": "distilbert", "teacher": {"path": str(tmp_path / "teacher")}, "data": {"shards": "text/wiki"}}
    given = {"config": config, "teacher": TEACHER, "state": FINISHED} | changes
    run = make_run(tmp_path / "run", **given)  # type: ignore[arg-type]
    (run / "checkpoints" / "update-00000020").mkdir(parents=True)
    (run / "checkpoints" / "update-00000020" / "manifest.json").touch()
    return run


def write_embeddings(path: Path, *models: str, **share: object) -> None:
    def row(model: str, score: float) -> dict[str, object]:
        return {"task": "sts", "model": model, "metrics": {"spearman": score, "pearson": 1.0}, "interval": [1, 2]}

    rows = [row("minilm", 80.0), *(row(model, 76.0) | share for model in models)]
    path.write_text(json.dumps({"data": "pairs", "reference": "minilm", "scores": rows}))


def write_tuned(path: Path, model: Path, **medians: float) -> None:
    seeds = {"1": {"score": 0.5}}
    tasks = {t: {"median": m, "seeds": seeds, "num_train": 9, "num_validation": 5} for t, m in medians.items()}
    path.write_text(json.dumps({"model": str(model), "settings": {}, "tasks": tasks}))


def write_efficiency(run: Path, **devices: tuple[float, float]) -> None:
    def figures(index: int) -> dict[str, object]:
        found: dict[str, object] = {"path": "x", "bytes": (4e6, 3e6)[index], "num_parameters": 9}
        for device, ms in devices.items():
            found[device] = {"latency_ms": ms[index], "throughput_per_s": 1000 / ms[index]}
        return found

    record = {"length": 128, "batch_size": 32, "models": [figures(0), figures(1)]}
    (run / "efficiency.json").write_text(json.dumps(record))


def test_the_verdict_by_embeddings(tmp_path):
    run = make_student(tmp_path, machine="1 × NVIDIA H100")
    write_embeddings(run / "evaluation.json", "student", of_reference=95.0, of_reference_interval=[93.5, 96.25])
    write_efficiency(run, cpu=(40.0, 20.0))
    page = Page(make_page(tmp_path, run, words=("--watts", "36e6", "--price-per-hour", "7200")))
    assert (
        "The student keeps 95.0 % (95 %: 93.5 to 96.2) of its teacher’s score (sts, spearman; by embeddings alone) "
        "with half its layers (2 of 4) and 58 % of its parameters, 2.0 times as fast. "
        "Trained for 7 s with 20,000 tokens on 1 × NVIDIA H100, about 72 kWh and $14.39."
    ) in page.words
    assert page.rows["sts, spearman"] == ["80.0", "76.0", "95.0 % (93.5 to 96.2)"]
    assert page.rows["on disk"] == ["4.0 MB", "3.0 MB", "75 %"]
    assert page.rows["one text, CPU"] == ["40 ms", "20 ms", "2.00 × as fast"]
    assert page.rows["texts/s, 32 at a time, CPU"] == ["25", "50", "2.00 × as many"]
    assert "27 November 2026, 10:45 UTC" in page.words
    assert "not measured" not in page.words


def test_a_share_of_a_teacher_that_scores_nothing_is_undefined(tmp_path):
    run = make_student(tmp_path)
    write_embeddings(run / "evaluation.json", "student", of_reference=None, of_reference_interval=None)
    record = json.loads((run / "evaluation.json").read_text())
    record["scores"][0]["metrics"] = {"spearman": -8.0}
    (run / "evaluation.json").write_text(json.dumps(record))
    page = Page(make_page(tmp_path, run))
    assert "what it keeps of its teacher is undefined, for its teacher scores 0 or less" in page.words
    assert page.rows["sts, spearman"] == ["-8.0", "76.0", "–"]
    assert "Not measured: what it keeps" not in page.words


def test_the_verdict_after_fine_tuning(tmp_path):
    """The teacher's results are known by the model that they name, in the run's folder or in the teacher's own."""
    run = make_student(tmp_path)
    write_tuned(run / "evaluation.json", tmp_path / "student", sst2=0.90, cola=0.50, mrpc=0.9)
    assert "not measured: what it keeps" in " ".join(Page(make_page(tmp_path, run)).words.lower().split())
    (tmp_path / "teacher").mkdir()
    for path in (tmp_path / "teacher" / "evaluation.json", run / "evaluation-teacher.json"):
        write_tuned(path, tmp_path / "teacher", sst2=0.92, cola=0.58)
        write_efficiency(run, cpu=(40.0, 20.0), cuda=(3.0, 1.0))
        page = Page(make_page(tmp_path, run))
        path.unlink()
        assert "keeps 93.3 % of its teacher’s score (mean of sst2, cola; fine-tuned)" in page.words  # 140 of 150
        assert "3.0 times as fast" in page.words  # on the GPU
        assert page.rows["cola"] == ["58.0", "50.0", "86.2 %"]
        assert page.rows["mrpc"] == ["–", "90.0", "–"]


def test_of_several_students_none_is_taken_for_the_runs(tmp_path):
    run = make_student(tmp_path)
    write_embeddings(run / "evaluation.json", "a/trained", "a/untrained")
    page = Page(make_page(tmp_path, run))
    assert "keeps" not in page.words.partition("Curves")[0].replace("what it keeps", "")
    assert page.rows["sts, spearman (untrained)"] == ["80.0", "76.0", "95.0 %"]


def test_what_nobody_measured_is_said_with_the_commands(tmp_path, capsys):
    run = make_student(tmp_path)
    rewrite(run, lambda line: line | {"agreement": 0.75})
    page = Page(make_page(tmp_path, run))
    assert "agrees with its teacher on 75.0 % of the tokens of held-out text" in page.words
    assert "of the teacher kept: not measured" in page.words
    printed = capsys.readouterr().out
    for line in (
        f"python -m fastdistil.export {run} --out {run}-model",
        f"python -m fastdistil.evaluate {run}-model --task glue --data GLUE --out {run}/evaluation.json",
        f"python -m fastdistil.evaluate {tmp_path}/teacher --task glue --data GLUE --out {run}/evaluation-teacher.json",
        f"python -m fastdistil.efficiency {tmp_path}/teacher {run}-model --out {run}/efficiency.json",
    ):
        assert line in page.words
        assert line in printed
    assert printed.count("fastdistil.export") == 1
    # A student of embeddings is scored beside its teacher; one that is not finished has nothing to be measured yet.
    record = json.loads((run / "config.json").read_text()) | {"pooling": {"mode": "mean"}}
    (run / "config.json").write_text(json.dumps(record))
    assert f"--reference {tmp_path}/teacher --task sts --data PAIRS" in Page(make_page(tmp_path, run)).words
    (run / "status.json").write_text(json.dumps(FINISHED | {"state": "stopped"}))
    assert "fastdistil.evaluate" not in make_page(tmp_path, run)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("finished", "Trained for 7 s"),
        ("running", "Still training, after update 20 of 30: 7 s"),
        ("stopped", "Stopped after update 20 of 30, and can go on"),
        ("failed", "Failed after update 20 of 30"),
    ],
)
def test_how_a_run_ended(tmp_path, state, words):
    status = {"state": state, "updates": 30, "reason": "for a reason"}
    page = Page(make_page(tmp_path, make_student(tmp_path, state=status)))
    assert words in page.words
    assert ("Why: for a reason" in page.words) == (state in ("stopped", "failed"))
    assert ("span", {"class": f"badge {state}"}) in page.tags
    assert page.data["runs"][0]["state"] == state


def test_a_run_that_was_killed_is_known_by_its_lock(tmp_path):
    run = make_student(tmp_path, state={"state": "running", "updates": 30})
    assert report.read("run", run).state == "running"  # no lock: it may run where this folder was copied from
    (run / run_folder.LOCK).touch()
    assert report.read("run", run).state == "killed"
    assert "without a word, as a killed process does" in make_page(tmp_path, run)


def test_several_runs_have_a_headline(tmp_path):
    runs = [make_student(tmp_path / name) for name in ("a", "b")]
    for run, score in zip(runs, (0.8, 0.9), strict=True):
        write_tuned(run / "evaluation.json", tmp_path / "x", sst2=score)
        write_tuned(run / "evaluation-teacher.json", run.parent / "teacher", sst2=1.0)
    (runs[0] / "status.json").write_text('{"state": "stopped"}')
    page = Page(make_page(tmp_path, *runs))
    best = f"{runs[1]} keeps most of its teacher: 90.0 % (sst2; fine-tuned)."
    assert f"2 runs: 1 stopped, 1 finished. {best}" in page.words
    assert ("span", {"class": "swatch c1", "aria-hidden": "true"}) in page.tags


# ----------------------------------------------------------------------------------------------------------- the curves
def test_a_long_curve_is_means_within_their_extremes():
    lines = [{"update": u, "loss": float(u)} for u in range(1, 1001)]
    drawn = report.stretches(report.measured(lines, "loss"), 200)
    assert len(drawn.x) == 200
    assert (drawn.x[0], drawn.y[0], drawn.x[-1], drawn.y[-1]) == (3.0, 3.0, 998.0, 998.0)
    assert (drawn.low[0], drawn.high[0], drawn.low[-1], drawn.high[-1]) == (1.0, 5.0, 996.0, 1000.0)
    short = report.stretches(report.measured(lines[:7], "loss"))
    assert short == ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [], [])
    assert report.stretches(report.measured(lines, "kd")) == ([], [], [], [])


def test_a_spike_of_one_update_is_seen_on_a_long_curve(tmp_path):
    run = make_noisy(tmp_path / "run", updates=3000, state=FINISHED)
    rewrite(run, lambda line: line | ({"loss": 99.5} if line["update"] == 1234 else {}))
    (curve, *_), *_ = (plot["curves"] for plot in Page(make_page(tmp_path, run)).data["plots"])
    assert len(curve["x"]) == report.MOST_POINTS
    assert max(curve["high"]) == 99.5


def test_a_page_of_many_long_runs_stays_small(tmp_path):
    runs = [make_noisy(tmp_path / f"run-{i}", updates=1500, state=FINISHED, seed=i) for i in range(24)]
    text = make_page(tmp_path, *runs)
    assert len(text) < 2e6
    assert len(Page(text).data["plots"][0]["curves"]) == 48


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
        (["nowhere", "--watts", "-3"], "--watts must be a number above 0, got -3"),
        (["nowhere", "--price-per-hour", "nan"], "--price-per-hour must be a number above 0, got nan"),
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
    page = Page(make_page(tmp_path, run))
    assert [y is None for y in page.data["plots"][0]["curves"][0]["y"]] == [False, False, True, True, False, False]
    assert page.data["runs"][0]["skipped"] == [3, 4]
    assert page.rows["updates skipped, not finite"] == ["2"]
    assert page.rows["validation loss, all terms weighted"] == ["–"]
    assert "2 not finite" in page.words
    assert "nan" not in page.words.lower()


@pytest.mark.parametrize("contents", [None, "", '{"split": "tr'])
def test_a_run_that_ended_before_its_first_line(tmp_path, contents):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    if contents is not None:
        (run / "metrics.jsonl").write_text(contents)
    page = Page(make_page(tmp_path, run))
    assert page.rows["updates"] == ["–"]
    assert "Nothing was trained yet" in page.words


def test_a_run_whose_every_loss_was_infinite_or_nan(tmp_path):
    """As another version may have written them, beside null: no curve of it, and the page is there."""
    run = make_run(tmp_path / "run", updates=6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, value in zip(lines, [math.inf, math.nan, None, -math.inf, math.inf, None], strict=True):
        line |= {"loss": value, "gradient_norm": value}
    lines.append({"split": "validation", "update": 6, "loss": math.nan, "mlm": math.inf})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(make_page(tmp_path, run))
    assert page.rows["tokens"] == ["6,000"]
    assert page.rows["validation loss, all terms weighted"] == ["–"]
    assert "loss" not in [plot["key"] for plot in page.data["plots"]]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("evaluation.json", '{"task": {}}'),
        ("evaluation.json", '{"tasks": {"sst2": {"median": null}}}'),
        ("evaluation-more.json", '{"scores": [{"model": "x"}], "reference": "y"}'),
        ("efficiency.json", '{"models": [{}]}'),
        ("efficiency.json", "[]"),
        ("profile/table.json", '{"parts": {"teacher": {}}}'),
    ],
)
def test_results_of_something_else_are_named(tmp_path, capsys, name, contents):
    run = make_run(tmp_path / "run")
    (run / "profile").mkdir()
    (run / name).write_text(contents)
    assert report.main([str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert str(run / name) in capsys.readouterr().err
