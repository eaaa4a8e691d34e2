"""The plan of an update: a pure function of (seed, update), whatever the ranks and workers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.plan import pack, random_words, seed_of
from tests.support import toy


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 300))
def test_packing_loses_nothing_and_fits(lengths, budget):
    lengths = np.array(lengths, np.int32)
    boundaries = pack(lengths, budget)
    assert boundaries[0] == 0
    assert boundaries[-1] == len(lengths)
    for i, (a, b) in enumerate(itertools.pairwise(boundaries)):
        assert a < b
        assert lengths[a:b].sum() <= budget
        if i + 2 < len(boundaries):  # ended only where the next one would not fit
            assert lengths[a : b + 1].sum() > budget


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(shards):
    plan = toy.make_plan(shards.lengths, micro_batches=1)
    first, second = plan.micro_batches_through(0), plan.micro_batches_through(1)
    epochs = [
        np.concatenate([plan.update(u).micro_batches[0].sequences for u in range(a, b)])
        for a, b in ((0, first), (first, second))
    ]
    for order in epochs:
        assert sorted(order) == list(range(len(shards)))
    assert (epochs[0] != epochs[1]).any()
    words = [random_words(len(shards), 56, "order", epoch) for epoch in (0, 1)]
    assert [list(order) for order in epochs] == [np.argsort(w).tolist() for w in words]


def test_the_next_epoch_is_made_while_this_one_is_half_way(shards):
    plan = toy.make_plan(shards.lengths, micro_batches=1)
    half = plan.micro_batches_through(0) // 2
    for update in range(half):
        plan.update(update)
    assert list(plan._epochs) == [0]
    plan.update(half)
    plan.update(half + 1)
    assert list(plan._epochs) == [0, 1]


def test_updates_may_be_asked_for_in_any_order(shards):
    forward = [toy.make_plan(shards.lengths).update(u) for u in range(40)]  # several epochs
    plan = toy.make_plan(shards.lengths)
    for u in reversed(range(40)):
        again = plan.update(u)
        assert (again.num_tokens, again.num_masked) == (forward[u].num_tokens, forward[u].num_masked)
        for a, b in zip(again.micro_batches, forward[u].micro_batches, strict=True):
            assert (a.sequences == b.sequences).all()
            assert (a.mask_key, a.dropout_seed) == (b.mask_key, b.dropout_seed)


def test_the_seed_decides_the_order(shards):
    a, b = toy.make_plan(shards.lengths, seed=1).update(0), toy.make_plan(shards.lengths, seed=2).update(0)
    assert a.micro_batches[0].sequences.tolist() != b.micro_batches[0].sequences.tolist()


def test_order_is_the_one_that_was_released():
    """Philox words are guaranteed across NumPy versions; if this changes, old runs do not resume exactly."""
    assert seed_of(56, "order", 0) == 9135442637613753851
    assert random_words(2, 56, "order", 0).tolist() == [5182073502920544270, 499630438824064292]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_an_update_without_overlap(shards, world_size):
    plan = toy.make_plan(shards.lengths).update(3)
    dealt = [plan.of_rank(r, world_size) for r in range(world_size)]
    assert len({len(d) for d in dealt}) == 1  # the same number of backwards on every rank
    together = [m for round_ in zip(*dealt, strict=True) for m in round_][: len(plan.micro_batches)]
    assert [(m.mask_key, m.dropout_seed) for m in together] == [
        (m.mask_key, m.dropout_seed) for m in plan.micro_batches
    ]
    empty = sum(len(m.sequences) == 0 for d in dealt for m in d)
    assert empty == (-len(plan.micro_batches)) % world_size


def test_epochs_become_updates(shards):
    plan = toy.make_plan(shards.lengths, micro_batches=4)
    one, three = plan.micro_batches_through(0), plan.micro_batches_through(2)
    assert plan.updates_of(1) == one // 4
    assert plan.updates_of(3) == three // 4
    assert plan.updates_of(0.5) == int(0.5 * one) // 4
    assert plan.updates_of(0.001) == 1
    assert plan.epoch_of(0) == 0
    assert plan.epoch_of(three // 4 + 1) > 2.9
