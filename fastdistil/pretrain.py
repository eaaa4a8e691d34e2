"""The main job: `torchrun --nproc-per-node N -m fastdistil.pretrain RECIPE [overrides]`. Read it from top to bottom.

Text and a teacher go in, a run folder comes out. torch is imported after all is checked: mistakes cost half a second.
"""

import logging
import sys
from dataclasses import replace
from functools import partial

from fastdistil.remote import mirror
from fastdistil.run import console, folder, recipes
from fastdistil.run.command import STOPPED, Failed, Launched, StopRequest, again, command_of_ranks, launched, leave
from fastdistil.training.preflight import Resolved, resolve

log = logging.getLogger("fastdistil")


@command_of_ranks
def main(args: list[str] | None = None) -> int:
    """The exit status, 0 for a run that finished.

    1: the run failed, and RUN/status.json says why. 2: bad input. 75: stopped by a signal or --max-hours, and saved.
    """
    # What is asked: the recipe with its overrides, checked against the files that it names.
    here = launched()
    console.start(sys.stdout, speaks=here.rank == 0, keeps=here.rank == 0)
    config = mirror.bring(partial(recipes.parse, args, quiet=here.rank != 0), here)
    if not config.dry_run and here.world_size == here.local_world_size and (said := folder.finished(config)):
        log.info(said)
        return 0
    resolved = resolve(config, world_size=here.world_size, by_torchrun=here.by_torchrun)
    if config.dry_run:
        from fastdistil.training import forecast

        console.show(forecast.report(resolved), f"next: {again(args)}")
        return 0

    # A rank that was asked to stop has not failed, as torchrun takes it: its restarts end here, too.
    if here.num_restarts and folder.was_stopped(config.out):
        return STOPPED
    status = run(resolved, here)
    log.info("next: %s", again(args, "--resume", "auto") if status == STOPPED else folder.export_line(config.out))
    return status


def run(resolved: Resolved, here: Launched) -> int:
    """The exit status of a run whose command line was found right."""
    config = resolved.config
    # Where it runs: with torch, on a device of its own, in a process group.
    from fastdistil.run import checkpoint
    from fastdistil.run.failure import watched
    from fastdistil.run.ranks import init_ranks
    from fastdistil.training import loop, memory
    from fastdistil.training.inputs import load_corpus, load_models, require_same
    from fastdistil.training.precision import require_small_drift
    from fastdistil.training.teacher import Split, Teacher, require_knowledge, serve

    ranks = init_ranks(
        config.engine.device,
        timeout_s=config.engine.timeout_s,
        threads=config.engine.threads,
        teacher_ranks=config.teacher.ranks,
        second_device=config.teacher.device == "second",
    )
    ranks.require_one_command(config)

    # What it needs, on every rank or on none: one damaged file on one rank ends all of them.
    with ranks.together(with_teachers=True):
        needed = memory.check(resolved, ranks, local_world_size=here.local_world_size)
        corpus = load_corpus(resolved, rank=here.rank, world_size=here.world_size)
        models = load_models(resolved, ranks, corpus)
        teacher, inputs = models.teacher, resolved.inputs | models.digests
    require_same(ranks, inputs)
    resolved = replace(resolved, inputs=inputs)

    # A rank that is set aside for a teacher answers its students until they have all stopped.
    if ranks.link and isinstance(teacher, Teacher):
        with StopRequest(ranks.ask_students_to_stop):
            serve(
                teacher,
                ranks.link,
                lambda rank, split, first: corpus.micro_batches(split, ranks, rank=rank, first=first),
            )
        return 0

    # What can be known only now: the teacher's precision, and what the run folder holds while nobody else writes there.
    with ranks.together():
        if teacher is not None:
            held_out = partial(corpus.micro_batches, Split.VALIDATION, ranks, rank=ranks.rank)
            require_knowledge(teacher, config, held_out(), ranks)
            require_small_drift(teacher, config.teacher, held_out(), ranks, vocab_size=resolved.meta.vocab_size)
    with ranks.together():
        lock = folder.lock(config.out) if ranks.is_main else None
        if ranks.is_main:
            folder.check(config, inputs)
    saved = checkpoint.load(config.out, ranks) if config.resume == "auto" else None
    with ranks.together():
        if saved and saved.state["text"] != resolved.meta.counts_sha256:
            raise ValueError(
                f"--data.shards {' '.join(config.data.shards or ())} is not the text that the run in {config.out} was "
                "started with: use the old shards, or another --out"
            )

    # The run itself, under a watchdog. From here on there is something to save: a signal asks it to stop when it can.
    with StopRequest() as stop:
        with watched(config, ranks) as watchdog:
            job = loop.setup(resolved, corpus, teacher, models.student, saved, ranks, stop, watchdog)
            failure = loop.train(job)
        memory.say_measured(needed, ranks)
        ranks.leave()
        if lock is not None:
            lock.release()
        if failure:
            raise Failed(failure)
        return 0 if job.update == corpus.num_updates else STOPPED


if __name__ == "__main__":
    leave(main())
