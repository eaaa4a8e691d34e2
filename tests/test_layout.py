"""The rules of the source tree, checked: who may import whom, what the package may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastdistil"
ROOMS = {"data", "model", "training", "evaluation", "run", "kernels"}
COMMANDS = {p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
# A file in fastdistil/ is a command you can type; a folder is what commands are made of. Commands may import anything but each other.
MAY_IMPORT = {
    "kernels": set(),
    "run": {"model"},
    "data": {"run", "kernels"},
    "model": {"run", "kernels"},
    "evaluation": {"run", "kernels"},
    "training": {"data", "model", "run", "kernels"},
}
USES = {
    "transformers": {"evaluation/finetune", "evaluate", "efficiency"},
    "deepspeed": {"training/engine"},
    "torch.distributed": {"run/ranks", "training/engine"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts)


def name_of(path: Path) -> str:
    """ "training/engine" of a module's path."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_whom(path):
    got = {n.split(".")[1] for n in imports(path) if n.startswith("fastdistil.")} - {"__version__"}
    room = path.relative_to(PACKAGE).parts[0]
    if path.parent == PACKAGE:
        assert not got & COMMANDS
    else:
        assert got - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_the_trainer(path):
    assert not {n for n in imports(path) if n.split(".")[0] in ("fastdistil", "deepspeed")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
@pytest.mark.parametrize("package", USES)
def test_third_parties_have_one_door(path, package):
    if name_of(path) not in USES[package]:
        assert not [n for n in imports(path) if f"{n}.".startswith(f"{package}.")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_environment_is_no_configuration(path):
    """Only run/command.py reads the launcher's variables; nobody reads others to decide what to do."""
    if name_of(path) != "run/command":
        text = path.read_text()
        assert "os.getenv" not in text
        assert "environ.get" not in text


@pytest.mark.parametrize(
    "path", [*MODULES, *sorted(ROOT.glob("kernels/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))], ids=lambda p: p.stem
)
def test_no_pickle_and_no_unsafe_load(path):
    """Traps of the file formats: nothing the program reads may run code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load")
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
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert got.stdout.strip() == "[]"
