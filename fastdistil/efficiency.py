"""Command: parameters, size and speed of encoders, as their users get them from transformers. The paper's table 3.

    python -m fastdistil.efficiency teacher/ student/

Latency is that of one sequence, throughput that of a batch of 32, both of the bare encoder on random ids of one length.
The models take turns round by round, so that a slow minute of the machine is everybody's; figures are medians, and
ratios are to the first.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastdistil.model.headers import weight_files
from fastdistil.remote import hub
from fastdistil.run import console, folder, options
from fastdistil.run.command import command, leave, require
from fastdistil.run.files import make_room, write_json

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = (
    "published: BERT-base 110 M parameters and 668 s, DistilBERT 66 M and 410 s (STS-B's dev set on a CPU at batch 1)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """Compare parameters, size on disk, latency and throughput of encoders."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Hugging Face folders, or names on the hub; the first is what the others are compared with."""
    length: int | None = None
    """Tokens of a sequence. None: 128, or what all models read."""
    batch_size: int = 32
    """Sequences at a time, for the throughput."""
    rounds: int = 20
    """Turns of each model."""
    threads: int | None = None
    """CPU threads. None: as PyTorch chooses."""
    out: Path | None = None
    """Keep the figures in this JSON file."""

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if not self.models:
            raise ValueError("wanted one model folder or more")
        for model in self.models:
            if model.exists() or hub.name_of(model) is None:
                check(model)


def check(model: Path) -> Path:
    """The folder `model` again. Raises ValueError where it is no model, or lacks weights."""
    folder.require_model(model)
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is no Hugging Face folder: wanted {model / 'config.json'}")
    weight_files(model)  # refuses what has none, or not all of them
    return model


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: measured. 2: a wrong command line or model."""
    config = options.parse(EfficiencyConfig, args, "efficiency")
    require("efficiency", "eval", "transformers")
    make_room(config.out)
    found = measure(config)
    console.show(table(found), PUBLISHED)
    if config.out is not None:
        write_json(config.out, found)
        print(f"{config.out}: {len(found['models'])} model(s)")
    if config.out is not None and folder.is_run(config.out.parent):
        print(f"next: {console.command_line('report', config.out.parent)}")
    elif len(config.models) == 2:
        reference, model = config.models
        print(f"next: {console.command_line('evaluate', model, '--reference', reference)} --task sts --data PAIRS")
    return 0


def measure(config: EfficiencyConfig) -> dict[str, Any]:
    """{"length", "batch_size", "models": [{"path", "class", "num_parameters", "bytes", "cpu": ..., "cuda": ...}]}.

    The figures of a device are {"threads" (cpu), "latency_ms", "latency_ms_p90", "throughput_per_s"}; "cuda" is there
    where a GPU is.
    """
    folders = [check(hub.folder_of("model", path)) for path in config.models]
    import torch
    import transformers

    from fastdistil.evaluation import finetune

    finetune.quiet()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    models, records = [], []
    for path, here in zip(config.models, folders, strict=True):
        finetune.configuration(here)
        model = finetune.pretrained(transformers.AutoModel, here).eval()
        size = sum(file.stat().st_size for file in weight_files(here))
        models.append(model)
        records.append(
            {"path": str(path), "class": type(model).__name__, "num_parameters": model.num_parameters(), "bytes": size}
        )

    # All read the same random ids, from the later half of the smallest vocabulary. Before it is the padding by which a
    # RoBERTa counts its positions; in a ModernBERT, whose special tokens come last, they are tokens as any others.
    readable, path = min(
        (finetune.longest_input(model), path) for model, path in zip(models, config.models, strict=True)
    )
    length = int(min(128, readable)) if config.length is None else config.length
    if length > readable:
        raise ValueError(
            f"--length {length} is more than the {readable} tokens that {path} reads: give {readable} or less"
        )
    vocab_size = min(model.config.vocab_size for model in models)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size // 2, vocab_size, (config.batch_size, length), generator=generator)

    for model, path in zip(models, config.models, strict=True):
        finetune.require_readable(model, path, {"input_ids": ids[:1]})

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        batch = ids.to(device)
        for model in models:
            model.to(device)
        with torch.inference_mode():
            latency = in_turn(models, batch[:1], rounds=config.rounds)
            duration = in_turn(models, batch, rounds=max(3, config.rounds // 4))
        for record, alone, together in zip(records, latency, duration, strict=True):
            record[device] = {
                "latency_ms": 1e3 * statistics.median(alone),
                "latency_ms_p90": 1e3 * sorted(alone)[math.ceil(0.9 * len(alone)) - 1],
                "throughput_per_s": config.batch_size / statistics.median(together),
            } | ({"threads": torch.get_num_threads()} if device == "cpu" else {})
    return {"length": length, "batch_size": config.batch_size, "models": records}


def in_turn(models: list[Any], ids: Any, *, rounds: int) -> list[list[float]]:
    """Seconds that each model takes for `ids` in each of `rounds` turns of all; three turns before them warm up."""
    import torch

    times: list[list[float]] = [[] for _ in models]
    for turn in range(-3, rounds):
        for model, kept in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(input_ids=ids)
            if ids.is_cuda:
                torch.cuda.synchronize()  # the end of the work is what is timed
            if turn >= 0:
                kept.append(time.perf_counter() - begin)
    return times


def table(found: dict[str, Any]) -> "Table":
    """A row a model and device; ratios to the first in brackets, of speeds how many times as fast."""
    first, rows = found["models"][0], []
    for model in found["models"]:
        size, share = model["num_parameters"], model["num_parameters"] / first["num_parameters"]
        about = (Path(model["path"]).name, f"{size:,} ({share:.2f})", f"{model['bytes'] / 1e6:.1f}")
        for device in (name for name in ("cpu", "cuda") if name in model):
            latency, throughput = model[device]["latency_ms"], model[device]["throughput_per_s"]
            faster = first[device]["latency_ms"] / latency
            more = throughput / first[device]["throughput_per_s"]
            rows.append((*about, device, f"{latency:.2f} ({faster:.2f} x)", f"{throughput:,.1f} ({more:.2f} x)"))
            about = ("", "", "")
    speeds = "ms at batch 1", f"sequences/s at batch {found['batch_size']}"
    return console.table(("model", "parameters", "MB", "device", *speeds), rows)


if __name__ == "__main__":
    leave(main())
