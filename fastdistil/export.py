"""A run becomes a folder that Hugging Face loads: `python -m fastdistil.export RUN --out DIR`.

The folder holds config.json, model.safetensors (fp32), the tokenizer's files and a model card. It
appears under its name only when it is whole. torch is imported after the command line and the run
have been checked.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastdistil import __version__
from fastdistil.model.architecture import Architecture
from fastdistil.run import folder
from fastdistil.run.config import flatten

_CARD_SECTIONS = ("loss", "masking", "optim", "batch", "student")
"""What of a run's configuration its model card shows: what shaped the weights, no paths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Turn a run of fastdistil.pretrain into a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    checkpoint: int | None = None
    """Export the checkpoint made after this many updates. None: the newest."""
    overwrite: bool = False
    """Replace --out if it holds an earlier export."""


def main(args: list[str] | None = None) -> int:
    """Exit status 0: the folder is there. 2: a wrong command line or run; nothing was written."""
    config = tyro.cli(ExportConfig, args=args, prog="python -m fastdistil.export")
    try:
        print(export(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(config: ExportConfig) -> str:
    """Writes the folder and returns one line about it.

    Raises ValueError or OSError where the run cannot be exported or --out not be used; --out is
    then unchanged.
    """
    record = folder.read(config.run)
    student = _architecture(config.run, record, "student")
    teacher = _architecture(config.run, record, "teacher") if record.get("teacher") else None
    if not (config.run / "tokenizer").is_dir():
        raise ValueError(f"{config.run} is not a whole run: wanted its tokenizer in {config.run / 'tokenizer'}")
    _check_out(config.out, overwrite=config.overwrite)

    # Two seconds of torch, so only when nothing above was wrong.
    from fastdistil.model import weights
    from fastdistil.run import checkpoint

    class_name = weights.hugging_face_class(student)
    state, progress = checkpoint.load_weights(config.run, config.checkpoint)
    metrics = _last_metrics(config.run / "metrics.jsonl", progress["update"])
    part = config.out.with_name(f"{config.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        weights.write_hugging_face_folder(state, student, config.run / "tokenizer", part)
        try:
            card = model_card(config.out.name, class_name, record, student, teacher, progress, metrics)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config.run / 'config.json'} does not describe a run: {error!r}") from error
        (part / "README.md").write_text(card, encoding="utf-8")
        replaced = config.out.with_name(f"{config.out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if config.out.exists():
            config.out.rename(replaced)  # kept until the new one is in its place
        part.rename(config.out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return (
        f"{config.out}: {class_name}, {student.num_parameters:,} parameters, after update "
        f"{progress['update']:,}; load it with AutoModelForMaskedLM.from_pretrained({str(config.out)!r})"
    )


def _architecture(run: Path, record: dict[str, Any], role: str) -> Architecture:
    try:
        return Architecture(**record[role])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run / 'config.json'} does not describe a {role}: {error}") from None


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.name:
        raise ValueError(f"--out must name a folder to make, got {str(out)!r}")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out must be a folder, got the file or link {out}: choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty: choose another, or replace it by --overwrite")
    if not all((out / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ValueError(f"--out {out} holds no export, so --overwrite does not delete it: choose another")


def _last_metrics(path: Path, update: int) -> dict[str, dict[str, Any]]:
    """The last record of each split in metrics.jsonl not later than `update`; none without the file."""
    last: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return last
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["update"] <= update:
                last[record["split"]] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line that was being written when the run was killed
    return last


def model_card(
    name: str,
    class_name: str,
    record: dict[str, Any],
    student: Architecture,
    teacher: Architecture | None,
    progress: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
) -> str:
    """The README.md of the exported folder: what the model is, how it was trained, how to load it."""
    config, data = record["config"], record.get("data") or {}
    recipe = config.get("recipe", "unknown")
    teacher_path = (config.get("teacher") or {}).get("path")
    rows = {
        "recipe": f"`{recipe}`",
        "student": f"{_sizes(student)}; {student.num_parameters:,} parameters",
        "teacher": f"`{Path(teacher_path).name}`, {_sizes(teacher)}" if teacher and teacher_path else "none",
        "updates": f"{progress['update']:,}",
        "training tokens": f"{progress['tokens']:,}" if "tokens" in progress else "not recorded",
        "data": f"{_sources(data.get('sources'))}: {data.get('num_sequences', 0):,} sequences, "
        f"{data.get('num_tokens', 0):,} tokens",
        "tokenizer sha256": f"`{data.get('tokenizer_sha256', 'not recorded')}`",
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()) or "not recorded",
        "exported by": f"fastdistil {__version__}",
    }
    measured = [
        (split, key, value)
        for split, values in metrics.items()
        for key, value in values.items()
        if isinstance(value, float) and not key.endswith(("_per_s", "mfu"))
    ]
    settings = flatten({key: config[key] for key in _CARD_SECTIONS if key in config})
    settings.pop("student.init", None)  # may be a path; the teacher's row says what it was
    return f"""---
# license: yours to choose; those of the teacher and of the data may bind you
library_name: transformers
pipeline_tag: fill-mask
tags:
- fastdistil
- {"knowledge-distillation" if teacher else "masked-language-modeling"}
---
# {name}

{_introduction(class_name, teacher is not None)}

```python
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{name}")
```

## Training
{_table(("", ""), rows.items())}

## Losses
{_losses(config.get("loss") or {}, teacher is not None)}

{
        _table(("split", "measure", "value"), ((s, k, f"{v:.4g}") for s, k, v in measured))
        if measured
        else "No metrics were recorded."
    }

## Settings
{_table(("setting", "value"), ((k, f"`{json.dumps(v)}`") for k, v in settings.items()))}
"""


def _introduction(class_name: str, distilled: bool) -> str:
    if distilled:
        return (
            f"A `{class_name}` distilled from a larger encoder during pre-training, as "
            "[DistilBERT](https://arxiv.org/abs/1910.01108) was."
        )
    return f"A `{class_name}` pre-trained by masked language modelling, without a teacher."


def _losses(loss: dict[str, Any], distilled: bool) -> str:
    if not distilled:
        return "Cross-entropy of the masked tokens."
    terms = (
        f"{loss.get('kd')} x T² KL(teacher, student) at temperature {loss.get('temperature')} over all tokens "
        f"+ {loss.get('mlm')} x cross-entropy of the masked tokens "
        f"+ {loss.get('cosine')} x (1 - cos) of the last hidden states"
    )
    if loss.get("hidden"):
        terms += f" + {loss['hidden']} x (1 - cos) of the outputs of every layer"
    if loss.get("values"):
        terms += f" + {loss['values']} x KL of the value relations (MiniLMv2) of the last layers"
    return f"{terms}."


def _sizes(model: Architecture) -> str:
    return (
        f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_heads} heads, feed-forward {model.ffn_size}, "
        f"vocabulary {model.vocab_size:,}, {model.max_positions} positions"
    )


def _sources(sources: Any) -> str:
    """The names of the texts, without the folders they lay in."""
    names = [s.get("name", "?") if isinstance(s, dict) else s for s in sources or ()]
    return ", ".join(Path(str(name)).name for name in names) or "not recorded"


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
