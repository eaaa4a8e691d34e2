"""Making micro-batches ahead of the device, against Hugging Face's DataLoader and collator, in turn, on the same text.

    python -m benchmarks.bench_data [--shards wiki] [--token-budget 16384]

Without --shards the text is the documentation of installed packages. The peer pads each batch to its longest sequence
and draws its masks without weights; only real tokens count on both sides. Loaders are timed from their first batch to
their last, at the speed at which they deliver to a training process that does nothing else. What a training process
itself spends on a micro-batch is timed while two workers are ahead of it, as they are beside a step of 20 ms.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader

from benchmarks import docstrings
from benchmarks._harness import OURS, device_name, keep
from fastdistil.data.batches import Collator, MicroBatch, micro_batches
from fastdistil.data.plan import Plan, UpdatePlan
from fastdistil.data.shards import Shards
from fastdistil.run import recipes

TARGET = 1e6  # tokens/s of one process
STEP_S = 0.02  # 16,384 tokens at 800,000 tokens/s


def seconds_a_batch(batches: Iterable[object]) -> float:
    """Mean time between batches; the first one, with the start of the workers, is not counted."""
    iterator = iter(batches)
    next(iterator)
    begin = time.perf_counter()
    count = sum(1 for _ in iterator)
    return (time.perf_counter() - begin) / count


def host_ms(batches: Iterable[MicroBatch], count: int) -> tuple[float, float]:
    """(wall, processor) median milliseconds of a training process for a micro-batch made ahead and copied.

    The copy is none on a CPU. Where other work disturbs the clock, the processor time says what to expect.
    """
    iterator, wall, processor = iter(batches), [], []
    for _ in range(count):
        time.sleep(STEP_S)
        begin, begin_processor = time.perf_counter(), time.thread_time()
        next(iterator).to(torch.device("cpu"))
        wall.append(time.perf_counter() - begin)
        processor.append(time.thread_time() - begin_processor)
    return statistics.median(wall) * 1e3, statistics.median(processor) * 1e3


def make_plan(lengths: np.ndarray, token_budget: int, micro_batches_per_update: int) -> Plan:
    return Plan(
        lengths,
        seed=56,
        token_budget=token_budget,
        micro_batches_per_update=micro_batches_per_update,
        mask_fraction=recipes.named("distilbert").masking.fraction,
    )


def epoch_seconds(lengths: np.ndarray, token_budget: int, num_sequences: int) -> float:
    """Seconds to plan an epoch of so many sequences, which a thread does ahead of the loop."""
    plan = make_plan(np.resize(lengths, num_sequences), token_budget, 1)
    begin = time.perf_counter()
    plan.update(0)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="put the results into this folder; without it they are printed")
    args = parser.parse_args()
    if args.shards:
        measure(args.shards, args, args.shards.name)
        return
    with tempfile.TemporaryDirectory() as folder:
        docstrings.write(Path(folder) / "docs.jsonl")
        command = [sys.executable, "-m", "fastdistil.prepare", f"{folder}/docs.jsonl", "--tokenizer", "train:8000"]
        subprocess.run([*command, "--out", f"{folder}/docs"], check=True, capture_output=True)
        measure(Path(folder) / "docs", args, "installed documentation")


def peers_batches(text: Shards, update: UpdatePlan) -> tuple[Dataset, list[list[int]]]:
    """The sequences of an update in a Hugging Face data set, and which of them each of our micro-batches holds."""
    plans = update.micro_batches
    sequences = [text.sequence(int(i)).tolist() for plan in plans for i in plan.sequences]
    ends = list(itertools.accumulate((len(plan.sequences) for plan in plans), initial=0))
    return Dataset.from_dict({"input_ids": sequences}), [list(range(a, b)) for a, b in itertools.pairwise(ends)]


def in_turn(providers: dict[str, Callable[[], Iterable[object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds a batch of every provider, round by round."""
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for _ in range(rounds):
        for provider, make in providers.items():
            times[provider].append(seconds_a_batch(make()))
    return times


def measure(folder: Path, args: argparse.Namespace, name: str) -> None:
    text, masking = Shards(folder), recipes.named("distilbert").masking
    collator = Collator(text, text.counts, token_budget=args.token_budget, masking=masking)
    update = make_plan(text.lengths, args.token_budget, args.batches).update(0)
    tokens_a_batch = update.num_tokens / len(update.micro_batches)
    share = np.percentile(text.lengths, [10, 50, 90]).astype(int).tolist()
    case = (
        f"{name}: {args.token_budget:,} tokens, sequences of {share[0]}, {share[1]} and {share[2]} "
        "tokens (10th, 50th, 90th percentile)"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    dataset, sampled = peers_batches(text, update)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def ours(num_workers: int) -> Iterable[MicroBatch]:
        return micro_batches(iter([update]), collator, rank=0, world_size=1, num_workers=num_workers, pin_memory=False)

    def peer(num_workers: int) -> Iterable[object]:
        return DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]  # has what a map-style dataset needs
            batch_sampler=sampled,
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
        )

    providers: dict[str, Callable[[], Iterable[object]]] = {
        OURS: lambda: map(collator, update.micro_batches),
        "fastdistil DataLoader, 0 workers": lambda: ours(0),
        "fastdistil DataLoader, 2 workers": lambda: ours(2),
        "HF DataLoader, 0 workers": lambda: peer(0),
        "HF DataLoader, 2 workers": lambda: peer(2),
    }
    times = in_turn(providers, args.rounds)
    print(f"{case}; {device_name()}; target {TARGET:,.0f} tokens/s in one process")
    print(f"  {'':<36}{'tokens/s':>12}{'ms a batch':>12}{'x ours':>8}")
    rows = {}
    for provider, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(x / y for x, y in zip(seconds, times[OURS], strict=True))
        speed = tokens_a_batch / median
        rows[provider] = {"tokens_per_s": speed, "ms_a_batch": median * 1e3, "times_ours": ratio}
        print(f"  {provider:<36}{speed:>12,.0f}{median * 1e3:>12.2f}{ratio:>8.2f}")
    wall, processor = host_ms(ours(2), args.batches)
    planned = epoch_seconds(text.lengths, args.token_budget, 10**7)
    print(f"  a training process, workers ahead: {wall:.2f} ms, of a processor {processor:.2f}")
    print(f"  plan of an epoch of 10 M sequences, ahead in a thread: {planned:.2f} s")
    record = {
        "providers": rows,
        "host_ms_a_micro_batch": wall,
        "host_processor_ms_a_micro_batch": processor,
        "seconds_to_plan_10M_sequences": planned,
    }
    if args.results:
        keep("data", case, record, folder=args.results)


if __name__ == "__main__":
    main()
