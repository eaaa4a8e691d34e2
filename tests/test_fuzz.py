"""Damaged JSON, vocabularies and headers: our error, naming the file, or a valid result. Never a crash, a hang, or wild memory.

A mutation is made of a good file: bytes flipped, cut, doubled and inserted, JSON values exchanged for awkward ones. Hypothesis drives some
hundred of each in every test run, `make soak` a million in all (FASTDISTIL_FUZZ_EXECUTIONS changes that).
"""

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdistil import architecture, checkpoint, run_folder, shards, tokenizer, weights
from fastdistil.config import Config, from_json, resume_differences, to_json
from tests import toy
from tests.test_checkpoint import save

AWKWARD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, "", "x", "\x00", "../x", "é" * 50, [], [[]], {}, [0] * 50,
    {"a": {"b": None}}, "1", 10**400, float("inf"), float("nan"),
]  # fmt: skip
PIECES = [b'"', b"{", b"}", b"[", b",", b"\x00", b"\xff\xfe", b"1e999", b"-1", b"null", b"NaN", b"[" * 3000, b"\\ud800", b"9" * 5000, b"\xef\xbb\xbf", b"\r\n"]  # fmt: skip


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
        return [
            *value[:at],
            *([] if rng.random() < 0.2 else [exchange(value[at], rng)]),
            *value[at + 1 :],
        ]
    return rng.choice(AWKWARD)


def mutate(good: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        try:
            return json.dumps(exchange(json.loads(good), rng)).encode()
        except ValueError:
            pass
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
    """A reader, the file it reads in a folder of its own, and that file's good content."""

    def __init__(self, folder: Path, name: str, read: Callable[[Path], object]) -> None:
        self.folder, self.path, self.read = folder, folder / name, read
        self.good = self.path.read_bytes()

    def run(self, rng: random.Random) -> bool:
        """Whether a mutation was refused; raises what a reader must not raise."""
        self.path.write_bytes(mutate(self.good, rng))
        begin = time.perf_counter()
        try:
            self.read(self.folder)
            return False
        except (ValueError, OSError) as error:
            message = str(error)
            assert len(message) > 20, message
            assert self.folder.name in message or self.path.name in message, message
            return True
        finally:
            assert time.perf_counter() - begin < 2
            self.path.write_bytes(self.good)


def read_run(folder: Path) -> None:
    record = run_folder.read(folder)
    try:
        from_json(record["config"])
    except ValueError as error:  # it does not know its file
        raise ValueError(f"{folder}: a configuration: {error}") from error
    resume_differences(record["config"], to_json(Config()))


def read_checkpoint(folder: Path) -> None:
    """Accepted only where the mutation says the same."""
    found = folder / "checkpoints" / "update-00000010"
    reason = checkpoint.verify(found)
    if reason is not None:
        raise ValueError(f"{found}: {reason}")
    same = all(json.loads((found / n).read_bytes()) == json.loads((folder / n).read_bytes()) for n in ("manifest.json", "state.json"))  # fmt: skip
    assert same, "damage was accepted"


def read_words(folder: Path) -> None:
    tokenizer.read_vocabulary(folder)
    tokenizer.special_ids(folder)


def read_meta_and_files(folder: Path) -> None:
    opened = shards.Shards(folder)
    assert opened.meta.num_tokens == int(opened.lengths.sum())


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    root = tmp_path_factory.mktemp("fuzz")
    toy.make_shards(root / "shards", num_sequences=20)
    toy.make_teacher(root / "teacher", root / "shards")
    (root / "run").mkdir()
    record = {"config": to_json(Config()), "student": {}, "layers": [0, 2]}
    (root / "run" / "config.json").write_text(json.dumps(record))
    folder = save(root / "saved", 10)
    for name in ("manifest.json", "state.json"):
        shutil.copy(folder / name, root / "saved" / name)
    (root / "words").mkdir()
    from tokenizers import Tokenizer, models

    words = {w: i for i, w in enumerate(toy.VOCABULARY)}
    Tokenizer(models.WordPiece(words, unk_token="[UNK]")).save(
        str(root / "words" / "tokenizer.json")
    )  # type: ignore[call-arg]
    (root / "words" / "tokenizer_config.json").write_text('{"unk_token": "[UNK]", "pad_token": {"content": "[PAD]"}}')  # fmt: skip
    shutil.copytree(root / "shards" / "tokenizer", root / "list")

    def load(folder: Path) -> None:
        weights.load_masked_lm(folder, need_head=True)

    inside = "checkpoints/update-00000010/"
    return {
        "shards": Target(root / "shards", "meta.json", read_meta_and_files),
        "counts": Target(root / "shards", "counts.npy", read_meta_and_files),
        "run": Target(root / "run", "config.json", read_run),
        "manifest": Target(root / "saved", f"{inside}manifest.json", read_checkpoint),
        "state": Target(root / "saved", f"{inside}state.json", read_checkpoint),
        "architecture": Target(root / "teacher", "config.json", lambda f: architecture.read_architecture(f)),
        "tokenizer": Target(root / "words", "tokenizer.json", read_words),
        "tokenizer config": Target(root / "words", "tokenizer_config.json", read_words),
        "vocabulary": Target(root / "list", "vocab.txt", read_words),
        "safetensors": Target(root / "teacher", "model.safetensors", load),
    }  # fmt: skip


NAMES = ("shards", "counts", "run", "manifest", "state", "architecture", "tokenizer", "tokenizer config", "vocabulary", "safetensors")  # fmt: skip
# Of these a mutation may say something else that is as valid: another dropout, another word, other numbers in a tensor.
MAY_BE_VALID = {"shards": 0.5, "counts": 0.9, "manifest": 0.8, "state": 0.8}
"""Least share of refusals elsewhere in the table: damage there must not pass."""


@pytest.mark.parametrize("name", NAMES)
def test_some_hundred_mutations(targets, name):
    target, refused = targets[name], []

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def fuzz(rng: random.Random) -> None:
        refused.append(target.run(rng))

    fuzz()
    target.read(target.folder)  # the good one is still good
    assert sum(refused) / len(refused) > MAY_BE_VALID.get(name, 0.2)


@pytest.mark.soak
def test_a_million_mutations(targets):
    executions = int(os.environ.get("FASTDISTIL_FUZZ_EXECUTIONS", "1000000"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in NAMES:
        begin, count = time.perf_counter(), executions // len(NAMES)
        refused = 0
        for seed in range(count):
            try:
                refused += targets[name].run(random.Random(seed))
            except BaseException as error:
                raise AssertionError(f"{name}, seed {seed}") from error
        seconds = time.perf_counter() - begin
        print(
            f"{name}: {count:,} executions, {refused / count:.1%} refused, {count / seconds:,.0f} a second"
        )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024, f"{grown} KiB"


def test_awkward_text_becomes_tokens_or_an_error(tmp_path):
    """NULs, broken UTF-8, a BOM, CRLF, half a surrogate pair, an empty document, an empty file, a line of 10 MB."""
    from tests import launch

    words = "the quick brown fox jumps over a lazy dog and runs away from it again"
    contents = {
        "nul": words.encode() + b"\x00\x00" + words.encode(),
        "broken": b"\xff\xfe" + words.encode() + b"\xc3\x28 \xed\xa0\x80",
        "bom": b"\xef\xbb\xbf" + words.encode(),
        "crlf": b"\r\n".join([words.encode()] * 5),
        "empty": b"",
        "blank": b"\n\n \n\t\n",
        "long": (words * 150_000).encode(),
    }
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words.split()))]))  # fmt: skip
    results = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        out = tmp_path / f"{name}.shards"
        done = launch.run("fastdistil.prepare", tmp_path / f"{name}.txt", "--tokenizer", tmp_path / "vocab.txt", "--out", out, "--workers", 1, "--max-length", 128, ok=False)  # fmt: skip
        assert done.returncode in (0, 2), (name, done.stderr)
        assert "Traceback" not in done.stderr, name
        results[name] = shards.Shards(out).meta.num_tokens if done.returncode == 0 else done.stderr
    for name in ("empty", "blank"):
        assert "error:" in results[name], name
    assert results["bom"] == len(words.split()) + 2  # the mark is no word
    assert results["long"] > 1_500_000
