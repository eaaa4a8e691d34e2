"""The text of the demo: documentation of installed packages."""

import subprocess
import sys

from benchmarks import docstrings
from fastdistil.data.sources import resolve
from tests.support import launch


def test_documentation_of_installed_packages():
    documents = docstrings.documents("numpy")
    assert documents == docstrings.documents("numpy", "not_installed_here")
    assert len(set(documents)) == len(documents) > 1000
    assert any(text.startswith("Return the indices of the elements that are") for text in documents)
    assert any("Create an array." in text for text in documents)  # by add_newdoc


def test_prepare_reads_the_documents_whole_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("numpy",))
    path = tmp_path / "demo" / "docs.jsonl"
    docstrings.write(path)
    (source,) = resolve((str(path),))
    assert list(source.documents()) == [text.rstrip("\r\n") for text in docstrings.documents("numpy")]
    path.write_text("the text of a run that goes on")
    docstrings.write(path)
    assert path.read_text() == "the text of a run that goes on"


def test_what_is_read_is_not_imported():
    code = (
        "import sys; from benchmarks.docstrings import *; found = [len(documents(name)) for name in ('torch', "
        "'sympy')];print(min(found) > 1000, {'torch', 'sympy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=launch.ROOT)
    assert run.stdout == "True set()\n", run.stderr
