"""The on-disk format of prepared text, its reader and its writer.

A prepared folder holds

    meta.json            what `Meta` says; written last, so a folder without it is unfinished
    counts.npy           int64 (vocab_size,): how often each id occurs in the kept sequences
    shard-00000.tokens   raw little-endian uint16 or uint32: the sequences one after the other
    shard-00000.offsets  raw little-endian int64 (num_sequences + 1,): where each begins, from 0
    tokenizer/           a Hugging Face tokenizer folder

A sequence is [CLS] text [SEP]. Shards are raw so that a piece of the file is the array and a hash of the file is a hash
of the data. Nothing in the folder depends on the machine, the time or the number of workers.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastdistil.data.tokenizer import SPECIAL_TOKENS
from fastdistil.remote.storage import storage
from fastdistil.run import files

log = logging.getLogger("fastdistil")

FORMAT_VERSION = 1
META_FILE = "meta.json"
COUNTS_FILE = "counts.npy"
_REPAIR = "run `python -m fastdistil.prepare` again with --overwrite"


def _damaged(what: object, problem: str) -> ValueError:
    return ValueError(f"{what} {problem}: {_REPAIR}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One pair of files. The hashes are SHA-256 in hexadecimal."""

    name: str
    num_sequences: int
    num_tokens: int
    tokens_sha256: str
    offsets_sha256: str

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each of the two files, by its name."""
        return {f"{self.name}.tokens": self.tokens_sha256, f"{self.name}.offsets": self.offsets_sha256}


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """The contents of meta.json."""

    format_version: int
    dtype: str
    """"uint16" or "uint32", little-endian."""
    vocab_size: int
    special_ids: dict[str, int]
    """Ids of pad, unk, cls, sep and mask."""
    tokenizer_sha256: str
    """`tokenizer.vocabulary_sha256` of the tokenizer that made the shards."""
    max_length: int
    """No sequence is longer, [CLS] and [SEP] included."""
    num_documents: int
    num_sequences: int
    num_tokens: int
    """Of the kept sequences, [CLS] and [SEP] included."""
    dropped_short: int
    dropped_unknown: int
    """Sequences left out for being too short, or half or more [UNK]."""
    text_bytes: int
    """UTF-8 bytes of the documents read, those of dropped sequences included."""
    counts_sha256: str
    preparation: dict[str, Any]
    """The arguments that decide the bytes, with the names and sizes of the source files."""
    shards: tuple[Shard, ...]
    dropped_share: float = 0.0
    """Tokens of the sequences left out, as a part of all tokens of the text."""
    bad_records: int = 0
    """Records that could not be read and were skipped by --on-bad-record skip.

    These two are 0 in folders of before they were counted.
    """

    @property
    def digest(self) -> str:
        """SHA-256 of what a run reads of the folder: sequences, counts, what ids mean; not where it all came from."""
        read = [self.vocab_size, self.special_ids, self.tokenizer_sha256, self.counts_sha256]
        files_of = [shard.hashes for shard in self.shards]
        return hashlib.sha256(json.dumps([read, files_of], sort_keys=True).encode()).hexdigest()


def checked(record: Any, kind: type, where: str) -> dict[str, Any]:
    """The fields of the dataclass `kind` taken from a JSON object; ValueError names a bad one."""
    if not isinstance(record, dict):
        raise _damaged(where, f"must be a JSON object, got {type(record).__name__}")
    fields = {}
    for name, wanted in kind.__annotations__.items():
        if name not in record:
            raise _damaged(where, f"lacks the field {name!r}")
        value = fields[name] = record[name]
        json_type = {int: int, float: float, str: str, tuple[Shard, ...]: list}.get(wanted, dict)
        # The type itself, since True is an instance of int.
        if type(value) is not json_type or (wanted in (int, float) and value < 0):
            raise _damaged(where, f"has {name}={value!r:.80}, which is not a valid {json_type.__name__}")
    return fields


def read_meta(folder: str | Path) -> Meta:
    """The checked contents of `folder`/meta.json, without a look at the shards.

    Raises FileNotFoundError where there is none (not prepared, or the preparation was interrupted) and ValueError,
    which names file and field, where it does not hold what this version writes.
    """
    path = Path(folder) / META_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} holds no finished preparation; make one with "
            "`python -m fastdistil.prepare` (the same command goes on where it was interrupted)"
        )

    def require(condition: bool, found: str) -> None:
        if not condition:
            raise _damaged(path, f"has {found}")

    record = files.read_json(path, fix=_REPAIR)
    version = record.get("format_version", FORMAT_VERSION)
    require(version == FORMAT_VERSION, f"format_version {version!r:.80}, this fastdistil reads {FORMAT_VERSION}")
    not_yet_counted = {field.name: field.default for field in dataclass_fields(Meta) if field.default is not MISSING}
    fields = checked({**not_yet_counted, **record}, Meta, str(path))
    fields["shards"] = tuple(
        Shard(**checked(shard, Shard, f"{path}: shards[{index}]")) for index, shard in enumerate(fields["shards"])
    )
    meta = Meta(**fields)
    require(meta.dtype in ("uint16", "uint32"), f"dtype={meta.dtype!r:.80}, wanted uint16 or uint32")
    require(0 < meta.vocab_size <= 2**31, f"vocab_size={meta.vocab_size}")
    require(meta.dtype == token_dtype(meta.vocab_size), f"dtype={meta.dtype} with that vocab_size")
    require(meta.dropped_share <= 1, f"dropped_share={meta.dropped_share}")
    require(3 <= meta.max_length <= 2**31, f"max_length={meta.max_length}")
    for name in SPECIAL_TOKENS:
        token_id = meta.special_ids.get(name)
        is_id = type(token_id) is int and 0 <= token_id < meta.vocab_size
        require(is_id, f"special_ids[{name!r}]={token_id!r:.80}, wanted an id below {meta.vocab_size}")
    require(len(meta.shards) > 0, "no shards")
    for index, shard in enumerate(meta.shards):
        # Fixed names: a file elsewhere, or twice the same one, cannot be smuggled in.
        require(shard.name == shard_name(index), f"shards[{index}].name={shard.name!r:.80}")
        require(shard.num_sequences > 0, f"shards[{index}].num_sequences=0")
    for name in ("num_sequences", "num_tokens"):
        total = sum(getattr(shard, name) for shard in meta.shards)
        require(getattr(meta, name) == total, f"{name}={getattr(meta, name)}, its shards: {total}")
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Write meta.json, which makes the folder a finished one: call it last."""
    files.write_json(folder / META_FILE, asdict(meta), durable=True)


def token_dtype(vocab_size: int) -> str:
    """The name of the smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(index: int) -> str:
    """The files of shard `index` are this name with .tokens and .offsets."""
    return f"shard-{index:05d}"


def fetch(option: str, url: str, cache: Path | None) -> Path:
    """The folder of `cache` that is a copy of the prepared one at a URL, made where it is missing.

    `cache` is ~/.cache/fastdistil unless given. The copy is whole or has no meta.json; every file of tokens is compared
    with its SHA-256. An interrupted copy goes on with the files that are there. Processes of a machine wait for the one
    that copies. Copies are told apart by their meta.json, which holds all hashes, so that of a corpus that was prepared
    anew there is another one.

    Raises ValueError where there is no whole preparation at the URL, it cannot be read, or the disk is too small.
    """
    from filelock import FileLock

    system, root = storage(option, url)
    cache = (cache or Path("~/.cache/fastdistil")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    try:
        described = system.cat_file(f"{root}/{META_FILE}")
        key = hashlib.sha256(described).hexdigest()[:16]
        folder = cache / f"{root.rpartition('/')[2]}-{key}"
        with FileLock(cache / f"{folder.name}.lock"):
            if not (folder / META_FILE).is_file():
                _copy(system, root, described, folder, f"{option} {url}", cache)
    except FileNotFoundError as error:
        raise ValueError(
            f"{option} {url} holds no finished preparation ({error}): copy a whole folder of `python -m "
            "fastdistil.prepare` there"
        ) from None
    except ValueError:
        raise
    except Exception as error:  # every storage raises its own
        raise ValueError(
            f"{option} {url} cannot be read ({type(error).__name__}: {error}): see that the address and the login are "
            "right"
        ) from error
    return folder


def _copy(system: Any, root: str, described: bytes, folder: Path, what: str, cache: Path) -> None:
    """Copy a prepared folder to `folder`, its meta.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as alone:
        Path(alone, META_FILE).write_bytes(described)
        try:
            meta = read_meta(alone)
        except ValueError as error:
            raise ValueError(str(error).replace(alone, what)) from None
    hashes: dict[str, str] = {COUNTS_FILE: meta.counts_sha256}
    for shard in meta.shards:
        hashes |= shard.hashes
    beside = [f"tokenizer/{path.rpartition('/')[2]}" for path in system.ls(f"{root}/tokenizer", detail=False)]
    num_bytes = meta.num_tokens * np.dtype(meta.dtype).itemsize + 8 * meta.num_sequences
    done = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if shutil.disk_usage(folder).free < num_bytes - done + 2**20:
        raise ValueError(
            f"{what} is {num_bytes:,} bytes, and {cache} has {shutil.disk_usage(folder).free:,} free: give a "
            "--data.cache with more room"
        )
    log.info("%s: copying %s MB in %d files to %s", what, f"{num_bytes / 1e6:,.1f}", len(hashes), folder)
    begin = said = time.monotonic()
    for name in (*beside, *hashes):
        path = folder / name
        if name not in hashes or not path.is_file() or files.sha256(path) != hashes[name]:
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            system.get_file(f"{root}/{name}", str(part))
            if name in hashes and (got := files.sha256(part)) != hashes[name]:
                part.unlink()
                raise ValueError(f"{what}: {name} is not as {META_FILE} says (SHA-256 {got}, wanted {hashes[name]})")
            os.replace(part, path)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            log.info("%s: %s is here, after %.0f s", what, name, said - begin)
    files.write_bytes(folder / META_FILE, described, durable=True)
    log.info("%s: copied in %.1f s", what, time.monotonic() - begin)


class Shards:
    """The sequences of a prepared folder, read as they are asked for, numbered from 0 over all shards.

    `meta`: its Meta. `counts`: int64 (vocab_size,), occurrences of each id. `lengths`: int32 (num_sequences,), tokens
    of each sequence, [CLS] and [SEP] included.

    Files are opened when first used and left out of a pickle, so an instance goes cheaply into worker processes. They
    are not mapped: a map of a file that somebody cuts ends the process by SIGBUS, where reading it says what is wrong.
    The sizes of all files and every offset are always checked. With `verify` hashes are, too: those of files
    number rank, rank + world, ... of the list, where (rank, world) is `verify_part`, so that the ranks of a job share
    the work. Raises what `read_meta` raises, and ValueError with the name of a truncated or edited file.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True, verify_part: tuple[int, int] = (0, 1)) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self._dtype = np.dtype(self.meta.dtype)
        hashes = {COUNTS_FILE: self.meta.counts_sha256}
        for shard in self.meta.shards:
            hashes |= shard.hashes
            self._check_size(f"{shard.name}.tokens", shard.num_tokens * np.dtype(self.meta.dtype).itemsize)
            self._check_size(f"{shard.name}.offsets", (shard.num_sequences + 1) * 8)
        if verify:
            rank, world = verify_part
            for name, wanted in list(hashes.items())[rank::world]:
                path = self._existing(name)
                got = files.sha256(path)
                if got != wanted:
                    raise _damaged(path, f"was changed after it was prepared (wanted SHA-256 {wanted}, got {got})")
        self.counts = self._read_counts()
        lengths, starts = zip(*map(self._sequences_of, self.meta.shards), strict=True)
        self.lengths, self._starts = np.concatenate(lengths), np.concatenate(starts)
        self._first_sequences = np.cumsum([0, *map(len, lengths)])
        self._files: dict[int, int] = {}  # descriptor of a shard's tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of sequence `index`, (length,) read-only in the dtype of the shards.

        Raises IndexError where `index` is not in [0, num_sequences), and ValueError where the file was changed since.
        """
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {self.folder}, which has {len(self.lengths)}")
        shard = int(np.searchsorted(self._first_sequences, index, side="right")) - 1
        if shard not in self._files:
            self._files[shard] = os.open(self._tokens_path(shard), os.O_RDONLY | getattr(os, "O_BINARY", 0))
        size = self._dtype.itemsize
        num_bytes = int(self.lengths[index]) * size
        data = _read_at(self._files[shard], num_bytes, int(self._starts[index]) * size)
        if len(data) < num_bytes:
            raise _damaged(self._tokens_path(shard), "was cut since it was opened")
        return np.frombuffer(data, self._dtype)

    def _tokens_path(self, shard: int) -> Path:
        return self.folder / f"{self.meta.shards[shard].name}.tokens"

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        return path

    def _check_size(self, name: str, wanted: int) -> None:
        path = self._existing(name)
        got = path.stat().st_size
        if got != wanted:
            raise _damaged(path, f"has {got} bytes, {META_FILE} says {wanted}")

    def _read_counts(self) -> np.ndarray:
        path = self._existing(COUNTS_FILE)
        try:
            counts = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise _damaged(path, f"is not a NumPy array ({error})") from None
        wanted = (np.dtype("<i8"), (self.meta.vocab_size,))
        if not isinstance(counts, np.ndarray) or (counts.dtype, counts.shape) != wanted:
            raise _damaged(path, f"is not an int64 array of {self.meta.vocab_size}")
        if counts.min() < 0 or counts.sum() != self.meta.num_tokens:
            raise _damaged(path, f"counts {counts.sum()} tokens, {META_FILE} says {self.meta.num_tokens}")
        return counts

    def _sequences_of(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """(lengths, where they begin) of the sequences of a shard, in tokens."""
        path = self.folder / f"{shard.name}.offsets"
        offsets = np.fromfile(path, "<i8")
        lengths = np.diff(offsets)
        shortest, longest = lengths.min(), lengths.max()
        if offsets[0] != 0 or offsets[-1] != shard.num_tokens:
            raise _damaged(path, f"runs from {offsets[0]} to {offsets[-1]}, wanted 0 to {shard.num_tokens}")
        if shortest < 1 or longest > self.meta.max_length:
            limit = self.meta.max_length
            raise _damaged(path, f"has sequences of {shortest} to {longest} tokens, wanted 1 to {limit}")
        # 8 bytes a sequence in all, 300 MB for the paper's corpus, which data workers share with their parent.
        return lengths.astype(np.int32), offsets[:-1].astype("u4" if shard.num_tokens < 2**32 else "i8")


def _read_at(descriptor: int, num_bytes: int, begin: int) -> bytes:
    """What stands there, or less where the file ends; forked workers share the descriptor, and must not move it."""
    if sys.platform != "win32":
        return os.pread(descriptor, num_bytes, begin)
    os.lseek(descriptor, begin, os.SEEK_SET)  # no process is a fork
    return os.read(descriptor, num_bytes)


def together(metas: Sequence[Meta]) -> Meta:
    """What a run reads of several folders that one tokenizer made, as if they were one; of one folder its own."""
    if len(metas) == 1:
        return metas[0]
    return replace(
        metas[0],
        max_length=max(meta.max_length for meta in metas),
        num_documents=sum(meta.num_documents for meta in metas),
        num_sequences=sum(meta.num_sequences for meta in metas),
        num_tokens=sum(meta.num_tokens for meta in metas),
        counts_sha256=hashlib.sha256("\n".join(meta.counts_sha256 for meta in metas).encode()).hexdigest(),
        preparation={"sources": [s for meta in metas for s in meta.preparation.get("sources") or ()]},
        shards=tuple(shard for meta in metas for shard in meta.shards),
    )


class Mix:
    """The sequences of several prepared folders as those of one, numbered from 0 over all of them.

    What `Shards` has for a folder stands under the same names. `first`: int64 (folders + 1,), the first sequence of
    each folder. `counts` are those of the ids in an epoch that reads each folder so often as `passes` says.
    """

    def __init__(self, parts: Sequence[Shards], passes: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.meta = together([part.meta for part in parts])
        self.first = np.cumsum([0, *map(len, parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        for part, first in zip(parts, self.first, strict=False):
            part.lengths = self.lengths[first : first + len(part)]  # which are kept once
        drawn = [part.counts * times for part, times in zip(parts, passes, strict=True)]
        self.counts = np.rint(np.sum(drawn, axis=0)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> np.ndarray:
        """As `Shards.sequence`."""
        part = int(np.searchsorted(self.first, index, side="right")) - 1
        if not 0 <= part < len(self.parts):
            raise IndexError(f"sequence {index} of a mix, which has {len(self)}")
        return self.parts[part].sequence(index - int(self.first[part]))


class ShardWriter:
    """Writes one shard beside its final name; `finish` puts it in place and describes it."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.num_tokens = 0
        self.num_sequences = 0
        self._folder = folder
        self._name = name
        self._lengths: list[np.ndarray] = []
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._sha256 = hashlib.sha256()
        self._part = folder / f"{name}.tokens.part"
        self._file = self._part.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)  # not finished

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append sequences: `tokens` (sum of lengths,) integer ids, `lengths` (sequences,)."""
        data = tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self._lengths.append(lengths)
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)

    def finish(self) -> Shard:
        """The description of the shard, once both files are on the disk under their names."""
        offsets = np.zeros(self.num_sequences + 1, "<i8")
        np.cumsum(np.concatenate(self._lengths), out=offsets[1:])
        self._file.close()
        files.sync(self._part)
        os.replace(self._part, self._folder / f"{self._name}.tokens")
        files.write_bytes(self._folder / f"{self._name}.offsets", offsets.tobytes(), durable=True)
        return Shard(
            name=self._name,
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            tokens_sha256=self._sha256.hexdigest(),
            offsets_sha256=hashlib.sha256(offsets.tobytes()).hexdigest(),
        )


def write_counts(folder: Path, counts: np.ndarray) -> str:
    """Write counts.npy, int64 (vocab_size,); its SHA-256 in hexadecimal."""
    data = io.BytesIO()
    np.save(data, counts.astype("<i8"))
    files.write_bytes(folder / COUNTS_FILE, data.getvalue(), durable=True)
    return hashlib.sha256(data.getvalue()).hexdigest()


def count_tokens(folder: Path, shard: Shard, dtype: str, vocab_size: int) -> np.ndarray:
    """Occurrences of each id in a shard, int64 (vocab_size,), after a check of its two hashes."""
    for name, sha256 in shard.hashes.items():
        path = folder / name
        if not path.is_file() or files.sha256(path) != sha256:
            raise _damaged(path, "is missing or was changed")
    counts = np.zeros(vocab_size, np.int64)
    tokens = np.memmap(folder / f"{shard.name}.tokens", dtype, "r")
    for start in range(0, len(tokens), 2**24):  # bincount makes int64 of its input
        counts += np.bincount(tokens[start : start + 2**24], minlength=vocab_size)
    return counts
