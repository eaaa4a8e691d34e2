"""Memory that a run needs on each rank, from shapes alone, before anything is allocated.

`predict` adds up rows: a row a thing in memory, with the moments of an update at which it is there. The peak is the
moment with the largest sum:

    teacher      the teacher infers, its widest layer beside the hidden states that it handed over before
    loss         all that the student keeps for its backward, and the loss's chunks of logits
    backward     the same activations, and the gradients that flow back where they are widest
    step         whole gradients, and what an engine makes of them
    checkpoint   on the CPU, the copy of weights and moments that is written

Counted operator by operator in encoder.py and kernels/, and measured for DeepSpeed 0.19.8;
tests/training/test_memory.py holds it to 10 % of measured peaks. Not counted: torch.compile, and what an allocator
keeps without using it.

Shapes: N tokens of the micro-batch, D width, F width of the feed-forward layer, V padded vocabulary, P parameters, W
ranks.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from fastdistil.kernels.attention_backends import resolve_backend
from fastdistil.kernels.linear_distill import default_chunk_tokens, num_buffers
from fastdistil.model.architecture import Architecture
from fastdistil.run.ranks import Ranks
from fastdistil.training.objective import similarity_bytes
from fastdistil.training.preflight import Resolved
from fastdistil.training.relations import relation_bytes

log = logging.getLogger("fastdistil")

ACCURACY = 0.1  # a run is refused only where it would not fit even if so much less were needed
CUDA_CONTEXT = 500_000_000  # assumed, not measured: CUDA's context, the code of its libraries and of our kernels
CUBLAS_WORKSPACE = 32 * 2**20  # PyTorch's default for a stream on Hopper; elsewhere it is smaller

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of version 2, as a container sees its own

MOMENTS = ("teacher", "loss", "backward", "step", "checkpoint")
BEFORE_STEP = MOMENTS[:3]
LOSS_AND_BACKWARD = MOMENTS[1:3]

Row = tuple[str, int, tuple[str, ...]]
"""What it is for, bytes, and the moments at which it is there."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one rank at the peak of an update, by what they are for."""

    parts: dict[str, int]
    moment: str
    """Where in an update the peak is: one of MOMENTS."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {n / 1e9:.2f}" for name, n in self.parts.items() if n)


def predict(resolved: Resolved, *, device: torch.device, device_bytes: int) -> Footprint:
    """What a rank that trains the student needs on a device of `device_bytes` in all; needs no such device."""
    rows = [*_engine(resolved, device), *_teacher(resolved, device), *_student(resolved, device, device_bytes)]
    if device.type == "cuda":
        rows.append(("CUDA", CUDA_CONTEXT + 2 * CUBLAS_WORKSPACE, MOMENTS))
    moment = max(MOMENTS, key=lambda m: sum(num_bytes for _, num_bytes, when in rows if m in when))
    parts: dict[str, int] = {}
    for what, num_bytes, when in rows:
        parts[what] = parts.get(what, 0) + num_bytes * (moment in when)
    return Footprint(parts, moment)


def _engine(resolved: Resolved, device: torch.device) -> Iterator[Row]:
    """Weights, moments and gradients, by ZeRO stage."""
    P, W, stage = _num_elements(resolved.student), resolved.world_size, resolved.zero_stage
    s = resolved.dtype(device).itemsize
    bf16 = s == 2
    summed = 4 * (resolved.micro_batches_per_update > W)  # fp32 sums, where an update has several micro-batches a rank
    beside = 4 + 2 * (summed > 0) if bf16 else summed  # stage 1 in bf16 sums in fp32 beside gradients in bf16
    always, before = MOMENTS, BEFORE_STEP
    # (what, bytes a parameter at stages 0 to 3, when). A pair is (on every rank, divided among the ranks).
    table = (
        # stage 0 has copies in bf16 beside its weights; stage 3 keeps what it gathered
        ("weights", ((4 + 2 * bf16, 0), (s, 4), (s, 4), (s, s + 4)), always),
        ("gradients", ((4, 0), (beside, 0), (0, 4), (0, 4)), before),
        ("gradients", ((4, 0), (max(beside, 4), 4), (0, 8), (0, 8)), ("step",)),
        ("gradients", ((4, 0), (4 * bf16, 0), (0, 0), (0, 4)), ("checkpoint",)),
        ("optimiser", ((8, 0), (0, 8), (0, 8), (0, 8)), always),
    )
    for what, by_stage, when in table:
        replicated, sharded = by_stage[stage]
        yield what, P * replicated + -(-P * sharded // W), when
    yield "buckets", 4 * resolved.config.engine.bucket_elements * (stage > 0), always
    if device.type == "cpu":
        yield "checkpoint", 12 * P, ("checkpoint",)


def _teacher(resolved: Resolved, device: torch.device) -> Iterator[Row]:
    """Weights of all teachers, what they hand over, and the most that one needs beside these while it infers."""
    config, s = resolved.config, resolved.teacher_dtype(device).itemsize
    wants_head, token = int(bool(config.loss.kd)), resolved.token_budget * s
    wanted = {term.wants for term in config.loss.terms}
    is_elsewhere = config.teacher.ranks or config.teacher.device == "second"
    held = handed = inference = 0
    for teacher in resolved.teachers:
        E, F, is_first = teacher.hidden_size, teacher.ffn_size, teacher is resolved.teacher
        weights = _num_elements(teacher) * s
        if config.teacher.precision == "fp8":  # one byte less an element of the layers' matrices
            weights -= teacher.num_layers * teacher.layer_products
        held += teacher.padded_vocab_size * E * s * wants_head if is_elsewhere else weights
        # The head's hidden states and, of the first teacher alone, the last ones; what terms want of its layers, and
        # queries, keys and values. From other ranks the last ones of all come in one piece.
        layers = ("layers" in wanted) * resolved.student.num_layers + 3 * ("qkv" in wanted)
        last = is_first or config.teacher.ranks > 0
        handed += token * E * (wants_head + last + is_first * layers)
        # GELU's input, with its gates where there are any, and output; the embeddings, the layer's input, what was
        # attended, and its LayerNorm.
        inference = max(inference, token * ((2 + teacher.family.gated) * F + (4 if is_first else 5) * E))
    if not resolved.teachers:
        return
    if is_elsewhere:
        inference = 0
    elif device.type == "cuda" and config.teacher.overlap:
        # A side stream's memory serves no other. Outputs are in the loop's hands, made, and in the making.
        held, inference = held + inference + 2 * handed, 0
    yield "teacher", held, MOMENTS
    yield "teacher", handed, (*BEFORE_STEP, *(["checkpoint"] if device.type == "cpu" else []))
    yield "teacher", inference, ("teacher",)


def _student(resolved: Resolved, device: torch.device, device_bytes: int) -> Iterator[Row]:
    """What a micro-batch leaves for its backward, and the loss."""
    config, student, dtype = resolved.config, resolved.student, resolved.dtype(device)
    s, N, V = dtype.itemsize, resolved.token_budget, student.padded_vocab_size
    D, F, token = student.hidden_size, student.ffn_size, N * s
    # A layer keeps q, k and v, what was attended, and 4 D more: its input, both LayerNorms' sums and the first one's
    # result, or of a pre-norm layer both sums and both results. Then GELU's input or its derivative there, with its
    # gates, and its output; in fp32 the log-sum-exp of the attention, means and deviations.
    ffn = (2 + student.family.gated) * F
    layer = token * (8 * D + ffn) + 4 * N * (student.num_heads + 4)
    dropout_p, of_backward = student.attention_dropout, 0
    how = {"dropout_p": dropout_p, "training": True, "window": student.widest_window}
    backend = resolve_backend(config.engine.attention, device, dtype=dtype, **how)
    if backend == "fused" and device.type == "cuda" and dropout_p:
        layer += 8 * N * student.num_heads  # the keys of the masks
    if backend == "fused" and device.type == "cpu":  # scores of a long sequence and their gradient, of all heads
        of_backward = (8 + 4 * (dropout_p > 0)) * student.num_heads * resolved.meta.max_length**2
    if backend in ("sdpa", "cudnn"):
        layer += token * D  # the runs of equal lengths, put together
        if dropout_p and device.type == "cpu":  # whole score matrices; counted as if all sequences were long
            scores = token * student.num_heads * resolved.meta.max_length
            layer, of_backward = layer + 3 * scores, 7 * scores
    kept, again = student.num_layers * layer, 0
    if config.engine.activation_checkpointing:
        kept, again = student.num_layers * token * D, layer
    head_tokens = int(resolved.head_fraction * N)
    kept += (2 * N + 4 * head_tokens) * D * s  # embeddings' sum, last hidden states; four of the head
    if student.rotates:  # sines and cosines of two kinds of layers, in fp32
        kept += 8 * N * D // student.num_heads
    # The vocabulary's gradient lies in the flat buffer at stage 0, else it is a tensor of its own in fp32. A CPU has no
    # product of bf16 with an fp32 result.
    dweight = 4 * V * D * (resolved.zero_stage > 0) * config.loss.has_head
    product = V * D * s * (device.type == "cpu" and s == 2)
    if config.loss.kd:
        num_teachers = len(resolved.teachers)
        affordable = default_chunk_tokens(V, dtype, device, total_memory=device_bytes, num_teachers=num_teachers)
        loss = num_buffers(num_teachers) * min(head_tokens, affordable) * V * s + dweight + product
    else:  # log-softmax, its gradient and that of the logits
        loss = 12 * head_tokens * V
    if any(term.wants == "qkv" for term in config.loss.terms):
        loss = max(loss, relation_bytes(config.loss.relation_heads, resolved.meta.max_length, device.type))
    if config.loss.similarity:
        num_tokens, num_sequences = resolved.drawn
        S = int(N * num_sequences // num_tokens)  # sequences of a micro-batch, on average
        loss = max(loss, similarity_bytes(config.loss, S))
    yield "activations", kept, LOSS_AND_BACKWARD
    yield "activations", again + of_backward + token * (1 + student.family.gated) * F, ("backward",)
    yield "loss", loss, ("loss",)
    yield "loss", dweight + V * D * s, ("backward",)  # and the table that the embeddings make


def _num_elements(architecture: Architecture) -> int:
    """Parameters as they lie in memory, the vocabulary's padding included."""
    padding = architecture.padded_vocab_size - architecture.vocab_size
    return architecture.num_parameters + padding * (architecture.hidden_size + architecture.mlm_head)


def require(resolved: Resolved, *, device: torch.device, device_bytes: int) -> Footprint:
    """The prediction, where it fits. Raises ValueError with its parts and the largest token budget that would."""

    def need(resolved: Resolved) -> Footprint:
        return predict(resolved, device=device, device_bytes=device_bytes)

    def fits(resolved: Resolved) -> bool:
        return need(resolved).total * (1 - ACCURACY) <= device_bytes

    if fits(resolved):
        return need(resolved)
    config = resolved.config
    low, high = -(-resolved.meta.max_length // 64) - 1, resolved.token_budget // 64
    while high - low > 1:
        middle = (low + high) // 2
        smaller = replace(
            resolved,
            config=replace(config, batch=replace(config.batch, token_budget=64 * middle)),
            # Smaller micro-batches are more of them, and so their gradients are summed.
            micro_batches_per_update=2 * (resolved.world_size + config.teacher.ranks),
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


def check(resolved: Resolved, ranks: Ranks, *, local_world_size: int) -> Footprint:
    """`require` for this rank's device or its share of this machine's memory; logs what is needed and what is there."""
    if ranks.device.type == "cuda":
        there = torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        there = host_bytes() // local_world_size
    needed = require(resolved, device=ranks.device, device_bytes=there)
    log.info(f"memory: {needed.total / 1e9:.2f} GB a rank predicted ({needed}), {there / 1e9:.2f} GB there")
    return needed


def say_measured(predicted: Footprint, ranks: Ranks) -> None:
    """One line at the end of a run on CUDA: the peak, with what CUDA is assumed to take, beside the prediction."""
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(ranks.device) + CUDA_CONTEXT
        log.info(
            f"memory: {peak / 1e9:.2f} GB measured at the peak (with {CUDA_CONTEXT / 1e9:.1f} assumed for CUDA), "
            f"{predicted.total / 1e9:.2f} GB predicted"
        )


def host_bytes() -> int:
    """Bytes that processes here may still take: what the kernel says, or less where a control group (v2) limits it."""
    available = psutil.virtual_memory().available
    limit, statistics = (CONTROL_GROUP / f"memory.{name}" for name in ("max", "stat"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        anonymous = int(statistics.read_text().split()[1])  # the first line: anon BYTES
        available = min(available, int(text) - anonymous)
    return available
