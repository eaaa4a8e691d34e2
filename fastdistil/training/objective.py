"""The objective of DistilBERT (arXiv 1910.01108; weights confirmed in transformers#2013).

For the real tokens R and masked tokens M of a whole update (all ranks, all micro-batches), with temperature T:

    L = kd     * T^2/|R| * sum_{r in R} KL(softmax(z_t/T) || softmax(z_s/T))
      + mlm    / |M|     * sum_{m in M} CE(z_s, original id)
      + cosine / |R|     * sum_{r in R} (1 - cos(h_s, h_t))

and, where asked for, the terms of hints.py over |R|. |R| and |M| come from the plan of the update, so each micro-batch
contributes its sums divided by them and the parts add up exactly: no mean of means, no communication before the backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels.cosine import cosine_loss
from fastdistil.kernels.linear_distill import LinearDistillLoss, linear_distill_loss
from fastdistil.model.encoder import Keep, MaskedLM
from fastdistil.run.config import LossConfig
from fastdistil.run.profile import span
from fastdistil.training import hints

SUMS = ("kd", "mlm", "cosine", "agree", "correct", "hidden", "values")
"""What a micro-batch adds up: three unweighted loss terms (T^2 included), real tokens on which student and teacher
agree at top 1, masked tokens the student gets right (only counted without a teacher), two more terms (hints.py)."""


class TeacherOutput(NamedTuple):
    """What the teacher hands over for one micro-batch; E is its width. Never logits: those are 40 times larger."""

    hidden_NE: Tensor  # last hidden state
    transformed_NE: Tensor  # input of the vocabulary matrix
    weight_VE: Tensor
    bias_V: Tensor
    kept: tuple[Tensor, ...] = ()  # outputs of layers, then values of the last (bert.Keep)


def teacher_keeps(loss: LossConfig, layers: tuple[int, ...]) -> Keep | None:
    """What a teacher must hand over for the losses of hints.py, `layers` being the ones that are imitated; None for none."""
    if not loss.hidden and not loss.values:
        return None
    return Keep(layers if loss.hidden else (), loss.values > 0)


class Objective(nn.Module):
    """The student and its loss as one module: what an engine trains.

    The vocabulary matrix is used inside the head's own forward, which is where ZeRO-3 has it gathered.
    """

    def __init__(self, student: MaskedLM, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.keep = teacher_keeps(loss, tuple(range(student.architecture.num_layers)))

    def forward(
        self, batch: MicroBatch, teacher: TeacherOutput | None, num_tokens: int, num_masked: int
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss.

        Args:
            batch: packed micro-batch on the module's device.
            teacher: its hidden states for the same masked ids, or None: masked LM alone.
            num_tokens, num_masked: |R| and |M| of the whole update.

        Returns:
            The part of L, 0-dim fp32, to be summed (not averaged) over micro-batches and ranks; and the (7,) fp32
            detached sums named in SUMS.
        """
        inputs, kept = (batch.input_ids, batch.position_ids, batch.layout), ()
        with span("student forward"):
            if self.keep is None:
                hidden_ND = self.student.encoder(*inputs)
            else:
                hidden_ND, kept = self.student.encoder(*inputs, self.keep)
        with span("loss"):
            if teacher is None:
                return self._masked_lm(hidden_ND, batch, num_masked)
            return self._distillation(hidden_ND, kept, batch, teacher, num_tokens, num_masked)

    def _distillation(
        self,
        hidden_ND: Tensor,
        kept: tuple[Tensor, ...],
        batch: MicroBatch,
        teacher: TeacherOutput,
        num_tokens: int,
        num_masked: int,
    ) -> tuple[Tensor, Tensor]:
        config = self.loss

        def distil(transformed_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> LinearDistillLoss:
            return linear_distill_loss(
                transformed_ND,
                weight_VD,
                bias_V,
                teacher.transformed_NE,
                teacher.weight_VE,
                teacher.bias_V,
                batch.labels,
                temperature=config.temperature,
                kd_scale=config.kd / num_tokens,
                mlm_scale=config.mlm / num_masked,
                vocab_size=self.student.architecture.vocab_size,
                num_rows=batch.num_rows,
            )

        loss, kd_sum, mlm_sum, num_agree = self.student.head(hidden_ND, distil)
        cosine_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        if config.cosine:
            cosine_sum = cosine_loss(hidden_ND, teacher.hidden_NE, num_rows=batch.num_rows)
            loss = loss + config.cosine / num_tokens * cosine_sum
        zero = torch.zeros_like(kd_sum)
        hidden_sum = values_sum = zero
        if config.hidden:
            n = self.student.architecture.num_layers
            hidden_sum = hints.hidden_cosine(kept[:n], teacher.kept[:n], batch.num_rows)
            loss = loss + config.hidden / num_tokens * hidden_sum
        if config.values:
            lengths = batch.lengths[: len(batch.sequences)]
            values_sum = hints.value_relation(
                kept[-1], teacher.kept[-1], lengths, batch.layout.cu_seqlens, config.relation_heads
            )
            loss = loss + config.values / num_tokens * values_sum
        sums = (kd_sum, mlm_sum, cosine_sum, num_agree, zero, hidden_sum, values_sum)
        return loss, torch.stack([s.detach().float() for s in sums])

    def _masked_lm(self, hidden_ND: Tensor, batch: MicroBatch, num_masked: int) -> tuple[Tensor, Tensor]:
        # only the masked rows need logits: 15 % of the head's work
        logits_MV = self.student.head(hidden_ND.index_select(0, batch.masked_rows)).float()
        labels_M = batch.labels.index_select(0, batch.masked_rows)
        mlm_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum")
        correct = (logits_MV.detach().argmax(-1) == labels_M).sum()
        zero = torch.zeros_like(mlm_sum)
        sums = torch.stack([zero, mlm_sum.detach(), zero, zero, correct.float(), zero, zero])
        return self.loss.mlm / num_masked * mlm_sum, sums


def means(
    sums: list[float], num_tokens: int, num_masked: int, loss: LossConfig, *, has_teacher: bool
) -> dict[str, float]:
    """Reported losses of an update (or a validation) from its sums over all ranks, weighted as the objective is."""
    kd, mlm, cosine, agree, correct, hidden, values = sums
    if not has_teacher:
        return {"loss": loss.mlm * mlm / num_masked, "mlm": mlm / num_masked, "accuracy": correct / num_masked}
    parts = {"kd": kd / num_tokens, "mlm": mlm / num_masked}
    total = loss.kd * parts["kd"] + loss.mlm * parts["mlm"]
    optional = (loss.cosine, cosine), (loss.hidden, hidden), (loss.values, values)
    for name, (weight, value) in zip(("cosine", "hidden", "values"), optional, strict=True):
        if weight:  # without it the term was not computed
            parts[name] = value / num_tokens
            total += weight * parts[name]
    return {"loss": total, **parts, "agreement": agree / num_tokens}
