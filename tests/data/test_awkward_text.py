"""Text that prepare is given and nobody meant: the right tokens or our error, in bounded memory."""

import json
from pathlib import Path

import pytest

from fastdistil import prepare
from fastdistil.data import shards
from tests.support import launch

WORDS = "the quick brown fox jumps over a lazy dog and runs away from it again"
NUM_WORDS = len(WORDS.split())


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS.split()))]))
    return path


TEXT: dict[str, tuple[bytes, int | str]] = {
    "nul.txt": (WORDS.encode() + b"\x00\x00 " + WORDS.encode(), 2 * NUM_WORDS + 2),
    "broken.txt": (WORDS.encode() + b"\n\xff\xfe \xc3\x28", r"broken\.txt, line 2: byte \d+ \(0xff\) is not UTF-8"),
    "surrogate.txt": (b"\xed\xa0\x80 " + WORDS.encode(), r"line 1: byte 0 \(0xed\) is not UTF-8"),
    "bom.txt": (b"\xef\xbb\xbf" + WORDS.encode(), NUM_WORDS + 2),
    "crlf.txt": (b"\r\n".join([WORDS.encode()] * 5), 5 * (NUM_WORDS + 2)),
    "surrogate.jsonl": (json.dumps({"text": f"{WORDS} \ud800"}).encode(), NUM_WORDS + 3),  # one unknown
    "documents.jsonl": (b'{"text": ""}\n{"text": null}\n\n' + json.dumps({"text": WORDS}).encode(), NUM_WORDS + 2),
    "nested.jsonl": (b'{"text": ' + b"[" * 5000, r"nested\.jsonl, line 1: not JSON"),
    "empty.txt": (b"", "no sequence of 12 or more tokens in 0 documents"),
    "blank.txt": (b"\n\n \n\t\r\n", "no sequence of 12 or more tokens in 0 documents"),
    "cut.txt.gz": (b"\x1f\x8b\x08\x00", "cannot be read to its end"),
}
"""By the name of a file: its content, and the number of tokens that it gives or the error."""


@pytest.mark.parametrize("name", TEXT)
def test_awkward_text_becomes_tokens_or_an_error(tmp_path, vocabulary, name):
    content, wanted = TEXT[name]
    (tmp_path / name).write_bytes(content)
    source, out = str(tmp_path / name), tmp_path / "out"
    config = prepare.PrepareConfig(sources=(source,), tokenizer=str(vocabulary), out=out, workers=1)
    if isinstance(wanted, int):
        prepare.prepare(config)
        assert shards.Shards(config.out).meta.num_tokens == wanted
    else:
        with pytest.raises(ValueError, match=wanted):
            prepare.prepare(config)


MEASURED = """
import resource
from pathlib import Path
from fastdistil import prepare
if __name__ == "__main__":
    assert prepare.main() == 0
    # not ru_maxrss, which keeps what the process that started this one had
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("megabytes", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_a_long_line_is_cut_in_bounded_memory(tmp_path, vocabulary, megabytes):
    """A document is held whole, in a few copies, and an int of its tokens; but no object a token."""
    count = megabytes * 10**6 // (len(WORDS) + 1)
    (tmp_path / "long.txt").write_text(f"{WORDS} " * count)
    (tmp_path / "measured.py").write_text(MEASURED)
    options = launch.options(tokenizer=vocabulary, out=tmp_path / "out", workers=1)
    done = launch.run(tmp_path / "measured.py", tmp_path / "long.txt", *options, script=True)
    assert shards.Shards(tmp_path / "out").meta.num_tokens > count * NUM_WORDS
    reader_mib, worker_mib = map(int, done.stdout.split())
    print(f"{megabytes} MB: {reader_mib} MiB, the worker {worker_mib} MiB")
    assert max(reader_mib, worker_mib) < 300 + 20 * megabytes
