"""Teacher and student as their folders and the options say, before torch: by config.json and the headers of weights.

The teacher is read whole; the student starts from some layers of the teacher, from another folder or from nothing, and
has of every size what was asked for, else what that model has.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdistil.data import tokenizer
from fastdistil.data.shards import Meta
from fastdistil.model import families, headers
from fastdistil.model.architecture import OF_WINDOWS, Architecture, read_architecture
from fastdistil.run import folder
from fastdistil.run.config import Config, StudentConfig


def read_model(
    option: str, path: Path, meta: Meta, notes: list[str], *, head: bool, need_head: bool | None = None
) -> Architecture:
    """A model that reads the shards, with their vocabulary. It does only if both mean the same by every id.

    Args:
        option: what named the folder, for what is said of it.
        notes: what of the folder is not used as it is there is appended.
        head: whether its masked-LM head is run.
        need_head: whether it must have one; None: as `head`.

    Raises ValueError or FileNotFoundError with what to do.
    """
    what = f"{option} {path}"
    try:
        folder.require_model(path)
        model = read_architecture(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    fix = f"prepare the shards with its tokenizer: `python -m fastdistil.prepare ... --tokenizer {path}`"
    if option == "--teacher.others":
        fix = "distributions are averaged word by word, which wants one vocabulary for all teachers: leave this one out"
    unknown = _refuse_other_tokenizer(what, path, meta, fix)
    has, wanted, pad = model.vocab_size, meta.vocab_size, meta.special_ids["pad"]
    if has != wanted and unknown:
        raise ValueError(
            f"{what} has a vocabulary of {has}, the shards have {wanted}, and nothing says what its ids mean "
            f"({unknown}): put the model's tokenizer into its folder"
        )
    if has < wanted:
        raise ValueError(
            f"{what} has a vocabulary of {has} in config.json, its tokenizer has {wanted} tokens: the ids from {has} "
            f"on have no weights, so train it with resize_token_embeddings({wanted}), or give the tokenizer it was "
            "trained with"
        )
    if has > wanted:
        notes.append(
            f"{what} has {has:,} rows for the {wanted:,} tokens of its tokenizer: the rows after them are left out, "
            f"and the student has {wanted:,}"
        )
    if model.pad_id != pad and model.family.positions_after_pad:
        raise ValueError(
            f"{what} has the pad_token_id {model.pad_id} in config.json, the shards pad with {pad}: a "
            f"{model.family.title} counts its positions from it, so correct the one that is wrong"
        )
    if model.pad_id != pad:
        notes.append(f"{what} has the pad_token_id {model.pad_id} in config.json: {pad} is used, as in the shards")
    try:
        need_head = head if need_head is None else need_head
        contents = headers.match(path, model, headers.read_headers(path), need_head=need_head)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if head and not contents.has_head:
        notes.append(f"{what} has no masked-LM head: it gets a fresh one")
    if contents.left_out:
        notes.append(f"{what}: left out {', '.join(contents.left_out)}")
    return replace(model, vocab_size=wanted, pad_id=pad, mlm_head=head)


def has_head(path: Path) -> bool:
    """Whether the weights in a Hugging Face folder have a masked-LM head."""
    return headers.match(path, read_architecture(path), headers.read_headers(path), need_head=False).has_head


def _refuse_other_tokenizer(what: str, path: Path, meta: Meta, fix: str) -> str:
    """Raises ValueError where the model's tokenizer is not that of the shards. Returns why there is none, or ""."""
    try:
        sha256, special_ids = tokenizer.vocabulary_sha256(path), tokenizer.special_ids(path)
    except FileNotFoundError as error:
        return str(error)
    if sha256 != meta.tokenizer_sha256:
        raise ValueError(
            f"{what} has a tokenizer with hash {sha256[:12]} ({len(tokenizer.read_vocabulary(path)):,} tokens), the "
            f"shards were made with {meta.tokenizer_sha256[:12]} ({meta.vocab_size:,} tokens): {fix}"
        )
    if special_ids != meta.special_ids:
        raise ValueError(f"{what} has the special ids {special_ids}, the shards {meta.special_ids}: {fix}")
    return ""


def read_source(
    config: Config, teacher: Architecture | None, meta: Meta, notes: list[str]
) -> tuple[Path | None, Architecture | None]:
    """The model whose weights the student starts from, and its folder; None for random ones.

    Raises ValueError where there is no such model, or it does not read these shards.
    """
    init = config.student.init
    if init == "random":
        return None, None
    if init == "teacher":
        if teacher is None:
            raise ValueError(
                "--student.init teacher wants a --teacher.path: without a teacher use `random` or a Hugging Face folder"
            )
        return config.teacher.path, teacher
    if not Path(init).exists():
        raise ValueError(
            f"--student.init must be `teacher`, `random`, a Hugging Face folder or a name on the hub, and there is no "
            f"folder {init}"
        )
    head = config.loss.has_head
    return Path(init), read_model("--student.init", Path(init), meta, notes, head=head, need_head=False)


def layers_and_student(
    config: Config, begun: dict[str, Any], teacher: Architecture | None, source: Architecture | None, meta: Meta
) -> tuple[tuple[int, ...], Architecture]:
    """For each layer of the student that of its source, and the student itself.

    A run that has begun keeps its layers, whatever would be chosen today, and its head: older versions built one
    whatever the weights of the terms.

    Args:
        begun: what the run folder says of itself; empty for a new run.
    """
    kept = tuple(begun.get("layers") or ()) if source else ()
    layers = kept or _layers(config.student, teacher, source)
    student = _student(config, len(layers), teacher, source, meta)
    return layers, replace(student, mlm_head=begun["student"].get("mlm_head", True)) if begun else student


def spread(num_layers: int, num_source: int) -> tuple[int, ...]:
    """`num_layers` of `num_source` layers, evenly from first to last: (6, 12) -> 0 2 4 7 9 11, as the authors took.

    In the middle between two it is the later one: layers 0 3 5 of all-MiniLM-L6-v2 are a better start than 0 2 5, by
    1.7 points of STS-B (docs/study.md).
    """
    if num_layers == 1:
        return (0,)
    return tuple(math.floor(i * (num_source - 1) / (num_layers - 1) + 0.5) for i in range(num_layers))


def spread_layers(num_layers: int, source: Architecture) -> tuple[int, ...]:
    """`num_layers` of the layers of a model for a student of its family."""
    if source.global_every and num_layers <= source.num_layers:
        return of_one_pattern(num_layers, source)
    return spread(num_layers, source.num_layers)


def of_one_pattern(num_layers: int, source: Architecture) -> tuple[int, ...]:
    """`num_layers` of the layers of a model in which some see everything and others a window, so that each is put where
    one of its kind stood: 11 of 22 -> 0 2 4 6 8 11 12 14 17 18 20.

    In order, from the first, which has no LayerNorm of its own and is never another's; of all such choices the one that
    is nearest to evenly spread, by the sum of the squared distances in layers, and of two the later. There is always
    one: the first layers are.
    """
    apart = (source.num_layers - 1) / max(1, num_layers - 1)
    # Best choices for the first layers of the student by where the last of them ends: (distance, layers).
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for i in range(1, num_layers):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer in range(i, source.num_layers):
            before = [choice for last, choice in best.items() if last < layer]
            if source.window(layer) == source.window(i) and before:
                distance, layers = min(before, key=lambda choice: (choice[0], [-n for n in choice[1]]))
                found[layer] = distance + (layer - i * apart) ** 2, (*layers, layer)
        best = found
    return min(best.values(), key=lambda choice: (choice[0], [-n for n in choice[1]]))[1]


def _layers(asked: StudentConfig, teacher: Architecture | None, source: Architecture | None) -> tuple[int, ...]:
    """For each layer of the student the one of its source, or any number where there is none."""
    model = source or teacher
    if model is None and None in (asked.num_layers, asked.hidden_size, asked.num_heads):
        raise ValueError(
            "a student from nothing needs its size: --student.num-layers, --student.hidden-size and --student.num-heads"
        )
    if asked.layers is not None and source is None:
        raise ValueError(
            "--student.layers has no effect with --student.init random: leave it out, or use --student.num-layers"
        )
    num_layers = asked.num_layers
    if num_layers is None:  # half of what is distilled, all of what goes on training
        assert model is not None
        num_layers = max(1, model.num_layers // 2) if teacher else model.num_layers
    if source is None:
        return tuple(range(num_layers))
    of = f"the model it starts from has {source.num_layers}"
    if asked.layers is None:
        if num_layers > source.num_layers:
            raise ValueError(
                f"--student.num-layers {num_layers} is too many, {of}: use {source.num_layers} or less, or "
                "--student.init random"
            )
        return spread_layers(num_layers, source)
    if not asked.layers or min(asked.layers) < 0 or max(asked.layers) >= source.num_layers:
        raise ValueError(
            f"--student.layers {' '.join(map(str, asked.layers))} must be some of 0 to {source.num_layers - 1}, {of}"
        )
    if source.global_every:
        _check_pattern(asked.layers, source)
    return asked.layers


def _check_pattern(layers: tuple[int, ...], source: Architecture) -> None:
    """Raises ValueError where a layer would see a window in the student and everything in its source, or likewise."""
    names = {True: "a window", False: "everything"}
    for i, layer in enumerate(layers):
        if source.window(i) != source.window(layer) or (i == 0) != (layer == 0):
            wants = "layer 0, which has no LayerNorm before its attention"
            if i:
                wants = f"one that sees {names[source.window(i) > 0]}, from 1 on"
            raise ValueError(
                f"--student.layers {' '.join(map(str, layers))}: layer {i} of a {source.family.title} of this pattern "
                f"wants {wants}, got {layer}: use e.g. "
                f"{' '.join(map(str, of_one_pattern(len(layers), source)))}, or leave it out"
            )


def _student(
    config: Config, num_layers: int, teacher: Architecture | None, source: Architecture | None, meta: Meta
) -> Architecture:
    asked, model = config.student, source or teacher
    for name in ("hidden_size", "num_heads", "ffn_size", "max_positions") if source else ():
        value, has = getattr(asked, name), getattr(source, name)
        if value not in (None, has):
            raise ValueError(
                f"--student.{name.replace('_', '-')} {value} differs from the {has} of the model it starts from: leave "
                "it out, or use --student.init random"
            )
    hidden_size = asked.hidden_size or _size(model, "hidden_size")
    same_width = model if model is not None and model.hidden_size == hidden_size else None
    if model is not None and same_width is None and asked.num_heads is None:
        raise ValueError(
            f"--student.hidden-size {hidden_size} differs from the teacher's {model.hidden_size}: give "
            "--student.num-heads too"
        )
    num_heads = asked.num_heads or _size(same_width, "num_heads")
    if hidden_size % num_heads:
        divisors = [str(n) for n in range(1, min(hidden_size, 32) + 1) if hidden_size % n == 0]
        raise ValueError(
            f"--student.num-heads {num_heads} must divide the student's width {hidden_size}: use one of "
            f"{', '.join(divisors)}, or another --student.hidden-size"
        )
    model_type, token_types, layer_norm_eps = _family(asked, teacher, source)
    # Windows and angles: as the model of its family has them, or as transformers assumes.
    like = model if model is not None and model.model_type == model_type else None
    gated, assumed = families.find(model_type).gated, families.find(model_type).defaults
    of_windows = {name: getattr(like, name) if like else assumed.get(name, 0) for name in OF_WINDOWS}
    if of_windows["global_theta"] and hidden_size // num_heads % 2:
        raise ValueError(
            f"--student.num-heads {num_heads} leaves heads of an odd width, {hidden_size // num_heads}, and a "
            f"{families.find(model_type).title} rotates theirs in pairs: use another number, or another "
            "--student.hidden-size"
        )
    same_ffn = same_width if same_width is not None and same_width.family.gated == gated else None
    # A row a size: what was asked for, what the model that it starts from or imitates has, what stands otherwise.
    sizes = {
        "num_heads": (num_heads,),
        "ffn_size": (asked.ffn_size, _size(same_ffn, "ffn_size"), 3 * hidden_size // 2 if gated else 4 * hidden_size),
        "max_positions": (asked.max_positions, _size(model, "max_positions"), meta.max_length),
    }
    other_width = teacher.hidden_size if teacher is not None and teacher.hidden_size != hidden_size else 0
    return Architecture(
        model_type=model_type,
        token_types=token_types,
        layer_norm_eps=layer_norm_eps,
        vocab_size=meta.vocab_size,
        pad_id=meta.special_ids["pad"],
        num_layers=num_layers,
        hidden_size=hidden_size,
        **{name: next(size for size in row if size) for name, row in sizes.items()},
        dropout=asked.dropout,
        attention_dropout=asked.attention_dropout,
        mlm_head=config.loss.has_head,
        embedding_size=other_width if asked.projection else 0,
        **of_windows,
    )


def _size(model: Architecture | None, name: str) -> int:
    return getattr(model, name) if model is not None else 0


def _family(asked: StudentConfig, teacher: Architecture | None, source: Architecture | None) -> tuple[str, int, float]:
    """(model_type, rows of the token-type table, eps of the LayerNorms) of the student."""
    model = source or teacher
    if asked.family is not None:
        return _asked_family(asked, source)
    if model is not None and not model.family.students:
        if asked.token_types is not None:
            name = model.family.title
            raise ValueError(
                f"--student.token-types {asked.token_types} is for students of BERT and DistilBERT: those of a {name} "
                f"are {name}s, leave it out"
            )
        return model.model_type, model.token_types, model.layer_norm_eps
    token_types = asked.token_types
    if token_types is None:  # a teacher in the making stays what it was; a student is a DistilBERT
        token_types = source.token_types if source is not None and teacher is None else 0
    if token_types and source is not None and not source.token_types:
        raise ValueError(
            f"--student.token-types {token_types} wants a model with a token-type table to start from, and it has "
            "none: leave it out, or use --student.init random"
        )
    layer_norm_eps = source.layer_norm_eps if source is not None and token_types else 1e-12
    return families.find("bert").students[token_types > 0], token_types, layer_norm_eps


def _asked_family(asked: StudentConfig, source: Architecture | None) -> tuple[str, int, float]:
    """`_family` where it was asked for, of a student with random weights."""
    assert asked.family is not None
    if source is not None:
        raise ValueError(
            f"--student.family {asked.family} is for a student with random weights, and this one starts from a "
            f"{source.family.title}: leave it out, or use --student.init random"
        )
    try:
        family = families.find(asked.family)
    except ValueError as error:
        raise ValueError(f"--student.family: {error}") from None
    assumed = family.defaults | family.fixed
    token_types = assumed["token_types"] if asked.token_types is None else asked.token_types
    if token_types != family.fixed.get("token_types", token_types):
        raise ValueError(
            f"--student.token-types {token_types} wants a table that a {family.title} has not: leave it out, or use "
            "another --student.family"
        )
    return asked.family, token_types, assumed["layer_norm_eps"]
