"""Fuzzing led by the coverage of our code, in a process of its own that libFuzzer ends: NAME COUNT FOLDER.

NAME is a target of fuzz_targets.py, COUNT the executions, FOLDER an empty one for its files.
"""

import random
import sys
from pathlib import Path

import atheris  # type: ignore

with atheris.instrument_imports(include=["fastdistil"]):  # type: ignore
    from tests.support import fuzz_targets

name, executions, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
target = fuzz_targets.make(root)[name]
corpus = root / "corpus"
corpus.mkdir()
(corpus / "good").write_bytes(target.good)


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    return fuzz_targets.mutate(data, random.Random(seed))[:max_size]


atheris.Setup(
    [
        sys.argv[0],
        f"-runs={executions}",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=200000",
        f"-artifact_prefix={root}/",
        str(corpus),
    ],
    target.refuses,  # type: ignore
    custom_mutator=mutated,
)
atheris.Fuzz()
