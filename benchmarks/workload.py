"""What benchmarks of the whole step have in common: sizes, a teacher and a student of each, micro-batches for them."""

import argparse
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when imported; processes inherit it

import torch

from benchmarks._harness import DEVICE
from fastdistil.data.batches import NO_LABEL, Collator, MicroBatch, micro_batches
from fastdistil.data.plan import Plan, num_masked
from fastdistil.data.shards import Shards
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model import families, weights
from fastdistil.model.architecture import Architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run import recipes
from fastdistil.training.models import spread_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB = 30522
SIZES = {  # teacher layers, student layers, width
    "toy": (2, 1, 48),
    "minilm": (6, 3, 384),
    "bert-base": (12, 6, 768),
    "modernbert-toy": (4, 2, 48),
    "modernbert-base": (22, 11, 768),
}


def architecture(model_type: str, num_layers: int, width: int) -> Architecture:
    if model_type == "modernbert":  # all but its sizes is what transformers assumes
        family = families.find(model_type)
        return Architecture(
            model_type=model_type,
            vocab_size=50368,
            hidden_size=width,
            num_layers=num_layers,
            num_heads=12,
            ffn_size=3 * width // 2,
            **family.defaults,
            **family.fixed,
        )
    return Architecture(
        vocab_size=VOCAB,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=12,
        ffn_size=4 * width,
        max_positions=512,
        model_type=model_type,
        token_types=2 if model_type == "bert" else 0,
    )


def architectures(size: str) -> tuple[Architecture, Architecture]:
    """Of teacher and student."""
    teacher_layers, student_layers, width = SIZES[size]
    names = ("modernbert", "modernbert") if size.startswith("modernbert") else ("bert", "distilbert")
    return architecture(names[0], teacher_layers, width), architecture(names[1], student_layers, width)


def models(size: str) -> tuple[MaskedLM, MaskedLM]:
    """(teacher, student), the same in every process."""
    large, small = architectures(size)
    teacher, layers = MaskedLM(large), spread_layers(small.num_layers, large)
    return teacher, weights.student_from_teacher(teacher, layers, small, copy_transform=True)


def synthetic_batch(num_tokens: int, length: int, seed: int, of_update: int = 1) -> MicroBatch:
    """Sequences of one length and random ids, 15 % of them predicted; one of `of_update` micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, VOCAB, (num_tokens,), generator=generator)
    lengths = [length] * (num_tokens // length)
    chosen = torch.randperm(num_tokens, generator=generator)[: num_masked(num_tokens, 0.15)]
    labels = torch.full((num_tokens,), NO_LABEL)
    labels[chosen] = ids[chosen]
    return MicroBatch(
        input_ids=ids.index_fill(0, chosen, 103),
        position_ids=torch.arange(length).repeat(len(lengths)),
        labels=labels,
        masked_rows=chosen.sort().values,
        num_rows=torch.tensor(num_tokens, dtype=torch.int32),
        denominators=of_update * torch.tensor([num_tokens, len(chosen), len(lengths)], dtype=torch.float64),
        dropout_seed=torch.tensor(seed),
        generator_seed=seed,
        lengths=tuple(lengths),
        layout=sequence_layout(lengths),
        num_tokens=num_tokens,
        num_masked=len(chosen),
        sequences=tuple(range(len(lengths))),
    )


def packed(folder: Path, num_tokens: int, count: int) -> tuple[Plan, Collator]:
    """Plan and collator of a run on these shards whose updates have `count` micro-batches."""
    shards, masking = Shards(folder), recipes.named("distilbert").masking
    plan = Plan(shards.lengths, seed=56, token_budget=num_tokens, micro_batches_per_update=count, mask_fraction=0.15)
    return plan, Collator(shards, shards.counts, token_budget=num_tokens, masking=masking)


def make_batches(args: argparse.Namespace) -> list[MicroBatch]:
    """Of one update: on shards the first that a run would see."""
    if args.shards:
        plan, collator = packed(args.shards, args.tokens, args.batches)
        return [collator(micro_batch) for micro_batch in plan.update(0).micro_batches]
    return [synthetic_batch(args.tokens, args.length, seed, args.batches) for seed in range(args.batches)]


def made_again(args: argparse.Namespace, num_workers: int) -> Iterator[MicroBatch]:
    """The micro-batches of `make_batches` over and over, made by the trainer's loader."""
    update: Any
    collator: Any
    if args.shards:
        plan, collator = packed(args.shards, args.tokens, args.batches)
        update = plan.update(0)
    else:
        update = SimpleNamespace(of_rank=lambda rank, world_size: range(args.batches))
        collator = partial(synthetic_batch, args.tokens, args.length, of_update=args.batches)
    updates = itertools.repeat(update)
    return micro_batches(updates, collator, rank=0, world_size=1, num_workers=num_workers, pin_memory=DEVICE == "cuda")
