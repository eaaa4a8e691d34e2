"""`python -m fastdistil.export`, as a user runs it: on a small run folder with a real checkpoint."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch.nn import functional

from fastdistil.export import ExportConfig, export
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.architecture import Architecture
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run import checkpoint
from fastdistil.run.config import to_json
from fastdistil.run.recipes import named
from tests.support.models import MINILM, one_by_one, packed
from tests.support.toy import student_of

TEACHER = Architecture(
    vocab_size=30522, hidden_size=12, num_layers=4, num_heads=2, ffn_size=20, max_positions=32, token_types=2
)
METRICS = [
    {"split": "train", "update": 5, "loss": 9.25, "tokens_per_s": 1e4},
    {"split": "validation", "update": 5, "kd": 3.5, "agreement": 0.25},
    {"split": "train", "update": 10, "loss": 7.125, "tokens_per_s": 1e4},
    {"split": "validation", "update": 10, "kd": 1.5, "agreement": 0.75},
]


def _model(seed):
    """The student as it was after `seed` updates."""
    return MaskedLM(student_of(TEACHER, num_layers=2), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints after updates 5 and 10."""
    return _make_run(tmp_path / "run")


@pytest.fixture
def embedder(tmp_path):
    """A run folder of a student of embeddings, with a BERT's token types, every layer random; and its model."""
    run = _make_run(tmp_path / "run")
    student = replace(TEACHER, num_layers=3, mlm_head=False)
    model = MaskedLM(student, generator=torch.Generator().manual_seed(7)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)
    _save(run, model.state_dict(), {"update": 10, "tokens": 10_000})
    config = json.loads((run / "config.json").read_text())["config"]
    config["loss"] |= {"kd": 0.0, "mlm": 0.0, "embedding": 2.0, "nested_layers": [1, 2], "nested_dimensions": [4, 8]}
    _break(run, config=config, student=asdict(student), pooling={"mode": "mean", "normalise": True, "max_length": 30})
    (run / "metrics.jsonl").write_text('{"split": "validation", "update": 10, "embedding": 0.0123}')
    return run, model


def _make_run(folder: Path, recipe="distilbert", teacher: Architecture | None = TEACHER) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(MINILM / name, folder / "tokenizer" / name)
    config = to_json(named(recipe))
    if teacher is not None:
        config["teacher"]["path"] = "/data/someone/models/tiny-bert"
    record = {
        "config": config,
        "student": asdict(student_of(TEACHER, num_layers=2)),
        "teacher": asdict(teacher) if teacher else None,
        "data": {
            "num_sequences": 1234,
            "num_tokens": 56789,
            "tokenizer_sha256": "abc123",
            "sources": ["/data/someone/wiki.txt"],
        },
        "versions": {"torch": "2.13.0"},
    }
    (folder / "config.json").write_text(json.dumps(record))
    lines = "\n".join(json.dumps(record) for record in METRICS)
    (folder / "metrics.jsonl").write_text(lines + '\n{"split": "tra')  # killed while writing
    for update in (5, 10):
        _save(folder, _model(update).state_dict(), {"update": update, "tokens": update * 1000})
    return folder


def _save(run: Path, weights: dict[str, torch.Tensor], state: dict) -> None:
    checkpoint.save(run, {f"weight.{k}": v for k, v in weights.items()}, state, keep=2)


def _command(*args):
    command = [sys.executable, "-m", "fastdistil.export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(run, tmp_path):
    out = tmp_path / "exports" / "student"
    done = _command(run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "DistilBertForMaskedLM" in done.stdout
    assert f"{student_of(TEACHER, num_layers=2).num_parameters:,} parameters, after update 10" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["student"]

    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in info), info
    lengths = [3, 32, 1]
    ids, positions, layout = packed(lengths, 30522)
    _, logits = one_by_one(theirs.eval(), ids, lengths)
    with torch.no_grad():
        ours = _model(10).eval()(ids, positions, layout)
    torch.testing.assert_close(ours, logits, rtol=0, atol=2e-5)
    fill = transformers.pipeline("fill-mask", model=str(out))
    assert len(fill("Paris is the [MASK] of France.")) == 5


def test_model_card(run, tmp_path):
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["fastdistil", "knowledge-distillation"],
    }
    for wanted in (
        "No licence is stated: it is the publisher's to choose",
        "pipeline_tag: fill-mask",
        "# student",
        "| recipe | `distilbert` |",
        "| teacher | `tiny-bert`, 4 layers, 12 wide, 2 heads",
        "| updates | 10 |",
        "| training tokens | 10,000 |",
        "| data | wiki.txt: 1,234 sequences, 56,789 tokens |",
        "| versions | torch 2.13.0 |",
        "5.0 x T² KL(teacher, student) at temperature 2.0 over all tokens + 2.0 x cross-entropy of the masked tokens "
        "+ 1.0 x (1 - cos) of the last hidden states.",
        "| train | loss | 7.125 |",
        "| validation | agreement | 0.75 |",
        "| optim.lr | `0.0005` |",
    ):
        assert wanted in card
    assert "/data/someone" not in card
    assert "tokens_per_s" not in card


def test_the_card_of_a_modernbert_says_what_its_layers_see(run, tmp_path):
    windows = {"global_every": 3, "local_attention": 8, "global_theta": 160000.0, "local_theta": 10000.0}
    student = replace(TEACHER, model_type="modernbert", token_types=0, **windows)
    _save(run, MaskedLM(student).state_dict(), {"update": 11, "tokens": 11_000})
    _break(run, student=asdict(student), teacher=asdict(replace(student, num_layers=7)))
    assert "ModernBertForMaskedLM" in export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    sees = "see everything, the others 4 tokens on either side"
    assert f"| student | 4 layers (0 3 {sees}), 12 wide, 2 heads, gated feed-forward 20, vocabulary 30,522" in card
    assert f"| teacher | `tiny-bert`, 7 layers (0 3 6 {sees}), 12 wide" in card
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "student"))
    assert len(fill("Paris is the [MASK] of France.")) == 5


def test_the_card_says_where_the_model_comes_from(run, tmp_path):
    """Of a student of two models of the hub and a data set of it; licence and language are those of their cards."""
    config = json.loads((run / "config.json").read_text())["config"]
    for role, name, language in (("teacher", "lab--large", "en"), ("init", "lab--small", "[en, de]")):
        folder = tmp_path / f"models--{name}" / "snapshots" / "0123456789abcdef"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: mit\nlanguage: {language}\n---\n# A model\n")
        config["teacher" if role == "teacher" else "student"]["path" if role == "teacher" else "init"] = str(folder)
    data = json.loads((run / "config.json").read_text())["data"]
    sources = [{"name": "hf:lab/wiki:20231101.en", "split": "train"}, {"name": "a.txt"}, {"name": "hf:a-folder"}]
    _break(run, config=config, data=data | {"sources": sources}, layers=[0, 3])
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "license": "mit",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "base_model": "lab/small",
        "base_model_relation": "finetune",
        "datasets": ["lab/wiki"],
        "tags": ["fastdistil", "knowledge-distillation"],
    }
    assert "| starts from | layers 0 3 of `lab/small` (commit 0123456789ab) |" in card
    assert "| teacher | `lab/large` (commit 0123456789ab), 4 layers" in card
    assert "No licence is stated" not in card

    # Where the two do not agree nothing follows, and the publisher may say.
    Path(config["teacher"]["path"], "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    export(ExportConfig(run=run, out=tmp_path / "student", overwrite=True))
    assert _metadata(tmp_path / "student")["license"] == "unknown"
    export(ExportConfig(run=run, out=tmp_path / "student", overwrite=True, license="apache-2.0"))
    assert _metadata(tmp_path / "student")["license"] == "apache-2.0"


def _metadata(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_card_of_what_goes_on_training(tmp_path):
    run = _make_run(tmp_path / "run", "mlm", None)
    config = json.loads((run / "config.json").read_text())["config"]
    config["student"]["init"] = "/cache/models--bert-base-uncased/snapshots/0a1b"
    _break(run, config=config, layers=[0, 1])
    export(ExportConfig(run=run, out=tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert _metadata(tmp_path / "model")["base_model"] == "bert-base-uncased"
    assert "| starts from | layers 0 1 of `bert-base-uncased` (commit 0a1b) |" in card


def test_model_card_names_the_terms_that_count(run, tmp_path):
    config = json.loads((run / "config.json").read_text())["config"]
    _break(run, config=config | {"loss": config["loss"] | {"kd": 0.0, "cosine": 0.0, "hidden": 0.5, "values": 3.0}})
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert (
        "\n2.0 x cross-entropy of the masked tokens + 0.5 x (1 - cos) of the outputs of every layer "
        "+ 3.0 x KL of the value relations (MiniLMv2).\n"
    ) in card


TEXTS = ["A river runs through the old town.", "Streets.", "the quiet river " * 30]


def _embeddings(model: MaskedLM, layers: int, dimensions: int) -> torch.Tensor:
    """Of TEXTS: the means over at most 30 tokens of what so many layers give, cut, and then scaled to length 1."""
    tokens = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokens.no_padding()
    tokens.enable_truncation(30)
    means = []
    for text in TEXTS:
        ids = torch.tensor(tokens.encode(text).ids)
        kept = KeptOutputs(layers=(layers - 1,))
        with torch.no_grad():
            _, (hidden,) = model.encoder(ids, torch.arange(len(ids)), sequence_layout([len(ids)], "cpu"), None, kept)
        means.append(hidden.mean(0))
    return functional.normalize(torch.stack(means)[:, :dimensions])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("layers", "dimensions"), [(None, None), (2, None), (None, 4), (1, 8), (3, 12)])
def test_embeddings_and_the_first_layers_and_dimensions_of_them(embedder, tmp_path, layers, dimensions, projected):
    run, model = embedder
    wanted = _embeddings(model, layers or 3, dimensions or 12)
    if projected:
        matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
        _save(run, model.state_dict() | {"projection.weight": matrix}, {"update": 11})
        _break(run, student=asdict(replace(model.architecture, embedding_size=12)))
        wanted = functional.normalize((_embeddings(model, layers or 3, 12) @ matrix.T)[:, :dimensions])
    out = tmp_path / "out"
    line = export(ExportConfig(run=run, out=out, layers=layers, dimensions=dimensions))
    assert "BertModel, " in line
    loading, scoring = line.split("\n")
    assert loading.endswith(f"load it with SentenceTransformer({str(out)!r})")
    reference = "--reference /data/someone/models/tiny-bert"
    assert scoring == f"next: python -m fastdistil.evaluate {out} {reference} --task sts --data PAIRS --card"
    theirs = SentenceTransformer(str(out), device="cpu")
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True), wanted, rtol=0, atol=1e-5)
    cut = dimensions not in (None, 12)
    assert (out / "2_Dense").is_dir() == (cut or projected)
    bare, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in info), info
    assert bare.config.num_hidden_layers == (layers or 3)
    card = (out / "README.md").read_text()
    assert ("| layers | the first" in card, "| dimensions | the first" in card) == (layers in (1, 2), cut)


def test_the_card_of_embeddings(embedder, tmp_path):
    run, _ = embedder
    config = json.loads((run / "config.json").read_text())["config"]
    config["teacher"]["path"] = "/cache/models--sentence-transformers--all-MiniLM-L6-v2/snapshots/0a1b"
    _break(run, config=config)
    export(ExportConfig(run=run, out=tmp_path / "student", layers=2, dimensions=4))
    card = (tmp_path / "student" / "README.md").read_text()
    assert not re.search("memory_gib|tokens_per_s|[|] seconds", card)
    for wanted in (
        "model = SentenceTransformer('student')",
        "| embedding | mean of the last hidden states, times the 4 rows of 2_Dense, scaled to length 1; of a text its "
        "first 30 tokens are read |",
        "| layers | the first 2 of 3, trained to be a model by themselves |",
        "| dimensions | the first 4 of 12, trained to be used alone (Matryoshka) |",
        "| teacher | `sentence-transformers/all-MiniLM-L6-v2` (commit 0a1b), 4 layers",
        "| validation | embedding | 0.0123 | distance of the pooled embeddings, a sequence |",
        "figures are of the whole run, not of this part",
        "1.0 x (1 - cos) of the last hidden states + 2.0 x cosine distance of the pooled embeddings.",
    ):
        assert wanted in card
    assert ModelCard(card).data.to_dict() == {
        "license": "unknown",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_model_relation": "finetune",
        "tags": ["fastdistil", "knowledge-distillation", "sentence-transformers", "feature-extraction"],
    }
    example = card.split("```python\n")[1].split("```")[0].replace("'student'", repr(str(tmp_path / "student")))
    exec(compile(example, "README.md", "exec"), {})


def test_hidden_states_alone(embedder, tmp_path):
    """A run without head that knows of no pooling."""
    run, model = embedder
    _break(run, pooling=None)
    line = export(ExportConfig(run=run, out=tmp_path / "out"))
    assert f"load it with AutoModel.from_pretrained({str(tmp_path / 'out')!r})\n" in line
    assert not (tmp_path / "out" / "modules.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["fastdistil", "knowledge-distillation"],
    }
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out")
    ids, positions, layout = packed([7, 3], 30522)
    hidden, _ = one_by_one(theirs.eval(), ids, [7, 3])
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(ids, positions, layout), hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 4}, "--layers must be one of 1, 2, 3, which this run trained to be used alone, got 4: give one of"),
        ({"layers": 0}, "got 0: give one of these, or train with --loss.nested-layers 0"),
        ({"dimensions": 6}, "--dimensions must be one of 4, 8, 12, .* or train with --loss.nested-dimensions 6"),
    ],
)
def test_parts_that_were_not_trained(embedder, tmp_path, asked, message):
    run, _ = embedder
    with pytest.raises(ValueError, match=message):
        export(ExportConfig(run=run, out=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


def test_parts_of_a_run_that_trained_none(run, tmp_path):
    with pytest.raises(ValueError, match="--layers must be one of 2, which this run"):
        export(ExportConfig(run=run, out=tmp_path / "out", layers=1))


def test_a_run_of_an_older_version(run, tmp_path):
    """Its records say `roberta` or nothing in place of model_type."""
    record = json.loads((run / "config.json").read_text())
    student, teacher = ({k: v for k, v in record[role].items() if k != "model_type"} for role in ("student", "teacher"))
    _break(run, student=student | {"roberta": False}, teacher=teacher)
    line = export(ExportConfig(run=run, out=tmp_path / "student"))
    assert "DistilBertForMaskedLM" in line
    assert "tiny-bert`, 4 layers" in (tmp_path / "student" / "README.md").read_text()


def test_model_card_without_teacher(tmp_path):
    run = _make_run(tmp_path / "run", "mlm", None)
    (run / "metrics.jsonl").unlink()
    export(ExportConfig(run=run, out=tmp_path / "baseline"))
    card = (tmp_path / "baseline" / "README.md").read_text()
    assert "without a teacher" in card
    assert "| teacher | none |" in card
    assert "No metrics were recorded." in card
    assert "KL" not in card


def test_an_earlier_checkpoint(run, tmp_path):
    line = export(ExportConfig(run=run, out=tmp_path / "student", checkpoint=5))
    assert "after update 5" in line
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student")
    assert torch.equal(theirs.vocab_transform.weight, _model(5).head.dense.weight)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| train | loss | 9.25 |" in card
    assert "7.125" not in card


def test_an_existing_folder(run, tmp_path):
    out = tmp_path / "student"
    out.mkdir()  # empty: as good as none
    export(ExportConfig(run=run, out=out))
    with pytest.raises(ValueError, match="exists and is not empty: choose another, or replace it by --overwrite"):
        export(ExportConfig(run=run, out=out))
    (out / "old").touch()
    export(ExportConfig(run=run, out=out, overwrite=True))
    assert not (out / "old").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").touch()
    with pytest.raises(ValueError, match="holds no export, so --overwrite does not delete it"):
        export(ExportConfig(run=run, out=other, overwrite=True))
    with pytest.raises(ValueError, match="got the file or link"):
        export(ExportConfig(run=run, out=other / "chapter.tex"))
    assert (other / "chapter.tex").exists()


def test_nothing_is_left_of_a_failed_export(run, tmp_path, monkeypatch):
    def full_disk(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr("fastdistil.run.files.write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(ExportConfig(run=run, out=tmp_path / "student"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def _break(run, **changes):
    record = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is not a run folder: wanted"),
        (lambda run: (run / "config.json").write_text("{"), "not a run's configuration"),
        (lambda run: _break(run, student={"vocab_size": 3}), "does not describe a student"),
        (lambda run: _break(run, teacher={"colour": 3}), "does not describe a teacher"),
        (lambda run: _break(run, pooling={"mode": "mean"}), "does not describe a pooling"),
        (lambda run: shutil.rmtree(run / "tokenizer"), "not a whole run: wanted its tokenizer in"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint"),
        (
            lambda run: _break(run, student=asdict(student_of(TEACHER, num_layers=3))),
            r"not the weights of this architecture: 12 missing \(encoder\.layers\.2",
        ),
    ],
)
def test_bad_runs(run, breakage, message, tmp_path):
    breakage(run)
    with pytest.raises((ValueError, OSError), match=message):
        export(ExportConfig(run=run, out=tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_errors_come_before_torch(tmp_path):
    """Help, a typo and a wrong folder: answered without loading torch, so in well under a second."""
    for args, status, message in (
        (["--help"], 0, "Folder of the run"),
        ([tmp_path, "--out", tmp_path / "x"], 2, "is not a run folder"),
        ([tmp_path, "--uot", tmp_path / "x"], 2, "--out"),
    ):
        begin = time.perf_counter()
        done = _command(*args)
        assert done.returncode == status
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert time.perf_counter() - begin < 2  # 0.4 s on a quiet machine; torch alone takes longer than this
    code = "import sys, fastdistil.export; print('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "False"


def test_the_card_of_a_run_that_met_nan_says_so(run, tmp_path):
    """JSON has null for what was not finite; a row that is left out would look like a loss that nobody measured."""
    state = {"update": 12, "tokens": 12_000, "skipped": 3}
    _save(run, _model(12).state_dict(), state)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"split": "validation", "update": 12, "kd": None, "agreement": 0.5}) + "\n")
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| updates | 12 (3 of them skipped: their gradients were not finite) |" in card
    assert "| validation | kd | not finite |" in card
    assert "| validation | agreement | 0.5 |" in card
