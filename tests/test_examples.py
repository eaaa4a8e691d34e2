"""examples/: each runs as its reader would start it, from another folder and without a network."""

import os
import subprocess
import sys

import pytest

from tests.support.launch import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(name, *words, folder):
    line = [sys.executable, ROOT / "examples" / name, *words]
    done = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loop_of_ones_own(tmp_path):
    """The student comes nearer to its teacher."""
    lines = run("plain_loop.py", folder=tmp_path).splitlines()
    kl = [float(line.split("KL ")[1].split()[0]) for line in lines]
    assert kl[-1] < 0.6 * kl[0]


def test_the_trainer_of_transformers(root, tmp_path):
    """Half of the toy teacher, which then loads."""
    import transformers

    pytest.importorskip("accelerate", reason="the Trainer of transformers wants accelerate")
    text = "\n".join(" ".join(f"w{(i + j) % 96}" for j in range(20)) for i in range(96))
    (tmp_path / "notes.txt").write_text(text)
    printed = run("trainer.py", str(root / "teacher"), "notes.txt", "--steps", "10", folder=tmp_path)
    assert "'kd'" in printed
    assert "small: 23" in printed
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small")
    assert model.config.num_hidden_layers == 2


def test_the_notebook(tmp_path, monkeypatch):
    """Executed anew, with outputs of the kinds that it was committed with."""
    nbclient = pytest.importorskip("nbclient", reason="it executes the notebook")
    pytest.importorskip("ipykernel", reason="it is the notebook's Python")
    nbformat = pytest.importorskip("nbformat", reason="it reads the notebook")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    committed = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    again = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        again, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert (tmp_path / "small" / "student" / "model.safetensors").is_file()
    for before, after in zip(committed.cells, again.cells, strict=True):
        kinds = [[(o.output_type, *sorted(o.get("data", {}))) for o in c.get("outputs", [])] for c in (before, after)]
        assert kinds[0] == kinds[1], after.source
    text = nbformat.writes(committed)
    assert "/root" not in text
    assert "/work" not in text
