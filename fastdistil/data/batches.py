"""Planned micro-batches -> masked, packed tensors, made ahead in worker processes (plan.py says what they hold)."""

import atexit
import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fastdistil.data.plan import MicroBatchPlan, UpdatePlan, num_masked, random_words
from fastdistil.data.shards import Mix, Shards
from fastdistil.kernels.layout import TILE_ROWS, SequenceLayout, sequence_layout
from fastdistil.run.command import STOP_SIGNALS, blocked
from fastdistil.run.config import MaskingConfig

NO_LABEL = -100  # PyTorch's ignore_index
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Of the workers: a fork starts at once and shares the memory; beside the threads of macOS it may hang, and Windows has
none. From Python 3.14 on it is no default."""
ON_DEVICE = ("input_ids", "position_ids", "labels", "masked_rows", "num_rows", "denominators", "dropout_seed", "layout")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N = token budget. Sequences one after the other, then padding, cut into pad sequences no longer than a real one.

    All tensors of all micro-batches of a run have the same shapes, but for about one in 10^9 (`Collator`).
    """

    input_ids: Tensor
    """(N,) int64, masked."""
    position_ids: Tensor
    """(N,) int64, 0 on padding."""
    labels: Tensor
    """(N,) int64, the original id where it is predicted, else -100."""
    masked_rows: Tensor
    """(num_masked(N),) int64: where labels are, then the first row that has none."""
    num_rows: Tensor
    """() int32, the real tokens, for operators that skip the padding without a host sync."""
    denominators: Tensor
    """(3,) fp64, real tokens, masked tokens and sequences of the whole update, each 1 or more: on the device, where a
    captured step reads them."""
    dropout_seed: Tensor
    """() int64, for the fused operators."""
    generator_seed: int
    """The same for torch's default generator, from which attention backends of others take their dropout."""
    lengths: tuple[int, ...]
    """Of all sequences, padding included; they sum to N."""
    layout: SequenceLayout
    """Of the same sequences."""
    num_tokens: int
    """Real tokens."""
    num_masked: int
    """Labels."""
    sequences: tuple[int, ...]
    """Indices into the shards."""

    @property
    def real_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that is not padding."""
        return self.lengths[: len(self.sequences)]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`, copied asynchronously where memory is pinned."""
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in ON_DEVICE})

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors and those of its layout, in one order."""
        for name in ON_DEVICE:
            part = getattr(self, name)
            yield from (part.cu_seqlens, part.tiles) if isinstance(part, SequenceLayout) else (part,)

    def pin_memory(self) -> "MicroBatch":
        """Called by the DataLoader."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in ON_DEVICE})


def one_token(device: torch.device) -> MicroBatch:
    """The smallest micro-batch: one sequence of one predicted token."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    one = torch.tensor(1, dtype=torch.int32, device=device)
    layout, denominators = sequence_layout([1], device), torch.ones(3, dtype=torch.float64, device=device)
    return MicroBatch(zero, zero, zero, zero, one, denominators, zero[0], 0, (1,), layout, 1, 1, ())


def masking_weights(counts: NDArray[np.int64], special_ids: list[int], smoothing: float) -> NDArray[np.float64]:
    """(V,) unnormalised probability that a token is drawn: max(count, 1)^-smoothing, 0 for special tokens."""
    weights = np.maximum(counts, 1).astype(np.float64) ** -smoothing
    weights[special_ids] = 0.0
    return weights


def mask(
    ids: NDArray[np.int64], plan: MicroBatchPlan, *, weights: NDArray[np.float64], mask_id: int, masking: MaskingConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(masked ids, sorted indices of the predicted tokens) of one micro-batch's real tokens.

    Drawn without replacement with probability proportional to the weights, as an exponential race: the m smallest of
    -log(u) / w are exactly that draw (Efraimidis and Spirakis 2006). 80/10/10 is decided token by token; a random id is
    any of the vocabulary, as in the authors' code.
    """
    m = num_masked(len(ids), masking.fraction)
    race, decision, replacement = random_words(3 * len(ids), *plan.mask_key).reshape(3, -1)
    uniform = ((race >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    with np.errstate(divide="ignore"):
        arrival = -np.log(uniform) / weights[ids]  # special tokens never arrive
    chosen = np.sort(np.argpartition(arrival, m - 1)[:m]) if m else np.empty(0, np.int64)
    if not np.isfinite(arrival[chosen]).all():
        raise ValueError(
            f"masking wants {m} of {len(ids)} tokens and finds fewer that are not special, in the sequences "
            f"{plan.sequences[:8].tolist()}...: prepare the shards again, or lower --masking.fraction"
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
    """MicroBatchPlan -> MicroBatch. Runs in worker processes; holds no state but the memory-mapped shards.

    Layouts are filled up to what a micro-batch of these shards may usually have of sequences and tiles, so that a step
    compiled or captured once serves all. A micro-batch with more, of text that is not in a random order, has twice
    that.

    Args:
        lengths: about those of the sequences as they are drawn. None: those of the shards.
    """

    def __init__(
        self,
        shards: Shards | Mix,
        counts: NDArray[np.int64],
        *,
        token_budget: int,
        masking: MaskingConfig,
        lengths: NDArray[np.int32] | None = None,
    ) -> None:
        meta = shards.meta
        self.shards, self.token_budget, self.masking = shards, token_budget, masking
        self.pad_id, self.mask_id = meta.special_ids["pad"], meta.special_ids["mask"]
        self.max_length = meta.max_length
        self.weights = masking_weights(counts, list(meta.special_ids.values()), masking.smoothing)
        lengths = shards.lengths if lengths is None else lengths
        self.sequence_step = usual_most(np.ones_like(lengths), lengths, token_budget)
        self.tile_step = usual_most(-(-lengths // TILE_ROWS), lengths, token_budget)

    def label_frequencies(self) -> NDArray[np.float64]:
        """(V,) about how often each token is a label, above 0, sum 1: its count times the weight it is drawn with.

        What does not occur counts as once, and what is never drawn as the rarest of the others. Drawing without
        replacement makes frequent tokens labels a little more often than this.
        """
        found = np.maximum(self.shards.counts, 1) * self.weights
        found[found == 0] = found[found > 0].min()
        return found / found.sum()

    def __call__(self, plan: MicroBatchPlan) -> MicroBatch:
        # The real tokens, in the order of the plan, masked.
        real = [self.shards.sequence(int(i)) for i in plan.sequences]
        ids = np.concatenate(real).astype(np.int64) if real else np.empty(0, np.int64)
        masked, chosen = mask(ids, plan, weights=self.weights, mask_id=self.mask_id, masking=self.masking)
        lengths = [len(s) for s in real]
        # Padding attends to itself alone. In one piece a whole empty micro-batch would cost the square of the budget.
        num_pad = self.token_budget - len(ids)
        whole, rest = divmod(num_pad, self.max_length)
        pads = [self.max_length] * whole + [rest] * (rest > 0)
        labels = np.full(self.token_budget, NO_LABEL, np.int64)
        labels[chosen] = ids[chosen]
        masked_rows = np.full(num_masked(self.token_budget, self.masking.fraction), (labels == NO_LABEL).argmax())
        masked_rows[: len(chosen)] = chosen
        position_ids = np.zeros(self.token_budget, np.int64)
        starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.empty(0, np.int64)
        position_ids[: len(ids)] = np.arange(len(ids)) - np.repeat(starts, lengths)
        # The number that torch.manual_seed and one draw gave before seeds travelled with their micro-batch: runs go on.
        generator = torch.Generator().manual_seed(plan.dropout_seed)
        return MicroBatch(
            input_ids=torch.from_numpy(np.concatenate([masked, np.full(num_pad, self.pad_id, np.int64)])),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            masked_rows=torch.from_numpy(masked_rows),
            num_rows=torch.tensor(len(ids), dtype=torch.int32),
            denominators=torch.tensor(plan.denominators, dtype=torch.float64).clamp_min_(1.0),  # 0 masked
            dropout_seed=torch.randint(2**63 - 1, (), generator=generator),
            generator_seed=plan.dropout_seed,
            lengths=(*lengths, *pads),
            layout=sequence_layout(
                [*lengths, *pads], sequence_step=self.sequence_step, tile_step=self.tile_step, longest=self.max_length
            ),
            num_tokens=len(ids),
            num_masked=len(chosen),
            sequences=tuple(plan.sequences.tolist()),
        )


class _Plans:
    """What the DataLoader samples: the micro-batches of this rank in order, planned as they are asked for."""

    def __init__(self, updates: Iterator[UpdatePlan], rank: int, world_size: int) -> None:
        self.updates, self.rank, self.world_size = updates, rank, world_size

    def __iter__(self) -> Iterator[MicroBatchPlan]:
        for update in self.updates:
            yield from update.of_rank(self.rank, self.world_size)


class _Collated:
    """A map-style dataset whose keys are plans: workers need the shards alone."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, plan: MicroBatchPlan) -> MicroBatch:
        return self.collator(plan)


def micro_batches(
    updates: Iterator[UpdatePlan], collator: Collator, *, rank: int, world_size: int, num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the given updates, in order, made ahead in `num_workers` processes.

    These are deaf to the signals that ask a run to stop, which wants its micro-batches until it has stopped, and end
    with this process, however that ends.
    """
    loader = DataLoader(
        _Collated(collator),  # type: ignore[arg-type]  # a dataset by its __getitem__
        sampler=_Plans(updates, rank, world_size),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if num_workers else None,
        multiprocessing_context=START_METHOD if num_workers else None,
    )
    # A scheduler signals every process of a job, torchrun and terminals every one of a group. Workers inherit the mask.
    others = multiprocessing.active_children()
    with blocked(STOP_SIGNALS):
        batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    if workers:  # at its exit Python asks them to end by SIGTERM, and then waits for them
        atexit.register(_end, workers)
    return batches


def _end(workers: list[BaseProcess]) -> None:
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would call their end an error
    for worker in workers:
        worker.kill()


def _start_worker(parent: int, _worker: int) -> None:
    for number in STOP_SIGNALS:  # a worker that is not a fork inherits no mask everywhere
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: a parent that is killed ends nobody by itself
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)
    torch.set_num_threads(1)
    # Tensors go through the pipe instead of shared memory, where each would take a handshake with the worker that made
    # it. The training process spends a quarter of the time on that, and no /dev/shm is too small.
    ForkingPickler.register(Tensor, _by_value)


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)
