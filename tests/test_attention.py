"""ops.attention against its fp32 definition, and the layout that it follows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil import ops

LENGTHS = [[1], [3, 3, 3], [1, 1, 7, 7, 64, 5], [130, 1, 63, 65, 64]]


def _qkv(lengths, dtype=torch.float32, heads=3, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, width, generator=generator).to(dtype)


def _value_and_grad(fn, qkv, weight):
    qkv = qkv.detach().requires_grad_()
    out = fn(qkv)
    (grad,) = torch.autograd.grad((out * weight).sum(), qkv)
    return out.detach().double(), grad.double()


def _exact(qkv, lengths):
    outputs = []
    for part in qkv.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        outputs.append(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_worse_than_twice_the_reference(lengths, dtype):
    qkv, layout = _qkv(lengths, dtype), ops.sequence_layout(lengths, "cpu")
    weight = torch.randn(sum(lengths), 3, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = _value_and_grad(lambda x: _exact(x, lengths), qkv.double(), weight.double())
    ours = _value_and_grad(lambda x: ops.attention(x, layout), qkv, weight)
    reference = _value_and_grad(lambda x: ops.attention_reference(x, layout).to(dtype), qkv, weight)
    for name, mine, theirs, truth in zip(("value", "grad"), ours, reference, exact, strict=True):
        # Roundings of the dtype that the reference, which computes in fp32, does not make.
        slack = 2 * torch.finfo(dtype).eps * truth.abs().max().item()
        error, allowed = (mine - truth).abs().max(), 2 * (theirs - truth).abs().max() + slack
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_one_token_sees_itself():
    qkv = _qkv([1, 1, 1])
    out = ops.attention(qkv, ops.sequence_layout([1, 1, 1], "cpu"), dropout_p=0.0)
    torch.testing.assert_close(out, qkv[:, 2])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_sequences_do_not_see_each_other(lengths, data):
    changed = data.draw(st.integers(0, len(lengths) - 1))
    layout, qkv = ops.sequence_layout(lengths, "cpu"), _qkv(lengths)
    start, end = sum(lengths[:changed]), sum(lengths[: changed + 1])
    other = qkv.clone()
    other[start:end] = 1e4
    before, after = ops.attention(qkv, layout), ops.attention(other, layout)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])


def test_extreme_scores_stay_finite():
    qkv = torch.full((9, 3, 3, 20), 1e4, requires_grad=True)
    out = ops.attention(qkv, ops.sequence_layout([1, 8], "cpu"))
    out.sum().backward()
    assert out.isfinite().all()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


def test_dropout_is_unbiased_and_seeded():
    lengths = [1, 6, 6]
    qkv, layout = _qkv(lengths), ops.sequence_layout(lengths, "cpu")
    torch.manual_seed(3)
    first = ops.attention(qkv, layout, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(first, ops.attention(qkv, layout, dropout_p=0.4))
    assert not torch.equal(first, ops.attention(qkv, layout, dropout_p=0.4))
    draws = torch.stack([ops.attention(qkv, layout, dropout_p=0.4) for _ in range(4000)])
    error_of_mean = draws.std(0) / 4000**0.5
    # 780 numbers: six standard errors is a chance of 2e-6
    assert ((draws.mean(0) - ops.attention(qkv, layout)).abs() <= 6 * error_of_mean + 1e-6).all()


def test_without_dropout_no_random_number_is_used():
    before = torch.get_rng_state()
    ops.attention(_qkv([2, 5]), ops.sequence_layout([2, 5], "cpu"))
    assert torch.equal(before, torch.get_rng_state())


def test_layout():
    layout = ops.sequence_layout([4, 4, 2, 4], "cpu")
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 10, 14]
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.max_length, layout.num_tokens, layout.runs) == (4, 14, ((2, 4), (1, 2), (1, 4)))


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]], ids=str)
def test_layout_refuses_empty_sequences(lengths):
    with pytest.raises(ValueError, match="at least one sequence, each of 1 token or more"):
        ops.sequence_layout(lengths, "cpu")


@pytest.mark.parametrize(
    ("shape", "dropout_p", "message"),
    [
        ((5, 3, 60), 0.0, r"one \(N, 3, heads, head width\) tensor, got \(5, 3, 60\)"),
        ((5, 2, 3, 20), 0.0, r"got \(5, 2, 3, 20\)"),
        ((6, 3, 3, 20), 0.0, "the layout holds 5 tokens, the tensor 6: count the trailing pad"),
        ((5, 3, 3, 20), 1.0, "dropout_p must be at least 0 and below 1, got 1.0"),
        ((5, 3, 3, 20), -0.1, "got -0.1"),
    ],
)
def test_errors(shape, dropout_p, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(torch.zeros(shape), ops.sequence_layout([2, 3], "cpu"), dropout_p=dropout_p)
