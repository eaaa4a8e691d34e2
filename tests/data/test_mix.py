"""A mix of folders: its shares, what an epoch of it covers, and that one folder is what it is alone."""

import itertools
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.plan import Plan, joined, pools_of, validation_plan
from fastdistil.data.shards import Mix, Shards
from fastdistil.run.config import DataConfig, Text
from tests.support import toy

LONGEST = 40
BUDGET = 128


def make_plan(folders, weights=None, *, seed=56, held_out=0):
    """Of a run on folders of sequences of such lengths, of whose ends it leaves so many out."""
    firsts = np.cumsum([0, *map(len, folders)]).tolist()[:-1]
    pools = pools_of([f[: len(f) - held_out] for f in folders], firsts, weights)
    lengths = np.concatenate(folders)
    return Plan(lengths, seed=seed, token_budget=BUDGET, micro_batches_per_update=1, mask_fraction=0.15, pools=pools)


def epochs_of(plan, count):
    """The sequences of each of the first epochs, in order."""
    ends = [0, *(plan.micro_batches_through(epoch) for epoch in range(count))]
    return [
        np.concatenate([plan.update(u).micro_batches[0].sequences for u in range(a, b)])
        for a, b in itertools.pairwise(ends)
    ]


def of_pool(pool, order):
    """Those of an order that come from one folder."""
    return order[(order >= pool.first) & (order < pool.first + pool.num_sequences)]


folders = st.lists(st.lists(st.integers(3, LONGEST), min_size=1, max_size=60), min_size=2, max_size=4)


@settings(deadline=None)
@given(folders, st.lists(st.floats(0.01, 10), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_shares_are_exact_to_a_sequence_and_passes_follow_one_another(sizes, weights, seed):
    texts = [np.array(lengths, np.int32) for lengths in sizes]
    weights = weights[: len(texts)]
    plan = make_plan(texts, weights, seed=seed)
    epochs = epochs_of(plan, 3)
    total = sum(int(text.sum()) for text in texts)
    for pool, weight in zip(plan.pools, weights, strict=True):
        assert abs(pool.epoch_tokens - total * weight / sum(weights)) <= 1
        for number, order in enumerate(epochs):
            got = int(plan.lengths[of_pool(pool, order)].sum())
            assert abs(got - pool.epoch_tokens) < LONGEST
            until = sum(int(plan.lengths[of_pool(pool, o)].sum()) for o in epochs[: number + 1])
            assert 0 <= until - (number + 1) * pool.epoch_tokens < LONGEST  # errors do not add up
        # Nothing comes again before everything has come.
        stream = np.concatenate([of_pool(pool, order) for order in epochs])
        for begin in range(0, len(stream), pool.num_sequences):
            once = stream[begin : begin + pool.num_sequences] - pool.first
            assert len({*once.tolist()}) == len(once)


@settings(deadline=None)
@given(folders, st.integers(0, 2))
def test_without_weights_an_epoch_holds_every_training_sequence_once(sizes, held_out):
    texts = [np.array([*lengths, *[5] * held_out], np.int32) for lengths in sizes]
    plan = make_plan(texts, held_out=held_out)
    trained = np.concatenate([pool.first + np.arange(pool.num_sequences) for pool in plan.pools])
    for order in epochs_of(plan, 2):
        assert sorted(order.tolist()) == trained.tolist()


def test_a_share_holds_over_any_part_of_an_epoch_too():
    """Each place of an epoch is of a folder at random: a tenth of it misses the share by no more than chance would."""
    rng = np.random.default_rng(0)
    plan = make_plan([rng.integers(3, LONGEST, n).astype(np.int32) for n in (20_000, 500)], [0.7, 0.3])
    (order,) = epochs_of(plan, 1)
    for part in np.array_split(order, 10):
        tokens = plan.lengths[part]
        share = tokens[part >= plan.pools[1].first].sum() / tokens.sum()
        assert share == pytest.approx(0.3, abs=0.04)
    whole = plan.lengths[order]
    assert whole[order >= plan.pools[1].first].sum() / whole.sum() == pytest.approx(0.3, abs=0.0005)


def test_one_folder_is_what_it_was_and_the_first_of_a_mix_has_its_order(shards):
    alone, told = toy.make_plan(shards.lengths, micro_batches=1), make_plan([shards.lengths])
    plain = Plan(shards.lengths, seed=56, token_budget=BUDGET, micro_batches_per_update=1, mask_fraction=0.15)
    for one, other in zip(epochs_of(plain, 2), epochs_of(told, 2), strict=True):
        assert (one == other).all()
    assert [m.mask_key for m in plain.update(3).micro_batches] == [m.mask_key for m in told.update(3).micro_batches]
    mixed = make_plan([shards.lengths, shards.lengths[:50]])
    first = [of_pool(mixed.pools[0], order) for order in epochs_of(mixed, 2)]
    for one, other in zip(first, epochs_of(alone, 2), strict=True):
        assert (one == other).all()
    again = [of_pool(mixed.pools[1], order) - 400 for order in epochs_of(mixed, 2)]
    assert (again[0] != again[1]).any()  # permuted anew


def test_an_update_does_not_depend_on_those_before_it():
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, LONGEST, n).astype(np.int32) for n in (90, 20, 7)]
    forward = [make_plan(texts, [5, 3, 2]).update(u) for u in range(60)]
    plan = make_plan(texts, [5, 3, 2])
    for u in reversed(range(60)):
        for a, b in zip(plan.update(u).micro_batches, forward[u].micro_batches, strict=True):
            assert (a.sequences == b.sequences).all()
            assert (a.mask_key, a.dropout_seed, a.denominators) == (b.mask_key, b.dropout_seed, b.denominators)


def test_lengths_as_they_are_drawn():
    plan = make_plan([np.full(100, 10, np.int32), np.full(10, 30, np.int32)], [1, 3])
    drawn = plan.drawn_lengths()
    order = np.concatenate(epochs_of(plan, 4))
    assert [(drawn == n).sum() for n in (10, 30)] == [32, 32]
    assert [(plan.lengths[order] == n).mean() for n in (10, 30)] == [pytest.approx(0.5, abs=0.02)] * 2


def test_the_sequences_of_a_mix_are_those_of_its_folders(shards, tmp_path):
    other = Shards(toy.make_shards(tmp_path / "med", num_sequences=30, seed=3))
    shards = Shards(shards.folder)  # of its own: other tests change counts
    mix = Mix([Shards(shards.folder), other], [1.0, 2.5])
    assert (len(mix), mix.meta.num_sequences, mix.meta.num_tokens) == (
        430,
        430,
        shards.meta.num_tokens + other.meta.num_tokens,
    )
    for again in (mix, pickle.loads(pickle.dumps(mix))):
        for index in (0, 399, 400, 429):
            part, inside = (shards, index) if index < 400 else (other, index - 400)
            assert (again.sequence(index) == part.sequence(inside)).all()
            assert again.lengths[index] == len(again.sequence(index))
    for outside in (-1, 430):
        with pytest.raises(IndexError):
            mix.sequence(outside)
    assert (mix.counts == np.rint(shards.counts + 2.5 * other.counts)).all()
    assert mix.meta.digest not in (shards.meta.digest, other.meta.digest)


def test_validations_of_folders_make_one():
    lengths = np.full(50, 10, np.int32)
    parts = [
        validation_plan(np.arange(a, b), lengths, token_budget=BUDGET, mask_fraction=0.15)
        for a, b in ((5, 30), (40, 50))
    ]
    whole = joined(parts)
    assert whole.counts == (350, sum(p.num_masked for p in parts), 35)
    assert {m.denominators for m in whole.micro_batches} == {whole.counts}
    assert [m.sequences.tolist() for m in whole.micro_batches] == [
        m.sequences.tolist() for p in parts for m in p.micro_batches
    ]
    (alone,) = [joined(parts[:1])]
    assert alone.counts == parts[0].counts


@pytest.mark.parametrize(
    ("word", "folder", "weight"),
    [
        ("wiki", "wiki", None),
        ("wiki:0.7", "wiki", 0.7),
        ("/data/wiki:7", "/data/wiki", 7),
        ("wiki:1e-3", "wiki", 1e-3),
        ("wiki:.5", "wiki", 0.5),
        (r"C:\wiki", r"C:\wiki", None),
        (r"C:\wiki:0.3", r"C:\wiki", 0.3),
        ("2024:wiki", "2024:wiki", None),
        ("wiki:2024:0.5", "wiki:2024", 0.5),
        ("there:2024", "there:2024", None),  # a folder of that name is there
        ("there:2024:0.5", "there:2024", 0.5),
        ("wiki:nan", "wiki:nan", None),
    ],
)
def test_a_folder_and_its_weight(word, folder, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:2024").mkdir()
    (text,) = DataConfig(shards=(word,)).texts
    assert (str(text.folder), text.weight) == (folder, weight)
    assert isinstance(text, Text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("wiki:0.7", "med"), "folders that all have a weight, or none, got 'wiki:0.7 med'"),
        (("wiki:0.7", "med:0"), "folders with weights above 0, got 'wiki:0.7 med:0'"),
        (("wiki:-1",), "folders with weights above 0"),
        (("wiki:1e999",), "folders with weights above 0"),
        (("wiki", "wiki"), "different folders, got 'wiki wiki'"),
        ((), "one folder or more, got 'none'"),
    ],
)
def test_what_is_no_mix(words, said):
    with pytest.raises(ValueError, match=re.escape("--data.shards must be " + said)):
        DataConfig(shards=words)
