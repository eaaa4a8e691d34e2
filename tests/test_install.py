"""Installed as a user would: what is asked for on each system, and the wheel in an environment that has no more.

The environment is a venv of its own, in which there are links to what the base dependencies need and nothing else: no
Triton, DeepSpeed, TensorBoard or transformers, and no compiler.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.launch import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SYSTEMS = {
    "linux": ("linux", "Linux", "x86_64", "x86_64-manylinux_2_28"),
    "macos": ("darwin", "Darwin", "arm64", "aarch64-apple-darwin"),
    "windows": ("win32", "Windows", "AMD64", "x86_64-pc-windows-msvc"),
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OPTIONAL = ("triton", "deepspeed", "tensorboard", "transformers", "matplotlib")
NO_NETWORK = re.compile(r"error sending request|dns error|connect|timed out|network", re.IGNORECASE)


def asked_for(system: str, python: str, extra: str = "") -> set[str]:
    """Names of the packages that an installation there asks pip for."""
    platform, name, machine, _ = SYSTEMS[system]
    here = dict(sys_platform=platform, platform_system=name, platform_machine=machine, python_version=python)
    environment = {**default_environment(), **here, "os_name": "nt" if platform == "win32" else "posix"}
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = map(Requirement, lines)
    return {r.name for r in found if r.marker is None or r.marker.evaluate({**environment, "extra": extra})}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_triton_is_asked_for_on_linux_alone_and_what_is_optional_nowhere(system, python):
    base = asked_for(system, python)
    assert {"torch", "datasets", "tokenizers", "safetensors", "tyro"} <= base
    assert ("triton" in base) == (system == "linux")
    assert not base & (set(OPTIONAL) - {"triton"})
    assert asked_for(system, python, "deepspeed") == {"deepspeed"}
    assert (
        python in PROJECT["requires-python"] or f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    )


@pytest.fixture(scope="module")
def resolved() -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """What uv, which knows the markers and tags of systems that are not here, would install; it installs nothing."""
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if uv is None:
        pytest.skip("uv is not installed")

    def resolve(key: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        words = [uv, "pip", "compile", str(ROOT / "pyproject.toml"), "--only-binary", ":all:", "--quiet"]
        words += ["--no-header", "--no-annotate", "--python-platform", SYSTEMS[key[0]][3], "--python-version", key[1]]
        return subprocess.run(words, capture_output=True, text=True, timeout=300)

    keys = [(system, python) for system in SYSTEMS for python in (PYTHONS[0], PYTHONS[-1])]
    with ThreadPoolExecutor(len(keys)) as pool:  # they wait for the index
        return dict(zip(keys, pool.map(resolve, keys), strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", [PYTHONS[0], PYTHONS[-1]])
def test_wheels_for_all_of_it_are_published(resolved, system, python):
    done = resolved[system, python]
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]:.100}")
    assert done.returncode == 0, done.stderr
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert asked_for(system, python) <= names
    assert ("triton" in names) == (system == "linux")


def closure(names: set[str]) -> set[str]:
    """These distributions and all that they need here, without extras and without what is optional."""
    found: set[str] = set()
    waiting = {canonicalize_name(name) for name in names}
    while waiting:
        name = waiting.pop()
        try:
            needs = distribution(name).requires or ()
        except PackageNotFoundError:  # for another Python
            continue
        found.add(name)
        wanted = [r for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({"extra": ""})]
        waiting |= {canonicalize_name(r.name) for r in wanted} - found - set(OPTIONAL)
    return found


def link(names: set[str], into: Path) -> None:
    """Links to the files of these distributions, by their first names in site-packages."""
    for name in names:
        files = distribution(name).files
        assert files is not None, f"{name} has no list of its files"
        for first in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (into / first).exists():
                (into / first).symlink_to(str(distribution(name).locate_file(first)))


def run(*words: object, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """What a command says, in an environment where PATH holds no compiler."""
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("PYTHONPATH", "CXX")}
    environment |= {"PATH": path or str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def venv(folder: Path, names: set[str]) -> Path:
    """The Python of a new environment in which these distributions are, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    link(names, site)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that is built of the sdist, that is built of the checkout, by an environment without torch."""
    root = tmp_path_factory.mktemp("build")
    checkout = root / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name, follow_symlinks=False)
    python = venv(root / "builder", {"setuptools"})
    build = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    done = run(python, "-c", build, "build_sdist", root, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (sdist,) = root.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    done = run(python, "-c", build, "build_wheel", root, cwd=unpacked)
    assert done.returncode == 0, done.stderr
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """`bin` of an environment into which pip has installed the wheel, beside its base dependencies."""
    root = tmp_path_factory.mktemp("bare")
    python = venv(root, closure(asked_for("linux", f"{sys.version_info.major}.{sys.version_info.minor}") - {"triton"}))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    return python.parent


def test_the_wheel_is_for_any_system_and_holds_what_is_read_at_run_time(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    code = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("fastdistil/**/*.py")}
    code |= {f"fastdistil/kernels/{p.name}" for p in ROOT.glob("kernels/*.py")}
    assert {n for n in names if n.endswith(".py")} == {n for n in code if "__pycache__" not in n}
    page = {f"fastdistil/evaluation/page/{p.name}" for p in ROOT.glob("fastdistil/evaluation/page/*")}
    recipes = {f"fastdistil/run/recipes/{p.name}" for p in ROOT.glob("fastdistil/run/recipes/*")}
    assert len(page) >= 6
    assert len(recipes) >= 8
    assert page | recipes | {"fastdistil/py.typed"} <= set(names)
    assert not [n for n in names if n.endswith(".so") or not n.startswith("fastdistil")]
    assert {f"Provides-Extra: {extra}" for extra in PROJECT["optional-dependencies"]} <= set(metadata.splitlines())


def test_nothing_but_the_base_is_there(bare):
    code = f"import importlib.util as u; print([n for n in {OPTIONAL!r} if u.find_spec(n)])\n"
    code += "from fastdistil.kernels import _backend; print(_backend.__file__); _backend._column_sums_kernel[(1,)]"
    done = run(bare / "python", "-c", code, cwd=bare)
    assert done.stdout.startswith(f"[]\n{bare.parent}"), done.stderr
    assert "served by Triton, which is not installed: `pip install triton` on Linux" in done.stderr


def test_from_text_to_a_model(bare, tmp_path):
    """prepare, pretrain and export by the installed script, as a user types them; several ranks have no ZeRO then."""
    lines = (
        f"the cat number {i} sat on mat {i * 7 % 100} and looked at all the birds in the tree\n" for i in range(800)
    )
    (tmp_path / "text.txt").write_text("".join(lines))
    fastdistil = bare / "fastdistil"
    done = run(fastdistil, "prepare", "text.txt", "--tokenizer", "train:300", "--out", "shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = "pretrain mlm --data.shards shards --student.num-layers 2 --student.hidden-size 32 --student.num-heads 2"
    words += " --student.ffn-size 64 --batch.size 2048 --batch.unit tokens --batch.token-budget 1024"
    words += " --optim.unit updates --optim.duration 2 --engine.device cpu"
    done = run(fastdistil, *words.split(), "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("CPU kernels of csrc/ are not built") == 1
    assert "Traceback" not in said
    done = run(fastdistil, "export", "run", "--out", "model", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}

    code = """
from fastdistil.run.recipes import parse
from fastdistil.training.preflight import resolve
two = resolve(parse(["mlm", "--data.shards", "shards", "--student.init", "model", "--out", "two"]), world_size=2)
print(two.zero_stage, *two.notes, sep="\\n")
"""
    done = run(bare / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.startswith("0\nDeepSpeed is not installed: every rank keeps"), done.stderr
    assert done.stdout.endswith('pip install "fastdistil[deepspeed]" shares it between the ranks\n')


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "pretrain mlm --data.shards x --engine.zero-stage 2",
            'wants deepspeed, not installed here: pip install "fastdistil[deepspeed]"',
        ),
        (
            "evaluate model --task sst2 --data .",
            'wants transformers, sklearn, scipy, not installed here: pip install "fastdistil[eval]"',
        ),
    ],
)
def test_what_is_missing_is_answered_with_its_extra(bare, tmp_path, words, wanted):
    done = run(bare / "fastdistil", *words.split(), cwd=tmp_path)
    assert (done.returncode, wanted in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1
