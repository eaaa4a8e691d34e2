"""Builds the CPU kernels of csrc/, once for AVX-512 and once for AVX2, when torch is importable at build time.

Use `pip install --no-build-isolation -e .`. Without torch in the build environment, or on another kind of processor,
the package installs Python alone, and CPU tensors run the plain PyTorch kernels. kernels/_backend.py imports the build
that the processor can run: two modules, instead of a switch inside one, keep each instruction set in a library of its
own.
"""

import platform
from glob import glob

from setuptools import setup

INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    setup()
else:
    on_x86_linux = platform.machine() == "x86_64" and platform.system() == "Linux"
    setup(
        ext_modules=[
            CppExtension(
                f"fastdistil._C_{name}",
                sorted(glob("csrc/*.cpp")),
                depends=glob("csrc/*.h"),
                # The capability macros choose at::vec's lanes and the namespace they live in.
                extra_compile_args=[
                    "-O3",
                    "-g0",  # Python's own flags ask for debug information: ten times the size
                    "-fopenmp",
                    # Identical rows must cost exactly 0: q - p, contracted, is q unrounded less p rounded.
                    "-ffp-contract=off",
                    f"-DFASTDISTIL_MODULE=_C_{name}",
                    f"-DCPU_CAPABILITY={name.upper()}",
                    f"-DCPU_CAPABILITY_{name.upper()}",
                    *flags,
                ],
                extra_link_args=["-fopenmp"],
                py_limited_api=True,
            )
            for name, flags in INSTRUCTION_SETS.items()
            if on_x86_linux
        ],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
