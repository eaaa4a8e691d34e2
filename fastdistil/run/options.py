"""The command line: words -> a configuration, and what a mistake is answered with. tyro reads the words.

A mistake is a ValueError of a few lines: what was wanted, what was got, what to write instead.
"""

import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

_GIVEN_ELSEWHERE = """
epochs num-epochs num-train-epochs n-epoch max-epochs: --optim.duration N (in --optim.unit epochs) | --epochs N
steps max-steps num-steps max-updates num-updates max-train-steps: --optim.unit updates --optim.duration N
lr learning-rate: --optim.lr | --lr
lr-scheduler-type scheduler optimizer: --optim.lr (AdamW with linear warm-up and linear decay is the only one)
warmup-steps num-warmup-steps: --optim.warmup SHARE (of the updates) | --warmup SHARE (of the updates)
warmup-ratio warmup-prop warmup-proportion: --optim.warmup | --warmup
adam-epsilon: --optim.eps
adam-beta1 adam-beta2: --optim.betas BETA1 BETA2
max-grad-norm gradient-clipping clip-grad: --optim.clip-norm
batch-size train-batch-size: --batch.size (sequences of a whole update, over all ranks) | --batch-size
per-device-train-batch-size per-gpu-train-batch-size train-micro-batch-size-per-gpu micro-batch-size: \
--batch.token-budget (tokens of a micro-batch; --batch.size is a whole update) | --batch-size
gradient-accumulation-steps: --batch.size (a whole update; what --batch.token-budget cannot hold is accumulated)
max-seq-length max-seq-len max-length seq-length max-position-embeddings block-size: \
--student.max-positions (the sequences are cut by --max-length of fastdistil.prepare) | --max-length
fp16 bf16 amp mixed-precision half: --engine.precision bf16 (there is no fp16)
tf32: --engine.precision fp32
gradient-checkpointing activation-checkpointing: --engine.activation-checkpointing
torch-compile: --engine.compile
deepspeed deepspeed-config zero fsdp stage: --engine.zero-stage 0, 1, 2 or 3
no-cuda use-cpu cpu: --engine.device cpu | --device cpu
n-gpu num-gpus gpus nproc-per-node world-size: \
--world-size N (with --dry-run; a run has the ranks of `torchrun --nproc-per-node N -m fastdistil.pretrain ...`)
teacher teacher-model teacher-name teacher-name-or-path teacher-model-name-or-path: --teacher.path FOLDER | --teacher
teachers other-teachers teacher-models: --teacher.path FOLDER --teacher.others FOLDER ...
teacher-weights: --teacher.weights
teacher-type: --teacher.path FOLDER (its config.json says what it is)
student-type model-type: --student.family (of random weights; else it is what it starts from)
model model-name model-name-or-path student student-model student-pretrained-weights: --student.init | --tokenizer
student-config config-name: --student.num-layers --student.hidden-size --student.num-heads --student.ffn-size
num-hidden-layers n-layers student-layers: --student.num-layers
hidden-dim dim d-model: --student.hidden-size
num-attention-heads n-heads: --student.num-heads
intermediate-size: --student.ffn-size
hidden-dropout-prob: --student.dropout
attention-probs-dropout-prob: --student.attention-dropout
freeze-pos-embs: --student.freeze-positions
alpha alpha-ce alpha-kd alpha-distil kd-weight: --loss.kd | --kd
alpha-mlm alpha-clm mlm-weight: --loss.mlm
alpha-cos: --loss.cosine
alpha-mse: --loss.cosine (or --loss.hidden; there is no mean squared error)
mlm-probability mlm-mask-prop mask-prob: --masking.fraction
word-keep: --masking.keep
word-rand word-mask: --masking.random (and --masking.keep; the rest becomes [MASK])
mlm-smoothing: --masking.smoothing
output output-dir output-path output-folder dump-path save-dir logging-dir dest: --out
overwrite-output-dir overwrite-cache force: --overwrite | --out FOLDER (another; --resume auto goes on in an old one)
resume-from-checkpoint load-checkpoint checkpoint continue: --resume auto
data data-file data-dir data-path dataset dataset-name train-file train-data train-path input input-dir: \
--data.shards FOLDER (written by fastdistil.prepare) | --data | --shards
eval-file validation-file eval-data: --data.validation FOLDER (written by fastdistil.prepare)
dataloader-num-workers: --data.num-workers
num-proc num-workers preprocessing-num-workers threads processes: --workers | --data.num-workers
log-interval logging-steps log-every: --log.every
save-steps save-interval checkpoint-interval checkpoint-every: --log.checkpoint-every
eval-steps eval-interval: --log.validate-every
save-total-limit: --log.keep-checkpoints
report-to: --log.to
tensorboard: --log.to tensorboard
no-tensorboard: --log.to none
tokenizer-name tokenizer-path: --tokenizer
vocab-size: --tokenizer train:SIZE
vocab-file vocab: --tokenizer FILE
do-lower-case lowercase uncased: --no-cased (which is the default)
text-column column field: --text-field
task-name: --task
random-seed: --seed | --first-seed
"""
"""What Hugging Face's Trainer, the script of DistilBERT's authors, DeepSpeed and others call it: what it is here.

Of the answers to a name that are separated by bars the first counts whose option the command has.
"""
_ANSWERS = {
    name: [answer.strip() for answer in answers.split(" | ")]
    for names, answers in (line.split(": ", 1) for line in _GIVEN_ELSEWHERE.strip().splitlines())
    for name in names.split()
}
_ELSEWHERE = re.compile(r"(?!hf:[^/]|hf:/[^/])[\w.+-]+(@[\w.-]+)?:[/\\]")
"""s3://bucket, hdfs://, file:///x, dbfs:/x, host:/x, user@host:/x, C:\\x; not hf:NAME or hf:/a/folder."""
_MAY_BE_URLS = ("--data.shards", "--data.validation", "--mirror")
MOST_MISTAKES = 5
"""So many wrong options are answered at once."""


def parse(
    kind: type,
    args: Sequence[str] | None,
    command: str,
    *,
    default: Any = None,
    quiet: bool = False,
    package: str = "fastdistil",
) -> Any:
    """A `kind` of the words of the command line, or of `args`. `~` is the home folder; of one option twice the last
    counts.

    Args:
        kind: a frozen dataclass, whose fields are the options.
        command: what follows "python -m fastdistil.", or another `package`.
        default: the values that are not given; None: those of the fields.
        quiet: print no help.

    Raises ValueError, which says what to write; SystemExit(0) after --help.
    """
    import tyro

    words = list(sys.argv[1:] if args is None else args)
    command = f"{package}.{command}"
    prog = f"python -m {command}"
    given: Any = {} if default is None else {"default": default}
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in words):
        tyro.cli(kind, args=words, prog=prog, console_outputs=not quiet, **given)
    known, named = known_options(kind)
    mistakes = [
        _unknown(word, before, known, named)
        for word, before in _options_in(words)
        if _name(word) not in known or not word.startswith("--")
    ]
    if mistakes:
        raise ValueError(_answer(command, mistakes))
    words = _on_this_machine(words, command)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            config, left = tyro.cli(kind, args=words, prog=prog, return_unknown_args=True, **given)
    except SystemExit as ended:
        raise ValueError(_answer(command, [_reworded(printed.getvalue(), ended, words)])) from None
    if left:
        raise ValueError(_answer(command, [_stray(word, words, known) for word in left]))
    for name in ("out", "save", "csv", "plot", "results"):
        path = getattr(config, name, None)
        if path is not None and not getattr(config, "dry_run", False):  # which may be for a run on another machine
            _require_writable(path, f"--{name}")
    return config


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The one of `names` that is likest, if any is like it."""
    return difflib.get_close_matches(name, list(names), 1, cutoff)


def _answer(command: str, mistakes: list[str]) -> str:
    more = f"... and {len(mistakes) - MOST_MISTAKES} more" if len(mistakes) > MOST_MISTAKES else ""
    lines = [*mistakes[:MOST_MISTAKES], *([more] if more else [])]
    return "\n  ".join([*lines, f"`python -m {command} --help` shows all options"])


def known_options(kind: type, prefix: str = "") -> tuple[dict[str, type], list[str]]:
    """The types of the options of a configuration by name, and the names of what is given without an option."""
    import tyro

    known: dict[str, type] = {}
    named = []
    hints, annotated = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        about = getattr(annotated[one.name], "__metadata__", ())
        name = f"{prefix}{one.name}".replace("_", "-")
        if is_dataclass(hints[one.name]):
            is_flat = any(getattr(part, "name", None) == "" for part in about)  # tyro.conf.arg(name="")
            known |= known_options(hints[one.name], prefix if is_flat else f"{name}.")[0]
        elif tyro.conf.Positional in about:
            named.append(name)
        else:
            known[f"--{name}"] = hints[one.name]
            if hints[one.name] is bool:
                known[f"--{prefix}no-{one.name}".replace("_", "-")] = bool
    return known, named


def _name(word: str) -> str:
    """--log.checkpoint_every=5 -> --log.checkpoint-every; dashes that a text processor made are one, too."""
    name = re.split(r"[=\s]", word, maxsplit=1)[0]
    return "--" + name.lstrip("-\u2013\u2014").replace("_", "-") if word[:1] in "-\u2013\u2014" else name


def _options_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The words that are options and not values, such as negative numbers are, each with the word before it."""
    for before, word in pairwise(("", *words)):
        if re.match(r"(--|[-\u2013\u2014]+[^\W\d])", word) and word != "--":
            yield word, before


def _unknown(word: str, before: str, known: dict[str, type], named: list[str]) -> str:
    """What an option that the command does not have is answered with."""
    name = _name(word)
    if re.search(r"\s", word) and before in known and "=" not in before:
        return f'{before} wants its value after an equals sign: {before}="{word}"'
    if name in known:
        return f"an option begins with two hyphens: use {name}"
    # By their last part, which is what people remember: ours (--lr, --batch.lr: --optim.lr), and what others call it.
    bare = name[2:].lower()
    last = bare.rpartition(".")[2]
    meant: dict[str, list[str]] = {}
    for option in known:
        meant.setdefault(option[2:].rpartition(".")[2], []).append(option)
    for foreign, answers in _ANSWERS.items():
        ours = [answer for answer in answers if answer.split()[0] in known]
        if ours and foreign not in meant:
            meant[foreign] = ours[:1]
    for given in dict.fromkeys((bare, last)):
        if given in meant:
            return f"there is no {word.split('=')[0]}: use {' or '.join(meant[given])}"
    if bare in named or f"{bare}s" in named:
        return f"there is no {word.split('=')[0]}: it is given without an option, before the others"
    whole = {option[2:]: [option] for option in known}
    tries = ((last, meant, 0.8), (bare, whole, 0.6), (last, meant, 0.6))
    likely = next((names[one] for given, names, cutoff in tries for one in nearest(given, names, cutoff)), [])
    return f"there is no {word.split('=')[0]}" + (f": did you mean {' or '.join(likely[:3])}?" if likely else "")


def _stray(word: str, words: Sequence[str], known: dict[str, type]) -> str:
    """What a word that belongs to no option is answered with."""
    before = next((w for w, after in pairwise(words) if after == word), "")
    before = next((w.split("=")[0] for w in words if w.endswith(f"={word}")), before)
    if known.get(_name(before)) is bool:
        on = _name(before).replace("--no-", "--").replace(".no-", ".")
        section, _, last = on[2:].rpartition(".")
        return f"{before} takes no value, got {word}: use {on}, or --{section + '.' * bool(section)}no-{last}"
    return f"{word!r} is no value of an option: leave it out, or put quotes around what contains blanks"


def _reworded(text: str, ended: SystemExit, words: Sequence[str]) -> str:
    """What tyro says in the box `text`, or a check of ours has raised, as wanted and got."""
    parts = re.split(r"(?m)^\s*-{8,}\s*$", text)
    sections = [[line.strip() for line in part.splitlines() if line.strip()] for part in parts]
    first = " ".join(sections[min(1, len(sections) - 1)])
    if found := re.match(r"Error parsing (--\S+): ", first):  # a type; what it wants and its help stand below
        _, wanted, *about = sections[2]
        return f"wanted {wanted}, got {_value_of(found[1], words)}. {' '.join(about)}"
    if isinstance(cause := ended.__context__, Exception):  # of a check of ours; tyro has cut its lines
        return str(cause.__context__ if isinstance(cause.__context__, ValueError) else cause)
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", first):
        choices = sorted(re.findall(r"'([^']*)'", found[3]))
        return f"{found[2]} wants one of {' '.join(choices)}, got {found[1]}"
    if found := re.match(r"Missing value for argument '(.*)'. Expected (\d+) values", first):
        return f"{found[1]} wants {found[2]} value(s), got {_value_of(found[1], words) or 'none'}"
    missing = first.partition(": ")[2].replace("(required)", ";").replace(" ;", ";").strip("; ")
    return f"missing: {missing}"


def _value_of(option: str, words: Sequence[str]) -> str:
    """What was given for an option last."""
    values: list[str] = []
    is_it = False
    for word in words:
        if word.startswith("--"):
            is_it = _name(word) == _name(option)
            values = [word.partition("=")[2]] * ("=" in word) if is_it else values
        elif is_it:
            values.append(word)
    return " ".join(values)


def _on_this_machine(words: Sequence[str], command: str) -> list[str]:
    """The words with `~` expanded, which a shell leaves alone after an equals sign.

    ValueError for a URL where none can be used.
    """
    expanded, option = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name or option
        may_be_url = option in _MAY_BE_URLS or (command == "fastdistil.export" and not option)
        is_url = may_be_url and "://" in value and (option == "--mirror" or not value.startswith("file:"))
        is_here = is_url or not _ELSEWHERE.match(value) or bool(os.path.splitdrive(value)[0])  # a drive of Windows
        if (name and not equals) or is_here:
            expanded.append(f"{name}{equals}{os.path.expanduser(value)}")
            continue
        if value.startswith("file:"):
            fix = f"use {re.sub('^file:/+', '/', value)}"
        elif option == "--out" and command.startswith("fastdistil.pretrain"):
            fix = f"use a folder of this machine, and --mirror {value} to have it there, too"
        elif option in ("--out", "--save"):
            fix = "use a folder of this machine, and copy it there afterwards"
        elif "huggingface.co/" in value:
            fix = "give the model's name alone, ORGANISATION/NAME (a data set for fastdistil.prepare is hf:NAME)"
        elif may_be_url:
            fix = "a URL begins with s3://, gs:// or the like; copy it to this machine, or mount it"
        else:
            fix = "copy it to this machine first, or mount it"
        raise ValueError(f"{value} is not on this machine: {fix}")
    return expanded


def _require_writable(path: Path, option: str) -> None:
    """ValueError where nothing can be written at `path`, so that no work is lost for that."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    folder = there.parent if there == path.absolute() and not there.is_dir() else there
    if not folder.is_dir():
        raise ValueError(f"{option} {path} cannot be made: {folder} is no folder: name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission to write in {folder}: name another place")
