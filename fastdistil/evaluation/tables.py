"""What a study has measured, as Markdown and PNG: the paper's tables, made of the contents of OUT/study.json alone.

Scores are x 100, as in the paper. A model's score on a task is the median over its seeds; its score in all is the mean
over the tasks.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from fastdistil.evaluation import plots
from fastdistil.evaluation.zero_shot import UNDEFINED
from fastdistil.run.config import LOSS_TERMS, MASKED_AGREEMENT
from fastdistil.run.files import write_text

Frame = Any
"""A pandas.DataFrame or Series, whose own annotations tell a type checker too little."""
TITLES = {
    "teacher": "teacher",
    "distilbert": "student: 5 KD + 2 MLM + 1 cosine",
    "no-kd": "without KD",
    "no-mlm": "without MLM",
    "no-cosine": "without cosine",
    "random-init": "all terms, random initialisation",
    "no-teacher": "no teacher: MLM alone, random initialisation",
    "embed": "embed: hidden states of every layer + embedding",
    "hidden": "hidden states of every layer alone",
    "pooled": "embedding alone",
    "last-layer": "hidden states of the last layer alone",
    "similarity": "embed + similarities among embeddings",
    "relations": "value relations",
    "minilmv2": "query, key and value relations (MiniLMv2)",
}
PUBLISHED = {"no-kd": -2.96, "no-mlm": -0.31, "no-cosine": -1.46, "random-init": -3.69}
"""Change of the GLUE score in the paper (table 4), where the student is DistilBERT."""
MEASURES = {"mlm": "MLM", "kd": "KD (T²KL)", "cosine": "1 - cos", "agreement": "top-1 agreement with the teacher"}
"""Columns of the pre-training table; other terms of the loss get one where a run has measured them."""


def write(out: Path, study: dict[str, Any]) -> None:
    """Make OUT/study.md and its PNG files of the contents of study.json, whatever part of it is there."""
    scores = scores_by_seed(study)
    parts = [
        "# Study\n",
        f"{study['complete']}.\n" if study["complete"] else "",
        *_scores(study, scores),
        *_embeddings(study, scores),
        *_ablation(study, scores),
        *_pretraining(study),
        *_efficiency(study),
        *_plots(out, study, scores),
    ]
    write_text(out / "study.md", "\n".join(parts))


def scores_by_seed(study: dict[str, Any]) -> Frame:
    """Scores x 100, a column a task, by (model, seed); NaN where a model was not evaluated yet."""
    index = pd.MultiIndex.from_product(
        (_models(study), range(1, study["settings"]["seeds"] + 1)), names=("model", "seed")
    )
    found = [study["scores"].get(f"{model}-{seed}", {}) for model, seed in index]
    scores = 100 * pd.DataFrame(found, index=index, columns=list(study["tasks"]), dtype=float)
    alone = [task for task, about in study["tasks"].items() if not about["num_train"]]
    scores.loc[["teacher"], alone] = scores.loc[["teacher"], alone].ffill()  # measured once: no seed changes it
    return scores


def _models(study: dict[str, Any]) -> list[str]:
    return ["teacher", *study["settings"]["variants"]]


def _scores(study: dict[str, Any], scores: Frame) -> Iterable[str]:
    """The paper's table 1: a row a model, a column a task, and how much of the teacher is kept."""
    tasks = study["tasks"]
    if not tasks:
        return
    yield "## Scores\n"
    examples = (f"{task} ({' and '.join(found['metrics'])}, {_amount(found)})" for task, found in tasks.items())
    yield f"Median over seeds (lowest to highest), x 100, on {', '.join(examples)}.\n"
    by_model = scores.groupby("model")
    median, low, high = by_model.median(), by_model.min(), by_model.max()
    score = median.mean(axis=1, skipna=False)
    kept = score / (score.at["teacher"] if score.at["teacher"] > 0 else math.nan)  # of nothing there is no share
    rows = []
    for model in _models(study):
        figures = zip(median.loc[model], low.loc[model], high.loc[model], strict=True)
        cells = [_cell("{:.1f}", middle, " ({:.1f} to {:.1f})", *ends) for middle, *ends in figures]
        rows.append((TITLES[model], _cell("{:.1f}", score.at[model]), *cells, _cell("{:.1%}", kept.at[model])))
    yield _table(("", "score", *tasks, "of the teacher"), rows)


def _amount(about: dict[str, Any]) -> str:
    if not about["num_train"]:
        return f"by embeddings alone, {about['num_validation']:,} rows"
    return f"fine-tuned on {about['num_train']:,} examples, {about['num_validation']:,} held out"


def _embeddings(study: dict[str, Any], scores: Frame) -> Iterable[str]:
    """For each task that is scored by embeddings: what of the teacher each student has kept, with its interval."""
    shares, seeds = study.get("shares", {}), range(1, study["settings"]["seeds"] + 1)
    for task in (task for task, about in study["tasks"].items() if not about["num_train"]):
        yield f"## What is kept: {task}\n"
        yield (
            "Median over seeds; the 95 % intervals are the first seed's, by bootstrap over the rows of the task, "
            "paired with the teacher; undefined where the teacher scores 0 or less, on all of them or on some drawn. "
            "Tokens/s are medians of the runs.\n"
        )
        rows = []
        for model in _models(study):
            own = {seed: shares.get(f"{model}-{seed}", {}).get(task, {}) for seed in seeds}
            first, runs = own[1], [r for r in study["runs"].values() if r["variant"] == model]
            kept = pd.Series([found["of_reference"] for found in own.values() if "of_reference" in found], dtype=float)
            ends = kept.min(), kept.max()
            of_teacher = _cell(
                "{:.2f} %", kept.median(), " ({:.2f} to {:.2f})", *(ends if len(kept) > 1 else (math.nan,))
            )
            cells = [
                _cell("{:.2f}", scores.loc[model][task].median()),
                _ends(first, "interval"),
                UNDEFINED if len(kept) > kept.count() else of_teacher,
                _ends(first, "of_reference_interval"),
                _cell("{:,.0f}", pd.Series([r["tokens"] for r in runs], dtype=float).median()),
                _cell("{:,.0f}", pd.Series([r.get("tokens_per_s") for r in runs], dtype=float).median()),
            ]
            rows.append((TITLES[model], *cells))
        yield _table(("", "score", "95 %", "of the teacher (seeds)", "95 % of that", "tokens", "tokens/s"), rows)


def _ends(share: dict[str, Any], interval: str) -> str:
    if share.get(interval) is None:
        return UNDEFINED if interval in share else "-"
    return "{:.2f} to {:.2f}".format(*share[interval])


def _ablation(study: dict[str, Any], scores: Frame) -> Iterable[str]:
    """The paper's table 4: change of the score against the student with all terms."""
    scores = scores.assign(score=scores.mean(axis=1, skipna=False))  # means over different tasks are no change
    base = scores.loc[_models(study)[1]]
    if base.isna().all(axis=None):
        return
    yield "## Ablation\n"
    yield (
        "Change against the first student: the mean over seeds of the difference of two models of one seed, "
        "which saw the same sequences with the same masks, with its 95 % interval (Student's t). "
        "Outside the noise: the interval leaves out 0.\n"
    )
    rows = []
    for model in _models(study)[2:]:
        change = scores.loc[model] - base
        mean, half = change.mean(), change.sem() * stats.t.ppf(0.975, change.count() - 1)  # NaN for a single seed
        *cells, score = (_cell("{:+.2f}", m, " ± {:.2f}", h) for m, h in zip(mean, half, strict=True))
        outside = "-" if math.isnan(half["score"]) else "yes" if abs(mean["score"]) > half["score"] else "no"
        rows.append((TITLES[model], score, outside, *cells, _cell("{:+.2f}", PUBLISHED.get(model, math.nan))))
    yield _table(("", "score", "outside the noise", *study["tasks"], "in the paper (GLUE)"), rows)


def _pretraining(study: dict[str, Any]) -> Iterable[str]:
    """What the runs measured on held-out text at their end."""
    if not study["runs"]:
        return
    yield "## Pre-training\n"
    yield "Losses on held-out text at the end, unweighted: mean over seeds (standard deviation).\n"
    runs = list(study["runs"].values())
    ends = pd.DataFrame([run["validations"][-1] for run in runs])
    titles = {term.name: term.title for term in LOSS_TERMS} | {"masked_agreement": MASKED_AGREEMENT}
    measures = MEASURES | {name: title for name, title in titles.items() if name in ends and name not in MEASURES}
    # A loss that was not finite is null in metrics.jsonl: missing here, like one that was not measured.
    figures_of = ends.reindex(columns=list(measures)).astype(float)
    by_variant: Frame = figures_of.groupby([run["variant"] for run in runs])
    mean, noise = by_variant.mean(), by_variant.std()
    rows = []
    for variant in (v for v in _models(study)[1:] if v in mean.index):
        tokens = sorted(run["tokens"] for run in runs if run["variant"] == variant)
        amount = f"{tokens[0]:,}" if tokens[0] == tokens[-1] else f"{tokens[0]:,} to {tokens[-1]:,}"
        figures = zip(mean.loc[variant], noise.loc[variant], strict=True)
        cells = (_cell("{:.4f}", middle, " ({:.4f})", deviation) for middle, deviation in figures)
        rows.append((TITLES[variant], len(tokens), amount, *cells))
    yield _table(("", "seeds", "tokens", *measures.values()), rows)


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
        cells = [name, f"{model['num_parameters']:,}", f"{model['bytes'] / 1e6:.1f}"]
        for device in devices:
            cells += [f"{model[device]['latency_ms']:.2f}", f"{model[device]['throughput_per_s']:,.0f}"]
        rows.append(cells)
    yield _table(head, rows)


def _plots(out: Path, study: dict[str, Any], scores: Frame) -> Iterable[str]:
    """The plots that there is something for, each written to its file, and what shows it on the page."""
    yield "## Plots\n"
    if losses := _loss_against_tokens(study):
        title = "Pre-training, first seed"
        figure = plots.curves(losses, "million tokens", "masked-LM loss on held-out text", title)
        plots.save_png(figure, out / "loss.png")
        yield "![masked-LM loss against tokens](loss.png)\n"
    if study["settings"]["points"] > 1 and (series := _score_against_tokens(study)):
        title = "Score after fine-tuning, first seed, against tokens of pre-training"
        plots.save_png(plots.curves(series, "million tokens", "score", title), out / "score-tokens.png")
        yield "![score against tokens](score-tokens.png)\n"
    if study["efficiency"]:
        teacher, student = (model["cpu"]["latency_ms"] for model in study["efficiency"]["models"])
        overall = scores.mean(axis=1, skipna=False).dropna().groupby("model", sort=False)
        rows = [(TITLES[m], teacher if m == "teacher" else student, found.mean(), found.std()) for m, found in overall]
        title = "Score (± standard deviation over seeds) against latency"
        plots.save_png(plots.points(rows, "CPU latency at batch 1, ms", "score", title), out / "score-latency.png")
        yield "![score against latency](score-latency.png)\n"
        yield "All students have one size, and the latency of the first.\n"


def _first_runs(study: dict[str, Any]) -> dict[str, Any]:
    """{name: run} of the first seed of each variant."""
    names = [f"{variant}-1" for variant in _models(study)[1:]]
    return {name: study["runs"][name] for name in names if name in study["runs"]}


def _loss_against_tokens(study: dict[str, Any]) -> dict[str, pd.Series]:
    """{title: masked-LM loss by million tokens} of the first runs."""
    return {
        TITLES[run["variant"]]: pd.Series({v["tokens"] / 1e6: v.get("mlm") for v in run["validations"]}, dtype=float)
        for run in _first_runs(study).values()
    }


def _score_against_tokens(study: dict[str, Any]) -> dict[str, pd.Series]:
    """{title: score by million tokens} of the first runs, at their ends and at earlier checkpoints."""
    series = {}
    for model, run in _first_runs(study).items():
        found = {}
        for name, scores in study["scores"].items():
            of_model, _, update = name.partition("-at-")
            if of_model == model and scores.keys() == study["tasks"].keys():
                share = int(update) / run["updates"] if update else 1.0
                found[share * run["tokens"] / 1e6] = 100 * pd.Series(scores).mean()
        if found:
            series[TITLES[run["variant"]]] = pd.Series(found).sort_index()
    return series


def _cell(form: str, value: float, more: str = "", *others: float) -> str:
    """`value` as `form`, then `others` as `more` unless one of them is NaN; a dash where `value` is NaN."""
    if math.isnan(value):
        return "-"
    return form.format(value) + ("" if any(map(math.isnan, others)) else more.format(*others))


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
