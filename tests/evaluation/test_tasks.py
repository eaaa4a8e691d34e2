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


TABLE = tasks.table(("text",), "label")


def make_table(folder: Path, train: list, validation: list, suffix: str = "csv") -> str:
    """Files of a table with these labels, beside texts t0, t1, ...; a CSV holds "" where a label is None."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in (("train", train), ("validation", validation)):
        frame = pd.DataFrame({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
        path = folder / f"{split}.{suffix}"
        {"csv": frame.to_csv, "parquet": frame.to_parquet}[suffix](path, index=False)
    return str(folder)


NAN = float("nan")


@pytest.mark.parametrize(
    ("train", "validation", "names", "numbers"),
    [
        ([0.0, 1.0, NAN, 1.0], [1.0, NAN, 0.0], ("0", "1"), [0, 1, 1]),  # missing, not a class
        ([0, 1, 1], [1.0, NAN, 0.0], ("0", "1"), [0, 1, 1]),  # one kind of column here, another there
        ([True, False, True], [False, True], ("False", "True"), [1, 0, 1]),
        (["yes", " no", None, "yes "], ["no ", "yes"], ("no", "yes"), [1, 0, 1]),
        (["é", "ü", "ü"], ["e\u0301", "ü"], ("é", "ü"), [0, 1, 1]),  # composed here, combining there
        (["10", "9", "9"], ["9", "10"], ("9", "10"), [1, 0, 0]),  # by number
        ([True, False, True], ["true", "FALSE"], ("False", "True"), [1, 0, 1]),
        (["2.5", "0.5", "0.5"], ["0.5", "2.5"], ("0.5", "2.5"), [1, 0, 0]),
        (["none", "-", "NaN", "for"], ["for", "none"], ("for", "none"), [1, 0]),  # "none" is somebody's class
        (["01", "1", "1.0"], ["1", "01"], ("01", "1"), [0, 1, 1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_are_the_same_from_whatever_column(tmp_path, train, validation, names, numbers, suffix):
    data = tasks.load("table", TABLE, make_table(tmp_path, train, validation, suffix))
    assert data.label_names == names
    assert data.train.labels == numbers
    kept = [i for i, label in enumerate(validation) if label == label and label is not None]
    assert data.validation.texts == ([f"t{i}" for i in kept],)


@pytest.mark.parametrize("labels", ["012", ["equivalent", "not_equivalent"]], ids=["three", "words"])
def test_f1_wants_to_know_the_class_that_it_is_of(tmp_path, labels):
    """Three end in scikit-learn after the training; of words it would be that of the last in the alphabet."""
    rows = "sentence1,sentence2,label\n" + "".join(f"a{i},b,{label}\n" for i, label in enumerate(labels))
    folder = write(tmp_path / "mrpc", train_csv=rows, dev_csv=rows)
    with pytest.raises(ValueError, match="scored by F1, of the label 1 beside 0, got the labels"):
        tasks.load("mrpc", tasks.TASKS["mrpc"], folder)


def test_the_first_examples_of_a_sorted_file_are_of_one_class(tmp_path):
    data = tasks.load("table", TABLE, make_table(tmp_path, ["a"] * 4 + ["b"] * 4, ["a", "b"]))
    assert data.first(None).train.labels == data.train.labels
    assert data.first(5).train.labels == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="--max-train-examples 4: the first are all of the class a"):
        data.first(4)


@pytest.mark.parametrize("splits", [["validation", "test"], ["train"], ["dev", "all"]])
def test_a_name_on_the_hub_without_the_splits(monkeypatch, splits):
    import datasets

    from fastdistil.evaluation import squad

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: splits)
    for load, name in ((tasks.load, "sst2"), (squad.load, "squad")):
        with pytest.raises(ValueError, match=r"hf:x has the splits .*: wanted train and validation"):
            load(name, tasks.TASKS[name], "hf:x")
    if "dev" in splits:
        with pytest.raises(ValueError, match="wanted train, validation or test"):
            tasks.hub_tables("hf:x")


def test_a_missing_label_in_row_20000_is_one_row_less(tmp_path, caplog):
    caplog.set_level("INFO", logger="fastdistil.evaluate")
    labels = [str(i % 2) for i in range(25_000)]
    labels[20_000] = ""
    data = tasks.load("table", TABLE, make_table(tmp_path, labels, ["0", "1"]))
    assert len(data.train) == 24_999
    assert "train of table: 1 of 25000 rows have no label and are left out" in caplog.text


def test_classes_have_the_names_and_the_order_of_the_file(tmp_path):
    """MRPC's: not_equivalent is 0, though it comes second in the alphabet; a test split of -1."""
    import datasets

    features = datasets.Features({
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["not_equivalent", "equivalent", "unused"]),
    })  # fmt: skip
    for split, labels in (("train", [0, 1, 1, -1]), ("validation", [1, 0])):
        table = datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    data = tasks.load("table", TABLE, str(tmp_path))
    assert data.label_names == ("not_equivalent", "equivalent")
    assert (data.train.labels, data.validation.labels) == ([0, 1, 1], [1, 0])


def test_missing_texts_are_empty_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", logger="fastdistil.evaluate")
    for split in ("train", "validation"):
        parquet(tmp_path / f"{split}.parquet", {"text": ["a", None, "c"], "label": [0, 1, 1]})
    data = tasks.load("table", TABLE, str(tmp_path))
    assert data.train.texts == (["a", "", "c"],)
    assert "1 of 3 rows have nothing in the column text" in caplog.text


def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(header + "1\t7\t8\ta\tb\r\n0\t7\t8\tc\td\r\n", encoding="utf-8")
    assert tasks.load("mrpc", tasks.TASKS["mrpc"], str(tmp_path)).train.texts == (["a", "c"], ["b", "d"])


def test_a_regression_leaves_out_what_is_missing(tmp_path):
    for split in ("train", "validation"):
        rows = {"sentence1": list("abc"), "sentence2": list("abc"), "label": [0.5, NAN, 5.0]}
        parquet(tmp_path / f"{split}.parquet", rows)
    data = tasks.load("stsb", tasks.TASKS["stsb"], str(tmp_path))
    assert (data.train.labels, data.train.texts) == ([0.5, 5.0], (["a", "c"], ["a", "c"]))
    header = "sentence1\tsentence2\tlabel\n"
    constant = write(tmp_path / "constant", train_tsv=f"{header}a\tb\t1\nc\td\t2\n", dev_tsv=f"{header}a\tb\t1\n")
    with pytest.raises(ValueError, match="every row of validation of stsb is 1: nothing correlates with that"):
        tasks.load("stsb", tasks.TASKS["stsb"], constant)
    for bad in ("x", "inf"):
        folder = write(tmp_path / bad, train_tsv=f"{header}a\tb\t{bad}\n", dev_tsv=f"{header}a\tb\t1\n")
        with pytest.raises(ValueError, match=f"is a regression, got the label '{bad}': wanted a number"):
            tasks.load("stsb", tasks.TASKS["stsb"], folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b"], "label": [[0], [0, 1]]}, r"the column label holds \[0\], a list: wanted one label a row"),
        ({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}]}, "a dict: wanted one label a row"),
        ({"text": [["a"], ["b"]], "label": [0, 1]}, r"the column text holds \['a'\], a list: wanted text"),
        ({"text": [None, " "], "label": [0, 1]}, "the column text has no text in any row"),
        ({"text": ["a", "b"], "label": [None, None]}, "no labelled row: all 2 are empty, -1 or -"),
        ({"text": ["a", "b", "c"], "label": [-1, 0, 1]}, "1 of 3 rows are labelled -1, which stands for no"),
        ({"text": ["a", "b"], "label": [NAN, -1.0]}, "no labelled row: all 2 are empty, -1 or -"),
        ({"text": ["a"] * 30, "label": [i + 0.25 for i in range(30)]}, "30 labels like 0.25, 1.25, 2.25, which"),
    ],
)  # fmt: skip
def test_columns_that_are_none_of_texts_and_classes(tmp_path, rows, message):
    for split in ("train", "validation"):
        parquet(tmp_path / f"{split}.parquet", rows)
    with pytest.raises(ValueError, match=message):
        tasks.load("table", TABLE, str(tmp_path))


def test_rows_of_more_cells_than_the_header_are_refused(tmp_path):
    """pandas would take the text for the name of the row, and a part of it for the label."""
    folder = write(tmp_path, train_csv="text,label\nhello, world,1\nwell, well,0\n", dev_csv="text,label\na,1\n")
    with pytest.raises(ValueError, match=r"train.csv: not readable as csv \(ParserWarning"):
        tasks.load("table", TABLE, folder)


def test_a_package_that_is_missing_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(tasks, "PACKAGES", [*tasks.PACKAGES, "no_such_module"])
    with pytest.raises(ValueError, match=r'evaluation wants no_such_module, .*pip install "fastdistil\[eval\]"'):
        tasks.require_packages([TABLE])


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
