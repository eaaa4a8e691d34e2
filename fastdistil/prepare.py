"""Command: text -> tokenised, counted shards (`fastdistil.data.shards` has the format).

    python -m fastdistil.prepare wiki/ books.txt.gz --tokenizer bert-base-uncased --out data/wiki
    python -m fastdistil.prepare notes.jsonl --tokenizer train:8192 --out data/notes

The main process reads the documents in order and deals batches of them to worker processes, which tokenise them and cut
them into sequences; the results are written in the order of the batches. So the bytes depend on the input and the
arguments alone, neither on the number of workers nor on interruptions. After every shard progress.json says how far the
text has come; the same command reads (and hashes, in case the text has changed) up to there and goes on.

Nothing heavy is imported before the arguments have been checked.
"""

import errno
import hashlib
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdistil.data import tokenizer
from fastdistil.data.sequences import SHORTEST, SHORTEST_SENTENCE, Cut, encode_in_order, split_document
from fastdistil.data.sources import DocumentBatch, Options, Source, read_batches, resolve
from fastdistil.model.sentence import read_max_length
from fastdistil.remote import hub
from fastdistil.run import console, files, options
from fastdistil.run.command import command, leave, num_cores

if TYPE_CHECKING:
    import numpy as np

    from fastdistil.data.sequences import Sequences
    from fastdistil.data.shards import Meta, Shard, ShardWriter

LOG = logging.getLogger("fastdistil.prepare")
META_FILE = "meta.json"
PROGRESS_FILE = "progress.json"
LOCK_FILE = ".lock"
STRICT = {"errors": "strict", "on_bad_record": "stop"}
"""Options, and the value with which what was prepared is what any other value prepares, too."""
MUCH_DROPPED = 0.05
"""Part of the tokens that is left out, or unknown, above which there is a warning."""
LONGEST = 512
"""Tokens of the longest sequence where nothing says otherwise: the positions of BERT."""
OTHER_TOKENIZER = "the tokenizer is perhaps one for another language, or for text with or without capitals"
SAMPLE_BYTES = 10**8
"""Text that train:SIZE sees, evenly spaced over the sources: it is kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Turn text into token shards for `fastdistil.pretrain`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Files or folders (text, JSONL, Parquet, Arrow; also compressed), or data sets: hf:NAME[:CONFIG]."""
    tokenizer: str
    """A Hugging Face folder, a tokenizer.json, a vocab.txt, a name on the hub, or train:SIZE."""
    out: Path
    """Folder for the shards."""
    max_length: int | None = None
    """Longest sequence in tokens, [CLS] and [SEP] included; longer documents are split. None: what the model in the
    tokenizer's folder reads of a text, if that is of sentence-transformers and says so; else 512."""
    cut: Cut | None = None
    """Where a document is cut: where --max-length is reached, as masked-LM training wants it; at every sentence and end
    of line, too; mixed: every other document at sentences, for recipe embed and models that read texts of any length.
    None: length, but mixed where also --max-length is left to a model of sentence-transformers."""
    text_field: str = "text"
    """Field or column that holds the text, of JSONL, tables and data sets; inside others by its path: content.text."""
    documents: Literal["auto", "line", "paragraph", "file"] = "auto"
    """What a document is in files of text: a line, the lines between blank ones, a file; auto: lines, or paragraphs
    where a file begins with short lines and blank ones between them."""
    split: str = "train"
    """Split of a data set (hf:, or a folder of save_to_disk)."""
    streaming: bool = False
    """Read a data set (hf:) from the network as it is needed, without a local copy."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are not UTF-8 do: stop with an error, or become U+FFFD."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What a line, object or row that cannot be read does: stop with an error, or be left out and counted."""
    cased: bool = False
    """Keep case and accents; for a vocab.txt and for train:SIZE."""
    shard_tokens: int = 2**27
    """A shard is closed once it has this many tokens; an interruption loses one shard at most."""
    workers: int = field(default_factory=num_cores)
    """Processes that tokenise; all cores unless given."""
    overwrite: bool = False
    """Replace a preparation with other arguments in the folder."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no source: give files, folders or hf:NAME")
        for name, smallest in (("max_length", SHORTEST), ("shard_tokens", 1), ("workers", 1)):
            if (value := getattr(self, name)) is not None and value < smallest:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value}: wanted {smallest} or more")

    @property
    def options(self) -> Options:
        return Options(**{name: getattr(self, name) for name in Options.__slots__})


@dataclass(kw_only=True, slots=True)
class ShardText:
    """The text behind one shard, as progress.json keeps it."""

    num_batches: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    dropped_short: int = 0
    dropped_unknown: int = 0
    dropped_tokens: int = 0
    bad_records: int = 0
    text_sha256: str = ""

    def add(self, batch: DocumentBatch, digest: Any) -> None:
        """Count the batch and feed its text to `digest`, a running SHA-256."""
        self.num_batches += 1
        self.num_documents += len(batch.documents)
        self.bad_records += batch.num_bad
        for document in batch.documents:
            self.text_bytes += len(document)
            digest.update(document)
            digest.update(b"\0")
        self.text_sha256 = digest.hexdigest()


def prepare(config: PrepareConfig) -> None:
    """Do what the command line says. Raises ValueError or OSError with a message for the user."""
    sources = resolve(config.sources, config.options)
    spec = tokenizer.parse_spec(config.tokenizer, cased=config.cased)
    preparation = {
        "sources": [source.record() for source in sources],
        "tokenizer": tokenizer.spec_record(spec),
        **{name: getattr(config, name) for name in ("text_field", "cased", "shard_tokens", *STRICT)},
        **_pieces(config, spec),
    }
    _refuse_foreign_folder(config.out)
    with files.Lock(config.out / LOCK_FILE, f"--out {config.out}"):
        progress = _open_folder(config, preparation)
        if progress is None:
            LOG.info(f"{config.out} is prepared already with these arguments")
            return
        _provide_tokenizer(config, sources, spec, progress)
        shards, texts, counts = _write_shards(config, sources, progress)
        _finish(config, sources, preparation, shards, texts, counts)


def _next(config: PrepareConfig) -> str:
    """The pretraining that these shards are probably meant for: by the model that the tokenizer is of, or without one.
    A name on the hub stands for its folder."""
    words, spec = ["mlm"], tokenizer.parse_spec(config.tokenizer, cased=config.cased)
    model = hub.folder_of("--tokenizer", spec, hub.TOKENIZER) if isinstance(spec, str) else spec
    if isinstance(model, Path) and (model / "config.json").is_file():
        words = [_recipe(model), "--teacher.path", str(spec)]
    out = Path("runs") / config.out.resolve().name
    return f"next: {console.command_line('pretrain', *words, '--data.shards', config.out, '--out', out)}"


def _recipe(model: Path) -> str:
    """For students of the model in this folder."""
    if read_max_length(model) is not None:
        return "embed"
    return "modernbert" if files.read_json(model / "config.json").get("model_type") == "modernbert" else "distilbert"


def _size(num_bytes: float) -> str:
    """1234567 -> 1.2 MB"""
    from rich.filesize import decimal

    return decimal(int(num_bytes))


def _pieces(config: PrepareConfig, spec: tokenizer.Spec) -> dict[str, Any]:
    """--max-length and --cut, or what stands for them. Raises ValueError where the model says nothing usable."""
    asked = config.max_length
    if asked is None and isinstance(spec, str):
        spec = hub.folder_of("--tokenizer", spec, hub.TOKENIZER)
    reads = read_max_length(spec) if asked is None and isinstance(spec, Path) and spec.is_dir() else None
    if reads is None:
        return {"max_length": asked or LONGEST, "cut": config.cut or "length"}
    if reads < SHORTEST:
        raise ValueError(f"{spec} reads {reads} tokens of a text: wanted {SHORTEST} or more: give --max-length")
    LOG.info(f"sequences of up to {reads} tokens, as many as the model in {spec} reads of a text (--max-length)")
    if config.cut is None:
        LOG.info("every other document is cut at sentences, as such a model reads short texts, too (--cut)")
    return {"max_length": reads, "cut": config.cut or "mixed"}


def _refuse_foreign_folder(out: Path) -> None:
    """ValueError where --out is a file, or holds files but no preparation; nothing in it is touched."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # A run that was killed in its first moments left its lock and perhaps a progress.json that was being written.
    if names - {LOCK_FILE, f"{PROGRESS_FILE}.part"} and not names & {META_FILE, PROGRESS_FILE}:
        raise ValueError(f"--out {out} holds other files: name a new or an empty folder")


def _open_folder(config: PrepareConfig, preparation: dict[str, Any]) -> dict[str, Any] | None:
    """The progress to go on from in the folder, None where it holds the finished result.

    Raises ValueError where it holds a preparation with other arguments.
    """
    out = config.out
    present = [out / name for name in (META_FILE, PROGRESS_FILE) if (out / name).is_file()]
    for path in () if config.overwrite else present:
        found = files.read_json(path, fix="begin anew with --overwrite")
        there, shards = found.get("preparation"), found.get("shards")
        if not isinstance(there, dict) or not isinstance(shards, list):
            raise ValueError(f"{path} is damaged: begin anew with --overwrite")
        there = {"cut": "length", **there}  # older preparations knew no other
        strict = {key for key in STRICT if there.get(key, STRICT[key]) == STRICT[key]}
        differ = [key for key in preparation if there.get(key) != preparation[key] and key not in strict]
        if not differ and path.name == META_FILE:
            (out / PROGRESS_FILE).unlink(missing_ok=True)  # where a run was killed in its last moment
            return None
        if not differ or (differ == ["sources"] and path.name == PROGRESS_FILE and shards):
            if differ:
                LOG.info(
                    "the sources are not those of before the interruption: their text up to there will be compared"
                )
            return {**found, "preparation": preparation}
        if shards:
            raise ValueError(
                f"--out {out} holds a preparation with other arguments ({', '.join(differ)} differ, see {path}): "
                "name another folder, or replace it with --overwrite"
            )
    # The new progress is there before the old result goes, so that a run which is killed in between can be taken up.
    progress = {"preparation": preparation, "tokenizer_sha256": None, "shards": []}
    files.write_json(out / PROGRESS_FILE, progress, durable=True)
    for path in (out / META_FILE, *out.glob("shard-*")):
        path.unlink(missing_ok=True)
    return progress


def _provide_tokenizer(
    config: PrepareConfig, sources: list[Source], spec: tokenizer.Spec, progress: dict[str, Any]
) -> None:
    """Write the tokenizer folder of the preparation, unless an interrupted run has.

    Raises ValueError where the one of an interrupted run was changed since.
    """
    folder = config.out / "tokenizer"
    if progress.get("tokenizer_sha256") is not None:
        if files.sha256(folder / "tokenizer.json") != progress["tokenizer_sha256"]:
            raise ValueError(f"{folder / 'tokenizer.json'} was changed: begin anew with --overwrite")
        return
    if isinstance(spec, int):
        LOG.info(f"training a WordPiece of {spec} tokens")
        names, said = tokenizer.SPECIAL_TOKENS, {}
        # It hears of no signal for up to a minute, so it works in a thread, and a signal ends the process meanwhile.
        sample = _sample(sources)
        made = ThreadPoolExecutor(1).submit(tokenizer.train, sample, spec, cased=config.cased).result()
    else:
        path = hub.folder_of("--tokenizer", spec, hub.TOKENIZER)
        tokenizer.special_ids(path)  # a missing one is an error here rather than in a worker
        names, said = tokenizer.special_tokens(path), tokenizer.settings(path)
        made = tokenizer.load(path, cased=config.cased)
    shutil.rmtree(folder, ignore_errors=True)  # that of a preparation which is being replaced
    tokenizer.save(made, folder, names=names, max_length=progress["preparation"]["max_length"], source=said)
    progress["tokenizer_sha256"] = files.sha256(folder / "tokenizer.json")
    files.write_json(config.out / PROGRESS_FILE, progress, durable=True)


def _sample(sources: list[Source]) -> Iterator[str]:
    """Every k-th document such that about SAMPLE_BYTES come together, and never more.

    Where the size of the text is unknown, it is the beginning.
    """
    every = max(1, -(-sum(source.num_text_bytes for source in sources) // SAMPLE_BYTES))
    documents = chain.from_iterable(batch.documents for batch in read_batches(sources))
    room = SAMPLE_BYTES
    for document in islice(documents, 0, None, every):
        yield from split_document(document[:room].decode(errors="ignore"))
        room -= len(document)
        if room <= 0:
            return


def _write_shards(
    config: PrepareConfig, sources: list[Source], progress: dict[str, Any]
) -> "tuple[list[Shard], list[ShardText], np.ndarray]":
    """The shards, the texts behind them, and how often each id occurs, int64 (vocab_size,).

    There is one text more than shards: what came after the last shard, of which no sequence was kept.
    """
    import numpy as np

    from fastdistil.data import shards as shard_format

    out = config.out
    vocab_size = len(tokenizer.read_vocabulary(out / "tokenizer"))
    dtype = shard_format.token_dtype(vocab_size)
    counts = np.zeros(vocab_size, np.int64)
    shards, texts = _finished_before(progress, out / PROGRESS_FILE)
    batches = read_batches(sources)
    num_bytes = sum(source.num_bytes for source in sources)
    with console.bar("text read", num_bytes or None, shown=_size) as bar:
        # What an interrupted run has finished is not encoded again: its text is read past, its tokens are counted.
        for shard, text in zip(shards, texts, strict=True):
            _skip(text, shard.name, batches, bar)
            counts += shard_format.count_tokens(out, shard, dtype, vocab_size)
            LOG.info(f"{shard.name} was finished before: {shard.num_tokens} tokens")
        # The workers encode what is left, and it is written shard by shard.
        encoded = encode_in_order(
            batches,
            workers=config.workers,
            tokenizer_folder=out / "tokenizer",
            max_length=progress["preparation"]["max_length"],
            cut=progress["preparation"]["cut"],
        )
        while True:
            with shard_format.ShardWriter(out, shard_format.shard_name(len(shards)), dtype) as writer:
                texts.append(_fill(writer, encoded, counts, config.shard_tokens, bar))
                if not writer.num_sequences:  # the sources have come to their end
                    return shards, texts, counts
                shard = writer.finish()
            shards.append(shard)
            progress["shards"].append({"shard": asdict(shard), "text": asdict(texts[-1])})
            files.write_json(out / PROGRESS_FILE, progress, durable=True)
            LOG.info(f"{shard.name}: {shard.num_tokens} tokens")


def _finished_before(progress: dict[str, Any], path: Path) -> "tuple[list[Shard], list[ShardText]]":
    """What an interrupted run has finished, by its progress.json at `path`; ValueError where that is damaged."""
    from fastdistil.data.shards import Shard, checked, shard_name

    shards, texts = [], []
    for index, entry in enumerate(progress["shards"]):
        where = f"{path}: shards[{index}]"
        parts = entry if isinstance(entry, dict) else {}
        shards.append(Shard(**checked(parts.get("shard"), Shard, where)))
        text = parts.get("text")
        text = {"dropped_tokens": 0, "bad_records": 0, **text} if isinstance(text, dict) else text  # not yet counted
        texts.append(ShardText(**checked(text, ShardText, where)))
        if shards[-1].name != shard_name(index):
            raise ValueError(f"{where} is called {shards[-1].name!r:.80}: begin anew with --overwrite")
    return shards, texts


def _skip(text: ShardText, shard: str, batches: Iterator[DocumentBatch], bar: console.Bar) -> None:
    """Read past the text of a finished shard; ValueError where it is not the same any more."""
    again, digest = ShardText(), hashlib.sha256()
    for batch in islice(batches, text.num_batches):
        again.add(batch, digest)
        bar.to(batch.num_bytes_read)
    if again.text_sha256 != text.text_sha256:
        raise ValueError(
            f"the sources have changed since the interruption, in the text of {shard}, which is finished: give the "
            "text of then (and --documents, if it was given), name another --out, or begin anew with --overwrite"
        )


def _fill(
    writer: "ShardWriter",
    encoded: "Iterator[tuple[DocumentBatch, Sequences]]",
    counts: "np.ndarray",
    shard_tokens: int,
    bar: console.Bar,
) -> ShardText:
    """Move sequences to the shard until it has `shard_tokens` tokens or there are no more; the text behind them.

    Their tokens are added to `counts`, int64 (vocab_size,).
    """
    import numpy as np

    text, digest = ShardText(), hashlib.sha256()
    for batch, sequences in encoded:
        writer.add(sequences.tokens, sequences.lengths)
        counts += np.bincount(sequences.tokens, minlength=len(counts))
        text.add(batch, digest)
        text.dropped_short += sequences.dropped_short
        text.dropped_unknown += sequences.dropped_unknown
        text.dropped_tokens += sequences.dropped_tokens
        bar.to(batch.num_bytes_read)
        if writer.num_tokens >= shard_tokens:
            break
    return text


def _finish(
    config: PrepareConfig,
    sources: list[Source],
    preparation: dict[str, Any],
    shards: "list[Shard]",
    texts: list[ShardText],
    counts: "np.ndarray",
) -> None:
    """Write what describes the shards, and leave nothing else; ValueError where there is no shard."""
    from fastdistil.data import shards as shard_format

    out = config.out
    totals = {
        name: sum(getattr(text, name) for text in texts)
        for name in ("num_documents", "text_bytes", "dropped_short", "dropped_unknown", "bad_records")
    }
    if not shards:
        shortest = SHORTEST if preparation["cut"] == "length" else SHORTEST_SENTENCE
        raise ValueError(
            f"no sequence of {shortest} or more tokens in {totals['num_documents']} documents: "
            f"{totals['dropped_short']} sequences are shorter, {totals['dropped_unknown']} are half or more unknown "
            f"to the tokenizer, {totals['bad_records']} records were skipped; {_cause_of_loss(totals, sources)}"
        )
    num_sequences = sum(shard.num_sequences for shard in shards)
    num_tokens = sum(shard.num_tokens for shard in shards)
    dropped_tokens = sum(text.dropped_tokens for text in texts)
    meta = shard_format.Meta(
        format_version=shard_format.FORMAT_VERSION,
        dtype=shard_format.token_dtype(len(counts)),
        vocab_size=len(counts),
        special_ids=tokenizer.special_ids(out / "tokenizer"),
        tokenizer_sha256=tokenizer.vocabulary_sha256(out / "tokenizer"),
        max_length=preparation["max_length"],
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        dropped_share=round(dropped_tokens / (dropped_tokens + num_tokens - 2 * num_sequences), 6),
        counts_sha256=shard_format.write_counts(out, counts),
        preparation=preparation,
        shards=tuple(shards),
        **totals,
    )
    # What interruptions left of shards, and the last shard, which stayed empty.
    names = {name for shard in shards for name in shard.hashes}
    for path in out.glob("shard-*"):
        if path.name not in names:
            path.unlink()
    shard_format.write_meta(out, meta)
    (out / PROGRESS_FILE).unlink()
    LOG.info(
        f"{out}: {meta.num_tokens} tokens in {meta.num_sequences} sequences of {meta.num_documents} documents; "
        f"dropped {meta.dropped_short} short and {meta.dropped_unknown} unknown sequences"
    )
    _warn_of_loss(meta, int(counts[meta.special_ids["unk"]]), sources)


def _warn_of_loss(meta: "Meta", num_unknown: int, sources: list[Source]) -> None:
    """Say what of the text is missing, or unknown, in what was prepared, where it is much, and what to do."""
    if meta.dropped_share > MUCH_DROPPED:
        cause = _cause_of_loss(asdict(meta), sources)
        LOG.warning(f"warning: {meta.dropped_share:.1%} of the text is in sequences that were left out: {cause}")
    if num_unknown > MUCH_DROPPED * meta.num_tokens:
        LOG.warning(f"warning: {num_unknown / meta.num_tokens:.1%} of the kept tokens are unknown: {OTHER_TOKENIZER}")
    if meta.bad_records:
        LOG.warning(
            f"warning: {meta.bad_records} records could not be read and were skipped; the first are named above"
        )


def _cause_of_loss(totals: dict[str, Any], sources: list[Source]) -> str:
    """Why most of the sequences that were left out were, and what to do."""
    if not totals["dropped_unknown"] + totals["dropped_short"]:
        return "the documents are blank, or there is none"
    if totals["dropped_unknown"] > totals["dropped_short"]:
        return f"most are half or more unknown: {OTHER_TOKENIZER}"
    if any(file.documents == "line" for source in sources for file in source.files):
        return "most are shorter: join lines to longer documents with --documents paragraph or file"
    return "most are shorter: the documents are, or what is left of longer ones at --max-length"


@command
def main(args: list[str] | None = None) -> int:
    """The command; `args` in place of those of the command line. Its exit status."""
    console.start(sys.stderr)
    config = options.parse(PrepareConfig, args, "prepare")
    try:
        prepare(config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        free = shutil.disk_usage(config.out).free
        advice = f"{config.out} has {free:,} bytes free: make room, and the same command goes on"
        raise OSError(f"{error}\n{advice}") from None
    LOG.info(_next(config))
    return 0


if __name__ == "__main__":
    leave(main())
