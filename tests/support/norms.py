"""What tests of LayerNorm and of the embeddings share: one loss for all gradients, where sums go, allowed errors."""

import pytest
import torch
from torch import Tensor

from tests.support.precision import DEVICE, SLACK


def judged(operator, **options):
    """Output and, by a loss whose value is 0, every gradient: a sum over all outputs may be right by chance.

    A bias that is not among the leaves is None.
    """

    def loss(dout_ND: Tensor, **leaves: Tensor):
        out = operator(**{"bias_D": None} | leaves, **options)
        total = (out.double() * dout_ND).sum()
        return total - total.detach(), out

    return loss


def assert_as_right(truth, mine, theirs, dtype):
    """No worse than twice the public operators' error, and one rounding of the largest value."""
    assert mine.keys() == truth.keys()
    for name, exact in truth.items():
        my_error, their_error = ((r[name].double() - exact).abs().max().item() for r in (mine, theirs))
        allowed = SLACK * their_error + torch.finfo(dtype).eps * exact.abs().max().item()
        assert my_error <= allowed, f"{name}: error {my_error:.2e}, the public operator's {their_error:.2e}"


def destinations(names, width, dtype, accumulate) -> dict[str, Tensor]:
    """Where sums go: full of NaN if they are to be overwritten, else of a number that has to stay in them."""
    return {name: torch.full((width,), 0.5 if accumulate else torch.nan, dtype=dtype, device=DEVICE) for name in names}


each_destination = pytest.mark.parametrize(
    ("sums", "accumulate"), [(torch.float32, True), (None, False)], ids=["added to fp32", "in the dtype"]
)
