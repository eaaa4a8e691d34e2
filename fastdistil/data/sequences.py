"""Documents -> sequences of token ids, [CLS] text [SEP], in worker processes.

Long documents are cut and short sequences left out by the rules of DistilBERT's authors. For a model that reads
sentences, documents may be cut into these instead, all of them or every other one.
"""

import os
import re
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastdistil.data import tokenizer
from fastdistil.data.sources import DocumentBatch
from fastdistil.run.command import blocked

if TYPE_CHECKING:
    import numpy as np

Cut = Literal["length", "sentences", "mixed"]
"""Where documents are cut besides at the longest sequence; mixed: every other one at sentences."""
SHORTEST = 12
"""Sequences with fewer tokens, [CLS] and [SEP] included, are dropped."""
SHORTEST_SENTENCE = 5
"""The same where documents are cut at sentences, and of whole ones beside them."""
SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+(?=[\"'(\[]?[^\W_a-z])|(?<=[。！？])")
"""Ends of lines, and white space after a full stop, exclamation or question mark that no small letter follows. It
errs at initials and abbreviations, which costs a student little: the parts are text as well."""
PIECE_CHARS = 2**14
PIECES_AT_ONCE = 64
"""`tokenizers` needs 50 to 100 bytes a character while it encodes, so it gets 1 M characters at a time at most."""


class Sequences(NamedTuple):
    """The sequences of some documents, and how many were left out."""

    tokens: "np.ndarray"
    """Ids of all sequences, one after the other: (sum of lengths,)."""
    lengths: "np.ndarray"
    """Tokens of each sequence, (sequences,) int32."""
    dropped_short: int
    dropped_unknown: int
    dropped_tokens: int
    """Tokens of the text of those."""


def build_sequences(
    ids: "np.ndarray",
    document_lengths: "np.ndarray",
    *,
    special_ids: dict[str, int],
    max_length: int,
    shortest: int = SHORTEST,
) -> Sequences:
    """The sequences of documents whose tokens are known; their dtype is that of `ids`.

    A document becomes [CLS] chunk [SEP] for every max_length - 2 of its tokens. Then sequences shorter than `shortest`
    are dropped, and of the others those that are half or more [UNK].

    Args:
        ids: (sum of document_lengths,) integers, the documents one after the other, without special tokens.
        document_lengths: (documents,) tokens of each.
    """
    import numpy as np

    # Where each chunk begins and ends in `ids`; an empty document is one empty chunk.
    chunk_size = max_length - 2
    num_chunks = np.maximum(1, -(-document_lengths // chunk_size))
    document_ends = np.cumsum(document_lengths)
    first_chunks = np.cumsum(num_chunks) - num_chunks
    chunk_in_document = np.arange(num_chunks.sum()) - np.repeat(first_chunks, num_chunks)
    starts = np.repeat(document_ends - document_lengths, num_chunks)
    starts += chunk_in_document * chunk_size
    ends = np.minimum(starts + chunk_size, np.repeat(document_ends, num_chunks))
    # Which of them are kept.
    lengths = ends - starts + 2
    num_unknown = np.concatenate([[0], np.cumsum(ids == special_ids["unk"])])
    short = lengths < shortest
    unknown = ~short & (2 * (num_unknown[ends] - num_unknown[starts]) >= lengths)
    kept = ~(short | unknown)

    # [CLS] and [SEP] take their places, the tokens of the kept chunks fill what is left.
    kept_lengths = lengths[kept]
    last = np.cumsum(kept_lengths) - 1
    tokens = np.empty(kept_lengths.sum(), ids.dtype)
    is_text = np.ones(len(tokens), bool)
    for positions, name in ((last - kept_lengths + 1, "cls"), (last, "sep")):
        tokens[positions] = special_ids[name]
        is_text[positions] = False
    tokens[is_text] = ids[np.repeat(kept, lengths - 2)]
    dropped_tokens = len(ids) - int(is_text.sum())
    return Sequences(tokens, kept_lengths.astype(np.int32), int(short.sum()), int(unknown.sum()), dropped_tokens)


def split_document(text: str) -> Iterator[str]:
    """Pieces of at most PIECE_CHARS characters, cut before white space where there is any.

    No token of BERT's reaches across white space, so the pieces have the tokens of the whole; where a tokenizer has
    tokens for runs of blanks, as ModernBERT's, but for a run that is cut.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = cut if cut > 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


class SequenceBuilder:
    """Documents -> sequences with the tokenizer of a folder, on one thread: what a worker process runs."""

    def __init__(self, folder: Path, max_length: int, cut: Cut = "length") -> None:
        self._tokenizer = tokenizer.load(folder)
        # "[MASK]" written in a text is text: a document must not be able to inject special ids.
        self._tokenizer.encode_special_tokens = True
        self._special_ids = tokenizer.special_ids(folder)
        self._max_length, self._cut = max_length, cut

    def build(self, documents: list[bytes]) -> Sequences:
        """The sequences of documents in UTF-8; their dtype is uint32."""
        import numpy as np

        pieces: list[str] = []
        num_pieces = []
        for number, document in enumerate(documents):
            text = document.decode()
            sentences = self._cut == "sentences" or (self._cut == "mixed" and number % 2 == 0)
            for part in filter(None, SENTENCE_END.split(text)) if sentences else (text,):
                before = len(pieces)
                pieces.extend(split_document(part))
                num_pieces.append(len(pieces) - before)
        # `Encoding.ids` makes a list of ints, which costs 3 to 6 % of encoding. To extend an array by it at once is the
        # cheapest way on: np.array or np.fromiter cost up to three times that.
        ids = array("I")
        piece_ends = [0]
        for start in range(0, len(pieces), PIECES_AT_ONCE):
            for encoding in self._tokenizer.encode_batch_fast(
                pieces[start : start + PIECES_AT_ONCE], add_special_tokens=False
            ):
                ids.extend(encoding.ids)
                piece_ends.append(len(ids))
        document_ends = np.array(piece_ends)[np.cumsum(num_pieces, dtype=np.int64)]
        return build_sequences(
            np.array(ids, np.uint32),
            np.diff(document_ends, prepend=0),
            special_ids=self._special_ids,
            max_length=self._max_length,
            shortest=SHORTEST if self._cut == "length" else SHORTEST_SENTENCE,
        )


_builder: SequenceBuilder | None = None  # of a worker process


def _start_worker(folder: Path, max_length: int, cut: Cut) -> None:
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _builder = SequenceBuilder(folder, max_length, cut)


def _exit_with_parent() -> None:
    # A pool's workers hold both ends of its queues, so they would outlive a killed main process.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build(documents: list[bytes]) -> Sequences:
    assert _builder is not None
    return _builder.build(documents)


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers that start now do not run the script again that started them, which may lack its main guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def encode_in_order(
    batches: Iterator[DocumentBatch], *, workers: int, tokenizer_folder: Path, max_length: int, cut: Cut
) -> Iterator[tuple[DocumentBatch, Sequences]]:
    """Each batch with the sequences of its documents, in order, encoded by `workers` processes.

    Raises ValueError where a worker is killed.
    """
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # a fork would copy the locks of other libraries' threads
        initializer=_start_worker,
        initargs=(tokenizer_folder, max_length, cut),
    )
    waiting: deque[tuple[DocumentBatch, Future[Sequences]]] = deque()
    try:
        for batch in batches:
            # It may start a worker, which inherits this: until that ignores Ctrl-C, it must not hear of it.
            with blocked({signal.SIGINT}), _without_main():
                waiting.append((batch, pool.submit(_build, batch.documents)))
            # Twice the workers, so that none waits while this process reads or writes.
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory: the same command goes on where it stopped, "
            "and needs less with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
