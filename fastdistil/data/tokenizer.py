"""Tokenizers: their identity (standard library only), loading, training and saving.

The identity functions need nothing heavy, so that a run whose teacher, student and data do not share a vocabulary is
refused at once.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistil.run import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""What BERT calls them; a tokenizer_config.json or special_tokens_map.json may rename them."""
MIN_VOCAB_SIZE = 128
"""Below it a trained vocabulary is hardly more than an alphabet."""


def read_vocabulary(source: str | Path) -> list[str]:
    """The tokens in the order of their ids, from a tokenizer folder, tokenizer.json or vocab.txt.

    Of a folder, tokenizer.json (its model and its added tokens) is preferred to vocab.txt. Raises FileNotFoundError
    where there is neither, and ValueError where the file does not hold a vocabulary whose ids run from 0 without a gap.
    """
    path = _vocabulary_file(Path(source))
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from None
        return _in_id_order(path, list(enumerate(text.removesuffix("\n").split("\n"))))
    record = files.read_json(path)
    try:
        vocab = record["model"]["vocab"]
        if isinstance(vocab, dict):
            pairs = [(index, token) for token, index in vocab.items()]
        else:  # a Unigram model's, of tokens with their scores
            pairs = [(index, piece[0]) for index, piece in enumerate(vocab)]
        pairs += [(token["id"], token["content"]) for token in record.get("added_tokens", ())]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a vocabulary ({error!r})") from None
    return _in_id_order(path, pairs)


def vocabulary_sha256(source: str | Path) -> str:
    """SHA-256 in hexadecimal of the tokens in id order, joined by newlines.

    The same whether the vocabulary is kept in a tokenizer.json or a vocab.txt, so it tells whether two models read the
    same ids. Takes and raises what `read_vocabulary` does.
    """
    return hashlib.sha256("\n".join(read_vocabulary(source)).encode()).hexdigest()


def special_ids(source: str | Path) -> dict[str, int]:
    """The ids of pad, unk, cls, sep and mask.

    Their names are BERT's unless a tokenizer_config.json or special_tokens_map.json beside the vocabulary says
    otherwise. Raises what `read_vocabulary` does, and ValueError where the vocabulary lacks one.
    """
    path = _vocabulary_file(Path(source))
    vocabulary = read_vocabulary(path)
    ids = {}
    for name, token in special_tokens(source).items():
        if token not in vocabulary:
            raise ValueError(
                f"{path}: the {name} token {token!r} is not in the vocabulary of {len(vocabulary)}: "
                f"masked language modelling needs {', '.join(SPECIAL_TOKENS)}"
            )
        ids[name] = vocabulary.index(token)
    return ids


def special_tokens(source: str | Path) -> dict[str, str]:
    """The spelling of pad, unk, cls, sep and mask in the tokenizer of a folder or file."""
    folder = _vocabulary_file(Path(source)).parent
    tokens = dict(SPECIAL_TOKENS)
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file_name).is_file():
            continue
        record = files.read_json(folder / file_name)
        for name in tokens:
            token = record.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[name] = token
    return tokens


def _vocabulary_file(source: Path) -> Path:
    if source.is_file():
        return source
    for name in ("tokenizer.json", "vocab.txt"):
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(
        f"no tokenizer in {source}: wanted a folder with a tokenizer.json or a vocab.txt, or one of these files"
    )


def _in_id_order(path: Path, pairs: list[tuple[Any, Any]]) -> list[str]:
    """The tokens of (id, token) pairs; ValueError unless every id from 0 on has one token."""
    tokens: dict[int, str] = {}
    for index, token in pairs:
        if type(index) is not int or not isinstance(token, str):
            raise ValueError(f"{path}: {token!r:.80} with the id {index!r:.80} is not a token")
        if tokens.setdefault(index, token) != token:
            raise ValueError(f"{path}: id {index} is both {tokens[index]!r} and {token!r}")
    if not tokens or sorted(tokens) != list(range(len(tokens))):
        raise ValueError(f"{path}: the ids of {len(tokens)} tokens do not run from 0 without a gap")
    return [tokens[index] for index in range(len(tokens))]


Spec = Path | int | str
"""A checked --tokenizer argument: a folder or file, the SIZE of train:SIZE, or a name on the hub."""


def parse_spec(text: str, *, cased: bool = False) -> Spec:
    """What `text` names: train:SIZE, a folder or file that exists, else a name on the hub.

    Raises ValueError or FileNotFoundError, without importing anything heavy, where the size is too small, where a path
    holds no tokenizer or lacks a special token, and where `cased` would have no effect.
    """
    if text.startswith("train:"):
        size = text.removeprefix("train:")
        if not size.isdecimal() or not MIN_VOCAB_SIZE <= int(size) <= 2**24:
            raise ValueError(f"--tokenizer {text}: wanted train:SIZE with a SIZE of {MIN_VOCAB_SIZE} or more")
        return int(size)
    path = Path(text)
    if path.exists():
        special_ids(path)
        file = _vocabulary_file(path)
        if cased and file.suffix != ".txt":
            raise ValueError(
                f"--cased has no effect on {file}, which says itself what happens to case: leave it out "
                "(it is for a vocab.txt and for train:SIZE)"
            )
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or path.suffix in (".json", ".txt"):
        raise FileNotFoundError(
            f"--tokenizer {text}: no such file or folder, and not a name on the hub; wanted one of these or train:SIZE"
        )
    if cased:
        raise ValueError(f"--cased has no effect on {text}, a name on the hub: leave it out")
    return text


def spec_record(spec: Spec) -> dict[str, str]:
    """What identifies the tokenizer, for meta.json: no path."""
    if isinstance(spec, Path):
        return {"name": spec.resolve().name, "sha256": files.sha256(_vocabulary_file(spec))}
    return {"name": f"train:{spec}" if isinstance(spec, int) else spec}


def load(path: Path, *, cased: bool = False) -> "Tokenizer":
    """The tokenizer of a folder, tokenizer.json or vocab.txt, as `tokenizers` runs it.

    Padding and truncation are off. A vocab.txt is BERT's WordPiece; case and accents go by the tokenizer_config.json
    beside it where there is one, else they are removed unless `cased`. Raises what `special_ids` does, and ValueError
    where `tokenizers` cannot read the file or encode by it.
    """
    from tokenizers import Tokenizer, normalizers

    special_ids(path)
    file = _vocabulary_file(path)
    if file.suffix != ".txt":
        try:
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            # Some files do not mark them so, and then `encode_special_tokens` would not see them.
            tokenizer.add_special_tokens(list(special_tokens(path).values()))
            tokenizer.encode("a \U0010fffe")  # fails here rather than in a worker, e.g. without [UNK]
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # `tokenizers` raises nothing more precise, and a panic is no Exception
            raise ValueError(f"{file}: `tokenizers` cannot read it ({error})") from error
        return tokenizer
    config_file = file.parent / "tokenizer_config.json"
    config = files.read_json(config_file) if config_file.is_file() else {}
    normalizer = normalizers.BertNormalizer(
        lowercase=not cased and config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    return _word_piece(read_vocabulary(file), special_tokens(file), normalizer)


def fetch(name: str) -> Path:
    """The local folder with the tokenizer of a model on the hub, from the cache when offline."""
    from huggingface_hub import snapshot_download

    wanted = ["tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's, the network's and the file system's own errors
        raise ValueError(
            f"--tokenizer {name}: neither a file or folder here nor a tokenizer that could be fetched from the hub "
            f"({type(error).__name__}: {error})"
        ) from error


def train(documents: Iterable[str], size: int, *, cased: bool = False) -> "Tokenizer":
    """A BERT WordPiece of at most `size` tokens trained on `documents`, which are kept in memory.

    [PAD] [UNK] [CLS] [SEP] [MASK] have the ids 0 to 4. The same documents give the same tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    documents = list(documents)
    normalizer = normalizers.BertNormalizer(lowercase=not cased)
    characters: Counter[str] = Counter()
    for document in documents:
        characters.update(document)
    normalized: Counter[str] = Counter()
    for character, count in characters.items():
        for part in normalizer.normalize_str(character):
            if not part.isspace():
                normalized[part] += count
    # The trainer numbers single characters and their "##" forms as its hash map meets them, and breaks ties by number:
    # the result differs from run to run unless both are given in order. They are at most BERT's 1,000 characters, and
    # with their "##" forms no more than half of a small vocabulary.
    most_frequent = sorted(normalized, key=lambda character: (-normalized[character], character))
    alphabet = sorted(most_frequent[: min(1000, size // 4)])
    continuations = [f"##{character}" for character in alphabet if _may_continue(character)]
    trained = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))  # type: ignore[call-arg]
    trained.normalizer = normalizer  # type: ignore[assignment]
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    trained.train_from_iterator(
        documents,
        trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=[*SPECIAL_TOKENS.values(), *continuations],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    ids = trained.get_vocab()
    return _word_piece(sorted(ids, key=ids.__getitem__), SPECIAL_TOKENS, normalizer)


def save(tokenizer: "Tokenizer", folder: Path, *, names: dict[str, str], max_length: int) -> None:
    """Write a Hugging Face tokenizer folder that `transformers` loads to the same encoding.

    `names`: the spelling of pad, unk, cls, sep and mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(tokenizer.to_str())
    word_piece = record["model"]["type"] == "WordPiece"
    normalizer = record["normalizer"] or {}
    specials = {f"{name}_token": token for name, token in names.items()}
    config: dict[str, Any] = {**specials, "model_max_length": max_length}
    if word_piece and normalizer.get("type") == "BertNormalizer":
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Not by tokenizer.save, which raises a bare Exception on a full disk.
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    files.write_json(folder / "tokenizer_config.json", config)
    files.write_json(folder / "special_tokens_map.json", specials)
    if word_piece:
        tokens = read_vocabulary(folder / "tokenizer.json")
        files.write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens))


def _word_piece(tokens: list[str], names: dict[str, str], normalizer: "BertNormalizer") -> "Tokenizer":
    """BERT's tokenizer over these tokens, in the order of their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=names["unk"]))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizer  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(names.values()))
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    return tokenizer


def _may_continue(character: str) -> bool:
    """Whether BERT's pre-tokenizer leaves the character inside a word, so that "##c" can occur."""
    punctuation = unicodedata.category(character).startswith("P") or (character.isascii() and not character.isalnum())
    return not punctuation and not 0x4E00 <= ord(character) <= 0x9FFF
