"""`python -m fastdistil.export`, as a user runs it: on a small run folder with a real checkpoint."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from fastdistil.export import ExportConfig, export
from fastdistil.model.architecture import Architecture
from fastdistil.model.encoder import MaskedLM
from fastdistil.run import checkpoint
from fastdistil.run.config import to_json
from fastdistil.run.recipes import distilbert, mlm
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


def _make_run(folder: Path, recipe=distilbert, teacher: Architecture | None = TEACHER) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(MINILM / name, folder / "tokenizer" / name)
    config = to_json(recipe())
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
        _save(folder, _model(update), {"update": update, "tokens": update * 1000})
    return folder


def _save(run: Path, model: MaskedLM, state: dict) -> None:
    checkpoint.save(run, {f"weight.{k}": v for k, v in model.state_dict().items()}, state, keep=2)


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
    assert card.startswith("---\n# license: yours to choose")
    for wanted in (
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


def test_model_card_names_the_terms_that_count(run, tmp_path):
    config = json.loads((run / "config.json").read_text())["config"]
    _break(run, config=config | {"loss": config["loss"] | {"kd": 0.0, "cosine": 0.0, "hidden": 0.5, "values": 3.0}})
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert (
        "\n2.0 x cross-entropy of the masked tokens + 0.5 x (1 - cos) of the outputs of every layer "
        "+ 3.0 x KL of the value relations (MiniLMv2).\n"
    ) in card


def test_a_run_of_an_older_version(run, tmp_path):
    """Its records say `roberta` or nothing in place of model_type."""
    record = json.loads((run / "config.json").read_text())
    student, teacher = ({k: v for k, v in record[role].items() if k != "model_type"} for role in ("student", "teacher"))
    _break(run, student=student | {"roberta": False}, teacher=teacher)
    line = export(ExportConfig(run=run, out=tmp_path / "student"))
    assert "DistilBertForMaskedLM" in line
    assert "tiny-bert`, 4 layers" in (tmp_path / "student" / "README.md").read_text()


def test_model_card_without_teacher(tmp_path):
    run = _make_run(tmp_path / "run", mlm, None)
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
    _save(run, _model(12), state)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"split": "validation", "update": 12, "kd": None, "agreement": 0.5}) + "\n")
    export(ExportConfig(run=run, out=tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| updates | 12 (3 of them skipped: their gradients were not finite) |" in card
    assert "| validation | kd | not finite |" in card
    assert "| validation | agreement | 0.5 |" in card
