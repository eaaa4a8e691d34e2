"""LayerNorm of a residual sum with dropout, and in the pre-norm form both of them. Floor: a copy of as many bytes.

python -m benchmarks.bench_layernorm --rows 4096 --widths 768,1024 --dropout 0
python -m pytest benchmarks/bench_layernorm.py -s
"""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Rates, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNorm(Options):
    """Check and time dropout_add_layernorm(x_ND, residual_ND, weight_D, bias_D, dropout_p=..., seed=...)."""

    rows: Sizes = ()
    """Rows. Without it 4,096, on a GPU 16,384 and 65,536."""
    widths: Sizes = (768,)
    """Columns."""
    dropout: Rates = (0.0, 0.1)
    """Probabilities that an element of x is dropped. Other than 0 the mask has to be that of dropout.keep_reference."""
    pre_norm: tyro.conf.FlagCreatePairsOff[bool] = False
    """In its place add_layernorm, of the same arguments, the bias None: it returns the sum and its LayerNorm."""


def cases(options: LayerNorm) -> Iterator[Case]:
    for rows, width, dtype, p, backward in itertools.product(
        options.rows or options.usual((4096,), (16384, 65536)),
        options.widths,
        options.dtypes(),
        options.dropout,
        options.passes(False, True),
    ):
        name = f"{rows} x {width} {dtype} dropout {p}{' forward+backward' * backward}"
        name += " pre-norm" * options.pre_norm
        sizes = {"rows": rows, "width": width, "dtype": dtype, "dropout": p, "backward": backward}
        if options.pre_norm:  # told apart by its sizes, too, of which pytest's ids are made
            yield Case(name, sizes | {"norm": "pre"}, add_layernorm)
        else:
            yield Case(name, sizes, layernorm)


def layernorm(*, rows: int, width: int, dtype: str, dropout: float, backward: bool, device: str) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, Provider, copy_of, pytorch_and_ours
    from fastdistil.kernels.dropout import keep_reference, new_dropout_seed
    from fastdistil.kernels.layernorm import dropout_add_layernorm, dropout_add_layernorm_reference

    kind, eps = getattr(torch, dtype), 1e-12
    x, residual, dout = (torch.randn(rows, width, device=device, dtype=kind) for _ in range(3))
    weight, bias = (torch.randn(width, device=device, dtype=kind) for _ in range(2))

    def eager(x, residual, weight, bias, *, dropout_p, seed):
        return F.layer_norm(residual + F.dropout(x, dropout_p), (width,), weight, bias, eps)

    def plain(x, residual, weight, bias, *, dropout_p, seed):
        row, column = (torch.arange(n, device=device) for n in x.shape)
        kept = keep_reference(seed, 0, dropout_p, torch.zeros_like(row[:1]), row, column)[0]
        y = torch.where(kept, x / (1 - dropout_p), 0.0) if dropout_p else x
        return F.layer_norm(residual + y, (width,), weight, bias, eps)

    providers = pytorch_and_ours(dropout_add_layernorm, eager, "own mask" if dropout else "")
    if device == "cuda" and dropout == 0 and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_layer_norm  # pyright: ignore[reportMissingImports]

        def liger(x, residual, weight, bias, **_):
            return liger_layer_norm(residual + x, weight, bias, eps)

        providers["liger"] = Provider("Liger (and an add)", liger)
    # Forward two reads and a write; backward three reads and two writes, one without dropout.
    num_bytes = (3 + (4 + (dropout > 0)) * backward) * x.numel() * x.element_size()
    return Problem(
        arguments=[t.requires_grad_(backward) for t in (x, residual, weight, bias)],
        options={"dropout_p": dropout, "seed": new_dropout_seed(device)},
        trained=range(4) if backward else (),
        dout=dout,
        definition=dropout_add_layernorm_reference,
        plain=plain,
        providers=providers,
        num_bytes=num_bytes,
        num_flops=(10 + 15 * backward) * x.numel(),
        floor=copy_of(num_bytes, device),
    )


def add_layernorm(
    *, rows: int, width: int, dtype: str, dropout: float, backward: bool, norm: str, device: str
) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, copy_of, pytorch_and_ours
    from fastdistil.kernels.dropout import keep_reference, new_dropout_seed
    from fastdistil.kernels.layernorm import add_layernorm, add_layernorm_reference

    kind = getattr(torch, dtype)
    x, residual, dsum, dout = (torch.randn(rows, width, device=device, dtype=kind) for _ in range(4))
    weight = torch.randn(width, device=device, dtype=kind)

    def eager(x, residual, weight, bias, *, dropout_p, seed):
        y = residual + F.dropout(x, dropout_p)
        return y, F.layer_norm(y, (width,), weight, bias)

    def plain(x, residual, weight, bias, *, dropout_p, seed):
        row, column = (torch.arange(n, device=device) for n in x.shape)
        kept = keep_reference(seed, 0, dropout_p, torch.zeros_like(row[:1]), row, column)[0]
        y = residual + (torch.where(kept, x / (1 - dropout_p), 0.0) if dropout_p else x)
        return y, F.layer_norm(y, (width,), weight, bias)

    # Forward two reads and two writes; backward three reads and two writes, one without dropout.
    num_bytes = (4 + (4 + (dropout > 0)) * backward) * x.numel() * x.element_size()
    return Problem(
        arguments=[*(t.requires_grad_(backward) for t in (x, residual, weight)), None],
        options={"dropout_p": dropout, "seed": new_dropout_seed(device)},
        trained=range(3) if backward else (),
        dout=(dsum, dout),
        definition=add_layernorm_reference,
        plain=plain,
        providers=pytorch_and_ours(add_layernorm, eager, "own mask" if dropout else ""),
        num_bytes=num_bytes,
        num_flops=(10 + 15 * backward) * x.numel(),
        floor=copy_of(num_bytes, device),
    )


def usual_cases() -> Iterator[Case]:
    yield from cases(LayerNorm())
    yield from cases(LayerNorm(pre_norm=True))


def test_layernorm(benchmark, case, results):
    compare(benchmark, "layernorm", case, results)


main = benchmark("layernorm", LayerNorm, cases)

if __name__ == "__main__":
    sys.exit(main())
