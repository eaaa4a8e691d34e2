"""What every kernel file needs to become a torch operator, and nothing else."""

import os

# Triton's interpreter runs kernels on CPU tensors. It is how this project tests them without a GPU,
# and it has to be chosen before the first @triton.jit, so it is read once, here.
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Devices that a Triton launcher serves. Without the interpreter the CPU entry of an operator is left
# to csrc/, or to the plain PyTorch kernel that fastdistil.ops registers where that is not built.
TRITON_DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRET else ("cuda",)

# For every launch: `a * b + c` in one rounding, said aloud because Triton 3.10 turns it off by default.
LAUNCH_OPTIONS: dict[str, bool] = {"enable_fp_fusion": True}
