"""What a study has measured, as Markdown and PNG: the paper's tables, filled from OUT/study.json alone (study.py writes it).

Scores are x 100, as in the paper. A model's score on a task is the median over its seeds, its score in all the mean over the tasks.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy import stats

from fastdistil.evaluation import plots

TITLES = {
    "teacher": "teacher",
    "distilbert": "student: 5 KD + 2 MLM + 1 cosine",
    "no-kd": "without KD",
    "no-mlm": "without MLM",
    "no-cosine": "without cosine",
    "random-init": "all terms, random initialisation",
    "no-teacher": "no teacher: MLM alone, random initialisation",
}
PUBLISHED = {"no-kd": -2.96, "no-mlm": -0.31, "no-cosine": -1.46, "random-init": -3.69}
"""Change of the GLUE score in the paper (table 4), where the student is DistilBERT."""


def write(out: Path, study: dict[str, Any]) -> None:
    """Make OUT/study.md and its PNG files of the contents of study.json, whatever part of it is there."""
    parts = [
        "# Study\n",
        f"{study['complete']}.\n" if study["complete"] else "",
        *_scores(study),
        *_ablation(study),
        *_pretraining(study),
        *_efficiency(study),
        *_plots(out, study),
    ]
    part = out / "study.md.part"
    part.write_text("\n".join(parts), encoding="utf-8")
    part.replace(out / "study.md")


def by_seed(study: dict[str, Any], model: str, task: str | None = None) -> dict[int, float]:
    """{seed: score x 100} of a row, of one task or the mean over all; seeds not yet evaluated are missing."""
    found = {}
    for seed in range(1, study["settings"]["seeds"] + 1):
        scores = study["scores"].get(f"{model}-{seed}")
        if scores:
            found[seed] = 100 * (scores[task] if task else statistics.mean(scores.values()))
    return found


def difference(ours: dict[int, float], other: dict[int, float]) -> tuple[float, float | None] | None:
    """(mean of ours - other over the seeds that both have, half its 95 % interval); the half is None for one seed."""
    pairs = [ours[seed] - other[seed] for seed in ours.keys() & other.keys()]
    if not pairs:
        return None
    half = None
    if len(pairs) > 1:
        half = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return statistics.mean(pairs), half


def _rows(study: dict[str, Any]) -> list[str]:
    return ["teacher", *(v for v in TITLES if v in study["settings"]["variants"])]


def _scores(study: dict[str, Any]) -> Iterable[str]:
    """The paper's table 1: a row a model, a column a task, and how much of the teacher is kept."""
    tasks = study["tasks"]
    if not tasks:
        return
    yield "## Scores\n"
    examples = (
        f"{task} ({' and '.join(found['metrics'])}, {found['num_train']:,} / {found['num_validation']:,} examples)"
        for task, found in tasks.items()
    )
    yield f"Median over seeds (lowest to highest), x 100, on the validation sets of {', '.join(examples)}.\n"
    rows, teacher = [], _median_score(study, "teacher")
    for model in _rows(study):
        cells = [_spread(by_seed(study, model, task)) for task in tasks]
        score = _median_score(study, model)
        kept = f"{score / teacher:.1%}" if score is not None and teacher else "-"
        rows.append((TITLES[model], f"{score:.1f}" if score is not None else "-", *cells, kept))
    yield _table(("", "score", *tasks, "of the teacher"), rows)


def _median_score(study: dict[str, Any], model: str) -> float | None:
    by_task = [by_seed(study, model, task) for task in study["tasks"]]
    if not by_task or not all(by_task):
        return None
    return statistics.mean(statistics.median(found.values()) for found in by_task)


def _ablation(study: dict[str, Any]) -> Iterable[str]:
    """The paper's table 4: change of the score against the student with all terms."""
    base = by_seed(study, "distilbert")
    if not base:
        return
    yield "## Ablation\n"
    yield (
        "Change against the student with all terms: the mean over seeds of the difference of two models of one seed, which "
        "saw the same sequences with the same masks, with its 95 % interval (Student's t). Outside the noise: the interval leaves out 0.\n"
    )
    tasks, rows = study["tasks"], []
    for model in _rows(study)[2:]:
        cells, total = [], difference(by_seed(study, model), base)
        for task in tasks:
            cells.append(_change(difference(by_seed(study, model, task), by_seed(study, "distilbert", task))))
        published = f"{PUBLISHED[model]:+.2f}" if model in PUBLISHED else "-"
        rows.append((TITLES[model], _change(total), _verdict(total), *cells, published))
    yield _table(("", "score", "outside the noise", *tasks, "in the paper (GLUE)"), rows)


def _verdict(change: tuple[float, float | None] | None) -> str:
    if change is None or change[1] is None:
        return "-"
    return "yes" if abs(change[0]) > change[1] else "no"


def _change(change: tuple[float, float | None] | None) -> str:
    if change is None:
        return "-"
    mean, half = change
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} ± {half:.2f}"


def _pretraining(study: dict[str, Any]) -> Iterable[str]:
    """What the runs measured on held-out text at their end."""
    runs = study["runs"]
    if not runs:
        return
    yield "## Pre-training\n"
    yield "Losses on held-out text at the end, unweighted: mean over seeds (standard deviation).\n"
    names = ("mlm", "kd", "cosine", "agreement")
    rows = []
    for variant in _rows(study)[1:]:
        ends = [run for run in runs.values() if run["variant"] == variant]
        if not ends:
            continue
        cells = []
        for name in names:
            values = [r["validations"][-1][name] for r in ends if name in r["validations"][-1]]
            noise = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{noise}" if values else "-")
        tokens = sorted({run["tokens"] for run in ends})
        amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        rows.append((TITLES[variant], len(ends), amount, *cells))
    head = ("", "seeds", "tokens", "MLM", "KD (T²KL)", "1 - cos", "top-1 agreement with the teacher")
    yield _table(head, rows)


def _efficiency(study: dict[str, Any]) -> Iterable[str]:
    """The paper's table 3: parameters, size and speed of teacher and student."""
    if not study["efficiency"]:
        return
    yield "## Efficiency\n"
    models = study["efficiency"]["models"]
    devices = [d for d in ("cpu", "cuda") if d in models[0]]
    head = ["", "parameters", "MB on disk"]
    for device in devices:
        head += [f"{device}: ms at batch 1", f"{device}: sequences/s at batch 32"]
    rows = []
    for name, model in zip(("teacher", "student"), models, strict=True):
        cells: list[object] = [f"{model['num_parameters']:,}", f"{model['bytes'] / 1e6:.1f}"]
        for device in devices:
            speed = model[device]
            cells += [f"{speed['latency_ms']:.2f}", f"{speed['throughput_per_s']:,.0f}"]
        rows.append((name, *cells))
    yield _table(head, rows)


def _plots(out: Path, study: dict[str, Any]) -> Iterable[str]:
    yield "## Plots\n"
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for variant in _rows(study)[1:]:
        run = study["runs"].get(f"{variant}-1")
        if run:
            x = [v["tokens"] / 1e6 for v in run["validations"]]
            curves[TITLES[variant]] = (x, [v["mlm"] for v in run["validations"]])
    if curves:
        figure = plots.curves(curves, "million tokens", "masked-LM loss on held-out text", "Pre-training, first seed")
        plots.save_png(figure, out / "loss.png")
        yield "![masked-LM loss against tokens](loss.png)\n"
    if study["settings"]["points"] > 1 and (series := _score_against_tokens(study)):
        figure = plots.curves(
            series, "million tokens", "score", "Score after fine-tuning, first seed, against tokens of pre-training"
        )
        plots.save_png(figure, out / "score-tokens.png")
        yield "![score against tokens](score-tokens.png)\n"
    if study["efficiency"]:
        teacher, student = (m["cpu"]["latency_ms"] for m in study["efficiency"]["models"])
        points = []
        for model in _rows(study):
            scores = list(by_seed(study, model).values())
            if scores:
                noise = statistics.stdev(scores) if len(scores) > 1 else None
                latency = teacher if model == "teacher" else student
                points.append((TITLES[model], latency, statistics.mean(scores), noise))
        figure = plots.points(
            points, "CPU latency at batch 1, ms", "score", "Score (± standard deviation over seeds) against latency"
        )
        plots.save_png(figure, out / "score-latency.png")
        yield "![score against latency](score-latency.png)\n"
        yield "All students have one size, and the latency of the first.\n"


def _score_against_tokens(study: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    series = {}
    for variant in _rows(study)[1:]:
        run = study["runs"].get(f"{variant}-1")
        points: list[tuple[float, float]] = []
        for name, scores in study["scores"].items():
            prefix, _, update = name.partition("-1-at-")
            share = 1.0
            if prefix == variant and update:
                share = int(update) / run["updates"]
            elif name != f"{variant}-1":
                continue
            assert run is not None  # gathered with the scores of its exports
            points.append((share * run["tokens"] / 1e6, 100 * statistics.mean(scores.values())))
        if points:
            x, y = zip(*sorted(points), strict=True)
            series[TITLES[variant]] = (list(x), list(y))
    return series


def _spread(found: dict[int, float]) -> str:
    if not found:
        return "-"
    values = sorted(found.values())
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
