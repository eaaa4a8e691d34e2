"""What a run will be, before any of it: `python -m fastdistil.pretrain ... --dry-run --world-size 128`.

Needs no GPU, no torchrun and no weights, and writes nothing: the teacher's config.json and the lengths of the prepared
sequences are enough. A number that was not measured says so.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastdistil.data.batches import Plan, random_words
from fastdistil.model.architecture import flops_per_token
from fastdistil.run import metrics
from fastdistil.training import engine, inputs, memory
from fastdistil.training.preflight import Resolved

H100_BYTES, H100_FLOPS = (80 * 2**30, 989e12)  # the GPU meant where there is none; dense bf16, data sheet
UTILISATION = 0.5  # assumed where there is no measurement
EXACT_SEQUENCES = 2**21  # read in all epochs together; the orders of more take seconds an epoch
STEP_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # in a checkout only


def report(resolved: Resolved, *, world_size: int) -> str:
    """A table for a person, a line a fact. Raises ValueError where files are damaged or the device cannot hold the run."""
    rows = list(_rows(resolved, world_size))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows(resolved: Resolved, world_size: int) -> Iterator[tuple[str, str]]:
    config, teacher, student = resolved.config, resolved.teacher, resolved.student
    device, device_bytes, device_name = _device(resolved)
    dtype = engine.compute_dtype(config, device)
    count, students = resolved.micro_batches_per_update, world_size - config.teacher.ranks
    rounds = -(-count // students)
    yield "ranks", f"{world_size} x {device_name}, {str(dtype).removeprefix('torch.')}"
    for name, model in (("teacher", teacher), ("student", student)):
        if model is not None:
            yield (name, f"{model.num_parameters:,} parameters ({model.num_layers} layers, {model.hidden_size} wide)")

    # without the hashes, and without the orders of all epochs: each takes longer than the rest together
    quick = replace(
        config, data=replace(config.data, verify=False), optim=replace(config.optim, unit="updates", duration=1)
    )
    text = inputs.load_text(replace(resolved, config=quick), rank=0, world_size=1)
    fraction = config.masking.fraction
    flops = flops_per_token(teacher, student, text.mean_attended_length, head_fraction=1.0 if teacher else fraction)
    yield (
        "FLOPs a token",
        f"{flops.total / 1e6:,.1f} million: teacher {flops.teacher / 1e6:,.1f}, student {flops.student / 1e6:,.1f}",
    )
    num_updates, tokens_per_update, about = _length(resolved, text.plan)
    num_tokens = num_updates * tokens_per_update
    yield ("an update", f"{count:,} micro-batches of {config.batch.token_budget:,} tokens, {rounds:,} a rank")
    yield "updates", f"{about}{num_updates:,}"
    yield "tokens", f"{about}{num_tokens / 1e9:,.3f} billion, padding not counted"

    need = memory.require(resolved, world_size=world_size, device=device, device_bytes=device_bytes)
    yield "memory a rank", f"{need.total / 1e9:.2f} of {device_bytes / 1e9:.2f} GB, predicted"
    for name, num_bytes in need.parts.items():
        if num_bytes:
            yield f"  {name}", f"{num_bytes / 1e9:.3f} GB"
    kept = config.log.keep_checkpoints
    yield "a checkpoint", f"{12 * student.num_parameters / 1e9:.2f} GB; the last {kept} are kept"

    if world_size > 1:
        stage = 1 if config.engine.zero_stage is None else config.engine.zero_stage
        gradients, weights = 4 * student.num_parameters, dtype.itemsize * student.num_parameters
        # (times the gradients are summed over the ranks, times the weights are gathered) in an update: tests/test_scaling.py
        for s, (sums, gathers) in enumerate(((1, 0), (1, 1), (rounds, 1), (rounds, rounds))):
            yield (
                f"messages, ZeRO {s}{' (this run)' if s == stage else ''}",
                f"gradients {sums} x {gradients / 1e9:.2f} GB, weights {gathers} x {weights / 1e9:.2f} GB an update",
            )
    peak, source = _peak_flops(device, dtype)
    if peak:
        share, share_source = _utilisation(device_name, dtype)
        hours = num_tokens * flops.total / (share * peak * students) / 3600
        yield (
            "hours",
            f"{hours:,.3g} of arithmetic, at {share:.0%} ({share_source}) of {peak / 1e12:,.4g} TFLOP/s a rank ({source})",
        )


def _device(resolved: Resolved) -> tuple[torch.device, int, str]:
    """(device, its bytes, its name) of the run that is meant; a cluster's ranks are GPUs unless the configuration says."""
    config, has_gpu = resolved.config, torch.cuda.is_available()
    asked = config.engine.device
    if asked == "cpu" or (asked == "auto" and not has_gpu and config.world_size is None):
        return torch.device("cpu"), memory.host_bytes(), "CPU"
    device = torch.device("cuda")
    if has_gpu:
        found = torch.cuda.get_device_properties(device)
        return device, found.total_memory, found.name
    return device, H100_BYTES, "H100 (assumed: no GPU here)"


def _length(resolved: Resolved, plan: Plan) -> tuple[int, float, str]:
    """(updates, real tokens of one, "about " where they are estimated from a sample of the sequences)."""
    config, count, lengths = resolved.config, resolved.micro_batches_per_update, plan.lengths
    duration, about = config.optim.duration, ""
    scale = 1.0
    if len(lengths) * max(1, duration if config.optim.unit == "epochs" else 1) > EXACT_SEQUENCES:
        sample = random_words(EXACT_SEQUENCES // 2, config.seed, "dry run") % len(lengths)
        scale, about = len(lengths) / len(sample), "about "
        plan = Plan(
            lengths[sample],
            seed=config.seed,
            token_budget=config.batch.token_budget,
            micro_batches_per_update=count,
            mask_fraction=config.masking.fraction,
        )
    micro_batches = scale * plan.micro_batches_through(0)
    tokens = float(lengths.sum()) / micro_batches * count
    if config.optim.unit == "updates":
        return int(duration), tokens, about
    if about:
        return max(1, int(duration * micro_batches / count)), tokens, about
    return plan.updates_of(duration), tokens, about


def _peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    if device.type == "cuda" and not torch.cuda.is_available():
        return H100_FLOPS, "H100, dense bf16, data sheet"
    return metrics.peak_flops(device, dtype)


def _utilisation(device_name: str, dtype: torch.dtype) -> tuple[float, str]:
    """(MFU of benchmarks/step.py on such a device, the lowest of several, where it is from), or what is assumed without one."""
    kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pattern = "step.cpu.json" if device_name == "CPU" else "step.*.json"
    found = []
    for path in STEP_RESULTS.glob(pattern):
        for what, record in json.loads(path.read_text()).items():
            same = device_name == "CPU" or device_name.split(" (")[0] in record["device"]
            ours = record["providers"].get("fastdistil")  # not in a run of some providers alone
            if same and ours and f" {kind}," in what:
                source = f"measured: {what}, {record['device']}, commit {record['commit']}"
                found.append((ours["mfu"], source))
    return min(found, default=(UTILISATION, "assumed, not measured"))
