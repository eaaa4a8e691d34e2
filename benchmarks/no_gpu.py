"""A driver for Triton that says which GPU there is and launches nothing: the launch path of kernels/ on any machine.

    from benchmarks.no_gpu import pretend
    driver = pretend()               from here on, in this process, operators on meta tensors go Triton's way
    driver.on_launch = print         a `Launch` for each kernel that would run
    driver.kernels                   what was compiled, with its machine code

Everything up to the launch itself is Triton's own: the specialisation of arguments, the compilation, the cache in
memory and on disk. Results are memory that nobody wrote. On a machine with a GPU, too, this is for processes of their
own: nothing in them may launch for real afterwards.
"""

import importlib
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._meta_registrations
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.library import Library
from triton.backends.compiler import GPUTarget

from fastdistil.kernels import _backend, attention_tiles, gelu

# Bytes of shared memory that a CTA may have, by compute capability.
SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}

_numbers = itertools.count()


@dataclass(eq=False)
class Kernel:
    """One compilation: a @triton.jit function and what its arguments were specialised to."""

    source: Any
    """triton.compiler.ASTSource."""
    metadata: Any
    """Of the compiled kernel: num_warps, num_stages, shared, ..."""
    cubin: bytes = b""

    @property
    def name(self) -> str:
        """layernorm._forward_kernel, for example."""
        return f"{self.source.fn.module.rpartition('.')[2]}.{self.source.fn.__name__}"


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """Every argument by its name, constexprs included."""


class Driver:
    """What Triton asks of one. Its names are Triton's."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.number = next(_numbers)  # of the device, by which Triton keeps compilations: each driver sees its own
        self.kernels: list[Kernel] = []
        self.on_launch: Callable[[Launch], None] | None = None
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Called once a compilation; the result once a launch."""
        kernel = Kernel(source, metadata)
        self.kernels.append(kernel)
        names = source.fn.arg_names

        def launch(grid_x: int, grid_y: int, grid_z: int, *others: Any) -> None:
            if self.on_launch is not None:  # `others` ends with the arguments
                arguments = dict(zip(names, others[-len(names) :], strict=True))
                self.on_launch(Launch(kernel, (grid_x, grid_y, grid_z), arguments))

        return launch

    def load_binary(self, name: str, cubin: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads); follows `launcher_cls` at once."""
        self.kernels[-1].cubin = cubin
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch], "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int = 0) -> int:
        return 0


# Meta kernels of PyTorch's that exist in Python alone, as far as the trainer calls them; some are wrong in torch 2.11.
SHAPES: dict[str, Callable[..., Tensor]] = {
    "index_select": lambda x, dim, index: x.new_empty((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])),
    "mm.dtype": lambda a, b, dtype: a.new_empty(a.shape[0], b.shape[1], dtype=dtype),
    "mm.dtype_out": lambda a, b, dtype, *, out: out,
    "addmm.dtype": lambda x, a, b, dtype, **_: a.new_empty(a.shape[0], b.shape[1], dtype=dtype),
    "addmm.dtype_out": lambda x, a, b, dtype, *, out, **_: out,
    "abs": torch.empty_like,
    # The seventh argument is the result's dtype.
    "_scaled_mm": lambda a, b, *others: a.new_empty(a.shape[0], b.shape[1], dtype=others[4]),
}


def pretend(arch: int = 90) -> Driver:
    """From here on Triton compiles for compute capability `arch` and serves meta tensors, on which nothing is computed.

    `is_cuda` is true of all tensors, so that operators choose what they choose on a GPU.
    """
    assert not _backend.INTERPRET, "TRITON_INTERPRET=1 compiles nothing"
    driver = Driver(arch)
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    # All are imported before one is changed: they register operators for the devices that they import.
    names = sorted(path.stem for path in Path(_backend.__file__).parent.glob("*.py"))
    for module in [importlib.import_module(f"fastdistil.kernels.{name}") for name in names]:
        if hasattr(module, "TRITON_DEVICES"):
            module.TRITON_DEVICES = ("cuda", "meta")  # type: ignore[attr-defined]
    attention_tiles.architecture = lambda device: arch
    gelu._capability = lambda device: arch // 10
    for name, operator in OPDEFS.items():
        if name.startswith("fastdistil::"):
            operator._abstract_fn = operator._init_fn  # of meta tensors, too, the operator itself
    _use_fast_meta_kernels()
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    # Triton asks whether it is a multiple of 16; of meta tensors it is 0, whatever they are views of.
    torch.Tensor.data_ptr = lambda self: self.storage_offset() * self.element_size()  # type: ignore
    # Autocast knows no meta tensors.
    torch.is_autocast_enabled = lambda *_: False
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment,misc]
    return driver


@cache  # once a process
def _use_fast_meta_kernels() -> Library:
    """PyTorch's meta kernels in C++, which take a microsecond, instead of those in Python, which take up to 200."""
    torch._meta_registrations._meta_lib_dont_use_me_use_register_meta._destroy()  # its Python ones
    library = Library("aten", "IMPL", "Meta")
    for name, function in SHAPES.items():
        library.impl(name, function)
    return library  # which undoes it where nobody holds it
