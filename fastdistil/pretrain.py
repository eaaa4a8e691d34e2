"""The main job: `torchrun --nproc-per-node N -m fastdistil.pretrain RECIPE [overrides]`. Read it from top to bottom.

Text shards and a teacher go in; a run folder comes out, which `python -m fastdistil.export` turns into a Hugging Face folder.
torch is imported after the command line and everything it names have been checked: help and mistakes cost half a second.
"""

from __future__ import annotations

import logging
import signal
import statistics
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdistil import __version__
from fastdistil.run.command import launched, leave
from fastdistil.run.config import Config, to_json
from fastdistil.run.recipes import RECIPES
from fastdistil.run.watchdog import Watchdog
from fastdistil.training.preflight import Resolved, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fastdistil.data.batches import MicroBatch
    from fastdistil.model.architecture import Architecture
    from fastdistil.model.encoder import MaskedLM
    from fastdistil.run.checkpoint import Checkpoint
    from fastdistil.run.ranks import Place
    from fastdistil.training.engine import Engine
    from fastdistil.training.inputs import Text
    from fastdistil.training.teacher import Feed, RemoteTeacher, Split, Teacher

log = logging.getLogger("fastdistil")


def main(args: list[str] | None = None) -> int:
    """Exit status 0: finished, or stopped by a signal with a checkpoint. 1: the run failed, RUN/status.json says why. 2: bad input."""
    here = launched()
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO if here.rank == 0 else logging.ERROR)
    config = parse(args, quiet=here.rank != 0)
    try:
        resolved = resolve(config, world_size=here.world_size, by_torchrun=here.by_torchrun)
        if config.dry_run:
            from fastdistil.training import forecast

            world_size = config.world_size or here.world_size
            print(forecast.report(resolved, world_size=world_size))
            return 0
    except (ValueError, OSError) as error:
        if here.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    from fastdistil.kernels.attention_backends import resolve_backend
    from fastdistil.run import checkpoint, folder
    from fastdistil.run import ranks as dist
    from fastdistil.training import engine, inputs, memory, precision
    from fastdistil.training.teacher import Split, Teacher, serve

    config = resolved.config
    stop = StopRequest()
    try:
        place = dist.init(
            config.engine.device,
            timeout_s=config.engine.timeout_s,
            threads=config.engine.threads,
            teacher_ranks=config.teacher.ranks,
            second_device=config.teacher.device == "second",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtypes = engine.compute_dtype(config, place.device), engine.teacher_dtype(config, place.device)
    text = teacher = student = saved = needed = error = lock = None
    try:
        for dtype in dtypes:
            resolve_backend(config.engine.attention, place.device, dtype=dtype)
        needed = memory.check(resolved, place, local_world_size=here.local_world_size)
        text = inputs.load_text(resolved, rank=here.rank, world_size=here.world_size)
        if config.profile_window.stop > text.num_updates:
            raise ValueError(
                f"--profile {config.profile} goes beyond the run's {text.num_updates} updates: profile earlier ones"
            )
        teacher, student = inputs.load_models(resolved, place=place, dtype=dtypes[1])
    except (ValueError, OSError) as caught:
        error = str(caught)
    error = dist.first_error(error, place)  # one damaged file on one rank ends all of them
    serving = place.teacher_link if error is None else None
    if serving and place.is_teacher:
        assert text is not None
        assert isinstance(teacher, Teacher)
        serve(teacher, serving, partial(micro_batches, resolved, text, place))
        return 0
    if error is None and teacher is not None:
        assert text is not None
        held_out = micro_batches(resolved, text, place, place.rank, Split.VALIDATION, 0)
        try:  # fails alike on every rank
            precision.require(teacher, config.teacher, held_out, place)
        except ValueError as caught:
            error = str(caught)
    if error is None and place.is_main:
        try:
            lock = folder.Lock(config.out)
            folder.check(config)  # again, now that nobody else writes
        except (ValueError, OSError) as caught:
            error = str(caught)
    error = dist.broadcast_object(error, place)
    if error is None and config.resume == "auto":
        try:  # fails alike on every rank
            saved = checkpoint.load(config.out, place)
            if saved and saved.state["text"] != resolved.meta.counts_sha256:
                raise ValueError(
                    f"{config.data.shards} is not the text that the run in {config.out} was started with: use the old shards, or another --out"
                )
        except ValueError as caught:
            error = str(caught)
    if error is None:
        assert text is not None
        assert student is not None
        assert needed is not None
        watchdog = Watchdog(config.out, place.rank, config.engine.timeout_s, alone=place.world_size == 1)
        try:
            error = train(resolved, text, teacher, student, saved, place, stop, watchdog)
        except Exception as caught:  # torchrun ends the other ranks
            watchdog.failed(caught)
            dist.tell_launcher(caught)
            if place.is_main:
                folder.write_status(config.out, "failed", reason=f"{caught!r}")
            if isinstance(caught, checkpoint.CheckpointError):
                print(f"error: {caught}", file=sys.stderr)
                return 1
            raise
        watchdog.close()
        memory.say_measured(needed, place)
        if error and place.is_main:
            print(f"error: {error}", file=sys.stderr)
        if error:
            return 1
    elif place.is_main:
        print(f"error: {error}", file=sys.stderr)
    if serving:
        serving.stop()
    dist.shutdown()
    del lock
    return 2 if error else 0


def parse(args: list[str] | None, *, quiet: bool) -> Config:
    """The configuration of a command line; exits with status 2 on a mistake, naming the nearest option."""
    import tyro

    recipes = {name: ((make.__doc__ or "").strip(), make()) for name, make in RECIPES.items()}
    return tyro.extras.overridable_config_cli(
        recipes, args=args, prog="python -m fastdistil.pretrain", console_outputs=not quiet
    )


def train(
    resolved: Resolved,
    text: Text,
    teacher: Teacher | RemoteTeacher | None,
    student: MaskedLM,
    saved: Checkpoint | None,
    place: Place,
    stop: StopRequest,
    watchdog: Watchdog,
) -> str | None:
    """The job itself, from the first update or a checkpoint to the last update or a signal; what stopped it otherwise, or None."""
    import torch

    from fastdistil.data import batches as data
    from fastdistil.model.architecture import flops_per_token
    from fastdistil.run import checkpoint, folder, metrics
    from fastdistil.run import profile as profiling
    from fastdistil.run import ranks as dist
    from fastdistil.training import engine
    from fastdistil.training import objective as losses
    from fastdistil.training.teacher import Feed, Split

    config, plan, num_updates = resolved.config, text.plan, text.num_updates
    rounds = -(-resolved.micro_batches_per_update // place.world_size)  # micro-batches a rank
    objective = losses.Objective(student, config.loss)
    trainer = engine.make_engine(objective, config, accumulation=rounds, place=place)
    update = num_tokens = num_skipped = 0
    if saved is not None:
        update, num_tokens = saved.state["update"], saved.state["tokens"]
        num_skipped = saved.state.get("skipped", 0)
        trainer.load(saved.tensors, step=update - num_skipped)
        saved.tensors.clear()  # hundreds of megabytes
        log.info("resuming after update %d of %d", update, num_updates)

    # --- the run folder, and what a reader of the log wants to know first
    dtype = engine.compute_dtype(config, place.device)
    peak, peak_source = metrics.peak_flops(place.device, dtype)
    head_fraction = 1.0 if teacher else config.masking.fraction
    flops = flops_per_token(resolved.teacher, resolved.student, text.mean_attended_length, head_fraction=head_fraction)
    writer = None
    if place.is_main:
        folder.start(config.out, describe(resolved), resolved.tokenizer_path)
        checkpoint.require_space(config.out, 12 * resolved.student.num_parameters + 2**20)
        board = config.log.tensorboard
        writer = metrics.MetricsWriter(config.out, resumed_at=update, tensorboard=board)
    say_what_runs(resolved, text, place, dtype, trainer.description)
    log.info(
        f"MFU = real tokens/s x {flops.total / 1e6:,.1f} MFLOP (teacher forward, student forward and backward) / "
        f"{place.num_devices} x {(peak or 0) / 1e9:,.0f} GFLOP/s ({peak_source})"
    )
    to_means = partial(losses.means, loss=config.loss, has_teacher=teacher is not None)
    journal = metrics.Journal(
        writer,
        num_sums=len(losses.SUMS),
        to_means=to_means,
        flops=flops,
        peak=peak and peak * place.num_devices,
        num_updates=num_updates,
        device=place.device,
        num_skipped=num_skipped,
    )

    profile = profiling.Profile(
        config.profile_window,
        config.out / "profile" if place.is_main else None,
        place.device,
        lambda: profiling.floors(
            resolved.teacher,
            resolved.student,
            text.mean_attended_length,
            head_fraction=head_fraction,
            num_tokens=step.num_tokens / place.world_size,
            num_stepped=resolved.student.num_parameters // trainer.num_shards,
            peak=peak,
            device=place.device,
        ),
    )

    # --- the loop
    feed = Feed(teacher, place.device, overlap=config.teacher.overlap)
    first = update * rounds
    batches = micro_batches(resolved, text, place, place.rank, Split.TRAIN, first)
    with_hints = feed.ahead(batches, Split.TRAIN, first)
    objective.train()
    journal.restart_clock()
    busy, held_up, failure, saver = 0.0, 0.0, None, None
    if place.is_main:
        go_on = config.log.failed_save == "go-on"
        saver = checkpoint.Saver(config.out, keep=config.log.keep_checkpoints, go_on=go_on)
    say = partial(folder.write_status, config.out) if place.is_main else _nothing
    say("running", update=update, updates=num_updates)
    began = time.perf_counter()
    stopping = dist.any_rank(stop.asked, place)
    while update < num_updates and not stopping:
        step = plan.update(update)
        lr = engine.learning_rate(config, update, num_updates)
        with profile.update(update), feed.update():
            for k in range(rounds):
                watchdog.restart()
                begin = time.perf_counter()
                batch, hints = next(with_hints)
                # dropout, too, depends on the place in the run alone, not on ranks or restarts
                micro_batch = k * place.world_size + place.rank
                torch.manual_seed(data.seed_of(config.seed, "dropout", update, micro_batch))
                sums = trainer.forward_backward(batch, hints, step.num_tokens, step.num_masked)
                busy += trainer.forward_ended - begin  # no other rank was waited for
                journal.add(sums)
            gradient_norm = trainer.step(lr)
        record = {"split": "train", "update": update + 1, "epoch": plan.epoch_of(update), "lr": lr}
        counts = {"tokens": step.num_tokens, "masked": step.num_masked}
        journal.close_update(record | counts, gradient_norm)
        update, num_tokens = update + 1, num_tokens + step.num_tokens

        stopping = dist.any_rank(stop.asked, place)
        last = update == num_updates
        if update % config.log.every == 0 or last or stopping:
            journal.flush()
            say_straggler(dist.gather_numbers(busy, place))
            busy = 0.0
            if journal.skipped_in_a_row >= config.engine.max_skipped:  # the same on every rank
                failure = not_finite(config, journal.skipped_in_a_row, update)
                stopping = True
        if update % config.log.validate_every == 0 or last:
            journal.flush()
            found = to_means(*validate(trainer, feed, resolved, text, place, watchdog))
            journal.validation({"split": "validation", "update": update, **found})
            journal.restart_clock()
        if update % config.log.checkpoint_every == 0 or last or stopping:
            journal.flush()
            watchdog.restart()
            begin = time.perf_counter()
            tensors = trainer.state()  # every rank takes part
            if saver is not None:
                text_id = resolved.meta.counts_sha256
                state = {"update": update, "tokens": num_tokens, "text": text_id}
                saver.save(tensors, state | {"skipped": journal.num_skipped})
                say("running", update=update, updates=num_updates)
            held_up += time.perf_counter() - begin
            journal.restart_clock()
    if saver is not None:
        begin = time.perf_counter()
        saver.close()
        held_up += time.perf_counter() - begin
        log.info(
            f"saving held the run up for {held_up:.2f} s, {held_up / (time.perf_counter() - began):.2%} of its time"
        )
    if failure:
        say("failed", update=update, updates=num_updates, reason=failure)
    elif update < num_updates:
        log.info("stopped after update %d of %d: --resume auto goes on", update, num_updates)
        say("stopped", update=update, updates=num_updates, reason=stop.reason or "another rank was asked to")
    else:
        say("finished", update=update, updates=num_updates)
    profile.close()
    journal.close()
    return failure


def not_finite(config: Config, in_a_row: int, update: int) -> str:
    """What to say of updates that were skipped in a row, the last one being `update`, counted from 1."""
    return (
        f"the gradients of updates {update - in_a_row + 1} to {update} were not finite; they changed nothing, and the checkpoint of update {update} "
        f"has the weights that they met. See which micro-batch it was: python -m fastdistil.replay {config.out} --update {update}"
    )


SLOW = 1.5
"""Times the median of the other ranks."""


def say_straggler(busy: list[float]) -> None:
    """Log the rank whose data, teacher and forward took far longer than the others'; `busy` in seconds by rank, on every rank alike.

    The host's clock: on CUDA a slow GPU is not seen.
    """
    slowest = max(range(len(busy)), key=busy.__getitem__)
    others = [seconds for rank, seconds in enumerate(busy) if rank != slowest]
    if others and busy[slowest] > SLOW * statistics.median(others):
        log.warning(
            "rank %d is slow: %.2f s of data, teacher and forward since the last line, %.1f times the median of the others",
            slowest, busy[slowest], busy[slowest] / statistics.median(others),
        )  # fmt: skip


def _nothing(*_: object, **__: object) -> None:
    """What the other ranks do where rank 0 writes."""


def micro_batches(
    resolved: Resolved, text: Text, place: Place, rank: int, split: Split, first: int
) -> Iterator[MicroBatch]:
    """Those of a rank from number `first` on: of the whole training, where `first` begins an update, or of one validation."""
    from fastdistil.data import batches as data
    from fastdistil.training.teacher import Split

    if split == Split.VALIDATION:
        slots = data.rank_slots(text.validation, rank=rank, world_size=place.world_size)
        return map(text.validation_collator, slots[first:])
    update = first // -(-resolved.micro_batches_per_update // place.world_size)
    return data.micro_batches(
        (text.plan.update(u) for u in range(update, text.num_updates)),
        text.collator,
        rank=rank,
        world_size=place.world_size,
        num_workers=resolved.config.data.num_workers,
        pin_memory=place.device.type == "cuda",
    )


def validate(
    trainer: Engine, feed: Feed, resolved: Resolved, text: Text, place: Place, watchdog: Watchdog
) -> tuple[list[float], int, int]:
    """(loss sums, real tokens, masked tokens) of the validation text, dropout off, dealt to the ranks like an update."""
    import torch

    from fastdistil.run import ranks as dist
    from fastdistil.training import objective as losses
    from fastdistil.training.teacher import Split

    sums = torch.zeros(len(losses.SUMS), device=place.device, dtype=torch.float64)  # as Journal's
    batches = micro_batches(resolved, text, place, place.rank, Split.VALIDATION, 0)
    for batch, hints in feed.ahead(batches, Split.VALIDATION):
        watchdog.restart()
        sums += trainer.evaluate(batch, hints)
    totals = dist.sum_over_ranks(sums).tolist()  # a sync, once a validation
    return totals, text.validation.num_tokens, text.validation.num_masked


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; the loop ends at the next update boundary. A second one ends the process as usual."""

    def __init__(self) -> None:
        self.asked, self.reason = False, ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked, self.reason = True, signal.Signals(number).name
        log.info("%s: stopping after this update; send it again to stop at once", signal.Signals(number).name)


def describe(resolved: Resolved) -> dict[str, Any]:
    """What RUN/config.json holds: enough to export the run and to refuse another one in its folder."""
    import torch

    meta = resolved.meta
    return {
        "config": to_json(resolved.config),
        "student": asdict(resolved.student),
        "teacher": asdict(resolved.teacher) if resolved.teacher else None,
        "layers": list(resolved.layers),
        "data": {
            "num_sequences": meta.num_sequences,
            "num_tokens": meta.num_tokens,
            "tokenizer_sha256": meta.tokenizer_sha256,
            "sources": meta.preparation.get("sources"),
        },
        "versions": {"fastdistil": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }


def say_what_runs(resolved: Resolved, text: Text, place: Place, dtype: torch.dtype, engine: str) -> None:
    """The first lines of a log: backend, models, batch, length."""
    import torch

    from fastdistil.kernels._backend import CPU_BACKEND

    config, meta, student, teacher = (resolved.config, resolved.meta, resolved.student, resolved.teacher)
    on_cuda = place.device.type == "cuda"
    device = torch.cuda.get_device_name(place.device) if on_cuda else f"CPU with {torch.get_num_threads()} threads"
    arithmetic = f"{str(dtype).removeprefix('torch.')}, {'triton' if on_cuda else CPU_BACKEND} operators"
    log.info("fastdistil %s, torch %s, %s", __version__, torch.__version__, engine)
    log.info("%d x %s, %s", place.num_devices, device, arithmetic)
    log.info("attention: %s", ", ".join(_attention_backends(resolved, place, dtype)))
    if teacher is not None:
        log.info("teacher: %s from %s", _size(teacher), config.teacher.path)
    layers = f"layers {' '.join(map(str, resolved.layers))} of {resolved.source_path}"
    log.info("student: %s from %s", _size(student), layers if resolved.layers else "random weights")
    plan, first = text.plan, text.plan.update(0)
    held_out = meta.num_sequences - len(plan.lengths)
    log.info(f"text: {meta.num_tokens:,} tokens in {meta.num_sequences:,} sequences, {held_out:,} held out")
    count, sequences = len(first.slots), sum(len(s.sequences) for s in first.slots)
    log.info(
        f"{text.num_updates:,} updates of {count} micro-batches of {plan.token_budget:,} tokens; "
        f"the first: {sequences:,} sequences, {first.num_tokens / (count * plan.token_budget):.1%} real tokens"
    )
    if count > plan.micro_batches_through(0):
        log.warning("an update is longer than the whole text: lower --batch.size, or prepare more")
    idle = -count % place.world_size
    if idle:
        log.warning(
            f"{place.world_size} ranks do not divide {count} micro-batches: {idle} of {count + idle} places in an update stay "
            f"empty; {count + idle} micro-batches (--batch.size, --batch.token-budget) would fill them"
        )


def _attention_backends(resolved: Resolved, place: Place, dtype: torch.dtype) -> list[str]:
    from fastdistil.kernels.attention_backends import resolve_backend
    from fastdistil.training import engine

    models = {"student": (resolved.student.attention_dropout, dtype)}
    if resolved.teacher:
        models["teacher"] = 0.0, engine.teacher_dtype(resolved.config, place.device)
    asked = resolved.config.engine.attention
    return [f"{resolve_backend(asked, place.device, dropout_p=p, dtype=d)} ({name})" for name, (p, d) in models.items()]


def _size(architecture: Architecture) -> str:
    a = architecture
    return f"{a.num_parameters:,} parameters ({a.num_layers} layers, {a.hidden_size} wide)"


if __name__ == "__main__":
    leave(main())
