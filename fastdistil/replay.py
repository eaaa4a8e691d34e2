"""Command: one update of a run again, micro-batch by micro-batch, in one process: `python -m fastdistil.replay RUN --update U`.

Order, masks and dropout are functions of (seed, update), so that with the weights that the run had this is what happened there. Says
loss and gradient norm of every micro-batch; of one where they are not finite also where that began, and its text.
"""

import logging
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastdistil.run import folder
from fastdistil.run.config import Config, from_json

if TYPE_CHECKING:
    from torch import Tensor

    from fastdistil.data.batches import MicroBatch
    from fastdistil.training.objective import Objective, TeacherOutput
    from fastdistil.training.preflight import Resolved

log = logging.getLogger("fastdistil")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Compute one update of a run again and say which micro-batch is not finite."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    update: int
    """Which one, counted from 1, as in metrics.jsonl."""
    checkpoint: int | None = None
    """Take the weights of the checkpoint of this update. None: the newest."""
    shards: Path | None = None
    """Where the text is now. None: where the run found it."""
    teacher: Path | None = None
    """Where the teacher is now. None: where the run found it."""


def main(args: list[str] | None = None) -> int:
    """Exit status 0: everything was finite. 1: something was not. 2: a wrong command line or run."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    asked = tyro.cli(ReplayConfig, args=args, prog="python -m fastdistil.replay")
    try:
        return 1 if replay(asked, configuration(asked)) else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def configuration(asked: ReplayConfig) -> Config:
    """The run's own, in one process."""
    config = from_json(folder.read(asked.run)["config"])
    return replace(
        config,
        out=asked.run,
        resume="auto",
        profile=None,
        data=replace(config.data, shards=asked.shards or config.data.shards, num_workers=0),
        teacher=replace(config.teacher, path=asked.teacher or config.teacher.path, ranks=0),
        engine=replace(config.engine, zero_stage=None, compile=False),
    )


def replay(asked: ReplayConfig, config: Config) -> int:
    """Print the update; returns the number of its micro-batches that are not finite."""
    from fastdistil.training.preflight import resolve

    resolved = resolve(config, world_size=1, by_torchrun=False)
    import torch

    from fastdistil.data import batches
    from fastdistil.run import checkpoint
    from fastdistil.run import ranks as dist
    from fastdistil.training import engine, inputs
    from fastdistil.training import objective as losses
    from fastdistil.training.teacher import RemoteTeacher

    place = dist.init(config.engine.device, timeout_s=config.engine.timeout_s, threads=config.engine.threads)  # fmt: skip
    text = inputs.load_text(resolved, rank=0, world_size=1)
    if not 1 <= asked.update <= text.num_updates:
        raise ValueError(f"--update must be in [1, {text.num_updates}], got {asked.update}")
    dtype = engine.teacher_dtype(config, place.device)
    teacher, student = inputs.load_models(resolved, place=place, dtype=dtype)
    assert not isinstance(teacher, RemoteTeacher)  # no ranks are set aside
    weights, state = checkpoint.load_weights(asked.run, asked.checkpoint)
    student.load_state_dict(weights)
    objective = losses.Objective(student, config.loss).to(place.device).train()
    compute: Any = objective
    if engine.compute_dtype(config, place.device) == torch.bfloat16:
        compute = engine.Bf16Compute(objective)
    update = asked.update - 1
    if state["update"] != update and not _skipped_since(state, asked):
        print(f"weights of update {state['update']}: before update {asked.update} the run's were others")
    step = text.plan.update(update)
    broken = 0
    for k, slot in enumerate(step.slots):
        batch = text.collator(slot).to(place.device)
        torch.manual_seed(batches.seed_of(config.seed, "dropout", update, k))
        hints = None if teacher is None else teacher(batch)
        loss, sums = compute(batch, hints, step.num_tokens, step.num_masked)
        loss.backward()
        trained = [p.grad for p in student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(trained).item()
        print(f"micro-batch {k}: {len(batch.sequences)} sequences, loss {loss.item():.6g} of the update's, gradient norm {norm:.6g}")  # fmt: skip
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            broken += 1
            print("\n".join(f"    {line}" for line in diagnosis(objective, batch, hints, sums)))
            print("\n".join(f"    {line}" for line in texts(resolved, batch)))
        student.zero_grad(set_to_none=True)
    print(f"{broken} of {len(step.slots)} micro-batches of update {asked.update} are not finite")
    return broken


def _skipped_since(state: dict[str, Any], asked: ReplayConfig) -> bool:
    """Whether nothing changed between the update and the checkpoint: a run that ends for this reason saves what they met."""
    return 0 <= state["update"] - asked.update < state.get("skipped", 0)


def diagnosis(objective: "Objective", batch: "MicroBatch", hints: "TeacherOutput | None", sums: "Tensor") -> list[str]:
    """What of a micro-batch is not finite, from its inputs to its gradients."""
    import torch

    from fastdistil.training import objective as losses

    def bad(tensors: dict[str, Any]) -> list[str]:
        return [n for n, t in tensors.items() if not torch.isfinite(t).all().item()]

    student = objective.student
    with torch.no_grad():
        hidden_ND = student.encoder(batch.input_ids, batch.position_ids, batch.layout)
    parts = {
        "weights": bad(dict(student.named_parameters())),
        "teacher": bad({} if hints is None else {"last hidden state": hints.hidden_NE, "input of its vocabulary matrix": hints.transformed_NE}),
        "student": bad({"last hidden state, without dropout": hidden_ND}),
        "losses": bad(dict(zip(losses.SUMS, sums, strict=True))),
        "gradients": bad({n: p.grad for n, p in student.named_parameters() if p.grad is not None}),
    }  # fmt: skip
    return [
        f"{part} not finite: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for part, names in parts.items()
        if names
    ]


def texts(resolved: "Resolved", batch: "MicroBatch") -> list[str]:
    """The first tokens of the sequences of a micro-batch, masked as they were."""
    from fastdistil.data import tokenizer

    words, begin, lines = tokenizer.read_vocabulary(resolved.tokenizer_path), 0, []
    for number, length in zip(batch.sequences, batch.lengths, strict=False):
        ids = batch.input_ids[begin : begin + min(length, 20)].tolist()
        lines.append(f"sequence {number}: {' '.join(words[i] for i in ids)}")
        begin += length
    return lines


if __name__ == "__main__":
    sys.exit(main())
