"""What a run will be, before any of it: the answer to --dry-run, the first lines of a log, and the floors of a profile.

`python -m fastdistil.pretrain ... --dry-run --world-size 128` needs no GPU and no torchrun, loads no weights, and
writes nothing: the teacher's config.json, the header of its weights and the lengths of the prepared sequences are
enough. A number that was not measured says so.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdistil import __version__
from fastdistil.data.plan import Plan, random_words
from fastdistil.kernels._backend import CPU_BACKEND
from fastdistil.kernels.attention_backends import resolve_backend
from fastdistil.run import console
from fastdistil.run.files import read_json
from fastdistil.run.metrics import peak_flops
from fastdistil.run.profile import Part, copy_bytes_per_s
from fastdistil.run.ranks import Ranks
from fastdistil.training import memory
from fastdistil.training.inputs import Corpus, load_corpus, plan_of
from fastdistil.training.preflight import H100_BYTES, Resolved

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("fastdistil")

H100_FLOPS = 989e12  # of the GPU meant where there is none; dense bf16, data sheet
UTILISATION = 0.5  # assumed where there is no measurement
EXACT_SEQUENCES = 2**21  # read in all epochs together; the orders of more take seconds an epoch
STEP_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # in a checkout only
FEW_UPDATES = 20
"""Up to so many, a warm-up of 5 % is one update, whose rate is 0. Said where the length of the text decides."""
BYTES_A_PARAMETER = 32
"""AdamW reads weight, gradient and both moments and writes all but the gradient, clipping reads the gradient: fp32."""


def report(resolved: Resolved) -> "Table":
    """A table for a person, a row a fact.

    Raises ValueError where files are damaged or the device cannot hold the run.
    """
    return console.table(("", ""), _rows(resolved))


def _models(resolved: Resolved) -> Iterator[tuple[str, str]]:
    """Teacher and student: their sizes, and what they are made from; what an embedding is."""
    layers = f"layers {' '.join(map(str, resolved.layers))} of {resolved.source_path}" if resolved.layers else ""
    start = "random weights" if resolved.config.student.init == "random" else "its checkpoint"
    asked = resolved.config.teacher
    origins = [("teacher", model, path) for model, path in zip(resolved.teachers, asked.paths, strict=True)]
    for name, model, origin in (*origins, ("student", resolved.student, layers or start)):
        sizes = "; ".join(filter(None, (f"{model.num_layers} layers, {model.hidden_size} wide", model.windows)))
        yield name, f"{model.num_parameters:,} parameters ({sizes}) from {origin}"
    if resolved.others:
        weights = " : ".join(f"{weight:g}" for weight in asked.weights or [1.0] * len(origins))
        yield "mixture", f"of the teachers' distributions, {weights}"
    if pooling := resolved.pooling:
        states = {"mean": "mean of the last hidden states", "cls": "last hidden state of the first token"}
        length = ", scaled to length 1" * pooling.normalise
        texts = f", of texts of up to {pooling.max_length} tokens" if pooling.max_length else ""
        yield "embeddings", f"{states[pooling.mode]}{length}{texts}"


def _rows(resolved: Resolved) -> Iterator[tuple[str, str]]:
    config, student = resolved.config, resolved.student
    device, device_bytes, device_name = _device(resolved)
    dtype, world_size = resolved.dtype(device), resolved.world_size + config.teacher.ranks
    each = " x 2" if config.teacher.device == "second" else ""
    yield "ranks", f"{world_size}{each} x {device_name}, {_name(dtype)}"
    yield from _models(resolved)
    yield from (("note", note) for note in resolved.notes)

    # The text, without its hashes and the orders of all epochs: each takes longer than the rest together.
    quick = replace(
        config,
        profile=None,
        data=replace(config.data, verify=False),
        optim=replace(config.optim, unit="updates", duration=1),
    )
    corpus = load_corpus(replace(resolved, config=quick), rank=0, world_size=1)
    if len(corpus.folders) > 1:
        yield "mix of tokens", corpus.shares()
    flops = resolved.flops_per_token(corpus.attended)
    parts = f"teacher {flops.teacher / 1e6:,.1f}, student {flops.student / 1e6:,.1f}"
    yield "FLOPs a token", f"{flops.total / 1e6:,.1f} million: {parts}"
    num_updates, tokens_per_update, about = _length(resolved, corpus.plan)
    num_tokens = num_updates * tokens_per_update
    yield from (("warning", warning) for warning in _warnings(resolved, corpus.plan, num_updates))
    count, budget = resolved.micro_batches_per_update, resolved.token_budget
    num_places = resolved.micro_batches_per_rank * resolved.world_size
    empty = f", {num_places - count:,} of {num_places:,} places empty" if num_places > count else ""
    shape = f"{count:,} micro-batches of {budget:,} tokens, {resolved.micro_batches_per_rank:,} a rank{empty}"
    yield "an update", shape
    yield "updates", f"{about}{num_updates:,}"
    in_words = f"{num_tokens:,.0f}" if num_tokens < 1e7 else f"{num_tokens / 1e9:,.3f} billion"
    yield "tokens", f"{about}{in_words}, padding not counted"

    # What it takes: memory, disk, messages, time.
    need = memory.require(resolved, device=device, device_bytes=device_bytes)
    yield "memory a rank", f"{need.total / 1e9:.2f} of {device_bytes / 1e9:.2f} GB, predicted"
    for name, num_bytes in need.parts.items():
        if num_bytes:
            yield f"  {name}", f"{num_bytes / 1e9:.3f} GB"
    kept = config.log.keep_checkpoints
    yield "a checkpoint", f"{12 * student.num_parameters / 1e9:.2f} GB; the last {kept} are kept"
    yield from _messages(resolved, dtype) if world_size > 1 else ()
    no_gpu = device.type == "cuda" and not torch.cuda.is_available()
    peak, source = (H100_FLOPS, "H100, dense bf16, data sheet") if no_gpu else peak_flops(device, dtype)
    if peak:
        share, share_source = _utilisation(device_name, dtype)
        tokens_a_rank = num_tokens / count * resolved.micro_batches_per_rank  # of the rank that has no place empty
        hours = tokens_a_rank * _busiest(resolved, corpus) / (share * peak) / 3600
        at = f"{share:.0%} ({share_source}) of {peak / 1e12:,.4g} TFLOP/s a rank ({source})"
        yield "hours", f"{hours:,.3g} of arithmetic, at {at}"


def _busiest(resolved: Resolved, corpus: Corpus) -> float:
    """FLOPs of the device that has most to do, for a token of each rank that trains: all wait for it.

    That is a student's, or that of a teacher with a device of its own, whose head stays with its students.
    """
    asked, total = resolved.config.teacher, resolved.flops_per_token(corpus.attended).total
    if not asked.ranks and asked.device != "second":
        return total
    teacher = resolved.flops_per_token(corpus.attended, with_heads=False).teacher
    return max(total - teacher, teacher * math.ceil(resolved.world_size / (asked.ranks or resolved.world_size)))


def _messages(resolved: Resolved, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """What every ZeRO stage sends in an update, as tests/test_scaling.py counts it."""
    rounds, num_parameters = resolved.micro_batches_per_rank, resolved.student.num_parameters
    gradients, weights = 4 * num_parameters / 1e9, dtype.itemsize * num_parameters / 1e9
    # Stage: times the gradients are summed over the ranks, times the weights are gathered.
    times = {0: (1, 0), 1: (1, 1), 2: (rounds, 1), 3: (rounds, rounds)}
    for stage, (sums, gathers) in times.items():
        this = " (this run)" if stage == resolved.zero_stage else ""
        yield (
            f"messages, ZeRO {stage}{this}",
            f"gradients {sums} x {gradients:.2f} GB, weights {gathers} x {weights:.2f} GB an update",
        )


def say(resolved: Resolved, corpus: Corpus, ranks: Ranks, engine: str) -> None:
    """The first lines of a log: versions, devices, backends, models, text, batch; `engine` describes itself."""
    meta, dtype, plan = resolved.meta, resolved.dtype(ranks.device), corpus.plan
    log.info("fastdistil %s, torch %s, %s", __version__, torch.__version__, engine)
    if ranks.device.type == "cuda":
        device, operators = torch.cuda.get_device_name(ranks.device), "triton"
    else:
        device, operators = f"CPU with {torch.get_num_threads()} threads", CPU_BACKEND
    log.info("%d x %s, %s, %s operators", ranks.num_devices, device, _name(dtype), operators)
    log.info("attention: %s", ", ".join(_attention_backends(resolved, ranks.device)))
    for name, what in _models(resolved):
        log.info("%s: %s", name, what)
    for note in resolved.notes:
        log.info(note)
    held_out = meta.num_sequences - sum(pool.num_sequences for pool in plan.pools)
    log.info(f"text: {meta.num_tokens:,} tokens in {meta.num_sequences:,} sequences, {held_out:,} held out")
    if len(corpus.folders) > 1:
        log.info("mix of tokens: %s", corpus.shares())
    first = plan.update(0)
    count, sequences = len(first.micro_batches), sum(len(m.sequences) for m in first.micro_batches)
    log.info(
        f"{corpus.num_updates:,} updates of {count} micro-batches of {plan.token_budget:,} tokens; "
        f"the first: {sequences:,} sequences, {first.num_tokens / (count * plan.token_budget):.1%} real tokens"
    )
    for warning in _warnings(resolved, plan, corpus.num_updates):
        log.warning(warning)
    idle = -count % ranks.world_size
    if idle:
        log.warning(
            f"{ranks.world_size} ranks do not divide {count} micro-batches: {idle} of {count + idle} places in an "
            f"update stay empty; {count + idle} micro-batches (--batch.size, --batch.token-budget) would fill them"
        )


def _warnings(resolved: Resolved, plan: Plan, num_updates: int) -> Iterator[str]:
    """What a run of little text should be told before it is paid for."""
    batch, optim = resolved.config.batch, resolved.config.optim
    if resolved.micro_batches_per_update > plan.micro_batches_through(0):
        yield "an update is longer than the whole text: lower --batch.size, or prepare more"
    if num_updates == 1 and optim.warmup:
        few = "one update trains nothing, since it is all warm-up, whose first rate is 0"
    elif num_updates < FEW_UPDATES and optim.unit == "epochs":
        few = f"{num_updates} updates are few"
    else:
        return
    yield f"{few}: lower --batch.size {batch.size} {batch.unit}, raise --optim.duration, or prepare more text"


def _attention_backends(resolved: Resolved, device: torch.device) -> Iterator[str]:
    asked = resolved.config.engine.attention
    models = {"student": (resolved.student, resolved.student.attention_dropout, resolved.dtype(device), True)}
    if resolved.teacher:
        models["teacher"] = resolved.teacher, 0.0, resolved.teacher_dtype(device), False
    for name, (model, dropout_p, dtype, training) in models.items():
        how = {"dropout_p": dropout_p, "training": training, "window": model.widest_window}
        backend = resolve_backend(asked, device, dtype=dtype, **how)
        yield f"{backend} ({name})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floors(
    resolved: Resolved,
    attended: Callable[[int], float],
    *,
    num_tokens: float,
    num_stepped: int,
    peak: float | None,
    device: torch.device,
) -> dict[Part, float]:
    """Seconds an update on one device that each part of a profile cannot do without.

    Matrix products at `peak` FLOP/s, an FP8 teacher's too; student forward : backward = 1 : 2; the loss of distillation
    has both heads, forward and gradient. The optimiser at the speed of a copy measured here. Parts that nobody knows a
    floor of are left out: communication, and all products where `peak` is None.

    Args:
        num_tokens: real tokens of an update on that device.
        num_stepped: parameters that its optimiser moves.
    """
    found: dict[Part, float] = {
        "waiting for data": 0.0,
        "optimiser": BYTES_A_PARAMETER * num_stepped / copy_bytes_per_s(device),
    }
    if peak is None:
        return found
    with_heads = resolved.flops_per_token(attended)
    without = resolved.flops_per_token(attended, with_heads=False)
    heads = with_heads.total - without.total
    # The fused loss makes its own gradient; masked LM alone leaves it to the backward.
    in_loss = heads if resolved.config.loss.kd else heads / 3
    flops: dict[Part, float] = {
        "teacher": without.teacher,
        "student forward": without.student / 3,
        "loss": in_loss,
        "backward": without.student * 2 / 3 + heads - in_loss,
    }
    found.update({part: f * num_tokens / peak for part, f in flops.items()})
    return found


def _device(resolved: Resolved) -> tuple[torch.device, int, str]:
    """(device, its bytes, its name) of the run that is meant.

    A cluster's ranks are GPUs unless the configuration says.
    """
    config, has_gpu = resolved.config, torch.cuda.is_available()
    asked = config.engine.device
    if asked == "cpu" or (asked == "auto" and not has_gpu and config.world_size is None):
        return torch.device("cpu"), memory.host_bytes(), "CPU"
    device = torch.device("cuda")
    if has_gpu:
        found = torch.cuda.get_device_properties(device)
        return device, found.total_memory, found.name
    return device, H100_BYTES, "H100 (assumed: no GPU here)"


def _length(resolved: Resolved, plan: Plan) -> tuple[int, float, str]:
    """(updates, real tokens of one, "about " where they are estimated from a sample of the sequences)."""
    config, count, lengths = resolved.config, resolved.micro_batches_per_update, plan.drawn_lengths()
    duration, about = config.optim.duration, ""
    scale = 1.0
    if len(lengths) * max(1, duration if config.optim.unit == "epochs" else 1) > EXACT_SEQUENCES:
        sample = random_words(EXACT_SEQUENCES // 2, config.seed, "dry run") % len(lengths)
        scale, about = len(lengths) / len(sample), "about "
        plan = plan_of(resolved, lengths[sample])
    micro_batches = scale * plan.micro_batches_through(0)
    tokens = float(lengths.sum()) / micro_batches * count
    if config.optim.unit == "updates":
        return int(duration), tokens, about
    if about:
        return max(1, int(duration * micro_batches / count)), tokens, about
    return plan.updates_of(duration), tokens, about


def _utilisation(device_name: str, dtype: torch.dtype) -> tuple[float, str]:
    """(lowest MFU that benchmarks/step.py measured on such a device, where it is from), or what is assumed without."""
    kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pattern = "step.cpu.json" if device_name == "CPU" else "step.*.json"
    found = []
    for path in STEP_RESULTS.glob(pattern):
        for what, record in read_json(path).items():
            same = device_name == "CPU" or device_name.split(" (")[0] in record["device"]
            ours = record["providers"].get("fastdistil", {})
            if same and ours.get("mfu") and f" {kind}," in what:  # not where it failed or was left out
                source = f"measured: {what}, {record['device']}, commit {record['commit']}"
                # In turn with others a chip rests: a run has what is left without a pause, where that was measured.
                lasting = (ours.get("sustained") or ours["tokens_per_s"]) / ours["tokens_per_s"]
                found.append((lasting * ours["mfu"], source))
    return min(found, default=(UTILISATION, "assumed, not measured"))
