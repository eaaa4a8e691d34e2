"""Memory that a run needs on each rank, from shapes alone, before anything is allocated.

What always stays (weights, moments, sums of gradients, teacher) plus the largest of what comes and goes in an update:

    teacher      its widest layer in inference, beside the hidden states that it handed over before
    loss         all that the student keeps for its backward, and the loss's chunks of logits
    backward     the same activations, and the gradients that flow back where they are widest
    step         whole gradients, and what an engine makes of them
    checkpoint   on the CPU: the copy of weights and moments that is written

Counted operator by operator in bert.py and kernels/, and measured for DeepSpeed 0.19.8; tests/training/test_memory.py holds it to
10 % of measured peaks. Not counted: torch.compile, and what an allocator keeps without using it.

Shapes: N tokens of the micro-batch, D width, F width of the feed-forward layer, V padded vocabulary, P parameters, W ranks.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from fastdistil.kernels.attention_backends import resolve_backend
from fastdistil.kernels.linear_distill import default_chunk_tokens
from fastdistil.model.architecture import Architecture
from fastdistil.run.ranks import Place
from fastdistil.training import engine, hints
from fastdistil.training.preflight import Resolved

log = logging.getLogger("fastdistil")

ACCURACY = 0.1  # a run is refused only where it would not fit even if so much less were needed
CUDA_CONTEXT = 500_000_000  # assumed, not measured: CUDA's context, the code of its libraries and of our kernels
CUBLAS_WORKSPACE = 32 * 2**20  # PyTorch's default for a stream on Hopper; elsewhere it is smaller

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of version 2, as a container sees its own


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one rank at the peak of an update, by what they are for."""

    parts: dict[str, int]
    moment: str
    """Where in an update the peak is: a name of the module's table."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {n / 1e9:.2f}" for name, n in self.parts.items() if n)


def predict(resolved: Resolved, *, world_size: int, device: torch.device, device_bytes: int) -> Footprint:
    """What a rank that trains the student needs on a device of `device_bytes` in all; needs no such device."""
    config, student, teacher = resolved.config, resolved.student, resolved.teacher
    settings, on_cuda = config.engine, device.type == "cuda"
    dtype = engine.compute_dtype(config, device)
    s, N, W = dtype.itemsize, config.batch.token_budget, world_size - config.teacher.ranks
    stage = settings.zero_stage if settings.zero_stage is not None else int(W > 1)
    bf16, accumulates = s == 2, resolved.micro_batches_per_update > W
    D, F, V = student.hidden_size, student.ffn_size, student.padded_vocab_size
    P, token = _num_elements(student), N * s

    def share(replicated: int, sharded: int) -> int:
        """Bytes of so many a parameter on every rank, and so many divided among the ranks."""
        return P * replicated + -(-P * sharded // W)

    # --- the engine. Plain and stage 0 are one; stage 1 in bf16 sums gradients in fp32 beside those in bf16
    weights = share(*((4, 0), (s, 4), (s, 4), (s, s + 4))[stage])  # stage 3 keeps what it gathered
    copies = 2 * P if bf16 and stage == 0 else 0  # Bf16Compute
    optimiser = share(0, 8) if stage else share(8, 0)
    replicated = 4 + 2 * accumulates if bf16 and stage == 1 else 4 * accumulates
    summed = share(0, 4) if stage > 1 else share(replicated, 0)  # between micro-batches
    standing = share(0, 4) if stage == 3 else share(4, 0) if bf16 and stage == 1 else 0  # always
    whole = (share(4, 0), share(max(replicated, 4), 4), share(0, 8), share(0, 8))[stage]
    buckets = 4 * settings.bucket_elements if stage else 0

    # --- the student. A layer keeps its input, q, k and v, what was attended, both LayerNorms' sums, the first one's result
    #     and GELU's input and output; in fp32 the log-sum-exp of the attention, means and deviations
    dropout_p = student.attention_dropout
    backend = resolve_backend(settings.attention, device, dropout_p=dropout_p, dtype=dtype)
    layer = token * (8 * D + 2 * F) + 4 * N * (student.num_heads + 4)
    if backend == "sdpa":
        layer += token * D  # the runs of equal lengths, put together
        if dropout_p and not on_cuda:  # whole score matrices; counted as if all sequences were long
            layer += 3 * token * student.num_heads * resolved.meta.max_length
    kept, again = student.num_layers * layer, 0
    if settings.activation_checkpointing:
        kept, again = student.num_layers * token * D, layer
    head_tokens = N if teacher else int(config.masking.fraction * N)
    kept += (2 * N + 4 * head_tokens) * D * s  # embeddings' sum, last hidden states; four of the head

    # --- the loss
    dweight = V * D * s
    if teacher is None:  # log-softmax, its gradient and that of the logits
        loss = 12 * head_tokens * V
    else:
        chunk = min(N, default_chunk_tokens(V, dtype, device, total_memory=device_bytes))
        loss = 2 * chunk * V * s + dweight + V * D * (s if chunk == N else 4)
        if config.loss.values:  # scores, logarithms and probabilities of both, in fp32
            longest = resolved.meta.max_length
            relations = config.loss.relation_heads * max(hints.PADDED_TOKENS, longest) * longest
            loss = max(loss, 6 * 4 * relations)

    # --- the teacher
    held = handed = inference = 0
    if teacher is not None:
        held, handed, inference = _teacher_bytes(resolved, s)
        if config.teacher.ranks or config.teacher.device == "second":
            held, inference = teacher.padded_vocab_size * teacher.hidden_size * s, 0
        elif on_cuda and config.teacher.overlap:
            # a side stream's memory serves no other; hints are in the loop's hands, made, and in the making
            held, inference = held + inference + 2 * handed, 0

    update = {"gradients": summed - standing, "teacher": handed}
    moments = {
        "teacher": update | {"teacher": handed + inference},
        "loss": update | {"weights": copies, "activations": kept, "loss": loss},
        "backward": update | {"weights": copies, "activations": kept + again + token * F, "loss": 2 * dweight},
        "step": update | {"gradients": whole - standing},
        "checkpoint": {} if on_cuda else {"checkpoint": 12 * P, "teacher": handed},
    }
    always = {
        "weights": weights,
        "gradients": standing,
        "optimiser": optimiser,
        "teacher": held,
        "buckets": buckets,
        "CUDA": (CUDA_CONTEXT + 2 * CUBLAS_WORKSPACE) * on_cuda,
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    peak = moments[moment]
    names = dict.fromkeys([*always, *peak])
    return Footprint({n: always.get(n, 0) + peak.get(n, 0) for n in names}, moment)


def _num_elements(architecture: Architecture) -> int:
    """Parameters as they lie in memory, the vocabulary's padding included."""
    padding = architecture.padded_vocab_size - architecture.vocab_size
    return architecture.num_parameters + padding * (architecture.hidden_size + 1)


def _teacher_bytes(resolved: Resolved, s: int) -> tuple[int, int, int]:
    """Of the teacher: (weights, hidden states it hands over, the most that it needs beside them while it infers).

    `s`: bytes of the engine's dtype, which is the teacher's unless the configuration says.
    """
    teacher, precision = resolved.teacher, resolved.config.teacher.precision
    assert teacher is not None
    E, F = teacher.hidden_size, teacher.ffn_size
    s = {"auto": s, "fp32": 4, "bf16": 2, "fp8": 2}[precision]
    held = _num_elements(teacher) * s
    if precision == "fp8":  # one byte less an element of the layers' matrices
        held -= teacher.num_layers * (4 * E * E + 2 * E * F)
    token = resolved.config.batch.token_budget * s
    # last hidden states, and the head's; what the losses of hints.py take, the values within q, k and v
    loss = resolved.config.loss
    handed = 2 * E + (loss.hidden > 0) * resolved.student.num_layers * E + (loss.values > 0) * 3 * E
    # GELU's input and output; the embeddings, the layer's input, what was attended, and its LayerNorm
    return held, handed * token, (2 * F + 4 * E) * token


def require(resolved: Resolved, *, world_size: int, device: torch.device, device_bytes: int) -> Footprint:
    """The prediction, where it fits. Raises ValueError with its parts and the largest token budget that would."""

    def need(resolved: Resolved) -> Footprint:
        return predict(resolved, world_size=world_size, device=device, device_bytes=device_bytes)

    def fits(resolved: Resolved) -> bool:
        return need(resolved).total * (1 - ACCURACY) <= device_bytes

    if fits(resolved):
        return need(resolved)
    config = resolved.config
    low, high = -(-resolved.meta.max_length // 64) - 1, config.batch.token_budget // 64
    while high - low > 1:
        middle = (low + high) // 2
        smaller = replace(
            resolved,
            config=replace(config, batch=replace(config.batch, token_budget=64 * middle)),
            micro_batches_per_update=2 * world_size,  # more of them, and so their gradients are summed
        )
        low, high = (middle, high) if fits(smaller) else (low, middle)
    if 64 * low >= resolved.meta.max_length:
        fix = f"use --batch.token-budget {64 * low} or less"
    else:
        fix = "no --batch.token-budget fits: use a smaller student, or --engine.zero-stage 3 on more ranks"
    if not config.engine.activation_checkpointing:
        fix += ", or --engine.activation-checkpointing"
    needed = need(resolved)
    raise ValueError(
        f"a rank of this run needs {needed.total / 1e9:.2f} GB ({needed}) and has {device_bytes / 1e9:.2f} GB: {fix}"
    )


def check(resolved: Resolved, place: Place, *, local_world_size: int) -> Footprint:
    """`require` for this rank's device or its share of this machine's memory; logs what is needed and what is there."""
    if place.device.type == "cuda":
        there = torch.cuda.get_device_properties(place.device).total_memory
    else:
        there = host_bytes() // local_world_size
    ranks = place.world_size + resolved.config.teacher.ranks
    needed = require(resolved, world_size=ranks, device=place.device, device_bytes=there)
    log.info(f"memory: {needed.total / 1e9:.2f} GB a rank predicted ({needed}), {there / 1e9:.2f} GB there")
    return needed


def say_measured(predicted: Footprint, place: Place) -> None:
    """One line at the end of a run on CUDA: the allocator's peak beside the prediction, which has CUDA's own part besides."""
    if place.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(place.device) + CUDA_CONTEXT
        log.info(
            f"memory: {peak / 1e9:.2f} GB measured at the peak (with {CUDA_CONTEXT / 1e9:.1f} assumed for CUDA), "
            f"{predicted.total / 1e9:.2f} GB predicted"
        )


def host_bytes() -> int:
    """Bytes that processes of this machine may still take: what the kernel says, or less where a control group (v2) limits it."""
    available = psutil.virtual_memory().available
    limit, statistics = (CONTROL_GROUP / f"memory.{name}" for name in ("max", "stat"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        anonymous = int(statistics.read_text().split()[1])  # the first line: anon BYTES
        available = min(available, int(text) - anonymous)
    return available
