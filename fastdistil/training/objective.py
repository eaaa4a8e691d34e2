"""The objective of DistilBERT (arXiv 1910.01108; weights confirmed in transformers#2013), and every term beyond it.

For the real tokens R and masked tokens M of a whole update (all ranks, all micro-batches), with temperature T:

    L = kd     * T^2/|R| * sum_{r in R} KL(softmax(z_t/T) || softmax(z_s/T))
      + mlm    / |M|     * sum_{m in M} CE(z_s, original id)
      + cosine / |R|     * sum_{r in R} (1 - cos(h_s, h_t))
      + hidden / |R|     * sum_{r in R} mean over layers i of (1 - cos(student's output of layer i, teacher's of layer
      m_i)) + values / |R|     * sum_{r in R} KL of the value relations of the last layers

|R| and |M| come from the plan of the update, so each micro-batch contributes its sums divided by them and the parts add
up exactly: no mean of means, no communication before the backward.

A term is a field and an entry of LOSS_TERMS in run/config.py, and here a function of its name. kd and mlm are one fused
operator (kernels/linear_distill.py), in which no logits exist for more than some thousand tokens; the others are in
TERMS.

hidden   m is the map of the initialisation: at the first update student layer i computes the function of teacher layer
         m_i. What it has to make up for is that the layers between m_(i-1) and m_i are gone from its input. So it is
         asked for the output of the layer it began as, neither of an earlier nor of a later one, and the last meets the
         teacher's last, as the evenly spread map has both ends. A student that did not begin as layers of this teacher
         takes that spread map.
values   The value relation of MiniLMv2 (arXiv 2012.15828, section 3.1): per sequence x and relation head a of A, of
         width d_r, R_a = softmax(V_a V_a^T / sqrt(d_r)), V the values of the last layer, all heads side by side and
         then cut into A. Loss = 1/(A |x|) sum_a sum_t KL(R_a,t of the teacher || of the student), here weighted by |x|:
         the mean over real tokens as of every term, not over sequences. Widths and heads of the two may differ, A
         divides both widths. The paper has the same relations of queries and keys besides, and of a large teacher takes
         an upper middle layer; we do neither.

Shapes: N tokens of the micro-batch, D and E widths of student and teacher, V vocabulary, S sequences of up to L tokens,
A relation heads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels.cosine import cosine_loss
from fastdistil.kernels.linear_distill import LinearDistillLoss, linear_distill_loss
from fastdistil.model.encoder import KeptOutputs, MaskedLM
from fastdistil.run.config import LOSS_TERMS, LossConfig
from fastdistil.run.profile import span

SUMS = (*(term.name for term in LOSS_TERMS), "agree", "correct")
"""What a micro-batch adds up: unweighted terms (T^2 included), real tokens on which student and teacher agree at top 1,
and masked tokens that the student gets right (counted without a teacher only). Terms without weight are 0."""


class EncoderOutputs(NamedTuple):
    """What a term sees of one of the two models for a micro-batch."""

    hidden_ND: Tensor
    """Last hidden states."""
    layers: tuple[Tensor, ...] = ()
    """(N, D) outputs of every student layer, or of the teacher's layers that they imitate, where a term wants them."""
    values: tuple[Tensor, ...] = ()
    """The (N, D) values of the last layer's attention, all heads side by side, where a term wants them."""

    @classmethod
    def of(cls, hidden_ND: Tensor, kept: tuple[Tensor, ...], asked: KeptOutputs) -> "EncoderOutputs":
        """From what an encoder returns, which is flat."""
        num_layers = len(asked.layers)
        return cls(hidden_ND, kept[:num_layers], kept[num_layers:])

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.hidden_ND, *self.layers, *self.values)


class TeacherOutput(NamedTuple):
    """What the teacher hands over for one micro-batch; E is its width. Never logits: those are 40 times larger."""

    encoder: EncoderOutputs
    transformed_NE: Tensor
    """Input of the vocabulary matrix."""
    weight_VE: Tensor
    bias_V: Tensor


def kept_outputs(loss: LossConfig, layers: tuple[int, ...]) -> KeptOutputs:
    """What an encoder must hand out beside its last hidden states for these losses.

    `layers` imitate or are imitated.
    """
    wanted = {term.wants for term in loss.terms}
    return KeptOutputs(layers if "layers" in wanted else (), "values" in wanted)


def hidden_cosine(student: Sequence[Tensor], teacher: Sequence[Tensor], num_rows: Tensor) -> Tensor:
    """0-dim fp32: mean over layers of the sum over real tokens of 1 - cos.

    (N, D) outputs of each layer and its example.
    """
    sums = [cosine_loss(s, t, num_rows=num_rows).loss for s, t in zip(student, teacher, strict=True)]
    return torch.stack(sums).mean()


PADDED_TOKENS = 4096
"""S x L whose relations are in memory at once: A x S x L x L scores in fp32, 25 MB at A = 12 and L = 128."""


def value_relation(
    student_ND: Tensor, teacher_NE: Tensor, lengths: Sequence[int], cu_seqlens: Tensor, num_heads: int
) -> Tensor:
    """0-dim fp32: the sum over real tokens of the mean over relation heads of KL(teacher || student), nats.

    The student gets a gradient. No host sync. The relations are many times larger than the values, so they are made
    again in the backward.

    Args:
        student_ND, teacher_NE: values of the last layers; rows beyond the sum of `lengths` count for nothing.
        lengths: tokens of the real sequences, known on the host.
        cu_seqlens: where they begin, on the device (SequenceLayout); may have more entries.
        num_heads: A, divides D and E.
    """
    # Neighbouring sequences are padded to one length and taken together, as many as fit PADDED_TOKENS.
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or max(*groups[-1], length) * (len(groups[-1]) + 1) > PADDED_TOKENS:
            groups.append([])
        groups[-1].append(length)
    sizes = [sum(group) for group in groups]
    sizes.append(len(student_ND) - sum(sizes))
    *students, padding_ND = student_ND.split(sizes)
    # A zero that depends on the values: under ZeRO-3 all ranks' backwards go the same way, also of one without a
    # sequence.
    total = padding_ND[:0].float().sum()
    first = row = 0
    for group, mine_ND, example_NE in zip(groups, students, teacher_NE.split(sizes), strict=False):
        bounds = cu_seqlens[first : first + len(group) + 1] - row
        arguments = mine_ND, example_NE, bounds, max(group), num_heads
        total = total + checkpoint(_relation, *arguments, use_reentrant=False)
        first, row = first + len(group), row + len(mine_ND)
    return total


def _relation(student_ND: Tensor, teacher_NE: Tensor, bounds: Tensor, longest: int, num_heads: int) -> Tensor:
    begin_S1, end_S1 = bounds[:-1, None], bounds[1:, None]
    row_SL = begin_S1 + torch.arange(longest, device=bounds.device)
    real_SL = row_SL < end_S1
    row_SL = row_SL.minimum(end_S1 - 1)  # the padding repeats the last token, whose numbers are finite

    def log_relation(values: Tensor) -> Tensor:
        padded = values.index_select(0, row_SL.flatten()).float()  # scores and softmax are computed in fp32
        heads = padded.view(*row_SL.shape, num_heads, -1).transpose(1, 2)  # (S, A, L, d_r)
        scores = heads @ heads.mT * heads.shape[-1] ** -0.5
        return F.log_softmax(scores.masked_fill(~real_SL[:, None, None], -1e30), -1)

    log_q, log_p = log_relation(student_ND), log_relation(teacher_NE)
    kl_SAL = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl_SAL.mean(1).masked_fill(~real_SL, 0.0).sum()


def relation_bytes(loss: LossConfig, longest: int) -> int:
    """Memory of `value_relation` while it is computed: scores, logarithms and probabilities of both models, in fp32."""
    return 6 * 4 * loss.relation_heads * max(PADDED_TOKENS, longest) * longest if loss.values else 0


Term = Callable[[EncoderOutputs, EncoderOutputs, MicroBatch, LossConfig], Tensor]

# Every term beside the fused two: (student, teacher, batch, loss) -> 0-dim fp32 sum over real tokens, with a gradient.
TERMS: dict[str, Term] = {
    "cosine": lambda s, t, batch, loss: cosine_loss(s.hidden_ND, t.hidden_ND, num_rows=batch.num_rows).loss,
    "hidden": lambda s, t, batch, loss: hidden_cosine(s.layers, t.layers, batch.num_rows),
    "values": lambda s, t, batch, loss: value_relation(
        s.values[0], t.values[0], batch.real_lengths, batch.layout.cu_seqlens, loss.relation_heads
    ),
}


class Objective(nn.Module):
    """The student and its loss as one module: what an engine trains.

    The vocabulary matrix is used inside the head's own forward, which is where ZeRO-3 has it gathered.
    """

    def __init__(self, student: MaskedLM, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.kept_outputs = kept_outputs(loss, tuple(range(student.architecture.num_layers)))

    def forward(
        self, batch: MicroBatch, teacher: TeacherOutput | None, num_tokens: int, num_masked: int
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss.

        Args:
            batch: packed micro-batch on the module's device.
            teacher: its hidden states for the same masked ids, or None: masked LM alone.
            num_tokens, num_masked: |R| and |M| of the whole update.

        Returns:
            The part of L, 0-dim fp32, to be summed (not averaged) over micro-batches and ranks; and the (len(SUMS),)
            fp32 detached sums named in SUMS.
        """
        with span("student forward"):
            student = self._student_outputs(batch, with_kept=teacher is not None)
        with span("loss"):
            if teacher is None:
                loss, sums = self._masked_lm(student.hidden_ND, batch, num_masked)
            else:
                loss, sums = self._distillation(student, batch, teacher, num_tokens, num_masked)
            zero = loss.new_zeros(())
            return loss, torch.stack([sums.get(name, zero).detach().float() for name in SUMS])

    def _student_outputs(self, batch: MicroBatch, *, with_kept: bool) -> EncoderOutputs:
        encoder = self.student.encoder
        seed: Tensor | None = batch.dropout_seed
        if encoder.attention_backend not in ("auto", "fused"):
            # sdpa and flash-attn take their dropout from torch's generator, and so does all other dropout then.
            torch.manual_seed(batch.generator_seed)
            seed = None
        asked = self.kept_outputs if with_kept else KeptOutputs()
        hidden_ND, kept = encoder(batch.input_ids, batch.position_ids, batch.layout, seed, asked)
        return EncoderOutputs.of(hidden_ND, kept, asked)

    def _distillation(
        self, student: EncoderOutputs, batch: MicroBatch, teacher: TeacherOutput, num_tokens: int, num_masked: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.loss

        def fused_terms(transformed_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> LinearDistillLoss:
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

        loss, kd_sum, mlm_sum, num_agree = self.student.head(student.hidden_ND, fused_terms)
        sums = {"kd": kd_sum, "mlm": mlm_sum, "agree": num_agree}
        for term in config.terms:
            if term.name in TERMS:
                sums[term.name] = TERMS[term.name](student, teacher.encoder, batch, config)
                loss = loss + config.weight(term) / num_tokens * sums[term.name]
        return loss, sums

    def _masked_lm(self, hidden_ND: Tensor, batch: MicroBatch, num_masked: int) -> tuple[Tensor, dict[str, Tensor]]:
        # Only the masked rows need logits: 15 % of the head's work.
        logits_MV = self.student.head(hidden_ND.index_select(0, batch.masked_rows)).float()
        labels_M = batch.labels.index_select(0, batch.masked_rows)
        mlm_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum")
        correct = (logits_MV.detach().argmax(-1) == labels_M).sum()
        return self.loss.mlm / num_masked * mlm_sum, {"mlm": mlm_sum, "correct": correct}


def means(
    sums: Sequence[float], num_tokens: int, num_masked: int, loss: LossConfig, *, has_teacher: bool
) -> dict[str, float]:
    """Reported losses of an update (or a validation) from its SUMS over all ranks, weighted as the objective is."""
    of = dict(zip(SUMS, sums, strict=True))
    # The fused terms are computed with any weight, the others only where they have one.
    reported = [t for t in LOSS_TERMS if (has_teacher and t.name not in TERMS) or loss.weight(t)]
    reported = reported if has_teacher else [t for t in LOSS_TERMS if t.wants == "nothing"]
    denominators = {"tokens": num_tokens, "masked tokens": num_masked}
    parts = {term.name: of[term.name] / denominators[term.mean_over] for term in reported}
    total = sum(loss.weight(term) * parts[term.name] for term in reported)
    last = {"agreement": of["agree"] / num_tokens} if has_teacher else {"accuracy": of["correct"] / num_masked}
    return {"loss": total, **parts, **last}
