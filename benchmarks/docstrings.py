"""Text that every machine has: the documentation inside Python, PyTorch, NumPy and SymPy, some 15 MB of English.

Docstrings of their source files and the topics of Python's `help()`, each text once, by package, file and line. Nothing
of what is read is imported.
"""

import ast
import importlib.util
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastdistil.run import files

PACKAGES = ("python", "torch", "numpy", "sympy")
LEFT_OUT = {"test", "tests", "testing", "site-packages"}
"""Docstrings of tests say little, in many variations; what is in site-packages is not Python's own."""


def write(path: Path, *packages: str) -> None:
    """Write the documents of those packages that are installed as JSONL, unless the file is there.

    Without packages those of PACKAGES, which takes about ten seconds.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(
            path, "".join(json.dumps({"text": text}) + "\n" for text in documents(*(packages or PACKAGES)))
        )


def documents(*packages: str) -> list[str]:
    """The documentation of those packages that are installed, in order."""
    found: dict[str, None] = {}
    for package in packages:
        if package == "python":
            from pydoc_data.topics import topics

            found.update((topics[name], None) for name in sorted(topics))
            root = Path(sysconfig.get_paths()["stdlib"])
        else:
            spec = importlib.util.find_spec(package)  # since to import torch takes seconds
            if spec is None or spec.origin is None:
                continue
            root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
                found.update((text, None) for text in docstrings(path))
    return [text for text in found if text.strip()]


def docstrings(path: Path) -> Iterator[str]:
    """The documentation in a source file, by line; nothing where it is no valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return  # templates and deliberately broken files: not documentation
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
            pending.extend(reversed(node.body))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            # torch and numpy document their C functions so: add_docstr(torch.abs, "...").
            yield from (
                inspect.cleandoc(part.value)
                for part in ast.walk(node.value)
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.count("\n") > 2
            )
