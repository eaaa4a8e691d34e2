"""Readers of one file: whatever holds text -> its documents.

    text      .txt .text .md, and text without a suffix: documents are lines, or runs of lines (`_documents` decides)
    JSON      .jsonl .ndjson .json: one object a line, one array, or objects one after the other
    tables    .parquet; .arrow .feather, the stream and the file format of Arrow

Text and JSON are also read compressed. Which compression it is, and whether a file is Parquet or Arrow, its first bytes
say and not its name. A new kind of file is one function and one row in READERS.

Reading needs memory for one document and one Parquet row group's column, however large the file.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow

HEAD_BYTES = 2**16
"""How much of a file, decompressed, is looked at to decide what it is."""
SHORT_LINE = 200
"""Characters. Hard-wrapped text has 60 to 80 a line, sentences up to 200; paragraphs and articles have more."""
LINES_A_PARAGRAPH = (1.5, 100.0)
"""Fewer lines between blank ones and there is nothing to join; more and the blank lines separate something else."""
LONGEST_JOINED = 2**20
"""Characters after which joined lines are a document, so that a file of any length is read in bounded memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the documents are taken out of the sources."""

    text_field: str = "text"
    """A field, or the path of one: content.text."""
    split: str = "train"
    streaming: bool = False
    errors: Literal["strict", "replace"] = "strict"
    """What a byte that is not UTF-8 does: stop with an error, or become U+FFFD."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    documents: Literal["auto", "line", "paragraph", "file"] = "auto"
    """What a document is in files of text."""


Record = str | ValueError
"""A document, perhaps blank, or what is wrong with it."""
Reader = Callable[[Path, Options], Iterator[tuple[Record, float]]]
"""Gives each record with the fraction of the file that has been read. Raises ValueError, OSError, EOFError or the error
of a decompressor where it cannot read on."""


class File(NamedTuple):
    """A file, and how it is read."""

    name: str
    """Below the folder that was given."""
    path: Path
    num_bytes: int
    """On the disk."""
    reader: Reader
    documents: str
    """What a document is in a file of text: a key of TEXT; "" in other files."""
    compressed: bool
    why: str
    """What decided that, for the log; "" where the name says all."""

    @property
    def num_text_bytes(self) -> int:
        """Of text, estimated."""
        return self.num_bytes * (3 if self.compressed else 1)


# ---------------------------------------------------------------------------------------------------------------- bytes
def _by_arrow(codec: str, raw: BinaryIO) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), 2**20)  # type: ignore[arg-type]


COMPRESSIONS: dict[str, tuple[bytes, Callable[[BinaryIO], BinaryIO]]] = {
    ".gz": (rb"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),  # type: ignore[dict-item,return-value]
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),  # type: ignore[dict-item]
    ".xz": (rb"\xfd7zXZ\x00", lzma.LZMAFile),  # type: ignore[dict-item]
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", partial(_by_arrow, "zstd")),
    ".lz4": (rb"\x04\x22\x4d\x18", partial(_by_arrow, "lz4")),
}
"""The first bytes of what is compressed, and what reads it."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """The decompressed bytes of a file, and how much of the file they have taken so far, as a fraction."""
    size = max(path.stat().st_size, 1)
    with io.BufferedReader(io.FileIO(path), 2**20) as raw:
        start = raw.peek(16)
        opener = next((opener for magic, opener in COMPRESSIONS.values() if re.match(magic, start)), None)
        # The position of the raw file runs ahead of what is read by the buffer, never behind.
        yield opener(raw) if opener else raw, lambda: min(raw.tell() / size, 1.0)


def _head(path: Path) -> bytes:
    """The first HEAD_BYTES, decompressed; fewer of a file that is cut or damaged."""
    with _opened(path) as (file, _):
        head = b""
        try:
            while len(head) < HEAD_BYTES and (more := file.read1(HEAD_BYTES - len(head))):  # type: ignore[attr-defined]
                head += more
        except UNREADABLE:
            pass
        return head


UNREADABLE = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""


def _decode(data: bytes, options: Options, where: str, num_bytes_before: int = 0) -> str:
    try:
        return data.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {num_bytes_before + error.start} (0x{data[error.start]:02x}) is not UTF-8: convert the "
            "file (for instance with iconv), or put U+FFFD for such bytes with --errors replace"
        ) from None


# ----------------------------------------------------------------------------------------------------------------- text
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _lines(path: Path, options: Options) -> Iterator[tuple[Record, str, float]]:
    """Each line without its end, its place for an error message, and the fraction of the file that has been read."""
    with _opened(path) as (file, fraction):
        lines: Iterable[bytes] = file
        if file.peek(2)[:2] in _UTF16:  # type: ignore[attr-defined]
            # Windows writes it. Line breaks are those of other files, so U+2028 is none.
            text = io.TextIOWrapper(file, "utf-16", options.errors, newline="\n")
            lines = (line.encode(errors="replace") for line in text)
        num_bytes = 0
        for number, data in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = _decode(data, options, where, num_bytes).rstrip("\r\n")
            except ValueError as error:
                line = error
            else:
                if number == 1:
                    line = line.removeprefix("\ufeff")
            num_bytes += len(data)
            yield line, where, fraction()


def _text_lines(path: Path, options: Options) -> Iterator[tuple[Record, float]]:
    for line, _, fraction in _lines(path, options):
        yield line, fraction


def _joined_lines(
    path: Path, options: Options, *, ends: Callable[[str], object], glue: str
) -> Iterator[tuple[Record, float]]:
    """Runs of lines between those that `ends` says yes to, which are no text."""
    lines: list[str] = []
    num_chars = 0
    for line, _, fraction in _lines(path, options):
        if isinstance(line, ValueError):
            yield line, fraction
            continue
        end = ends(line)
        if lines and (end or num_chars > LONGEST_JOINED):
            yield glue.join(lines), fraction
            lines, num_chars = [], 0
        if not end:
            lines.append(line if glue == "\n" else line.strip())
            num_chars += len(line)
    yield glue.join(lines), 1.0


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


TEXT: dict[str, Reader] = {
    "line": _text_lines,
    "paragraph": partial(_joined_lines, ends=_is_blank, glue=" "),
    "file": partial(_joined_lines, ends=lambda line: False, glue="\n"),
    "doc": partial(_joined_lines, ends=re.compile(r"<doc |</doc>").match, glue="\n"),
}
"""By what a document is: a line; the lines between blank ones, as one line; the whole file; what WikiExtractor puts
between <doc ...> and </doc>."""


def _documents(head: str, *, whole: bool) -> tuple[str, str]:
    """What a document is in a text that begins so, and why.

    Lines are joined to paragraphs where there are blank lines, half of the text is in lines of SHORT_LINE characters or
    fewer, and the lines between blank ones are a number within LINES_A_PARAGRAPH on average.
    """
    if re.match(r"\ufeff?<doc ", head):
        return "doc", "<doc> ... </doc>"
    lines = head.split("\n")
    lines = [line.strip() for line in (lines if whole or len(lines) == 1 else lines[:-1])]
    lengths = sorted(len(line) for line in lines if line)
    num_runs = sum(1 for before, line in zip(["", *lines], lines, strict=False) if line and not before)
    # The length of the line that the middle character of the text lies in, were the lines sorted.
    middle, typical = sum(lengths) / 2, 0
    for typical in lengths:
        middle -= typical
        if middle <= 0:
            break
    least, most = LINES_A_PARAGRAPH
    why = f"lines of {typical} characters, {len(lengths) / max(num_runs, 1):.1f} between blank ones"
    if num_runs > 1 and typical <= SHORT_LINE and least <= len(lengths) / num_runs <= most:
        return "paragraph", why
    return "line", why


# ----------------------------------------------------------------------------------------------------------------- JSON
def _json_records(path: Path, options: Options) -> Iterator[tuple[Record, float]]:
    start = True
    for line, where, fraction in _lines(path, options):
        text: Record = ""
        if isinstance(line, ValueError):
            text = line
        elif line and not line.isspace():
            if start and (line.lstrip()[0] == "[" or line.strip() == "{"):
                yield from _json_values(path, options)
                return
            start = False
            try:
                text = record_text(json.loads(line), options, where).rstrip("\r\n")
            except (json.JSONDecodeError, RecursionError) as error:
                text = ValueError(f"{where}: not JSON ({error}); wanted one object a line")
            except ValueError as error:
                text = error
        yield text, fraction


def _json_values(path: Path, options: Options) -> Iterator[tuple[Record, float]]:
    """The objects of one array, or objects over several lines one after the other; one of them is held at a time."""
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    with _opened(path) as (file, fraction):
        encoding = "utf-16" if file.peek(2)[:2] in _UTF16 else "utf-8-sig"  # type: ignore[attr-defined]
        text = io.TextIOWrapper(file, encoding, options.errors)
        buffer, at, number = text.read(2**20).lstrip().removeprefix("["), 0, 1
        while True:
            at = separators.match(buffer, at).end()  # type: ignore[union-attr]
            where = f"{path}, object {number}"
            try:
                value, end = decoder.raw_decode(buffer, at)
            except (json.JSONDecodeError, RecursionError) as error:
                # Perhaps the value is not whole yet. Reading twice as much each time keeps the work linear.
                more = "" if isinstance(error, RecursionError) else text.read(max(2**20, len(buffer) - at))
                if not more:
                    if buffer[at:].strip() not in ("", "]"):
                        yield ValueError(f"{where}: not JSON ({error})"), 1.0
                    return
                buffer, at = buffer[at:] + more, 0
                continue
            try:
                yield record_text(value, options, where).rstrip("\r\n"), fraction()
            except ValueError as error:
                yield error, fraction()
            at, number = end, number + 1


def record_text(record: Any, options: Options, where: str) -> str:
    """The text in a record that JSON or `datasets` gave; ValueError where it has none."""
    return _text_of(record, options.text_field, options, where)


def _text_of(value: Any, field: str, options: Options, where: str) -> str:
    """The text of a record: what is at `field`, a name or a path of names, "" where that is null.

    The strings of a list are the paragraphs of one document. A string in place of an object is the text itself.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return _decode(value, options, where)
    if isinstance(value, list):
        return "\n".join(filter(None, (_text_of(part, field, options, where) for part in value)))
    if isinstance(value, dict) and field:
        name, _, rest = (field, "", "") if field in value else field.partition(".")
        if name not in value:
            raise ValueError(_no_field(field, value, where))
        return _text_of(value[name], rest, options, where)
    kind = f"an object of {', '.join(map(repr, value))[:200]}" if isinstance(value, dict) else type(value).__name__
    raise ValueError(f"{where}: {options.text_field!r} is not text but {kind}: {_NAME_TEXT}")


_NAME_TEXT = "name text with --text-field, a part of a structure by its path, such as content.text"


def _no_field(field: str, there: Iterable[str], where: str) -> str:
    """What is said where a record has no such field."""
    names = ", ".join(map(repr, there))[:500]
    return f"{where}: no field {field!r}; there are {names}: name the right one with --text-field"


# --------------------------------------------------------------------------------------------------------------- tables
def _parquet_rows(path: Path, options: Options) -> Iterator[tuple[Record, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _column(file.schema_arrow, options.text_field, path)
            total = max(file.metadata.num_rows, 1)
            num_rows = 0
            for batch in file.iter_batches(batch_size=256, columns=[".".join(column[:-1])]):
                for text in _column_texts(batch, column, options, path, num_rows):
                    num_rows += 1
                    yield text, num_rows / total
    except pyarrow.ArrowException as error:
        yield ValueError(f"{path}: not a readable Parquet file ({error})"), 1.0


def _arrow_rows(path: Path, options: Options) -> Iterator[tuple[Record, float]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            file = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            column = _column(file.schema, options.text_field, path)
            batches = map(file.get_batch, range(file.num_record_batches)) if is_file else file
            size = max(source.size(), 1)
            num_rows = 0
            for batch in batches:
                for start in range(0, batch.num_rows, 256):
                    for text in _column_texts(batch.slice(start, 256), column, options, path, num_rows):
                        num_rows += 1
                        yield text, source.tell() / size
    except pyarrow.ArrowException as error:
        yield ValueError(f"{path}: not a readable Arrow file ({error})"), 1.0


def _column(schema: "pyarrow.Schema", field: str, path: Path) -> list[str]:
    """Where the text is: names of a column and of the structs in it, and last what of the path is left below a list.

    Raises ValueError where there is no such column, or no text in it.
    """
    import pyarrow

    name, _, rest = (field, "", "") if field in schema.names else field.partition(".")
    if name not in schema.names:
        raise ValueError(_no_field(field, schema.names, str(path)))
    if schema.names.count(name) > 1:
        raise ValueError(
            f"{path}: {schema.names.count(name)} columns are called {name!r}: give them names of their own"
        )
    names, kind, plain = [name, rest], schema.field(name).type, True
    types = pyarrow.types
    while True:
        if types.is_struct(kind) and names[-1]:
            inside = [kind.field(index).name for index in range(kind.num_fields)]
            name, _, rest = names.pop().partition(".")
            if name not in inside:
                raise ValueError(_no_field(field, inside, f"{path}, column {names[0]!r}"))
            kind = kind.field(name).type
            names += [name, rest] if plain else [rest]
        elif hasattr(kind, "value_type"):  # lists and dictionaries
            plain = plain and types.is_dictionary(kind)
            kind = kind.value_type
        else:
            break
    if not re.match(r"(large_)?(string|binary)|fixed_size_binary|null", str(kind)):
        raise ValueError(f"{path}: the column {field!r} is not text but {kind}: {_NAME_TEXT}")
    return names if plain else [*names[:-1], field.removeprefix(".".join(names[:-1])).lstrip(".")]


def _column_texts(
    batch: "pyarrow.RecordBatch", column: list[str], options: Options, path: Path, num_rows: int
) -> Iterator[Record]:
    """The texts of a column as `_column` found it; `num_rows` came before."""
    import pyarrow
    import pyarrow.compute

    values = batch.column(column[0])
    for name in column[1:-1]:
        values = pyarrow.compute.struct_field(values, name)  # type: ignore[attr-defined]
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (hasattr(values.type, "value_type") or pyarrow.types.is_null(values.type)):
        # As bytes: Parquet does not promise that its strings are UTF-8.
        values = values.cast(pyarrow.large_binary())
    for row, value in enumerate(values, start=num_rows + 1):
        where = f"{path}, row {row}"
        try:
            yield _text_of(value.as_py(), column[-1], options, where)
        except UnicodeDecodeError as error:  # below a list strings are not read as bytes
            yield ValueError(f"{where}: not UTF-8 ({error})")
        except ValueError as error:
            yield error


# ----------------------------------------------------------------------------------------------------- what a file is
READERS: dict[str, Reader | None] = {
    **dict.fromkeys((".txt", ".text", ".md")),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_records),
    ".parquet": _parquet_rows,
    **dict.fromkeys((".arrow", ".feather"), _arrow_rows),
}
"""How a file is read, by the end of its name without that of a compression; None: by TEXT."""
_TABLES: dict[bytes, Reader] = {rb"PAR1[\s\S]*\0": _parquet_rows, rb"ARROW1|\xff\xff\xff\xff[^\xff]": _arrow_rows}
"""The first bytes of files that are tables whatever they are called."""
_FOREIGN = {
    rb"version https://git-lfs": "the place-holder of a file that Git LFS keeps elsewhere: get it with `git lfs pull`",
    rb"PK\x03\x04|Rar!|7z\xbc\xaf": "an archive: unpack it and give its files",
    rb"[\s\S]{257}ustar": "a tar archive: unpack it and give its files",
    rb"%PDF-|\{\\rtf": "a document with its layout: extract its text first",
}
"""What cannot be read, by its first bytes, and what to do."""
_CONVERT = "convert it to one that is, for instance by pandas.read_csv(...).to_parquet(...)"
_NOT_TEXT = {
    **dict.fromkeys((".csv", ".tsv"), f"a table of a kind that is not read: {_CONVERT}"),
    **dict.fromkeys((".xml", ".html", ".htm", ".xhtml"), "markup: extract its text first (WikiExtractor, trafilatura)"),
}
"""Suffixes of files that are text to a computer only, and what to do."""
_MARKUP = re.compile(rb"\s*(<\?xml|<!doctype html|<html|<mediawiki)", re.IGNORECASE)


def suffix_of(path: Path) -> tuple[str, str]:
    """The ends of a name that say the kind of a file and its compression, in lower case, each "" where there is none.

    Numbers are no kind: part.00001, wiki_00.
    """
    name, packed = Path(path.name.lower()), ""
    if name.suffix in COMPRESSIONS:
        name, packed = Path(name.stem), name.suffix
    return ("" if name.suffix[1:].isdigit() else name.suffix), packed


def read_as(path: Path, name: str, options: Options) -> File:
    """How a file is read. ValueError where it cannot be, with what to do."""
    kind, packed = suffix_of(path)
    num_bytes, head = path.stat().st_size, _head(path)
    with path.open("rb") as raw:
        compressed = any(re.match(magic, raw.peek(16)) for magic, _ in COMPRESSIONS.values())
    table = next((reader for magic, reader in _TABLES.items() if re.match(magic, head)), None)
    problem = next((problem for magic, problem in _FOREIGN.items() if re.match(magic, head)), _NOT_TEXT.get(kind))
    reader, named, why = READERS.get(kind), kind in READERS, ""
    if table is not None:
        problem = "compressed as a whole, which no table is read from: decompress it" if compressed else None
    elif reader in _TABLES.values() and num_bytes and problem is None:
        problem = f"not what its name says: it begins with {head[:40]!r}"
    elif problem:
        pass
    elif not named and _MARKUP.match(head):
        problem = _NOT_TEXT[".html"]
    elif packed and not compressed and b"\0" in head:
        problem = f"neither {packed} nor text"
    elif not named and b"\0" in head and head[:2] not in _UTF16:
        problem = f"not text (it begins with {head[:16]!r}): wanted {' '.join(READERS)}, or text of any other name"
    elif not named and re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"([^"\\]|\\.)*"\s*:', head):
        reader, why = _json_records, "JSON by its beginning"
    if problem:
        raise ValueError(f"{path} is {problem}")
    if packed and not compressed and num_bytes:
        why = f"not compressed, though it is called {packed}"
    documents = ""
    if table is None and reader is None:
        text = head.decode("utf-16" if head[:2] in _UTF16 else "utf-8", "replace")
        documents, lines = _documents(text, whole=len(head) < HEAD_BYTES)
        why = "; ".join(filter(None, (why, lines)))
        documents = documents if options.documents == "auto" else options.documents
    reader = table or reader or TEXT[documents]
    packed_table = reader is _parquet_rows  # its text is about three times as long, too
    return File(name, path, num_bytes, reader, documents, compressed or packed_table, why)
