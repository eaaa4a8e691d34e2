"""The main job: `torchrun --nproc-per-node N -m fastdistil.pretrain RECIPE [overrides]`. Read it from top to bottom.

Text shards and a teacher go in; a run folder comes out, which `python -m fastdistil.export` turns into a Hugging Face folder.
torch is imported after the command line and everything it names have been checked: help and mistakes cost half a second.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastdistil import __version__
from fastdistil.config import Config, to_json
from fastdistil.launcher import launched
from fastdistil.preflight import Resolved, resolve
from fastdistil.recipes import RECIPES

if TYPE_CHECKING:
    import torch

    from fastdistil.bert import MaskedLM
    from fastdistil.data import Collator, Plan, UpdatePlan
    from fastdistil.dist import Place
    from fastdistil.engine import Engine
    from fastdistil.shards import Shards
    from fastdistil.teacher import Teacher

log = logging.getLogger("fastdistil")


def main(args: list[str] | None = None) -> int:
    """Exit status 0: finished, or stopped by a signal with a checkpoint. 2: the command line or what it names is wrong."""
    here = launched()
    logging.basicConfig(
        stream=sys.stdout,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
    )
    log.setLevel(logging.INFO if here.rank == 0 else logging.WARNING)
    config = parse(args, quiet=here.rank != 0)
    try:
        resolved = resolve(config, world_size=here.world_size)
    except (ValueError, FileNotFoundError) as error:
        if here.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    from fastdistil import dist

    config = resolved.config
    stop = StopRequest()
    place = dist.init(
        config.engine.device, timeout_s=config.engine.timeout_s, threads=config.engine.threads
    )
    inputs = error = None
    try:
        inputs = load_inputs(resolved, place)
    except (ValueError, OSError) as caught:
        error = str(caught)
    error = dist.first_error(error, place)
    if inputs is not None and error is None:
        train(resolved, inputs, place, stop)
    elif place.is_main:
        print(f"error: {error}", file=sys.stderr)
    dist.shutdown()
    return 2 if error else 0


def parse(args: list[str] | None, *, quiet: bool) -> Config:
    """The configuration of a command line; exits with status 2 on a mistake, naming the nearest option."""
    import tyro

    recipes = {name: ((make.__doc__ or "").strip(), make()) for name, make in RECIPES.items()}
    return tyro.extras.overridable_config_cli(
        recipes, args=args, prog="python -m fastdistil.pretrain", console_outputs=not quiet
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads: verified data with its plan, teacher and student. The same on every rank."""

    shards: Shards
    plan: Plan
    collator: Collator
    validation: UpdatePlan
    validation_collator: Collator
    teacher: Teacher | None
    student: MaskedLM
    num_updates: int


def load_inputs(resolved: Resolved, place: Place) -> Inputs:
    """Read and check everything a run needs, without a word between the ranks. Raises ValueError or OSError."""
    import torch

    from fastdistil import data, engine, weights
    from fastdistil.shards import Shards
    from fastdistil.teacher import Teacher

    config = resolved.config
    assert config.data.shards is not None  # preflight
    shards = Shards(
        config.data.shards, verify=config.data.verify, verify_part=(place.rank, place.world_size)
    )
    plan, validation, validation_collator = plans(resolved, shards)
    in_updates = config.optim.unit == "updates"
    # the teacher stays outside of the engine, so that nothing trains or partitions it
    model = (
        weights.load_masked_lm(config.teacher.path, need_head=True) if config.teacher.path else None
    )
    generator = torch.Generator().manual_seed(data.seed_of(config.seed, "student"))
    student = make_student(resolved, model, generator)
    return Inputs(
        shards=shards,
        plan=plan,
        collator=data.Collator(
            shards, shards.counts, token_budget=config.batch.token_budget, masking=config.masking
        ),
        validation=validation,
        validation_collator=validation_collator,
        teacher=Teacher(
            model, device=place.device, dtype=engine.compute_dtype(config, place.device)
        )
        if model
        else None,
        student=student,
        num_updates=int(config.optim.duration)
        if in_updates
        else plan.updates_of(config.optim.duration),
    )


def train(resolved: Resolved, inputs: Inputs, place: Place, stop: StopRequest) -> None:
    """The job itself, from the first update or the newest checkpoint to the last update or a signal."""
    import torch

    from fastdistil import checkpoint, data, dist, engine, losses, metrics
    from fastdistil.architecture import flops_per_token

    config, plan, teacher, num_updates = (
        resolved.config,
        inputs.plan,
        inputs.teacher,
        inputs.num_updates,
    )
    shards = inputs.shards
    dtype = engine.compute_dtype(config, place.device)
    accumulation = -(-resolved.micro_batches_per_update // place.world_size)
    objective = losses.Objective(inputs.student, config.loss)
    trainer = engine.make_engine(objective, config, accumulation=accumulation, place=place)

    # --- where to go on from
    saved = checkpoint.load(config.out, place) if config.resume == "auto" else None
    update = 0
    tokens_seen = 0
    if saved is not None:
        tensors, state = saved
        update, tokens_seen = state["update"], state["tokens"]
        trainer.load(tensors, step=update)
        log.info("resuming after update %d of %d", update, num_updates)
        if state["num_updates"] != num_updates:
            raise ValueError(
                f"the run was planned for {state['num_updates']} updates and now for {num_updates}: the shards or the batch changed"
            )
    saved = None  # hundreds of megabytes

    # --- what is said and written down
    mean_length = float((shards.lengths.astype("f8") ** 2).sum() / shards.lengths.sum())
    flops = flops_per_token(
        resolved.teacher,
        resolved.student,
        mean_length,
        head_fraction=1.0 if teacher else config.masking.fraction,
    )
    peak, peak_source = metrics.peak_flops(place.device, dtype)
    writer = None
    if place.is_main:
        start_run_folder(resolved)
        writer = metrics.MetricsWriter(
            config.out, resumed_at=update, tensorboard=config.log.tensorboard
        )
        checkpoint.require_space(config.out, 12 * resolved.student.num_parameters + 2**20)
    say_what_runs(
        resolved,
        place,
        dtype,
        trainer.description,
        plan,
        num_updates,
        f"{flops.total / 1e6:,.1f} MFLOP a token; MFU against {peak_source}",
    )
    clock = metrics.Clock(flops=flops, peak=peak, num_devices=place.world_size)
    accumulator = metrics.Accumulator(len(losses.SUMS), place.device)
    open_records: list[dict[str, Any]] = []

    def flush() -> None:
        """Bring the losses of the last updates to the host: the one sync of the loop, every log.every updates."""
        results = accumulator.flush()
        clock.tokens = sum(r["tokens"] for r in open_records)
        speed = clock.lap() if open_records else {}
        for record, (sums, norm) in zip(open_records, results, strict=True):
            record |= losses.means(
                sums,
                record["tokens"],
                record["masked"],
                config.loss,
                has_teacher=teacher is not None,
            )
            record |= {"gradient_norm": norm} | speed
            if writer is not None:
                writer.write(record)
        if open_records and writer is not None:
            writer.flush()
            left = (num_updates - update) * tokens_seen / max(1, update)
            log.info(
                metrics.progress_line(open_records[-1], num_updates=num_updates, tokens_left=left)
            )
        open_records.clear()

    def save() -> None:
        flush()
        tensors = trainer.state()
        if place.is_main:
            state = {
                "update": update,
                "tokens": tokens_seen,
                "num_updates": num_updates,
                "version": __version__,
            }
            log.info(
                "checkpoint %s",
                checkpoint.save(config.out, tensors, state, keep=config.log.keep_checkpoints),
            )
        dist.barrier(place)

    # --- the loop
    batches = data.micro_batches(
        (plan.update(u) for u in range(update, num_updates)),
        inputs.collator,
        rank=place.rank,
        world_size=place.world_size,
        num_workers=config.data.num_workers,
        pin_memory=place.device.type == "cuda",
    )
    objective.train()
    clock.restart()
    while update < num_updates:
        step = plan.update(update)
        for k in range(accumulation):
            batch = next(batches).to(place.device)
            # dropout, too, depends on the place in the run alone, not on ranks or restarts
            torch.manual_seed(
                data.seed_of(config.seed, "dropout", update, k * place.world_size + place.rank)
            )
            hints = teacher(batch) if teacher else None
            accumulator.add(
                trainer.forward_backward(batch, hints, step.num_tokens, step.num_masked)
            )
        lr = engine.learning_rate(config, update, num_updates)
        accumulator.close_update(trainer.step(lr))
        tokens_seen += step.num_tokens
        open_records.append(
            {
                "split": "train",
                "update": update + 1,
                "epoch": plan.epoch_of(update),
                "lr": lr,
                "tokens": step.num_tokens,
                "masked": step.num_masked,
            }
        )
        update += 1

        stopping = dist.any_rank(stop.asked, place)
        last = update == num_updates
        if update % config.log.every == 0 or last or stopping:
            flush()
        if update % config.log.validate_every == 0 or last:
            flush()
            record = {"split": "validation", "update": update} | validate(
                trainer, teacher, inputs.validation, inputs.validation_collator, config, place
            )
            if writer is not None:
                writer.write(record)
                log.info(
                    "validation  "
                    + "  ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))
                )
            clock.restart()
        if update % config.log.checkpoint_every == 0 or last or stopping:
            save()
            clock.restart()
        if stopping:
            log.info(
                "stopped by a signal after update %d of %d: go on with --resume auto",
                update,
                num_updates,
            )
            break
    if writer is not None:
        writer.close()


def plans(resolved: Resolved, shards: Shards) -> tuple[Plan, UpdatePlan, Collator]:
    """(training plan, validation plan, collator of the validation data)."""
    import numpy as np

    from fastdistil import data
    from fastdistil.shards import Shards

    config = resolved.config
    common = {"token_budget": config.batch.token_budget}
    held_out = min(config.data.validation_sequences, max(1, len(shards) // 10))
    if config.data.validation is not None:
        other = Shards(config.data.validation, verify=config.data.verify)
        sequences = np.arange(min(len(other), config.data.validation_sequences))
        num_train = len(shards)
    else:
        other, sequences, num_train = (
            shards,
            np.arange(len(shards) - held_out, len(shards)),
            len(shards) - held_out,
        )
    if num_train < 1:
        raise ValueError(
            f"{shards.folder} holds {len(shards)} sequence(s), too few to train on and validate with: prepare more text"
        )
    plan = data.Plan(
        shards.lengths[:num_train],
        seed=config.seed,
        micro_batches_per_update=resolved.micro_batches_per_update,
        mask_fraction=config.masking.fraction,
        **common,
    )
    validation = data.validation_plan(
        sequences, other.lengths, mask_fraction=config.masking.fraction, **common
    )
    return plan, validation, data.Collator(other, shards.counts, masking=config.masking, **common)


def make_student(
    resolved: Resolved, teacher: MaskedLM | None, generator: torch.Generator
) -> MaskedLM:
    """The student with its first weights, by the configuration."""
    from fastdistil import weights
    from fastdistil.bert import MaskedLM

    config = resolved.config
    if resolved.source_path is None:
        student = MaskedLM(resolved.student, generator=generator)
    else:
        source = (
            teacher
            if config.student.init == "teacher"
            else weights.load_masked_lm(resolved.source_path, need_head=False, generator=generator)
        )
        assert source is not None  # preflight: init=teacher has a teacher
        student = weights.student_from_teacher(
            source,
            resolved.layers,
            resolved.student,
            copy_transform=config.student.copy_transform or config.student.init != "teacher",
            generator=generator,
        )
    student.encoder.activation_checkpointing = config.engine.activation_checkpointing
    student.encoder.position_embeddings.weight.requires_grad_(not config.student.freeze_positions)
    return student


def validate(
    trainer: Engine,
    teacher: Teacher | None,
    plan: UpdatePlan,
    collator: Collator,
    config: Config,
    place: Place,
) -> dict[str, float]:
    """Losses over the validation sequences, dropout off, dealt to the ranks like an update."""
    import torch

    from fastdistil import data, dist, losses

    sums = torch.zeros(len(losses.SUMS), device=place.device)
    for slot in data.rank_slots(plan, rank=place.rank, world_size=place.world_size):
        batch = collator(slot).to(place.device)
        sums += trainer.evaluate(batch, teacher(batch) if teacher else None)
    totals = dist.sum_over_ranks(sums).tolist()  # a sync, once a validation
    return losses.means(
        totals, plan.num_tokens, plan.num_masked, config.loss, has_teacher=teacher is not None
    )


class StopRequest:
    """Set by SIGTERM or SIGINT; the loop ends at the next update boundary. A second one ends the process as usual."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        log.info(
            "%s: stopping after this update; send it again to stop at once",
            signal.Signals(number).name,
        )


def start_run_folder(resolved: Resolved) -> None:
    """Write what the run is: RUN/config.json (read by export and at a resume) and RUN/tokenizer."""
    import torch

    run, meta = resolved.config.out, resolved.meta
    if (run / "config.json").is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    shutil.copytree(resolved.tokenizer_path, run / "tokenizer", dirs_exist_ok=True)
    record = {
        "config": to_json(resolved.config),
        "student": asdict(resolved.student),
        "teacher": asdict(resolved.teacher) if resolved.teacher else None,
        "layers": list(resolved.layers),
        "data": {
            "num_sequences": meta.num_sequences,
            "num_tokens": meta.num_tokens,
            "tokenizer_sha256": meta.tokenizer_sha256,
            "preparation": meta.preparation,
        },
        "versions": {
            "fastdistil": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    }
    part = run / "config.json.part"
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(run / "config.json")


def say_what_runs(
    resolved: Resolved,
    place: Place,
    dtype: torch.dtype,
    engine: str,
    plan: Plan,
    num_updates: int,
    cost: str,
) -> None:
    """The first lines of a log: backend, models, batch, length. Whoever reads only these knows what the run is."""
    import torch

    from fastdistil import ops

    config, meta, student, teacher = (
        resolved.config,
        resolved.meta,
        resolved.student,
        resolved.teacher,
    )
    name = (
        torch.cuda.get_device_name(place.device)
        if place.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    backend = "triton" if place.device.type == "cuda" else ops.CPU_BACKEND
    log.info(
        "fastdistil %s, torch %s: %s x %d, %s, %s, %s operators",
        __version__,
        torch.__version__,
        name,
        place.world_size,
        str(dtype).removeprefix("torch."),
        engine,
        backend,
    )
    if teacher is not None:
        log.info(
            "teacher: %s parameters, %d x %d, from %s",
            f"{teacher.num_parameters:,}",
            teacher.num_layers,
            teacher.hidden_size,
            config.teacher.path,
        )
    start = (
        f"layers {' '.join(map(str, resolved.layers))} of {resolved.source_path}"
        if resolved.layers
        else "random weights"
    )
    log.info(
        "student: %s parameters, %d x %d, from %s",
        f"{student.num_parameters:,}",
        student.num_layers,
        student.hidden_size,
        start,
    )
    log.info(
        "data: %s tokens in %s sequences, %d held out",
        f"{meta.num_tokens:,}",
        f"{meta.num_sequences:,}",
        meta.num_sequences - len(plan.lengths),
    )
    first = plan.update(0)
    count = len(first.slots)
    filled = first.num_tokens / (count * plan.token_budget)
    sequences = sum(len(s.sequences) for s in first.slots)
    log.info(
        "update: %d micro-batches of %s tokens (%.1f %% real; the first: %d sequences), %d updates",
        count,
        f"{plan.token_budget:,}",
        100 * filled,
        sequences,
        num_updates,
    )
    if count % place.world_size:
        rounds = -(-count // place.world_size)
        idle = rounds * place.world_size - count
        log.warning(
            "%d ranks do not divide %d micro-batches: %d of %d places in an update are idle; a batch of %d micro-batches would fill them",
            place.world_size,
            count,
            idle,
            count + idle,
            count + idle,
        )
    log.info(cost)
    log.debug("configuration: %s", json.dumps(to_json(config)))


if __name__ == "__main__":
    sys.exit(main())
