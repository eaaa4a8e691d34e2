"""What `prepare` is given on its command line -> documents, in a fixed order.

    FILE or FOLDER      whatever `fastdistil.data.readers` reads; folders recursively, those of save_to_disk too
    hf:NAME[:CONFIG]    a data set through `datasets`, by hub name or local folder

A new kind of file is a function and a row in `readers`, a new scheme one function and one row in SCHEMES.

`resolve` needs the standard library only (and pyarrow for .zst and .lz4), so that what is missing or cannot be read is
reported at once.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdistil.data.readers import (
    COMPRESSIONS,
    READERS,
    UNREADABLE,
    File,
    Options,
    Record,
    read_as,
    record_text,
    suffix_of,
)
from fastdistil.run import files

LOG = logging.getLogger("fastdistil.prepare")
BATCH_BYTES = 2**20
"""Text in a batch: large against the cost of sending it to a worker, small in memory and at the end."""
NAMES_LOGGED = 5
"""Files or bad records that are named; the others are counted."""
ABOUT_DATA = (
    *("readme", "license", "licence", "copying", "changelog", "citation", "manifest", "checksum", "checksums"),
    *("md5sum", "md5sums", "sha256sum", "sha256sums", "thumbs", "_metadata", "_common_metadata"),
    *("dataset_info", "dataset_infos", "dataset_dict"),
)
"""Names, without what follows the first dot, of files in a folder that are about its text and are not read. Nor are
those that Hadoop and Spark put there, which begin with _ and have no suffix."""
ABOUT_DATA_SUFFIXES = ("state.json", ".md5", ".sha1", ".sha256", ".sha512", ".crc", ".sig", ".asc")
NO_TEXT_FOLDERS = ("_delta_log", "_temporary", "__macosx", "__pycache__")
LARGEST_METADATA = 2**20
"""Bytes. A .json file of a folder that is one object of no more, without the text field, is about the text."""


def _hub_rows(name: str, options: Options) -> Iterator[Record]:
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
        yield record_text(dict(row), options, f"hf:{name}, row {number}")  # type: ignore[arg-type]


SCHEMES: dict[str, Callable[[str, Options], Iterator[Record]]] = {"hf:": _hub_rows}
"""How a source that is no file is read, by the beginning of its name: its reader is given the rest of the name."""


@dataclass(kw_only=True)
class Source:
    """One argument of the command line; `documents` reads it."""

    spec: str
    options: Options
    scheme: str = ""
    """Its row of SCHEMES, "" for files."""
    files: tuple[File, ...] = ()
    num_bytes_read: int = field(default=0, init=False)
    """How far `documents` has come, in bytes on the disk."""
    num_bad: int = field(default=0, init=False)
    """Records that `documents` has skipped because they cannot be read."""

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the disk, 0 where that is not known."""
        return sum(file.num_bytes for file in self.files)

    @cached_property
    def num_text_bytes(self) -> int:
        """Bytes of text, estimated; 0 where that is not known."""
        return sum(file.num_text_bytes for file in self.files)

    def record(self) -> dict[str, Any]:
        """What identifies the text, for meta.json: no path or other trace of the machine."""
        if not self.scheme:
            # Lines are not named, so that what was prepared before there was a choice is still the same.
            sizes = [
                [file.name, file.num_bytes, *([file.documents] if file.documents not in ("", "line") else [])]
                for file in self.files
            ]
            return {"name": Path(self.spec).resolve().name, "files": sizes}
        name = self.spec.removeprefix(self.scheme)
        name = Path(name).resolve().name if Path(name).exists() else name
        return {"name": f"{self.scheme}{name}", "split": self.options.split}

    def documents(self) -> Iterator[str]:
        """The documents that are not blank.

        ValueError says which file and line cannot be read; with on_bad_record="skip" that happens where there is no
        text at all, such as a column that is missing, and records that cannot be read are counted and the first named.
        """
        self.num_bytes_read = self.num_bad = 0
        if self.scheme:
            records = SCHEMES[self.scheme](self.spec.removeprefix(self.scheme), self.options)
            yield from (text for text in map(self._good, records) if text and not text.isspace())
        for file in self.files:
            before = self.num_bytes_read
            try:
                for record, fraction in file.reader(file.path, self.options):
                    self.num_bytes_read = before + int(fraction * file.num_bytes)
                    text = record if isinstance(record, str) else self._good(record)
                    if text and not text.isspace():
                        yield text
            except UNREADABLE as error:
                self._good(ValueError(f"{file.path}: cannot be read to its end ({error})"))
            self.num_bytes_read = before + file.num_bytes

    def _good(self, record: Record) -> str:
        """The text of a record, "" of one that is skipped."""
        if isinstance(record, str):
            return record
        if self.options.on_bad_record == "stop":
            raise ValueError(f"{record}; or leave such records out with --on-bad-record skip")
        self.num_bad += 1
        if self.num_bad <= NAMES_LOGGED:
            more = "; further ones are counted" if self.num_bad == NAMES_LOGGED else ""
            LOG.warning(f"skipped: {record}{more}")
        return ""


def resolve(specs: tuple[str, ...], options: Options = Options()) -> list[Source]:  # noqa: B008 (frozen)
    """The sources behind the arguments; FileNotFoundError or ValueError says what is wrong.

    What is not read of a folder, and what was decided by looking into files, is logged.
    """
    sources = [_resolve(spec, options) for spec in specs]
    read = [file for source in sources for file in source.files]
    _log_decisions(read)
    if options.documents != "auto" and not any(file.documents for file in read):
        LOG.info(f"--documents {options.documents} has no effect: there is no file of text, and a record is a document")
    return sources


def _resolve(spec: str, options: Options) -> Source:
    for scheme in SCHEMES:
        if spec == scheme:
            raise ValueError(f"source {spec!r}: wanted {scheme}NAME or {scheme}NAME:CONFIG")
        if spec.startswith(scheme):
            if not any((Path(spec[len(scheme) :]) / name).is_file() for name in ("dataset_dict.json", "state.json")):
                return Source(spec=spec, options=options, scheme=scheme)
            spec = spec[len(scheme) :]  # a folder of save_to_disk, which `load_dataset` does not read
    path = Path(spec)
    if path.is_file():
        return Source(spec=spec, options=options, files=(read_as(path, path.name, options),))
    if not path.exists():
        names = " or ".join(f"{scheme}NAME" for scheme in SCHEMES)
        raise FileNotFoundError(f"source {spec!r} does not exist: wanted a file, a folder or {names}")
    if not path.is_dir():
        raise ValueError(
            f"source {spec} is a pipe or a device, and sources are read more than once: write it to a file"
        )
    found, unread = [], []
    for file in _walk(path, options.split, ()):
        name = file.relative_to(path).as_posix()
        seen = _look(file, name, options)
        if isinstance(seen, File):
            found.append(seen)
        else:
            unread.append((name, file.stat().st_size, seen))
    _account_for(spec, found, unread)
    return Source(spec=spec, options=options, files=tuple(found))


def _walk(folder: Path, split: str, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a folder by name, so that the order depends on no file system or locale; hidden ones are not.

    Of what `datasets` has saved with save_to_disk there are only the files that are its rows, and of a dictionary of
    splits only `split`.
    """
    above = (*above, folder.resolve())
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if "dataset_dict.json" in names:
        if split not in names or not (folder / split).is_dir():
            there = ", ".join(name for name in names if (folder / name).is_dir())
            raise ValueError(f"{folder} has no split {split!r}: name one of {there} with --split")
        names = [split]
    elif "state.json" in names and any(name.endswith(".arrow") for name in names):
        names = _rows_of_saved(folder, names)
    for path in (folder / name for name in names):
        if path.is_dir():
            # A link to a folder is followed, but not in a circle.
            if path.name.lower() not in NO_TEXT_FOLDERS and path.resolve() not in above:
                yield from _walk(path, split, above)
        elif path.is_file():
            yield path


def _rows_of_saved(folder: Path, names: list[str]) -> list[str]:
    """Of the `names` in a folder those that hold the rows that `datasets` has saved there, in their order."""
    state = files.read_json(folder / "state.json")
    rows = state.get("_data_files")
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} is a selection of rows by an old `datasets`: load it and save it again with 2.0+")
    if not isinstance(rows, list):  # another program's
        return names
    rows = [str(row.get("filename") if isinstance(row, dict) else row) for row in rows]
    if missing := [row for row in rows if row not in names]:
        raise ValueError(f"{folder} lacks {', '.join(missing)[:500]}, which its state.json names: copy it again")
    return rows


def _look(path: Path, name: str, options: Options) -> File | str:
    """How a file of a folder is read, or why it is not; "" where it is about the text."""
    kind, _ = suffix_of(path)
    stem = path.name.lower().split(".")[0]
    if stem in ABOUT_DATA or path.name.lower().endswith(ABOUT_DATA_SUFFIXES) or (stem[0] == "_" and not kind):
        return ""
    if kind and kind not in READERS:
        return kind
    if kind == ".json" and path.stat().st_size <= LARGEST_METADATA and _lacks_text(path, options):
        return f"one object without {options.text_field!r}, the --text-field"
    try:
        return read_as(path, name, options)
    except ValueError as error:
        if kind:
            raise
        return str(error).removeprefix(f"{path} is ").partition(": ")[0]


def _lacks_text(path: Path, options: Options) -> bool:
    """Whether a file is one JSON object, and not one with text."""
    try:
        record = files.read_json(path)
    except ValueError:  # also several objects, a line each
        return False
    try:
        record_text(record, options, "")
    except ValueError:
        return True
    return False


def _account_for(spec: str, found: list[File], unread: list[tuple[str, int, str]]) -> None:
    """Log the (name, bytes, reason) of a folder's files that are not read; ValueError where they are most of it."""
    num_read = sum(file.num_bytes for file in found)
    num_unread = sum(size for _, size, _ in unread)
    num_lost = sum(size for _, size, reason in unread if reason)
    largest = sorted(unread, key=lambda file: (not file[2], -file[1], file[0]))[:NAMES_LOGGED]
    names = ", ".join(f"{name} ({reason})" if reason else name for name, _, reason in largest)
    more = f" and {len(unread) - NAMES_LOGGED} more" if len(unread) > NAMES_LOGGED else ""
    share = f"{num_unread / max(num_read + num_unread, 1):.0%} of its bytes"
    said = f"{len(unread)} of {len(unread) + len(found)} files, {share}, are not read: {names}{more}"
    if not found or num_lost > num_read:
        kinds = f"{' '.join(READERS)}, text without a suffix, each also with {' '.join(COMPRESSIONS)}"
        raise ValueError(
            f"source {spec}: {said if unread else 'no file in this folder'}; wanted {kinds}: give by name what is text "
            "all the same, convert the others, or give a folder without them"
        )
    if unread:
        LOG.info(f"{spec}: {said}")


def _log_decisions(read: list[File]) -> None:
    """Say what a document is in files of text, and which files were read by what they hold and not by their name."""
    groups: dict[str, list[File]] = {}
    for file in read:
        if file.why:
            groups.setdefault(_DECISIONS[file.documents], []).append(file)
    for decision, group in groups.items():
        names = ", ".join(f"{file.name} ({file.why})" for file in group[:2])
        more = f" and {len(group) - 2} more" if len(group) > 2 else ""
        LOG.info(f"{decision}: {names}{more}")


_DECISIONS = {
    "": "read as what it holds",
    "line": "a document is a line (--documents says otherwise)",
    "paragraph": "a document is the lines between blank ones (--documents says otherwise)",
    "file": "a document is a file",
    "doc": "a document is what stands between <doc ...> and </doc> (--documents says otherwise)",
}


@dataclass(kw_only=True, slots=True)
class DocumentBatch:
    """Consecutive documents in UTF-8, and how far on the disk the sources were read for them."""

    documents: list[bytes]
    num_bytes_read: int
    num_bad: int
    """Records that were skipped among them."""


def read_batches(sources: list[Source]) -> Iterator[DocumentBatch]:
    """All documents in batches of BATCH_BYTES of text, or of one document where that is longer.

    Where there are none after the last record that was skipped, the last batch has no documents.
    """
    documents: list[bytes] = []
    num_bytes = before = num_bad = num_counted = 0
    for source in sources:
        for text in source.documents():
            # JSON can spell lone surrogates, which UTF-8 cannot: they become question marks.
            documents.append(text.encode(errors="replace"))
            num_bytes += len(documents[-1])
            if num_bytes >= BATCH_BYTES:
                seen = num_bad + source.num_bad
                yield DocumentBatch(
                    documents=documents, num_bytes_read=before + source.num_bytes_read, num_bad=seen - num_counted
                )
                documents, num_bytes, num_counted = [], 0, seen
        before += source.num_bytes
        num_bad += source.num_bad
    if documents or num_bad > num_counted:
        yield DocumentBatch(documents=documents, num_bytes_read=before, num_bad=num_bad - num_counted)
