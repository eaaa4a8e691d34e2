"""Shards -> packed, masked micro-batches. Everything is a pure function of (seed, update).

The order of an epoch is a permutation keyed by (seed, epoch). A micro-batch is a run of consecutive sequences of that
order, cut where the next one would not fit the token budget; an update is the next `micro_batches_per_update` of them, which
are dealt to the ranks in turn. Masks are keyed by (seed, epoch, micro-batch of the epoch). So neither the number of ranks
or workers nor a restart changes what an update holds, and resuming needs no saved generator.

Random numbers are raw 64-bit words of Philox, whose stream NumPy guarantees across versions (its distributions are not).
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fastdistil.data.shards import Shards
from fastdistil.kernels.layout import TILE_ROWS, SequenceLayout, sequence_layout
from fastdistil.run.config import MaskingConfig

NO_LABEL = -100  # PyTorch's ignore_index
ON_DEVICE = ("input_ids", "position_ids", "labels", "masked_rows", "num_rows", "layout")


def seed_of(*coordinates: int | str) -> int:
    """A 63-bit seed for a place in the run, e.g. seed_of(56, "dropout", update, micro_batch); unrelated places are independent."""
    digest = hashlib.blake2b(repr(coordinates).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_words(n: int, *coordinates: int | str) -> NDArray[np.uint64]:
    """(n,) raw 64-bit words for a place in the run."""
    return np.random.Philox(key=seed_of(*coordinates)).random_raw(n)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N = token budget. Sequences one after the other, then padding, cut into pad sequences no longer than a real one.

    All tensors of all micro-batches of a run have the same shapes, but for about one in 10^9 (`Collator`).
    """

    input_ids: Tensor  # (N,) int64, masked
    position_ids: Tensor  # (N,) int64, 0 on padding
    labels: Tensor  # (N,) int64, the original id where it is predicted, else -100
    masked_rows: Tensor  # (num_masked(N),) int64, where labels are, then the first row that has none
    num_rows: Tensor  # () int32, real tokens R, for operators that skip the padding without a host sync
    lengths: tuple[int, ...]  # of all sequences, padding included; they sum to N
    layout: SequenceLayout  # of the same
    num_tokens: int  # R
    num_masked: int  # labels
    sequences: tuple[int, ...]  # indices into the shards

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`, copied asynchronously where memory is pinned."""
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in ON_DEVICE})

    def pin_memory(self) -> "MicroBatch":
        """Called by the DataLoader."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in ON_DEVICE})


def one_token(device: torch.device) -> MicroBatch:
    """The smallest micro-batch: one sequence of one predicted token."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    one = torch.tensor(1, dtype=torch.int32, device=device)
    layout = sequence_layout([1], device)
    return MicroBatch(zero, zero, zero, zero, one, (1,), layout, 1, 1, ())


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch of the plan: its sequences and the coordinates its masks are drawn from."""

    sequences: NDArray[np.int64]
    coordinates: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """What one update holds, the same on every rank. Both denominators of the loss are known before anything is computed."""

    slots: tuple[Slot, ...]
    num_tokens: int  # real tokens of the update
    num_masked: int  # masked tokens of the update


def num_masked(num_tokens: int, fraction: float) -> int:
    """How many tokens of a micro-batch with `num_tokens` real ones are predicted (the authors' ceil)."""
    return math.ceil(fraction * num_tokens)


def cut(lengths: NDArray[np.int32], token_budget: int) -> NDArray[np.int64]:
    """Boundaries of runs of consecutive sequences that fit the budget: starts with 0, ends with len(lengths).

    Waste is about half a mean sequence a micro-batch.
    """
    assert lengths.max(initial=0) <= token_budget, "preflight refuses longer sequences"
    ends = np.cumsum(lengths, dtype=np.int64)
    # for every place where a run could start, so that almost all the work is one call that holds no lock of Python's
    next_start = np.searchsorted(ends, ends - lengths + token_budget, side="right")
    boundaries = [0]
    while boundaries[-1] < len(lengths):
        boundaries.append(int(next_start[boundaries[-1]]))
    return np.asarray(boundaries)


class Plan:
    """The plan of every update of a run, made from the lengths alone.

    Args:
        lengths: (S,) tokens of each training sequence.
        token_budget: tokens of a micro-batch.
        micro_batches_per_update: over all ranks.
        mask_fraction: share of real tokens that is predicted.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        *,
        seed: int,
        token_budget: int,
        micro_batches_per_update: int,
        mask_fraction: float,
    ) -> None:
        self.lengths, self.seed, self.token_budget = lengths, seed, token_budget
        self.micro_batches_per_update, self.mask_fraction = micro_batches_per_update, mask_fraction
        self._ends: list[int] = []  # micro-batches in epochs 0..e, for every e seen so far
        self._thread = ThreadPoolExecutor(1)
        self._epochs: dict[int, Future[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}

    def _begin(self, epoch: int) -> Future[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(order, boundaries) of an epoch, in the making; the last two asked for are kept (8 bytes a sequence each)."""
        if epoch not in self._epochs:
            self._epochs = {e: v for e, v in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._thread.submit(self._make, epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        words = random_words(len(self.lengths), self.seed, "order", epoch)
        # PyTorch's radix sort takes a quarter of the time of NumPy's; the flipped bit orders int64 as it does uint64
        signed = torch.from_numpy((words ^ np.uint64(1 << 63)).view(np.int64))
        order = signed.argsort(stable=True).numpy()
        return order, cut(self.lengths[order], self.token_budget)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._begin(epoch).result()

    def micro_batches_through(self, epoch: int) -> int:
        """How many micro-batches epochs 0..epoch hold together."""
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._epoch(len(self._ends))[1]) - 1)
        return self._ends[epoch]

    def updates_of(self, epochs: float) -> int:
        """Updates in so many passes over the data; the last pass may be a part. At least 1."""
        whole, part = int(epochs), epochs - int(epochs)
        total = float(self.micro_batches_through(whole - 1)) if whole else 0.0
        if part:
            total += part * (self.micro_batches_through(whole) - total)
        return max(1, int(total) // self.micro_batches_per_update)

    def update(self, update: int) -> UpdatePlan:
        """The plan of update `update` (from 0)."""
        slots = []
        for index in range(update * self.micro_batches_per_update, (update + 1) * self.micro_batches_per_update):
            epoch = 0
            while index >= self.micro_batches_through(epoch):
                epoch += 1
            local = index - (self._ends[epoch - 1] if epoch else 0)
            order, boundaries = self._epoch(epoch)
            if local == len(boundaries) // 2:
                self._begin(epoch + 1)  # seconds for ten million sequences: not when it is due
            slots.append(Slot(order[boundaries[local] : boundaries[local + 1]], (self.seed, "mask", epoch, local)))
        return _with_counts(slots, self.lengths, self.mask_fraction)

    def epoch_of(self, update: int) -> float:
        """How many passes over the data have begun or passed when update `update` starts."""
        index, epoch = update * self.micro_batches_per_update, 0
        while index >= self.micro_batches_through(epoch):
            epoch += 1
        before = self._ends[epoch - 1] if epoch else 0
        return epoch + (index - before) / (self._ends[epoch] - before)


def _with_counts(slots: list[Slot], lengths: NDArray[np.int32], mask_fraction: float) -> UpdatePlan:
    tokens = [int(lengths[s.sequences].sum()) for s in slots]
    return UpdatePlan(tuple(slots), sum(tokens), sum(num_masked(t, mask_fraction) for t in tokens))


def validation_plan(
    sequences: NDArray[np.int64], lengths: NDArray[np.int32], *, token_budget: int, mask_fraction: float
) -> UpdatePlan:
    """All validation micro-batches: in order, and with the same masks in every run, so that runs compare."""
    boundaries = cut(lengths[sequences], token_budget)
    slots = [Slot(sequences[a:b], ("validation", i)) for i, (a, b) in enumerate(pairwise(boundaries))]
    return _with_counts(slots, lengths, mask_fraction)


def masking_weights(counts: NDArray[np.int64], special_ids: list[int], smoothing: float) -> NDArray[np.float64]:
    """(V,) unnormalised probability that a token is drawn: max(count, 1)^-smoothing, 0 for special tokens."""
    weights = np.maximum(counts, 1).astype(np.float64) ** -smoothing
    weights[special_ids] = 0.0
    return weights


def mask(
    ids: NDArray[np.int64], slot: Slot, *, weights: NDArray[np.float64], mask_id: int, masking: MaskingConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(masked ids, sorted indices of the predicted tokens) of one micro-batch's real tokens.

    Drawn without replacement with probability proportional to the weights, as an exponential race: the m smallest of
    -log(u) / w are exactly that draw (Efraimidis and Spirakis 2006). 80/10/10 is decided token by token; a random id is any of the
    vocabulary, as in the authors' code.
    """
    m = num_masked(len(ids), masking.fraction)
    race, decision, replacement = random_words(3 * len(ids), *slot.coordinates).reshape(3, -1)
    uniform = ((race >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    with np.errstate(divide="ignore"):
        arrival = -np.log(uniform) / weights[ids]  # special tokens never arrive
    chosen = np.sort(np.argpartition(arrival, m - 1)[:m]) if m else np.empty(0, np.int64)
    if not np.isfinite(arrival[chosen]).all():
        raise ValueError(
            f"masking wants {m} of {len(ids)} tokens and finds fewer that are not special, in the sequences "
            f"{slot.sequences[:8].tolist()}...: prepare the shards again, or lower --masking.fraction"
        )
    masked = ids.copy()
    share = (decision[chosen] >> np.uint64(11)) * 2.0**-53
    is_mask = share < 1 - masking.keep - masking.random
    is_random = ~is_mask & (share < 1 - masking.keep)
    masked[chosen[is_mask]] = mask_id
    masked[chosen[is_random]] = (replacement[chosen[is_random]] % np.uint64(len(weights))).astype(np.int64)
    return masked, chosen


def usual_most(amounts: NDArray[np.integer], lengths: NDArray[np.integer], token_budget: int) -> int:
    """What no micro-batch of sequences drawn at random exceeds, but for about one in 10^9, if each has such an amount.

    Mean and six standard deviations of a renewal-reward process (Cox 1962, ch. 8), and the padding's own.
    """
    per_token = amounts.mean() / lengths.mean()
    deviation = math.sqrt(token_budget / lengths.mean()) * (amounts - per_token * lengths).std()
    return math.ceil(per_token * token_budget + 6 * deviation + amounts.max())


class Collator:
    """Slot -> MicroBatch. Runs in worker processes; holds no state but the memory-mapped shards.

    Layouts are filled up to what a micro-batch of these shards may usually have of sequences and tiles, so that a step
    compiled or captured once serves all. A micro-batch with more, of text that is not in a random order, has twice that.
    """

    def __init__(self, shards: Shards, counts: NDArray[np.int64], *, token_budget: int, masking: MaskingConfig) -> None:
        meta = shards.meta
        self.shards, self.token_budget, self.masking = shards, token_budget, masking
        self.pad_id, self.mask_id = meta.special_ids["pad"], meta.special_ids["mask"]
        self.max_length = meta.max_length
        self.weights = masking_weights(counts, list(meta.special_ids.values()), masking.smoothing)
        lengths = shards.lengths
        self.sequence_step = usual_most(np.ones_like(lengths), lengths, token_budget)
        self.tile_step = usual_most(-(-lengths // TILE_ROWS), lengths, token_budget)

    def __call__(self, slot: Slot) -> MicroBatch:
        real = [self.shards.sequence(int(i)) for i in slot.sequences]
        ids = np.concatenate(real).astype(np.int64) if real else np.empty(0, np.int64)
        masked, chosen = mask(ids, slot, weights=self.weights, mask_id=self.mask_id, masking=self.masking)
        num_pad = self.token_budget - len(ids)
        # padding is attended to by itself alone; whole empty micro-batches would cost a square of the budget in one piece
        pads = [self.max_length] * (num_pad // self.max_length) + [num_pad % self.max_length] * bool(
            num_pad % self.max_length
        )
        lengths = [len(s) for s in real]
        starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.empty(0, np.int64)
        labels = np.full(self.token_budget, NO_LABEL, np.int64)
        labels[chosen] = ids[chosen]
        masked_rows = np.full(num_masked(self.token_budget, self.masking.fraction), (labels == NO_LABEL).argmax())
        masked_rows[: len(chosen)] = chosen
        position_ids = np.zeros(self.token_budget, np.int64)
        position_ids[: len(ids)] = np.arange(len(ids)) - np.repeat(starts, lengths)
        return MicroBatch(
            input_ids=torch.from_numpy(np.concatenate([masked, np.full(num_pad, self.pad_id, np.int64)])),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            masked_rows=torch.from_numpy(masked_rows),
            num_rows=torch.tensor(len(ids), dtype=torch.int32),
            lengths=(*lengths, *pads),
            layout=sequence_layout([*lengths, *pads], sequence_step=self.sequence_step, tile_step=self.tile_step),
            num_tokens=len(ids),
            num_masked=len(chosen),
            sequences=tuple(slot.sequences.tolist()),
        )


def rank_slots(plan: UpdatePlan, *, rank: int, world_size: int) -> list[Slot]:
    """The micro-batches of one rank: dealt in turn. Where the ranks do not divide them the last round has empty ones."""
    rounds = math.ceil(len(plan.slots) / world_size)
    empty = Slot(np.empty(0, np.int64), ("empty",))
    return [plan.slots[i] if (i := k * world_size + rank) < len(plan.slots) else empty for k in range(rounds)]


class _Slots:
    """What the DataLoader samples: the slots of this rank in order, planned as they are asked for."""

    def __init__(self, plans: Iterator[UpdatePlan], rank: int, world_size: int) -> None:
        self.plans, self.rank, self.world_size = plans, rank, world_size

    def __iter__(self) -> Iterator[Slot]:
        for plan in self.plans:
            yield from rank_slots(plan, rank=self.rank, world_size=self.world_size)


class _Collated:
    """A map-style dataset whose keys are slots: workers need no plan, only the shards."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, slot: Slot) -> MicroBatch:
        return self.collator(slot)


def micro_batches(
    plans: Iterator[UpdatePlan], collator: Collator, *, rank: int, world_size: int, num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the given updates, in order, made ahead in `num_workers` processes."""
    loader = DataLoader(
        _Collated(collator),  # type: ignore[arg-type]  # a dataset by its __getitem__
        sampler=_Slots(plans, rank, world_size),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
    )
    return iter(loader)


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Through the pipe instead of shared memory, of which each tensor takes a handshake with the worker that made it: the
    # training process spends a quarter of the processor time, and no /dev/shm is too small.
    ForkingPickler.register(Tensor, _by_value)


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)
