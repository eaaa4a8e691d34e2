"""How many updates a second 1 to 1,024 GPUs would make, from one measured step, message sizes and link speeds.

    python -m benchmarks.scaling --tokens-per-s 500000     one GPU's measured real tokens/s (benchmarks/step.py)
    python -m benchmarks.scaling --check                   1, 2 and 4 gloo processes here against the model

An update is a fixed number of micro-batches, dealt to W ranks; the slowest rank has ceil(M / W) of them. Then

    seconds = ceil(M / W) * (micro-batch + its messages) + optimiser + messages of the boundary

Nothing is taken to overlap. Messages are rings (Thakur, Rabenseifner and Gropp 2005): an all-reduce of B bytes takes
2 (W - 1) (latency + B / W / bandwidth), half of it a reduce-scatter or an all-gather. Inside a node of 8 the ring is as
fast as the node's link, across nodes as the slowest link it has. What each ZeRO stage sends was counted
(tests/test_scaling.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistil.model.masked_lm import MaskedLM
    from fastdistil.run.ranks import Ranks

GPUS_A_NODE = 8
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes a second that a GPU sends while it receives as many, and seconds before the first arrives."""

    bytes_per_s: float
    latency_s: float


# Data sheets; latencies are the usual few microseconds of NCCL's rings, not measured here.
NVLINK_4 = Link(450e9, 3e-6)  # H100 SXM: 900 GB/s in both directions together
PCIE_5 = Link(63e9, 5e-6)  # 16 lanes
INFINIBAND_NDR = Link(50e9, 8e-6)  # 400 Gb/s, one adapter a GPU


@dataclass(frozen=True, slots=True)
class Messages:
    """Bytes that go around the ring in reduce-scatters and all-gathers; an all-reduce is one of each, counted twice."""

    a_micro_batch: int
    boundary: int  # once an update


def messages(stage: int, num_parameters: int, weight_bytes: int) -> Messages:
    """What the plain engine (stage 0) and DeepSpeed 0.19.8 send under engine.py's settings, as counted.

    Gradients travel in fp32.
    Stages 1 and 2 all-reduce what a reduce-scatter would do for (its setting use_multi_rank_bucket_allreduce). Stage 2
    keeps nothing but its part of the gradients, so every micro-batch is reduced. Stage 3 gathers weights once a
    micro-batch: below its default of 10^9 live parameters they stay from the forward to the backward.
    """
    gradients, weights = 4 * num_parameters, weight_bytes * num_parameters
    return (
        Messages(0, 2 * gradients),
        Messages(0, 2 * gradients + weights),
        Messages(2 * gradients, weights),
        Messages(gradients + weights, 0),
    )[stage]


def ring_s(num_bytes: float, num_ranks: int, link: Link) -> float:
    """Seconds of a reduce-scatter or an all-gather of so many bytes in all."""
    if not num_bytes:
        return 0.0
    return (num_ranks - 1) * (link.latency_s + num_bytes / num_ranks / link.bytes_per_s)


def update_s(
    *, num_ranks: int, num_micro_batches: int, micro_batch_s: float, optimiser_s: float, sent: Messages, link: Link
) -> float:
    """Seconds of an update on the rank with the most to do; `optimiser_s` is its own share's."""
    rounds = -(-num_micro_batches // num_ranks)
    a_round = micro_batch_s + ring_s(sent.a_micro_batch, num_ranks, link)
    return rounds * a_round + optimiser_s + ring_s(sent.boundary, num_ranks, link)


def predict(
    tokens_per_s: float, *, num_parameters: int, num_micro_batches: int, token_budget: int, inside: Link, across: Link
) -> list[dict[str, float]]:
    """For every number of GPUs and stage: updates and tokens a second, and how much of linear growth that is."""
    rows = []
    for num_ranks in (n for n in SIZES if n <= num_micro_batches):
        link = inside if num_ranks <= GPUS_A_NODE else across
        for stage in (0, 1, 2, 3):
            seconds = update_s(
                num_ranks=num_ranks,
                num_micro_batches=num_micro_batches,
                micro_batch_s=token_budget / tokens_per_s,
                optimiser_s=0.0,  # within the measured step
                sent=messages(stage, num_parameters, 2),
                link=link,
            )
            speed = num_micro_batches * token_budget / seconds
            row = {
                "gpus": num_ranks,
                "stage": stage,
                "updates_per_s": 1 / seconds,
                "tokens_per_s": speed,
                "efficiency": speed / tokens_per_s / num_ranks,
            }
            rows.append(row)
    return rows


# --- the check: a toy of BERT's shape on gloo processes

WIDTH, LAYERS, VOCAB, TOKENS, ROUNDS = 128, 2, 8192, 512, 2


def toy_model(num_layers: int) -> "MaskedLM":
    """A DistilBERT of so many layers; a teacher has twice a student's."""
    from fastdistil.model.architecture import Architecture
    from fastdistil.model.masked_lm import MaskedLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "ffn_size": 4 * WIDTH,
        "max_positions": 64,
    }
    return MaskedLM(Architecture(model_type="distilbert", token_types=0, num_layers=num_layers, **sizes))


def worker(stage: str) -> None:
    """A rank: median seconds of whole updates, of stage "alone" without any message; rank 0 prints JSON.

    The compute is measured with all processes at work at once, since they share the machine's cores.
    """
    import torch

    from benchmarks.workload import synthetic_batch
    from fastdistil.data.batches import NO_LABEL
    from fastdistil.run.command import leave
    from fastdistil.run.config import Config
    from fastdistil.run.ranks import Ranks, init_ranks
    from fastdistil.training.engine import DeepSpeedEngine, Engine, PlainEngine
    from fastdistil.training.objective import Objective
    from fastdistil.training.teacher import Teacher

    ranks = init_ranks("cpu", timeout_s=120, threads=1)
    batch = synthetic_batch(TOKENS, 64, ranks.rank)
    ids = torch.randint(5, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(ranks.rank))
    batch = replace(batch, input_ids=ids, labels=torch.where(batch.labels >= 0, ids, NO_LABEL))
    teacher = Teacher(toy_model(2 * LAYERS), device=ranks.device, dtype=torch.float32)

    config = Config()
    objective = Objective(toy_model(LAYERS), config.loss)
    engine: Engine
    if stage in ("alone", "0"):
        apart = Ranks(0, 1, ranks.device)  # no gradient travels, whatever the number of ranks
        engine = PlainEngine(objective, config, apart if stage == "alone" else ranks, torch.float32)
    else:
        engine = DeepSpeedEngine(objective, config, ranks, torch.float32, stage=int(stage), accumulation=ROUNDS)
    seconds = []
    for _ in range(9):
        ranks.any(False)  # all begin together
        begin = time.perf_counter()
        for _ in range(ROUNDS):
            engine.forward_backward(batch, teacher(batch))
        engine.step(1e-4)
        ranks.any(False)  # and the last one counts
        seconds.append(time.perf_counter() - begin)
    found: dict[str, object] = {
        "update_s": statistics.median(seconds[2:]),
        "num_parameters": sum(p.numel() for p in objective.parameters()),
    }
    if stage == "alone" and ranks.world_size > 1:
        found["link"] = _measure_link(ranks)
    if ranks.is_main:
        print("RESULT " + json.dumps(found))
    ranks.leave()
    leave(0)


def _measure_link(ranks: "Ranks") -> list[float]:
    """[bytes/s, latency] of the ring model that all-reduces of two sizes fit."""
    import torch

    num_ranks = ranks.world_size

    def all_reduce_s(num_bytes: int) -> float:
        x = torch.zeros(num_bytes // 4)
        seconds = []
        for _ in range(9):
            begin = time.perf_counter()
            ranks.sum(x)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    small, large = 2**12, 2**23
    latency = all_reduce_s(small) / (2 * (num_ranks - 1))
    per_step = all_reduce_s(large) / (2 * (num_ranks - 1)) - latency
    return [large / num_ranks / per_step, latency]


def _launch(num_ranks: int, stage: str) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "benchmarks.scaling", "--worker", stage],
        capture_output=True,
        text=True,
        env=environment,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{num_ranks} processes, {stage}: {done.stderr[-2000:]}")
    return json.loads(line.removeprefix("RESULT "))


def check(results: Path | None) -> None:
    """Measured against predicted updates of 1, 2 and 4 gloo processes; with a folder scaling.cpu.json there."""
    from benchmarks._harness import stamp

    rows = []
    for num_ranks in (1, 2, 4):
        alone = _launch(num_ranks, "alone")
        link = Link(*alone.get("link", [1.0, 0.0]))
        for stage in (0, 1, 2, 3):
            measured_s, compute_s = _launch(num_ranks, str(stage))["update_s"], alone["update_s"]
            predicted_s = update_s(
                num_ranks=num_ranks,
                num_micro_batches=ROUNDS * num_ranks,
                micro_batch_s=compute_s / ROUNDS,
                optimiser_s=0.0,  # within the measured update
                sent=messages(stage, alone["num_parameters"], 4),
                link=link,
            )
            row = {
                "processes": num_ranks,
                "stage": stage,
                "predicted_s": predicted_s,
                "measured_s": measured_s,
                "compute_s": compute_s,
                "link_bytes_per_s": link.bytes_per_s,
                "link_latency_s": link.latency_s,
            }
            rows.append(row)
            print(
                f"{num_ranks} processes, ZeRO {stage}: predicted {1e3 * predicted_s:7.1f} ms "
                f"(compute {1e3 * compute_s:.1f}), measured {1e3 * measured_s:7.1f} ms, "
                f"ratio {predicted_s / measured_s:.2f}",
                flush=True,
            )
    if results:
        results.mkdir(parents=True, exist_ok=True)
        record = json.dumps(stamp() | {"rows": rows}, indent=1, sort_keys=True)
        (results / "scaling.cpu.json").write_text(record + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens-per-s", type=float, help="of one GPU, real tokens; docs/gpu.md has an H100's")
    parser.add_argument("--parameters", type=int, default=66_985_530, help="of the student")
    parser.add_argument("--micro-batches", type=int, default=60, help="of an update")
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--inside", choices=["nvlink", "pcie"], default="nvlink")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, help="put the results into this folder; without it they are printed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    elif args.check:
        check(args.results)
    elif args.tokens_per_s is None:
        parser.error("--tokens-per-s is missing: what one GPU makes (docs/gpu.md); or --check")
    else:
        rows = predict(
            args.tokens_per_s,
            num_parameters=args.parameters,
            num_micro_batches=args.micro_batches,
            token_budget=args.token_budget,
            inside=NVLINK_4 if args.inside == "nvlink" else PCIE_5,
            across=INFINIBAND_NDR,
        )
        print(f"computed from {args.tokens_per_s:,.0f} tokens/s a GPU, as given; nothing measured")
        print(f"{'GPUs':>5}{'ZeRO':>6}{'updates/s':>11}{'tokens/s':>15}{'efficiency':>12}")
        for row in rows:
            print(
                f"{row['gpus']:>5}{row['stage']:>6}{row['updates_per_s']:>11.2f}{row['tokens_per_s']:>15,.0f}"
                f"{row['efficiency']:>12.1%}"
            )


if __name__ == "__main__":
    main()
