"""Small shards and models that tests make in a second: a vocabulary of 101 words, sequences of 12 to 48 tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastdistil.data import shards, tokenizer
from fastdistil.data.batches import Collator
from fastdistil.data.plan import Plan
from fastdistil.export import write_hugging_face_folder
from fastdistil.model.architecture import Architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run import files
from fastdistil.run.config import MaskingConfig

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(96))]
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
MAX_LENGTH = 48
BUDGET = 256
"""Tokens of a micro-batch, where a test wants no others."""


def make_shards(folder: Path, *, num_sequences: int = 400, seed: int = 0) -> Path:
    """A prepared folder whose sequences follow a pattern that can be learnt: each word is the last one plus a step."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_sequences):
        length, start, step = rng.integers(12, MAX_LENGTH + 1), rng.integers(96), rng.integers(1, 4)
        words = 5 + (start + step * np.arange(length - 2)) % 96
        sequences.append(np.concatenate([[2], words, [3]]))
    parts = []
    for index, half in enumerate((sequences[: num_sequences // 2], sequences[num_sequences // 2 :])):
        with shards.ShardWriter(folder, shards.shard_name(index), "uint16") as writer:
            writer.add(np.concatenate(half), np.array([len(s) for s in half]))
            parts.append(writer.finish())
    counts = np.bincount(np.concatenate(sequences), minlength=len(VOCABULARY)).astype(np.int64)
    np.save(folder / shards.COUNTS_FILE, counts)
    meta = shards.Meta(
        format_version=shards.FORMAT_VERSION,
        dtype="uint16",
        vocab_size=len(VOCABULARY),
        special_ids=SPECIAL_IDS,
        tokenizer_sha256=tokenizer.vocabulary_sha256(folder / "tokenizer"),
        max_length=MAX_LENGTH,
        num_documents=num_sequences,
        num_sequences=num_sequences,
        num_tokens=int(counts.sum()),
        dropped_short=0,
        dropped_unknown=0,
        text_bytes=0,
        counts_sha256=files.sha256(folder / shards.COUNTS_FILE),
        preparation={"sources": ["toy"]},
        shards=tuple(parts),
    )
    shards.write_meta(folder, meta)
    return folder


PAPERS = MaskingConfig()
"""The masking of the paper."""


def make_plan(
    lengths: NDArray[np.int32],
    *,
    seed: int = 56,
    token_budget: int = BUDGET,
    micro_batches: int = 4,
    masking: MaskingConfig = PAPERS,
) -> Plan:
    """Of a run on sequences of these lengths, with so many micro-batches an update."""
    return Plan(
        lengths,
        seed=seed,
        token_budget=token_budget,
        micro_batches_per_update=micro_batches,
        mask_fraction=masking.fraction,
    )


def make_collator(of: shards.Shards, *, token_budget: int = BUDGET, masking: MaskingConfig = PAPERS) -> Collator:
    """Of the micro-batches of such a plan."""
    return Collator(of, of.counts, token_budget=token_budget, masking=masking)


MODERNBERT = dict(
    model_type="modernbert",
    token_types=0,
    dropout=0.0,
    attention_dropout=0.0,
    layer_norm_eps=1e-5,
    global_every=3,
    local_attention=16,
    global_theta=160000.0,
    local_theta=10000.0,
)
"""What `architecture` needs for a ModernBERT: the first and the last of its 4 layers see everything, the others less
than most sequences."""


MODERNBERT = dict(
    model_type="modernbert",
    token_types=0,
    dropout=0.0,
    attention_dropout=0.0,
    layer_norm_eps=1e-5,
    global_every=3,
    local_attention=16,
    global_theta=160000.0,
    local_theta=10000.0,
)
"""What `architecture` needs for a ModernBERT: the first and the last of its 4 layers see everything, the others less
than most sequences."""


def architecture(**changes: int | float | str) -> Architecture:
    """A BERT of 4 layers and 32 wide on the toy vocabulary."""
    sizes = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        ffn_size=64,
        max_positions=64,
        token_types=2,
    )
    return Architecture(**{**sizes, **changes})  # type: ignore[arg-type]


def steep(architecture: Architecture, *, seed: int) -> MaskedLM:
    """A model of random weights that are large enough for distributions and relations that are not flat."""
    model = MaskedLM(architecture, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    return model


def make_teacher(folder: Path, shards_folder: Path, *, seed: int = 1, **changes: int | float | str) -> Path:
    """A Hugging Face folder of a BertForMaskedLM, or what `changes` make of it."""
    model = steep(architecture(**changes), seed=seed)
    folder.mkdir(parents=True)
    write_hugging_face_folder(model.state_dict(), model.architecture, shards_folder / "tokenizer", folder)
    return folder


def student_of(
    teacher: Architecture, *, num_layers: int, dropout: float = 0.1, attention_dropout: float = 0.1
) -> Architecture:
    """A teacher's student: the same widths, fewer layers; DistilBERT's, without token types, where it is a BERT."""
    student = replace(teacher, num_layers=num_layers, dropout=dropout, attention_dropout=attention_dropout)
    if teacher.model_type != "bert":
        return student
    # DistilBERT's eps is fixed: its config.json has no field for another.
    return replace(student, model_type="distilbert", token_types=0, layer_norm_eps=1e-12)
