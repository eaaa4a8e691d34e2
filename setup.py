"""What pyproject.toml cannot say: where kernels/ lies, and the CPU kernels of csrc/, for AVX-512 and for AVX2.

`pip install .` builds in an environment without torch, and installs Python alone, for any system: CPU tensors run the
plain PyTorch kernels. `pip install --no-build-isolation .`, where torch is installed and there is a C++ compiler, builds
csrc/ for x86-64 Linux. kernels/_backend.py imports the build that the processor can run, and says where there is none:
two modules, instead of a switch inside one, keep each instruction set in a library of its own.
"""

import platform
import shutil
from glob import glob

from setuptools import find_namespace_packages, setup

INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
KERNELS = "fastdistil.kernels"
# fastdistil/kernels is a symlink, which git on Windows leaves as a file: its target is named instead.
found = find_namespace_packages(include=["fastdistil", "fastdistil.*"], exclude=[KERNELS, "*.__pycache__"])
packages = {"packages": [*found, KERNELS], "package_dir": {KERNELS: "kernels"}}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    setup(**packages)
else:
    on_x86_linux = platform.machine() == "x86_64" and platform.system() == "Linux"
    can_build = on_x86_linux and shutil.which(get_cxx_compiler()) is not None
    setup(
        **packages,
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
            if can_build
        ],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
