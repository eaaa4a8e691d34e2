"""Whole configurations with a name. Each is a function, so that a new one starts from another by `replace`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastdistil.run.config import BatchConfig, Config, LogConfig, LossConfig, OptimConfig, StudentConfig


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


def hidden_cosine() -> Config:
    """distilbert, and the cosine of the hidden states at every layer, not only the last."""
    config = distilbert()
    return replace(
        config, recipe="hidden_cosine", out=Path("runs/hidden_cosine"), loss=replace(config.loss, hidden=1.0)
    )


def minilm() -> Config:
    """MiniLMv2's value relation of the last layers, for students of any width.

    Masked LM trains the head that the export has.
    """
    return replace(
        distilbert(), recipe="minilm", out=Path("runs/minilm"), loss=LossConfig(kd=0.0, mlm=1.0, cosine=0.0, values=1.0)
    )


def distilroberta() -> Config:
    """distilbert for a RoBERTa, whose student is a RoBERTa: masked tokens are drawn uniformly, as in its training."""
    config = distilbert()
    return replace(
        config, recipe="distilroberta", out=Path("runs/distilroberta"), masking=replace(config.masking, smoothing=0.0)
    )


def multilingual() -> Config:
    """distilbert for a multilingual BERT, whose vocabulary of 119,547 takes most memory: shorter micro-batches."""
    config = distilbert()
    return replace(
        config, recipe="multilingual", out=Path("runs/multilingual"), batch=replace(config.batch, token_budget=8192)
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f for f in (distilbert, mlm, quickstart, distilroberta, multilingual, hidden_cosine, minilm)
}
