"""What is fuzzed: readers, each with a good file to damage and the rule that its answer must keep.

The rule is the same for all: a ValueError or OSError that names the file, or a result; never another exception, a
hang or wild memory. And damage must not pass in silence: what a reader accepts is compared with the good file, as far
as anything in the folder can tell.
"""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdistil import evaluate, export, prepare
from fastdistil.data import shards, tokenizer
from fastdistil.evaluation import squad, tasks
from fastdistil.model import weights
from fastdistil.run import checkpoint, folder, metrics
from fastdistil.run.config import Config, from_json, resume_differences, to_json
from tests.support import toy
from tests.support.checkpoints import save

AWKWARD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308),
    *("", "x", "\x00", "../x", "é" * 50, [], [[]], {}, [0] * 50),
    *({"a": {"b": None}}, "1", 10**400, float("inf"), float("nan"), "\ud800"),
]
PIECES = [
    *(b'"', b"{", b"}", b"[", b",", b"\x00", b"\xff\xfe", b"1e999", b"-1", b"null", b"NaN", b"[" * 3000),
    *(b"\\ud800", b"9" * 5000, b"\xef\xbb\xbf", b"\r\n"),
]
MOST_MEMORY = 256 * 2**20
LONGEST_S = 2.0


def exchange(value: Any, rng: random.Random) -> Any:
    """JSON with one value, key or item exchanged, removed or added, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        other = dict(value)
        choice = rng.random()
        if choice < 0.1:
            del other[key]
        elif choice < 0.15:
            other[rng.choice(["x", "", "__class__"])] = rng.choice(AWKWARD)
        else:
            other[key] = exchange(value[key], rng)
        return other
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        item = [] if rng.random() < 0.2 else [exchange(value[at], rng)]
        return [*value[:at], *item, *value[at + 1 :]]
    return rng.choice(AWKWARD)


def mutate(good: bytes, rng: random.Random) -> bytes:
    """A value of JSON exchanged, the header of a safetensors file too; or bytes flipped, cut, doubled and inserted."""
    if rng.random() < 0.5:
        for start in (0, 8):
            end = 8 + int.from_bytes(good[:8], "little") if start else len(good)
            try:
                text = json.dumps(exchange(json.loads(good[start:end]), rng)).encode()
            except (ValueError, RecursionError):
                continue
            return (len(text).to_bytes(8, "little") if start else b"") + text + good[end:]
    content = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at = rng.randrange(len(content) + 1)
        choice = rng.randrange(5)
        if choice == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            del content[at:]
        elif choice == 2:
            content[at:at] = rng.choice(PIECES)
        elif choice == 3:
            del content[at : at + rng.randrange(1, 40)]
        else:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
    return bytes(content)


class Target:
    """A reader, and the file in a folder of its own that is damaged for it.

    Args:
        read: folder -> what must be the same as for the good file, or None where nothing can tell.
        least_refused: share of the mutations that must be refused, or the fuzzing would show nothing.
    """

    def __init__(self, folder: Path, name: str, read: Callable[[Path], object], least_refused: float) -> None:
        self.folder, self.path, self.read = folder, folder / name, read
        self.least_refused = least_refused
        self.good = self.path.read_bytes()
        self.wanted = read(folder)

    def refuses(self, content: bytes) -> bool:
        """Whether the file is refused with this content.

        Raises what a reader must not raise, and AssertionError where it breaks the rule.
        """
        self.path.write_bytes(content)
        begin = time.process_time()
        try:
            assert self.read(self.folder) == self.wanted, "damage was accepted"
            return False
        except (ValueError, OSError) as error:
            message = str(error)
            named = self.folder.name in message or self.path.name in message
            if len(message) <= 20 or not named:
                raise AssertionError(f"an error that does not say enough: {error!r}") from error
            return True
        finally:
            self.path.write_bytes(self.good)
            assert time.process_time() - begin < LONGEST_S, "it hung"

    def run(self, rng: random.Random) -> bool:
        """Whether a mutation is refused."""
        return self.refuses(mutate(self.good, rng))


@contextmanager
def bounded_memory() -> Iterator[None]:
    """In here more than MOST_MEMORY beyond what the process has is a MemoryError, or ends it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _read_shards(folder: Path) -> object:
    """All but what nothing else in the folder says: counts of what was dropped, arguments, a greater maximal length."""
    opened = shards.Shards(folder)
    meta = opened.meta
    words = folder / "tokenizer"
    if (tokenizer.vocabulary_sha256(words), tokenizer.special_ids(words)) != (meta.tokenizer_sha256, meta.special_ids):
        raise ValueError(f"{folder}: preflight refuses this")
    told = meta.dtype, meta.vocab_size, meta.num_sequences, meta.num_tokens, meta.counts_sha256, meta.shards
    return told, opened.counts.tobytes(), opened.lengths.tobytes(), opened.sequence(0).tobytes()


def _read_run(run: Path) -> None:
    record = folder.read(run)
    try:
        from_json(record["config"])
    except ValueError as error:  # it does not know its file
        raise ValueError(f"{run}: a configuration: {error}") from error
    resume_differences(record["config"], to_json(Config()))


def _read_checkpoint(folder: Path) -> object:
    found = folder / "checkpoints" / "update-00000010"
    if (reason := checkpoint.verify(found)) is not None:
        raise ValueError(f"{found}: {reason}")
    tensors, state = checkpoint.load_weights(folder, 10)
    return {name: t.tolist() for name, t in tensors.items()}, state


def _read_model(folder: Path) -> object:
    """The sizes: other numbers in a tensor, another dropout or number of heads are as valid."""
    model = weights.load_masked_lm(folder, need_head=True)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _read_tokenizer(folder: Path) -> None:
    tokenizer.load(folder).encode("w1 w2 [MASK] Wörter, and more")


def _read_squad(folder: Path) -> None:
    squad._read(folder / "train.json")


def _read_results(folder: Path) -> None:
    config = evaluate.EvaluateConfig(models=("m",), task=("sst2",), data=str(folder))
    results = evaluate.Results(folder / "evaluation.json", config)
    evaluate.table(results.record)


def _read_progress(folder: Path) -> None:
    config = prepare.PrepareConfig(sources=("x",), tokenizer="x", out=folder, workers=1)
    progress = prepare._open_folder(config, {"max_length": 3})
    assert progress is not None
    prepare._finished_before(progress, folder / prepare.PROGRESS_FILE)


def _read_metrics(folder: Path) -> None:
    export._last_metrics(folder / "metrics.jsonl", 10)
    metrics._drop_after(folder / "metrics.jsonl", 2)


def make(root: Path) -> dict[str, Target]:
    """All targets by name, with their good files below `root`."""
    for name in ("run", "words", "squad", "results", "progress", "metrics"):
        (root / name).mkdir()

    def write(name: str, record: Any) -> None:
        (root / name).write_text(json.dumps(record))

    toy.make_shards(root / "shards", num_sequences=20)
    toy.make_teacher(root / "teacher", root / "shards", num_layers=1)
    write("run/config.json", {"config": to_json(Config()), "student": {}, "layers": [0, 2]})
    save(root / "saved", 10)
    words = tokenizer.load(root / "shards" / "tokenizer")
    tokenizer.save(words, root / "words", names=tokenizer.SPECIAL_TOKENS, max_length=48)
    shutil.copytree(root / "shards" / "tokenizer", root / "list")
    state = safetensors.torch.load_file(root / "teacher" / "model.safetensors")
    for name in ("parts", "pickled"):
        shutil.copytree(root / "teacher", root / name)
    torch.save(state, root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "model.safetensors").unlink()
    (root / "parts" / "model.safetensors").rename(root / "parts" / "a.safetensors")
    write("parts/model.safetensors.index.json", {"weight_map": dict.fromkeys(state, "a.safetensors")})
    question = {"id": "1", "question": "w4?", "answers": [{"text": "w2", "answer_start": 3}]}
    paragraph = {"context": "w1 w2 w3", "qas": [question, question]}
    write("squad/train.json", {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]})
    settings = asdict(tasks.Settings()) | {"data": str(root / "results"), "teacher": None}
    scores = {"sst2": {"seeds": {"1": {"score": 0.5}, "2": {"score": 0.7}}, "median": 0.6, "num_train": 9}}
    write("results/evaluation.json", {"model": "m", "settings": settings, "tasks": scores})
    shard = shards.read_meta(root / "shards").shards[0]
    entry = {"shard": asdict(shard), "text": asdict(prepare.ShardText(num_batches=1, text_sha256="x"))}
    write("progress/progress.json", {"preparation": {"max_length": 3}, "tokenizer_sha256": None, "shards": [entry]})
    lines = [json.dumps({"split": "train", "update": i, "loss": 0.5}) for i in range(3)]
    (root / "metrics" / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    inside = "checkpoints/update-00000010/"
    return {
        "meta": Target(root / "shards", "meta.json", _read_shards, 0.7),
        "counts": Target(root / "shards", "counts.npy", _read_shards, 0.9),
        "offsets": Target(root / "shards", "shard-00000.offsets", _read_shards, 0.9),
        "tokens": Target(root / "shards", "shard-00001.tokens", _read_shards, 0.9),
        "run": Target(root / "run", "config.json", _read_run, 0.4),
        "manifest": Target(root / "saved", f"{inside}manifest.json", _read_checkpoint, 0.8),
        "state": Target(root / "saved", f"{inside}state.json", _read_checkpoint, 0.9),
        "moments": Target(root / "saved", f"{inside}optimizer.safetensors", _read_checkpoint, 0.9),
        "architecture": Target(root / "teacher", "config.json", _read_model, 0.5),
        "safetensors": Target(root / "teacher", "model.safetensors", _read_model, 0.7),
        "safetensors index": Target(root / "parts", "model.safetensors.index.json", _read_model, 0.4),
        "pickle of weights": Target(root / "pickled", "pytorch_model.bin", _read_model, 0.5),
        "tokenizer": Target(root / "words", "tokenizer.json", _read_tokenizer, 0.6),
        "tokenizer config": Target(root / "words", "tokenizer_config.json", _read_tokenizer, 0.1),
        "special tokens": Target(root / "words", "special_tokens_map.json", _read_tokenizer, 0.2),
        "vocabulary": Target(root / "list", "vocab.txt", _read_tokenizer, 0.1),
        "squad": Target(root / "squad", "train.json", _read_squad, 0.4),
        "results": Target(root / "results", "evaluation.json", _read_results, 0.4),
        "progress": Target(root / "progress", "progress.json", _read_progress, 0.4),
        "metrics": Target(root / "metrics", "metrics.jsonl", _read_metrics, 0.0),  # a damaged line is left out
    }
