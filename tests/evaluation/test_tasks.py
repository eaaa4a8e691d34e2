"""tasks.py: every format that data is distributed in, and metrics against what a hand computes."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastdistil.evaluation import tasks


def write(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return str(folder)


def parquet(path: Path, rows: dict) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)


def test_parquet_in_several_files_as_the_hub_distributes_it(tmp_path):
    for i, labels in enumerate(([0, 1], [1, 0])):
        rows = {"sentence": [f"a{i}", f"b{i}"], "label": labels, "idx": [0, 1]}
        parquet(tmp_path / "sst2" / f"train-0000{i}-of-00002.parquet", rows)
    parquet(tmp_path / "sst2" / "validation-00000-of-00001.parquet", {"sentence": ["c"], "label": [1]})  # fmt: skip
    parquet(tmp_path / "sst2" / "test-00000-of-00001.parquet", {"sentence": ["d"], "label": [-1]})
    data = tasks.load("sst2", tasks.TASKS["sst2"], str(tmp_path))
    assert data.train.texts == (["a0", "b0", "a1", "b1"],)
    assert data.train.labels == [0.0, 1.0, 1.0, 0.0]
    assert data.validation.texts == (["c"],)  # not the unlabelled test split
    assert data.label_names == ("0", "1")


def test_colas_own_files_have_no_header(tmp_path):
    folder = write(
        tmp_path, train_tsv='gj04\t1\t\tHe said "no.\ngj04\t0\t*\tnull\n', dev_tsv="x\t1\t\tA\tb\n".replace("\tb", " b")
    )
    data = tasks.load("cola", tasks.TASKS["cola"], folder)
    assert data.train.texts == (['He said "no.', "null"],)  # an open quote; a word that pandas takes for nothing
    assert data.train.labels == [1.0, 0.0]
    assert data.validation.texts == (["A b"],)


def test_glue_tsv_with_a_header_and_words_for_labels(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel\n"
    folder = write(
        tmp_path,
        train_tsv=header + "0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n2\te\tf\t-\n",
        dev_tsv=header + "0\tg\th\tentailment\n",
    )
    data = tasks.load("rte", tasks.TASKS["rte"], folder)
    assert data.train.texts == (["a", "c"], ["b", "d"])  # the row labelled - is left out
    assert data.label_names == ("entailment", "not_entailment")
    assert (data.train.labels, data.validation.labels) == ([1.0, 0.0], [0.0])


def test_mrpcs_own_names(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    folder = write(
        tmp_path,
        msr_paraphrase_train_tsv=header + "1\t7\t8\ta\tb\n0\t7\t8\tc\td\n",
        msr_paraphrase_test_tsv=header + "1\t7\t8\te\tf\n",
    )
    data = tasks.load("mrpc", tasks.TASKS["mrpc"], folder)
    assert data.train.texts == (["a", "c"], ["b", "d"])
    assert data.validation.texts == (["e"], ["f"])


def test_regression_and_json_lines(tmp_path):
    lines = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (0.5, 5.0)]
    text = "\n".join(json.dumps(line) for line in lines)
    folder = write(tmp_path, train_jsonl=text, validation_jsonl=text)
    data = tasks.load("stsb", tasks.TASKS["stsb"], folder)
    assert data.train.labels == [0.5, 5.0]
    assert data.label_names == ()


def test_any_table(tmp_path):
    folder = write(tmp_path, train_csv='t,l\n"a, b",x\nc,y\n', test_csv="t,l\nd,y\n")
    data = tasks.load("table", tasks.table(("t",), "l"), folder)
    assert data.train.texts == (["a, b", "c"],)
    assert (data.label_names, data.validation.labels) == (("x", "y"), [1.0])
    with pytest.raises(ValueError, match="one or two"):
        tasks.table(("a", "b", "c"), "l")


GOOD = "sentence,label\na,0\nb,1\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "does not hold sst2: wanted train and validation"),
        ({"train_csv": GOOD}, "does not hold sst2"),
        (
            {"train_csv": "text,label\na,0\n", "dev_csv": "text,label\na,0\n"},
            "wanted the columns sentence, label, got text, label",
        ),
        ({"train_csv": GOOD, "dev_csv": "sentence,label\na,2\n"}, "labels in validation that train has not: 2"),
        ({"train_csv": "sentence,label\na,0\nb,0\n", "dev_csv": GOOD[:-4]}, "every row of sst2 is labelled 0"),
        ({"train_csv": "sentence,label\na,-1\n", "dev_csv": GOOD}, "no labelled row"),
        ({"train_csv": GOOD, "train_json": "{}", "dev_csv": GOOD}, "several formats"),
    ],
)
def test_what_is_missing_is_named(tmp_path, files, message):
    folder = write(tmp_path / "sst2", **files)
    with pytest.raises(ValueError, match=message):
        tasks.load("sst2", tasks.TASKS["sst2"], folder)


def test_metrics():
    predicted, labels = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 0, 1, 1.0])
    # TP 2, FP 1, TN 1, FN 1
    both = tasks.score(tasks.TASKS["mrpc"], predicted, labels)
    assert both["accuracy"] == pytest.approx(3 / 5)
    assert both["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert both["score"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    matthews = tasks.score(tasks.TASKS["cola"], predicted, labels)["score"]
    assert matthews == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


def test_correlations():
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    found = tasks.score(tasks.TASKS["stsb"], np.array([1.0, 2.0, 3.0, 10.0]), labels)
    assert found["spearman"] == pytest.approx(1.0)
    # covariance 14 / sqrt(5 * 50)
    assert found["pearson"] == pytest.approx(14 / (5 * 50) ** 0.5)
    constant = tasks.score(tasks.TASKS["stsb"], np.ones(4), labels)
    assert constant == {"pearson": 0.0, "spearman": 0.0, "score": 0.0}


def test_the_published_rows_are_the_papers():
    """Their mean over GLUE is DistilBERT's score in the paper; that of BERT-base's row is 79.7, printed as 79.5."""
    published = [task.published for name, task in tasks.TASKS.items() if name in tasks.GLUE]
    assert len(published) == 9
    bert, distilbert = np.mean([p for p in published if p], axis=0)
    assert distilbert == pytest.approx(77.0, abs=0.05)
    assert bert == pytest.approx(79.72, abs=0.01)
