"""The rules of the source tree, checked: who may import whom, how long things may be, what the package may not do."""

import ast
import io
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastdistil"
DOOR = "api"  # to Python: no command, and made of them
COMMANDS = {p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", DOOR)}
# A file in fastdistil/ is a command you can type; a folder is what commands are made of.
MAY_IMPORT = {
    "kernels": set(),
    "run": set(),
    "remote": {"run"},
    "data": {"remote", "run", "kernels"},
    "model": {"run", "kernels"},
    "evaluation": {"remote", "run", "kernels"},
    "training": {"data", "model", "remote", "run", "kernels"},
    # commands may import anything but each other
}
USES = {
    "transformers": {"evaluation/finetune", "evaluation/trainer", "evaluate", "efficiency"},
    "sentence_transformers": {"evaluation/zero_shot"},
    "deepspeed": {"training/engine"},
    "torch.distributed": {"run/ranks", "run/link", "training/engine"},
}
WITHOUT_TORCH = (
    *sorted({*COMMANDS, DOOR}),
    *(f"run.{name}" for name in ("config", "recipes", "options", "command", "folder", "files")),
    *(f"remote.{name}" for name in ("hub", "mirror", "storage")),
    *(f"data.{name}" for name in ("readers", "sources", "tokenizer", "sequences", "shards")),
    *(
        "model.architecture",
        "model.families",
        "model.headers",
        "model.sentence",
        "training.models",
        "training.preflight",
    ),
)
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts)
KERNELS = sorted(ROOT.glob("kernels/*.py"))
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# Lines of code, as `lines_of_code` counts them. A feature that breaks a budget raises it in the commit that says why.
BUDGETS = {
    "core": (10399, ("data", "model", "training", "run", "remote", "prepare.py", "pretrain.py", "export.py")),
    "evaluation": (2750, ("evaluation", "evaluate.py", "efficiency.py", "report.py", "study.py")),
    "kernels": (3700, ("kernels", "../csrc")),
}
MOST_FILES = {"kernels": 17}  # in a folder of the product, else 13: an operator a file
LONGEST_FUNCTION = 60
LONGEST_LINE = 120


def name_of(path: Path) -> str:
    """training/engine for a module of the package, else its path in the repository."""
    inside = path.is_relative_to(PACKAGE)
    return path.relative_to(PACKAGE if inside else ROOT).with_suffix("").as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of docstrings, those under fields included."""
    found: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                found |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return found


def lines_of_code(path: Path) -> set[int]:
    """The lines that are neither blank nor comment nor docstring; of C++ those that are neither blank nor comment."""
    text = path.read_text()
    if path.suffix != ".py":
        return {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("//")}
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - docstring_lines(ast.parse(text))


def files_of(part: str) -> list[Path]:
    path = (PACKAGE / part).resolve()
    return [path] if path.is_file() else [p for p in path.iterdir() if p.suffix in (".py", ".cpp", ".h")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_whom(path):
    got = {n.split(".")[1] for n in imports(path) if n.startswith("fastdistil.")}
    got -= {"__version__", "INTERRUPTED", "end_at_once"}  # of the package itself
    room = path.relative_to(PACKAGE).parts[0]
    if path.parent == PACKAGE:
        assert not got & COMMANDS or path.stem == DOOR
    else:
        assert got - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_know_nothing_of_the_trainer(path):
    assert not {n for n in imports(path) if n.split(".")[0] in ("fastdistil", "deepspeed")}


def test_no_module_imports_itself_on_a_detour():
    """Raises CycleError, which names the cycle."""
    modules = {f"fastdistil.{name_of(p).replace('/', '.')}": p for p in MODULES}
    modules |= {f"fastdistil.kernels.{p.stem}": p for p in KERNELS}
    modules |= {f"{name_of(p).replace('/', '.')}": p for p in [*BENCHMARKS, *TESTS]}
    graph = {}
    for name, path in modules.items():
        package = name.rpartition(".")[0]
        relative = {
            f"{package}.{node.module or alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for alias in node.names
        }
        names = imports(path) | relative
        graph[name] = {n for n in names | {n.rpartition(".")[0] for n in names} if n in modules and n != name}
    assert len(tuple(TopologicalSorter(graph).static_order())) >= len(modules)


def test_no_test_imports_another_test():
    for path in TESTS:
        taken = {
            n for n in imports(path) if n.startswith("tests.") and any(w.startswith("test_") for w in n.split("."))
        }
        assert not taken, f"{path.name} imports {taken}: what tests share stands in tests/support"


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


@pytest.mark.parametrize("what", BUDGETS)
def test_the_budget_of_lines_is_kept(what):
    budget, parts = BUDGETS[what]
    lines = {path: len(lines_of_code(path)) for part in parts for path in files_of(part)}
    assert sum(lines.values()) <= budget, sorted(((n, p.name) for p, n in lines.items()), reverse=True)[:8]


def test_pretrain_is_a_map():
    assert len((PACKAGE / "pretrain.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=name_of)
def test_no_function_is_long(path):
    code = lines_of_code(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            assert len(lines) <= LONGEST_FUNCTION, f"{node.name} has {len(lines)} lines of code"


@pytest.mark.parametrize("path", [*MODULES, *KERNELS, *BENCHMARKS, *TESTS, *ROOT.glob("csrc/*")], ids=name_of)
def test_no_line_is_wide(path):
    wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > LONGEST_LINE]
    assert not wide


def test_no_folder_is_crowded():
    for folder in (PACKAGE, ROOT / "kernels", *(PACKAGE / room for room in MAY_IMPORT)):
        files = [p for p in folder.iterdir() if p.suffix == ".py" and p.stem != "__init__"]
        assert len(files) <= MOST_FILES.get(folder.name, 13), folder


@pytest.mark.parametrize("path", [*MODULES, *KERNELS, *BENCHMARKS], ids=name_of)
def test_no_pickle_and_no_unsafe_load(path):
    """Traps of the file formats: nothing the program reads may run code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            # It finds names of tensors and calls nothing: find_class knows no function but its own.
            assert name_of(path) == "model/headers"
            assert {"__init__", "find_class", "persistent_load"} == {
                d.name for d in node.body if isinstance(d, ast.FunctionDef)
            }
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


def test_help_and_mistakes_do_not_wait_for_torch():
    """Neither torch nor what brings it is imported before the command line and its files are checked."""
    modules = ", ".join(f"fastdistil.{name}" for name in WITHOUT_TORCH)
    heavy = "{'torch', 'triton', 'deepspeed', 'transformers', 'datasets', 'huggingface_hub', 'fsspec'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert got.stdout.strip() == "[]"
