"""Packed attention, forward and with its backward, against padded and packed peers. Floor: matmuls of as many FLOP.

python -m pytest benchmarks/bench_attention.py -s

FLOP counted: 4 sum(L^2) H Dh forward, 2.5 times that backward: what any implementation must compute, recomputation and
padding left out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.attention import attention
from fastdistil.kernels.dropout import new_dropout_seed
from fastdistil.kernels.layout import sequence_layout

WIDTH = 768  # of all heads
# Lengths like those of English Wikipedia's articles cut at 512 tokens: what many full pieces and their tails look like.
# A fixed list, made up to that description; not a sample.
WIKIPEDIA = [512, 512, 137, 512, 61, 512, 512, 512, 301, 88, 512, 224, 512, 512, 45, 512, 412, 512, 173, 512]


def lengths_of(kind: str, num_tokens: int) -> list[int]:
    """Lengths that sum to num_tokens; the last one is cut."""
    cycle = {"512": [512], "128": [128], "wikipedia": WIKIPEDIA}[kind]
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(left, cycle[len(lengths) % len(cycle)]))
    return lengths


CASES = [
    (num_tokens, kind, head_dim, dropout_p, dtype)
    for num_tokens, dtype in ([(16384, "bfloat16")] if DEVICE == "cuda" else [(1024, "float32"), (1024, "bfloat16")])
    for kind in ("512", "128", "wikipedia")
    for head_dim in (64, 32)
    for dropout_p in (0.0, 0.1)
]


def padded(qkv, lengths, dropout_p, backend=None):
    """SDPA on sequences padded to the longest, as most training code has it; padding itself is not timed."""
    longest = max(lengths)
    batch = torch.nn.utils.rnn.pad_sequence(list(qkv.detach().split(lengths)), batch_first=True)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in batch.unbind(2))
    mask = None
    if min(lengths) < longest:
        length = torch.tensor(lengths, device=DEVICE)
        mask = (torch.arange(longest, device=DEVICE) < length[:, None])[:, None, None, :]

    def run():
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        # Flash takes no mask: the tails are computed, and their rows would be dropped.
        with sdpa_kernel(backend):
            use = None if backend is SDPBackend.FLASH_ATTENTION else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=use, dropout_p=dropout_p)

    return run, (q, k, v)


def varlen(qkv, layout):
    """PyTorch's own packed attention (2.10 and later); it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

    q, k, v = (x.detach().contiguous().requires_grad_() for x in qkv.unbind(1))
    cu, most = layout.cu_seqlens, layout.max_length
    return lambda: varlen_attn(q, k, v, cu, cu, most, most), (q, k, v)


def step(forward: Callable[[], Any], leaves: Sequence[torch.Tensor], train: bool) -> Callable[[], object]:
    if not train:
        return torch.no_grad()(forward)

    def both():
        out = forward()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("num_tokens", "kind", "head_dim", "dropout_p", "dtype"), CASES)
def test_attention(benchmark, num_tokens, kind, head_dim, dropout_p, dtype, train):
    lengths, heads = lengths_of(kind, num_tokens), WIDTH // head_dim
    layout = sequence_layout(lengths, DEVICE)
    element = getattr(torch, dtype)
    qkv = torch.randn(num_tokens, 3, heads, head_dim, device=DEVICE, dtype=element)
    qkv.requires_grad_()
    seed = new_dropout_seed(DEVICE)

    def ours(backend):
        options = {"dropout_p": dropout_p, "seed": seed, "backend": backend}
        return step(functools.partial(attention, qkv, layout, **options), [qkv], train)

    providers = {
        OURS: ours("fused"),
        "sdpa by run": ours("sdpa"),
        "SDPA padded": step(*padded(qkv, lengths, dropout_p), train),
    }
    if DEVICE == "cuda":
        for name, backend in (
            ("SDPA padded flash", SDPBackend.FLASH_ATTENTION),
            ("SDPA padded cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            providers[name] = step(*padded(qkv, lengths, dropout_p, backend), train)
        providers["torch flash varlen"] = ours("torch-flash")
        providers["cuDNN by run"] = ours("cudnn")
        providers["flash-attn varlen"] = ours("flash-attn")  # reported as failed where not installed
        if dropout_p == 0:
            # Built when first called, so that a PyTorch without it is reported and left out.
            built = functools.cache(lambda: step(*varlen(qkv, layout), train))
            providers["torch varlen_attn"] = lambda: built()()
    num_flops = 4 * sum(length**2 for length in lengths) * WIDTH * (3.5 if train else 1)
    # One square product of as many FLOP, in bf16 on the tensor cores.
    side = max(16, round((num_flops / 2) ** (1 / 3) / 16) * 16)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=element) for _ in range(2))
    compare(
        benchmark,
        "attention",
        f"{num_tokens} tokens, lengths {kind}, head {head_dim}, dropout {dropout_p}, {dtype}, "
        + ("forward+backward" if train else "forward"),
        providers,
        num_bytes=(11 if train else 4) * num_tokens * WIDTH * element.itemsize,
        num_flops=num_flops,
        floor=lambda: torch.mm(a, b),
        budget_s=3.0,
    )
