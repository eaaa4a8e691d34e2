"""Readers of text: what `prepare` is given on its command line -> documents, in a fixed order.

    FILE or FOLDER      .txt .text (one line is one document), .jsonl .ndjson .json (one object a line), .parquet;
                        the first two kinds also with .gz; folders recursively
    hf:NAME[:CONFIG]    a data set through `datasets`, by hub name or local folder

A new kind of file is one function here and one row in READERS, a new scheme one function and one row in SCHEMES.

`resolve` needs the standard library only, so that a missing source is reported at once. Reading needs memory for one
document and one Parquet row group's column, however large the source.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

BATCH_BYTES = 2**20
"""Text in a batch: large against the cost of sending it to a worker, small in memory and at the end."""
COMPRESSED = (".gz", ".parquet")
"""Files whose text is about three times as long as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the documents are taken out of the sources."""

    text_field: str = "text"
    split: str = "train"
    streaming: bool = False
    errors: Literal["strict", "replace"] = "strict"
    """What a byte that is not UTF-8 does: stop with an error, or become U+FFFD."""


def _text_lines(path: Path, options: Options) -> Iterator[tuple[str, float]]:
    for line, _, fraction in _lines(path, options):
        yield line.rstrip("\r\n"), fraction


def _json_lines(path: Path, options: Options) -> Iterator[tuple[str, float]]:
    for line, where, fraction in _lines(path, options):
        text = ""
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); wanted one object a line") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: wanted one object a line, got {type(record).__name__}")
            text = _field_text(record, options.text_field, where)
        yield text.rstrip("\r\n"), fraction


def _lines(path: Path, options: Options) -> Iterator[tuple[str, str, float]]:
    """Each line of a text file, its place for an error message, and the fraction of the file that has been read."""
    size = max(path.stat().st_size, 1)
    with path.open("rb", buffering=2**20) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        num_bytes = 0
        for number, data in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(data, options, where, num_bytes)
            num_bytes += len(data)
            if number == 1:
                line = line.removeprefix("\ufeff")
            # The position of the raw file runs ahead of the line by the buffer, never behind.
            yield line, where, min(raw.tell() / size, 1.0)


def _parquet_rows(path: Path, options: Options) -> Iterator[tuple[str, float]]:
    import pyarrow
    import pyarrow.parquet

    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if options.text_field not in schema.names:
                _field_text(dict.fromkeys(schema.names), options.text_field, str(path))  # says which there are
            kind = schema.field(options.text_field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not any(check(kind) for check in is_text):
                raise ValueError(f"{path}: the column {options.text_field!r} is not text but {kind}")
            num_rows = 0
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=256, columns=[options.text_field]):
                # As bytes: Parquet does not promise that its strings are UTF-8.
                for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    num_rows += 1
                    yield _decode(data or b"", options, f"{path}, row {num_rows}"), num_rows / total
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


Reader = Callable[[Path, Options], Iterator[tuple[str, float]]]
READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".text", ".txt.gz", ".text.gz"), _text_lines),
    **dict.fromkeys((".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"), _json_lines),
    ".parquet": _parquet_rows,
}
"""How a file is read, by the end of its name.

A reader gives each document, blank ones too, with the fraction of the file that has been read. Where it cannot read on
it raises ValueError with file and line (or row).
"""


def _hub_rows(name: str, options: Options) -> Iterator[str]:
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
        yield _field_text(dict(row), options.text_field, f"hf:{name}, row {number}")  # type: ignore[arg-type]


SCHEMES: dict[str, Callable[[str, Options], Iterator[str]]] = {"hf:": _hub_rows}
"""How a source that is no file is read, by the beginning of its name: its reader is given the rest of the name."""


def _decode(data: bytes, options: Options, where: str, num_bytes_before: int = 0) -> str:
    try:
        return data.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {num_bytes_before + error.start} (0x{data[error.start]:02x}) is not UTF-8: convert the "
            "file (for instance with iconv), or put U+FFFD for such bytes with --errors replace"
        ) from None


def _field_text(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text in a field of a record, "" where it is null."""
    if text_field not in record:
        raise ValueError(
            f"{where}: no field {text_field!r}; there are {', '.join(map(repr, record))[:500]}: "
            "name the right one with --text-field"
        )
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {text_field!r} is not text but {type(text).__name__}")
    return text or ""


@dataclass(kw_only=True)
class Source:
    """One argument of the command line; `documents` reads it."""

    spec: str
    scheme: str = ""
    """Its row of SCHEMES, "" for files."""
    files: tuple[tuple[str, Path], ...] = ()
    """The name of each file below the folder that was given, and its path."""
    num_bytes_read: int = field(default=0, init=False)
    """How far `documents` has come, in bytes on the disk."""

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the disk, 0 where that is not known."""
        return sum(path.stat().st_size for _, path in self.files)

    @cached_property
    def num_text_bytes(self) -> int:
        """Bytes of text, estimated; 0 where that is not known."""
        return sum(path.stat().st_size * (3 if path.suffix.lower() in COMPRESSED else 1) for _, path in self.files)

    def record(self, options: Options) -> dict[str, Any]:
        """What identifies the text, for meta.json: no path or other trace of the machine."""
        if not self.scheme:
            sizes = [[name, path.stat().st_size] for name, path in self.files]
            return {"name": Path(self.spec).resolve().name, "files": sizes}
        name = self.spec.removeprefix(self.scheme)
        name = Path(name).resolve().name if Path(name).exists() else name
        return {"name": f"{self.scheme}{name}", "split": options.split}

    def documents(self, options: Options) -> Iterator[str]:
        """The documents that are not blank. ValueError says which file and line cannot be read."""
        self.num_bytes_read = 0
        if self.scheme:
            texts = SCHEMES[self.scheme](self.spec.removeprefix(self.scheme), options)
            yield from (text for text in texts if not _is_blank(text))
        for _, path in self.files:
            before = self.num_bytes_read
            size = path.stat().st_size
            reader = _reader(path)
            assert reader is not None, path  # `_resolve` looked
            try:
                for text, fraction in reader(path, options):
                    self.num_bytes_read = before + int(fraction * size)
                    if not _is_blank(text):
                        yield text
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read to its end ({error})") from error
            self.num_bytes_read = before + size


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _reader(path: Path) -> Reader | None:
    """What reads a file of this name, None where nothing does."""
    name = path.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


def resolve(specs: tuple[str, ...]) -> list[Source]:
    """The sources behind the arguments; FileNotFoundError or ValueError says what is wrong."""
    return [_resolve(spec) for spec in specs]


def _resolve(spec: str) -> Source:
    for scheme in SCHEMES:
        if spec == scheme:
            raise ValueError(f"source {spec!r}: wanted {scheme}NAME or {scheme}NAME:CONFIG")
        if spec.startswith(scheme):
            return Source(spec=spec, scheme=scheme)
    path = Path(spec)
    if path.is_file():
        if _reader(path) is None:
            raise ValueError(f"source {spec}: cannot read a file of this kind; wanted {' '.join(READERS)}")
        return Source(spec=spec, files=((path.name, path),))
    if not path.is_dir():
        names = " or ".join(f"{scheme}NAME" for scheme in SCHEMES)
        raise FileNotFoundError(f"source {spec!r} does not exist: wanted a file, a folder or {names}")
    # Sorted by the parts of the name: the order must not depend on the file system or locale.
    found = sorted(
        (file.relative_to(path).parts, file) for file in path.rglob("*") if _reader(file) is not None and file.is_file()
    )
    files = tuple(("/".join(parts), file) for parts, file in found if not any(part.startswith(".") for part in parts))
    if not files:
        raise ValueError(f"source {spec}: no {' '.join(READERS)} file in this folder")
    return Source(spec=spec, files=files)


@dataclass(kw_only=True, slots=True)
class DocumentBatch:
    """Consecutive documents in UTF-8, and how far on the disk the sources were read for them."""

    documents: list[bytes]
    num_bytes_read: int


def read_batches(sources: list[Source], options: Options) -> Iterator[DocumentBatch]:
    """All documents in batches of BATCH_BYTES of text, or of one document where that is longer."""
    documents: list[bytes] = []
    num_bytes = before = 0
    for source in sources:
        for text in source.documents(options):
            # JSON can spell lone surrogates, which UTF-8 cannot: they become question marks.
            documents.append(text.encode(errors="replace"))
            num_bytes += len(documents[-1])
            if num_bytes >= BATCH_BYTES:
                yield DocumentBatch(documents=documents, num_bytes_read=before + source.num_bytes_read)
                documents, num_bytes = [], 0
        before += source.num_bytes
    if documents:
        yield DocumentBatch(documents=documents, num_bytes_read=before)
