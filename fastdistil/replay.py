"""Command: one update of a run again, micro-batch by micro-batch: `python -m fastdistil.replay RUN --update U`.

It runs in one process. Order, masks and dropout are functions of (seed, update), so with the weights that the run had,
this is what happened there. It says loss and gradient norm of every micro-batch; of one where they are not finite also
where that began, and its text.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastdistil.data.tokenizer import read_vocabulary
from fastdistil.run import console, folder, options
from fastdistil.run.command import command, leave
from fastdistil.run.config import Config, from_json
from fastdistil.run.files import read_json_lines
from fastdistil.training.preflight import Resolved, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from fastdistil.data.batches import MicroBatch
    from fastdistil.training.objective import Objective, TeacherOutput
    from fastdistil.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Compute one update of a run again and say which micro-batch is not finite."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    update: int
    """Which one, counted from 1, as in metrics.jsonl."""
    checkpoint: int | None = None
    """Take the weights of the checkpoint of this update. None: the one before --update, or the newest."""
    shards: tuple[str, ...] | None = None
    """Where the text is now, as --data.shards of the run. None: where the run found it."""
    teacher: Path | None = None
    """Where the teacher is now. None: where the run found it."""
    others: tuple[Path, ...] | None = None
    """Where the other teachers are now, in their order. None: where the run found them."""


@command
def main(args: list[str] | None = None) -> int:
    """Exit status 0: everything was finite. 1: something was not. 2: a wrong command line or run."""
    console.start(sys.stderr)
    asked = options.parse(ReplayConfig, args, "replay")
    return 1 if replay(asked, configuration(asked)) else 0


def configuration(asked: ReplayConfig) -> Config:
    """The run's own, in one process."""
    config = from_json(folder.read(asked.run)["config"])
    return replace(
        config,
        out=asked.run,
        resume="auto",
        profile=None,
        data=replace(config.data, shards=asked.shards or config.data.shards, num_workers=0),
        teacher=replace(
            config.teacher,
            path=asked.teacher or config.teacher.path,
            others=asked.others or config.teacher.others,
            ranks=0,
        ),
        engine=replace(config.engine, zero_stage=None, compile=False),
    )


def replay(asked: ReplayConfig, config: Config) -> int:
    """Print the update; returns the number of its micro-batches that are not finite."""
    resolved = resolve(config, world_size=1, by_torchrun=False)
    import torch

    from fastdistil.model.flat import FlatParameters
    from fastdistil.run import checkpoint
    from fastdistil.run.ranks import init_ranks
    from fastdistil.training.inputs import load_corpus, load_models
    from fastdistil.training.objective import Objective
    from fastdistil.training.teacher import RemoteTeacher

    # What the run had: its text, its teacher, and the weights of a checkpoint.
    ranks = init_ranks(config.engine.device, timeout_s=config.engine.timeout_s, threads=config.engine.threads)
    corpus = load_corpus(resolved, rank=0, world_size=1)
    if not 1 <= asked.update <= corpus.num_updates:
        raise ValueError(f"--update must be in [1, {corpus.num_updates}], got {asked.update}")
    models = load_models(resolved, ranks, corpus)
    folder.check(config, models.digests)
    teacher, student = models.teacher, models.student
    assert not isinstance(teacher, RemoteTeacher)  # no ranks are set aside
    before = asked.update - 1 if folder.has_checkpoint(asked.run, asked.update - 1) else None
    weights, state = checkpoint.load_weights(asked.run, before if asked.checkpoint is None else asked.checkpoint)
    student.load_state_dict(weights)
    objective = Objective(student, config.loss, resolved.pooling).to(ranks.device).train()
    flat = FlatParameters(student, resolved.dtype(ranks.device))
    if not _same_weights(asked, state["update"]):
        print(f"weights of update {state['update']}: before update {asked.update} the run's were others")

    # Each micro-batch alone, so that what is wrong is seen where it is.
    plan = corpus.plan.update(asked.update - 1)
    broken = 0
    for number, micro_batch in enumerate(plan.micro_batches):
        batch = corpus.collator(micro_batch).to(ranks.device)
        output = None if teacher is None else teacher(batch)
        loss, sums = objective(batch, output)
        loss.backward()
        flat.complete()
        trained = [p.grad for p in student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(trained).item()
        print(
            f"micro-batch {number}: {len(batch.sequences)} sequences, loss {loss.item():.6g} of the update's, "
            f"gradient norm {norm:.6g}"
        )
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            broken += 1
            for line in (*diagnosis(objective, batch, teacher, output, sums), *texts(resolved, batch)):
                print(f"    {line}")
        flat.clear()
    print(f"{broken} of {len(plan.micro_batches)} micro-batches of update {asked.update} are not finite")
    return broken


def _same_weights(asked: ReplayConfig, update: int) -> bool:
    """Whether the run's weights after `update` were those that the asked one met: all between them were skipped."""
    lines = read_json_lines(asked.run / "metrics.jsonl")
    skipped = {line.get("update") for line in lines if line.get("skipped") is True}
    first, last = sorted((update, asked.update - 1))
    return skipped.issuperset(range(first + 1, last + 1))


def diagnosis(
    objective: "Objective",
    batch: "MicroBatch",
    teacher: "Teacher | None",
    output: "TeacherOutput | None",
    sums: "Tensor",
) -> list[str]:
    """What of a micro-batch is not finite, from its inputs to its gradients."""
    import torch

    from fastdistil.training.objective import SUMS

    def bad(tensors: dict[str, Any]) -> list[str]:
        return [n for n, t in tensors.items() if not torch.isfinite(t).all().item()]

    student = objective.student
    with torch.no_grad():
        hidden_ND = student.eval().encoder(batch.input_ids, batch.position_ids, batch.layout)
    objective.train()
    handed = {}
    if output is not None:
        handed = {"last hidden state": output.encoder.hidden_ND}
        for number, inputs in enumerate(output.vocabularies, 1):
            whose = "its" if number == 1 else f"teacher {number}'s"
            handed[f"input of {whose} vocabulary matrix"] = inputs.transformed_NE
    parts = {
        "weights": bad(dict(student.named_parameters())),
        "teacher's weights": bad({} if teacher is None else dict(teacher.model.named_parameters())),
        **{
            f"teacher {number}'s weights": bad(dict(other.model.named_parameters()))
            for number, other in enumerate(teacher.others if teacher else (), 2)
        },
        "teacher": bad(handed),
        "student": bad({"last hidden state, without dropout": hidden_ND}),
        "losses": bad(dict(zip(SUMS, sums, strict=True))),
        "gradients": bad({n: p.grad for n, p in student.named_parameters() if p.grad is not None}),
    }
    return [
        f"{part} not finite: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for part, names in parts.items()
        if names
    ]


def texts(resolved: Resolved, batch: "MicroBatch") -> list[str]:
    """The first tokens of the sequences of a micro-batch, masked as they were."""
    words, begin, lines = read_vocabulary(resolved.tokenizer_path), 0, []
    for number, length in zip(batch.sequences, batch.lengths, strict=False):
        ids = batch.input_ids[begin : begin + min(length, 20)].tolist()
        lines.append(f"sequence {number}: {' '.join(words[i] for i in ids)}")
        begin += length
    return lines


if __name__ == "__main__":
    leave(main())
