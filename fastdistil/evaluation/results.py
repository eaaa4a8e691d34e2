"""What `evaluate` and `efficiency` kept in a run folder: scores and speed of a student beside its teacher."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdistil.run.files import read_json

T = TypeVar("T")
FIGURES = ("latency_ms", "throughput_per_s")
"""Of a device, by efficiency."""


class Score(NamedTuple):
    """Of a task, x 100."""

    task: str
    student: float
    teacher: float | None
    """None where it was not measured."""
    how: str
    model: str = ""
    """The student's name, where several were scored: nobody says which is the run's."""
    interval: tuple[float, float] | None = None
    """95 % of the student's share of its teacher, in %."""

    @property
    def share(self) -> float | None:
        """What of its teacher's score the student has, in %."""
        return 100 * self.student / self.teacher if self.teacher is not None and self.teacher > 0 else None


class Kept(NamedTuple):
    """What of its teacher a student has kept."""

    share: float
    """In %, of the mean score of the tasks that were measured in one way."""
    of: str
    """These tasks."""
    interval: tuple[float, float] | None


def understood(path: Path, reader: Callable[[dict[str, Any]], T]) -> T:
    """`reader` of the JSON in a file. Raises ValueError, which names it, where that is something else."""
    try:
        return reader(read_json(path))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is not what this version writes ({error!r}): move it away") from error


def read_scores(run: Path, teacher: str | None) -> list[Score]:
    """What RUN/evaluation*.json and the evaluation.json in the teacher's folder say.

    Of fine-tuned models the teacher's results are in a file of their own, known by the model that it names.
    """
    paths = sorted(run.glob("evaluation*.json"))
    if teacher and (Path(teacher) / "evaluation.json").is_file():
        paths.append(Path(teacher) / "evaluation.json")
    scores: list[Score] = []
    tuned: dict[bool, dict[str, float]] = {False: {}, True: {}}  # {whether of the teacher: {task: median}}
    for path in paths:
        found = understood(path, _evaluation)
        if isinstance(found, list):
            scores += found
        else:
            model, medians = found
            tuned[teacher is not None and Path(model).resolve() == Path(teacher).resolve()] |= medians
    return scores + [Score(task, value, tuned[True].get(task), "fine-tuned") for task, value in tuned[False].items()]


def _evaluation(found: dict[str, Any]) -> list[Score] | tuple[str, dict[str, float]]:
    """Scores by embeddings, or a fine-tuned model with the median of each task."""
    if "tasks" in found:
        return str(found["model"]), {task: 100 * about["median"] for task, about in found["tasks"].items()}
    rows, reference = found["scores"], found["reference"]
    first = {(row["model"], row["task"]): next(iter(row["metrics"].items())) for row in rows}
    models = {row["model"] for row in rows} - {reference}
    scores = []
    for row in (row for row in rows if row["model"] in models):
        metric, value = first[row["model"], row["task"]]
        _, theirs = first.get((reference, row["task"]), (metric, None))
        low, high = row.get("of_reference_interval") or (math.nan, math.nan)
        name = Path(row["model"]).name if len(models) > 1 else ""
        ends = (low, high) if low <= high else None
        scores.append(Score(f"{row['task']}, {metric}", 1.0 * value, theirs, "by embeddings alone", name, ends))
    return scores


def kept(scores: list[Score]) -> list[Kept]:
    """By embeddings and after fine-tuning, each where both models have scores, and the teacher's are above 0."""
    found = []
    for how in dict.fromkeys(score.how for score in scores):
        both = [s for s in of_both(scores) if s.how == how]
        if (theirs := sum(s.teacher or 0.0 for s in both)) > 0:
            share = 100 * sum(s.student for s in both) / theirs
            tasks = both[0].task if len(both) == 1 else f"mean of {', '.join(s.task for s in both)}"
            found.append(Kept(share, f"{tasks}; {how}", both[0].interval if len(both) == 1 else None))
    return found


def of_both(scores: list[Score]) -> list[Score]:
    """Those of the run's student that its teacher has, too."""
    return [score for score in scores if score.teacher is not None and not score.model]


def read_efficiency(found: dict[str, Any]) -> dict[str, Any]:
    """What `efficiency TEACHER STUDENT --out` wrote, whose figures are then known to be numbers."""
    for model in (found["models"][0], found["models"][1]):
        math.fsum((found["batch_size"], found["length"], model["bytes"]))
        math.fsum(model[device][figure] for device in ("cpu", "cuda") if device in model for figure in FIGURES)
    return found


def speed(efficiency: dict[str, Any] | None) -> float | None:
    """How many times as fast as its teacher the student is with one text, on a GPU where it was measured there."""
    if efficiency is None:
        return None
    teacher, student, *_ = efficiency["models"]
    device = "cuda" if "cuda" in student and "cuda" in teacher else "cpu"
    return teacher[device]["latency_ms"] / student[device]["latency_ms"]
