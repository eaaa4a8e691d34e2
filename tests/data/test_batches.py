"""Packing and masks: micro-batches are pure functions of their plans, whatever the ranks and workers."""

import math
import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from fastdistil.data import batches
from fastdistil.data.batches import NO_LABEL, MicroBatch, mask, masking_weights, micro_batches, usual_most
from fastdistil.data.plan import MicroBatchPlan, num_masked, pack, seed_of, validation_plan
from fastdistil.kernels.dropout import new_dropout_seed
from fastdistil.kernels.layout import sequence_layout
from fastdistil.run.config import MaskingConfig
from tests.support import toy
from tests.support.toy import BUDGET


def flatten(batch: MicroBatch) -> list[Any]:
    """Everything in it that could differ."""
    layout = {"cu_seqlens": batch.layout.cu_seqlens, "tiles": batch.layout.tiles}
    return [*({f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "layout"} | layout).values()]


def tensors_in(batch: MicroBatch) -> list[torch.Tensor]:
    return [x for x in flatten(batch) if isinstance(x, torch.Tensor)]


def test_workers_and_ranks_do_not_change_what_an_update_holds(shards):
    plan, collator = toy.make_plan(shards.lengths), toy.make_collator(shards)
    updates = range(5, 9)

    def all_batches(world_size, num_workers):
        loaders = [
            micro_batches(
                (plan.update(u) for u in updates),
                collator,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                pin_memory=False,
            )
            for rank in range(world_size)
        ]
        return [flatten(batch) for round_ in zip(*loaders, strict=True) for batch in round_]

    wanted = all_batches(1, 0)
    assert len(wanted) == 16
    for world_size, num_workers in ((1, 2), (2, 0), (2, 2), (4, 2)):
        got = all_batches(world_size, num_workers)
        for a, b in zip(wanted, got, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_worker_of_macos_or_windows_makes_the_same(shards, monkeypatch):
    """It is spawned: what it needs travels to it, and nothing is shared."""
    monkeypatch.setattr(batches, "START_METHOD", "spawn")
    here, there = (
        micro_batches(
            iter([toy.make_plan(shards.lengths).update(3)]),
            toy.make_collator(shards),
            rank=0,
            world_size=1,
            num_workers=num_workers,
            pin_memory=False,
        )
        for num_workers in (0, 1)
    )
    for batch, other in zip(here, there, strict=True):
        for x, y in zip(flatten(batch), flatten(other), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_workers_send_tensors_by_value(shards):
    """Shared memory would cost the training process a handshake for each tensor."""
    updates = iter([toy.make_plan(shards.lengths).update(0)])
    for batch in micro_batches(
        updates, toy.make_collator(shards), rank=0, world_size=1, num_workers=1, pin_memory=False
    ):
        tensors = tensors_in(batch)
        assert not any(x.is_shared() for x in tensors)
        tensors[0].zero_()  # and they may be written to


def test_micro_batch_is_what_was_stored(shards):
    plan = toy.make_plan(shards.lengths).update(0).micro_batches[1]
    batch = toy.make_collator(shards)(plan)
    real = np.concatenate([shards.sequence(int(i)) for i in plan.sequences])
    assert batch.num_tokens == len(real) == int(batch.num_rows)
    assert sum(batch.lengths) == BUDGET
    assert batch.real_lengths == tuple(shards.lengths[plan.sequences])
    restored = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)[: len(real)]
    assert restored.tolist() == real.tolist()
    assert (batch.input_ids[len(real) :] == 0).all()
    assert (batch.labels[len(real) :] == NO_LABEL).all()
    positions = [p for i in plan.sequences for p in range(len(shards.sequence(int(i))))]
    assert batch.position_ids[: len(real)].tolist() == positions
    rows, filled = batch.masked_rows.split([batch.num_masked, num_masked(BUDGET, 0.15) - batch.num_masked])
    assert torch.equal(rows, (batch.labels >= 0).nonzero().flatten())
    assert (batch.labels[filled] == NO_LABEL).all()
    layout = sequence_layout(batch.lengths)
    assert torch.equal(batch.layout.tiles[: len(layout.tiles)], layout.tiles)
    assert torch.equal(batch.layout.cu_seqlens[: len(layout.cu_seqlens)], layout.cu_seqlens)
    assert batch.layout.runs == layout.runs


@pytest.mark.parametrize("budget", [48, BUDGET, 1000])
def test_all_micro_batches_have_the_same_shapes(shards, budget):
    """So that a step is compiled or captured once: three epochs, the empty micro-batch and the validation."""
    plan = toy.make_plan(shards.lengths, seed=1, token_budget=budget, micro_batches=1)
    collator = toy.make_collator(shards, token_budget=budget)
    plans = [plan.update(u).micro_batches[0] for u in range(plan.micro_batches_through(2))]
    plans += plan.update(0).of_rank(1, 2)
    plans += validation_plan(np.arange(50), shards.lengths, token_budget=budget, mask_fraction=0.15).micro_batches
    batches = [collator(plan) for plan in plans]
    assert len({len(b.lengths) for b in batches}) > 1  # or there was nothing to even out
    assert len({b.num_masked for b in batches}) > 1
    shapes = {tuple(x.shape for x in tensors_in(b)) for b in batches}
    assert len(shapes) == 1


def test_a_micro_batch_of_unusually_many_sequences_has_twice_their_places(shards):
    collator = toy.make_collator(shards)
    shortest = np.argsort(shards.lengths, kind="stable")[: BUDGET // 14]
    layout = collator(MicroBatchPlan(shortest, ("test",))).layout
    assert len(shortest) > collator.sequence_step
    assert len(layout.cu_seqlens) - 1 == 2 * collator.sequence_step
    assert len(layout.tiles) == 2 * collator.tile_step


def test_usual_most_of_equal_sequences_is_what_fits_and_a_pad():
    lengths = np.full(10, 48, np.int32)
    assert usual_most(np.ones(10, int), lengths, 480) == 11
    assert usual_most(np.full(10, 3), lengths, 480) == 33


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_usual_most_is_not_exceeded_and_not_far_away(exponent):
    """Skewed lengths of 12 to 512 tokens: 3,000 micro-batches or more of a random order."""
    rng = np.random.default_rng(0)
    lengths = (12 * (512 / 12) ** (rng.random(100_000) ** exponent)).astype(np.int32)
    boundaries = pack(lengths, 4096)
    counts = np.diff(boundaries)
    most = usual_most(np.ones_like(lengths), lengths, 4096)
    assert counts.max() < most < counts.mean() + 9 * counts.std()


def test_all_tensors_travel(shards, monkeypatch):
    batch = toy.make_collator(shards)(toy.make_plan(shards.lengths).update(0).micro_batches[0])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.to("meta"))  # which wants a GPU
    for moved in (batch.to(torch.device("meta")), batch.pin_memory()):
        assert {x.device.type for x in tensors_in(moved)} == {"meta"}


def test_the_dropout_seed_is_what_torchs_generator_would_draw(shards):
    """A run that began when the loop seeded that generator goes on with the same dropout."""
    update = toy.make_plan(shards.lengths).update(3)
    collator = toy.make_collator(shards)
    for number, plan in enumerate(update.micro_batches):
        batch = collator(plan)
        torch.manual_seed(seed_of(56, "dropout", 3, number))
        assert batch.dropout_seed == new_dropout_seed(torch.device("cpu"))
        assert batch.generator_seed == seed_of(56, "dropout", 3, number)


def test_denominators_are_known_before_anything_is_computed(shards):
    """Trap 3: |R| and |M| over the whole update, from lengths alone, equal what the micro-batches turn out to hold."""
    plan, collator = toy.make_plan(shards.lengths), toy.make_collator(shards)
    for u in range(6):
        update = plan.update(u)
        batches = [collator(p) for p in update.micro_batches]
        assert update.num_tokens == sum(b.num_tokens for b in batches)
        assert update.num_masked == sum(int((b.labels >= 0).sum()) for b in batches)
        assert all(b.num_masked == math.ceil(0.15 * b.num_tokens) for b in batches)


def test_an_empty_micro_batch_is_all_padding(shards):
    plan = toy.make_plan(shards.lengths, micro_batches=1).update(0).of_rank(1, 2)[0]
    batch = toy.make_collator(shards)(plan)
    assert batch.num_tokens == 0
    assert batch.num_masked == 0
    assert (batch.labels == NO_LABEL).all()
    assert max(batch.lengths) <= toy.MAX_LENGTH
    assert sum(batch.lengths) == BUDGET


def test_masking_follows_its_distribution():
    """15 %, 80/10/10, p ~ count^-0.7 without replacement, special tokens never: 3,000 draws of 200 tokens."""
    vocab, draws, n = 20, 3000, 200
    counts = np.array([10**6] * 5 + [2 ** min(i, 12) for i in range(vocab - 5)])
    weights = masking_weights(counts, [0, 1, 2, 3, 4], 0.7)
    ids = np.concatenate([[2], 5 + np.arange(n - 2) % (vocab - 5), [3]])
    hits = np.zeros(n)
    kept = replaced = as_mask = 0
    random_ids = np.zeros(vocab)
    for i in range(draws):
        plan = MicroBatchPlan(np.empty(0, np.int64), ("test", i))
        masked, chosen = mask(ids, plan, weights=weights, mask_id=4, masking=MaskingConfig())
        assert len(chosen) == 30 == len(set(chosen.tolist()))
        hits[chosen] += 1
        new = masked[chosen]
        as_mask += (new == 4).sum()
        kept += (new == ids[chosen]).sum()
        other = (new != 4) & (new != ids[chosen])
        replaced += other.sum()
        random_ids += np.bincount(new[other], minlength=vocab)
        assert (np.delete(masked, chosen) == np.delete(ids, chosen)).all()
    assert hits[0] == hits[-1] == 0
    total = 30 * draws
    sigma = math.sqrt(total * 0.25)  # at most
    # a random replacement is any of the vocabulary: one in 20 is [MASK], one in 20 the word itself
    assert abs(as_mask - total * (0.8 + 0.1 / vocab)) < 4 * sigma
    assert abs(kept - total * (0.1 + 0.1 / vocab)) < 4 * sigma
    assert abs(replaced - total * 0.1 * (1 - 2 / vocab)) < 4 * sigma
    assert (random_ids > 0).sum() == vocab - 1  # all but [MASK], which counts as masked
    # inclusion probabilities of a weighted draw without replacement, by simulation with NumPy's own sequential draw
    rng = np.random.default_rng(0)
    p = weights[ids] / weights[ids].sum()
    expected = np.zeros(n)
    for _ in range(draws):
        expected[rng.choice(n, 30, replace=False, p=p)] += 1
    by_word, wanted = np.bincount(ids, hits), np.bincount(ids, expected)
    assert np.abs(by_word - wanted)[5:].max() < 5 * math.sqrt(2 * wanted.max())


def test_masking_weights_are_zero_for_special_tokens_and_finite_for_unseen_ones():
    weights = masking_weights(np.array([0, 5, 0, 1, 16]), [1], 0.5)
    assert weights.tolist() == [1.0, 0.0, 1.0, 1.0, 0.25]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_frequencies_are_about_those_of_the_labels(shards, smoothing):
    """Of a text of 96 words, the most frequent 96 times as frequent as the rarest: a quarter of the distance from
    knowing nothing at most, in nats a label. Special tokens are never labels, and count as the rarest."""
    p = 1 / np.arange(1, 97)
    ids = np.random.default_rng(0).choice(np.arange(5, 101), 40_000, p=p / p.sum())
    collator = toy.make_collator(shards)
    collator.shards.counts = np.bincount(ids, minlength=101)
    collator.weights = masking_weights(collator.shards.counts, [*range(5)], smoothing)
    found = collator.label_frequencies()
    assert found.sum() == pytest.approx(1)
    assert (found[:5] == found.min()).all()
    labels = np.zeros(101)
    for i, part in enumerate(ids.reshape(-1, 1000)):
        plan = MicroBatchPlan(np.empty(0, np.int64), ("test", i))
        _, chosen = mask(part, plan, weights=collator.weights, mask_id=4, masking=MaskingConfig())
        labels += np.bincount(part[chosen], minlength=101)
    seen = labels[5:] / labels.sum()
    entropy = -(seen * np.log(seen)).sum()
    assert -(seen * np.log(found[5:])).sum() - entropy < (math.log(96) - entropy) / 4


def test_masks_differ_between_epochs(shards):
    """Dynamic masking: a sequence met again is masked anew."""
    plan, collator = toy.make_plan(shards.lengths, micro_batches=1), toy.make_collator(shards)

    def labels_of_sequence(epoch):
        start = plan.micro_batches_through(epoch - 1) if epoch else 0
        for u in range(start, plan.micro_batches_through(epoch)):
            batch = collator(plan.update(u).micro_batches[0])
            if 7 in batch.sequences:
                at = batch.sequences.index(7)
                begin = sum(batch.lengths[:at])
                return batch.labels[begin : begin + batch.lengths[at]].tolist()
        raise AssertionError("sequence 7 is missing")

    assert labels_of_sequence(0) != labels_of_sequence(1)


def test_too_few_tokens_that_may_be_masked_is_an_error_that_names_the_place():
    plan = MicroBatchPlan(np.array([3]), ("test",))
    with pytest.raises(ValueError, match=r"masking wants 2 of 10 tokens .* sequences \[3\]"):
        mask(np.full(10, 2), plan, weights=np.array([1.0, 1, 0, 0, 0]), mask_id=4, masking=MaskingConfig())


def test_validation_is_the_same_in_every_run(shards):
    plans = [validation_plan(np.arange(50), shards.lengths, token_budget=BUDGET, mask_fraction=0.15) for _ in range(2)]
    a, b = ([toy.make_collator(shards)(m).labels for m in p.micro_batches] for p in plans)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert plans[0].num_tokens == shards.lengths[:50].sum()


def test_the_collator_travels_to_a_worker(shards):
    collator = pickle.loads(pickle.dumps(toy.make_collator(shards)))
    plan = toy.make_plan(shards.lengths).update(0).micro_batches[0]
    assert torch.equal(collator(plan).input_ids, toy.make_collator(shards)(plan).input_ids)
