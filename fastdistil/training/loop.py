"""The training loop, read from top to bottom: `setup` makes what it works with, `train` is the loop.

An update: its plan -> for every micro-batch of this rank, with the teacher's output for it: forward and backward -> one
step. Once in a while, on every rank alike: a line of the log (the only host sync), a validation, a checkpoint. Rank 0's
clock decides when that is.
"""

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdistil import __version__
from fastdistil.data.batches import MicroBatch
from fastdistil.data.plan import UpdatePlan
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.remote.mirror import Mirror
from fastdistil.run import console, folder
from fastdistil.run.checkpoint import Checkpoint, Saver, folder_of, require_space
from fastdistil.run.command import Failed, StopRequest, started_at
from fastdistil.run.config import Config, Interval, to_json, updates_and_seconds
from fastdistil.run.folder import Watchdog
from fastdistil.run.metrics import COUNTS, Journal, MetricsWriter, counted, peak_flops
from fastdistil.run.profile import Profile
from fastdistil.run.ranks import Ranks
from fastdistil.training import forecast
from fastdistil.training.engine import Engine, learning_rate, make_engine
from fastdistil.training.graph import Step, recorded
from fastdistil.training.inputs import Corpus, updates_of
from fastdistil.training.objective import SUMS, Objective, means
from fastdistil.training.preflight import Resolved
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher, TeacherPrefetcher
from fastdistil.training.trackers import Tracker, chosen

log = logging.getLogger("fastdistil")

SLOW = 1.5
"""Times the median of the other ranks: a rank that takes longer is named."""
LIFE_S = 30.0
"""An update or a validation that takes longer says how far it is; where --log.every is a time, it is that one."""
SAVE_S = 30.0
"""What a checkpoint is taken to last until one was written, for --max-hours; a tenth of these where that is less."""
UPLOAD_S = 1.0
"""So often ranks that wait for an upload hear that it goes on."""
MOST_OPEN = 1000
"""Updates between two lines at most, where their interval is a time: each keeps its sums on the device until then."""


class Due:
    """When something is to be done again.

    Args:
        most: the most updates between two times, where the interval is a time.
        is_busy: whether what was done the last time still goes on; a time then waits for its end.
    """

    def __init__(
        self, interval: Interval, *, most: float = math.inf, is_busy: Callable[[], bool] = lambda: False
    ) -> None:
        updates, self.seconds = updates_and_seconds(interval)
        self.updates = updates if updates < math.inf else most
        self.is_busy, self.since = is_busy, time.perf_counter()

    def now(self, update: int) -> bool:
        """Whether it is due after `update`: a multiple of so many updates, or so many seconds after `done`."""
        late = time.perf_counter() - self.since >= self.seconds
        return update % self.updates == 0 or (late and not self.is_busy())

    def done(self) -> None:
        """It has been done: its time begins anew."""
        self.since = time.perf_counter()


class Deadline:
    """When a run with --max-hours stops by itself: so early that an update, the checkpoint and its upload end in time.

    It counts from the start of the process, or of torchrun, which may have started the ranks anew; whatever somebody
    sets the clock to meanwhile. Rank 0 asks it.
    """

    def __init__(self, max_hours: float | None) -> None:
        self.max_hours = max_hours
        self.at = time.monotonic() - (time.time() - started_at()) + 3600 * max_hours if max_hours else math.inf
        self.save_s = min(SAVE_S, 360 * max_hours) if max_hours else 0.0
        self.longest_s, self.since = 0.0, time.monotonic()

    def ask(self, stop: StopRequest, saver: Saver, mirror: Mirror | None) -> None:
        """Ask for the end where it is time; once between two updates."""
        now = time.monotonic()
        self.longest_s, self.since = max(self.longest_s, now - self.since), now
        self.save_s = saver.seconds or self.save_s
        upload_s = mirror.seconds if mirror is not None else 0.0
        if now + self.longest_s + self.save_s + upload_s >= self.at and not stop.asked:
            log.info(f"--max-hours {self.max_hours:g}: stopping, {max(0.0, self.at - now):.0f} s before they are over")
            stop.ask(f"--max-hours {self.max_hours:g}")


@dataclass(slots=True)
class Job:
    """What the loop works with, and how far it has come."""

    resolved: Resolved
    corpus: Corpus
    ranks: Ranks
    stop: StopRequest
    watchdog: Watchdog
    engine: Engine
    prefetcher: TeacherPrefetcher
    graph: Step | None
    """Forward and backward as one CUDA graph; None where they run launch by launch."""
    journal: Journal
    saver: Saver | None
    """On rank 0."""
    mirror: Mirror | None
    """On rank 0, where there is one."""
    update: int
    """Updates that are done."""
    num_tokens: int
    """Real tokens that were trained on."""
    profile: Profile = field(init=False)
    deadline: Deadline = field(init=False)
    plan: UpdatePlan = field(init=False)
    """Of the update that is being made, or was made last."""
    busy_s: float = 0.0
    """What data, teacher and forward took here since the last line of the log."""
    saving_s: float = 0.0
    """For how long checkpoints held the run up."""
    not_saved: BaseException | None = None
    """On rank 0, why a checkpoint could not be written, where the run ends for that: at once, with another one."""

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.resolved.config

    @property
    def life_s(self) -> float:
        """After so many seconds inside an update or a validation a word is due."""
        _, seconds = updates_and_seconds(self.config.log.every)
        return seconds if seconds < math.inf else LIFE_S

    def is_asked_to_stop(self) -> bool:
        """Whether this rank is, by a signal or, rank 0, by --max-hours or a checkpoint that could not be written."""
        if self.saver is not None and self.update < self.corpus.num_updates:
            self.deadline.ask(self.stop, self.saver, self.mirror)
            if not self.stop.asked and self.ranks.is_asked_by_teacher():
                self.stop.ask("a teacher rank was asked to")
            self.not_saved = None if self.stop.asked else self.saver.failure()
        return self.stop.asked or self.not_saved is not None

    def status(self, state: str, **about: Any) -> None:
        """Replace status.json, on rank 0."""
        if not self.ranks.is_main:
            return
        try:
            folder.write_status(self.config.out, state, update=self.update, updates=self.corpus.num_updates, **about)
        except OSError as error:
            if not self.config.log.go_on and not isinstance(error, FileNotFoundError):  # `restore_folder` comes next
                raise
            log.error("going on without this status: %s", error)


def setup(
    resolved: Resolved,
    corpus: Corpus,
    teacher: Teacher | RemoteTeacher | None,
    student: MaskedLM,
    saved: Checkpoint | None,
    ranks: Ranks,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Job:
    """Engine, run folder, metrics and prefetcher of a run that starts, or goes on from `saved`; says what runs."""
    config = resolved.config
    engine = make_engine(Objective(student, config.loss, resolved.pooling), resolved, ranks)
    update, num_tokens, num_skipped, seconds = 0, 0, 0, 0.0
    if saved is not None:
        names = ("update", "tokens", "skipped", "seconds")
        update, num_tokens, num_skipped, seconds = (saved.state.get(name, 0) for name in names)
        engine.load(saved.tensors, step=update - num_skipped)
        saved.tensors.clear()  # hundreds of megabytes
        log.info("resuming after update %d of %d", update, corpus.num_updates)

    writer = saver = mirror = None
    if ranks.is_main:
        writer, saver, mirror = open_folder(resolved, corpus, ranks, update)

    # What a reader of the log wants to know first.
    peak, peak_source = peak_flops(ranks.device, resolved.dtype(ranks.device))
    flops = resolved.flops_per_token(corpus.attended).total
    forecast.say(resolved, corpus, ranks, engine.description)
    log.info(
        f"MFU = real tokens/s x {flops / 1e6:,.1f} MFLOP (teacher forward, student forward and backward) / "
        f"{ranks.num_devices} x {(peak or 0) / 1e9:,.0f} GFLOP/s ({peak_source})"
    )
    graph = recorded(engine, teacher, resolved)
    prefetcher = TeacherPrefetcher(teacher, ranks.device, overlap=config.teacher.overlap and graph is None)
    journal = Journal(
        writer,
        ranks,
        num_sums=len(SUMS),
        to_means=partial(means, loss=config.loss),
        flops=flops,
        peak=peak and peak * ranks.num_devices,
        num_updates=corpus.num_updates,
        num_skipped=num_skipped,
        seconds=seconds,
    )
    job = Job(
        resolved, corpus, ranks, stop, watchdog, engine, prefetcher, graph, journal, saver, mirror, update, num_tokens
    )
    job.deadline = Deadline(config.max_hours)
    job.profile = Profile(
        config.profile_window,
        config.out / "profile" if ranks.is_main else None,
        ranks.device,
        lambda: forecast.floors(
            resolved,
            corpus.attended,
            num_tokens=job.plan.num_tokens / ranks.world_size,
            num_stepped=resolved.student.num_parameters // engine.num_shards,
            peak=peak,
            device=ranks.device,
        ),
    )
    return job


def open_folder(
    resolved: Resolved, corpus: Corpus, ranks: Ranks, update: int
) -> tuple[MetricsWriter, Saver, Mirror | None]:
    """The run folder, on rank 0: what the run is, then its log, metrics, checkpoints from `update` on, and a copy."""
    config = resolved.config
    duration_before = folder.start(config.out, record := describe(resolved, corpus, ranks), resolved.tokenizer_path)
    console.keep(config.out)
    say_prolonged(config, corpus, duration_before, update)
    require_space(config.out, 12 * resolved.student.num_parameters + 2**20)
    trackers = [Tracker(name, config.out, record["config"], update) for name in chosen(config.log.to)]
    writer = MetricsWriter(config.out, resumed_at=update, trackers=trackers, go_on=config.log.go_on)
    keep = config.log.keep_checkpoints
    mirror = Mirror(config.mirror, config.out, keep=keep) if config.mirror is not None else None
    if mirror is not None and update:
        mirror.send(folder_of(config.out, update))  # which is nothing where it is there
    return writer, Saver(config.out, keep=keep, go_on=config.log.go_on, then=mirror and mirror.send), mirror


def train(job: Job) -> str | None:
    """The run, from its first update or a checkpoint to its last update or a signal. Why it failed, or None."""
    with console.bar("update", job.corpus.num_updates, done=job.update, quiet=True) as bar:
        return _train(job, bar)


def _train(job: Job, bar: console.Bar) -> str | None:
    config, corpus, ranks = job.config, job.corpus, job.ranks
    engine, journal, prefetcher = job.engine, job.journal, job.prefetcher
    num_rounds, failure = job.resolved.micro_batches_per_rank, None
    with_teacher, forward_backward = micro_batches(job)
    engine.objective.train()
    job.status("running")
    began = time.perf_counter()
    journal.restart_clock()
    lines = Due(config.log.every, most=MOST_OPEN)
    validations = Due(config.log.validate_every)
    checkpoints = Due(config.log.checkpoint_every, is_busy=lambda: job.saver is not None and job.saver.is_writing())
    first_line = job.update + 1  # a sign of life
    (stopping,) = ranks.any(job.is_asked_to_stop())
    while job.update < corpus.num_updates and not stopping:
        # Which sequences the update holds, and the denominators of its loss, are known before anything is computed.
        plan = job.plan = corpus.plan.update(job.update)
        job.watchdog.update = job.update + 1
        lr = learning_rate(config, job.update, corpus.num_updates)
        with job.profile.update(job.update), prefetcher.update():
            # This rank's micro-batches, one after the other; their gradients add up.
            title = f"update {job.update + 1}/{corpus.num_updates}"
            for _ in counted(num_rounds, title, every_s=job.life_s, move=lambda share: bar.to(job.update + share)):
                job.watchdog.restart()
                begin = time.perf_counter()
                batch, teacher_output = next(with_teacher)
                sums = forward_backward(batch, teacher_output)
                job.busy_s += engine.forward_ended - begin  # no other rank was waited for
                journal.add(sums)
            # The gradients of all ranks become new weights.
            gradient_norm = engine.step(lr)
        about = {"split": "train", "update": job.update + 1, "epoch": corpus.plan.epoch_of(job.update), "lr": lr}
        job.update, job.num_tokens = job.update + 1, job.num_tokens + plan.num_tokens
        counts = dict(zip(COUNTS, plan.counts, strict=True)) | {"tokens_seen": job.num_tokens}
        journal.close_update(about | counts, gradient_norm)
        bar.to(job.update)

        # Once in a while, on every rank alike: rank 0 says what is due, and a signal on any rank ends all of them here,
        # with a checkpoint. One exchange an update.
        due = (ranks.is_main and x.now(job.update) for x in (lines, validations, checkpoints))
        stopping, line_due, validation_due, checkpoint_due = ranks.any(job.is_asked_to_stop(), *due)
        last = job.update == corpus.num_updates
        if job.update == first_line:
            job.busy_s = 0.0  # workers and kernels started: no rank is slow for that
        if line_due or job.update == first_line or last or stopping:
            failure = report(job)
            stopping = stopping or failure is not None
            lines.done()
        if validation_due or last:
            validate(job)
            validations.done()
        if checkpoint_due or last or stopping:
            save(job)
            checkpoints.done()
    return finish(job, failure, time.perf_counter() - began)


def micro_batches(job: Job) -> tuple[Iterator[tuple[MicroBatch, Any]], Callable[[MicroBatch, Any], Tensor]]:
    """This rank's micro-batches with the teacher's output, and what adds their gradients; made in worker processes.

    The teacher's output is one micro-batch ahead where that gains; in a CUDA graph its part is inside.
    """
    first = job.update * job.resolved.micro_batches_per_rank
    batches = job.corpus.micro_batches(Split.TRAIN, job.ranks, rank=job.ranks.rank, first=first)
    if job.graph is not None:
        return job.graph.ahead(batches), job.graph.forward_backward
    return job.prefetcher.ahead(batches, Split.TRAIN, first), job.engine.forward_backward


def report(job: Job) -> str | None:
    """Lines of the log and of metrics.jsonl, the only host sync of an update. Why the run must end, or None."""
    restore_folder(job)
    job.journal.flush()
    say_straggler(job.ranks.gather(job.busy_s))
    job.busy_s = 0.0
    in_a_row, skipped = job.journal.longest_skip  # the same on every rank
    if in_a_row < job.config.engine.max_skipped:
        return None
    weights = "the weights that they met" if skipped == job.update else "what later updates made of these weights"
    return (
        f"the gradients of updates {skipped - in_a_row + 1} to {skipped} were not finite; they changed nothing, "
        f"and the checkpoint of update {job.update} has {weights}. See which micro-batch it was: "
        f"python -m fastdistil.replay {job.config.out} --update {skipped}"
    )


def restore_folder(job: Job) -> None:
    """Make the run folder anew where somebody removed or moved it: what was learnt is in memory, and can be saved."""
    if not job.ranks.is_main or (job.config.out / "config.json").is_file():
        return
    log.error("%s was removed or moved while the run worked: it is made anew, without what was in it", job.config.out)
    try:
        folder.start(job.config.out, describe(job.resolved, job.corpus, job.ranks), job.resolved.tokenizer_path)
    except OSError as error:
        if not job.config.log.go_on:
            raise
        log.error("going on without it: %s", error)


def say_straggler(busy_s: list[float]) -> None:
    """Log the rank whose data, teacher and forward took far longer than the others'.

    Seconds by rank, on every rank alike.

    By the host's clock: on CUDA a slow GPU is not seen.
    """
    slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
    others = [seconds for rank, seconds in enumerate(busy_s) if rank != slowest]
    if others and busy_s[slowest] > SLOW * statistics.median(others):
        log.warning(
            f"rank {slowest} is slow: {busy_s[slowest]:.2f} s of data, teacher and forward since the last line, "
            f"{busy_s[slowest] / statistics.median(others):.1f} times the median of the others"
        )


def validate(job: Job) -> None:
    """Losses of the validation text, dropout off, dealt to the ranks like an update."""
    job.journal.flush()
    corpus, plan, world_size = job.corpus, job.corpus.validation, job.ranks.world_size
    # A row a folder, as Journal's.
    sums = torch.zeros(len(corpus.validations), len(SUMS), device=job.ranks.device, dtype=torch.float64)
    batches = corpus.micro_batches(Split.VALIDATION, job.ranks, rank=job.ranks.rank)
    with_teacher = job.prefetcher.ahead(batches, Split.VALIDATION)
    num_rounds = math.ceil(len(plan.micro_batches) / world_size)
    for number in counted(num_rounds, f"validation after update {job.update}", every_s=job.life_s):
        batch, teacher_output = next(with_teacher)
        job.watchdog.restart()
        sums[corpus.is_of(number * world_size + job.ranks.rank)] += job.engine.evaluate(batch, teacher_output)
    totals = job.ranks.sum(sums)
    found = {"validation": (totals.sum(0), plan)}
    if len(totals) > 1:
        names = (f"validation/{name}" for name in corpus.folders)
        found |= dict(zip(names, zip(totals, corpus.validations, strict=True), strict=True))
    for split, (of_split, held_out) in found.items():
        losses = job.journal.to_means(of_split.tolist(), held_out.counts)  # a sync, once a validation
        about = {"split": split, "update": job.update, "tokens_seen": job.num_tokens}
        job.journal.validation(about | losses)
    job.journal.restart_clock()


def save(job: Job) -> None:
    """Begin a checkpoint, which rank 0 writes in the background; every rank takes part in gathering it."""
    restore_folder(job)
    job.journal.flush()
    job.watchdog.restart()
    begin = time.perf_counter()
    tensors = job.engine.state()
    if job.saver is not None:
        text_id = job.resolved.meta.counts_sha256
        state = {"update": job.update, "tokens": job.num_tokens, "text": text_id}
        job.saver.save(tensors, state | {"skipped": job.journal.num_skipped, "seconds": job.journal.seconds})
        job.status("running")
    job.saving_s += time.perf_counter() - begin
    job.journal.restart_clock()


def finish(job: Job, failure: str | None, seconds: float) -> str | None:
    """Wait for the last checkpoint, say what saving cost, and what became of the run; why it failed, or None."""
    if job.saver is not None:
        begin = time.perf_counter()
        job.saver.close()
        job.saving_s += time.perf_counter() - begin
        seconds += time.perf_counter() - begin
        log.info(f"saving held the run up for {job.saving_s:.2f} s, {job.saving_s / seconds:.2%} of its time")
        if job.not_saved is not None:
            raise Failed(f"{job.not_saved}. That of update {job.update} could be written, so that nothing is lost")
    lacks = wait_for_mirror(job) if job.config.mirror else None
    if lacks and not failure and job.update == job.corpus.num_updates:
        failure = f"the run is finished, and whole in {job.config.out}, but {lacks}: --resume auto sends it again"
    if failure:
        state, about = "failed", {"reason": failure}
    elif job.update < job.corpus.num_updates:
        state, about = "stopped", {"reason": job.stop.reason or "another rank was asked to"}
    else:
        state, about = "finished", {}
    job.status(state, **about)
    job.profile.close()
    job.journal.close(state)
    log.info(
        f"{state} after update {job.update:,} of {job.corpus.num_updates:,}, {job.num_tokens:,} tokens, "
        f"{console.clock(job.journal.seconds)} of training: {job.config.out}"
    )
    if job.mirror is not None:
        job.mirror.end()
    # Only now: once one has gone with 75, launchers end the others, half a minute later by SIGKILL.
    job.ranks.any()
    return failure


def wait_for_mirror(job: Job) -> str | None:
    """Wait, on every rank, for the last upload, which is tried twice; on rank 0 why it failed, or None."""
    mirror, begin = job.mirror, time.perf_counter()
    for attempt in range(2):
        if attempt and mirror is not None:
            mirror.try_again()
        while any(job.ranks.any(mirror is not None and mirror.is_uploading(UPLOAD_S))):
            job.watchdog.restart()  # it may take longer than a collective
            if job.ranks.link is not None:
                job.ranks.link.ask_later()
    if mirror is not None:
        log.info("the run waited %.1f s for the last upload to its mirror", time.perf_counter() - begin)
    return mirror.failure if mirror is not None else None


def say_prolonged(config: Config, corpus: Corpus, duration: float, update: int) -> None:
    """Log what a longer duration than before makes of the learning rate."""
    if duration == config.optim.duration:
        return
    before, now = updates_of(duration, config, corpus.plan), corpus.num_updates
    old, new = (learning_rate(config, min(update, total), total) for total in (before, now))
    log.info(
        f"prolonged from {before} to {now} updates: from update {update + 1} on the learning rate follows the schedule "
        f"of {now} updates, {new:.3g} in place of {old:.3g} now"
    )


def describe(resolved: Resolved, corpus: Corpus, ranks: Ranks) -> dict[str, Any]:
    """What RUN/config.json holds: enough to export the run and to refuse another one in its folder."""
    meta = resolved.meta
    return {
        "config": to_json(resolved.config),
        "student": asdict(resolved.student),
        "teacher": asdict(resolved.teacher) if resolved.teacher else None,
        "others": [asdict(other) for other in resolved.others],
        "layers": list(resolved.layers),
        "data": {
            "num_sequences": meta.num_sequences,
            "num_tokens": meta.num_tokens,
            "tokenizer_sha256": meta.tokenizer_sha256,
            "sources": meta.preparation.get("sources"),
            "mix": corpus.shares() if len(corpus.folders) > 1 else None,
        },
        "inputs": resolved.inputs,
        "pooling": asdict(resolved.pooling) if resolved.pooling else None,
        "machine": ranks.machine,
        "versions": {"fastdistil": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }
