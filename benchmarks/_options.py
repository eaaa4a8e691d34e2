"""What the benchmarks of operators can be told, and what they make of it: options and cases. Imports no torch before it
must: help and mistakes cost half a second.
"""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _listed(kind: Callable[[str], Any], metavar: str, wrong: str) -> Any:
    """Several values of an option, separated by commas or blanks; ValueError names the one that is wrong."""

    def parse(words: list[str]) -> tuple[Any, ...]:
        found = []
        for word in ",".join(words).split(","):
            try:
                found.append(kind(word.strip()))
            except (ValueError, KeyError):
                raise ValueError(f"wanted {wrong}, separated by commas, got {word!r}") from None
        return tuple(found)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x))] if x else [],
    )


def _size(word: str) -> int:
    if (size := int(word)) < 1:
        raise ValueError
    return size


def _rate(word: str) -> float:
    if not 0 <= (rate := float(word)) < 1:
        raise ValueError
    return rate


Sizes = Annotated[tuple[int, ...], _listed(_size, "INT,INT...", "whole numbers of 1 or more")]
Rates = Annotated[tuple[float, ...], _listed(_rate, "FLOAT,FLOAT...", "probabilities from 0 to below 1")]
Names = Annotated[tuple[str, ...], _listed(str, "NAME,NAME...", "names")]
Dtypes = Annotated[tuple[str, ...], _listed(lambda x: {x: x for x in DTYPES}[x], "fp32,bf16,fp16", "fp32, bf16, fp16")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every benchmark of an operator can be told."""

    known: ClassVar[tuple[str, ...]] = ("ours", "eager", "compile", "liger")
    """The providers there are, on one machine or another."""

    dtype: Dtypes = ()
    """Of the tensors. Without it fp32 and bf16, on a GPU bf16."""
    forward: tyro.conf.FlagCreatePairsOff[bool] = False
    """Time the forward alone. With neither --forward nor --backward: what is usual for the operator."""
    backward: tyro.conf.FlagCreatePairsOff[bool] = False
    """Time the forward with its backward."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to run. None: on the GPU if there is one."""
    threads: int | None = None
    """CPU threads. None: as PyTorch chooses."""
    rounds: int | None = None
    """Turns of each provider; 0 checks, and times nothing. None: as many as fit in the seconds that a case has, 5 to
    100."""
    providers: Names = ()
    """Which to compare. Without it all that this machine has."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A kernel of your own, MODULE:FUNCTION, with the arguments of the public function; may be given several times.
    MODULE is a file of the current folder, without .py, or what Python can import."""
    time_wrong: tyro.conf.FlagCreatePairsOff[bool] = False
    """Time also what computes something else than the definition."""
    machine_code: Literal[80, 89, 90, 100] | None = None
    """Time nothing: compile the Triton kernels of ours and of --also for this compute capability (90: an H100), which
    needs no GPU, and say what their machine code takes."""
    csv: Path | None = None
    """Write a line for each case and provider: sizes, statistics of its rounds, errors, device, versions, commit."""
    plot: Path | None = None
    """Draw the rates of all cases into this PNG."""
    out: Path | None = None
    """Write everything, each round's seconds included, into this JSON file."""
    results: Path | None = None
    """Put the medians into NAME.DEVICE.json of this folder, beside those of other cases. benchmarks/results is that of
    the results that are committed."""

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("rounds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be {least} or more, got {value}")
        for name in self.providers:
            if name not in self.known:
                near = "".join(f" (did you mean {x}?)" for x in difflib.get_close_matches(name, self.known, 1))
                raise ValueError(f"--providers wants some of {','.join(self.known)}, got {name!r}{near}")
        if self.results is not None and (self.providers or self.also or self.rounds == 0):
            raise ValueError(
                "--results is for times of ours beside all its peers: leave --providers, --also and --rounds 0 out"
            )
        for spec in self.also:
            _module_of(spec)
        if self.machine_code is not None and (self.csv or self.plot or self.out or self.results):
            raise ValueError("--machine-code times nothing: leave --csv, --plot, --out and --results out")
        if self.plot is not None and self.rounds == 0:
            raise ValueError("--plot draws times: leave --rounds 0 or --plot out")
        for name in ("matplotlib", "pandas"):
            if self.plot is not None and importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"--plot wants {name}, which is not installed: pip install 'fastdistil[eval]', or leave --plot out"
                )

    @property
    def on(self) -> str:
        """The device: cpu or cuda. Imports torch. ValueError if it is not there."""
        import torch

        if self.machine_code is not None:
            return "cuda"
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise ValueError("--device cuda: PyTorch sees no GPU here: leave --device out, or install its CUDA build")
        return self.device or ("cuda" if there else "cpu")

    def usual(self, cpu: Any, cuda: Any) -> Any:
        """The one of two that is for the device."""
        return cuda if self.on == "cuda" else cpu

    def dtypes(self, *, cpu: Sequence[str] = ("fp32", "bf16"), cuda: Sequence[str] = ("bf16",)) -> list[str]:
        """torch's names of the dtypes that were asked for, or of those that are usual."""
        return [DTYPES[name] for name in self.dtype or self.usual(cpu, cuda)]

    def passes(self, *usual: bool) -> tuple[bool, ...]:
        """Of each thing to be timed whether it has a backward: what was asked for, or what is usual."""
        return tuple(b for b in (False, True) if (self.backward if b else self.forward)) or usual


@dataclass(frozen=True, slots=True)
class Case:
    """An operator at one size."""

    name: str
    """Under which its results are kept."""
    sizes: dict[str, Any]
    """What it is made of by name: columns of the CSV."""
    build: Callable[..., Any]
    """Makes the `_harness.Problem` of `sizes` and the device: inputs, providers and the floor."""

    def __str__(self) -> str:
        passes = {"False": "forward", "True": "backward"}
        return "-".join(passes.get(str(value), str(value)).replace(" ", "") for value in self.sizes.values())


def _module_of(spec: str) -> tuple[str, str]:
    """(module, function) of --also. ValueError if it cannot be; imports nothing but the packages that it lies in."""
    module, _, function = spec.partition(":")
    if module.endswith(".py") or os.sep in module:
        path = Path(module)
        raise ValueError(
            f"--also wants MODULE:FUNCTION, got {spec}: from {path.parent.absolute()} write {path.stem}:{function}"
        )
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(f"--also wants MODULE:FUNCTION, such as my_module:my_gelu, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        near = difflib.get_close_matches(module, [path.stem for path in Path().glob("*.py")], 1)
        hint = f" (did you mean {near[0]}?)" if near else f": there is no {module}.py in {os.getcwd()}"
        raise ValueError(f"--also {spec}: no module {module}{hint}")
    return module, function


def imported(spec: str) -> Callable[..., Any]:
    """The function that --also names. ValueError if its module has none of that name, or cannot be imported."""
    module, name = _module_of(spec)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"--also {spec}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(found, name, None)
    if not callable(function):
        names = [n for n, x in vars(found).items() if callable(x) and getattr(x, "__module__", "") == module]
        raise ValueError(f"--also {spec}: {module} has no function {name}; it has {', '.join(names) or 'none'}")
    return function
