"""evaluate.py and evaluation/finetune.py: what can be learnt is learnt; repeatable, resumable; mistakes."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from fastdistil import evaluate
from fastdistil.evaluation import finetune, tasks
from fastdistil.evaluation.tasks import Settings
from tests.support import models
from tests.support.encoders import WORDS, make_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def make_task(folder: Path, *, shuffled: bool = False, count: int = 240) -> Path:
    """Texts of random words; the label says which of two words is among them."""
    rng = random.Random(1)
    for split, rows in (("train", count), ("validation", 60)):
        lines = []
        for i in range(rows):
            words = [f"w{rng.randrange(2, 60)}" for _ in range(rng.randrange(2, 12))]
            words.insert(rng.randrange(len(words)), f"w{i % 2}")
            label = rng.randrange(2) if shuffled else i % 2
            lines.append(f"{' '.join(words)}\t{label}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    make_task(root / "data" / "sst2")
    return make_encoder(root / "model"), root / "data"


QUICK = ["--epochs", "3", "--batch-size", "8", "--lr", "3e-3", "--dropout", "0.1", "--device", "cpu"]


def run(model: Path, data: Path, *words: object) -> int:
    start = [str(model), "--task", "sst2", "--data", str(data), *QUICK]
    return evaluate.main([*start, *map(str, words)])


@pytest.fixture(scope="module")
def scored(folders, tmp_path_factory):
    """A folder with result.json, of two seeds, and the model of the second in kept/sst2."""
    out = tmp_path_factory.mktemp("scored")
    assert run(*folders, "--out", out / "result.json", "--seeds", 2, "--save", out / "kept") == 0
    return out


def test_a_task_is_learnt_and_scored(folders, scored, tmp_path, capsys):
    record = json.loads((scored / "result.json").read_text())
    found = record["tasks"]["sst2"]
    scores = [found["seeds"][seed]["accuracy"] for seed in ("1", "2")]
    assert min(scores) > 0.9
    assert found["median"] == pytest.approx(np.median(scores))
    assert (found["num_train"], found["num_validation"]) == (240, 60)
    assert record["class"] == "BertForSequenceClassification"

    assert run(*folders, "--out", shutil.copy(scored / "result.json", tmp_path), "--seeds", 2) == 0
    text = capsys.readouterr().out
    assert f"{100 * found['median']:.1f}" in text
    assert "92.7" in text  # BERT-base's, as published
    assert "91.3" in text
    assert f"{folders[0].name}: 3 epochs of sst2 240 examples\n" in text
    assert "published: the whole training sets, sst2 67,349 examples, epochs not stated" in text
    assert found["lr"] == 3e-3


def test_the_rate_follows_from_the_size_unless_given():
    import transformers

    rates = [
        finetune.learning_rate(model, Settings())
        for config in (
            transformers.BertConfig(hidden_size=768, num_hidden_layers=12),
            transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
            transformers.BertConfig(hidden_size=384, num_hidden_layers=6),
            transformers.DistilBertConfig(dim=384, n_layers=3),
        )
        for model in [SimpleNamespace(config=config)]
    ]
    assert rates == [5e-5, 3e-5, 1e-4, 1e-4]
    assert finetune.learning_rate(SimpleNamespace(config=transformers.BertConfig()), Settings(lr=1e-3)) == 1e-3


def test_labels_of_no_meaning_are_not_learnt(folders, tmp_path):
    make_task(tmp_path / "sst2", shuffled=True)
    out = tmp_path / "result.json"
    assert run(folders[0], tmp_path, "--out", out, "--seeds", 1) == 0
    assert json.loads(out.read_text())["tasks"]["sst2"]["median"] < 0.75


def test_a_seed_repeats_and_is_not_done_twice(folders, scored, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    assert run(*folders, "--out", path, "--seeds", 1) == 0
    seeds = json.loads(path.read_text())["tasks"]["sst2"]["seeds"]
    assert (
        seeds["1"]["score"] == json.loads((scored / "result.json").read_text())["tasks"]["sst2"]["seeds"]["1"]["score"]
    )

    done = []
    monkeypatch.setattr(finetune, "fine_tune", lambda *_, seed, **__: done.append(seed))
    assert run(*folders, "--out", path, "--seeds", 3) == 0
    assert done == [2, 3]
    assert json.loads(path.read_text())["tasks"]["sst2"]["seeds"]["1"] == seeds["1"]


def test_weights_after_a_fine_tuning_are_bitwise_the_same(folders):
    data = tasks.load("sst2", tasks.TASKS["sst2"], str(folders[1]))
    settings = Settings(epochs=1, batch_size=8, lr=1e-3)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    encoded = finetune.Encoded.texts(tokenizer, data.train, 64)
    states = []
    for _ in range(2):
        model = finetune.load_model(str(folders[0]), data, settings, seed=3)
        finetune.fine_tune(model, encoded, settings, seed=3, device=torch.device("cpu"))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_distilbert_reads_pairs(folders, tmp_path):
    """Its forward knows no token types, which the tokenizer of its teacher makes."""
    folder = tmp_path / "distilbert"
    model = models.random_model("DistilBertForMaskedLM", vocab_size=len(WORDS))
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_text((folders[0] / name).read_text())
    rows = "".join(f"w{i} w1\tw{i}\t{i % 2}\n" for i in range(24))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("a\tb\tl\n" + rows)
    table = ["--text-columns", "a", "b", "--label-column", "l"]
    words = [str(folder), "--task", "table", "--data", str(tmp_path), *table, "--seeds", "1", *QUICK]
    assert evaluate.main([*words, "--epochs", "1"]) == 0
    kept = json.loads((folder / "evaluation.json").read_text())  # the default place
    assert kept["tasks"]["table"]["num_train"] == 24


def test_padding_changes_no_prediction(folders, scored):
    """One example at a time, and all in batches with longer ones."""
    import transformers

    data = tasks.load("sst2", tasks.TASKS["sst2"], str(folders[1]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    encoded = finetune.Encoded.texts(tokenizer, data.validation, 64)
    model = finetune.load_model(str(scored / "kept" / "sst2"), data, Settings(), seed=1)
    alone, together = (finetune.predict(model, encoded, size, torch.device("cpu")) for size in (1, 60))
    assert (alone == together).all()
    assert len(set(alone)) == 2  # or it would say nothing


def test_an_epoch_takes_every_example_once_and_pads_little():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    rng = np.random.default_rng(5)
    batches = list(finetune.shuffled(lengths, 16, rng))
    assert sorted(np.concatenate(batches)) == list(range(1003))
    padded = sum(lengths[b].max() * len(b) for b in batches)
    assert padded < 1.15 * lengths.sum()
    again = list(finetune.shuffled(lengths, 16, rng))
    assert not all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_the_second_distillations_loss_and_gradient():
    """(1 - kd) CE + kd T^2 KL, mean over the batch, against PyTorch in fp64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 3), torch.randn(7, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0.0])
    settings = Settings(kd=0.3, temperature=3.0)
    ours = student.clone().requires_grad_()
    loss = finetune.loss_of(ours, labels, teacher, settings)
    loss.backward()
    exact = student.double().requires_grad_()
    t = 3.0
    kl = torch.nn.functional.kl_div(
        (exact / t).log_softmax(-1), (teacher.double() / t).softmax(-1), reduction="batchmean"
    )
    wanted = 0.7 * torch.nn.functional.cross_entropy(exact, labels.long()) + 0.3 * t * t * kl
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_teacher_is_fine_tuned_first_or_taken_as_it_is(folders, scored, tmp_path, monkeypatch):
    model, data = folders
    calls = []
    real = finetune.fine_tune

    def counted(*arguments, teacher=None, **keywords):
        calls.append(teacher is not None)
        return real(*arguments, teacher=teacher, **keywords)

    monkeypatch.setattr(finetune, "fine_tune", counted)
    for teacher, wanted in ((scored / "kept" / "sst2", [True]), (model, [False, True])):
        calls.clear()
        out = tmp_path / f"{len(wanted)}.json"
        assert run(model, data, "--out", out, "--seeds", 1, "--teacher", teacher) == 0
        assert calls == wanted
        assert json.loads(out.read_text())["tasks"]["sst2"]["median"] > 0.9


def test_a_teacher_of_another_vocabulary_is_refused(folders, tmp_path, capsys):
    other = make_encoder(tmp_path / "other", vocab_size=80)
    assert run(*folders, "--out", tmp_path / "r.json", "--teacher", other) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_a_teacher_that_numbers_the_classes_otherwise_is_refused(folders, scored, tmp_path, capsys):
    """Logits are compared class by class, whatever the classes are called; MNLI's come in two orders."""
    teacher = shutil.copytree(scored / "kept" / "sst2", tmp_path / "teacher")
    record = json.loads((teacher / "config.json").read_text())
    for names, refused in (
        ({0: "1", 1: "0"}, True),
        ({1: "1", 0: "0"}, False),  # whatever their order in the file
        ({0: "LABEL_0", 1: "LABEL_1"}, False),
    ):
        (teacher / "config.json").write_text(json.dumps(record | {"id2label": names}))
        words = ["--out", tmp_path / f"{names[0]}.json", "--teacher", teacher, "--seeds", 1, "--epochs", 1]
        assert run(*folders, *words) == (2 if refused else 0)
        assert ("numbers its classes 1, 0, the task 0, 1" in capsys.readouterr().err) == refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_was_saved_in_16_bits_is_fine_tuned_in_32(folders, tmp_path, dtype):
    import transformers

    folder = shutil.copytree(folders[0], tmp_path / "model")
    transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    data = tasks.load("sst2", tasks.TASKS["sst2"], str(folders[1]))
    model = finetune.load_model(str(folder), data, Settings(), seed=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_infinite_rate_is_an_error_with_the_seed(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "loss_of", lambda logits, *_: logits.sum() * float("nan"))
    assert run(*folders, "--out", tmp_path / "r.json") == 1
    assert "not finite with seed 1" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sst3"], "--task sst3: wanted some of"),
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--task", "table"], "wants --text-columns and --label-column"),
        (["--label-column", "x"], "other tasks have their own"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--lr", "2"], "--lr must be in (0, 1), got 2.0"),
        (["--max-train-examples", "0"], "--max-train-examples must be 1 or more, got 0"),
        (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or more, got -1.0"),
        (["--task", "cola"], "wanted the columns sentence, label"),
    ],
)
def test_mistakes_are_named(folders, tmp_path, capsys, words, message):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    (tmp_path / "dev.csv").write_text("a,b\n1,2\n")
    start = [str(folders[0]), "--out", str(tmp_path / "r.json")]
    given = {"--task": "sst2", "--data": str(folders[1])}
    if words == ["--task", "cola"]:
        given["--data"] = str(tmp_path)
    given |= {words[0]: words[1]}
    assert evaluate.main([*start, *(w for pair in given.items() for w in pair)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r.json").exists()


def test_a_file_of_other_settings_is_not_mixed_into(folders, scored, tmp_path, capsys):
    out = Path(shutil.copy(scored / "result.json", tmp_path))
    assert run(*folders, "--out", out, "--seeds", 3, "--epochs", 2) == 2
    assert "another --epochs" in capsys.readouterr().err
    for content, message in (("{}", "is no evaluation"), ("[", "is not readable as JSON")):
        out.write_text(content)
        assert run(*folders, "--out", out) == 2
        assert message in capsys.readouterr().err


def test_a_table_of_other_columns_is_not_taken_for_the_same(folders, tmp_path, capsys):
    """It was: the scores of the first columns came again at once, as those of the second."""
    for split, count in (("train", 24), ("validation", 8)):
        rows = "".join(f"w{i % 9},w{i % 7},{i % 2},{i // 2 % 2}\n" for i in range(count))
        (tmp_path / f"{split}.csv").write_text("a,b,first,second\n" + rows)
    words = [str(folders[0]), "--task", "table", "--data", str(tmp_path), "--seeds", "1", *QUICK, "--epochs", "1"]
    words += ["--out", str(tmp_path / "r.json")]
    for columns, status in ((("a", "first"), 0), (("a", "first"), 0), (("b", "first"), 2), (("a", "second"), 2)):
        assert evaluate.main([*words, "--text-columns", columns[0], "--label-column", columns[1]]) == status
        assert ("results of another --text-columns or --label-column" in capsys.readouterr().err) == bool(status)


def test_glue_is_what_the_folder_holds(folders, tmp_path, capsys):
    make_task(tmp_path / "cola", count=40)
    make_task(tmp_path / "sst2", count=40)
    words = [str(folders[0]), "--task", "glue", "--data", str(tmp_path), "--seeds", "1", *QUICK]
    assert evaluate.main([*words, "--epochs", "1", "--out", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert set(record) == {"cola", "sst2"}
    score = 50 * (record["cola"]["median"] + record["sst2"]["median"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{score:.1f}" in lines[2].split()  # after the header and its rule
    assert f"{(56.3 + 92.7) / 2:.1f}" in lines[2].split()


def test_help_and_mistakes_are_quick():
    for words in (["--help"], ["model", "--task", "sst3", "--data", "."]):
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "fastdistil.evaluate", *words], capture_output=True)
            times.append(time.perf_counter() - begin)
        assert min(times) < 2.0  # torch alone takes longer; 0.3 s on a quiet machine


# ---------------------------------------------------------------------------------------------------------- embeddings
@pytest.fixture(scope="module")
def similar(tmp_path_factory):
    """A folder with the tables sts, mrpc (pairs) and sst2 (few-shot), and documents.txt."""
    root = tmp_path_factory.mktemp("similar")
    rng = random.Random(2)
    rows = []
    for score in range(30):
        left = [f"w{rng.randrange(60)}" for _ in range(10)]
        right = [*left[: score // 3], *(f"w{rng.randrange(60)}" for _ in range(5))]
        rows.append((" ".join(left), " ".join(right), score))
    for name, of_label in (("sts", float), ("mrpc", lambda score: int(score > 15))):
        (root / name).mkdir()
        lines = [f"{left}\t{right}\t{of_label(score)}" for left, right, score in rows]
        (root / name / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + "\n".join(lines) + "\n")
    make_task(root / "sst2", count=60)
    (root / "documents.txt").write_text("\n\n".join(f"{left}. {right}." for left, right, _ in rows) + "\n")
    return root


def test_models_stand_side_by_side_by_their_embeddings(folders, similar, tmp_path, capsys):
    other = make_encoder(tmp_path / "other", seed=1, initializer_range=0.3)
    words = [str(other), "--reference", str(folders[0]), "--task", "sts", "pairs:mrpc", "few-shot:sst2"]
    out = tmp_path / "new" / "scores.json"
    assert evaluate.main([*words, "--data", str(similar), "--draws", "4", "--shots", "3", "--out", str(out)]) == 0
    scores = json.loads(out.read_text())["scores"]
    assert [(s["model"], s["task"], s["num_rows"], s["split"]) for s in scores] == [
        (str(model), task, rows, split)
        for model in (folders[0], other)
        for task, rows, split in (
            ("sts", 30, "train"),
            ("pairs:mrpc", 30, "train"),
            ("few-shot:sst2", 60, "validation"),
        )
    ]
    for first, second in zip(scores[:3], scores[3:], strict=True):
        assert "of_reference" not in first
        (theirs, *_), (ours, *_) = first["metrics"].values(), second["metrics"].values()
        assert second["of_reference"] == pytest.approx(100 * ours / theirs)
        assert second["interval"][0] <= ours <= second["interval"][1]
    text = capsys.readouterr().out
    assert "sts: 30 pairs, split train" in text
    assert f"{scores[3]['of_reference']:.1f} %" in text
    assert not (other / "evaluation.json").exists()


def test_the_card_says_what_was_kept(folders, similar, tmp_path, caplog):
    other = make_encoder(tmp_path / "other", seed=1, initializer_range=0.3)
    words = [str(other), "--reference", str(folders[0]), "--task", "sts", "--data", str(similar), "--card"]
    assert evaluate.main(words) == 0
    assert "README.md is not there" in caplog.text
    before = "---\nlicense: mit\n---\n# other\n\n## What it kept\n\nold\n\n## Training\nlong\n"
    (other / "README.md").write_text(before)
    for _ in range(2):  # a second time in its place
        assert evaluate.main(words) == 0
        text = (other / "README.md").read_text()
        assert "old" not in text
        assert text.partition("\n---\n")[2].startswith("# other\n\n## What it kept\n")
        assert text.endswith("\n\n## Training\nlong\n")
        assert text.count("| sts, spearman, 30 rows | ") == text.count(f"of `{folders[0].name}` (95 %)") == 1
        about = ModelCard(text).data.to_dict()
        (model,) = about["model-index"]
        assert (about["license"], model["name"]) == ("mit", "other")
        (found,) = model["results"]
        metric = found["metrics"][0]
        assert (found["task"]["name"], metric["type"], found["dataset"]["split"]) == ("sts", "spearman", "train")
        assert f"{metric['value']:.1f} (" in text


def test_a_share_of_a_reference_that_scores_nothing_is_undefined(folders, tmp_path, capsys):
    """On four pairs: in the table and on the card, without a crash."""
    file = tmp_path / "few.csv"
    file.write_text("sentence1,sentence2,label\nw1,w1,1\nw2 w3,w4,0\nw5,w6 w7,0\nw8,w9,0\n")
    other = make_encoder(tmp_path / "other", seed=1)
    (other / "README.md").write_text("# other\n")
    words = [str(other), "--reference", str(folders[0]), "--task", "pairs", "--data", str(file), "--card"]
    assert evaluate.main([*words, "--out", str(tmp_path / "scores.json")]) == 0
    reason = "ndefined: the reference scores 0 or less, on all rows or on some drawn of them; try more rows"
    text = (other / "README.md").read_text()
    assert " | 100.0 % (undefined) |\n\nU" + reason + ".\n" in text
    assert "u" + reason in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["scores"][1]["of_reference_interval"] is None


def test_the_card_of_the_reference_is_left_alone(folders, similar, tmp_path):
    models = [make_encoder(tmp_path / name, seed=1, initializer_range=0.3) for name in ("student", "teacher")]
    for model in models:
        (model / "README.md").write_text("# model\n")
    words = [*map(str, models), "--reference", str(models[1]), "--task", "sts", "--data", str(similar), "--card"]
    assert evaluate.main(words) == 0
    assert ["100.0 % (" in (model / "README.md").read_text() for model in models] == [True, False]
    assert (models[1] / "README.md").read_text() == "# model\n"


@pytest.mark.parametrize("task", ["sst2", "few-shot:sst2"])
def test_where_results_cannot_be_kept_nothing_is_done(folders, tmp_path, capsys, task):
    words = [str(folders[0]), "--task", task, "--data", str(folders[1]), "--device", "cpu"]
    assert evaluate.main([*words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path} is a folder: give a file" in said
    assert "learning rate" not in said


def test_options_without_effect_are_named(folders, caplog):
    words = ["--task", "sst2", "--data", str(folders[1]), "--dry-run", "--split", "test", "--max-examples", "9"]
    assert evaluate.main([*words, str(folders[0])]) == 0
    assert "without effect on what is fine-tuned: --split, --max-examples" in caplog.text


def test_retrieval_reads_documents_of_any_kind(folders, similar, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"w{i}. w{i} w9."}) + "\n" for i in range(9))
    )
    found = []
    for source, more in ((similar / "documents.txt", []), (tmp_path / "rows", ["--text-columns", "body"])):
        out = tmp_path / "scores.json"
        words = [str(folders[0]), "--task", "retrieval", "--data", str(source), *more, "--out", str(out)]
        assert evaluate.main(words) == 0
        found.append(json.loads(out.read_text())["scores"][0]["num_rows"])
    assert found == [30, 9]
    assert "recall@10" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_scored(similar, capsys):
    assert evaluate.main(["--task", "sts", "pairs:mrpc", "--data", str(similar), "--dry-run"]) == 0
    assert capsys.readouterr().out == "sts: 30 pairs, split train\npairs:mrpc: 30 pairs, split train\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sts", "sst2"], "want a command each"),
        (["--task", "similar"], "--task similar: wanted some of sts pairs retrieval few-shot glue"),
        (["--task", "sts", "--data", "nowhere"], "--data nowhere does not exist"),
        (["--task", "sts", "--teacher", "x"], "--teacher is of tasks that are fine-tuned on: use --reference"),
        (["--task", "sts", "--text-columns", "a"], "--task sts wants 2 --text-columns, got a"),
        (["--task", "sts", "--text-columns", "a", "b"], "wants --text-columns and --label-column together"),
        (["--task", "retrieval", "--label-column", "b"], "--task retrieval has no label"),
        (["--task", "few-shot", "--draws", "1"], "--draws must be 2 or more, got 1"),
        (["--task", "sts", "--split", "test"], "no split test of sts"),
        (["--task", "sst2", "--reference", "x"], "by embeddings alone"),
        (["--task", "pairs"], "its folders are asked for as pairs:mrpc|sst2|sts"),
        (["--task", "pairs:MRPC"], "its folders are asked for as pairs:mrpc|sst2|sts"),
        (["--task", "sts", "--out", "FOLDER"], "is a folder: give a file in it"),
    ],
)
def test_mistakes_of_tasks_by_embeddings(folders, similar, capsys, words, message):
    given = [str(folders[0]), "--data", str(similar), *(str(similar) if word == "FOLDER" else word for word in words)]
    assert evaluate.main(given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
