"""What serves attention besides the Triton kernels of attention.py, and how one of them is chosen.

    fused       kernels/attention.py: Triton on CUDA; on the CPU the PyTorch kernels below
    sdpa        PyTorch's scaled_dot_product_attention, one call for each run of equal lengths
    flash-attn  flash_attn_varlen_qkvpacked_func of that package (CUDA, bf16 and fp16)

sdpa does not gather sequences of one length from all over the micro-batch. On two CPU cores (4,096 tokens, 12 heads of
32 and of 64, forward and backward, with and without dropout, fp32 and bf16) one call for each run is 1.0 to 1.6 times
as fast as gathered groups on lengths like Wikipedia's (20 sequences), and 0.9 to 1.3 times on 12 to 128 tokens. Groups
of lengths rounded up to 16, 32 or 64, with a key mask, gain at most 12 % (16, short sequences) and lose up to a factor
of 2.9 (64, also short ones).

The dropout masks of fused are those of kernels/dropout.py; sdpa and flash-attn draw from torch's generator.

Shapes: N tokens of the micro-batch, H heads, D width of a head, B sequences of one length L.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout_into
from .layout import SequenceLayout

AttentionBackend = Literal["auto", "fused", "sdpa", "flash-attn"]
ResolvedBackend = Literal["fused", "sdpa", "flash-attn"]
CHUNK_SCORES = 2**18  # 1 MiB of fp32, a core's L2; timings of 2^16 to 2^22 differ by less than their noise
LOG2_E = 1.4426950408889634


def _chunks(tiles: Tensor, num_heads: int) -> Iterator[tuple[int, int, int]]:
    """(first row, B, L), in order: B neighbours of one length L, as many as have up to CHUNK_SCORES scores together."""
    # The first tile of every sequence that is not empty.
    whole = tiles[(tiles[:, 0] == tiles[:, 2]) & (tiles[:, 0] < tiles[:, 1])]
    whole = whole[whole[:, 0].argsort()]
    lengths, counts = torch.unique_consecutive(whole[:, 1] - whole[:, 0], return_counts=True)
    first = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        most = max(1, CHUNK_SCORES // (num_heads * length**2))
        for done in range(0, count, most):
            batch = min(most, count - done)
            yield first, batch, length
            first += batch * length


def _by_head(rows: Tensor, batch: int) -> Tensor:
    """(B L, ..., H, D) -> (..., B H, L, D) fp32, which bmm wants: bf16 would round the scores."""
    H, D = rows.shape[-2:]
    split = rows.view(batch, rows.shape[0] // batch, -1, H, D).permute(2, 0, 3, 1, 4).float()
    return split.reshape(split.shape[0], batch * H, -1, D)


def attention_forward_torch(
    qkv: Tensor, tiles: Tensor, seed: Tensor | None, stream: int, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`attention_forward` in PyTorch, which serves CPU tensors. Only CHUNK_SCORES scores exist at a time."""
    N, _, H, D = qkv.shape
    out, lse = qkv.new_empty((N, H, D)), qkv.new_empty((H, N), dtype=torch.float32)
    for first, B, L in _chunks(tiles, H):
        rows = slice(first, first + B * L)
        q, k, v = _by_head(qkv[rows], B)
        weight = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=D**-0.5)
        top = weight.amax(2, keepdim=True)
        total = weight.sub_(top).exp_().sum(2, keepdim=True)
        chunk_lse = (top + total.log()) * LOG2_E
        lse[:, rows].view(H, B, L).copy_(chunk_lse.view(B, H, L).transpose(0, 1))
        if seed is not None:
            matrices = weight.view(B, H, L, L)
            dropout_into(matrices, matrices, seed, stream, first, dropout_p)
        chunk_out = torch.bmm(weight, v).div_(total)
        out[rows].view(B, L, H, D).copy_(chunk_out.view(B, H, L, D).transpose(1, 2))
    return out, lse


def attention_backward_torch(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    seed: Tensor | None, stream: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    """`attention_backward` in PyTorch, which serves CPU tensors. The gradient as attention.py derives it."""
    _, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    for first, B, L in _chunks(tiles, H):
        rows = slice(first, first + B * L)
        q, k, v = _by_head(qkv[rows], B)
        (chunk_out,), (chunk_dout,) = _by_head(out[rows], B), _by_head(dout[rows], B)
        delta = (chunk_dout * chunk_out).sum(2, keepdim=True)
        chunk_lse = lse[:, rows].view(H, B, L).transpose(0, 1).reshape(B * H, L, 1)
        weight = torch.baddbmm(chunk_lse * (-1 / LOG2_E), q, k.mT, alpha=D**-0.5).exp_()
        kept = weight
        if seed is not None:
            kept = torch.empty_like(weight)
            dropout_into(weight.view(B, H, L, L), kept.view(B, H, L, L), seed, stream, first, dropout_p)
        dv = torch.bmm(kept.mT, chunk_dout)
        dscore = torch.bmm(chunk_dout, v.mT).mul_(kept).addcmul_(weight, delta, value=-1)
        dq, dk = torch.bmm(dscore, k).mul_(D**-0.5), torch.bmm(dscore.mT, q).mul_(D**-0.5)
        chunk = torch.stack([dq, dk, dv]).view(3, B, H, L, D).permute(1, 3, 0, 2, 4)
        dqkv[rows].view(B, L, 3, H, D).copy_(chunk)
    return dqkv


# The runs differ from one micro-batch to the next: traced, every new layout would recompile the encoder. With a graph
# break here the code around it is compiled once, for the constant N.
@torch.compiler.disable()
def attention_sdpa(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float) -> Tensor:
    """(N, H, D) by PyTorch's scaled_dot_product_attention."""
    num_heads, head_dim = qkv_N3HD.shape[2:]
    sizes = [batch * length for batch, length in layout.runs]
    outputs = []
    # split, whose backward is one concatenation; that of a slice fills a whole (N, 3, H, D) with zeros.
    for (batch, length), rows in zip(layout.runs, qkv_N3HD.split(sizes), strict=True):
        q_BHLD, k_BHLD, v_BHLD = rows.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, dropout_p=dropout_p)
        outputs.append(out_BHLD.transpose(1, 2).reshape(batch * length, num_heads, head_dim))
    return torch.cat(outputs)


@torch.compiler.disable()  # the operators of another package
def attention_flash_attn(qkv_N3HD: Tensor, layout: SequenceLayout, dropout_p: float) -> Tensor:
    """(N, H, D) by the package flash-attn."""
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_qkvpacked_func(
        qkv_N3HD, layout.cu_seqlens, layout.max_length, dropout_p=dropout_p, deterministic=True
    )


OTHERS: dict[str, Callable[[Tensor, SequenceLayout, float], Tensor]] = {
    "sdpa": attention_sdpa,
    "flash-attn": attention_flash_attn,
}
"""Backends besides fused: (qkv (N, 3, H, D), layout, dropout_p) -> (N, H, D), differentiable by PyTorch."""


def resolve_backend(
    backend: AttentionBackend, device: torch.device | str, *, dropout_p: float = 0.0, dtype: torch.dtype | None = None
) -> ResolvedBackend:
    """What `attention(backend=...)` runs on this device, with dropout at this rate (0 in evaluation).

    auto is fused on CUDA; no other backend was timed beside it there yet. On the CPU it is sdpa without dropout and
    fused with dropout: PyTorch's flash kernel for CPUs has none, so that sdpa then writes whole score matrices and
    draws a number for each element. Time of sdpa over that of fused on two threads of a quiet AVX-512 machine, 12 heads
    of 32 / of 64, fp32, at 1,024 tokens and in brackets at 4,096 (bf16: 0.8 to 1.3 times these ratios):

        lengths             forward, dropout 0           forward and backward, dropout 0.1
        all 128             0.69 / 0.88 (0.74 / 0.87)    2.07 / 1.75 (1.89 / 1.59)
        all 512             0.76 / 0.71 (0.58 / 0.70)    1.99 / 1.89 (3.18 / 2.48)
        like Wikipedia's    0.58 / 0.73 (0.59 / 0.74)    1.90 / 1.63 (2.40 / 2.03)

    Raises:
        ValueError: if the backend is unknown, or cannot serve the device or, where it is given, the dtype.
    """
    device_type = torch.device(device).type
    if backend == "auto":
        return "sdpa" if device_type == "cpu" and dropout_p == 0 else "fused"
    if backend not in ("fused", "sdpa", "flash-attn"):
        raise ValueError(f"attention wants backend auto, fused, sdpa or flash-attn, got {backend!r}")
    if backend == "flash-attn":
        if device_type != "cuda" or dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"attention backend flash-attn wants bf16 or fp16 on CUDA, got "
                f"{dtype or 'a tensor'} on {device_type}: use backend auto"
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "attention backend flash-attn wants the package flash-attn, which is not installed: "
                "use backend auto, or pip install flash-attn --no-build-isolation"
            )
    return backend


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed torch's default generator of one device, from which the backends of others take their dropout.

    torch.manual_seed seeds those of all devices, in 170 to 250 microseconds.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def capturable(backend: ResolvedBackend) -> str | None:
    """Why a backend's calls cannot be recorded in a CUDA graph once for all micro-batches; None where they can."""
    return None if backend == "fused" else "its calls depend on the lengths of each micro-batch"
