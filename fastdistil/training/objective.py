"""The objective of DistilBERT (arXiv 1910.01108; weights confirmed in transformers#2013), and every term beyond it.

For the real tokens R and masked tokens M of a whole update (all ranks, all micro-batches), with temperature T:

    L = kd     * T^2/|R| * sum_{r in R} KL(softmax(z_t/T) || softmax(z_s/T))
      + mlm    / |M|     * sum_{m in M} CE(z_s, original id)
      + cosine / |R|     * sum_{r in R} (1 - cos(h_s, h_t))
      + hidden / |R|     * sum_{r in R} mean over layers i of (1 - cos(student's output of layer i, teacher's of layer
      m_i)) + queries, keys, values / |R| * sum_{r in R} KL of the relations of a layer's queries, keys and values

|R| and |M| come from the plan of the update, so each micro-batch contributes its sums divided by them and the parts add
up exactly: no mean of means, no communication before the backward.

A term is a field and an entry of LOSS_TERMS in run/config.py, and here a function of its name. kd and mlm are one fused
operator (kernels/linear_distill.py), in which logits exist for a chunk of tokens at a time; the others are in
`terms_of`.

hidden   m is the map of the initialisation: at the first update student layer i computes the function of teacher layer
         m_i. What it has to make up for is that the layers between m_(i-1) and m_i are gone from its input. So it is
         asked for the output of the layer it began as, neither of an earlier nor of a later one, and the last meets the
         teacher's last, as the evenly spread map has both ends. A student that did not begin as layers of this teacher
         takes that spread map.
queries, keys, values
         The relations of MiniLMv2 (relations.py), of the student's last layer and --loss.relation-layer of the teacher.

Shapes: N tokens of the micro-batch, D and E widths of student and teacher, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistil.data.batches import MicroBatch
from fastdistil.kernels import linear_distill
from fastdistil.kernels.attention_backends import resolve_backend, seed_generator
from fastdistil.model.encoder import KeptOutputs, MaskedLM
from fastdistil.model.flat import is_flat
from fastdistil.model.functions import cosine_distance, distillation
from fastdistil.run.config import LOSS_TERMS, LossConfig
from fastdistil.run.profile import span
from fastdistil.training.relations import relation_loss

SUMS = (*(term.name for term in LOSS_TERMS), "agree", "correct")
"""What a micro-batch adds up: unweighted terms (T^2 included), real tokens on which student and teacher agree at top 1,
and masked tokens that the student gets right (counted without a teacher only). Terms without weight are 0."""


class EncoderOutputs(NamedTuple):
    """What a term sees of one of the two models for a micro-batch."""

    hidden_ND: Tensor
    """Last hidden states."""
    layers: tuple[Tensor, ...] = ()
    """(N, D) outputs of every student layer, or of the teacher's layers that they imitate, where a term wants them."""
    qkv: tuple[Tensor, ...] = ()
    """(N, D) queries, keys and values of the attention of one layer, all heads side by side, where a term wants
    them."""

    @classmethod
    def of(cls, hidden_ND: Tensor, kept: tuple[Tensor, ...], asked: KeptOutputs) -> "EncoderOutputs":
        """From what an encoder returns, which is flat."""
        num_layers = len(asked.layers)
        qkv = () if asked.qkv is None else kept[-1].chunk(3, 1)
        return cls(hidden_ND, kept[:num_layers], qkv)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.hidden_ND, *self.layers, *self.qkv)


class TeacherOutput(NamedTuple):
    """What the teacher hands over for one micro-batch; E is its width. Never logits: those are 40 times larger."""

    encoder: EncoderOutputs
    transformed_NE: Tensor
    """Input of the vocabulary matrix."""
    weight_VE: Tensor
    bias_V: Tensor


def kept_outputs(loss: LossConfig, layers: tuple[int, ...], qkv: int) -> KeptOutputs:
    """What an encoder must hand out beside its last hidden states for these losses.

    `layers` imitate or are imitated, and `qkv` is the layer whose relations do or are.
    """
    wanted = {term.wants for term in loss.terms}
    return KeptOutputs(layers if "layers" in wanted else (), qkv if "qkv" in wanted else None)


class Factor(NamedTuple):
    """What the sum of a term is multiplied by."""

    scale: Tensor
    """Its weight over its denominator, 0-dim fp32."""
    at_end: bool
    """Whether nothing multiplies the whole loss, so that gradients that are made with it are ready."""


def last_cosine(
    student: EncoderOutputs, teacher: EncoderOutputs, batch: MicroBatch, factor: Factor
) -> tuple[Tensor, Tensor]:
    """1 - cos of the last hidden states."""
    states = student.hidden_ND, teacher.hidden_ND
    return cosine_distance(*states, batch.num_rows, factor.scale, at_end=factor.at_end)


def hidden_cosine(
    student: EncoderOutputs, teacher: EncoderOutputs, batch: MicroBatch, factor: Factor
) -> tuple[Tensor, Tensor]:
    """Mean over layers of 1 - cos of the output of each layer and its example."""
    scale = factor.scale / len(student.layers)
    found = [
        cosine_distance(s_ND, t_ND, batch.num_rows, scale, at_end=factor.at_end)
        for s_ND, t_ND in zip(student.layers, teacher.layers, strict=True)
    ]
    parts, sums = zip(*found, strict=True)
    return torch.stack(parts).sum(), torch.stack(sums).mean()


def last_relation(
    student: EncoderOutputs, teacher: EncoderOutputs, batch: MicroBatch, factor: Factor, *, which: int, num_heads: int
) -> tuple[Tensor, Tensor]:
    """KL of the relations among the queries, keys or values, which are 0, 1 and 2."""
    pair = student.qkv[which], teacher.qkv[which]
    where = batch.real_lengths, batch.layout.cu_seqlens
    return relation_loss(*pair, *where, num_heads, factor.scale, at_end=factor.at_end)


Term = Callable[[EncoderOutputs, EncoderOutputs, MicroBatch, Factor], tuple[Tensor, Tensor]]


def terms_of(loss: LossConfig) -> dict[str, Term]:
    """Every term beside the fused two: (student, teacher, micro-batch, factor) -> its part of the loss, which has a
    gradient, and its sum over real tokens, 0-dim fp32 both."""
    return {
        "cosine": last_cosine,
        "hidden": hidden_cosine,
        **{
            name: partial(last_relation, which=which, num_heads=loss.relation_heads)
            for which, name in enumerate(("queries", "keys", "values"))
        },
    }


FUSED = ("kd", "mlm")
"""Terms of one operator, which are computed with any weight."""


class Objective(nn.Module):
    """The student and its loss as one module: what an engine trains.

    The vocabulary matrix is used inside the head's own forward, which is where ZeRO-3 has it gathered.
    """

    def __init__(self, student: MaskedLM, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        num_layers = student.architecture.num_layers
        self.kept_outputs = kept_outputs(loss, tuple(range(num_layers)), num_layers - 1)
        self._weights: Tensor | None = None

    def forward(
        self, batch: MicroBatch, teacher: TeacherOutput | Callable[[], TeacherOutput] | None
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss.

        Args:
            batch: packed micro-batch on the module's device, with |R| and |M| of the whole update.
            teacher: its hidden states for the same masked ids, or what hands them over when the student's forward is
                done; None: masked LM alone.

        Returns:
            The part of L, 0-dim fp32, to be summed (not averaged) over micro-batches and ranks; and the (len(SUMS),)
            fp32 detached sums named in SUMS.
        """
        with span("student forward"):
            student = self._student_outputs(batch, with_kept=teacher is not None)
        with span("loss"):
            # The weight of every term over its denominator, by numbers that are on the device.
            weights_T2 = self._weights_on(batch.denominators.device)
            scales_T = (weights_T2[1:] / batch.denominators).sum(1).float()
            if teacher is None:
                loss, sums = self._masked_lm(student.hidden_ND, batch, scales_T)
            else:
                output = teacher() if callable(teacher) else teacher
                loss, sums = self._distillation(student, batch, output, scales_T)
            nothing = weights_T2[0, 0]
            return loss, torch.stack([sums.get(name, nothing).detach().float() for name in SUMS])

    def _weights_on(self, device: torch.device) -> Tensor:
        """(1 + terms, 2) fp64: a row of 0, then each term's weight in the column of what its mean is over.

        Made once. Not a buffer of the module: an engine would round it to bf16.
        """
        if self._weights is None or self._weights.device != device:
            rows = [[0.0, 0.0]]
            for term in LOSS_TERMS:
                weight = self.loss.weight(term)
                rows.append([weight, 0.0] if term.mean_over == "tokens" else [0.0, weight])
            self._weights = torch.tensor(rows, dtype=torch.float64, device=device)
        return self._weights

    def _student_outputs(self, batch: MicroBatch, *, with_kept: bool) -> EncoderOutputs:
        encoder, device = self.student.encoder, batch.input_ids.device
        dropout_p = self.student.architecture.attention_dropout
        if self.training and resolve_backend(encoder.attention_backend, device, dropout_p=dropout_p) != "fused":
            seed_generator(device, batch.generator_seed)  # from which the attention of others takes its dropout
        asked = self.kept_outputs if with_kept else KeptOutputs()
        hidden_ND, kept = encoder(batch.input_ids, batch.position_ids, batch.layout, batch.dropout_seed, asked)
        return EncoderOutputs.of(hidden_ND, kept, asked)

    def _distillation(
        self, student: EncoderOutputs, batch: MicroBatch, teacher: TeacherOutput, scales_T: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, index = self.loss, {term.name: i for i, term in enumerate(LOSS_TERMS)}

        def fused_terms(transformed_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
            V = len(bias_V)
            return distillation(
                transformed_ND,
                weight_VD,
                bias_V,
                teacher=teacher.transformed_NE,
                teacher_weight=teacher.weight_VE,
                teacher_bias=teacher.bias_V,
                labels=batch.labels,
                num_rows=batch.num_rows,
                temperature=config.temperature,
                scales=scales_T[: index["mlm"] + 1],
                vocab_size=self.student.architecture.vocab_size,
                chunk_tokens=linear_distill.default_chunk_tokens(V, transformed_ND.dtype, transformed_ND.device),
            )

        assert (index["kd"], index["mlm"]) == (0, 1)  # as the operator takes them
        loss, fused = self.student.head(student.hidden_ND, fused_terms)
        kd_sum, mlm_sum, num_agree = fused.unbind()
        sums = {"kd": kd_sum, "mlm": mlm_sum, "agree": num_agree}
        at_end = is_flat(self.student.head.weight)  # as the vocabulary's gradient, see `distillation`
        for term in config.terms:
            if term.name not in FUSED:
                factor = Factor(scales_T[index[term.name]], at_end)
                part, sums[term.name] = terms_of(config)[term.name](student, teacher.encoder, batch, factor)
                loss = loss + part
        return loss, sums

    def _masked_lm(self, hidden_ND: Tensor, batch: MicroBatch, scales_T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Only the masked rows need logits: 15 % of the head's work.
        logits_MV = self.student.head(hidden_ND.index_select(0, batch.masked_rows)).float()
        labels_M = batch.labels.index_select(0, batch.masked_rows)
        mlm_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum")
        correct = (logits_MV.detach().argmax(-1) == labels_M).sum()
        return scales_T[1] * mlm_sum, {"mlm": mlm_sum, "correct": correct}


def means(
    sums: Sequence[float], num_tokens: int, num_masked: int, loss: LossConfig, *, has_teacher: bool
) -> dict[str, float]:
    """Reported losses of an update (or a validation) from its SUMS over all ranks, weighted as the objective is."""
    of = dict(zip(SUMS, sums, strict=True))
    # The fused terms are computed with any weight, the others only where they have one.
    reported = [t for t in LOSS_TERMS if (has_teacher and t.name in FUSED) or loss.weight(t)]
    reported = reported if has_teacher else [t for t in LOSS_TERMS if t.wants == "nothing"]
    denominators = {"tokens": num_tokens, "masked tokens": num_masked}
    parts = {term.name: of[term.name] / denominators[term.mean_over] for term in reported}
    total = sum(loss.weight(term) * parts[term.name] for term in reported)
    last = {"agreement": of["agree"] / num_tokens} if has_teacher else {"accuracy": of["correct"] / num_masked}
    return {"loss": total, **parts, **last}
