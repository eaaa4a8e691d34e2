"""The speed of `fastdistil.prepare`, from file to finished shards, against `tokenizers` alone.

    python -m benchmarks.bench_prepare [SOURCE] [--tokenizer T] [--rounds 3]

Both sides in turn in one run, on all cores: the whole command with its start, its reading, cutting, counting, hashing
and writing; and `encode_batch_fast` on the same documents, already in memory. Printed are the median MB of UTF-8 text a
second of each, and the median of the ratios of neighbours: the target is 0.9. The same ratio of processor seconds says
what to expect where other work disturbs the clock.

Without SOURCE the text is the documentation of installed packages. It and data sets are written to a JSONL file first,
repeated to some 60 MB: parsing Python, fetching and starting are not the point.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import docstrings
from fastdistil.data import sources, tokenizer


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def read(spec: str | None) -> tuple[list[str], Path | None]:
    """The documents of a source, and its path where it is files."""
    if spec is None:
        return docstrings.documents(*docstrings.PACKAGES), None
    (source,) = sources.resolve((spec,))
    return list(source.documents()), Path(spec) if source.files else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--tokenizer", default="train:30522")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="put the results into this folder; without it they are printed")
    arguments = parser.parse_args()

    documents, path = read(arguments.source)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    repeats = 1
    if path is None:  # short texts would measure the start of the processes
        repeats = max(1, round(60 / megabytes))
        documents, megabytes = documents * repeats, megabytes * repeats
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "text.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        tokenizer_path = Path(arguments.tokenizer)
        if arguments.tokenizer.startswith("train:"):
            tokenizer_path = Path(folder) / "tokenizer"
            size = int(arguments.tokenizer.removeprefix("train:"))
            made = tokenizer.train(documents[: len(documents) // repeats], size)
            tokenizer.save(made, tokenizer_path, names=tokenizer.SPECIAL_TOKENS, max_length=512)
        peer = tokenizer.load(tokenizer_path)
        bare, whole, bare_cpu, whole_cpu = [], [], [], []
        for number in range(arguments.rounds):
            start, cpu = time.perf_counter(), _cpu_seconds(resource.RUSAGE_SELF)
            for first in range(0, len(documents), 1000):
                peer.encode_batch_fast(documents[first : first + 1000], add_special_tokens=False)
            bare.append(megabytes / (time.perf_counter() - start))
            bare_cpu.append(_cpu_seconds(resource.RUSAGE_SELF) - cpu)
            command = [sys.executable, "-m", "fastdistil.prepare", str(path)]
            command += ["--tokenizer", str(tokenizer_path), "--out", f"{folder}/out{number}"]
            start, cpu = time.perf_counter(), _cpu_seconds(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True)
            whole.append(megabytes / (time.perf_counter() - start))
            whole_cpu.append(_cpu_seconds(resource.RUSAGE_CHILDREN) - cpu)
    result = {
        "source": Path(arguments.source).name if arguments.source else "installed documentation",
        "megabytes": round(megabytes, 1),
        "tokenizers_mb_s": round(statistics.median(bare), 2),
        "prepare_mb_s": round(statistics.median(whole), 2),
        "ratio": round(statistics.median(w / b for w, b in zip(whole, bare, strict=True)), 3),
        "cpu_ratio": round(statistics.median(bare_cpu) / statistics.median(whole_cpu), 3),
        "rounds": arguments.rounds,
    }
    print(json.dumps(result))
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        with (arguments.results / "prepare.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
