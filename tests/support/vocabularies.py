"""Small tokenizers of every kind that a teacher may have, as folders of other people's making."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

TEXTS = [
    "Anna follows the old river, and the kernel!",
    "Ännä  crosses\tthe bridge. naïve Zoë",
    "garden's 12345 engine-room (quiet)",
    "the mrnavaccine of Old-Town kernel! kernel!s mrnavaccines",
    "a\u200bb \x07 c \ufffd d \u00ad e\u0301",
    "中文 東京 tea ﬁ İstanbul straße Straße",
    "emoji 😀 and 👩‍👧 flags 🇩🇪",
    "abcdefghij letters " + "x" * 120,
    "the [MASK] engine [SEP] quiet[MASK]river",
    "the <mask> engine <mask>. a<mask>b <mask> ",
    "code:\n        blanks in a row |||EMAIL_ADDRESS||| [unused7] <|endoftext|>  ",
    "blanks   before\n\nand after \u3000 ",
    " a blank first",
    "",
]
PAIRS = [("Anna crosses the river.", "the <mask> engine"), ("a [MASK] b", ""), ("中文", "Zoë 12")]
BERTS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTAS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
RENAMED = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
_WORDS = [
    "anna",
    "follows",
    "crosses",
    "the",
    "old",
    "river",
    "and",
    "kernel",
    "bridge",
    "garden",
    "engine",
    "room",
    "quiet",
    "letters",
    "tea",
    "a",
    "b",
]
_TEXT = [*TEXTS, "the old river and the quiet garden crosses the engine room by the bridge", "Anna follows the kernel"]


def pieces(*, cased: bool) -> list[str]:
    """A WordPiece vocabulary of BERT's special tokens, letters, figures and words."""
    letters = "abcdefghijklmnopqrstuvwxyz" + ("ABCDEFGHIJKLMNOPQRSTUVWXYZäöüëÄ" if cased else "") + "0123456789"
    words = [*_WORDS, *(word.capitalize() for word in _WORDS if cased)]
    longer = [word for word in words if len(word) > 1]
    return [*BERTS, *letters, *(f"##{c}" for c in letters), *".,!'-()[]<>", "中", "文", "東", "京", *longer]


def write_json(folder: Path, name: str, record: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


def write_vocab(folder: Path, tokens: list[str], config: dict[str, Any] | None = None) -> Path:
    """A vocab.txt, with a tokenizer_config.json where there is a `config`."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    if config is not None:
        write_json(folder, "tokenizer_config.json", config)
    return folder


def word_piece(
    folder: Path,
    *,
    cased: bool = False,
    added: tuple[AddedToken, ...] = (),
    said: dict[str, Any] | None = None,
    **parts,
) -> Path:
    """A tokenizer.json like BERT's but for `parts`, as transformers saves a tokenizer of one's own making."""
    tokens = {token: index for index, token in enumerate(pieces(cased=cased))}
    model = {name: parts.pop(name) for name in ("max_input_chars_per_word",) if name in parts}
    made: Any = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]", **model))  # type: ignore[call-arg]
    made.add_special_tokens(BERTS)
    made.add_tokens(list(added))
    template = {"single": "[CLS]:0 $A:0 [SEP]:0", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    usual = {
        "normalizer": norm.BertNormalizer(lowercase=not cased),
        "pre_tokenizer": pre.BertPreTokenizer(),
        "post_processor": processors.TemplateProcessing(**template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]),
        "decoder": decoders.WordPiece(),
    }
    for name, part in (usual | parts).items():
        setattr(made, name, part)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names, **(said or {})}
    write_json(folder, "tokenizer_config.json", config)
    return folder


def byte_level(folder: Path, *, files: str = "tokenizer", lstrip: bool = True, space: bool = False) -> Path:
    """RoBERTa's: a tokenizer.json that names no special token, or, by `files`, vocab.json and merges.txt alone."""
    made = ByteLevelBPETokenizer(add_prefix_space=space)
    made.train_from_iterator(_TEXT * 20, vocab_size=420, special_tokens=ROBERTAS, show_progress=False)
    folder.mkdir(parents=True)
    if files == "vocab":
        made.save_model(str(folder))
        return folder
    raw: Any = Tokenizer.from_str(made.to_str())
    raw.add_special_tokens([AddedToken("<mask>", lstrip=lstrip, special=True, normalized=False)])
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=space)
    raw.save(str(folder / "tokenizer.json"))
    write_json(folder, "tokenizer_config.json", {"model_max_length": 512})
    return folder


def modernbert(folder: Path) -> Path:
    """ModernBERT's: byte-level BPE that begins with other people's tokens, runs of blanks, BERT's specials, spares."""
    text: Any = Tokenizer(models.BPE())
    text.normalizer, text.pre_tokenizer, text.decoder = norm.NFC(), pre.ByteLevel(False), decoders.ByteLevel()
    first = ["|||IP_ADDRESS|||", "<|padding|>"]
    how: dict[str, Any] = {"initial_alphabet": pre.ByteLevel.alphabet(), "show_progress": False}
    text.train_from_iterator(_TEXT * 20, trainers.BpeTrainer(vocab_size=420, special_tokens=first, **how))
    text.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    text.add_tokens([AddedToken(f"|||{name}|||", normalized=True) for name in ("EMAIL_ADDRESS", "PHONE_NUMBER")])
    mask = AddedToken("[MASK]", lstrip=True, special=True, normalized=False)
    text.add_special_tokens(["<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", mask])
    text.add_tokens([AddedToken(f"[unused{n}]", normalized=True) for n in range(83)])
    ids = [(name, text.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    template = {"single": "[CLS]:0 $A:0 [SEP]:0", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    text.post_processor = processors.TemplateProcessing(**template, special_tokens=ids)
    folder.mkdir(parents=True)
    text.save(str(folder / "tokenizer.json"))
    added = {str(token.pop("id")): token for token in json.loads(text.to_str())["added_tokens"]}
    config = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "mask", "pad", "sep", "unk")}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": True}
    config |= {"model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}}
    write_json(folder, "tokenizer_config.json", config | {"added_tokens_decoder": added})
    return folder


def unigram(folder: Path, *, split: bool = True) -> Path:
    """XLM-RoBERTa's: sentence pieces with scores, blanks as part of words, and a mask that takes its blank along."""
    letters = sorted(set("".join(_TEXT)) - set(" \t\n\x07"))
    scored = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    scored += [(f"▁{word}", -2.0 - i / 10) for i, word in enumerate(_WORDS)] + [("▁", -4.0)]
    scored += [(letter, -5.0) for letter in letters] + [("<mask>", 0.0)]
    made: Any = Tokenizer(models.Unigram(scored, unk_id=3))
    made.normalizer = norm.Sequence([norm.NFKC(), norm.Replace(" {2,}", " ")])
    made.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()]) if split else pre.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    pair = "<s> $A </s> </s> $B </s>"
    specials = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=specials)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "XLMRobertaTokenizer"}
    write_json(folder, "tokenizer_config.json", names)
    return folder


def added_beside(folder: Path) -> Path:
    """A vocab.txt with the added_tokens.json of old releases."""
    tokens = pieces(cased=False)
    write_vocab(folder, tokens, {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    write_json(folder, "added_tokens.json", {"[plantname]": len(tokens), "mrnavaccine": len(tokens) + 1})
    return folder


_FLAGS = (
    AddedToken("mrnavaccine"),
    AddedToken("Old-Town", normalized=False),
    AddedToken("kernel!", single_word=True),
    AddedToken("quiet", rstrip=True, lstrip=True),
    AddedToken("<extra>", special=True, normalized=False),
)
_digits = pre.Sequence([pre.Digits(individual_digits=True), pre.BertPreTokenizer()])
_simple = norm.Sequence([norm.NFD(), norm.Lowercase(), norm.StripAccents()])
_uncleaned = norm.BertNormalizer(lowercase=True, clean_text=False, strip_accents=False)
_bert_processing = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
KINDS: dict[str, Callable[[Path], Path]] = {
    "bert": word_piece,
    "bert-cased": lambda f: write_vocab(f, pieces(cased=True), {"do_lower_case": False}),
    "bert-accents": lambda f: word_piece(f, normalizer=norm.BertNormalizer(lowercase=True, strip_accents=False)),
    "bert-no-chinese": lambda f: word_piece(f, normalizer=norm.BertNormalizer(handle_chinese_chars=False)),
    "whitespace": lambda f: word_piece(f, cased=True, pre_tokenizer=pre.WhitespaceSplit()),
    "no-cleaning": lambda f: word_piece(f, normalizer=_uncleaned),
    "own-normalizer": lambda f: word_piece(f, normalizer=_simple, pre_tokenizer=_digits),
    "digits": lambda f: word_piece(f, pre_tokenizer=_digits),
    "long-words": lambda f: word_piece(f, max_input_chars_per_word=5),
    "no-post-processor": lambda f: word_piece(f, post_processor=None),
    "bert-processing": lambda f: word_piece(f, post_processor=_bert_processing),
    "no-normalizer": lambda f: word_piece(f, normalizer=None, decoder=None),
    "added": lambda f: word_piece(f, added=_FLAGS, said={"extra_special_tokens": ["<extra>"], "bos_token": "[BOS]"}),
    "mask-lstrip": lambda f: word_piece(f, added=(AddedToken("[MASK]", lstrip=True, special=True, normalized=False),)),
    "added-beside": added_beside,
    "renamed": lambda f: write_vocab(f, [*RENAMED, *pieces(cased=False)[5:]], {"do_lower_case": True}),
    "roberta": byte_level,
    "roberta-blank-first": lambda f: byte_level(f, space=True),
    "roberta-plain-mask": lambda f: byte_level(f, lstrip=False),
    "roberta-vocab-merges": lambda f: byte_level(f, files="vocab"),
    "unigram": unigram,
    "metaspace": lambda f: unigram(f, split=False),
    "modernbert": modernbert,
}
"""Name of a kind of tokenizer -> what writes such a folder."""
