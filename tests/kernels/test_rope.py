"""rope against its definition and Hugging Face's. CPU: TRITON_INTERPRET=1 (Triton) or unset (PyTorch)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.kernels.rope import CPU_ROWS, rope, rope_reference, rotate_, rotations, tile
from tests.support.precision import (
    DEVICE,
    INTERPRETED,
    assert_no_worse_than_pytorch,
    compiled,
    each_dtype,
    of_the_definition,
    results,
)

pytestmark = pytest.mark.triton

# (N, H, D): one pair; halves of an odd width and of no power of two; rows at and across the kernel's block and a CPU's.
SHAPES = [
    (1, 1, 2),
    (5, 3, 6),
    (7, 2, 96),
    (tile(16)["ROWS"], 1, 16),
    (tile(64)["ROWS"] + 1, 2, 64),
    (CPU_ROWS + 3, 1, 4),
]


def positions(num_tokens: int) -> Tensor:
    """Of sequences of 100 tokens, the first at the end of what ModernBERT takes."""
    at = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) % 100
    return torch.where(torch.arange(num_tokens, device=DEVICE) < 100, 8191 - at, at)


def make_leaves(shape: tuple[int, int, int], dtype=torch.float32) -> dict[str, Any]:
    N, H, D = shape
    gen = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(N, 3, H, D, generator=gen) for _ in range(2))
    return {
        "qkv_N3HD": qkv.to(DEVICE, dtype).requires_grad_(),
        "rotations_N2R": rotations(positions(N), D, 160_000.0),
        "dout": dout.to(DEVICE, dtype),
    }


def judged(operator):
    """Output and, by a loss whose value is 0, its gradient: a sum over all outputs may be right by chance."""

    def loss(dout: Tensor, **leaves: Tensor):
        out = operator(**leaves)
        total = (out.double() * dout).sum()
        return total - total.detach(), out

    return loss


def rounded_once(qkv_N3HD: Tensor, rotations_N2R: Tensor) -> Tensor:
    """PyTorch's own, from fp32 arithmetic."""
    return rope_reference(qkv_N3HD, rotations_N2R).to(qkv_N3HD.dtype)


def hugging_face(qkv_N3HD: Tensor, rotations_N2R: Tensor) -> Tensor:
    """The same from cos and sin in the dtype of qkv, as ModernBERT's are."""
    return rounded_once(qkv_N3HD, rotations_N2R.to(qkv_N3HD.dtype))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_twice_pytorch(shape, dtype):
    leaves = make_leaves(shape, dtype)
    assert_no_worse_than_pytorch(judged(rope), judged(rounded_once), leaves)
    truth, mine = (results(judged(f), x) for f, x in ((rope_reference, leaves), (rope, leaves)))
    assert torch.equal(mine["value 1"][:, 2], leaves["qkv_N3HD"].double()[:, 2])
    assert torch.equal(mine["dqkv_N3HD"][:, 2], truth["dqkv_N3HD"][:, 2])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_it_is_the_operator(shape, dtype):
    """What a layer's own backward calls, to the last bit; values and what stands behind the end are left alone."""
    leaves = make_leaves(shape, dtype)
    qkv, turns, dout = leaves["qkv_N3HD"], leaves["rotations_N2R"], leaves["dout"]
    wanted = rope(qkv, turns)
    (gradient,) = torch.autograd.grad(wanted, qkv, dout)
    for given, inverse, result in ((qkv.detach(), False, wanted), (dout, True, gradient)):
        memory = torch.cat((given.flatten(), given.new_full((64,), 7.0)))
        here = memory[:-64].view(given.shape)
        rotate_(here, turns, inverse)
        assert torch.equal(here, result)
        assert (memory[-64:] == 7).all()


def test_inverse_turns_back():
    leaves = make_leaves((33, 2, 64))
    qkv = leaves["qkv_N3HD"].detach().clone()
    rotate_(qkv, leaves["rotations_N2R"])
    assert (qkv - leaves["qkv_N3HD"])[:, :2].abs().max() > 1
    rotate_(qkv, leaves["rotations_N2R"], inverse=True)
    torch.testing.assert_close(qkv, leaves["qkv_N3HD"].detach(), rtol=1e-5, atol=1e-6)


def test_scores_know_of_distances_alone():
    """The same texts further on have the same scores, in fp64, where the angles are those of the definition."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(9, 3, 2, 8, generator=gen, dtype=torch.float64)
    scores = []
    for first in (0, 1000):
        angle = (first + torch.arange(9, dtype=torch.float64))[:, None] * 10_000.0 ** (-torch.arange(4) / 4).double()
        turned = rope_reference(qkv, torch.stack((angle.cos(), angle.sin()), 1))
        scores.append(torch.einsum("mhd,nhd->hmn", turned[:, 0], turned[:, 1]))
    torch.testing.assert_close(*scores, rtol=1e-10, atol=1e-10)
    assert (scores[0] - torch.einsum("mhd,nhd->hmn", qkv[:, 0], qkv[:, 1])).abs().max() > 1


@of_the_definition
@pytest.mark.parametrize("head_dim", [4, 64, 96])
@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_rotations_are_those_of_transformers(head_dim, theta):
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    config = modernbert.ModernBertConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, num_hidden_layers=1, vocab_size=8, intermediate_size=8,
        layer_types=["full_attention"], max_position_embeddings=8192,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": theta}},
    )  # fmt: skip
    at = torch.arange(8192)
    cos, sin = modernbert.ModernBertRotaryEmbedding(config)(torch.zeros(1), at[None], "full_attention")
    mine = rotations(at, head_dim, theta)
    assert mine.shape == (8192, 2, head_dim // 2)
    assert torch.equal(torch.cat((mine, mine), -1), torch.stack((cos[0], sin[0]), 1))
    q, k, v = torch.randn(3, 1, 2, 8192, head_dim, generator=torch.Generator().manual_seed(0))
    turned = modernbert.apply_rotary_pos_emb(q, k, cos, sin)
    got = rope(torch.cat((q, k, v)).permute(2, 0, 1, 3), mine)
    for i, wanted in enumerate((*turned, v)):
        torch.testing.assert_close(got[:, i].transpose(0, 1)[None], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates fp32 to bf16")
def test_bf16_is_nearer_than_hugging_face():
    """It rounds the result alone."""
    leaves = make_leaves((100, 2, 64), torch.bfloat16)
    mine, theirs, exact = (
        f(leaves["qkv_N3HD"].to(dtype), leaves["rotations_N2R"]).double()
        for f, dtype in ((rope, torch.bfloat16), (hugging_face, torch.bfloat16), (rope_reference, torch.float64))
    )
    assert (mine - exact).norm() < 0.8 * (theirs - exact).norm()


def test_batches_strides_and_no_rows():
    leaves = make_leaves((6, 2, 8))
    qkv, turns = leaves["qkv_N3HD"].detach(), leaves["rotations_N2R"]
    wanted = rope(qkv, turns)
    assert torch.equal(rope(qkv.unflatten(0, (2, 3)), turns.unflatten(0, (2, 3))), wanted.unflatten(0, (2, 3)))
    strided = torch.stack((qkv, qkv), -1)[..., 0].requires_grad_()
    got = rope(strided, torch.stack((turns, turns), -1)[..., 0])
    assert torch.equal(got, wanted)
    (gradient,) = torch.autograd.grad(got, strided, torch.ones(1, device=DEVICE).expand_as(got))
    assert gradient.isfinite().all()
    assert rope(qkv[:0], turns[:0]).shape == (0, 3, 2, 8)


def test_registration():
    leaves = make_leaves((5, 2, 8))
    for inverse in (False, True):
        arguments = leaves["qkv_N3HD"], leaves["rotations_N2R"], inverse
        torch.library.opcheck(torch.ops.fastdistil.rope.default, arguments)


def test_compiles_without_graph_breaks():
    def block(qkv: Tensor, at: Tensor) -> Tensor:
        return rope(qkv, rotations(at, 8, 10_000.0))

    qkv = make_leaves((5, 2, 8))["qkv_N3HD"]
    wanted, got = (f(qkv, positions(5)) for f in (block, compiled(block)))
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(out.square().sum(), qkv) for out in (got, wanted))
    torch.testing.assert_close(*gradients)


@of_the_definition
def test_reference_has_the_derivative_it_claims():
    leaves = make_leaves((3, 2, 4))
    qkv = leaves["qkv_N3HD"].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rope_reference(x, leaves["rotations_N2R"]), (qkv,))


@pytest.mark.parametrize(
    ("shape", "turns", "dtype", "message"),
    [
        ((4, 3, 8), (4, 2, 4), torch.float32, r"as one \(N, 3, heads, head width\) tensor, .* got \(4, 3, 8\)"),
        ((4, 2, 2, 8), (4, 2, 4), torch.float32, r"got \(4, 2, 2, 8\)"),
        ((4, 3, 2, 7), (4, 2, 3), torch.float32, "rope wants heads of an even width, whose halves are turned, got 7"),
        ((4, 3, 2, 8), (4, 2, 8), torch.float32, r"wants rotations as \(4, 2, 4\) fp32 .* got \(4, 2, 8\).* use rot"),
        ((4, 3, 2, 8), (5, 2, 4), torch.float32, r"got \(5, 2, 4\)"),
        ((4, 3, 2, 8), (4, 2, 4), torch.float64, "rope wants fp32, bf16 or fp16, got torch.float64"),
    ],
)
def test_errors_say_what_was_wanted(shape, turns, dtype, message):
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(shape, dtype=dtype), torch.zeros(turns))


def test_errors_of_rotations():
    with pytest.raises(ValueError, match="rotations wants heads of an even width, whose halves are turned, got 5"):
        rotations(torch.arange(3), 5, 10_000.0)
    with pytest.raises(ValueError, match=r"fp32 on cpu, got \(4, 2, 4\) torch.bfloat16 on cpu"):
        rope(torch.zeros(4, 3, 2, 8), torch.zeros(4, 2, 4, dtype=torch.bfloat16))
