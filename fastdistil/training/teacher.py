"""The frozen teacher: hidden states for a micro-batch, never logits, never a gradient, never in an engine.

Several teachers are one: the first has the others with it, whose heads' hidden states are all that they hand over.

`TeacherPrefetcher` hands (micro-batch, teacher's output) to the loop. On CUDA the teacher works on the next
micro-batch, on a stream of its own, while the student works on this one; on a CPU it precedes. The numbers are the
same, bit for bit.

    student's stream   student 1 | student 2 | student 3
    side stream        teacher 2 | teacher 3 | teacher 4      with the copies to the device
"""

import copy
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdistil.data.batches import MicroBatch
from fastdistil.model.encoder import KeptOutputs, VocabHead
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run.config import Config
from fastdistil.run.link import TeacherLink
from fastdistil.run.profile import span, spanned
from fastdistil.run.ranks import Ranks
from fastdistil.training.objective import EncoderOutputs, TeacherOutput, VocabularyInputs

log = logging.getLogger("fastdistil")


class Teacher:
    """A masked LM in evaluation mode. Not a Module, so that no `.train()`, optimiser or ZeRO partition can reach it.

    Args:
        device: where its output goes, the student's.
        encoder_device: where the encoder runs, if elsewhere: hidden states travel, the head is applied at home.
        kept_outputs: what it hands over beside its last hidden states.
        others: teachers whose distributions are mixed with its own.
        shares: of each of these in the mixture of it and all before it.
    """

    def __init__(
        self,
        model: MaskedLM,
        *,
        device: torch.device,
        dtype: torch.dtype,
        encoder_device: torch.device | None = None,
        kept_outputs: KeptOutputs | None = None,
        others: Sequence["Teacher"] = (),
        shares: Sequence[float] = (),
    ) -> None:
        self.kept_outputs = kept_outputs or KeptOutputs()
        self.others, self.shares = tuple(others), tuple(shares)
        self.device, self.encoder_device = device, encoder_device or device
        apart = self.encoder_device != device
        # a copy, since its weight is tied to the word embeddings, which go with the encoder
        self.head: Any = copy.deepcopy(model.head).to(device) if apart and model.head is not None else model.head
        self.model, self.dtype = model.to(self.encoder_device), dtype
        for part in (self.head, self.model):
            if part is not None:
                part.to(dtype=dtype).requires_grad_(False).eval()

    def __call__(self, batch: MicroBatch) -> TeacherOutput:
        """The teacher's view of the same masked ids; tensors in its dtype. Consumes no random numbers."""
        with span("teacher"):
            hidden_NE, *kept = (t.to(self.device, non_blocking=True) for t in self._states(batch))
            output = _output(self.head, EncoderOutputs.of(hidden_NE, tuple(kept), self.kept_outputs))
        return _mixed(output, (other(batch).vocabularies for other in self.others), self.shares)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """(N, E) last hidden states, on the encoder's device."""
        return self._states(batch)[0]

    def answer(self, batch: MicroBatch) -> Tensor:
        """What a RemoteTeacher asks for: (N, all widths), in whose memory one teacher's hidden states follow another's.

        Each of them is contiguous, as the kernels of the head want it.
        """
        found = [teacher.hidden(batch) for teacher in (self, *self.others)]
        return torch.cat([x.flatten() for x in found]).view(len(found[0]), -1) if self.others else found[0]

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward
    def _states(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Last hidden states, and after them what is kept."""
        assert not self.model.training, "the teacher was switched to training mode"
        batch = batch.to(self.encoder_device)
        with torch.accelerator.device_index(self.encoder_device.index):  # where Triton launches
            inputs = batch.input_ids, batch.position_ids, batch.layout
            hidden_NE, kept = self.model.encoder(*inputs, kept_outputs=self.kept_outputs)
            return hidden_NE, *kept


@torch.no_grad()
def _output(head: VocabHead | None, encoder: EncoderOutputs) -> TeacherOutput:
    if head is None:
        return TeacherOutput(encoder)
    return TeacherOutput(encoder, head(encoder.hidden_ND, VocabularyInputs))


def _mixed(
    output: TeacherOutput, others: Iterable[tuple[VocabularyInputs, ...]], shares: tuple[float, ...]
) -> TeacherOutput:
    return output._replace(others=tuple(inputs for (inputs,) in others), shares=shares)


class Split(IntEnum):
    """Micro-batches that a student and its teacher rank both go through, each making them for itself."""

    TRAIN = 0
    VALIDATION = 1


class RemoteTeacher:
    """What a student rank keeps of teachers that have ranks of their own: the heads, and a link to the rest.

    `others` and `shares` are as Teacher's.
    """

    def __init__(
        self,
        model: MaskedLM,
        link: TeacherLink,
        *,
        device: torch.device,
        dtype: torch.dtype,
        others: Sequence[MaskedLM] = (),
        shares: Sequence[float] = (),
    ) -> None:
        self.head, self.shares = model.head, tuple(shares)
        self.heads = [m.head for m in (model, *others)]
        self.widths = [m.architecture.hidden_size for m in (model, *others)]
        for head in self.heads:
            if head is not None:
                head.to(device=device, dtype=dtype).requires_grad_(False).eval()
        self.link, self.device, self.dtype = link, device, dtype

    def ask(self, split: Split, number: int, num_tokens: int) -> Callable[[], TeacherOutput]:
        """Ask for the hidden states of micro-batch `number` of a split; the result waits for them."""
        sizes = [num_tokens * width for width in self.widths]
        hidden = torch.empty(num_tokens, sum(self.widths), device=self.device, dtype=self.dtype)
        wait = self.link.ask((split, number), hidden)

        def answer() -> TeacherOutput:
            with span("teacher"):
                wait()
                states = [x.view(num_tokens, -1) for x in hidden.flatten().split(sizes)]
                first, *others = map(_output, self.heads, map(EncoderOutputs, states))
                return _mixed(first, (other.vocabularies for other in others), self.shares)

        return answer


def serve(teacher: Teacher, link: TeacherLink, batches_from: Callable[[int, Split, int], Iterator[MicroBatch]]) -> None:
    """The work of a teacher rank: answer its students in turn until all have stopped.

    `batches_from(student, split, number)` makes a student's micro-batches from `number` on. Raises RuntimeError where a
    student is gone without having stopped.
    """
    following: dict[tuple[int, int], tuple[int, Iterator[MicroBatch]]] = {}
    asking = list(link.students)
    while asking:
        for student in tuple(asking):
            question = link.next_question(student)
            if question == link.STOP:
                asking.remove(student)
            if question in (link.STOP, link.LATER):
                continue
            split, number = question
            expected, batches = following.get((student, split), (None, iter(())))
            if number != expected:  # at the start, and a validation begins again at 0
                batches = batches_from(student, Split(split), number)
            link.reply(student, teacher.answer(next(batches)))
            following[student, split] = number + 1, batches


LOOKED_AT = 2
"""Micro-batches of validation text, on each rank, that tell what a teacher is."""
KNOWS_NOTHING = 0.95
"""A masked-LM loss of more than this share of ln(vocabulary) is that of a teacher without knowledge.

Measured: random weights 1.009 (6 x 384) and 1.015 (768 wide), a fresh head on a trained encoder 1.05 (MiniLM) and
0.984, a permuted vocabulary 0.972; trained for 240 and 640 updates of 2,048 tokens 0.943 and 0.889, and for 30 updates
of 8,192 (MiniLM with a new head) 0.810.
"""
TOY_VOCABULARY = 1000
"""With fewer words a high loss is only warned of: such teachers are made for tests, mostly of random weights."""


def outputs(
    teacher: Teacher | RemoteTeacher, validation: Iterable[MicroBatch], device: torch.device
) -> Iterator[tuple[MicroBatch, TeacherOutput]]:
    """The first micro-batches of a rank's part of the validation text, on the device, with the teacher's output."""
    for number, batch in enumerate(islice(validation, LOOKED_AT)):
        here = batch.to(device)
        if isinstance(teacher, Teacher):
            yield here, teacher(here)
        else:
            yield here, teacher.ask(Split.VALIDATION, number, len(here.input_ids))()


@torch.no_grad()
def require_knowledge(
    teacher: Teacher | RemoteTeacher, config: Config, validation: Iterable[MicroBatch], ranks: Ranks
) -> None:
    """Log each teacher's own masked-LM loss and accuracy on validation text: of `outputs`, from all student ranks.

    Nothing of one whose head is not run.

    Raises ValueError where one knows nothing and the student is to learn its distribution, unless --teacher.check is
    warn.
    """
    if teacher.head is None:
        return
    paths, vocab_size = config.teacher.paths, teacher.head.vocab_size
    sums = torch.zeros(len(paths), 3, device=ranks.device, dtype=torch.float64)  # nats, right ones, masked tokens
    for batch, output in outputs(teacher, validation, ranks.device):
        for rows in batch.masked_rows.split(256):  # 31 MB of logits for 30,522 words
            labels = batch.labels.index_select(0, rows)
            for of_one, (transformed_NE, weight_VE, bias_V) in zip(sums, output.vocabularies, strict=True):
                logits = functional.linear(transformed_NE.index_select(0, rows), weight_VE, bias_V)
                logits = logits[:, :vocab_size].float()
                of_one[0] += functional.cross_entropy(logits, labels, reduction="sum")  # a row without a label counts 0
                of_one[1] += (logits.argmax(-1) == labels).sum()
                of_one[2] += (labels >= 0).sum()
    for number, (nats, num_right, num_masked) in enumerate(ranks.sum(sums).tolist()):  # a sync, once a run
        loss = nats / num_masked
        log.info(
            f"{named(paths, number)}: masked LM loss {loss:.4g}, accuracy {num_right / num_masked:.1%} on "
            f"{num_masked:,.0f} masked tokens of the validation text; to know nothing is ln({vocab_size:,}) = "
            f"{math.log(vocab_size):.4g}"
        )
        _require_better(loss, vocab_size, config, f"--teacher.{'others' if number else 'path'} {paths[number]}")


def named(paths: Sequence[Path], number: int) -> str:
    """What the log calls a teacher of several: by its path."""
    return "teacher" if len(paths) == 1 else f"teacher {paths[number]}"


def _require_better(loss: float, vocab_size: int, config: Config, teacher: str) -> None:
    """Refuse, or warn of, the masked-LM loss of a teacher that knows nothing."""
    nothing = math.log(vocab_size)
    if loss <= KNOWS_NOTHING * nothing:
        return
    is_toy = vocab_size < TOY_VOCABULARY and abs(loss / nothing - 1) > 1e-5  # not zeros
    problem = (
        f"{teacher} knows nothing of this text: its own masked-LM loss is {loss:.4g}, "
        f"wanted below {KNOWS_NOTHING * nothing:.4g}. Its weights or its head are untrained, zero or damaged, or the "
        "shards were made with another tokenizer or case"
    )
    refused = math.isnan(loss) or (config.loss.kd and not is_toy)
    if refused and config.teacher.check == "refuse":
        raise ValueError(f"{problem}: give a trained teacher, or --teacher.check warn")
    log.warning("%s", problem)


Pair = tuple[MicroBatch, TeacherOutput | None]


class TeacherPrefetcher:
    """Micro-batches on the student's device with the teacher's output, at most one of them ahead.

    Args:
        teacher: None for masked LM alone.
        overlap: infer ahead, where the device is a GPU. The first updates are timed with it and without it, and it is
        kept only
            where it gains.
    """

    TIMED_WITH = range(5, 9)  # updates, from 1; those before warm up
    TIMED_WITHOUT = range(10, 14)  # not 9, whose first teacher output was made ahead

    def __init__(self, teacher: Teacher | RemoteTeacher | None, device: torch.device, *, overlap: bool) -> None:
        self.teacher, self.device = teacher, device
        on_cuda, local = device.type == "cuda", isinstance(teacher, Teacher)
        self.overlapping = on_cuda and (overlap or not local)  # copies alone always gain
        self.timing = self.overlapping and local
        self.times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if on_cuda:
            self.side = self.far = torch.cuda.Stream(device)
            if isinstance(teacher, Teacher) and teacher.encoder_device != device:
                self.far = torch.cuda.Stream(teacher.encoder_device)
                self.far.wait_stream(torch.cuda.current_stream(self.far.device))  # weights' copies
        if isinstance(teacher, RemoteTeacher):
            log.info("teacher: on %d rank(s) of its own", teacher.link.num_teachers)
        elif teacher is not None and not self.overlapping:
            log.info("teacher: precedes the student on every micro-batch")

    def ahead(self, batches: Iterator[MicroBatch], split: Split = Split.TRAIN, first: int = 0) -> Iterator[Pair]:
        """(micro-batch, teacher output) for each of `batches`, which are those of `split` from number `first` on.

        The next one is begun before this one is handed out.
        """
        begun: Callable[[], Pair] | None = None
        for number, batch in enumerate(spanned(batches, "waiting for data"), first):
            ready, begun = begun, self._begin(batch, split, number)
            if ready:
                yield ready()
        if begun:
            yield begun()

    def _begin(self, batch: MicroBatch, split: Split, number: int) -> Callable[[], Pair]:
        """Enqueue a micro-batch's copy and the teacher's work; the result makes the student's stream wait for them."""
        if isinstance(self.teacher, RemoteTeacher):
            answer = self.teacher.ask(split, number, batch.input_ids.numel())
            ready = self._begin_here(batch, None)
            return lambda: (ready()[0], answer())
        return self._begin_here(batch, self.teacher)

    def _begin_here(self, batch: MicroBatch, teacher: Teacher | None) -> Callable[[], Pair]:
        def infer() -> Pair:
            here = batch.to(self.device)
            return here, teacher(here) if teacher else None

        if not self.overlapping:
            return infer
        student = torch.cuda.current_stream(self.device)
        self.side.wait_stream(student)  # not further ahead than one, however far ahead the host is
        with torch.cuda.stream(self.far), torch.cuda.stream(self.side):
            pair = infer()
            done = self.side.record_event()

        def ready() -> Pair:
            student.wait_event(done)
            here, output = pair
            # Without this their memory may be given away while the student still reads it. The teacher's weights stay.
            for tensor in (*here.tensors(), *(output.tensors() if output else ())):
                tensor.record_stream(student)
            return pair

        return ready

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the work of an update, which is timed on the device while it has to be; no sync."""
        if not self.timing:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.times.append((begin, end))
        next_update, last = len(self.times) + 1, self.TIMED_WITHOUT[-1]
        self.overlapping = not self.TIMED_WITH[-1] < next_update <= last
        if next_update > last and self.times[last - 1][1].query():
            self._keep_if_it_gains()

    def _keep_if_it_gains(self) -> None:
        with_it, without = (
            statistics.median(begin.elapsed_time(end) for begin, end in self.times[r[0] - 1 : r[-1]])
            for r in (self.TIMED_WITH, self.TIMED_WITHOUT)
        )
        self.timing, self.overlapping = False, with_it < without
        log.info(
            f"teacher overlap: {abs(without / with_it - 1):.1%} {'faster' if self.overlapping else 'slower'} than "
            f"teacher-then-student (updates {self.TIMED_WITH[0]}-{self.TIMED_WITH[-1]} against "
            f"{self.TIMED_WITHOUT[0]}-{self.TIMED_WITHOUT[-1]}){'' if self.overlapping else ': switched off'}"
        )
