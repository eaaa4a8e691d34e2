"""Which sequences an update holds, packed into which micro-batches: a pure function of (seed, update).

The order of an epoch is a permutation keyed by (seed, epoch). A micro-batch is a run of consecutive sequences of that
order, ended where the next one would not fit the token budget; an update is the next `micro_batches_per_update` of
them, which are dealt to the ranks in turn. Masks are keyed by (seed, epoch, micro-batch of the epoch), dropout by
(seed, update, micro-batch). So neither the number of ranks or workers nor a restart changes what an update holds, and
resuming needs no saved generator.

Of several folders each is an endless stream: pass after pass over it, each a permutation keyed by (seed, folder, pass).
An epoch takes the next so many tokens of every stream, and a permutation keyed by (seed, epoch) says from which stream
each of its sequences comes. One folder is a stream of which an epoch takes one pass.

Random numbers are raw 64-bit words of Philox, whose stream NumPy guarantees across versions (its distributions are
not).
"""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


def seed_of(*coordinates: int | str) -> int:
    """A 63-bit seed for a place in the run, e.g. seed_of(56, "dropout", update, micro_batch).

    Other places are independent.
    """
    digest = hashlib.blake2b(repr(coordinates).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_words(n: int, *coordinates: int | str) -> NDArray[np.uint64]:
    """(n,) raw 64-bit words for a place in the run."""
    return np.random.Philox(key=seed_of(*coordinates)).random_raw(n)


def permutation(n: int, *coordinates: int | str) -> NDArray[np.int64]:
    """(n,) the numbers below n in random order for a place in the run."""
    words = random_words(n, *coordinates)
    # PyTorch's radix sort takes a quarter of the time of NumPy's; the flipped bit orders int64 as it does uint64.
    signed = torch.from_numpy((words ^ np.uint64(1 << 63)).view(np.int64))
    return signed.argsort(stable=True).numpy()


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """One micro-batch before it is made: its sequences, and where its random numbers come from."""

    sequences: NDArray[np.int64]
    """Indices into the shards."""
    mask_key: tuple[int | str, ...]
    """Coordinates that its masks are drawn from."""
    dropout_seed: int = 0
    """Seed of its dropout; validation has none."""
    denominators: tuple[int, int, int] = (1, 1, 1)
    """Real tokens, masked tokens and sequences of the whole update, which its losses are divided by."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """What one update holds, the same on every rank.

    The denominators of the loss are known before anything is computed.
    """

    micro_batches: tuple[MicroBatchPlan, ...]
    num_tokens: int
    """Real tokens of the update."""
    num_masked: int
    """Masked tokens of the update."""
    num_sequences: int
    """Sequences of the update."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Real tokens, masked tokens, sequences."""
        return self.num_tokens, self.num_masked, self.num_sequences

    def of_rank(self, rank: int, world_size: int) -> list[MicroBatchPlan]:
        """The micro-batches of one rank, dealt in turn.

        Where the ranks do not divide them the last round has empty ones.
        """
        empty = MicroBatchPlan(np.empty(0, np.int64), ("empty",), denominators=self.counts)
        mine = list(self.micro_batches[rank::world_size])
        return mine + [empty] * (math.ceil(len(self.micro_batches) / world_size) - len(mine))


def num_masked(num_tokens: int, fraction: float) -> int:
    """How many tokens of a micro-batch with `num_tokens` real ones are predicted (the authors' ceil)."""
    return math.ceil(fraction * num_tokens)


def pack(lengths: NDArray[np.int32], token_budget: int) -> NDArray[np.int64]:
    """Boundaries of runs of consecutive sequences that fit the budget: starts with 0, ends with len(lengths).

    About half a mean sequence of a micro-batch stays empty.
    """
    assert lengths.max(initial=0) <= token_budget, "preflight refuses longer sequences"
    ends = np.cumsum(lengths, dtype=np.int64)
    # For every place where a run could start, so that almost all the work is one call that holds no lock of Python's.
    next_start = np.searchsorted(ends, ends - lengths + token_budget, side="right")
    boundaries = [0]
    while boundaries[-1] < len(lengths):
        boundaries.append(int(next_start[boundaries[-1]]))
    return np.asarray(boundaries)


class Pool(NamedTuple):
    """The training sequences of one folder, and how much of them an epoch takes."""

    first: int
    """The first of them, which are numbered without a gap."""
    num_sequences: int
    num_tokens: int
    epoch_tokens: int
    """Tokens of an epoch that come from here, to within a sequence."""

    @property
    def passes(self) -> float:
        """How often an epoch reads each sequence, on average."""
        return self.epoch_tokens / self.num_tokens


def pools_of(
    lengths: Sequence[NDArray[np.int32]], firsts: Sequence[int], weights: Sequence[float] | None = None
) -> tuple[Pool, ...]:
    """A pool for each folder. An epoch has as many tokens as all of them together.

    Args:
        lengths: of the training sequences of each folder, whose first one has the number in `firsts`.
        weights: shares of the tokens, of any sum. None: in proportion to the tokens that are there, so that an epoch
            reads every sequence once.
    """
    sizes = [int(of_folder.sum(dtype=np.int64)) for of_folder in lengths]
    shares = sizes if weights is None else [max(1, round(sum(sizes) * w / sum(weights))) for w in weights]
    return tuple(map(Pool, firsts, map(len, lengths), sizes, shares))


Epoch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The order of the sequences in an epoch, and the boundaries of its micro-batches in that order."""


class Plan:
    """The plan of every update of a run, made from the lengths alone.

    Args:
        lengths: (S,) tokens of each sequence.
        token_budget: tokens of a micro-batch.
        micro_batches_per_update: over all ranks.
        mask_fraction: share of real tokens that is predicted.
        pools: what is trained on. None: all sequences, each once an epoch.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        *,
        seed: int,
        token_budget: int,
        micro_batches_per_update: int,
        mask_fraction: float,
        pools: Sequence[Pool] | None = None,
    ) -> None:
        self.lengths, self.seed, self.token_budget = lengths, seed, token_budget
        self.micro_batches_per_update, self.mask_fraction = micro_batches_per_update, mask_fraction
        self.pools = pools or pools_of([lengths], [0])
        self._ends: list[int] = []  # micro-batches in epochs 0..e, for every e seen so far
        self._thread = ThreadPoolExecutor(1)
        self._epochs: dict[int, Future[Epoch]] = {}

    def drawn_lengths(self) -> NDArray[np.int32]:
        """About the lengths of the sequences of an epoch, (sequences of an epoch,), in the order of the folders."""
        drawn = []
        for first, num_sequences, num_tokens, epoch_tokens in self.pools:
            lengths = self.lengths[first : first + num_sequences]
            count = max(1, num_sequences * epoch_tokens // num_tokens)
            drawn.append(lengths if count == num_sequences else lengths[np.arange(count) * num_sequences // count])
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)

    def update(self, update: int) -> UpdatePlan:
        """The plan of update `update` (from 0)."""
        micro_batches = []
        for i in range(self.micro_batches_per_update):
            epoch, number = self._place_of(update * self.micro_batches_per_update + i)
            order, boundaries = self._begin(epoch).result()
            if number == len(boundaries) // 2:
                self._begin(epoch + 1)  # takes seconds for ten million sequences: not only when it is due
            micro_batch = MicroBatchPlan(
                order[boundaries[number] : boundaries[number + 1]],
                (self.seed, "mask", epoch, number),
                seed_of(self.seed, "dropout", update, i),
            )
            micro_batches.append(micro_batch)
        return _with_counts(micro_batches, self.lengths, self.mask_fraction)

    def epoch_of(self, update: int) -> float:
        """How many passes over the data have begun or passed when update `update` starts."""
        epoch, number = self._place_of(update * self.micro_batches_per_update)
        before = self._ends[epoch - 1] if epoch else 0
        return epoch + number / (self._ends[epoch] - before)

    def updates_of(self, epochs: float) -> int:
        """Updates in so many passes over the data; the last pass may be a part. At least 1."""
        whole, part = int(epochs), epochs - int(epochs)
        total = float(self.micro_batches_through(whole - 1)) if whole else 0.0
        if part:
            total += part * (self.micro_batches_through(whole) - total)
        return max(1, int(total) // self.micro_batches_per_update)

    def micro_batches_through(self, epoch: int) -> int:
        """How many micro-batches epochs 0..epoch hold together."""
        while len(self._ends) <= epoch:
            _, boundaries = self._begin(len(self._ends)).result()
            self._ends.append((self._ends[-1] if self._ends else 0) + len(boundaries) - 1)
        return self._ends[epoch]

    def _place_of(self, micro_batch: int) -> tuple[int, int]:
        """(epoch, number in it) of a micro-batch of the whole run."""
        epoch = 0
        while micro_batch >= self.micro_batches_through(epoch):
            epoch += 1
        return epoch, micro_batch - (self._ends[epoch - 1] if epoch else 0)

    def _begin(self, epoch: int) -> Future[Epoch]:
        """An epoch in the making; the last two that were asked for are kept (8 bytes a sequence each)."""
        if epoch not in self._epochs:
            self._epochs = {e: v for e, v in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._thread.submit(self._make, epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> Epoch:
        streams = [self._stream(folder, epoch) for folder in range(len(self.pools))]
        order = streams[0]
        if len(streams) > 1:
            # Which stream each place is of; a stream keeps its own order, so that no pass begins before another ends.
            of_place = np.repeat(np.arange(len(streams), dtype=np.int16), [len(s) for s in streams])
            of_place = of_place[permutation(len(of_place), self.seed, "mix", epoch)]
            order = np.empty(len(of_place), np.int64)
            for folder, stream in enumerate(streams):
                order[of_place == folder] = stream
        return order, pack(self.lengths[order], self.token_budget)

    def _stream(self, folder: int, epoch: int) -> NDArray[np.int64]:
        """What an epoch takes of a folder, in order: the sequences that begin within its tokens of the stream."""
        pool = self.pools[folder]
        begin, end = epoch * pool.epoch_tokens, (epoch + 1) * pool.epoch_tokens
        pieces = []
        for number in range(begin // pool.num_tokens, -(-end // pool.num_tokens)):
            first = number * pool.num_tokens  # token of the stream that this pass begins with
            # The first folder's orders are those of a run on it alone.
            order = permutation(pool.num_sequences, self.seed, "order", number, *([folder] if folder else []))
            if pool.first:
                order += pool.first
            if first < begin or end < first + pool.num_tokens:  # a part of the pass
                lengths = self.lengths[order]
                starts = np.cumsum(lengths, dtype=np.int64) - lengths
                order = order[slice(*np.searchsorted(starts, (begin - first, end - first)))]
            pieces.append(order)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def validation_plan(
    sequences: NDArray[np.int64], lengths: NDArray[np.int32], *, token_budget: int, mask_fraction: float
) -> UpdatePlan:
    """All validation micro-batches: in order, and with the same masks in every run, so that runs compare."""
    boundaries = pack(lengths[sequences], token_budget)
    micro_batches = [MicroBatchPlan(sequences[a:b], ("validation", i)) for i, (a, b) in enumerate(pairwise(boundaries))]
    return _with_counts(micro_batches, lengths, mask_fraction)


def joined(plans: Sequence[UpdatePlan]) -> UpdatePlan:
    """The micro-batches of all plans, one plan after the other, as one."""
    counts = [sum(numbers) for numbers in zip(*(plan.counts for plan in plans), strict=True)]
    micro_batches = (m for plan in plans for m in plan.micro_batches)
    return UpdatePlan(tuple(replace(m, denominators=tuple(counts)) for m in micro_batches), *counts)


def _with_counts(micro_batches: list[MicroBatchPlan], lengths: NDArray[np.int32], mask_fraction: float) -> UpdatePlan:
    tokens = [int(lengths[m.sequences].sum()) for m in micro_batches]
    counts = (
        sum(tokens),
        sum(num_masked(t, mask_fraction) for t in tokens),
        sum(len(m.sequences) for m in micro_batches),
    )
    return UpdatePlan(tuple(replace(m, denominators=counts) for m in micro_batches), *counts)
