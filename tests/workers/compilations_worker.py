"""How often Triton compiles kernels of losses, layers and sums for launches that differ in places, rows, rates alone.

Prints, as JSON, the number of compilations of each.
"""

import itertools
import json

import torch

from benchmarks.no_gpu import pretend
from fastdistil.kernels import cosine, distill, dropout, geglu, linear, mixture, rope

PLACES = (0, 1, 5, 16, 4096)  # Triton would compile anew for a 1, and for multiples of 16
ROWS = (1, 16, 100)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_everything() -> None:
    """Widths are those of one model: what they are divisible by decides how wide loads can be."""
    seed, scales = meta(dtype=torch.int64), meta(2, dtype=torch.float32)
    for place, rows, dropout_p in itertools.product(PLACES, ROWS, (2.0**-32, 0.1, 0.9)):
        x = meta(1, rows, rows, 768)
        dropout.dropout_into(x, x, seed, place, place, dropout_p)
    for place, rows in itertools.product(PLACES, ROWS):
        dropout.row_and_column_keys(seed, place, 12, rows)
        logits, num_rows = meta(rows, 30528), meta(dtype=torch.int32)
        labels = meta(rows, dtype=torch.int64)
        for vocab_size in (30522, 30512):
            distill.forward(logits, logits, labels, num_rows, logits, place, 2.0, scales, vocab_size)
        for share in (0.25, 0.5, 1 / 3):
            mixture.forward(logits, logits, 2.0, share, 30522)
        cosine.forward(meta(rows, 768), meta(rows, 768), num_rows, scales[0])
        rope.rotate_(meta(rows, 3, 12, 64), meta(rows, 2, 32, dtype=torch.float32), inverse=place > 1)
        geglu.backward(geglu.forward(meta(rows, 2304)), meta(rows, 2304))
        linear.add_column_sum(meta(30528, dtype=torch.float32), logits, accumulate=True)


if __name__ == "__main__":
    driver = pretend()
    launch_everything()
    names = [kernel.name for kernel in driver.kernels]
    print(json.dumps({name: names.count(name) for name in names}))
