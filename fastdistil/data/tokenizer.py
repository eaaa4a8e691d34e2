"""Tokenizers: their identity (standard library only), loading, training and saving.

The identity functions need nothing heavy, so that a run whose teacher, student and data do not share a vocabulary is
refused at once.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistil.remote import hub
from fastdistil.run import files

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.normalizers import BertNormalizer

LOG = logging.getLogger("fastdistil.prepare")
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""What BERT calls them; a tokenizer_config.json or special_tokens_map.json may rename them."""
_ROBERTA_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
MIN_VOCAB_SIZE = 128
"""Below it a trained vocabulary is hardly more than an alphabet."""
_WORD_PIECE_CLASSES = ("Bert", "DistilBert", "Electra", "MobileBert", "SqueezeBert", "ConvBert", "LayoutLM")
_BYTE_LEVEL_CLASSES = ("Roberta", "Longformer", "Bart")
"""...Tokenizer of transformers: those that read a vocab.txt, and a vocab.json with merges.txt, as we do."""
_RARE = 0.01
"""A vocabulary with fewer pieces than this share that hold a capital, or an accent, was made of text without."""
_KEPT = ("clean_up_tokenization_spaces", "padding_side", "truncation_side", "model_input_names")
"""Of a tokenizer_config.json: what changes no id and names no file and no code."""


def read_vocabulary(source: str | Path) -> list[str]:
    """The tokens in the order of their ids, from a tokenizer folder or file.

    Of a folder, tokenizer.json (its model and its added tokens) is preferred to vocab.txt, and that to vocab.json; the
    last two are followed by what added_tokens.json or tokenizer_config.json adds. Raises FileNotFoundError where there
    is none, and ValueError where the file does not hold a vocabulary whose ids run from 0 without a gap.
    """
    path = _vocabulary_file(Path(source))
    if path.suffix != ".txt" and path.name != "vocab.json":
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
    pairs = _listed(path)
    known = {token for _, token in pairs}
    added = [(index, token["content"]) for index, token in _added_tokens(path)]
    return _in_id_order(path, pairs + [(index, token) for index, token in added if token not in known])


def _listed(path: Path) -> list[tuple[Any, Any]]:
    """The (id, token) pairs of a vocab.txt or vocab.json, as the file has them."""
    if path.suffix != ".txt":
        return [(index, token) for token, index in files.read_json(path).items()]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    return list(enumerate(text.rstrip("\n").split("\n")))


def _added_tokens(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """What the files beside a vocab.txt or vocab.json add to it: ids with tokens and their flags, in order."""
    record, beside = settings(path), path.with_name("added_tokens.json")
    try:
        if isinstance(record.get("added_tokens_decoder"), dict):
            added = [(int(index), {**token}) for index, token in record["added_tokens_decoder"].items()]
        else:  # as transformers took them before it wrote flags
            special = {_content(token) for name, token in record.items() if name.endswith("_token")}
            special.update(map(_content, record.get("additional_special_tokens") or ()))
            added = [
                (index, {"content": token, "normalized": token not in special, "special": token in special})
                for token, index in (files.read_json(beside) if beside.is_file() else {}).items()
            ]
        return sorted(added, key=lambda pair: (pair[0], pair[1]["content"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path.parent}: its added tokens cannot be read ({error!r:.200})") from None


def vocabulary_sha256(source: str | Path) -> str:
    """SHA-256 in hexadecimal of the tokens in id order, joined by newlines.

    The same whether the vocabulary is kept in a tokenizer.json or a vocab.txt, so it tells whether two models read the
    same ids. Takes and raises what `read_vocabulary` does.
    """
    return hashlib.sha256("\n".join(read_vocabulary(source)).encode()).hexdigest()


def special_ids(source: str | Path) -> dict[str, int]:
    """The ids of pad, unk, cls, sep and mask, by the names that `special_tokens` finds.

    Raises what `read_vocabulary` does, and ValueError where the vocabulary lacks one.
    """
    path = _vocabulary_file(Path(source))
    vocabulary = read_vocabulary(path)
    ids = {}
    for name, token in _special_tokens(path, vocabulary).items():
        if token not in vocabulary:
            raise ValueError(
                f"{path}: the {name} token {token!r} is not in the vocabulary of {len(vocabulary)}: masked language "
                f"modelling needs {', '.join(SPECIAL_TOKENS)}; where it has another name, say so as {name}_token in a "
                "tokenizer_config.json beside it"
            )
        ids[name] = vocabulary.index(token)
    return ids


def special_tokens(source: str | Path) -> dict[str, str]:
    """The spelling of pad, unk, cls, sep and mask in the tokenizer of a folder or file.

    As a tokenizer_config.json or special_tokens_map.json beside it says; else BERT's name or RoBERTa's, whichever the
    vocabulary has; else the token with the id that a model's config.json gives.
    """
    path = _vocabulary_file(Path(source))
    return _special_tokens(path, read_vocabulary(path))


def _special_tokens(path: Path, vocabulary: list[str]) -> dict[str, str]:
    named, model, known = settings(path), _beside(path, "config.json"), set(vocabulary)
    tokens = {}
    for name, usual in SPECIAL_TOKENS.items():
        there = [token for token in (usual, _ROBERTA_TOKENS[name]) if token in known]
        ids = [model.get(f"{other}_token_id") for other in (name, {"cls": "bos", "sep": "eos"}.get(name))]
        there += [vocabulary[i] for i in ids if type(i) is int and 0 <= i < len(vocabulary)]
        tokens[name] = _content(named.get(f"{name}_token")) or next(iter(there), usual)
    return tokens


def settings(source: Path) -> dict[str, Any]:
    """What tokenizer_config.json and special_tokens_map.json say beside the vocabulary; the second has the last word
    on special tokens."""
    path = _vocabulary_file(source)
    record = _beside(path, "tokenizer_config.json")
    for name, token in _beside(path, "special_tokens_map.json").items():
        # Flags that only the first gives stay.
        if isinstance(token, list) or _content(token) not in (None, _content(record.get(name))):
            record[name] = token
    return record


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.with_name(name)
    return files.read_json(file) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """The spelling of a token, which these files give as a string or as an object with its flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _vocabulary_file(source: Path) -> Path:
    if source.is_file():
        return source
    for name in ("tokenizer.json", "vocab.txt", "vocab.json"):
        if (source / name).is_file():
            return source / name
    models = [path.name for path in source.glob("*.model")]
    if models:
        raise FileNotFoundError(f"no tokenizer in {source} that is read here, only {models[0]}: {_CONVERT}")
    raise FileNotFoundError(
        f"no tokenizer in {source}: wanted a folder with a tokenizer.json, a vocab.txt, or vocab.json and merges.txt, "
        "or one of these files"
    )


_CONVERT = (
    "write the tokenizer.json that transformers makes of it: `AutoTokenizer.from_pretrained(FOLDER)"
    ".save_pretrained(FOLDER)` in Python, which it can where there is a fast tokenizer of that kind"
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
        _refuse_cased_without_effect(path, cased)
        return path
    if hub.name_of(text) is None or path.suffix in (".json", ".txt"):
        raise FileNotFoundError(
            f"--tokenizer {text}: no such file or folder, and not a name on the hub; wanted one of these or train:SIZE"
        )
    return text


def _refuse_cased_without_effect(path: Path, cased: bool) -> None:
    file = _vocabulary_file(path)
    says = file if file.suffix != ".txt" else file.with_name("tokenizer_config.json")
    if cased and (file.suffix != ".txt" or settings(file).get("do_lower_case") is True):
        raise ValueError(
            f"--cased has no effect on {file.parent}: {says.name} says what happens to case, so change it there or "
            "leave --cased out (it is for train:SIZE and a vocab.txt)"
        )


def spec_record(spec: Spec) -> dict[str, str]:
    """What identifies the tokenizer, for meta.json: no path."""
    if isinstance(spec, Path):
        return {"name": spec.resolve().name, "sha256": files.sha256(_vocabulary_file(spec))}
    return {"name": f"train:{spec}" if isinstance(spec, int) else spec}


def load(path: Path, *, cased: bool = False) -> "Tokenizer":
    """The tokenizer of a folder or file, as `tokenizers` runs it.

    Padding and truncation are off. A vocab.txt is BERT's WordPiece, with the case that `_bert_normalizer` finds, and a
    vocab.json with its merges.txt RoBERTa's byte-level BPE. Raises what `special_ids` does, and ValueError where
    `tokenizers` cannot read the file or encode by it, where it belongs to another kind of tokenizer, and where `cased`
    would have no effect.
    """
    from tokenizers import AddedToken, Tokenizer

    special_ids(path)
    _refuse_cased_without_effect(path, cased)
    file, names = _vocabulary_file(path), special_tokens(path)
    try:
        if file.suffix == ".txt" or file.name == "vocab.json":
            tokenizer = _from_vocabulary(file, names, cased)
        else:
            tokenizer = Tokenizer.from_file(str(file))
            _refuse_other_case(file, tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        for name in names.values():
            # Some files do not mark them so, and then `encode_special_tokens` would not see them. Their flags stay,
            # such as that of "<mask>", which takes the blank before it.
            token = known.get(name, AddedToken(name, special=True, normalized=False))
            token.special = True
            tokenizer.add_special_tokens([token])
        tokenizer.encode("a \U0010fffe")  # fails here rather than in a worker, e.g. without [UNK]
    except (KeyboardInterrupt, MemoryError, ValueError):
        raise
    except BaseException as error:  # `tokenizers` raises nothing more precise, and a panic is no Exception
        raise ValueError(f"{file}: `tokenizers` cannot read it ({error})") from error
    return tokenizer


def _from_vocabulary(file: Path, names: dict[str, str], cased: bool) -> "Tokenizer":
    """BERT's tokenizer over a vocab.txt, or RoBERTa's over a vocab.json, with what the files beside it add.

    Raises ValueError where such a tokenizer would not have the ids of the file.
    """
    from tokenizers import AddedToken

    record = settings(file)
    tokens = [AddedToken(**token) for _, token in _added_tokens(file)]
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    for name, token in names.items():
        given = record.get(f"{name}_token")
        said = given if isinstance(given, dict) else {"lstrip": name == "mask" and file.suffix != ".txt"}
        if token not in {added.content for added in tokens}:
            kept = {flag: bool(said[flag]) for flag in flags if flag in said}
            tokens.append(AddedToken(token, **({"normalized": False} | kept), special=True))
    if file.suffix == ".txt":
        _refuse_other_kind(file, _WORD_PIECE_CLASSES)
        listed = {token: index for index, token in _listed(file)}
        tokenizer = _word_piece(listed, names, _bert_normalizer(file, cased), tokens)
    else:
        _refuse_other_kind(file, _BYTE_LEVEL_CLASSES)
        tokenizer = _byte_level(file, names, tokens)
    for index, token in enumerate(read_vocabulary(file)):
        if tokenizer.token_to_id(token) != index:
            raise ValueError(
                f"{file}: {token!r} has the ids {index} and {tokenizer.token_to_id(token)}, of which only the last "
                "counts: give the other a name that no text has, such as [unused-1]"
            )
    return tokenizer


def _refuse_other_kind(file: Path, classes: tuple[str, ...]) -> None:
    """ValueError where a vocab.txt or vocab.json belongs to a tokenizer that cuts text in another way."""
    stated = settings(file).get("tokenizer_class") or _beside(file, "config.json").get("tokenizer_class")
    kind = re.sub(r"Tokenizer(Fast)?$", "", str(stated or classes[0]))
    codes = [name for name in ("bpe.codes", "sentencepiece.bpe.model") if file.with_name(name).is_file()]
    if kind not in classes or codes:
        raise ValueError(
            f"{file} belongs to {'a ' + str(stated) if kind not in classes else codes[0]}, not to a "
            f"{classes[0]}Tokenizer: {_CONVERT}"
        )


def _refuse_other_case(file: Path, tokenizer: "Tokenizer") -> None:
    """ValueError where transformers, which goes by a BERT's tokenizer_config.json, would not do what the file does."""
    record, does = settings(file), json.loads(tokenizer.to_str())["normalizer"] or {}
    said, kind = record.get("do_lower_case"), str(record.get("tokenizer_class", "BertTokenizer"))
    if kind.startswith(("BertT", "DistilBertT")) and isinstance(said, bool) and said != does.get("lowercase", said):
        raise ValueError(
            f"{file} says lowercase {does['lowercase']}, the tokenizer_config.json beside it do_lower_case {said}: "
            "transformers goes by the second, so correct the one that is wrong"
        )


def _bert_normalizer(file: Path, cased: bool) -> "BertNormalizer":
    """What happens to case and accents: `cased`, else what the files beside a vocab.txt say, else what it shows itself.

    A piece with a capital can never be found once text is lowercased, so a vocabulary that holds them was made of text
    with case; and likewise with accents. What was decided in this way is logged.
    """
    from tokenizers import normalizers

    record = settings(file)
    lowercase = False if cased else record.get("do_lower_case", _beside(file, "config.json").get("do_lower_case"))
    accents = record.get("strip_accents")
    if lowercase is None:
        pieces = [piece for piece in read_vocabulary(file) if not re.fullmatch(r"[\[<].+[\]>]", piece)]
        letters = [piece for piece in pieces if piece.lower() != piece.upper()]
        capitals = sum(piece != piece.lower() for piece in letters)
        lowercase = capitals < _RARE * len(letters) or not capitals
        strip = normalizers.BertNormalizer(False, False, True, False)
        accented = sum(strip.normalize_str(piece) != piece for piece in pieces)
        accents = False if lowercase and accents is None and accented >= _RARE * len(pieces) else accents
        LOG.info(
            f"{file} says nothing of case, and {capitals:,} of its {len(letters):,} pieces with letters hold capitals: "
            f"text is {'lowercased' if lowercase else 'left in its case'}"
            f"{f', with its accents ({accented:,} pieces hold one)' if accents is False else ''}; "
            'to have it otherwise, say {"do_lower_case": ...} in a tokenizer_config.json beside it'
        )
    return normalizers.BertNormalizer(
        lowercase=bool(lowercase),
        strip_accents=accents,
        handle_chinese_chars=record.get("tokenize_chinese_chars", True),
    )


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
    return _word_piece(ids, SPECIAL_TOKENS, normalizer)


def save(
    tokenizer: "Tokenizer",
    folder: Path,
    *,
    names: dict[str, str],
    max_length: int,
    source: dict[str, Any] | None = None,
    token_types: int | None = None,
) -> None:
    """Write a Hugging Face tokenizer folder that `transformers`, 4 and 5, loads to the same encoding.

    Args:
        names: the spelling of pad, unk, cls, sep and mask.
        max_length: tokens of the longest sequence.
        source: the `settings` that the tokenizer had where it was read.
        token_types: rows of the model's token-type table; None where no model is known yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = source or {}
    record = json.loads(tokenizer.to_str())
    # With all flags of all added tokens, or transformers adds those that it misses anew, with ids beyond the model's.
    added = {str(token.pop("id")): token for token in record["added_tokens"]}
    known = {token["content"] for token in added.values()}
    others = {name: _content(source.get(name)) for name in ("bos_token", "eos_token")}
    more = source.get("additional_special_tokens") or source.get("extra_special_tokens")
    listed = [token for token in map(_content, more if isinstance(more, list) else []) if token in known]
    specials: dict[str, Any] = {f"{name}_token": token for name, token in names.items()}
    specials |= {name: token for name, token in others.items() if token in known}
    specials |= {"additional_special_tokens": listed} if listed else {}
    config = {name: source[name] for name in _KEPT if name in source}
    config |= {**specials, "added_tokens_decoder": added, "model_max_length": max_length}
    if token_types is not None:
        types = ["token_type_ids"] if token_types > 1 else []
        config["model_input_names"] = ["input_ids", *types, "attention_mask"]
    normalizer, before = record["normalizer"] or {}, record["pre_tokenizer"] or {}
    own = _is_berts_own(tokenizer, names)
    if own:
        config |= {
            "tokenizer_class": "DistilBertTokenizer" if token_types == 0 else "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    else:  # the class that takes tokenizer.json as it is, but for one flag that transformers 4 sets by its own default
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {name: before[name] for name in ("add_prefix_space",) if name in before}
    # Not by tokenizer.save, which raises a bare Exception on a full disk.
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    files.write_json(folder / "tokenizer_config.json", config)
    files.write_json(folder / "special_tokens_map.json", specials)
    if own:
        tokens = read_vocabulary(folder / "tokenizer.json")
        files.write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens))


def export(source: Path, out: Path, *, max_positions: int, token_types: int) -> None:
    """Write into `out` the tokenizer of a run for a model with such tables. Raises what `load` does."""
    tokenizer, names, said = load(source), special_tokens(source), settings(source)
    cuts = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
    if "added_tokens_decoder" not in said and ('"ByteLevel"' in cuts or '"Metaspace"' in cuts):
        # Written by a version that lost the flag of "<mask>" by which it takes the blank before it. Where blanks belong
        # to words, a masked word took its blank along in training.
        from tokenizers import AddedToken

        tokenizer.add_special_tokens([AddedToken(names["mask"], lstrip=True, special=True, normalized=False)])
    save(tokenizer, out, names=names, max_length=max_positions, source=said, token_types=token_types)


def _is_berts_own(tokenizer: "Tokenizer", names: dict[str, str]) -> bool:
    """Whether BERT's tokenizer over the same vocabulary would be this one.

    Then it may bear BERT's name. transformers 5 makes what bears it anew, from the vocabulary and three switches, and
    disregards the rest of the tokenizer.json.
    """
    from tokenizers import normalizers

    record = json.loads(tokenizer.to_str())
    switches, vocab = record["normalizer"] or {}, record["model"].get("vocab")
    if switches.pop("type", None) != "BertNormalizer" or record["model"]["type"] != "WordPiece":
        return False
    if not all(token in vocab for token in names.values()):
        return False
    own = _word_piece(vocab, names, normalizers.BertNormalizer(**switches | {"clean_text": True}))
    return json.loads(own.to_str()) == json.loads(tokenizer.to_str())


def _word_piece(
    vocab: dict[str, int], names: dict[str, str], normalizer: "BertNormalizer", added: "Sequence[AddedToken]" = ()
) -> "Tokenizer":
    """BERT's tokenizer over a vocabulary and the tokens `added` to it, which have the next ids where they are new."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=names["unk"]))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizer  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_tokens(list(added)) if added else tokenizer.add_special_tokens(list(names.values()))
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def _byte_level(file: Path, names: dict[str, str], added: "Sequence[AddedToken]") -> "Tokenizer":
    """RoBERTa's tokenizer over a vocab.json with the merges.txt beside it, and the tokens `added` to them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    merges = file.with_name("merges.txt")
    if not merges.is_file():
        raise ValueError(f"{file} is half of a tokenizer: wanted the merges.txt that was written with it beside it")
    if not any(token.startswith("Ġ") for _, token in _listed(file)):
        raise ValueError(f"{file} is not the vocabulary of a byte-level BPE, as RoBERTa's is: {_CONVERT}")
    space = bool(settings(file).get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE.from_file(str(file), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_tokens(list(added))
    sep, cls = ((names[name], tokenizer.get_vocab()[names[name]]) for name in ("sep", "cls"))
    post = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=space)
    tokenizer.post_processor = post  # type: ignore[assignment]
    return tokenizer


def _may_continue(character: str) -> bool:
    """Whether BERT's pre-tokenizer leaves the character inside a word, so that "##c" can occur."""
    punctuation = unicodedata.category(character).startswith("P") or (character.isascii() and not character.isalnum())
    return not punctuation and not 0x4E00 <= ord(character) <= 0x9FFF
