"""The same distillation by sentence-transformers, as its documentation does it: what recipe `embed` is measured beside.

    python -m benchmarks.sentence_transformers_peer --teacher all-MiniLM-L6-v2 --shards data/wiki --layers 0 3 5 \
        --tokens 500000 --out runs/peer

Layer reduction and a loss on the embeddings, after their examples/training/distillation/model_distillation.py: layers
of the teacher are kept, the teacher's embeddings of all texts are computed once, and the student is trained towards
them: learning rate 1e-4, 64 texts a batch, warm-up over a tenth. Needs accelerate (sentence-transformers[train]), which
no extra of ours brings. It reads sequences of the trainer's shards in such a random order, as text; products are made
in bf16 by autocast, the weights are fp32. One thing is kinder to it than its documentation: a batch holds texts of
about one length, since of a batch of sentences and chunks of 256 most would be padding (--shuffled). What is printed
are the seconds of everything between the loaded model and the trained one, the teacher's embeddings included.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from fastdistil.data.plan import Plan
from fastdistil.data.shards import Shards


def load(folder: str, pooling: Any) -> Any:
    """The model of a folder; `pooling` where the folder does not say it."""
    if pooling is None:
        return SentenceTransformer(folder, device="cpu")
    encoder: Any = Transformer(folder)
    modules = [encoder, Pooling(encoder.get_word_embedding_dimension(), pooling), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


def texts_of(folder: str, tokenizer: Any, tokens: int, seed: int) -> list[str]:
    """The first sequences of the trainer's plan, `tokens` together, decoded."""
    shards = Shards(folder)
    plan = Plan(shards.lengths, seed=seed, token_budget=4096, micro_batches_per_update=1, mask_fraction=0.0)
    found: list[int] = []
    update = 0
    while shards.lengths[found].sum() < tokens:
        found.extend(plan.update(update).micro_batches[0].sequences.tolist())
        update += 1
    return tokenizer.batch_decode([shards.sequence(i).tolist() for i in found], skip_special_tokens=True)


def batches_of_one_length(texts: list[str], size: int, seed: int) -> list[list[int]]:
    """Indices of batches in random order; the texts of each are neighbours by length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of a sentence-transformers model")
    parser.add_argument("--pooling", choices=("mean", "cls"), help="where the folder does not say it")
    parser.add_argument("--shards", required=True, help="what fastdistil.prepare made with the teacher's tokenizer")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="layers of the teacher that are kept")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--loss", choices=("mse", "l2", "cosine"), default="mse", help="distance of EmbedDistillLoss")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--shuffled", action="store_true", help="batches of texts of any length")
    parser.add_argument("--seed", type=int, default=56)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    teacher, student = load(args.teacher, args.pooling), load(args.teacher, args.pooling)
    encoder = student[0].model.encoder
    encoder.layer = torch.nn.ModuleList(encoder.layer[i] for i in args.layers)
    student[0].model.config.num_hidden_layers = len(args.layers)
    texts = texts_of(args.shards, teacher.tokenizer, args.tokens, args.seed)

    begin, cpu_begin = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = teacher.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=False)
    labels = np.stack([e.float().numpy() for e in embeddings])
    batches = batches_of_one_length(texts, 64, args.seed)
    sampler: Any = "batch_sampler" if args.shuffled else lambda *_, **__: batches
    trainer: Any = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            args.out,
            per_device_train_batch_size=64,
            num_train_epochs=1,
            learning_rate=args.lr,
            warmup_ratio=0.1,
            bf16=True,
            use_cpu=True,
            seed=args.seed,
            save_strategy="no",
            disable_tqdm=True,
            batch_sampler=sampler,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"sentence": texts, "label": labels.tolist()}),
        loss=EmbedDistillLoss(student, distance_metric=args.loss),
    )
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    student.save_pretrained(args.out)
    took = f"{seconds:.0f} s, {cpu_seconds:.0f} of CPU"
    print(f"{len(texts):,} texts, {trainer.state.global_step} updates, {took}, {args.out}")


if __name__ == "__main__":
    main()
