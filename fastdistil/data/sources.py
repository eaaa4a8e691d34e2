"""Readers of text: what `prepare` is given on its command line -> documents, in a fixed order.

    FILE or FOLDER      .txt .text (one line is one document), .jsonl .ndjson .json (one object a
                        line), .parquet; the first two kinds also with .gz; folders recursively
    hf:NAME[:CONFIG]    a data set through `datasets`, by hub name or local folder
    docs:[PACKAGE,...]  documentation installed on this machine: docstrings of Python, PyTorch,
                        NumPy and SymPy, and the topics of Python's `help()`

`resolve` needs the standard library only, so that a missing source is reported at once. Reading
needs memory for one document and one Parquet row group's column, however large the source.
"""

import ast
import gzip
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

LINES = (".txt", ".text")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
DOCS_PACKAGES = ("python", "torch", "numpy", "sympy")
_NOT_DOCS = {"test", "tests", "testing", "site-packages"}
"""Docstrings of tests say little, in many variations; site-packages is not Python's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the documents are taken out of the sources."""

    text_field: str = "text"
    split: str = "train"
    streaming: bool = False
    errors: Literal["strict", "replace"] = "strict"
    """What a byte that is not UTF-8 does: stop with an error, or become U+FFFD."""


@dataclass(kw_only=True)
class Source:
    """One argument of the command line; `documents` reads it."""

    spec: str
    kind: Literal["files", "hf", "docs"]
    files: tuple[tuple[str, Path], ...] = ()
    """Of "files": the name below the folder that was given, and the path."""
    packages: tuple[str, ...] = ()
    """Of "docs"."""
    num_bytes_read: int = field(default=0, init=False)
    """How far `documents` has come, in bytes on the disk."""

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the disk, 0 where that is not known."""
        return sum(path.stat().st_size for _, path in self.files)

    def record(self, options: Options) -> dict[str, Any]:
        """What identifies the text, for meta.json: no path or other trace of the machine."""
        if self.kind == "files":
            sizes = [[name, path.stat().st_size] for name, path in self.files]
            return {"name": Path(self.spec).resolve().name, "files": sizes}
        if self.kind == "docs":
            return {
                "name": "docs",
                "packages": {
                    name: platform.python_version() if name == "python" else importlib.metadata.version(name)
                    for name in self.packages
                },
            }
        name = self.spec.removeprefix("hf:")
        name = Path(name).resolve().name if Path(name).exists() else name
        return {"name": f"hf:{name}", "split": options.split}

    def documents(self, options: Options) -> Iterator[str]:
        """The documents that are not blank. ValueError says which file and line cannot be read."""
        self.num_bytes_read = 0
        if self.kind == "hf":
            yield from _hub_documents(self.spec.removeprefix("hf:"), options)
        elif self.kind == "docs":
            yield from _docs_documents(self.packages)
        for _, path in self.files:
            before = self.num_bytes_read
            size = path.stat().st_size
            try:
                for text, fraction in _file_documents(path, options):
                    self.num_bytes_read = before + int(fraction * size)
                    if text and not text.isspace():
                        yield text
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read to its end ({error})") from error
            self.num_bytes_read = before + size


def resolve(specs: tuple[str, ...]) -> list[Source]:
    """The sources behind the arguments; FileNotFoundError or ValueError says what is wrong."""
    return [_resolve(spec) for spec in specs]


def _resolve(spec: str) -> Source:
    if spec.startswith("hf:"):
        if not spec.removeprefix("hf:"):
            raise ValueError(f"source {spec!r}: wanted hf:NAME or hf:NAME:CONFIG")
        return Source(spec=spec, kind="hf")
    if spec.startswith("docs:"):
        return Source(spec=spec, kind="docs", packages=_docs_packages(spec))
    path = Path(spec)
    if path.is_file():
        if _suffix(path) is None:
            raise ValueError(
                f"source {spec}: cannot read a file of this kind; wanted "
                f"{' '.join(LINES + JSON_LINES)} (also with .gz) or {' '.join(PARQUET)}"
            )
        return Source(spec=spec, kind="files", files=((path.name, path),))
    if not path.is_dir():
        raise FileNotFoundError(f"source {spec!r} does not exist: wanted a file, a folder, hf:NAME or docs:")
    # Sorted by the parts of the name: the order must not depend on the file system or locale.
    found = sorted(
        (file.relative_to(path).parts, file) for file in path.rglob("*") if _suffix(file) is not None and file.is_file()
    )
    files = tuple(("/".join(parts), file) for parts, file in found if not any(part.startswith(".") for part in parts))
    if not files:
        raise ValueError(f"source {spec}: no {' '.join(LINES + JSON_LINES + PARQUET)} file in this folder")
    return Source(spec=spec, kind="files", files=files)


def _suffix(path: Path) -> str | None:
    """The suffix that says how to read a file, None where none does."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    known = LINES + JSON_LINES + (() if name.endswith(".gz") else PARQUET)
    return suffix if suffix in known else None


def _file_documents(path: Path, options: Options) -> Iterator[tuple[str, float]]:
    """Each document of a file, with the fraction of the file that has been read."""
    suffix = _suffix(path)
    if suffix in PARQUET:
        yield from _parquet_documents(path, options)
        return
    size = max(path.stat().st_size, 1)
    with open(path, "rb", buffering=2**20) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        num_bytes = 0
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = _decode(line, options, where, num_bytes)
            num_bytes += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if suffix in JSON_LINES and text.strip():
                text = _json_text(text, options.text_field, where)
            # The position of the raw file runs ahead of the line by the buffer, never behind.
            yield text.rstrip("\r\n"), min(raw.tell() / size, 1.0)


def _decode(data: bytes, options: Options, where: str, num_bytes_before: int = 0) -> str:
    try:
        return data.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {num_bytes_before + error.start} (0x{data[error.start]:02x}) is not "
            "UTF-8: convert the file (for instance with iconv), or put U+FFFD for such bytes with "
            "--errors replace"
        ) from None


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); wanted one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted one object a line, got {type(record).__name__}")
    return _field_text(record, text_field, where)


def _field_text(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        raise ValueError(
            f"{where}: no field {text_field!r}; there are {', '.join(map(repr, record))[:500]}: "
            "name the right one with --text-field"
        )
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {text_field!r} is not text but {type(text).__name__}")
    return text or ""


def _parquet_documents(path: Path, options: Options) -> Iterator[tuple[str, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if options.text_field not in schema.names:
                _field_text(dict.fromkeys(schema.names), options.text_field, str(path))
            kind = schema.field(options.text_field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (
                pyarrow.types.is_string(kind)
                or pyarrow.types.is_large_string(kind)
                or pyarrow.types.is_string_view(kind)
            ):
                raise ValueError(f"{path}: the column {options.text_field!r} is not text but {kind}")
            num_rows = 0
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=256, columns=[options.text_field]):
                # As bytes: Parquet does not promise that its strings are UTF-8.
                for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    num_rows += 1
                    text = _decode(data or b"", options, f"{path}, row {num_rows}")
                    yield text, num_rows / total
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _hub_documents(name: str, options: Options) -> Iterator[str]:
    import datasets

    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=options.split, streaming=options.streaming)
    except Exception as error:  # datasets raises its own, the hub's and the file systems' errors
        raise ValueError(
            f"hf:{name}: cannot be loaded ({type(error).__name__}: {error}); check the name, the "
            "configuration (hf:NAME:CONFIG), --split and the connection"
        ) from error
    for number, row in enumerate(rows, start=1):
        text = _field_text(dict(row), options.text_field, f"hf:{name}, row {number}")  # type: ignore[arg-type]
        if text and not text.isspace():
            yield text


def _docs_packages(spec: str) -> tuple[str, ...]:
    names = tuple(filter(None, spec.removeprefix("docs:").split(",")))
    for name in names:
        if name not in DOCS_PACKAGES:
            raise ValueError(f"source {spec!r}: wanted names out of {', '.join(DOCS_PACKAGES)}")
        if not _is_installed(name):
            raise ValueError(f"source {spec!r}: {name} is not installed on this machine")
    return names or tuple(filter(_is_installed, DOCS_PACKAGES))


def _is_installed(package: str) -> bool:
    # find_spec, since importing torch takes seconds.
    return package == "python" or importlib.util.find_spec(package) is not None


@cache  # 15 MB that take ten seconds to collect, and training a tokenizer reads them first
def _docs_documents(packages: tuple[str, ...]) -> list[str]:
    """Docstrings of the packages' source, each text once, by package, file and line."""
    documents: dict[str, None] = {}
    for package in packages:
        if package == "python":
            from pydoc_data.topics import topics

            documents.update((topics[name], None) for name in sorted(topics))
            root = Path(sysconfig.get_paths()["stdlib"])
        else:
            spec = importlib.util.find_spec(package)
            origin = spec.origin if spec is not None else None
            assert origin is not None, package  # `_docs_packages` looked
            root = Path(origin).parent
        for path in sorted(root.rglob("*.py")):
            if _NOT_DOCS.isdisjoint(path.relative_to(root).parts):
                documents.update((text, None) for text in _docstrings(path))
    return [text for text in documents if not text.isspace()]


def _docstrings(path: Path) -> Iterator[str]:
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
