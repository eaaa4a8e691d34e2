"""Dropout's masks against their definition, and the definition against what independent random bits give.

CPU: TRITON_INTERPRET=1 (Triton) or unset (csrc/). Statistics are of fixed seeds: a bound of s sigma is passed always or
never; its s is what the number of draws, all of them together, leaves below one chance in a thousand.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistil.kernels import dropout as module
from fastdistil.kernels.dropout import dropout, new_dropout_seed
from tests.support.precision import DEVICE, INTERPRETED, compiled, each_dtype, of_the_definition

pytestmark = [pytest.mark.triton, pytest.mark.cpp]

DROPOUT = torch.ops.fastdistil.dropout_into
SHAPES = [(1, 1, 1, 1), (1, 2, 3, 5), (2, 2, 9, 33), (2, 1, 9, 257), (3, 2, 1, 40), (1, 1, 33, 384), (1, 1, 0, 4)]
SEED = 2**62 + 987654321  # both halves of it count


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def keep_of(shape, seed, *, stream=0, first=0, dropout_p=0.5) -> Tensor:
    """keep_reference for every element of (B, H, R, C)."""
    B, H, R, C = shape
    heads = torch.arange(H, device=DEVICE)
    masks = [
        module.keep_reference(
            seed, stream, dropout_p, heads,
            first + b * R + torch.arange(R, device=DEVICE), first + b * C + torch.arange(C, device=DEVICE),
        )
        for b in range(B)
    ]  # fmt: skip
    return torch.stack(masks)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_and_values_are_the_definitions(shape, dtype):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen).to(DEVICE, dtype)
    x = torch.where(x == 0, torch.ones_like(x), x)  # so that a zero says: dropped
    # Triton's interpreter truncates fp32 -> bf16 instead of rounding: one unit in the last of 8 bits.
    tolerance = 2.0**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    options = [(SEED, 0, 0), (0, 1, 1), (-1, 2**31 - 1, 70_001), (2**63 - 2, 18, 2**20)]
    for (value, stream, first), dropout_p in zip(options, (0.5, 0.3, 0.9, 0.001), strict=True):
        seed = seed_of(value)
        keep = keep_of(shape, seed, stream=stream, first=first, dropout_p=dropout_p)
        scaled = (x.float() * (1 / (1 - dropout_p))).to(dtype)
        expected = torch.where(keep, scaled, torch.zeros_like(x))
        for operator in (DROPOUT, module.dropout_into_torch):
            before, got, in_place = x.clone(), torch.full_like(x, float("nan")), x.clone()
            operator(before, got, seed, stream, first, dropout_p)
            operator(in_place, in_place, seed, stream, first, dropout_p)
            assert torch.equal(got != 0, keep)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
            assert torch.equal(got, in_place)
            assert torch.equal(before, x)


def test_nothing_outside_is_touched_and_dropped_infinities_are_zero():
    shape, seed = (1, 1, 3, 21), seed_of(SEED)
    buffer = torch.full((4 + 63 + 60,), float("inf"), device=DEVICE)
    x = buffer[4:67].view(shape)
    DROPOUT(x, x, seed, 0, 0, 0.5)
    assert (buffer[:4] == float("inf")).all()
    assert (buffer[67:] == float("inf")).all()
    assert torch.equal(x, torch.where(keep_of(shape, seed), float("inf"), 0.0))


@of_the_definition
def test_keys_are_philox():
    """Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, first word, which is odd in all three."""
    low = 0xFFFFFFFF
    for counter, key, word in [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((low, low, low, low), (low, low), 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ]:
        high = key[1] - 2**32 if key[1] >= 2**31 else key[1]
        row, head = torch.tensor([counter[0]]), torch.tensor([counter[1]])
        seed = torch.tensor(high * 2**32 + key[0])
        assert module.keys_reference(seed, counter[2], counter[3], head, row).item() == word


@of_the_definition
def test_keys_are_odd():
    """An even key of a row would leave fewer random bits to the row; a key of 0 drops it."""
    index = torch.arange(256)
    for side in range(2):
        assert (module.keys_reference(torch.tensor(SEED), 0, side, index[:2], index) & 1).all()


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="these keys feed Triton kernels only")
@pytest.mark.parametrize("num_tokens", [1, 257])
def test_keys_of_the_device(num_tokens):
    heads, tokens = torch.arange(2, device=DEVICE), torch.arange(num_tokens, device=DEVICE)
    got = module.row_and_column_keys(seed_of(-SEED), 7, 2, num_tokens)
    for side in range(2):
        expected = module.keys_reference(seed_of(-SEED), 7, side, heads, tokens)
        assert torch.equal(got[side].long() & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("dropout_p", [2.0**-32, 0.001, 0.1, 0.5, 0.9, 1 - 2.0**-12, 1 - 1e-12])
def test_rate(dropout_p):
    kept = dropout(torch.ones(128, 512, device=DEVICE), seed_of(SEED), stream=3, dropout_p=dropout_p)
    dropped = (kept == 0).sum().item()
    sigma = (kept.numel() * dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(dropped - kept.numel() * dropout_p) <= 5 * sigma + 0.5  # 0.5: a count is whole


def worst_pair(masks: Tensor, dropout_p: float) -> float:
    """Largest |sqrt(n) * correlation| of two of the (K, n) masks: of independent ones a standard normal."""
    z = (masks.float() - (1 - dropout_p)) / (dropout_p * (1 - dropout_p)) ** 0.5
    pairs = (z @ z.T).triu(1) / z.shape[1] ** 0.5
    return pairs.abs().max().item()


def masks_that_should_not_know_each_other(dropout_p: float) -> Tensor:
    """(K, n): heads, places and layers, steps and ranks, blocks, and the same with rows and columns exchanged."""
    side = 256
    make = functools.partial(keep_of, dropout_p=dropout_p)
    masks = [*make((1, 6, side, side), seed_of(SEED))[0]]
    masks += [make((1, 1, side, side), seed_of(SEED), stream=s)[0, 0] for s in range(1, 20)]
    masks += [make((1, 1, side, side), seed_of(SEED), first=side)[0, 0]]
    # Steps draw their seeds; neighbours, and halves exchanged, would be the worst that could be drawn.
    for rank in range(2):
        torch.manual_seed(rank)
        masks += [make((1, 1, side, side), new_dropout_seed(DEVICE))[0, 0] for _ in range(3)]
    for seed in (SEED + 1, SEED - 1, SEED + 2**32, (SEED >> 32) | (SEED & 0x7FFFFFFF) << 32):
        masks += [make((1, 1, side, side), seed_of(seed))[0, 0]]
    masks += [masks[0].T, masks[1].T, masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].flip(1)]
    return torch.stack([mask.flatten() for mask in masks])


@of_the_definition
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_masks_are_independent(dropout_p):
    masks = masks_that_should_not_know_each_other(dropout_p)
    assert worst_pair(masks, dropout_p) < 5.5  # of 820 pairs
    # The check can fail: a mask that shares one element in ten with another.
    copied = torch.arange(masks.shape[1], device=DEVICE) % 10 == 0
    masks[3] = torch.where(copied, masks[7], masks[3])
    assert worst_pair(masks, dropout_p) > 20


def product(row: Tensor, column: Tensor) -> Tensor:
    """What keep_reference makes of keys, in 32 bits held by int64."""
    return (row * column) & 0xFFFFFFFF


def drawn(combine: Callable[[Tensor, Tensor], Tensor], dropout_p: float) -> Tensor:
    """A 512 x 512 mask by `combine` of the keys that the operator has."""
    index, head = torch.arange(512), torch.zeros(1, dtype=torch.int64)
    row, column = (module.keys_reference(torch.tensor(SEED), 5, s, head, index)[0] for s in (0, 1))
    return combine(row[:, None], column[None, :]) >= module.threshold(dropout_p)


def pairs_of_rows(keep_RC: Tensor) -> tuple[float, float]:
    """Over all pairs of rows: largest |z|, and by how many sigmas the mean of z^2 is above the 1 of random rows.

    Correlations, not products: two rows that dropped more than their share would show in all of their pairs.
    """
    R, C = keep_RC.shape
    z = torch.corrcoef(keep_RC.double())[tuple(torch.triu_indices(R, R, 1))] * (C - 1) ** 0.5
    return z.abs().max().item(), (z.square().mean().item() - 1) / (2 / len(z)) ** 0.5


def largest_singular_value(keep_RC: Tensor, dropout_p: float) -> float:
    """Of the centred bits, over that of independent ones (Marchenko and Pastur 1967), which keeps to it within 3 %."""
    z = (keep_RC.double() - (1 - dropout_p)) / (dropout_p * (1 - dropout_p)) ** 0.5
    return torch.linalg.matrix_norm(z, 2).item() / sum(n**0.5 for n in z.shape)


@of_the_definition
def test_rows_and_columns_are_as_random_ones():
    for dropout_p in (0.1, 0.5):
        mask = drawn(product, dropout_p)
        index, head = torch.arange(512), torch.zeros(1, dtype=torch.int64)
        definition = module.keep_reference(torch.tensor(SEED), 5, dropout_p, head, index, index)[0]
        assert torch.equal(mask, definition)
        assert abs(largest_singular_value(mask, dropout_p) - 1) < 0.03
        for keep in (mask, mask.T):
            worst, excess = pairs_of_rows(keep)
            assert abs(excess) < 5
            # 130,816 pairs. At 0.1 common drops are few and their number is skewed: not a normal's tail.
            assert worst < 6 or dropout_p != 0.5


@of_the_definition
@pytest.mark.parametrize(
    "weak",
    [
        lambda row, column: row ^ column,
        lambda row, column: (row + column) & 0xFFFFFFFF,
        lambda row, column: ((row ^ column) * 0x7FEB352D) & 0xFFFFFFFF,
        lambda row, column: product(row & ~0xFFFF, column),
    ],
    ids=["xor", "sum", "xor, times a constant", "sixteen bits of a row's key"],
)
def test_the_checks_see_a_weaker_mask(weak):
    mask = drawn(weak, 0.5)
    worst, excess = pairs_of_rows(mask)
    assert worst > 6
    assert excess > 5


def make_leaf(dtype=torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(9, 40, generator=gen).to(DEVICE, dtype).requires_grad_()


@each_dtype
def test_value_and_gradient_have_one_mask(dtype):
    x, seed = make_leaf(dtype), seed_of(SEED)
    weight = make_leaf(dtype).detach().flip(0)
    out = dropout(x, seed, stream=4, dropout_p=0.5)  # 1 / (1 - 0.5): no rounding
    (dx,) = torch.autograd.grad(out, x, weight)
    keep = keep_of((1, 1, 9, 40), seed, stream=4)[0, 0]
    assert torch.equal(out, torch.where(keep, 2 * x, 0))
    assert torch.equal(dx, torch.where(keep, 2 * weight, 0))
    assert out.dtype == dx.dtype == dtype


def test_non_contiguous_input_has_the_mask_of_its_indices():
    x, seed = make_leaf().detach(), seed_of(SEED)
    expected = dropout(x, seed, stream=4, dropout_p=0.5)
    strided = torch.stack([x, x], dim=2)[:, :, 1]
    for view in (strided, x.T.contiguous().T):
        assert not view.is_contiguous()
        assert torch.equal(dropout(view, seed, stream=4, dropout_p=0.5), expected)


def test_second_derivative():
    """The map is linear, so its derivative is the map again, and so is what it does to a gradient of a gradient."""
    x, v, seed = make_leaf(), make_leaf(), seed_of(SEED)
    call = functools.partial(dropout, seed=seed, stream=1, dropout_p=0.5)
    (vjp,) = torch.autograd.grad(call(x), x, v, create_graph=True)
    assert torch.equal(vjp, call(v))
    (dv,) = torch.autograd.grad(vjp, v, x)
    assert torch.equal(dv, call(x))


def test_without_seed_or_rate_it_is_the_input():
    x = make_leaf()
    assert dropout(x, None, stream=0, dropout_p=0.5) is x
    assert dropout(x, seed_of(SEED), stream=0, dropout_p=0.0) is x


def test_registration():
    x, seed = make_leaf(), seed_of(SEED)
    torch.library.opcheck(torch.ops.fastdistil.dropout.default, (x, seed, 2, 0.3))
    matrices = x.detach()[None, None]
    torch.library.opcheck(DROPOUT.default, (matrices, torch.empty_like(matrices), seed, 2, 5, 0.3))


def test_compiles_without_graph_breaks():
    def loss(x, seed):
        return dropout(x * 2, seed, stream=2, dropout_p=0.5).square().sum()

    x, compiled_loss = make_leaf(), compiled(loss)
    for value in (SEED, 1):
        seed = seed_of(value)
        (got,), (expected,) = (torch.autograd.grad(each(x, seed), x) for each in (compiled_loss, loss))
        assert torch.equal(got, expected)


def test_seeds_follow_the_default_generator():
    torch.manual_seed(3)
    first = [new_dropout_seed(DEVICE) for _ in range(3)]
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    expected = [new_dropout_seed(DEVICE) for _ in range(3)]
    seeds = [seed.item() for seed in first + expected]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 - 1 for seed in seeds)
    assert max(seeds) > 2**32  # the upper half is not left at zero
    torch.manual_seed(3)
    assert [new_dropout_seed(DEVICE).item() for _ in range(3)] == seeds[:3]
    # A resumed run restores the generator's state.
    (torch.cuda.set_rng_state if DEVICE == "cuda" else torch.set_rng_state)(state)
    assert [new_dropout_seed(DEVICE).item() for _ in range(3)] == seeds[3:]


def test_a_seed_and_its_use_do_not_read_the_device():
    with FakeTensorMode():  # has no values to read: .item() would raise
        seed = new_dropout_seed("cuda")
        assert (seed.shape, seed.dtype, seed.device.type) == ((), torch.int64, "cuda")
        x = torch.empty(3, 4, device="cuda")
        assert dropout(x, seed, stream=0, dropout_p=0.1).shape == (3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_ND": torch.zeros(3)}, r"wants an \(N, D\) or \(B, L, D\) tensor, got \(3,\)"),
        ({"dropout_p": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, "at least 0 and below 1, got -0.1"),
        ({"stream": -1}, r"stream must be in \[0, 2\^31\), got -1"),
        ({"stream": 2**31}, "got 2147483648"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"got torch.int64 of shape \(1,\)"),
        ({"seed": torch.tensor(1.0)}, r"got torch.float32 of shape \(\) on cpu: use new_dropout_seed"),
        ({"seed": torch.zeros((), dtype=torch.int64, device="meta")}, "on cpu, got .* on meta"),
    ],
)
def test_errors_name_the_offender(change, message):
    arguments = {"x_ND": torch.zeros(2, 3), "seed": torch.tensor(1), "stream": 0, "dropout_p": 0.1}
    arguments |= change
    x_ND = arguments.pop("x_ND")
    with pytest.raises(ValueError, match=message):
        dropout(x_ND, **arguments)


def test_a_block_is_the_mask_of_its_own_indices():
    """Sequences of one length lie in blocks: block b is what b alone gives from the index where it begins."""
    R, seed = 11, seed_of(SEED)
    x = torch.ones(2, 3, R, R, device=DEVICE)
    DROPOUT(x, x, seed, 1, 100, 0.5)
    assert not torch.equal(x[0], x[1])
    for b in range(2):
        alone = torch.ones(1, 3, R, R, device=DEVICE)
        DROPOUT(alone, alone, seed, 1, 100 + b * R, 0.5)
        assert torch.equal(x[b], alone[0])
