"""Whole configurations with a name. Each is a function, so that a new one starts from another by `replace`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastdistil.config import BatchConfig, Config, LogConfig, LossConfig, OptimConfig, StudentConfig


def distilbert() -> Config:
    """DistilBERT to the letter: half the teacher's layers, 5 x KL at T=2 + 2 x masked LM + 1 x cosine."""
    return Config(recipe="distilbert", out=Path("runs/distilbert"))


def mlm() -> Config:
    """Masked LM alone, no teacher: trains a teacher, gives an encoder a head, or is the paper's baseline."""
    return replace(
        distilbert(),
        recipe="mlm",
        out=Path("runs/mlm"),
        student=StudentConfig(init="random"),
        loss=LossConfig(kd=0.0, mlm=1.0, cosine=0.0),
    )


def quickstart() -> Config:
    """The distilbert objective at a size that two CPU cores finish in minutes."""
    return replace(
        distilbert(),
        recipe="quickstart",
        out=Path("runs/quickstart"),
        batch=BatchConfig(size=8192, unit="tokens", token_budget=4096),
        optim=OptimConfig(lr=1e-3, duration=200, unit="updates"),
        log=LogConfig(every=10, validate_every=100, checkpoint_every=100),
    )


RECIPES: dict[str, Callable[[], Config]] = {f.__name__: f for f in (distilbert, mlm, quickstart)}
