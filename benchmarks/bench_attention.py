"""Packed attention, forward and with its backward, against padded and packed peers. Floor: matmuls of as many FLOP.

    python -m benchmarks.bench_attention --tokens 1024 --lengths 128,wikipedia --heads 12 --dropout 0 --dtype fp32
    python -m benchmarks.bench_attention --lengths 8192 --tokens 16384 --window 64
    python -m pytest benchmarks/bench_attention.py -s

FLOP counted: 4 sum(L^2) H Dh forward, 2.5 times that backward: what any implementation must compute, recomputation and
padding left out. With a window the pairs inside it stand for L^2.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Names, Options, Rates, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem, Provider

# Lengths like those of English Wikipedia's articles cut at 512 tokens: what many full pieces and their tails look like.
# A fixed list, made up to that description; not a sample.
WIKIPEDIA = [512, 512, 137, 512, 61, 512, 512, 512, 301, 88, 512, 224, 512, 512, 45, 512, 412, 512, 173, 512]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention(Options):
    """Check and time attention(qkv_N3HD, layout, dropout_p=..., seed=...) beside PyTorch's and kernels of your own."""

    known: ClassVar[tuple[str, ...]] = (
        "ours",
        "sdpa",
        "padded",
        "padded-flash",
        "padded-cudnn",
        "torch-flash",
        "cudnn",
        "flash-attn",
        "varlen",
    )

    tokens: Sizes = ()
    """Tokens of the micro-batch. Without it 1,024, on a GPU 16,384."""
    lengths: Names = ("512", "128", "wikipedia")
    """Of its sequences: a number for all, or wikipedia, which is many of 512 and their tails."""
    heads: int | None = None
    """Heads. None: as many as make 768 columns."""
    head_widths: Sizes = (64, 32)
    """Columns of a head."""
    dropout: Rates = (0.0, 0.1)
    """Probabilities that a weight is dropped. Other than 0 the mask has to be that of dropout.keep_reference."""
    window: int = 0
    """Places before and behind a token that it sees, itself besides. 0: all of its sequence."""

    def __post_init__(self) -> None:
        # Not by super(): it knows no class with slots, which dataclass makes anew.
        Options.__post_init__(self)
        for kind in self.lengths:
            if kind != "wikipedia" and not (kind.isdigit() and int(kind)):
                raise ValueError(f"--lengths wants whole numbers of 1 or more, or wikipedia, got {kind!r}")
        if self.window < 0:
            raise ValueError(f"--window wants a whole number of 0 or more, got {self.window}")


def cases(options: Attention) -> Iterator[Case]:
    for tokens, dtype, kind, width, dropout, backward in itertools.product(
        options.tokens or options.usual((1024,), (16384,)),
        options.dtypes(),
        options.lengths,
        options.head_widths,
        options.dropout,
        options.passes(False, True),
    ):
        heads = options.heads or max(1, 768 // width)
        of_heads = f"{heads} heads of {width}" if options.heads else f"head {width}"
        name = f"{tokens} tokens, lengths {kind}, {of_heads}, dropout {dropout}, {dtype}, "
        name += f"window {options.window}, " if options.window else ""
        name += "forward+backward" if backward else "forward"
        sizes = {"tokens": tokens, "lengths": kind, "head_width": width, "heads": heads, "dropout": dropout}
        sizes |= {"dtype": dtype, "backward": backward, "window": options.window}
        yield Case(name, sizes, packed)


def lengths_of(kind: str, num_tokens: int) -> list[int]:
    """Lengths that sum to num_tokens; the last one is cut."""
    cycle = WIKIPEDIA if kind == "wikipedia" else [int(kind)]
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(left, cycle[len(lengths) % len(cycle)]))
    return lengths


def pairs(length: int, window: int) -> int:
    """Of tokens in a sequence of `length` that see each other, each itself included."""
    return length * (2 * window + 1) - window * (window + 1) if 0 < window < length else length**2


def packed(
    *,
    tokens: int,
    lengths: str,
    heads: int,
    head_width: int,
    dropout: float,
    dtype: str,
    backward: bool,
    window: int,
    device: str,
) -> "Problem":
    import torch

    from benchmarks._harness import OURS, Problem, Provider
    from fastdistil.kernels.attention import attention, attention_reference
    from fastdistil.kernels.attention_backends import AttentionBackend
    from fastdistil.kernels.dropout import new_dropout_seed
    from fastdistil.kernels.layout import sequence_layout

    several = lengths_of(lengths, tokens)
    qkv = torch.randn(tokens, 3, heads, head_width, device=device, dtype=getattr(torch, dtype))
    qkv.requires_grad_(backward)

    def by(title: str, backend: AttentionBackend) -> Provider:
        of_another = "own mask" if dropout and backend != "fused" else ""
        return Provider(title, functools.partial(attention, backend=backend), of_another)

    providers = {
        "ours": by(OURS, "fused"),
        "sdpa": by("sdpa by run", "sdpa"),
        "padded": padded("SDPA padded", qkv, several, dropout, window),
    }
    if device == "cuda":
        providers["torch-flash"] = by("torch flash varlen", "torch-flash")
        providers["flash-attn"] = by("flash-attn varlen", "flash-attn")  # reported as failed where not installed
        if not window:  # which these do not take
            providers |= on_gpu(qkv, several, dropout)
            providers["cudnn"] = by("cuDNN by run", "cudnn")
    num_flops = 4 * sum(pairs(length, window) for length in several) * heads * head_width * (3.5 if backward else 1)
    # One square product of as many FLOP, in bf16 on the tensor cores.
    side = max(16, round((num_flops / 2) ** (1 / 3) / 16) * 16)
    a, b = (torch.randn(side, side, device=device, dtype=qkv.dtype) for _ in range(2))
    return Problem(
        arguments=[qkv, sequence_layout(several, device)],
        options={"dropout_p": dropout, "seed": new_dropout_seed(device), "window": window},
        trained=[0] if backward else (),
        dout=torch.randn(tokens, heads, head_width, device=device, dtype=qkv.dtype),
        definition=attention_reference,
        plain=plain,
        providers=providers,
        baseline="padded",
        num_bytes=(11 if backward else 4) * tokens * heads * head_width * qkv.element_size(),
        num_flops=num_flops,
        floor=lambda: torch.mm(a, b),
        budget_s=3.0,
    )


def plain(qkv: Any, layout: Any, *, dropout_p: float, seed: Any, window: int) -> Any:
    """What a PyTorch user would write, every step in the dtype of the input."""
    import torch

    from fastdistil.kernels.dropout import keep_reference

    outputs = []
    heads = torch.arange(qkv.shape[2], device=qkv.device)
    for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        scores, row = q @ k.mT * q.shape[-1] ** -0.5, torch.arange(start, end, device=qkv.device)
        if window:
            scores = scores.masked_fill((row[:, None] - row).abs() > window, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if dropout_p:
            weights = torch.where(keep_reference(seed, 0, dropout_p, heads, row, row), weights / (1 - dropout_p), 0.0)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def padded(
    title: str, qkv: Any, lengths: list[int], dropout: float, window: int = 0, backend: Any = None
) -> "Provider":
    """SDPA on sequences padded to the longest, as most training code has it; padding itself is not timed."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks._harness import Provider

    backward, longest = qkv.requires_grad, max(lengths)
    batch = torch.nn.utils.rnn.pad_sequence(list(qkv.detach().split(lengths)), batch_first=True)
    leaves = [x.transpose(1, 2).requires_grad_(backward) for x in batch.unbind(2)]
    mask = None
    row, length = torch.arange(longest, device=qkv.device), torch.tensor(lengths, device=qkv.device)
    # Flash takes no mask: the tails are computed, and their rows would be dropped.
    if min(lengths) < longest and backend is not SDPBackend.FLASH_ATTENTION:
        mask = (row < length[:, None])[:, None, None, :]
    if window:
        near = (row[:, None] - row).abs() <= window
        # Rows of padding, which may be far from all tokens, see all: one that sees nothing is NaN, and its gradient.
        mask = near if mask is None else near & mask | ~mask.mT

    def run():
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, dropout_p=dropout)
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if backward else out

    return Provider(title, run, "padded", True)


def on_gpu(qkv: Any, lengths: list[int], dropout: float) -> dict[str, "Provider"]:
    """Peers of PyTorch that only a GPU has."""
    import torch
    from torch.nn.attention import SDPBackend

    from benchmarks._harness import Provider

    found = {
        "padded-flash": padded("SDPA padded flash", qkv, lengths, dropout, backend=SDPBackend.FLASH_ATTENTION),
        "padded-cudnn": padded("SDPA padded cuDNN", qkv, lengths, dropout, backend=SDPBackend.CUDNN_ATTENTION),
    }
    leaves = [x.detach().contiguous().requires_grad_(qkv.requires_grad) for x in qkv.unbind(1)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=qkv.device)

    def varlen() -> Any:
        """PyTorch's own packed attention (2.10 and later); it has no dropout."""
        from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

        q, k, v = leaves
        out: Any = varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths))
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if qkv.requires_grad else out

    if dropout == 0:
        found["varlen"] = Provider("torch varlen_attn", varlen, "apart", True)
    return found


def usual_cases() -> Iterator[Case]:
    return cases(Attention())


def test_attention(benchmark, case, results):
    compare(benchmark, "attention", case, results)


main = benchmark("attention", Attention, cases)

if __name__ == "__main__":
    sys.exit(main())
