"""SQuAD 1.1 and 2.0: answers as spans of a passage. Reads the files as distributed, makes windows, finds the best span.

A passage longer than the model reads is cut into overlapping windows; the answer is the best span of all windows of its
question. Where the data has questions without an answer (2.0), the [CLS] token stands for "none", as in BERT's own
fine-tuning. EM and F1 are torchmetrics', with the official normalisation.

Shapes: W windows, L tokens of the longest of a batch, B windows of a batch.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistil.evaluation import tasks
from fastdistil.evaluation.finetune import Encoded, outputs
from fastdistil.run.files import read_json

log = logging.getLogger("fastdistil.evaluate")

LONGEST_ANSWER = 30
"""Tokens; as in BERT's and the paper's evaluation."""
NEAR = (0, -1, 1, -2, 2)
"""Characters from the given offset to the place where an answer is looked for: some files are one or two beside."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a passage."""

    text: str
    passage: str
    answers: tuple[str, ...]
    """What people answered; none where the passage does not say."""
    starts: tuple[int, ...]
    """Where they begin, in characters."""


def load(name: str, task: tasks.Task, source: str) -> tasks.TaskData:
    """The questions of a task: from the official JSON, or Parquet and JSON lines with question, context and answers.

    In a folder that holds both versions, a task takes the files with its own in their names. A training answer that is
    not where its offset says is left out, with its question if that has no other, and counted in the log; scoring takes
    answers as they are written. Raises ValueError where files, columns or answers are missing, or most answers are not
    where they should be.
    """
    if source.startswith("hf:"):
        tables = tasks.hub_tables(source, to_train=True)
        found = {split: [_of_row(row, source) for row in rows] for split, rows in tables.items()}
    else:
        files = tasks.split_files(name, source)
        found = {split: [q for p in paths for q in _read(p)] for split, paths in files.items()}
    held_out = "validation" if "validation" in found else "test"
    for split in ("train", held_out):
        if not any(question.answers for question in found[split]):
            raise ValueError(f"{source}: no question of {split} has an answer")
    train = _placed(found["train"], f"{source}: train of {name}", then="they are skipped")
    _placed(found[held_out], f"{source}: {held_out} of {name}", then="scoring takes their words as they are")
    return tasks.TaskData(task, train, found[held_out])


def _read(path: Path) -> list[Question]:
    if path.suffix != ".json":
        return [_of_row(row, path) for row in tasks.rows_of([path])]
    try:
        return [
            _question(
                qa["question"],
                paragraph["context"],
                [] if qa.get("is_impossible") else [(a["text"], a["answer_start"]) for a in qa["answers"]],
            )
            for article in read_json(path)["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not SQuAD's JSON (data, paragraphs, qas): {error!r}") from error


def _of_row(row: dict[str, Any], where: Path | str) -> Question:
    try:
        given = row["answers"]
        return _question(row["question"], row["context"], list(zip(given["text"], given["answer_start"], strict=True)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: wanted question, context and answers (text, answer_start), got {', '.join(row)} ({error!r})"
        ) from error


def _question(text: str, passage: str, answers: list[tuple[str, int]]) -> Question:
    """An answer without a letter is none: so some files mark what the passage does not say."""
    if not isinstance(text, str) or not isinstance(passage, str):
        raise TypeError("question and context must be text")
    given = [(answer, -1 if start is None else int(start)) for answer, start in answers if answer.strip()]
    return Question(text, passage, tuple(a for a, _ in given), tuple(s for _, s in given))


def _placed(questions: list[Question], where: str, then: str) -> list[Question]:
    """The questions with the answers that are in their passages, each at its place; those without an answer as well.

    The log counts the others and says what becomes of them. Raises ValueError, with the likely cause, where they are
    most of the answers.
    """
    kept, wrong, num_answers, num_moved = [], [], 0, 0
    for question in questions:
        num_answers += len(question.answers)
        places = []
        for answer, start in zip(question.answers, question.starts, strict=True):
            near = (start + by for by in NEAR if start + by >= 0 and question.passage.startswith(answer, start + by))
            if (place := next(near, None)) is None:
                wrong.append((answer, start, question.passage))
            else:
                places.append((answer, place))
                num_moved += place != start
        if places or not question.answers:
            kept.append(replace(question, answers=tuple(a for a, _ in places), starts=tuple(s for _, s in places)))
    if num_moved:
        log.info("%s: %d answers are taken from one or two characters beside their offset", where, num_moved)
    if not wrong:
        return kept
    answer, start, passage = wrong[0]
    first = f"the first: {answer[:40]!r} is not at character {start} of its passage, {passage[:40]!r}..."
    if 2 * len(wrong) > num_answers:
        inside = sum(answer in passage for answer, _, passage in wrong)
        cause = (
            "most stand elsewhere in it: the offsets are of another version of the passages, or count bytes or words"
            if 2 * inside > len(wrong)
            else "most do not stand in it at all: the answers are of other passages, or in another language"
        )
        raise ValueError(f"{where}: {len(wrong)} of {num_answers} answers are beside their offset; {first}; {cause}")
    log.warning("%s: %d of %d answers are beside their offset, %s; %s", where, len(wrong), num_answers, then, first)
    return kept


class Windows(Encoded):
    """Windows of passages, each after its question, by one tokenizer; a question may have several.

    Raises ValueError for a tokenizer without character offsets.
    """

    def __init__(self, tokenizer: Any, questions: list[Question], max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError("SQuAD wants a tokenizer with character offsets: give a tokenizer.json")
        self.questions = questions
        # A question is cut to a sixth of the window, so that every window holds some passage.
        texts, longest = [q.text for q in questions], max(1, max_length // 6)
        heads = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
        )["offset_mapping"]
        table = tokenizer(
            [text[: ends[-1][1] if ends else 0] for text, ends in zip(texts, heads, strict=True)],
            [q.passage for q in questions],
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        self.question_of: list[int] = table["overflow_to_sample_mapping"]
        # (first, end) characters in the passage by token, -1 for a token that is not of the passage
        self.spans: list[np.ndarray] = []
        for window, offsets in enumerate(table["offset_mapping"]):
            of_passage = np.array([part == 1 for part in table.sequence_ids(window)])
            self.spans.append(np.where(of_passage[:, None], np.array(offsets), -1))
        targets = map(self._target, self.spans, self.question_of)
        super().__init__(tokenizer, table, torch.tensor(list(targets)))

    def _target(self, span_L2: np.ndarray, question: int) -> tuple[int, int]:
        """(first, last) token of the answer, (0, 0) ([CLS]) where the window does not hold it whole."""
        asked = self.questions[question]
        if not asked.answers:
            return 0, 0
        start, end = asked.starts[0], asked.starts[0] + len(asked.answers[0])
        starts, ends = span_L2.T
        inside = (starts >= 0) & (ends > start) & (starts < end)
        tokens = np.flatnonzero(inside)
        if not len(tokens) or starts[tokens[0]] > start or ends[tokens[-1]] < end:
            return 0, 0
        return int(tokens[0]), int(tokens[-1])

    def __len__(self) -> int:
        return len(self.questions)


def answer(model: Any, windows: Windows, batch_size: int, device: torch.device) -> list[str]:
    """The answer to each question; "" for none, which is given only if some question of the data has none."""
    none_allowed = any(not q.answers for q in windows.questions)
    best = [(-float("inf"), "")] * len(windows.questions)
    none = np.full(len(windows.questions), np.inf)
    for rows, logits_2BL in outputs(model, windows, batch_size, device):
        starts_BL, ends_BL = logits_2BL.chunk(2)
        scores_B, firsts_B, lasts_B = best_spans(starts_BL, ends_BL, _in_passage(windows, rows))
        nones_B = (starts_BL[:, 0] + ends_BL[:, 0]).tolist()
        for i, row in enumerate(rows):
            question, span_L2 = windows.question_of[row], windows.spans[row]
            none[question] = min(none[question], nones_B[i])
            if scores_B[i] > best[question][0]:
                first, last = int(firsts_B[i]), int(lasts_B[i])
                passage = windows.questions[question].passage
                best[question] = scores_B[i], passage[span_L2[first, 0] : span_L2[last, 1]]
    return ["" if none_allowed and none[question] > found else text for question, (found, text) in enumerate(best)]


def best_spans(starts_BL: Tensor, ends_BL: Tensor, allowed_BL: Tensor) -> tuple[list[float], list[int], list[int]]:
    """(sums, first tokens, last tokens) of the spans whose sum of both logits is the highest.

    They lie in allowed tokens and have LONGEST_ANSWER tokens at most.
    """
    batch, length = starts_BL.shape
    outside_BL = ~allowed_BL.to(starts_BL.device)
    starts_BL, ends_BL = (logits.masked_fill(outside_BL, -torch.inf) for logits in (starts_BL, ends_BL))
    sums_BLL = starts_BL[:, :, None] + ends_BL[:, None]
    distance_LL = torch.arange(length, device=starts_BL.device)
    distance_LL = distance_LL[None] - distance_LL[:, None]
    sums_BLL.masked_fill_((distance_LL < 0) | (distance_LL >= LONGEST_ANSWER), -torch.inf)
    sums_B, where_B = sums_BLL.view(batch, -1).max(1)
    return sums_B.tolist(), (where_B // length).tolist(), (where_B % length).tolist()


def _in_passage(windows: Windows, rows: Iterable[int]) -> Tensor:
    of_windows = [torch.from_numpy(windows.spans[row][:, 0] >= 0) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(of_windows, batch_first=True, padding_value=False)


def score(answers: list[str], questions: list[Question]) -> dict[str, float]:
    """exact_match and f1 as fractions, each the best over what people answered, and "score", their mean.

    Where the passage does not say, the right answer is "".
    """
    from torchmetrics.functional.text import squad

    given = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(answers)]
    wanted = [
        {"answers": {"answer_start": [], "text": list(q.answers) or [""]}, "id": str(i)}
        for i, q in enumerate(questions)
    ]
    found = squad(given, wanted)
    exact, f1 = float(found["exact_match"]) / 100, float(found["f1"]) / 100
    return {"exact_match": exact, "f1": f1, "score": (exact + f1) / 2}
