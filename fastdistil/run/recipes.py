"""What a run is started from: a recipe, a file of options, and the words after them.

A recipe is a file of recipes/, which states what differs from the defaults of `Config`; a user's own is any file of
that form, given by --config. Their values are read as if they stood on the command line, and words of the command line
go on top.
"""

import dataclasses
import functools
import logging
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from fastdistil.run import folder, options
from fastdistil.run.config import Config, from_json, to_json

log = logging.getLogger("fastdistil")

_FOLDER = Path(__file__).with_suffix("")
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


class File(NamedTuple):
    """A file of options: YAML, or the config.json of a run."""

    path: Path
    recipe: str
    """What its values go on top of; "" where it does not say."""
    words: list[str]
    """Its values, as they would stand on the command line."""
    lines: dict[str, int]
    """Where each option stands, from 1."""
    run: str
    """The folder of the run whose config.json it is; "" for any other file."""

    def onto(self, default: Config, command: str) -> Config:
        """The configuration that its values make of another. Raises ValueError with file and line."""
        try:
            return options.parse(Config, self.words, command, default=default)
        except ValueError as error:
            mistakes = str(error).split("\n  ")
            raise ValueError("\n  ".join(map(self._located, mistakes))) from None

    def _located(self, mistake: str) -> str:
        if mistake.startswith("`"):  # how to get help
            return mistake
        line = next((self.lines[name] for name in re.findall(r"--[\w.-]+", mistake) if name in self.lines), None)
        return f"{self.path}{f', line {line}' if line else ''}: {mistake}"


@functools.cache
def named(recipe: str) -> Config:
    """The configuration of a recipe, one of NAMES."""
    start = Config(recipe=recipe, out=Path("runs") / recipe)
    return read(_FOLDER / f"{recipe}.yaml").onto(start, f"pretrain {recipe}")


def read(path: Path) -> File:
    """The options in a YAML file, {section: {option: value}} or {section.option: value}, or in a run's config.json.

    Raises ValueError, with file and line, for a file that holds something else.
    """
    import yaml

    if path.is_dir():
        inside = path / "config.json"
        raise ValueError(f"--config {path} is a folder: give {inside if inside.is_file() else 'a file'}")
    try:
        top = yaml.compose(path.read_bytes(), yaml.SafeLoader)
    except FileNotFoundError:
        raise ValueError(f"--config {path} does not exist: give a YAML file, or the config.json of a run") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}{where} is no YAML: {problem}") from None
    record = {key: value for _, key, value in _items(top, path)}
    is_run = isinstance(record.get("config"), yaml.MappingNode) and "student" in record
    known, _ = options.known_options(Config)
    found = File(path, "", [], {}, "")
    for line, name, node in _leaves(record["config"] if is_run else top, path):
        option = "--" + name.replace("_", "-")
        if option in found.lines:
            raise ValueError(f"{path}, line {line}: {name} is also in line {found.lines[option]}: leave one out")
        found.lines[option] = line
        if option == "--recipe" and not is_run:
            found = found._replace(recipe=_recipe(str(node.value), f"{path}, line {line}: "))
        elif option == "--out" and is_run:
            found = found._replace(run=str(node.value))
        elif not any(other.startswith(f"{option}.") for other in known) or node.value:  # not an empty section
            try:
                found.words.extend(_words(option, node, known.get(option)))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
    return found


def _items(node: Any, path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, key, node of the value) of a mapping; nothing of an empty file."""
    import yaml

    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(f"{path}, line {line}: wanted options as `section:` and below it `option: value`")
    for key, value in node.value:
        yield key.start_mark.line + 1, str(key.value), value


def _leaves(top: Any, path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, section.option, node of the value)."""
    import yaml

    for line, key, value in _items(top, path):
        if isinstance(value, yaml.MappingNode):
            yield from ((at, f"{key}.{name}", leaf) for at, name, leaf in _items(value, path))
        else:
            yield line, key, value


def _words(option: str, node: Any, kind: Any) -> list[str]:
    """What gives this value on the command line; `kind` is the type of the option, None for one that is unknown."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        if kind is not None and tuple not in (get_origin(kind), *map(get_origin, get_args(kind))):
            raise ValueError(f"{option} wants one value, got a list")
        if all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [option, *(str(item.value) for item in node.value)]
    if not isinstance(node, yaml.ScalarNode):
        what = "a section" if isinstance(node, yaml.MappingNode) else "a list of lists"
        raise ValueError(f"{option} wants a value, got {what}")
    is_bool = node.tag == "tag:yaml.org,2002:bool"
    if kind is bool:
        if not is_bool:
            raise ValueError(f"{option} wants true or false, got {node.value}")
        section, _, name = option.removeprefix("--").rpartition(".")
        is_on = yaml.SafeLoader.bool_values[node.value.lower()]
        return [option if is_on else f"--{section + '.' * bool(section)}no-{name}"]
    special = {"tag:yaml.org,2002:null": "None", "tag:yaml.org,2002:bool": str(node.value).capitalize()}
    return [f"{option}={special.get(node.tag, node.value)}"]


def to_yaml(config: Config) -> str:
    """Every option with its meaning as a file that --config reads."""
    return "\n".join([f"# {PROG} --config FILE", *_lines(config, to_json(config)), ""])


def _lines(config: Any, values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The lines of `to_yaml`; below a section they are indented."""
    import docstring_parser
    import yaml

    meanings = {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(type(config)).params}
    for field in dataclasses.fields(config):
        value, section = values[field.name], getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            about = (type(section).__doc__ or "").splitlines()[0]
            yield from ("", f"# {about}", f"{field.name}:", *_lines(section, value, "  "))
            continue
        meaning = " ".join(meanings.get(field.name, "").split())
        yield from textwrap.wrap(meaning, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1e9)
        yield f"{indent}{field.name}: {written.removesuffix('...' + chr(10)).strip()}"


def parse(args: Sequence[str] | None, *, quiet: bool = False) -> Config:
    """The configuration that [RECIPE] [OPTIONS] asks for, of the command line unless `args` are given.

    Raises ValueError, which says what to write; SystemExit(0) after --help and --print-config, which are printed unless
    `quiet`.
    """
    # The deepspeed launcher writes --local_rank before our words; the environment says it, too.
    given = [w for w in (sys.argv[1:] if args is None else args) if not re.fullmatch("--local[-_]rank=[0-9]+", w)]
    if given[:1] in (["-h"], ["--help"]):
        if not quiet:
            print(HELP.format(recipes="\n".join(f"  {name:<16}{_about(name)}" for name in NAMES)))
        raise SystemExit(0)
    is_printed = "--print-config" in given
    file, given = _file([word for word in given if word != "--print-config"])
    recipe = given[0].replace("-", "_").lower() if given else ""
    recipe, rest = (recipe, given[1:]) if recipe in NAMES else ("", given)
    if rest and not rest[0].startswith("-") and not recipe:
        _recipe(rest[0])
    default = _start(recipe, file, rest)
    command = f"pretrain {default.recipe}"
    if file:
        default = file.onto(default, command)
    config = options.parse(Config, rest, command, default=default, quiet=quiet)
    if is_printed:
        if not quiet:
            print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _start(recipe: str, file: File | None, rest: Sequence[str]) -> Config:
    """What the values of the file and the command line go on top of."""
    if file and recipe and file.recipe and file.recipe != recipe:
        raise ValueError(f"{file.path} starts from recipe {file.recipe}, the command line from {recipe}: leave one out")
    asked = recipe or (file.recipe if file else "")
    own = _going_on([*(file.words if file else ()), *rest], asked)
    if own is not None:
        if asked and asked != own.recipe:
            log.warning("going on with the run in %s, whose recipe is %s, not %s", own.out, own.recipe, asked)
        return own
    if file and file.run and not any(word.partition("=")[0] == "--out" for word in rest):
        raise ValueError(f"{file.path} is of the run in {file.run}: give another --out to repeat it in")
    if asked or file:
        return named(asked) if asked else Config()
    if not rest:
        raise ValueError(
            f"pretrain wants a recipe first, or --config FILE: {' '.join(NAMES)}; `{PROG} --help` says what they are"
        )
    name = next((word for word in rest if word.removeprefix("--recipe=") in NAMES), None)
    words = [word for word in rest if word not in (name, "--recipe")]
    first = (name or "RECIPE").removeprefix("--recipe=")
    raise ValueError(f"the recipe comes first: {PROG} {first} {shlex.join(words)}".rstrip())


def _recipe(word: str, where: str = "") -> str:
    """The name of a recipe, however it is spelt. Raises ValueError where there is none."""
    name = word.replace("-", "_").lower()
    if name in NAMES:
        return name
    meant = " or ".join(options.nearest(name, NAMES))
    fix = f"did you mean {meant}?" if meant else f"there are {' '.join(NAMES)}"
    if Path(word).suffix in (".yaml", ".yml", ".json"):
        fix = f"use --config {word}"
    raise ValueError(f"{where}there is no recipe {word}: {fix}")


def _file(given: Sequence[str]) -> tuple[File | None, list[str]]:
    """The file that --config names, and the other words."""
    paths, rest, words = [], [], iter(given)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            paths.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if len(paths) > 1:
        raise ValueError(f"--config wants one file, got {' '.join(paths)}: its `recipe:` says what it starts from")
    if paths and (not paths[0] or paths[0].startswith("--")):
        raise ValueError("--config wants a file, got none: give a YAML file, or the config.json of a run")
    return read(Path(paths[0]).expanduser()) if paths else None, rest


def _going_on(given: Sequence[str], recipe: str) -> Config | None:
    """The run's own configuration, for what is not given, where --resume auto goes on with a run that is there."""
    last: dict[str, str] = {}
    for word, following in pairwise((*given, "")):
        name, equals, value = word.partition("=")
        last[name] = value if equals else following
    out = last.get("--out") or (f"runs/{recipe}" if recipe else "")
    run = Path(out).expanduser()
    if last.get("--resume") != "auto" or not out or not (run / "config.json").is_file():
        return None
    return replace(from_json(folder.read(run)["config"]), out=run, profile=None)


def _about(recipe: str) -> str:
    return (_FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


PROG = "python -m fastdistil.pretrain"
HELP = f"""usage: {PROG} [RECIPE] [OPTIONS]     on several devices: torchrun --nproc-per-node N -m ...

recipes, each with values for all options:
{{recipes}}

options that most runs have; `{PROG} RECIPE --help` shows all, with what the recipe sets:
  --data.shards FOLDER      the text, as `python -m fastdistil.prepare` wrote it
  --teacher.path FOLDER     the Hugging Face folder of the teacher
  --out FOLDER              the folder of the run
  --resume auto             go on from its newest checkpoint, if there is one; what is not given is as the run has it
  --optim.duration N        how long, in --optim.unit epochs or updates
  --batch.token-budget N    tokens of a micro-batch: what fits the device
  --config FILE             values from such a file as --print-config prints, or the config.json of a run
  --dry-run                 say what the run will be (memory, updates, FLOPs), and stop"""
