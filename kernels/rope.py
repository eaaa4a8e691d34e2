"""Rotary positions: pairs of numbers of every query and key, turned by an angle that grows with the token's position.

    angle[n, i] = position[n] * theta^(-2 i / D)                                (Su et al. 2021, arXiv 2104.09864)
    x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin                               x = [x1, x2], the halves of a head

so that a score knows of two positions their difference alone. The pairs are column i of one half and of the other, as
Hugging Face has them (rotate_half), where the paper has neighbours. The values stay as they are. The gradient is turned
back: the same with -sin, which is the transpose. Nothing of qkv is saved. fp32 arithmetic, one rounding; Hugging Face
rounds cos and sin to bf16, too.

Memory: queries and keys are read and written once, two thirds of qkv; cos and sin, made once a micro-batch, are 4 %
more at 12 heads of 64 in bf16. A program takes some rows of queries or of keys, loads their cos and sin once and goes
through the heads. Five instructions an element on sm_90: the pass takes what its bytes take, 1.9 ns a token at the
3.35 TB/s of an H100.

Why not in the attention kernels, which load the same numbers: they would turn every key anew for each tile of queries.
The forward, compiled so for sm_90 at width 64 in its tile of 64 x 64, takes 15.2 instructions a score in place of 9.5,
since keys pass through registers on their way to the tensor cores, and 88 KiB of shared memory in place of 56: 2 CTAs
fit an SM, not 4. Its tile on sm_80 spills, 113 times. The 5.7 instructions, all of them issued at an H100's best rate
(3e13 a second), take as long as the pass at 830 keys a query, a quarter of it in the 192 keys that a window of 128 lets
a tile see; the backward's pass stands against two kernels, which would turn keys and queries anew once more each. So by
count the attention kernels win in windows and short sequences, were it not for half the CTAs, and lose in long ones:
one pass serves both. dq and dk could be turned back where their kernels end, once a row: so compiled, on sm_90 each has
its loop and CTAs as before, and 100 and 140 instructions more behind it. That would spare the backward's pass.

Shapes: N = rows (tokens), H = heads, D = width of a head, R = D / 2.
"""

import torch
from torch import Tensor

from ._backend import LAUNCH_OPTIONS, TRITON_DEVICES, check_dtype, tl, triton

# Rows that a CPU takes at a time, for what is made of them to stay in its cache: 4,096 rows of 12 heads of 64 on two
# cores took 2.5 ms in fp32 and in bf16, in one piece 4 and 6, by rotate_half 7 and 9.
CPU_ROWS = 256


def rotations(position_ids_N: Tensor, head_dim: int, theta: float) -> Tensor:
    """(N, 2, R) fp32: cos and sin of the angles of every token, R = head_dim / 2. No sync.

    On a CPU to the last bit Hugging Face's, which makes theta^(-2 i / D) there; a GPU's power may differ in that bit.

    Args:
        position_ids_N: positions of the tokens in their sequences, from 0 on, (N,) or (B, L).
        head_dim: D, even.
        theta: base of the wavelengths, 2 pi to nearly 2 pi theta tokens.

    Raises:
        ValueError: on an odd head_dim.
    """
    _check_head_dim("rotations", head_dim)
    # Hugging Face's own steps: another order rounds otherwise, and times a position of 8,192 that shows.
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_N.device) / head_dim
    angle = position_ids_N[..., None].float() * (1.0 / theta**exponent)
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def rope_reference(qkv_N3HD: Tensor, rotations_N2R: Tensor) -> Tensor:
    """The definition, in fp32 PyTorch (fp64 for fp64 inputs), in that dtype."""
    qkv = qkv_N3HD.to(torch.promote_types(qkv_N3HD.dtype, torch.float32))
    cos, sin = (t[:, None, None] for t in rotations_N2R.to(qkv.dtype).unbind(1))
    x1, x2 = qkv[:, :2].chunk(2, -1)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    return torch.cat((turned, qkv[:, 2:]), 1)


@triton.jit(do_not_specialize=("N",))
def _rope_kernel(
    qkv_ptr, rotation_ptr, out_ptr,  # (N, 3, H, D), (N, 2, R) fp32, (N, 3, H, D), contiguous; out_ptr may be qkv_ptr
    N, sign, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = D // 2
    part = tl.program_id(1)  # queries, keys, values
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_R)
    live = (row < N)[:, None] & (column < R)[None, :]
    at = row[:, None] * (3 * H * D) + part * (H * D) + column[None, :]
    if part == 2:
        for _ in range(H):
            tl.store(out_ptr + at, tl.load(qkv_ptr + at, mask=live), mask=live)
            tl.store(out_ptr + at + R, tl.load(qkv_ptr + at + R, mask=live), mask=live)
            at += D
        return
    cos_at = row[:, None] * D + column[None, :]
    cos = tl.load(rotation_ptr + cos_at, mask=live, other=0.0)
    sin = sign * tl.load(rotation_ptr + cos_at + R, mask=live, other=0.0)
    for _ in range(H):
        x1 = tl.load(qkv_ptr + at, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(qkv_ptr + at + R, mask=live, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=live)
        tl.store(out_ptr + at + R, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=live)
        at += D


def tile(head_dim: int) -> dict[str, int]:
    """Settings for a head width: a thread has a 16-byte load in bf16 of each half of a head at a time."""
    block = triton.next_power_of_2(head_dim // 2)
    return {"ROWS": max(1, 1024 // block), "BLOCK_R": block, "num_warps": 4}


def _launch(qkv: Tensor, rotations: Tensor, out: Tensor, inverse: bool) -> None:
    """out, which may be qkv itself: then the values are left alone."""
    N, _, H, D = qkv.shape
    if N > 0:
        settings, sign = tile(D), -1.0 if inverse else 1.0
        grid = (triton.cdiv(N, settings["ROWS"]), 2 if out is qkv else 3)
        _rope_kernel[grid](qkv, rotations, out, N, sign, H, D, **settings, **LAUNCH_OPTIONS)


def _rotate_cpu(qkv: Tensor, rotations: Tensor, inverse: bool) -> None:
    sign = -1.0 if inverse else 1.0
    for x, rotation in zip(qkv[:, :2].split(CPU_ROWS), rotations.split(CPU_ROWS), strict=True):
        cos, sin = (t[:, None, None] for t in rotation.unbind(1))
        wide = x.float()  # x itself in fp32
        x1, x2 = wide.chunk(2, -1)
        turned = (x1 * cos).addcmul_(x2, sin, value=-sign)
        x2.mul_(cos).addcmul_(x1, sin, value=sign)
        x1.copy_(turned)
        if wide is not x:
            x.copy_(wide)


def rotate_(qkv_N3HD: Tensor, rotations_N2R: Tensor, inverse: bool = False) -> None:
    """Turn queries and keys where they lie, with `inverse` back. No checks, no gradient; both contiguous.

    The gradient of `rotate_` is `rotate_` with `inverse` of the gradient.
    """
    if qkv_N3HD.device.type in TRITON_DEVICES:
        _launch(qkv_N3HD, rotations_N2R, qkv_N3HD, inverse)
    else:
        _rotate_cpu(qkv_N3HD, rotations_N2R, inverse)


@torch.library.custom_op("fastdistil::rope", mutates_args=())
def _rope(qkv: Tensor, rotations: Tensor, inverse: bool) -> Tensor:
    if qkv.device.type in TRITON_DEVICES:
        out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        _launch(qkv.contiguous(), rotations.contiguous(), out, inverse)
    else:
        out = qkv.clone(memory_format=torch.contiguous_format)
        _rotate_cpu(out, rotations, inverse)
    return out


@_rope.register_fake
def _(qkv, rotations, inverse):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, rotations, ctx.inverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rotations)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    (rotations,) = ctx.saved_tensors
    return _rope(grad, rotations, not ctx.inverse), None, None


_rope.register_autograd(_backward, setup_context=_setup_context)


def _check_head_dim(operator: str, head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{operator} wants heads of an even width, whose halves are turned, got {head_dim}")


def rope(qkv_N3HD: Tensor, rotations_N2R: Tensor) -> Tensor:
    """qkv with every query and key turned by the angles of its token; of the shape and dtype of qkv.

    Args:
        qkv_N3HD: queries, keys and values of all heads, (N, 3, H, D) or (B, L, 3, H, D), as `attention` takes them.
            fp32, bf16 or fp16. Gets a gradient.
        rotations_N2R: of `rotations`, fp32, (N, 2, R) or (B, L, 2, R), on the same device. Gets no gradient.

    Raises:
        ValueError: on an odd width of heads, or shapes and dtypes that do not fit.
    """
    if qkv_N3HD.ndim not in (4, 5) or qkv_N3HD.shape[-3] != 3:
        raise ValueError(
            "rope wants queries, keys and values as one (N, 3, heads, head width) tensor, or (B, L, 3, heads, head "
            f"width), got {tuple(qkv_N3HD.shape)}"
        )
    _check_head_dim("rope", qkv_N3HD.shape[-1])
    check_dtype("rope", qkv_N3HD)
    wanted = (*qkv_N3HD.shape[:-3], 2, qkv_N3HD.shape[-1] // 2)
    if rotations_N2R.shape != wanted or rotations_N2R.dtype != torch.float32 or rotations_N2R.device != qkv_N3HD.device:
        raise ValueError(
            f"rope wants rotations as {wanted} fp32 on {qkv_N3HD.device}, got {tuple(rotations_N2R.shape)} "
            f"{rotations_N2R.dtype} on {rotations_N2R.device}: use rotations(position_ids, {qkv_N3HD.shape[-1]}, theta)"
        )
    if qkv_N3HD.ndim == 5:
        return _rope(qkv_N3HD.flatten(0, 1), rotations_N2R.flatten(0, 1), False).view(qkv_N3HD.shape)
    return _rope(qkv_N3HD, rotations_N2R, False)
