"""The rules of the source tree, checked: who may import whom, what the package may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = {
    "pretrain",
    "prepare",
    "export",
    "evaluate",
    "efficiency",
    "report",
    "study",
    "replay",
}
# module -> first-party modules it may import; arrows only downwards. Entry points may import anything but each other.
MAY_IMPORT = {
    "architecture": set(),
    "config": set(),
    "launcher": set(),
    "tokenizer": set(),
    "sources": set(),
    "sequences": {"tokenizer"},
    "shards": set(),
    "recipes": {"config"},
    "dist": {"launcher"},
    "ops": {"kernels"},
    "bert": {"ops", "architecture"},
    "weights": {"bert", "architecture"},
    "data": {"ops", "config", "shards"},
    "hints": {"ops"},
    "losses": {"hints", "ops", "bert", "config", "data", "profiling"},
    "teacher": {"bert", "data", "dist", "losses", "profiling"},
    "engine": {"dist", "config", "data", "losses", "profiling"},
    "checkpoint": {"dist"},
    "metrics": {"dist", "architecture"},
    "profiling": {"architecture"},
    "run_folder": {"config"},
    "watchdog": set(),
    "preflight": {"config", "architecture", "shards", "tokenizer", "run_folder"},
    "footprint": {"hints", "architecture", "dist", "engine", "ops", "preflight"},
    "dry_run": {"architecture", "data", "engine", "footprint", "inputs", "metrics", "preflight"},
    "tasks": set(),
    "finetune": {"ops", "tasks"},
    "squad": {"finetune", "tasks"},
    "plots": set(),
    "study_tables": {"plots"},
    "fp8": {"ops", "bert"},
    "drift": {"config", "data", "dist", "losses", "ops", "teacher", "weights"},
    "inputs": {
        "weights",
        "bert",
        "config",
        "data",
        "dist",
        "fp8",
        "losses",
        "preflight",
        "shards",
        "teacher",
    },
}
USERS_OF_TRANSFORMERS = {"evaluate", "finetune", "efficiency"}  # what a user of an export does
MODULES = sorted(p for p in (ROOT / "fastdistil").glob("*.py") if p.stem != "__init__")


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def first_party(path: Path) -> set[str]:
    names = {n.split(".")[1] for n in imports(path) if n.startswith("fastdistil.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_who_may_import_whom(path):
    got = first_party(path)
    if path.stem in ENTRY_POINTS:
        assert not got & ENTRY_POINTS
    else:
        assert got <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_the_trainer(path):
    assert not {n for n in imports(path) if n.split(".")[0] in ("fastdistil", "deepspeed")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_third_parties_have_one_door(path):
    roots = {n.split(".")[0] for n in imports(path)}
    dotted = imports(path)
    if path.stem not in USERS_OF_TRANSFORMERS:
        assert "transformers" not in roots
    if path.stem != "engine":
        assert "deepspeed" not in roots
    if path.stem not in ("dist", "engine"):
        assert not any(n.startswith("torch.distributed") for n in dotted)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_environment_is_no_configuration(path):
    """Only launcher.py reads the launcher's variables; nobody reads others to decide what to do."""
    if path.stem != "launcher":
        text = path.read_text()
        assert "os.getenv" not in text
        assert "environ.get" not in text


@pytest.mark.parametrize(
    "path",
    [*MODULES, *sorted(ROOT.glob("kernels/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))],
    ids=lambda p: p.stem,
)
def test_no_pickle_and_no_unsafe_load(path):
    """Traps of the file formats: nothing the program reads may run code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in (
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "yaml.load",
                "yaml.unsafe_load",
            )
            assert not name.startswith("pickle.")  # its errors alone have a use
            assert keywords.get("shell", "False") == "False"
            if name.endswith(".from_pretrained"):  # its default asks on the terminal
                assert keywords.get("trust_remote_code") == "False"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True"
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False"
    roots = {n.split(".")[0] for n in imports(path)}
    assert not roots & {"cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def test_kernels_is_a_bare_folder():
    """With an __init__.py it would shadow Hugging Face's `kernels` for anyone running from the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastdistil" / "kernels").resolve() == ROOT / "kernels"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, fastdistil; print(sorted({'torch', 'numpy', 'triton', 'deepspeed'} & set(sys.modules)))"
    got = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert got.stdout.strip() == "[]"
