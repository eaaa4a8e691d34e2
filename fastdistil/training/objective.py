"""The objective of DistilBERT (arXiv 1910.01108; weights confirmed in transformers#2013), and every term beyond it.

For the real tokens R, masked tokens M and sequences X of a whole update (all ranks, all micro-batches), with
temperature T:

    L = kd     * T^2/|R| * sum_{r in R} KL(softmax(z_t/T) || softmax(z_s/T)), of M with --loss.kd-rows masked
      + mlm    / |M|     * sum_{m in M} CE(z_s, original id)
      + cosine / |R|     * sum_{r in R} (1 - cos(h_s, h_t))
      + hidden / |R|     * sum_{r in R} mean over layers i of (1 - cos(student's output of layer i, teacher's of layer
      m_i)) + queries, keys, values / |R| * sum_{r in R} KL of the relations of a layer's queries, keys and values
      + embedding / |X|  * sum_{x in X} (1 - cos(e_s, e_t)), or |e_s - e_t|^2
      + similarity / |X| * sum_{x in X} mean over the others y of its micro-batch of (cos(e_s, f_s) - cos(e_t, f_t))^2

Of several teachers softmax(z_t/T) is the weighted mean of theirs (kernels/mixture.py); h_t is the first one's alone.

|R|, |M| and |X| come from the plan of the update, so each micro-batch contributes its sums divided by them and the
parts add up exactly: no mean of means, no communication before the backward.

A term is a field and an entry of LOSS_TERMS in run/config.py, and here a function of its name. kd and mlm are one fused
operator (kernels/linear_distill.py), in which logits exist for a chunk of tokens at a time; the others are in
`terms_of`. Without kd the vocabulary is run on the masked tokens alone, without mlm either not at all: then neither of
the models has a head. With `--loss.kd-rows masked` that operator gets the masked tokens alone.

hidden   m is the map of the initialisation: at the first update student layer i computes the function of teacher layer
         m_i. What it has to make up for is that the layers between m_(i-1) and m_i are gone from its input. So it is
         asked for the output of the layer it began as, neither of an earlier nor of a later one, and the last meets the
         teacher's last, as the evenly spread map has both ends; of a ModernBERT it may be an earlier one, where both do
         not see as much. A student that did not begin as layers of this teacher takes that spread map.
queries, keys, values
         The relations of MiniLMv2 (relations.py), of the student's last layer and --loss.relation-layer of the teacher.

embedding, similarity
         e is the mean of the last hidden states of a sequence, or the first of them, as the teacher's embeddings are
         made; f is another sequence's. Where the widths differ, `--student.projection` maps the student's hidden states
         to the teacher's width for every term that compares vectors. With `--loss.nested-layers` a term is the mean
         over the student and its nested ones, which end after fewer layers; with `--loss.nested-dimensions` the
         similarity is also that of the first dimensions of each, always with the teacher's of all (Matryoshka, arXiv
         2205.13147).

Shapes: N tokens of the micro-batch, D and E widths of student and teacher, V vocabulary, S sequences.
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
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.flat import is_flat
from fastdistil.model.functions import cosine_distance, distillation, pooled
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.sentence import Pooling
from fastdistil.run.config import COUNTED, LOSS_TERMS, LossConfig
from fastdistil.run.profile import span
from fastdistil.training.relations import relation_loss

SUMS = (*(term.name for term in LOSS_TERMS), "agree", "correct")
"""What a micro-batch adds up: unweighted terms (T^2 included), tokens of --loss.kd-rows on which student and teacher
agree at top 1, and masked tokens that the student gets right (counted without kd only). Terms without weight are 0."""


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

    nested: tuple[Tensor, ...] = ()
    """(N, D) last hidden states of the student's nested students; among its layers, if these are wanted."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, of a teacher."""
        return (self.hidden_ND, *self.layers, *self.qkv)


class VocabularyInputs(NamedTuple):
    """What logits are made of; E is the width."""

    transformed_NE: Tensor
    weight_VE: Tensor
    bias_V: Tensor


class TeacherOutput(NamedTuple):
    """What the teacher hands over for one micro-batch. Never logits: those are 40 times larger than hidden states."""

    encoder: EncoderOutputs
    vocabulary: VocabularyInputs | None = None
    """None of a teacher whose head is not run."""
    others: tuple[VocabularyInputs, ...] = ()
    """Of every teacher beside the first."""
    shares: tuple[float, ...] = ()
    """Of each of these in the mixture of it and all before it."""

    @property
    def vocabularies(self) -> tuple[VocabularyInputs, ...]:
        """Of all teachers whose head is run."""
        return (self.vocabulary, *self.others) if self.vocabulary else ()

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that were made for this micro-batch."""
        return (*self.encoder.tensors(), *(inputs.transformed_NE for inputs in self.vocabularies))


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


def real_sequences(batch: MicroBatch) -> Tensor:
    """(S,) bool, which of the layout's sequences are neither padding nor empty; on the device, no sync."""
    begin_S, end_S = batch.layout.cu_seqlens[:-1], batch.layout.cu_seqlens[1:]
    return (end_S > begin_S) & (end_S <= batch.num_rows)


def embedding_distance(
    student: EncoderOutputs, teacher: EncoderOutputs, batch: MicroBatch, factor: Factor, *, pooling: Pooling, l2: bool
) -> tuple[Tensor, Tensor]:
    """1 - cos, or the squared distance, of the embeddings of each sequence."""
    states = teacher.hidden_ND, student.hidden_ND, *student.nested
    example_SE, *mine = (pooled(x_ND, batch.layout, pooling.mode) for x_ND in states)
    if pooling.normalise or not l2:
        example_SE, *mine = (F.normalize(x_SE) for x_SE in (example_SE, *mine))
    distance_S = torch.stack([(x_SE - example_SE).square().sum(1) for x_SE in mine]).mean(0)
    # Of vectors of length 1 the squared distance is twice 1 - cos.
    total = distance_S.masked_fill(~real_sequences(batch), 0.0).sum() * (1.0 if l2 else 0.5)
    return factor.scale * total, total


def similarity_error(
    student: EncoderOutputs,
    teacher: EncoderOutputs,
    batch: MicroBatch,
    factor: Factor,
    *,
    pooling: Pooling,
    dimensions: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """For each sequence the mean over the others of the squared error of their cosine similarity."""
    real_S = real_sequences(batch)
    pair_SS = real_S[:, None] & real_S & ~torch.eye(len(real_S), dtype=torch.bool, device=real_S.device)
    states = teacher.hidden_ND, student.hidden_ND, *student.nested
    example_SE, *mine = (pooled(x_ND, batch.layout, pooling.mode) for x_ND in states)
    cuts = [x_SE[:, :width] for x_SE in mine for width in (None, *dimensions)]
    example_SS, *similarities = (x_SE @ x_SE.T for x_SE in map(F.normalize, (example_SE, *cuts)))
    error_SS = torch.stack([(x_SS - example_SS).square() for x_SS in similarities]).mean(0).masked_fill(~pair_SS, 0.0)
    total = error_SS.sum() / (real_S.sum() - 1).clamp_min(1)
    return factor.scale * total, total


def similarity_bytes(loss: LossConfig, num_sequences: int) -> int:
    """Memory of `similarity_error` and its backward at their peak: 4 fp32 matrices a student, and 2 more.

    Measured with 3,000 sequences and 1 to 9 students, where first dimensions count as students of their own.
    """
    compared = (1 + len(loss.nested_layers)) * (1 + len(loss.nested_dimensions))
    return (4 * compared + 2) * 4 * num_sequences**2


Term = Callable[[EncoderOutputs, EncoderOutputs, MicroBatch, Factor], tuple[Tensor, Tensor]]


def terms_of(loss: LossConfig, pooling: Pooling | None) -> dict[str, Term]:
    """Every term beside the fused two: (student, teacher, micro-batch, factor) -> its part of the loss, which has a
    gradient, and its sum, 0-dim fp32 both."""
    found: dict[str, Term] = {
        "cosine": last_cosine,
        "hidden": hidden_cosine,
        **{
            name: partial(last_relation, which=which, num_heads=loss.relation_heads)
            for which, name in enumerate(("queries", "keys", "values"))
        },
    }
    if pooling is not None:
        l2 = loss.embedding_distance == "l2"
        found["embedding"] = partial(embedding_distance, pooling=pooling, l2=l2)
        found["similarity"] = partial(similarity_error, pooling=pooling, dimensions=loss.nested_dimensions)
    return found


FUSED = ("kd", "mlm")
"""Terms of one operator, which computes mlm with any weight wherever kd has one."""


class Objective(nn.Module):
    """The student and its loss as one module: what an engine trains.

    The vocabulary matrix is used inside the head's own forward, which is where ZeRO-3 has it gathered.

    Args:
        pooling: how embeddings are made of hidden states, where a term wants them.
    """

    def __init__(self, student: MaskedLM, loss: LossConfig, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.terms = terms_of(loss, pooling)
        num_layers = student.architecture.num_layers
        kept = kept_outputs(loss, tuple(range(num_layers)), num_layers - 1)
        nested = tuple(n - 1 for n in loss.nested_layers)
        self.kept_outputs = kept._replace(layers=tuple(dict.fromkeys((*kept.layers, *nested))))
        self._weights: Tensor | None = None

    def forward(
        self, batch: MicroBatch, teacher: TeacherOutput | Callable[[], TeacherOutput] | None
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss.

        Args:
            batch: packed micro-batch on the module's device, with |R|, |M| and |X| of the whole update.
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
            weights_T3 = self._weights_on(batch.denominators.device)
            scales_T = (weights_T3[1:] / batch.denominators).sum(1).float()
            output = teacher() if callable(teacher) else teacher
            loss, sums = self._of_vocabulary(student.hidden_ND, batch, output, scales_T)
            if output is not None:
                loss = self._beside(loss, sums, student, batch, output.encoder, scales_T)
            nothing = weights_T3[0, 0].float()  # one launch for all that have no weight
            return loss, torch.stack([sums.get(name, nothing).detach().float() for name in SUMS])

    def _weights_on(self, device: torch.device) -> Tensor:
        """(1 + terms, 3) fp64: a row of 0, then each term's weight in the column of what its mean is over.

        Made once. Not a buffer of the module: an engine would round it to bf16.
        """
        if self._weights is None or self._weights.device != device:
            rows = [[0.0] * len(COUNTED)]
            for term in LOSS_TERMS:
                rows.append([self.loss.weight(term) * (self.loss.mean_over(term) == what) for what in COUNTED])
            self._weights = torch.tensor(rows, dtype=torch.float64, device=device)
        return self._weights

    def _student_outputs(self, batch: MicroBatch, *, with_kept: bool) -> EncoderOutputs:
        encoder, device = self.student.encoder, batch.input_ids.device
        dropout_p = self.student.architecture.attention_dropout
        how = {"dropout_p": dropout_p, "training": self.training, "window": encoder.widest_window}
        backend = resolve_backend(encoder.attention_backend, device, **how)
        if self.training and dropout_p and backend != "fused":
            seed_generator(device, batch.generator_seed)  # from which the attention of others takes its dropout
        asked = self.kept_outputs if with_kept else KeptOutputs()
        hidden_ND, kept = encoder(batch.input_ids, batch.position_ids, batch.layout, batch.dropout_seed, asked)
        outputs = EncoderOutputs.of(hidden_ND, kept, asked)
        nested = self.loss.nested_layers if with_kept else ()
        return outputs._replace(nested=tuple(outputs.layers[asked.layers.index(n - 1)] for n in nested))

    def _of_vocabulary(
        self, hidden_ND: Tensor, batch: MicroBatch, teacher: TeacherOutput | None, scales_T: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and sums of the terms that want the masked-LM head."""
        if teacher is not None and self.loss.kd:
            return self._distillation(hidden_ND, batch, teacher, scales_T)
        if self.student.head is not None:
            return self._masked_lm(hidden_ND, batch, scales_T)
        if teacher is not None and any(term.wants != "qkv" for term in self.loss.terms):
            return hidden_ND.new_zeros((), dtype=torch.float32), {}
        if teacher is not None:  # relations lie below the last layer's output, which so gets a gradient of 0
            return hidden_ND[:0].float().sum(), {}
        return self._projected(hidden_ND).float().sum() * 0.0, {}  # ZeRO's backward that moves nothing

    def _projected(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND if self.student.projection is None else self.student.projection(hidden_ND)

    def _beside(
        self,
        loss: Tensor,
        sums: dict[str, Tensor],
        student: EncoderOutputs,
        batch: MicroBatch,
        teacher: EncoderOutputs,
        scales_T: Tensor,
    ) -> Tensor:
        """The loss with every other term; their sums are put beside the others."""
        if self.student.projection is not None:
            vectors = {name: tuple(map(self._projected, getattr(student, name))) for name in ("layers", "nested")}
            student = student._replace(hidden_ND=self._projected(student.hidden_ND), **vectors)
        # As the vocabulary's gradient, see `distillation`.
        at_end = is_flat(self.student.encoder.word_embeddings.weight)
        for term, scale in zip(LOSS_TERMS, scales_T.unbind(), strict=True):
            if term.name not in FUSED and self.loss.weight(term):
                part, sums[term.name] = self.terms[term.name](student, teacher, batch, Factor(scale, at_end))
                loss = loss + part
        return loss

    def _distillation(
        self, hidden_ND: Tensor, batch: MicroBatch, teacher: TeacherOutput, scales_T: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert tuple(term.name for term in LOSS_TERMS[: len(FUSED)]) == FUSED  # as the operator takes their scales
        vocabularies, labels, num_rows = teacher.vocabularies, batch.labels, batch.num_rows
        if self.loss.kd_rows == "masked":
            hidden_ND, labels, *transformed = (
                x.index_select(0, batch.masked_rows)
                for x in (hidden_ND, labels, *(v.transformed_NE for v in vocabularies))
            )
            vocabularies = [v._replace(transformed_NE=x) for v, x in zip(vocabularies, transformed, strict=True)]
            num_rows = (labels >= 0).sum(dtype=torch.int32)  # what fills them up is at their end
        first, *others = vocabularies

        def fused_terms(transformed_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
            V = len(bias_V)
            return distillation(
                transformed_ND,
                weight_VD,
                bias_V,
                teacher=first.transformed_NE,
                teacher_weight=first.weight_VE,
                teacher_bias=first.bias_V,
                others=[(*inputs, share) for inputs, share in zip(others, teacher.shares, strict=True)],
                labels=labels,
                num_rows=num_rows,
                temperature=self.loss.temperature,
                scales=scales_T[: len(FUSED)],
                vocab_size=self.student.architecture.vocab_size,
                chunk_tokens=linear_distill.default_chunk_tokens(
                    V, transformed_ND.dtype, transformed_ND.device, num_teachers=1 + len(others)
                ),
            )

        loss, sums = self.student.head(hidden_ND, fused_terms)
        return loss, dict(zip((*FUSED, "agree"), sums.unbind(), strict=True))

    def _masked_lm(self, hidden_ND: Tensor, batch: MicroBatch, scales_T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Only the masked rows need logits: 15 % of the head's work.
        logits_MV = self.student.head(hidden_ND.index_select(0, batch.masked_rows)).float()
        labels_M = batch.labels.index_select(0, batch.masked_rows)
        mlm_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum")
        correct = (logits_MV.detach().argmax(-1) == labels_M).sum()
        return scales_T[1] * mlm_sum, {"mlm": mlm_sum, "correct": correct}


def means(sums: Sequence[float], counts: Sequence[int], loss: LossConfig) -> dict[str, float]:
    """Reported losses of an update (or a validation) from its SUMS over all ranks, weighted as the objective is.

    `counts` are of what COUNTED names.
    """
    of = dict(zip(SUMS, sums, strict=True))
    number = dict(zip(COUNTED, counts, strict=True))
    reported = [t for t in LOSS_TERMS if loss.weight(t) or (loss.kd and t.name in FUSED)]
    parts = {term.name: of[term.name] / max(1, number[loss.mean_over(term)]) for term in reported}
    total = sum(loss.weight(term) * parts[term.name] for term in reported)
    last = {}
    if loss.kd and loss.kd_rows == "masked":
        last["masked_agreement"] = of["agree"] / max(1, number["masked tokens"])
    elif loss.kd:
        last["agreement"] = of["agree"] / number["tokens"]
    elif loss.mlm:
        last["accuracy"] = of["correct"] / number["masked tokens"]
    return {"loss": total, **parts, **last}
