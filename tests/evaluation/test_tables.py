"""tables.py: numbers of the tables against what a hand computes."""

import copy

import pytest

from fastdistil.evaluation import tables

STUDY = {
    "complete": "4 of 4 pre-trainings, 9 of 9 evaluations",
    "settings": {"seeds": 3, "points": 2, "variants": ["distilbert", "no-kd"]},
    "tasks": {
        "a": {"metrics": ["accuracy"], "num_train": 1000, "num_validation": 100},
        "b": {"metrics": ["accuracy", "f1"], "num_train": 10, "num_validation": 5},
    },
    "scores": {
        "teacher-1": {"a": 0.90, "b": 0.80},
        "teacher-2": {"a": 0.92, "b": 0.80},
        "teacher-3": {"a": 0.97, "b": 0.83},
        "distilbert-1": {"a": 0.81, "b": 0.70},
        "distilbert-2": {"a": 0.80, "b": 0.72},
        "distilbert-3": {"a": 0.85, "b": 0.71},
        "no-kd-1": {"a": 0.79, "b": 0.69},
        "no-kd-2": {"a": 0.79, "b": 0.71},
        "no-kd-3": {"a": 0.82, "b": 0.72},
        "no-kd-1-at-5": {"a": 0.5, "b": 0.7},
    },
    "runs": {
        f"{variant}-{seed}": {
            "variant": variant,
            "seed": seed,
            "tokens": 1_000_000,
            "updates": 10,
            "validations": [
                {"tokens": 500_000, "update": 5, "mlm": 5.0},
                {"tokens": 1_000_000, "update": 10, "mlm": 4.0 + seed / 10},
            ],
        }
        for variant in ("distilbert", "no-kd")
        for seed in (1, 2, 3)
    },
    "efficiency": {
        "models": [
            {"num_parameters": 1_234_567, "bytes": 5_000_000, "cpu": {"latency_ms": 10.0, "throughput_per_s": 1234.0}},
            {"num_parameters": 654_321, "bytes": 2_500_000, "cpu": {"latency_ms": 4.0, "throughput_per_s": 2345.6}},
        ]
    },
}  # fmt: skip


def cells(text: str, title: str, heading: str) -> list[str]:
    """The row that begins with `title` below a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    tables.write(out, STUDY)
    return out


def test_scores_are_medians_and_their_mean(written):
    text = (written / "study.md").read_text()
    teacher = cells(text, "teacher", "Scores")
    assert teacher == ["86.0", "92.0 (90.0 to 97.0)", "80.0 (80.0 to 83.0)", "100.0%"]
    student = cells(text, tables.TITLES["distilbert"], "Scores")
    # (81 + 71) / 2 = 76; 76 / 86 = 88.37 %
    assert student == ["76.0", "81.0 (80.0 to 85.0)", "71.0 (70.0 to 72.0)", "88.4%"]


def test_what_embeddings_keep_has_its_interval(tmp_path):
    study = copy.deepcopy(STUDY)
    study["tasks"] = {"sts": {"metrics": ["spearman"], "num_train": 0, "num_validation": 1500}}
    study["scores"] = {"teacher-1": {"sts": 0.8}, "distilbert-1": {"sts": 0.76}, "distilbert-2": {"sts": 0.78}}
    share = {"interval": [74.1, 77.9], "of_reference": 95.0, "of_reference_interval": [94.0, 96.0]}
    study["shares"] = {
        "teacher-1": {"sts": {"interval": [79.0, 81.0]}},
        "distilbert-1": {"sts": share},
        "distilbert-2": {"sts": share | {"of_reference": 97.5}},
    }
    for seed in (1, 2, 3):
        study["runs"][f"distilbert-{seed}"]["tokens_per_s"] = 1000 * seed
    tables.write(tmp_path, study)
    text = (tmp_path / "study.md").read_text()
    assert "sts (spearman, by embeddings alone, 1,500 rows)" in text
    row = cells(text, tables.TITLES["distilbert"], "What is kept: sts")
    assert row == ["77.00", "74.10 to 77.90", "96.25 % (95.00 to 97.50)", "94.00 to 96.00", "1,000,000", "2,000"]
    assert cells(text, "teacher", "What is kept: sts") == ["80.00", "79.00 to 81.00", "-", "-", "-", "-"]
    assert cells(text, tables.TITLES["no-kd"], "What is kept: sts")[:4] == ["-"] * 4


def test_a_share_of_nothing_is_undefined(tmp_path):
    study = copy.deepcopy(STUDY)
    study["tasks"] = {"sts": {"metrics": ["spearman"], "num_train": 0, "num_validation": 9}}
    study["scores"] = {"teacher-1": {"sts": -0.1}, "distilbert-1": {"sts": -0.2}}
    undefined = {"interval": [-40.0, 20.0], "of_reference": None, "of_reference_interval": None}
    study["shares"] = {"distilbert-1": {"sts": undefined}}
    tables.write(tmp_path, study)
    text = (tmp_path / "study.md").read_text()
    row = cells(text, tables.TITLES["distilbert"], "What is kept: sts")
    assert row[:4] == ["-20.00", "-40.00 to 20.00", "undefined", "undefined"]
    assert cells(text, tables.TITLES["distilbert"], "Scores")[-1] == "-"


def test_the_ablation_pairs_models_of_one_seed(written):
    text = (written / "study.md").read_text()
    row = cells(text, tables.TITLES["no-kd"], "Ablation")
    # differences of the means: -1.5, -1.0, -1.0; mean -1.1667, standard deviation 0.28868, t(2) = 4.3027
    assert row[0] == "-1.17 ± 0.72"
    assert row[1] == "yes"
    # task a: -2, -1, -3: mean -2, standard deviation 1
    assert row[2] == "-2.00 ± 2.48"
    assert row[4] == "-2.96"  # the paper's


def test_a_change_within_the_noise_is_said_to_be_so(tmp_path):
    study = copy.deepcopy(STUDY)
    study["scores"]["no-kd-3"] = {"a": 0.88, "b": 0.74}  # differences -1.5, -1, +3
    tables.write(tmp_path, study)
    row = cells((tmp_path / "study.md").read_text(), tables.TITLES["no-kd"], "Ablation")
    assert row[1] == "no"


def test_a_mean_is_over_all_tasks_or_is_not_there(tmp_path, monkeypatch):
    """Fine-tuning and embeddings are a step each: one may be missing yet, and the teacher has one of the second."""
    study = copy.deepcopy(STUDY)
    study["tasks"]["b"]["num_train"] = 0  # by embeddings
    del study["scores"]["teacher-2"]["b"], study["scores"]["teacher-3"]["b"]
    del study["scores"]["no-kd-3"]["b"], study["scores"]["no-kd-1-at-5"]["b"]
    drawn = []
    real = tables.plots.points
    monkeypatch.setattr(tables.plots, "points", lambda rows, *words: real(drawn.extend(rows) or drawn, *words))
    tables.write(tmp_path, study)
    teacher, first, second = ((middle, deviation) for _, _, middle, deviation in drawn)
    assert teacher == pytest.approx((86.5, 1.8028), abs=1e-4)  # 85, 86, 88.5
    assert first == pytest.approx((76.5, 1.3229), abs=1e-4)
    assert second == pytest.approx((74.5, 0.7071), abs=1e-4)  # of two seeds
    row = cells((tmp_path / "study.md").read_text(), tables.TITLES["no-kd"], "Ablation")
    assert row[0].startswith("-1.25 ± ")  # -1.5 and -1.0
    assert row[2] == "-2.00 ± 2.48"  # of the task that three seeds have
    assert list(tables._score_against_tokens(study)[tables.TITLES["no-kd"]]) == [pytest.approx(74.0)]


def test_the_pre_training_table_takes_the_last_validation(written):
    row = cells((written / "study.md").read_text(), tables.TITLES["no-kd"], "Pre-training")
    assert row[:3] == ["3", "1,000,000", "4.2000 (0.1000)"]
    assert row[3:] == ["-"] * 3  # not measured without a teacher


def test_a_term_beyond_the_papers_gets_a_column_where_it_was_measured(tmp_path):
    study = copy.deepcopy(STUDY)
    for seed, value in ((1, 0.5), (2, 0.7)):
        study["runs"][f"distilbert-{seed}"]["validations"][-1]["hidden"] = value
    tables.write(tmp_path, study)
    text = (tmp_path / "study.md").read_text()
    assert "| top-1 agreement with the teacher | 1 - cos of the outputs of every layer |\n" in text
    assert cells(text, tables.TITLES["distilbert"], "Pre-training")[-1] == "0.6000 (0.1414)"
    assert cells(text, tables.TITLES["no-kd"], "Pre-training")[-1] == "-"


def test_scores_of_a_run_that_is_to_be_made_again_are_not_drawn():
    """Whoever deletes the log of a pre-training leaves its scores behind."""
    study = copy.deepcopy(STUDY)
    del study["runs"]["no-kd-1"]
    assert tables._score_against_tokens(study).keys() == {tables.TITLES["distilbert"]}


def test_efficiency_and_plots(written):
    text = (written / "study.md").read_text()
    assert cells(text, "student", "Efficiency") == ["654,321", "2.5", "4.00", "2,346"]
    for name in ("loss.png", "score-tokens.png", "score-latency.png"):
        assert f"({name})" in text
        assert (written / name).read_bytes().startswith(b"\x89PNG")


def test_an_earlier_checkpoint_stands_at_its_share_of_the_tokens():
    series = tables._score_against_tokens(STUDY)[tables.TITLES["no-kd"]]
    assert list(series.items()) == [(0.5, pytest.approx(60.0)), (1.0, pytest.approx(74.0))]


def test_a_study_at_its_beginning_has_a_page(tmp_path):
    """Nothing evaluated yet, one seed, no efficiency: what is missing is left out or a dash."""
    study = copy.deepcopy(STUDY)
    study |= {"scores": {}, "tasks": {}, "efficiency": None, "runs": {}}
    tables.write(tmp_path, study)
    assert "| " not in (tmp_path / "study.md").read_text()
    study["runs"] = {k: v for k, v in STUDY["runs"].items() if v["seed"] == 1}
    study["scores"] = {"distilbert-1": {"a": 0.5, "b": 0.5}, "no-kd-1": {"a": 0.4, "b": 0.4}}
    study["tasks"] = STUDY["tasks"]
    tables.write(tmp_path, study)
    text = (tmp_path / "study.md").read_text()
    assert cells(text, "teacher", "Scores") == ["-"] * 4
    assert cells(text, tables.TITLES["no-kd"], "Ablation")[:2] == ["-10.00", "-"]


def test_a_run_whose_losses_were_not_finite_is_a_dash_and_a_gap(tmp_path):
    """JSON has null for them. The mean is over the seeds that have a number."""
    study = copy.deepcopy(STUDY)
    for name in ("no-kd-1", "no-kd-2", "no-kd-3", "distilbert-2"):
        study["runs"][name]["validations"][-1]["mlm"] = None
    study["runs"]["no-kd-1"]["validations"][0]["mlm"] = None
    tables.write(tmp_path, study)
    text = (tmp_path / "study.md").read_text()
    assert cells(text, tables.TITLES["no-kd"], "Pre-training")[:3] == ["3", "1,000,000", "-"]
    assert cells(text, tables.TITLES["distilbert"], "Pre-training")[2] == "4.2000 (0.1414)"
