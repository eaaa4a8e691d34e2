"""Command: text -> tokenised, counted shards (`fastdistil.shards` has the format).

    python -m fastdistil.prepare wiki/ books.txt.gz --tokenizer bert-base-uncased --out data/wiki
    python -m fastdistil.prepare docs: --tokenizer train:8192 --out data/docs

The main process reads the documents in order and deals batches of them to worker processes, which
tokenise and cut them into sequences; the results are written in the order of the batches. So the
bytes depend on the input and the arguments alone, neither on the number of workers nor on
interruptions. After every shard progress.json says how far the text has come; the same command
reads (and hashes, in case the text has changed) up to there and goes on.

Nothing heavy is imported before the arguments have been checked.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdistil.data import tokenizer
from fastdistil.data.sequences import SHORTEST, encode_in_order, split_document
from fastdistil.data.sources import PARQUET, Options, Source, resolve

if TYPE_CHECKING:
    import numpy as np

    from fastdistil.data.sequences import Encoded
    from fastdistil.data.shards import Shard, ShardWriter

LOG = logging.getLogger("fastdistil.prepare")
PROGRESS_FILE = "progress.json"
BATCH_BYTES = 2**20
"""Text in a batch: large against the cost of sending it, small in memory and at the end."""
SAMPLE_BYTES = 10**8
"""Text that train:SIZE sees, evenly spaced over the sources: it is kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Turn text into token shards for `fastdistil.pretrain`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Files or folders (text, JSONL, Parquet), hf:NAME[:CONFIG], or docs: (what is installed)."""
    tokenizer: str
    """A Hugging Face folder, a tokenizer.json, a vocab.txt, a name on the hub, or train:SIZE."""
    out: Path
    """Folder for the shards."""
    max_length: int = 512
    """Longest sequence in tokens, [CLS] and [SEP] included; longer documents are split."""
    text_field: str = "text"
    """Field or column that holds the text, of JSONL, Parquet and data sets."""
    split: str = "train"
    """Split of a data set (hf:)."""
    streaming: bool = False
    """Read a data set (hf:) from the network as it is needed, without a local copy."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are not UTF-8 do: stop with an error, or become U+FFFD."""
    cased: bool = False
    """Keep case and accents; for a vocab.txt and for train:SIZE."""
    shard_tokens: int = 2**27
    """A shard is closed once it has this many tokens; an interruption loses one shard at most."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenise; all cores unless given."""
    overwrite: bool = False
    """Replace a preparation with other arguments in the folder."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no source: give files, folders, hf:NAME or docs:")
        for name, smallest in (("max_length", SHORTEST), ("shard_tokens", 1), ("workers", 1)):
            if getattr(self, name) < smallest:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)}: wanted {smallest} or more")

    @property
    def options(self) -> Options:
        return Options(text_field=self.text_field, split=self.split, streaming=self.streaming, errors=self.errors)


@dataclass(kw_only=True, slots=True)
class Batch:
    """Consecutive documents, and how far on the disk the sources were read for them."""

    documents: list[bytes]
    num_bytes_read: int


def read_batches(read: list[Source], options: Options) -> Iterator[Batch]:
    """All documents in batches of BATCH_BYTES of text, or of one document where that is longer."""
    documents: list[bytes] = []
    num_bytes = before = 0
    for source in read:
        for text in source.documents(options):
            # JSON can spell lone surrogates, which UTF-8 cannot: they become question marks.
            documents.append(text.encode(errors="replace"))
            num_bytes += len(documents[-1])
            if num_bytes >= BATCH_BYTES:
                yield Batch(documents=documents, num_bytes_read=before + source.num_bytes_read)
                documents, num_bytes = [], 0
        before += source.num_bytes
    if documents:
        yield Batch(documents=documents, num_bytes_read=before)


@dataclass(kw_only=True, slots=True)
class Text:
    """The text behind one shard, as progress.json keeps it."""

    num_batches: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    dropped_short: int = 0
    dropped_unknown: int = 0
    text_sha256: str = ""

    def add(self, batch: Batch, digest: Any) -> None:
        """Count the batch and feed its text to `digest`, a running SHA-256."""
        self.num_batches += 1
        self.num_documents += len(batch.documents)
        for document in batch.documents:
            self.text_bytes += len(document)
            digest.update(document)
            digest.update(b"\0")
        self.text_sha256 = digest.hexdigest()


def prepare(config: Config) -> None:
    """Do what the command line says. Raises ValueError or OSError with a message for the user."""
    read = resolve(config.sources)
    spec = tokenizer.parse_spec(config.tokenizer, cased=config.cased)
    preparation = {
        "sources": [source.record(config.options) for source in read],
        "tokenizer": tokenizer.spec_record(spec),
        "text_field": config.text_field,
        "errors": config.errors,
        "cased": config.cased,
        "max_length": config.max_length,
        "shard_tokens": config.shard_tokens,
    }
    with _locked(config.out):
        progress = _open_folder(config, preparation)
        if progress is None:
            LOG.info("%s is prepared already with these arguments", config.out)
            return
        _write_shards(config, read, spec, progress)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {folder}: another process is preparing into it") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _open_folder(config: Config, preparation: dict[str, Any]) -> dict[str, Any] | None:
    """The progress to go on from in the folder, None where it holds the finished result.

    Raises ValueError where it holds something else.
    """
    out = config.out
    present = [out / name for name in ("meta.json", PROGRESS_FILE) if (out / name).is_file()]
    for path in () if config.overwrite else present:
        try:
            found = json.loads(path.read_bytes())
            there = found["preparation"]
            differ = [key for key in preparation if there.get(key) != preparation[key]]
            num_shards = len(found["shards"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): begin anew with --overwrite") from None
        if not differ:
            return None if path.name == "meta.json" else found
        if num_shards:
            raise ValueError(
                f"--out {out} holds a preparation with other arguments ({', '.join(differ)} "
                f"differ, see {path}): name another folder, or replace it with --overwrite"
            )
    if not present and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files: name a new or an empty folder")
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    for path in (*present, *out.glob("shard-*"), out / "counts.npy"):
        path.unlink(missing_ok=True)
    return {"preparation": preparation, "tokenizer_sha256": None, "shards": []}


def _make_tokenizer(config: Config, read: list[Source], spec: tokenizer.Spec) -> None:
    """Write the tokenizer folder of the preparation."""
    if isinstance(spec, int):
        LOG.info("training a WordPiece of %d tokens", spec)
        names = tokenizer.SPECIAL_TOKENS
        made = tokenizer.train(_sample(config, read), spec, cased=config.cased)
    else:
        path = tokenizer.fetch(spec) if isinstance(spec, str) else spec
        tokenizer.special_ids(path)  # a missing one is an error here rather than in a worker
        names = tokenizer.special_tokens(path)
        made = tokenizer.load(path, cased=config.cased)
    tokenizer.save(made, config.out / "tokenizer", names=names, max_length=config.max_length)


def _sample(config: Config, read: list[Source]) -> Iterator[str]:
    """Every k-th document such that about SAMPLE_BYTES come together, and never more."""
    # Compressed text becomes about three times as long; where the size is unknown, the beginning.
    total = 0
    for source in read:
        for _, path in source.files:
            packed = path.suffix.lower() in (".gz", *PARQUET)
            total += path.stat().st_size * (3 if packed else 1)
    documents = chain.from_iterable(batch.documents for batch in read_batches(read, config.options))
    room = SAMPLE_BYTES
    for document in islice(documents, 0, None, max(1, -(-total // SAMPLE_BYTES))):
        yield from split_document(document[:room].decode(errors="ignore"))
        room -= len(document)
        if room <= 0:
            return


def _write_shards(config: Config, read: list[Source], spec: tokenizer.Spec, progress: dict[str, Any]) -> None:
    """Everything after the arguments have been checked."""
    import numpy as np
    from tqdm import tqdm

    from fastdistil.data import shards as shard_format

    out = config.out
    shard_format.write_json(out / PROGRESS_FILE, progress)
    tokenizer_file = out / "tokenizer" / "tokenizer.json"
    if progress.get("tokenizer_sha256") is None:
        _make_tokenizer(config, read, spec)
        progress["tokenizer_sha256"] = shard_format.file_sha256(tokenizer_file)
        shard_format.write_json(out / PROGRESS_FILE, progress)
    elif shard_format.file_sha256(tokenizer_file) != progress["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer_file} was changed: begin anew with --overwrite")

    vocab_size = len(tokenizer.read_vocabulary(tokenizer_file))
    dtype = shard_format.token_dtype(vocab_size)
    counts = np.zeros(vocab_size, np.int64)
    finished, texts = _finished_before(progress, out / PROGRESS_FILE)
    batches = read_batches(read, config.options)
    size = sum(source.num_bytes for source in read)
    with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
        for shard, text in zip(finished, texts, strict=True):
            _skip(text, batches, bar)
            counts += shard_format.count_tokens(out, shard, dtype, vocab_size)
            LOG.info("%s was finished before: %d tokens", shard.name, shard.num_tokens)
        encoded = encode_in_order(
            batches,
            lambda batch: batch.documents,
            workers=config.workers,
            tokenizer_folder=out / "tokenizer",
            max_length=config.max_length,
        )
        while True:
            name = shard_format.shard_name(len(finished))
            with shard_format.ShardWriter(out, name, dtype) as writer:
                texts.append(_fill(writer, encoded, counts, config.shard_tokens, bar))
                if not writer.num_sequences:  # the sources have come to their end
                    break
                finished.append(writer.finish())
            entry = {"shard": asdict(finished[-1]), "text": asdict(texts[-1])}
            progress["shards"].append(entry)
            shard_format.write_json(out / PROGRESS_FILE, progress)
            LOG.info("%s: %d tokens", name, writer.num_tokens)

    totals = {
        name: sum(getattr(text, name) for text in texts)
        for name in ("num_documents", "text_bytes", "dropped_short", "dropped_unknown")
    }
    if not finished:
        raise ValueError(
            f"no sequence of {SHORTEST} or more tokens in {totals['num_documents']} documents: "
            f"{totals['dropped_short']} sequences are shorter, {totals['dropped_unknown']} are half "
            "or more unknown to the tokenizer"
        )
    meta = shard_format.Meta(
        format_version=shard_format.FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        special_ids=tokenizer.special_ids(out / "tokenizer"),
        tokenizer_sha256=tokenizer.vocabulary_sha256(out / "tokenizer"),
        max_length=config.max_length,
        num_sequences=sum(shard.num_sequences for shard in finished),
        num_tokens=sum(shard.num_tokens for shard in finished),
        counts_sha256=shard_format.write_counts(out, counts),
        preparation=progress["preparation"],
        shards=tuple(finished),
        **totals,
    )
    shard_format.write_json(out / shard_format.META_FILE, meta)
    for path in (out / PROGRESS_FILE, *out.glob("*.part")):
        path.unlink()
    LOG.info(
        "%s: %d tokens in %d sequences of %d documents; dropped %d short and %d unknown sequences",
        out,
        meta.num_tokens,
        meta.num_sequences,
        meta.num_documents,
        meta.dropped_short,
        meta.dropped_unknown,
    )


def _finished_before(progress: dict[str, Any], path: Path) -> "tuple[list[Shard], list[Text]]":
    """What an interrupted run has finished, by its progress.json at `path`; ValueError where that is damaged."""
    from fastdistil.data.shards import Shard, checked, shard_name

    finished, texts = [], []
    for index, entry in enumerate(progress["shards"]):
        where = f"{path}: shards[{index}]"
        parts = entry if isinstance(entry, dict) else {}
        finished.append(Shard(**checked(parts.get("shard"), Shard, where)))
        texts.append(Text(**checked(parts.get("text"), Text, where)))
        if finished[-1].name != shard_name(index):
            raise ValueError(f"{where} is called {finished[-1].name!r:.80}: begin anew with --overwrite")
    return finished, texts


def _skip(text: Text, batches: Iterator[Batch], bar: Any) -> None:
    """Read past the text of a finished shard; ValueError where it is not the same any more."""
    again, digest = Text(), hashlib.sha256()
    for batch in islice(batches, text.num_batches):
        again.add(batch, digest)
        bar.update(batch.num_bytes_read - bar.n)
    if again.text_sha256 != text.text_sha256:
        raise ValueError("the sources have changed since the interruption: use --overwrite")


def _fill(
    writer: "ShardWriter", encoded: "Iterator[tuple[Batch, Encoded]]", counts: "np.ndarray", shard_tokens: int, bar: Any
) -> Text:
    """Move sequences to the shard until it has `shard_tokens` tokens; adds to `counts` (V,)."""
    import numpy as np

    text, digest = Text(), hashlib.sha256()
    for batch, (tokens, lengths, num_short, num_unknown) in encoded:
        writer.add(tokens, lengths)
        counts += np.bincount(tokens, minlength=len(counts))
        text.add(batch, digest)
        text.dropped_short += num_short
        text.dropped_unknown += num_unknown
        bar.update(batch.num_bytes_read - bar.n)
        if writer.num_tokens >= shard_tokens:
            break
    return text


def main() -> None:
    """The command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = tyro.cli(Config, prog="python -m fastdistil.prepare")
    try:
        prepare(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            free = shutil.disk_usage(config.out).free
            print(f"{config.out} has {free:,} bytes free: make room, and the same command goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted; the same command goes on where it stopped")


if __name__ == "__main__":
    main()
