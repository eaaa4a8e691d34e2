"""What serves attention besides the Triton kernels of attention.py, and how one of them is chosen.

    fused        kernels/attention.py: Triton on CUDA; on the CPU the PyTorch kernels below
    sdpa         PyTorch's scaled_dot_product_attention, one call for each run of equal lengths
    torch-flash  the flash attention 2 inside PyTorch, packed (CUDA, bf16 and fp16); no package
    cudnn        cuDNN's attention inside PyTorch, one call for each run (CUDA, bf16 and fp16); no package
    flash-attn   flash_attn_varlen_qkvpacked_func of that package (CUDA, bf16 and fp16)

sdpa does not gather sequences of one length from all over the micro-batch. On two CPU cores (4,096 tokens, 12 heads of
32 and of 64, forward and backward, with and without dropout, fp32 and bf16) one call for each run is 1.0 to 1.6 times
as fast as gathered groups on lengths like Wikipedia's (20 sequences), and 0.9 to 1.3 times on 12 to 128 tokens. Groups
of lengths rounded up to 16, 32 or 64, with a key mask, gain at most 12 % (16, short sequences) and lose up to a factor
of 2.9 (64, also short ones).

On an H100 fused is the fastest of those tried (docs/gpu.md); flash-attn was not there. What their sources say:

* torch-flash and flash-attn add tiles to one dq, by default in no fixed order. Both are asked for the deterministic
  kernel, so that a step is the same to the last bit each time.
* Both take a window. The others know it as a mask of all L x L scores alone: sdpa is called on blocks of rows instead,
  each with the slice that it sees, and cudnn is refused.
* cudnn has no such kernel in PyTorch, nor has sdpa where it chooses cuDNN, or flash attention without
  torch.use_deterministic_algorithms: two runs differ in their last bits.
* cudnn plans anew for every (sequences, length) that a run has, so it is for texts of few lengths. Its packed form has
  no use yet: as its source reads, PyTorch makes a new plan in every call, and passes the width of a head for the length
  in the backward.

The dropout masks of fused are those of kernels/dropout.py; the others draw from torch's generator (`seed_generator`).

Shapes: N tokens of the micro-batch, H heads, D width of a head, B sequences of one length L.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_tiles import architecture
from .dropout import dropout_into
from .layout import SequenceLayout

AttentionBackend = Literal["auto", "fused", "sdpa", "torch-flash", "cudnn", "flash-attn"]
ResolvedBackend = Literal["fused", "sdpa", "torch-flash", "cudnn", "flash-attn"]


class Fastest(NamedTuple):
    """What auto means on a GPU."""

    forward: ResolvedBackend
    """Without dropout: teachers, evaluation."""
    training: ResolvedBackend
    """Forward and backward, with dropout or without."""


# By compute capability; fp32 has fused alone. 90 was measured, the others were not. To fill them in: the stage
# `kernels` of benchmarks/first_light.py prints the milliseconds of every backend in both uses. Enter the fastest whose
# backward is in one order.
FASTEST: dict[int, Fastest] = {
    80: Fastest("fused", "fused"),
    90: Fastest("fused", "fused"),
    100: Fastest("fused", "fused"),
}
CHUNK_SCORES = 2**18  # 1 MiB of fp32, a core's L2; timings of 2^16 to 2^22 differ by less than their noise
# Queries of a block where there is a window. With one of 64 forward and backward of 8,192 tokens in one sequence (one
# thread of an EPYC with AVX-512, 12 heads of 64, fp32) took 300, 329, 425, 626 and 1,037 ms in blocks of 32, 64, 128,
# 256 and 512; by sdpa 440, 407, 447, 547 and 751 ms, and 9.3 s with a mask of the whole sequence. With 32 sequences of
# 128 are in blocks, too: by sdpa 2,048 tokens of them took 21 ms forward in bf16, where one block of each took 13.
WINDOW_ROWS = 64
LOG2_E = 1.4426950408889634


def _chunks(tiles: Tensor, num_heads: int, window: int) -> Iterator[tuple[int, slice, slice]]:
    """(B, rows of queries, rows that they see), in order: B neighbours of one length, or a block of one sequence.

    As many neighbours as have up to CHUNK_SCORES scores together. Blocks are for sequences that a window, and
    WINDOW_ROWS with it, do not hold.
    """
    # The first tile of every sequence that is not empty.
    whole = tiles[(tiles[:, 0] == tiles[:, 2]) & (tiles[:, 0] < tiles[:, 1])]
    whole = whole[whole[:, 0].argsort()]
    lengths, counts = torch.unique_consecutive(whole[:, 1] - whole[:, 0], return_counts=True)
    first = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        in_blocks = 0 < window < length - WINDOW_ROWS
        most = 1 if in_blocks else max(1, CHUNK_SCORES // (num_heads * length**2))
        for done in range(0, count, most):
            batch = min(most, count - done)
            end, step = first + batch * length, WINDOW_ROWS if in_blocks else batch * length
            for begin in range(first, end, step):
                stop = min(begin + step, end)
                yield batch, slice(begin, stop), slice(max(begin - window, first), min(stop + window, end))
            first = end


def _by_head(rows: Tensor, batch: int) -> Tensor:
    """(B L, ..., H, D) -> (..., B H, L, D) fp32, which bmm wants: bf16 would round the scores."""
    H, D = rows.shape[-2:]
    split = rows.view(batch, rows.shape[0] // batch, -1, H, D).permute(2, 0, 3, 1, 4).float()
    return split.reshape(split.shape[0], batch * H, -1, D)


def _put(by_head: Tensor, rows: Tensor, batch: int) -> None:
    """(P, B H, L, D) into its rows (B L, P, H, D)."""
    _, P, H, D = rows.shape
    rows.unflatten(0, (batch, -1)).copy_(by_head.view(P, batch, H, -1, D).permute(1, 3, 0, 2, 4))


def _hide(score: Tensor, rows: slice, seen: slice, window: int) -> None:
    """Scores (B H, R, S), in place -inf where one of the rows and one of those seen are more than `window` apart."""
    row, column = torch.arange(score.shape[1]), torch.arange(score.shape[2])
    score.masked_fill_((row[:, None] - column + (rows.start - seen.start)).abs() > window, -math.inf)


def _drop(weight: Tensor, out: Tensor, rows: slice, seen: slice, seed: Tensor, stream: int, dropout_p: float) -> None:
    """dropout_into of (B, H, R, S). It has one index for rows and columns: a block is the middle of a square."""
    B, H, R, S = weight.shape
    if R < S:
        middle = slice(rows.start - seen.start, rows.stop - seen.start)
        square = weight.new_empty((B, H, S, S))
        square[:, :, middle] = weight
        dropout_into(square, square, seed, stream, seen.start, dropout_p)
        out.copy_(square[:, :, middle])
    else:
        dropout_into(weight, out, seed, stream, rows.start, dropout_p)


def attention_forward_torch(
    qkv: Tensor, tiles: Tensor, seed: Tensor | None, stream: int, dropout_p: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """`attention_forward` in PyTorch, which serves CPU tensors. Only CHUNK_SCORES scores exist at a time."""
    N, _, H, D = qkv.shape
    out, lse = qkv.new_empty((N, H, D)), qkv.new_empty((H, N), dtype=torch.float32)
    for B, rows, seen in _chunks(tiles, H, window):
        q, k, v = _by_head(qkv[seen], B)
        # Those of a block lie in the middle of what it sees.
        q = q[:, rows.start - seen.start :][:, : (rows.stop - rows.start) // B]
        weight = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=D**-0.5)
        if window:
            _hide(weight, rows, seen, window)
        top = weight.amax(2, keepdim=True)
        total = weight.sub_(top).exp_().sum(2, keepdim=True)
        chunk_lse = (top + total.log()) * LOG2_E
        lse[:, rows].view(H, B, -1).copy_(chunk_lse.view(B, H, -1).transpose(0, 1))
        if seed is not None:
            matrices = weight.unflatten(0, (B, H))
            _drop(matrices, matrices, rows, seen, seed, stream, dropout_p)
        _put(torch.bmm(weight, v).div_(total), out[rows, None], B)
    return out, lse


def attention_backward_torch(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    seed: Tensor | None, stream: int, dropout_p: float, window: int = 0,
) -> Tensor:  # fmt: skip
    """`attention_backward` in PyTorch, which serves CPU tensors. The gradient as attention.py derives it."""
    _, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    dkdv, stop = qkv, 0  # of the chunk before, and where it ended
    for B, rows, seen in _chunks(tiles, H, window):
        q, k, v = _by_head(qkv[seen], B)
        q = q[:, rows.start - seen.start :][:, : (rows.stop - rows.start) // B]
        (chunk_out,), (chunk_dout,) = _by_head(out[rows], B), _by_head(dout[rows], B)
        delta = (chunk_dout * chunk_out).sum(2, keepdim=True)
        chunk_lse = lse[:, rows].view(H, B, -1).transpose(0, 1).reshape(B * H, -1, 1)
        weight = torch.baddbmm(chunk_lse * (-1 / LOG2_E), q, k.mT, alpha=D**-0.5)
        if window:
            _hide(weight, rows, seen, window)
        kept = weight.exp_()
        if seed is not None:
            kept = torch.empty_like(weight)
            _drop(weight.unflatten(0, (B, H)), kept.unflatten(0, (B, H)), rows, seen, seed, stream, dropout_p)
        dv = torch.bmm(kept.mT, chunk_dout)
        dscore = torch.bmm(chunk_dout, v.mT).mul_(kept).addcmul_(weight, delta, value=-1)
        dq, dk = torch.bmm(dscore, k).mul_(D**-0.5), torch.bmm(dscore.mT, q).mul_(D**-0.5)
        before, dkdv = dkdv, torch.stack([dk, dv])
        if seen.start < stop:  # a block of the same sequence: rows that both see are written anew, with both sums
            dkdv[:, :, : stop - seen.start] += before[:, :, seen.start - stop :]
        stop = seen.stop
        _put(dq, dqkv[rows, :1], B)
        _put(dkdv, dqkv[seen, 1:], B)
    return dqkv


# The runs differ from one micro-batch to the next: traced, every new layout would recompile the encoder. With a graph
# break here the code around it is compiled once, for the constant N.
@torch.compiler.disable()
def attention_sdpa(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float, window: int = 0) -> Tensor:
    """(N, H, D) by PyTorch's scaled_dot_product_attention."""
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout_p)
    return _by_run(qkv_N3HD, layout, functools.partial(_in_blocks, attend, window) if window else attend)


def _in_blocks(attend: Callable[..., Tensor], window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with a window, (B, H, L, D), in one call: each block of rows and the slice that it sees are a text."""
    B, _, L, _ = q.shape
    if window >= L - WINDOW_ROWS:
        row = torch.arange(L, device=q.device)
        return attend(q, k, v, attn_mask=(row[:, None] - row).abs() <= window)
    tail, width = -L % WINDOW_ROWS, WINDOW_ROWS + 2 * window
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (-1, WINDOW_ROWS)).transpose(1, 2)
    # unfold, whose backward adds what slices share; that of a slice fills all of (B, H, L, D) with zeros.
    k, v = (
        F.pad(x, (0, 0, window, window + tail)).unfold(2, width, WINDOW_ROWS).permute(0, 2, 1, 4, 3) for x in (k, v)
    )
    row = torch.arange(L + tail, device=q.device).view(-1, WINDOW_ROWS, 1)
    column = row[:, :1] + torch.arange(-window, WINDOW_ROWS + window, device=q.device)
    # Rows behind the end see each other: a row that sees nothing is NaN, and its gradient.
    seen = ((row - column).abs() <= window) & ((column >= 0) & (column < L) | (row >= L))
    mask = seen[:, None].repeat(B, 1, 1, 1)
    out = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
    return out.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :L]


@torch.compiler.disable()  # as sdpa
def attention_cudnn(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float, window: int = 0) -> Tensor:
    """(N, H, D) by cuDNN. Without a window: `resolve_backend` refuses one."""
    assert not window

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1:  # which cuDNN does not take
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        with_backward = q.requires_grad
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_backward, dropout_p)[0]

    return _by_run(qkv_N3HD, layout, attend)


def _by_run(qkv_N3HD: Tensor, layout: SequenceLayout, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    num_heads, head_dim = qkv_N3HD.shape[2:]
    sizes = [batch * length for batch, length in layout.runs]
    outputs = []
    # split, whose backward is one concatenation; that of a slice fills a whole (N, 3, H, D) with zeros.
    for (batch, length), rows in zip(layout.runs, qkv_N3HD.split(sizes), strict=True):
        q_BHLD, k_BHLD, v_BHLD = rows.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        out_BHLD = attend(q_BHLD, k_BHLD, v_BHLD)
        outputs.append(out_BHLD.transpose(1, 2).reshape(batch * length, num_heads, head_dim))
    return torch.cat(outputs)


class _TorchFlash(torch.autograd.Function):
    """PyTorch's packed flash attention, whose backward adds in one order.

    It reads q, k and v where they lie in qkv. Its three gradients cost one more pass, which puts them together.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bounds: Tensor, longest: int, dropout_p: float, window: int) -> Tensor:
        ctx.arguments = longest, longest, dropout_p, False  # not causal
        ctx.window = {"window_size_left": window, "window_size_right": window} if window else {}
        out, lse, *random_state, _ = torch.ops.aten._flash_attention_forward(
            *qkv.unbind(1), bounds, bounds, *ctx.arguments, False, **ctx.window
        )
        ctx.save_for_backward(qkv, bounds, out, lse, *random_state)
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        qkv, bounds, out, lse, *random_state = ctx.saved_tensors
        with _in_one_order():
            gradients = torch.ops.aten._flash_attention_backward(
                *grad_outputs, *qkv.unbind(1), out, lse, bounds, bounds, *ctx.arguments, *random_state, **ctx.window
            )
        return torch.stack(gradients, dim=1), None, None, None, None


@contextmanager
def _in_one_order() -> Iterator[None]:
    """PyTorch's deterministic kernels, and no launches that fill fresh memory, which it would add to them."""
    memory: Any = torch.utils.deterministic  # a module whose attribute pyright does not see
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@torch.compiler.disable()  # of the longest sequence it would be traced anew
def attention_torch_flash(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float, window: int = 0) -> Tensor:
    """(N, H, D) by the flash attention inside PyTorch. Heads of a multiple of 8, up to 256."""
    out: Any = _TorchFlash.apply(qkv_N3HD, layout.cu_seqlens, layout.max_length, dropout_p, window)
    return out


@torch.compiler.disable()  # the operators of another package
def attention_flash_attn(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float, window: int = 0) -> Tensor:
    """(N, H, D) by the package flash-attn."""
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyright: ignore[reportMissingImports]

    options = {"window_size": (window, window)} if window else {}
    return flash_attn_varlen_qkvpacked_func(
        qkv_N3HD, layout.cu_seqlens, layout.max_length, dropout_p=dropout_p, deterministic=True, **options
    )


OTHERS: dict[str, Callable[[Tensor, SequenceLayout, float, int], Tensor]] = {
    "sdpa": attention_sdpa,
    "torch-flash": attention_torch_flash,
    "cudnn": attention_cudnn,
    "flash-attn": attention_flash_attn,
}
"""Backends besides fused: (qkv (N, 3, H, D), layout, dropout_p, window) -> (N, H, D), differentiable by PyTorch."""


def seed_generator(device: torch.device | str, seed: int) -> None:
    """Seeds torch's default generator of one device, from which backends other than fused draw, and nothing else does.

    torch.manual_seed, which seeds all of them, takes 170 to 250 us. Call it outside of a CUDA graph, before a replay,
    which begins with the generator's state.
    """
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def capturable(backend: ResolvedBackend) -> str | None:
    """Why a CUDA graph of one micro-batch cannot serve others; None where it can.

    For torch-flash and flash-attn their layouts need one max_length (`sequence_layout(longest=...)`).
    """
    if backend in ("sdpa", "cudnn"):
        return (
            f"attention backend {backend} makes one call for each run of equal lengths, and each micro-batch has others"
        )
    return None


def resolve_backend(
    backend: AttentionBackend,
    device: torch.device | str,
    *,
    dropout_p: float = 0.0,
    training: bool | None = None,
    dtype: torch.dtype | None = None,
    window: int = 0,
) -> ResolvedBackend:
    """What `attention(backend=...)` runs on this device, with dropout at this rate (0 in evaluation).

    auto is what FASTEST holds on CUDA. On the CPU it is sdpa without dropout and fused with dropout: PyTorch's flash
    kernel for CPUs has none, so that sdpa then writes whole score matrices and draws a number for each element. Its
    backward in bf16 is slow, too: one thread of a Xeon with AMX, 4,096 tokens, 12 heads of 32, forward and backward
    without dropout, sdpa over fused, fp32 and bf16: 0.92 and 1.47 for lengths of 130 to 256, 0.97 and 3.7 for those of
    sentences (24 on average). So a backward in bf16 is fused as well. Time of
    sdpa over that of fused on two threads of a quiet AVX-512 machine, 12 heads of 32 / of 64, fp32, at 1,024 tokens and
    in brackets at 4,096 (bf16: 0.8 to 1.3 times these ratios):

        lengths             forward, dropout 0           forward and backward, dropout 0.1
        all 128             0.69 / 0.88 (0.74 / 0.87)    2.07 / 1.75 (1.89 / 1.59)
        all 512             0.76 / 0.71 (0.58 / 0.70)    1.99 / 1.89 (3.18 / 2.48)
        like Wikipedia's    0.58 / 0.73 (0.59 / 0.74)    1.90 / 1.63 (2.40 / 2.03)

    With a window auto is fused on CUDA, where the others were not measured with one, and on the CPU where a backward
    follows. Time of sdpa over that of fused on one thread of an EPYC with AVX-512, window 64, 12 heads of 64, without
    dropout, fp32 (bf16):

        lengths    tokens    forward        forward and backward
        128        2,048     0.71 (0.81)    0.80 (1.27)
        512        2,048     0.88 (0.88)    1.21 (1.55)
        8,192      8,192     0.94 (0.77)    1.24 (1.34)

    Args:
        training: whether a backward follows; None: where there is dropout.
        window: as in `attention`, the same in all layers or that of some.

    Raises:
        ValueError: if the backend is unknown, or cannot serve the device, the window or, where it is given, the dtype.
    """
    device = torch.device(device)
    training = dropout_p > 0 if training is None else training
    if backend == "auto":
        if device.type == "cpu":
            slow_backward = training and (dtype == torch.bfloat16 or window > 0)
            return "fused" if dropout_p > 0 or slow_backward else "sdpa"
        if device.type != "cuda" or dtype == torch.float32 or window:
            return "fused"
        fastest = FASTEST[architecture(device)]
        return fastest.training if training else fastest.forward
    if backend not in ("fused", *OTHERS):
        raise ValueError(
            f"attention wants backend auto, fused, sdpa, torch-flash, cudnn or flash-attn, got {backend!r}"
        )
    if backend not in ("fused", "sdpa") and (
        device.type != "cuda" or dtype not in (None, torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"attention backend {backend} wants bf16 or fp16 on CUDA, got "
            f"{dtype or 'a tensor'} on {device.type}: use backend auto"
        )
    if backend == "cudnn" and window:
        raise ValueError(
            f"attention backend cudnn has no window, got {window}, and a mask would cost all of L x L: use backend "
            "fused or torch-flash"
        )
    if backend == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "attention backend flash-attn wants the package flash-attn, which is not installed: "
            "use backend auto, or pip install flash-attn --no-build-isolation"
        )
    return backend
