"""Run folders made of numbers, without training: what `report` reads."""

import json
import math
from pathlib import Path
from typing import Any

STUDENT = {
    "vocab_size": 101, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64,
    "max_positions": 64, "token_types": 0,
}  # fmt: skip
TEACHER = STUDENT | {"num_layers": 4, "token_types": 2}


def make_run(
    folder: Path,
    *,
    updates: int = 20,
    validated: bool = True,
    every: int = 10,
    lr: float = 1e-3,
    state: dict[str, Any] | None = None,
    lines: dict[str, Any] | None = None,
    **record: object,
) -> Path:
    """A run of `updates` updates of 1,000 tokens, validated `every` so many.

    `state` is its status.json, `lines` go into each line of training, `record` into config.json.
    """
    folder.mkdir(parents=True)
    config = {"recipe": "distilbert", "optim": {"lr": lr, "eps": 1e-6}, "out": str(folder)}
    contents = {"config": config, "student": STUDENT, "teacher": None, "versions": {"torch": "2.13"}}
    (folder / "config.json").write_text(json.dumps(contents | record))
    if state is not None:
        (folder / "status.json").write_text(json.dumps(state))
    written = []
    for update in range(1, updates + 1):
        written.append({
            "split": "train", "update": update, "tokens": 1000, "masked": 150, "loss": 10.0 - update / 10,
            "mlm": 5.0 - update / 20, "gradient_norm": 1.5, "tokens_per_s": 500.0 * update, "mfu": 0.25,
            **(lines or {}),
        })  # fmt: skip
        if validated and update % every == 0:
            written.append({"split": "validation", "update": update, "loss": 9.0, "mlm": 4.4321})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return folder


def rewrite(run: Path, change: Any) -> None:
    """Pass every line of metrics.jsonl through `change`."""
    lines = [change(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_noisy(
    folder: Path, *, updates: int, state: dict[str, Any] | None, seed: int = 0, nan: range = range(0)
) -> Path:
    """A run with a teacher, whose losses fall like real ones; the updates of `nan` were not finite."""
    config = {"recipe": "distilbert", "optim": {"lr": 5e-4}, "teacher": {"path": str(folder.parent / "teacher")}}
    run = make_run(
        folder, updates=updates, config=config, teacher=TEACHER, state=state, every=100, machine="8 x NVIDIA H100 80GB"
    )

    def change(line: dict[str, Any]) -> dict[str, Any]:
        update = line["update"]
        wave = math.sin(12.9898 * update + 78.233 * seed) * 43758.5453 % 1 - 0.5
        loss = 4 + (9 + seed) / (1 + update / 30) ** 0.7 + wave
        line |= {"loss": loss, "mlm": loss / 2, "kd": loss / 5, "agreement": 1 - loss / 15, "lr": 5e-4 / (1 + update)}
        if line["split"] == "train":
            line |= {"gradient_norm": 1 + abs(wave), "tokens": 131_072, "tokens_per_s": 2.1e6 * (1 + wave / 10)}
        if update in nan and line["split"] == "train":
            line |= {"loss": None, "mlm": None, "kd": None, "gradient_norm": None, "skipped": True}
        return line

    rewrite(run, change)
    return run
