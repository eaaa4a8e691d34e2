"""The parameters of a module in one flat buffer, a copy of it for the arithmetic, and one flat fp32 gradient.

    masters    fp32; the parameters are slices of it             what the optimiser steps
    copies     bf16, made from the masters once an update        what products read; in fp32 the masters themselves
    gradient   fp32; every p.grad is a slice of it               what the products of a backward are added to

So an update casts its weights once, by one launch, and no gradient of a weight is rounded to bf16, converted or added
up in a pass of its own: the functions of functions.py write it where it belongs, by `add_product` of kernels/linear.py.
Optimiser, norm and the sum over ranks each see one tensor.

A parameter with a `Slot` is of such a buffer. One without, as under ZeRO, which has buffers of its own, or in a model
that nobody trains, is read as it is, and its gradient is returned to autograd.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: every slice begins at 128 bytes or more, whatever its dtype


@dataclass(slots=True)
class Slot:
    """Where the functions find what belongs to a parameter."""

    copy: Tensor
    """Like the parameter, in the dtype of the arithmetic."""
    gradient: Tensor | None
    """Like the parameter, fp32; None if it is not trained."""
    fresh: bool
    """Nothing was written to the gradient in this update yet: what it holds counts for nothing."""


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_flat(parameter: Tensor | None) -> bool:
    """Whether it is a slice of a flat buffer, into which its gradient is written."""
    return getattr(parameter, "slot", None) is not None


def operand(parameter: Tensor) -> Tensor:
    """What products read for a parameter."""
    slot: Slot | None = getattr(parameter, "slot", None)
    return parameter.detach() if slot is None else slot.copy


def optional(parameter: Tensor | None) -> Tensor | None:
    """`operand` of a bias, which some models have and others have not."""
    return None if parameter is None else operand(parameter)


def destination(*parameters: Tensor | None) -> tuple[list[Any], bool]:
    """Where the gradients of parameters go, and whether they are added to what is there.

    The parameters get their gradients always together. Of those that a model has not, which are None, it is None.
    """
    found: list[Tensor | None] = []
    fresh = None
    for parameter in parameters:
        slot: Slot | None = getattr(parameter, "slot", None)
        if parameter is None:
            found.append(None)
        elif slot is None:
            found.append(torch.empty_like(parameter, dtype=parameter.grad_dtype))
        else:
            assert slot.gradient is not None
            assert fresh in (None, slot.fresh)
            fresh, slot.fresh = slot.fresh, False
            found.append(slot.gradient)
    return found, fresh is False


def to_autograd(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """What a backward returns for a parameter whose gradient was written to `destination`."""
    return None if is_flat(parameter) else gradient


class FlatParameters:
    """Moves the parameters of `module` into one buffer: first what is decayed, then biases and LayerNorm, then what is
    not trained; in each the encoder's before the head's, as the modules lie.

    Args:
        dtype: of the arithmetic, fp32 or bf16.
        zeroed: clear the gradient after every update and add to it always, as autograd and a captured CUDA graph do,
            instead of having the first product of an update write over it.
        by_autograd: leave the gradients to autograd, which adds them up in p.grad, and the copies to whoever runs it.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, *, zeroed: bool = False, by_autograd: bool = False
    ) -> None:
        zeroed = zeroed or by_autograd
        dtype = torch.float32 if by_autograd else dtype
        named = [(n, p) for n, p in module.named_parameters()]
        trained = [(n, p) for n, p in named if p.requires_grad]
        groups = (
            [(n, p) for n, p in trained if p.ndim > 1],
            [(n, p) for n, p in trained if p.ndim <= 1],
            [(n, p) for n, p in named if not p.requires_grad],
        )
        self.zeroed = zeroed
        self.places: dict[str, tuple[int, torch.Size]] = {}
        ends, end = [], 0
        for group in groups:
            for name, p in group:
                self.places[name] = end, p.shape
                end += _aligned(p.numel())
            ends.append(end)
        _, self.trained, total = ends
        device = named[0][1].device
        self.masters = torch.zeros(total, device=device)
        self.copies = self.masters if dtype == torch.float32 else torch.empty_like(self.masters, dtype=dtype)
        self.gradient = torch.zeros(self.trained, device=device)
        self.slots: dict[str, Slot] = {}
        for name, p in named:
            master = self.part(self.masters, name)
            master.copy_(p.data)
            p.data = master
            p.grad = self.part(self.gradient, name) if p.requires_grad else None
            if not by_autograd:
                slot = Slot(self.part(self.copies, name), p.grad, fresh=not zeroed)
                self.slots[name] = p.slot = slot  # type: ignore[attr-defined]
        self.cast()

    def part(self, flat: Tensor, name: str) -> Tensor:
        """The slice of a flat tensor that belongs to a parameter."""
        begin, shape = self.places[name]
        return flat[begin : begin + shape.numel()].view(shape)

    def span(self, names: list[str]) -> slice:
        """Where a flat tensor holds these parameters, which lie side by side; the gap behind the last one included."""
        places = sorted((self.places[name] for name in names), key=lambda place: place[0])
        begin, (last, shape) = places[0][0], places[-1]
        return slice(begin, last + _aligned(shape.numel()))

    def cast(self) -> None:
        """Make the copies anew, after the masters changed."""
        if self.copies is not self.masters:
            self.copies.copy_(self.masters)

    def complete(self) -> None:
        """After the last backward of an update: gradients that nothing was written to are 0."""
        for slot in self.slots.values():
            if slot.fresh and slot.gradient is not None:
                slot.gradient.zero_()
                slot.fresh = False

    def clear(self) -> None:
        """After the optimiser's step: the next update begins."""
        if self.zeroed:
            self.gradient.zero_()
        for slot in self.slots.values():
            slot.fresh = not self.zeroed
