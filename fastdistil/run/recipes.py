"""Whole configurations with a name. Each is a function, so that a new one starts from another by `replace`."""

import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from fastdistil.run import folder, options
from fastdistil.run.config import (
    BatchConfig,
    Config,
    LogConfig,
    LossConfig,
    MaskingConfig,
    OptimConfig,
    StudentConfig,
    from_json,
)

log = logging.getLogger("fastdistil")


def distilbert() -> Config:
    """DistilBERT to the letter: half the teacher's layers, 5 x KL at T=2 + 2 x masked LM + 1 x cosine."""
    return Config(recipe="distilbert", out=Path("runs/distilbert"))


def mlm() -> Config:
    """Masked LM alone, no teacher: trains a teacher, gives an encoder a head, or is the paper's baseline."""
    return replace(
        distilbert(),
        recipe="mlm",
        out=Path("runs/mlm"),
        student=StudentConfig(init="random"),
        loss=LossConfig(kd=0.0, mlm=1.0, cosine=0.0),
    )


def quickstart() -> Config:
    """The distilbert objective at a size that two CPU cores finish in minutes."""
    return replace(
        distilbert(),
        recipe="quickstart",
        out=Path("runs/quickstart"),
        batch=BatchConfig(size=8192, unit="tokens", token_budget=4096),
        optim=OptimConfig(lr=1e-3, duration=200, unit="updates"),
        log=LogConfig(every=10, validate_every=100, checkpoint_every=100),
    )


def hidden_cosine() -> Config:
    """distilbert, and the cosine of the hidden states at every layer, not only the last."""
    config = distilbert()
    return replace(
        config, recipe="hidden_cosine", out=Path("runs/hidden_cosine"), loss=replace(config.loss, hidden=1.0)
    )


def minilm() -> Config:
    """MiniLMv2: relations among queries, keys and values, for students of any width.

    Masked LM, which the paper has not, trains the head that the export has.
    """
    loss = LossConfig(kd=0.0, mlm=1.0, cosine=0.0, queries=1.0, keys=1.0, values=1.0)
    return replace(distilbert(), recipe="minilm", out=Path("runs/minilm"), loss=loss)


def embed() -> Config:
    """An embedding model with fewer layers: hidden states and embeddings of a sentence encoder; no head, no masks.

    Many small updates and no dropout were best for students of minutes (docs/study.md); a cluster wants larger ones.
    """
    return replace(
        distilbert(),
        recipe="embed",
        out=Path("runs/embed"),
        batch=BatchConfig(size=4096, unit="tokens", token_budget=2048),
        student=StudentConfig(fold_token_types=True, projection=True, dropout=0.0, attention_dropout=0.0),
        loss=LossConfig(kd=0.0, mlm=0.0, cosine=0.0, hidden=1.0, embedding=1.0),
        masking=MaskingConfig(fraction=0.0),
        optim=OptimConfig(duration=1),
    )


def distilroberta() -> Config:
    """distilbert for a RoBERTa, whose student is a RoBERTa: masked tokens are drawn uniformly, as in its training."""
    config = distilbert()
    return replace(
        config, recipe="distilroberta", out=Path("runs/distilroberta"), masking=replace(config.masking, smoothing=0.0)
    )


def multilingual() -> Config:
    """distilbert for a multilingual BERT, whose vocabulary of 119,547 takes most memory: shorter micro-batches."""
    config = distilbert()
    return replace(
        config, recipe="multilingual", out=Path("runs/multilingual"), batch=replace(config.batch, token_budget=8192)
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f for f in (distilbert, mlm, embed, quickstart, distilroberta, multilingual, hidden_cosine, minilm)
}


def parse(args: Sequence[str] | None, *, quiet: bool = False) -> Config:
    """The configuration that RECIPE [OPTIONS] asks for, of the command line unless `args` are given.

    Raises ValueError, which says what to write; SystemExit(0) after --help, which is printed unless `quiet`.
    """
    # The deepspeed launcher writes --local_rank before our words; the environment says it, too.
    given = [w for w in (sys.argv[1:] if args is None else args) if not re.fullmatch("--local[-_]rank=[0-9]+", w)]
    if given[:1] in (["-h"], ["--help"]):
        if not quiet:
            print(HELP.format(recipes="\n".join(f"  {n:<16}{_about(make)}" for n, make in RECIPES.items())))
        raise SystemExit(0)
    recipe = given[0].replace("-", "_").lower() if given else ""
    own = _going_on(given, recipe)
    if own is not None and (recipe in RECIPES or given[0].startswith("-")):
        if recipe in RECIPES and recipe != own.recipe:
            log.warning("going on with the run in %s, whose recipe is %s, not %s", own.out, own.recipe, recipe)
        return options.parse(Config, given[recipe in RECIPES :], f"pretrain {own.recipe}", default=own, quiet=quiet)
    if recipe in RECIPES:
        return options.parse(Config, given[1:], f"pretrain {recipe}", default=RECIPES[recipe](), quiet=quiet)
    if not given:
        raise ValueError(f"pretrain wants a recipe first: {' '.join(RECIPES)}; `{PROG} --help` says what they are")
    named = next((word for word in given if word.removeprefix("--recipe=") in RECIPES), None)
    if given[0].startswith("-"):
        rest = [word for word in given if word not in (named, "--recipe")]
        first = (named or "RECIPE").removeprefix("--recipe=")
        raise ValueError(f"the recipe comes first: {PROG} {first} {shlex.join(rest)}".rstrip())
    meant = " or ".join(options.nearest(recipe, list(RECIPES)))
    fix = f"did you mean {meant}?" if meant else f"there are {' '.join(RECIPES)}"
    raise ValueError(f"there is no recipe {given[0]}: {fix}")


def _going_on(given: Sequence[str], recipe: str) -> Config | None:
    """The run's own configuration, for what is not given, where --resume auto goes on with a run that is there."""
    last: dict[str, str] = {}
    for word, following in pairwise((*given, "")):
        name, equals, value = word.partition("=")
        last[name] = value if equals else following
    out = last.get("--out") or (str(RECIPES[recipe]().out) if recipe in RECIPES else "")
    run = Path(out).expanduser()
    if last.get("--resume") != "auto" or not out or not (run / "config.json").is_file():
        return None
    return replace(from_json(folder.read(run)["config"]), out=run, profile=None)


def _about(make: Callable[[], Config]) -> str:
    return (make.__doc__ or "").strip().splitlines()[0]


PROG = "python -m fastdistil.pretrain"
HELP = f"""usage: {PROG} RECIPE [OPTIONS]     on several devices: torchrun --nproc-per-node N -m ...

recipes, each with values for all options:
{{recipes}}

options that most runs have:
  --data.shards FOLDER      the text, as `python -m fastdistil.prepare` wrote it
  --teacher.path FOLDER     the Hugging Face folder of the teacher
  --out FOLDER              the folder of the run
  --resume auto             go on from its newest checkpoint, if there is one; what is not given is as the run has it
  --optim.duration N        how long, in --optim.unit epochs or updates
  --batch.token-budget N    tokens of a micro-batch: what fits the device
  --dry-run                 say what the run will be (memory, updates, FLOPs), and stop

`{PROG} RECIPE --help` shows all options, with what the recipe sets."""
