"""efficiency.py, and what evaluate finds out beforehand: how long a text any encoder reads; folders of other kinds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fastdistil import efficiency, evaluate, export, replay, report
from fastdistil.evaluation import finetune
from tests.support.encoders import WORDS, make_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 34, "pad_token_id": 1,
}  # fmt: skip
# What each reads: of a table of 34 rows all, or those behind the row of the padding, whose id is 1.
READS = {
    "bert": 34,
    "roberta": 32,
    "xlm-roberta": 32,
    "camembert": 32,
    "mpnet": 32,
    "longformer": 32,
    "electra": 34,
    "albert": 34,
    "nystromformer": 34,  # its table has two rows more
    "deberta-v2": 34,
    "modernbert": 34,  # no table; positions as angles, learnt up to there
}
MORE = {
    "longformer": {"attention_window": [8]},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}


def make(folder: Path, kind: str, **sizes) -> Path:
    """An encoder of any kind, with the tokenizer of tests.support.encoders."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | MORE.get(kind, {}) | sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    words = list(WORDS) if config.pad_token_id == 0 else ["[UNK]", "[PAD]", *WORDS[2:]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.mark.parametrize(("kind", "longest"), READS.items())
def test_an_encoder_reads_what_it_is_found_to_read_and_no_more(tmp_path, kind, longest):
    import transformers

    model = make(tmp_path / kind, kind)
    assert finetune.longest_input(finetune.skeleton(model)) == longest
    whole = finetune.pretrained(transformers.AutoModel, model)
    ids = torch.full((1, longest), 20)
    finetune.require_readable(whole, model, {"input_ids": ids})
    if kind not in ("modernbert", "nystromformer"):
        with pytest.raises(ValueError, match=f"cannot read {longest + 1} tokens of ids up to 20"):
            finetune.require_readable(whole, model, {"input_ids": torch.full((1, longest + 1), 20)})


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "pad_token_id": 0}),
        ("deberta-v2", {"position_biased_input": False, "type_vocab_size": 0}),
    ],
)
def test_an_encoder_of_distances_alone_reads_any_length(tmp_path, kind, sizes):
    import transformers

    config = transformers.AutoConfig.for_model(kind, **(SIZES if kind != "xlnet" else {}) | MORE.get(kind, {}) | sizes)
    config.vocab_size = len(WORDS)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
    assert finetune.longest_input(finetune.skeleton(tmp_path / kind)) == math.inf
    words = [str(tmp_path / kind), "--length", "150", "--rounds", "1", "--batch-size", "1"]
    assert efficiency.main(words) == 0
    assert efficiency.main([words[0], *words[3:]]) == 0  # the default: 128


@pytest.mark.parametrize(("kind", "side"), [("xlnet", "left"), ("bert", "right")])
def test_padding_stands_where_the_model_knows_it(tmp_path, pairs, monkeypatch, kind, side):
    """XLNet's summary is its last token; a table of positions begins at the first."""
    if kind == "xlnet":
        import transformers

        sizes = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "pad_token_id": 0, "vocab_size": len(WORDS)}
        config = transformers.AutoConfig.for_model("xlnet", **sizes)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
        shutil.copy(make_encoder(tmp_path / "words") / "vocab.txt", tmp_path / kind)
    else:
        make_encoder(tmp_path / kind)
    words = {"tokenizer_class": "BertTokenizer", "padding_side": "left"}
    (tmp_path / kind / "tokenizer_config.json").write_text(json.dumps(words))
    sides = []
    monkeypatch.setattr(finetune, "fine_tune", lambda _, train, *__, **___: sides.append(train.tokenizer.padding_side))
    table = ["--task", "table", "--text-columns", "a", "b", "--label-column", "l"]
    assert evaluate.main([str(tmp_path / kind), *table, "--data", str(pairs), "--seeds", "1"]) == 0
    assert sides == [side]


def test_efficiency_of_models_that_read_different_lengths(tmp_path, capsys):
    folders = [make_encoder(tmp_path / "bert"), make(tmp_path / "roberta", "roberta")]
    quick = ["--rounds", "1", "--batch-size", "2", "--out", str(tmp_path / "out.json")]
    assert efficiency.main([*map(str, folders), *quick]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["length"] == 32
    for words, got in ((["--length", "33"], 33), (["--length", "34"], 34)):
        assert efficiency.main([*map(str, folders), *words]) == 2
        line = capsys.readouterr().err
        assert line == (f"error: --length {got} is more than the 32 tokens that {folders[1]} reads: give 32 or less\n")


def test_the_90th_percentile_of_two_rounds_is_the_slower_one(tmp_path):
    out = tmp_path / "efficiency.json"
    assert efficiency.main([str(make_encoder(tmp_path / "model")), "--rounds", "2", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["models"][0]["cpu"]
    assert figures["latency_ms_p90"] >= figures["latency_ms"]


def test_figures_of_a_run_are_kept_where_the_report_looks(tmp_path, capsys, monkeypatch):
    """A folder that is still to be made is no reason to lose what took a minute to measure."""
    model, run = str(make_encoder(tmp_path / "bert")), tmp_path / "run"
    quick = [model, "--rounds", "1", "--batch-size", "2"]
    out = tmp_path / "new/deep/out.json"
    assert efficiency.main([*quick, "--out", str(out)]) == 0
    assert out.is_file()
    assert "next:" not in capsys.readouterr().out  # there is no second model
    run.mkdir()
    (run / "status.json").write_text("{}")
    kept = ["--out", str(run / "evaluation.json")]
    asked = evaluate.EvaluateConfig(models=(model,), task=("sts",), data=str(tmp_path), out=Path(kept[1]))
    assert evaluate.next_line(asked) == f"next: python -m fastdistil.efficiency {model} --out {run}/efficiency.json"
    assert efficiency.main([*quick, "--out", str(run / "efficiency.json")]) == 0
    assert f"next: python -m fastdistil.report {run}\n" in capsys.readouterr().out
    monkeypatch.setattr(efficiency, "measure", lambda _: pytest.fail("measured for nothing"))
    assert efficiency.main([*quick, "--out", str(run)]) == 2
    assert capsys.readouterr().err == f"error: --out {run} is a folder: give a file in it\n"


def test_weights_as_pytorch_pickled_them(tmp_path, capsys):
    model = make_encoder(tmp_path / "model")
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    both = efficiency.weight_files(model)
    assert [file.name for file in both] == ["model.safetensors"]
    (model / "model.safetensors").unlink()
    out = tmp_path / "out.json"
    assert efficiency.main([str(model), "--rounds", "1", "--batch-size", "1", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["models"]
    assert found["bytes"] == (model / "pytorch_model.bin").stat().st_size
    (model / "pytorch_model.bin").unlink()
    assert efficiency.main([str(model)]) == 2
    assert "no weights in" in (said := capsys.readouterr().err)
    assert "wanted model.safetensors or model.safetensors.index.json or pytorch_model.bin" in said


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Data of pairs of texts longer than any of these models reads."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "dev"):
        rows = (f"{'w1 ' * 40}\t{'w2 w3 ' * 10}\t{i % 2}\n" for i in range(16))
        (folder / f"{split}.tsv").write_text("a\tb\tl\n" + "".join(rows))
    return folder


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "longformer", "xlm-roberta"])
def test_evaluate_reads_pairs_at_full_length(tmp_path, pairs, kind, capsys):
    """With a tokenizer that makes a second token type, which a RoBERTa does not know."""
    model = make(tmp_path / kind, kind, type_vocab_size=1)
    table = ["--task", "table", "--text-columns", "a", "b", "--label-column", "l"]
    words = [str(model), *table, "--data", str(pairs), "--seeds", "1", "--epochs", "1", "--device", "cpu"]
    assert evaluate.main(words) == 0
    assert json.loads((model / "evaluation.json").read_text())["tasks"]["table"]["num_train"] == 16
    shutil.move(model / "evaluation.json", tmp_path)
    assert evaluate.main([*words, "--max-length", "33"]) == 2
    assert f"--max-length 33 is more than the 32 tokens that {model} reads" in capsys.readouterr().err


def test_a_teacher_that_reads_less_is_refused_or_decides(tmp_path, pairs, capsys):
    teacher, student = make(tmp_path / "short", "bert", pad_token_id=0), make_encoder(tmp_path / "student")
    (teacher / "vocab.txt").write_text((student / "vocab.txt").read_text())
    table = ["--task", "table", "--text-columns", "a", "b", "--label-column", "l"]
    words = [str(student), *table, "--data", str(pairs), "--teacher", str(teacher), "--seeds", "1", "--epochs", "1"]
    assert evaluate.main([*words, "--max-length", "64"]) == 2
    assert f"--max-length 64 is more than the 34 tokens that {teacher} reads" in capsys.readouterr().err
    assert evaluate.main(words) == 0


def test_a_tokenizer_of_a_larger_vocabulary_is_refused_before_the_first_update(tmp_path, pairs, capsys):
    model = make_encoder(tmp_path / "model")
    words = (model / "vocab.txt").read_text().split()
    (model / "vocab.txt").write_text("\n".join([*words[:5], *(f"x{i}" for i in range(80)), *words[5:]]) + "\n")
    table = ["--task", "table", "--text-columns", "a", "b", "--label-column", "l"]
    assert evaluate.main([str(model), *table, "--data", str(pairs), "--seeds", "1"]) == 2
    assert "the tokenizer of this model" in capsys.readouterr().err
    assert not (model / "evaluation.json").exists()


def test_a_dry_run_checks_and_writes_nothing(tmp_path, pairs, capsys):
    model = make_encoder(tmp_path / "model")
    before = sorted(model.iterdir())
    table = ["--task", "table", "--text-columns", "a", "b", "--label-column", "l", "--data", str(pairs), "--dry-run"]
    assert evaluate.main([str(model), *table]) == 0
    assert capsys.readouterr().out == "table: 16 / 16 examples, 2 classes (0, 1), 64 tokens\n"
    assert evaluate.main(table) == 0  # of the data alone
    assert sorted(model.iterdir()) == before
    assert evaluate.main(table[:-1]) == 2
    assert "wanted a model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder of each kind, as far as its names go."""
    root = tmp_path_factory.mktemp("kinds")
    files = {
        "run": ("config.json", "status.json", "checkpoints/update-00000002/manifest.json"),
        "killed": ("config.json", "checkpoints/x"),
        "shards": ("meta.json", "counts.npy"),
        "study": ("settings.json", "logs/x"),
        "model": ("config.json", "model.safetensors"),
        "pickled": ("config.json", "pytorch_model.bin"),
    }
    for folder, names in files.items():
        for name in names:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_text("{}")
    checkpoint = root / "run" / "checkpoints" / "update-00000002"
    (checkpoint / "weights.safetensors").write_text("")
    return root


COMMANDS_OF_MODELS = {
    "evaluate": lambda folder, out: evaluate.main([folder, "--task", "cola", "--data", out]),
    "efficiency": lambda folder, out: efficiency.main([folder]),
}
COMMANDS_OF_RUNS = {
    "report": lambda folder, out: report.main([folder, "--out", f"{out}/page.html"]),
    "export": lambda folder, out: export.main([folder, "--out", f"{out}/x"]),
    "replay": lambda folder, out: replay.main([folder, "--update", "1"]),
}


@pytest.mark.parametrize("command", COMMANDS_OF_MODELS)
@pytest.mark.parametrize(
    ("folder", "is_", "fix"),
    [
        ("run", "a run", "export it first, by `python -m fastdistil.export"),
        ("killed", "a run", "export it first, by `python -m fastdistil.export"),
        ("run/checkpoints/update-00000002", "a checkpoint of a run", "export the run, by `python -m"),
        ("shards", "a folder of shards", "give a model's folder"),
        ("study", "a study", "/study/models"),
    ],
)
def test_what_is_given_for_a_model_is_called_what_it_is(kinds, tmp_path, capsys, command, folder, is_, fix):
    path = kinds / folder
    try:
        status = COMMANDS_OF_MODELS[command](str(path), str(tmp_path))
    except SystemExit as ended:  # by the parser of the command line
        status = ended.code
    assert status == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{path} is {is_}, wanted a model: " in error
    assert fix in error


@pytest.mark.parametrize("command", COMMANDS_OF_RUNS)
@pytest.mark.parametrize(
    ("folder", "is_", "fix"),
    [
        ("model", "a model", "give the folder of the run that it was exported from"),
        ("pickled", "a model", "give the folder of the run that it was exported from"),
        ("run/checkpoints/update-00000002", "a checkpoint of a run", "give the run, "),
        ("shards", "a folder of shards", "give the folder of a run on them"),
        ("study", "a study", "/study/runs"),
    ],
)
def test_what_is_given_for_a_run_is_called_what_it_is(kinds, tmp_path, capsys, command, folder, is_, fix):
    path = kinds / folder
    assert COMMANDS_OF_RUNS[command](str(path), str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"error: {path} is {is_}, wanted a run: " in error
    assert fix in error
