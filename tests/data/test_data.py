"""The plan of an update, packing and masks: pure functions of (seed, update), whatever the ranks and workers."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data import batches as data
from fastdistil.data.shards import Shards
from fastdistil.kernels.layout import sequence_layout
from fastdistil.run.config import MaskingConfig
from tests.support import toy

BUDGET = 256


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards(toy.make_shards(tmp_path_factory.mktemp("data") / "shards"))


def make_plan(shards, *, seed=56, micro_batches=4):
    return data.Plan(
        shards.lengths, seed=seed, token_budget=BUDGET, micro_batches_per_update=micro_batches, mask_fraction=0.15
    )  # fmt: skip


def make_collator(shards, **masking):
    return data.Collator(shards, shards.counts, token_budget=BUDGET, masking=MaskingConfig(**masking))


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 300))
def test_cut_loses_nothing_and_fits(lengths, budget):
    lengths = np.array(lengths, np.int32)
    boundaries = data.cut(lengths, budget)
    assert boundaries[0] == 0
    assert boundaries[-1] == len(lengths)
    for i, (a, b) in enumerate(itertools.pairwise(boundaries)):
        assert a < b
        assert lengths[a:b].sum() <= budget
        if i + 2 < len(boundaries):  # cut only where the next one would not fit
            assert lengths[a : b + 1].sum() > budget


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(shards):
    plan = make_plan(shards, micro_batches=1)
    first, second = plan.micro_batches_through(0), plan.micro_batches_through(1)
    epochs = [
        np.concatenate([plan.update(u).slots[0].sequences for u in range(a, b)])
        for a, b in ((0, first), (first, second))
    ]
    for order in epochs:
        assert sorted(order) == list(range(len(shards)))
    assert (epochs[0] != epochs[1]).any()
    words = [data.random_words(len(shards), 56, "order", epoch) for epoch in (0, 1)]
    assert [list(order) for order in epochs] == [np.argsort(w).tolist() for w in words]


def test_the_next_epoch_is_made_while_this_one_is_half_way(shards):
    plan = make_plan(shards, micro_batches=1)
    half = plan.micro_batches_through(0) // 2
    for update in range(half):
        plan.update(update)
    assert list(plan._epochs) == [0]
    plan.update(half)
    plan.update(half + 1)
    assert list(plan._epochs) == [0, 1]


def test_updates_may_be_asked_for_in_any_order(shards):
    forward = [make_plan(shards).update(u) for u in range(40)]  # several epochs
    plan = make_plan(shards)
    for u in reversed(range(40)):
        again = plan.update(u)
        assert (again.num_tokens, again.num_masked) == (forward[u].num_tokens, forward[u].num_masked)
        for a, b in zip(again.slots, forward[u].slots, strict=True):
            assert (a.sequences == b.sequences).all()
            assert a.coordinates == b.coordinates


def test_the_seed_decides_the_order(shards):
    a, b = make_plan(shards, seed=1).update(0), make_plan(shards, seed=2).update(0)
    assert a.slots[0].sequences.tolist() != b.slots[0].sequences.tolist()


def test_order_is_the_one_that_was_released():
    """Philox words are guaranteed across NumPy versions; if this changes, old runs do not resume exactly."""
    assert data.seed_of(56, "order", 0) == 9135442637613753851
    assert data.random_words(2, 56, "order", 0).tolist() == [5182073502920544270, 499630438824064292]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_an_update_without_overlap(shards, world_size):
    plan = make_plan(shards).update(3)
    dealt = [data.rank_slots(plan, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(d) for d in dealt}) == 1  # the same number of backwards on every rank
    together = [s for round_ in zip(*dealt, strict=True) for s in round_][: len(plan.slots)]
    assert [s.coordinates for s in together] == [s.coordinates for s in plan.slots]
    empty = sum(len(s.sequences) == 0 for d in dealt for s in d)
    assert empty == (-len(plan.slots)) % world_size


def flatten(batch):
    return [
        batch.input_ids,
        batch.position_ids,
        batch.labels,
        batch.masked_rows,
        batch.num_rows,
        batch.layout.cu_seqlens,
        batch.layout.tiles,
        batch.lengths,
    ]


def test_workers_and_ranks_do_not_change_what_an_update_holds(shards):
    plan, collator = make_plan(shards), make_collator(shards)
    updates = range(5, 9)

    def all_batches(world_size, num_workers):
        loaders = [
            data.micro_batches(
                (plan.update(u) for u in updates), collator, rank=rank, world_size=world_size,
                num_workers=num_workers, pin_memory=False,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        return [flatten(batch) for round_ in zip(*loaders, strict=True) for batch in round_]

    wanted = all_batches(1, 0)
    assert len(wanted) == 16
    for world_size, num_workers in ((1, 2), (2, 0), (2, 2), (4, 2)):
        got = all_batches(world_size, num_workers)
        for a, b in zip(wanted, got, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_workers_send_tensors_by_value(shards):
    """Shared memory would cost the training process a handshake for each tensor."""
    updates = iter([make_plan(shards).update(0)])
    for batch in data.micro_batches(
        updates, make_collator(shards), rank=0, world_size=1, num_workers=1, pin_memory=False
    ):
        tensors = [x for x in flatten(batch) if isinstance(x, torch.Tensor)]
        assert not any(x.is_shared() for x in tensors)
        tensors[0].zero_()  # and they may be written to


def test_micro_batch_is_what_was_stored(shards):
    slot = make_plan(shards).update(0).slots[1]
    batch = make_collator(shards)(slot)
    real = np.concatenate([shards.sequence(int(i)) for i in slot.sequences])
    assert batch.num_tokens == len(real) == int(batch.num_rows)
    assert sum(batch.lengths) == BUDGET
    restored = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)[: len(real)]
    assert restored.tolist() == real.tolist()
    assert (batch.input_ids[len(real) :] == 0).all()
    assert (batch.labels[len(real) :] == data.NO_LABEL).all()
    positions = [p for i in slot.sequences for p in range(len(shards.sequence(int(i))))]
    assert batch.position_ids[: len(real)].tolist() == positions
    rows, filled = batch.masked_rows.split([batch.num_masked, data.num_masked(BUDGET, 0.15) - batch.num_masked])
    assert torch.equal(rows, (batch.labels >= 0).nonzero().flatten())
    assert (batch.labels[filled] == data.NO_LABEL).all()
    layout = sequence_layout(batch.lengths)
    assert torch.equal(batch.layout.tiles[: len(layout.tiles)], layout.tiles)
    assert torch.equal(batch.layout.cu_seqlens[: len(layout.cu_seqlens)], layout.cu_seqlens)
    assert batch.layout.runs == layout.runs


@pytest.mark.parametrize("budget", [48, BUDGET, 1000])
def test_all_micro_batches_have_the_same_shapes(shards, budget):
    """So that a step is compiled or captured once: three epochs, the empty micro-batch and the validation."""
    plan = data.Plan(shards.lengths, seed=1, token_budget=budget, micro_batches_per_update=1, mask_fraction=0.15)
    collator = data.Collator(shards, shards.counts, token_budget=budget, masking=MaskingConfig())
    slots = [plan.update(u).slots[0] for u in range(plan.micro_batches_through(2))]
    slots += data.rank_slots(plan.update(0), rank=1, world_size=2)
    slots += data.validation_plan(np.arange(50), shards.lengths, token_budget=budget, mask_fraction=0.15).slots
    batches = [collator(slot) for slot in slots]
    assert len({len(b.lengths) for b in batches}) > 1  # or there was nothing to even out
    assert len({b.num_masked for b in batches}) > 1
    shapes = {tuple(x.shape for x in flatten(b) if isinstance(x, torch.Tensor)) for b in batches}
    assert len(shapes) == 1


def test_a_micro_batch_of_unusually_many_sequences_has_twice_their_places(shards):
    collator = make_collator(shards)
    shortest = np.argsort(shards.lengths, kind="stable")[: BUDGET // 14]
    layout = collator(data.Slot(shortest, ("test",))).layout
    assert len(shortest) > collator.sequence_step
    assert len(layout.cu_seqlens) - 1 == 2 * collator.sequence_step
    assert len(layout.tiles) == 2 * collator.tile_step


def test_usual_most_of_equal_sequences_is_what_fits_and_a_pad():
    lengths = np.full(10, 48, np.int32)
    assert data.usual_most(np.ones(10, int), lengths, 480) == 11
    assert data.usual_most(np.full(10, 3), lengths, 480) == 33


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_usual_most_is_not_exceeded_and_not_far_away(exponent):
    """Skewed lengths of 12 to 512 tokens: 3,000 micro-batches or more of a random order."""
    rng = np.random.default_rng(0)
    lengths = (12 * (512 / 12) ** (rng.random(100_000) ** exponent)).astype(np.int32)
    boundaries = data.cut(lengths, 4096)
    counts = np.diff(boundaries)
    most = data.usual_most(np.ones_like(lengths), lengths, 4096)
    assert counts.max() < most < counts.mean() + 9 * counts.std()


def test_all_tensors_travel(shards, monkeypatch):
    batch = make_collator(shards)(make_plan(shards).update(0).slots[0])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.to("meta"))  # which wants a GPU
    for moved in (batch.to(torch.device("meta")), batch.pin_memory()):
        assert {x.device.type for x in flatten(moved) if isinstance(x, torch.Tensor)} == {"meta"}


def test_denominators_are_known_before_anything_is_computed(shards):
    """Trap 3: |R| and |M| over the whole update, from lengths alone, equal what the micro-batches turn out to hold."""
    plan, collator = make_plan(shards), make_collator(shards)
    for u in range(6):
        update = plan.update(u)
        batches = [collator(s) for s in update.slots]
        assert update.num_tokens == sum(b.num_tokens for b in batches)
        assert update.num_masked == sum(int((b.labels >= 0).sum()) for b in batches)
        assert all(b.num_masked == math.ceil(0.15 * b.num_tokens) for b in batches)


def test_an_empty_micro_batch_is_all_padding(shards):
    slot = data.rank_slots(make_plan(shards, micro_batches=1).update(0), rank=1, world_size=2)[0]
    batch = make_collator(shards)(slot)
    assert batch.num_tokens == 0
    assert batch.num_masked == 0
    assert (batch.labels == data.NO_LABEL).all()
    assert max(batch.lengths) <= toy.MAX_LENGTH
    assert sum(batch.lengths) == BUDGET


def test_masking_follows_its_distribution():
    """15 %, 80/10/10, p ~ count^-0.7 without replacement, special tokens never: counted over 3,000 draws of 200 tokens."""
    vocab, draws, n = 20, 3000, 200
    counts = np.array([10**6] * 5 + [2 ** min(i, 12) for i in range(vocab - 5)])
    weights = data.masking_weights(counts, [0, 1, 2, 3, 4], 0.7)
    ids = np.concatenate([[2], 5 + np.arange(n - 2) % (vocab - 5), [3]])
    hits = np.zeros(n)
    kept = replaced = as_mask = 0
    random_ids = np.zeros(vocab)
    for i in range(draws):
        slot = data.Slot(np.empty(0, np.int64), ("test", i))
        masked, chosen = data.mask(ids, slot, weights=weights, mask_id=4, masking=MaskingConfig())
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
    weights = data.masking_weights(np.array([0, 5, 0, 1, 16]), [1], 0.5)
    assert weights.tolist() == [1.0, 0.0, 1.0, 1.0, 0.25]


def test_masks_differ_between_epochs(shards):
    """Dynamic masking: a sequence met again is masked anew."""
    plan, collator = make_plan(shards, micro_batches=1), make_collator(shards)

    def labels_of_sequence(epoch):
        start = plan.micro_batches_through(epoch - 1) if epoch else 0
        for u in range(start, plan.micro_batches_through(epoch)):
            batch = collator(plan.update(u).slots[0])
            if 7 in batch.sequences:
                at = batch.sequences.index(7)
                begin = sum(batch.lengths[:at])
                return batch.labels[begin : begin + batch.lengths[at]].tolist()
        raise AssertionError("sequence 7 is missing")

    assert labels_of_sequence(0) != labels_of_sequence(1)


def test_too_few_tokens_that_may_be_masked_is_an_error_that_names_the_place():
    slot = data.Slot(np.array([3]), ("test",))
    with pytest.raises(ValueError, match=r"masking wants 2 of 10 tokens .* sequences \[3\]"):
        data.mask(np.full(10, 2), slot, weights=np.array([1.0, 1, 0, 0, 0]), mask_id=4, masking=MaskingConfig())


def test_validation_is_the_same_in_every_run(shards):
    plans = [
        data.validation_plan(np.arange(50), shards.lengths, token_budget=BUDGET, mask_fraction=0.15) for _ in range(2)
    ]
    a, b = ([make_collator(shards)(s).labels for s in p.slots] for p in plans)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert plans[0].num_tokens == shards.lengths[:50].sum()


def test_epochs_become_updates(shards):
    plan = make_plan(shards, micro_batches=4)
    one, three = plan.micro_batches_through(0), plan.micro_batches_through(2)
    assert plan.updates_of(1) == one // 4
    assert plan.updates_of(3) == three // 4
    assert plan.updates_of(0.5) == int(0.5 * one) // 4
    assert plan.updates_of(0.001) == 1
    assert plan.epoch_of(0) == 0
    assert plan.epoch_of(three // 4 + 1) > 2.9


def test_the_collator_travels_to_a_worker(shards):
    collator = pickle.loads(pickle.dumps(make_collator(shards)))
    slot = make_plan(shards).update(0).slots[0]
    assert torch.equal(collator(slot).input_ids, make_collator(shards)(slot).input_ids)
