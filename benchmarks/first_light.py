"""The first minutes on a GPU, in stages: what only a device can say, in one command of about five minutes.

    python -m benchmarks.first_light OUT [--only kernels,step] [--shards PREPARED] [--rehearse]        (make gpu)

Stages run in a process of their own, which is ended at a stage's limit or by a broken CUDA context; a fresh one goes on
with the next stage. So nothing hides behind a failure. Those that time something run alone, then the others side by
side. Each stage is one short line on stdout, one JSON line of OUT/stages.jsonl, and then part of
OUT/first_light.DEVICE.json, which holds device, versions and commit as well; logs and curves are packed anew in
OUT/logs.tgz. So what was found is in OUT, in few and small files, whenever the machine is taken away. What is large,
runs and models, lies in --scratch.

--rehearse runs every stage at toy size on a CPU: operators in Triton's interpreter where their results are compared,
and launches that do nothing where they would take minutes. It finds mistakes of this file before they cost a device's
time. What is measured then is rubbish, and is kept nowhere but in OUT.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import logging
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks._harness import device_to_itself, results_file, stamp

ROOT = Path(__file__).resolve().parents[1]
RECORD = "RECORD "
"""Begins the lines by which the process of the stages hands its records over."""


class Stage(NamedTuple):
    work: Callable[["Setting"], Any]
    limit_s: float
    by_default: bool = True
    beside: str = ""
    """The row of stages that it has its place in, beside other rows; "" for one that runs alone."""


STAGES: dict[str, Stage] = {}
START_S = 60.0
"""For so long a process of the stages may say nothing between two of them, and at its start."""


def stage(limit_s: float, *, by_default: bool = True, beside: str = "") -> Callable[[Callable[["Setting"], Any]], Any]:
    """Makes a function of the setting a stage, ended after so many seconds; a rehearsal has three times as many."""

    def add(work: Callable[["Setting"], Any]) -> Callable[["Setting"], Any]:
        STAGES[work.__name__] = Stage(work, limit_s, by_default, beside)
        return work

    return add


class Setting:
    """Where and at what size the stages work."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.out, self.scratch, self.rehearsed = args.out, args.scratch, args.rehearse
        self.shards, self.glue = args.shards, args.glue
        self.on_gpu = not args.rehearse
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")
        sizes = (16384, 768, 30528, 12, 512) if self.on_gpu else (256, 48, 320, 3, 64)
        self.N, self.D, self.V, self.H, self.L = sizes  # tokens, width, padded vocabulary, heads, length
        self.vocab_size = self.V - 6
        self.seed = torch.tensor(2**62 + 5, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Normal numbers in bf16."""
        import torch

        return (scale * torch.randn(*shape, device=self.device)).bfloat16()

    def sync(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], object], rounds: int = 20, *, recorded: bool = False) -> float:
        """Median milliseconds of a call, on the device's clock.

        `recorded`: of ten calls in a CUDA graph, where the host is never late; the call must be one that can be.
        """
        import torch

        for _ in range(3 if self.on_gpu else 1):
            call()
        self.sync()
        if recorded and self.on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(10):
                    call()
            return round(self.ms(graph.replay, rounds) / 10, 4)
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return round(1e3 * (time.perf_counter() - begin), 4)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        self.sync()
        return round(statistics.median(begin.elapsed_time(end) for begin, end in events), 4)

    def labels(self, count: int) -> Any:
        """Of a seventh of the rows."""
        import torch

        labels = torch.randint(self.vocab_size, (count,), device=self.device)
        return labels.masked_fill_(torch.rand(count, device=self.device) > 0.15, -100)

    def layout(self, lengths: Sequence[int]) -> Any:
        from fastdistil.kernels.layout import sequence_layout

        return sequence_layout(lengths, self.device, tile_step=16)


def relative_error(got: Any, wanted: Any) -> str:
    """|got - wanted| / |wanted|, of norms."""
    got, wanted = got.double(), wanted.double()
    return f"{float((got - wanted).norm() / wanted.norm().clamp_min(1e-30)):.1e}"


@stage(25)
def env(s: Setting) -> Any:
    """What machine this is."""
    import torch
    import triton

    def said(command: str) -> str:
        words = command.split()
        if shutil.which(words[0]) is None:
            return "none"
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()[:300]

    found = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "gpu": said(
            "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader"
        ),
        "cpu": next((line for line in said("lscpu --parse=MODELNAME").splitlines() if line[:1] != "#"), ""),
        "cores": os.cpu_count(),
        "compiler": said("cc -dumpfullversion"),
        "shared memory": said("df --output=avail -h /dev/shm").split()[-1:],
    }
    if s.on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": gpu.multi_processor_count, "bytes": gpu.total_memory}
    return found


@stage(30)
def ceilings(s: Setting) -> Any:
    """A copy, TB/s, and the products of the trainer by their shapes, TFLOP/s."""
    import torch
    import torch.nn.functional as F

    from fastdistil.kernels.gelu import gelu_backward_product, linear_gelu_forward
    from fastdistil.kernels.linear import add_product

    found: dict[str, float] = {}
    source = torch.empty(2**30 if s.on_gpu else 2**20, dtype=torch.uint8, device=s.device)
    target = torch.empty_like(source)
    found["copy TB/s"] = round(2 * source.numel() / s.ms(lambda: target.copy_(source)) / 1e9, 2)

    def add(name: str, flops: float, call: Callable[[], object]) -> None:
        found[name] = round(flops / s.ms(call, 5, recorded=True) / 1e9)

    N, D = s.N, s.D
    large = 8192 if s.on_gpu else 128
    shapes = {"8192^3": (large, large, large), "qkv": (N, 3 * D, D), "attention out": (N, D, D)}
    shapes |= {"ffn in": (N, 4 * D, D), "ffn out": (N, D, 4 * D), "logits": (N, s.V, D)}
    for name, (m, n, k) in shapes.items():
        x, w, dy = s.normal(m, k), s.normal(n, k), s.normal(m, n)
        flops, total = 2.0 * m * n * k, torch.zeros(n, k, device=s.device)
        add(name, flops, lambda x=x, w=w: F.linear(x, w))
        add(f"{name}, dX", flops, lambda dy=dy, w=w: dy @ w)
        add(f"{name}, dW into fp32", flops, lambda t=total, dy=dy, x=x: add_product(t, dy.t(), x, True))
    x, w, b = s.normal(N, D), s.normal(4 * D, D), s.normal(4 * D)
    flops, dy, back, dbias = 8.0 * N * D * D, s.normal(N, D), s.normal(D, 4 * D), torch.zeros(4 * D, device=s.device)
    add("ffn in + GELU", flops, lambda: linear_gelu_forward(x, w, b, False))
    add("ffn in + GELU, derivative kept", flops, lambda: linear_gelu_forward(x, w, b, True))
    z = s.normal(N, 4 * D)
    add("dX + GELU'", flops, lambda: gelu_backward_product(dy, back, z, dbias=dbias, accumulate=True))
    return found


def heads(teacher: Any, labels: Any, options: dict[str, Any], *student: Any) -> Any:
    """Both heads and their loss."""
    from fastdistil.kernels.linear_distill import linear_distill_loss

    (h, w, b), (th, tw, tb) = student, teacher
    return linear_distill_loss(h, w, b, th, tw, tb, labels, **options).loss


def reference_of_heads(teacher: list[Any], labels: Any, options: dict[str, Any], *student: Any) -> Any:
    """The definition of both heads and their loss."""
    from fastdistil.kernels.linear_distill import linear_distill_loss_reference

    (h, w, b), (th, tw, tb) = student, teacher
    return linear_distill_loss_reference(h, w, b, th, tw, tb, labels, **options)[0]


def operators(s: Setting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
    """(name, operator, its definition, leaves, gradient of the result) of every operator, at the model's shapes."""
    yield from operators_of_layers(s, n)
    yield from operators_of_losses(s, n)


def operators_of_layers(s: Setting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
    import torch

    from fastdistil.kernels import attention, dropout, geglu, gelu, layernorm, rope

    D, normal = s.D, s.normal
    x, r, w, b, dy = normal(n, D), normal(n, D), normal(D), normal(D), normal(n, D)
    for p in (0.0, 0.1):
        o: dict[str, Any] = dict(dropout_p=p, seed=s.seed, stream=3)
        yield (
            f"layernorm p={p}",
            lambda *leaves, o=o: layernorm.dropout_add_layernorm(*leaves, **o),
            lambda *leaves, o=o: layernorm.dropout_add_layernorm_reference(*leaves, **o),
            [x, r, w, b],
            dy,
        )
        yield (
            f"add_layernorm p={p}",
            lambda *leaves, o=o: torch.cat(layernorm.add_layernorm(*leaves, bias_D=None, **o), 1),
            lambda *leaves, o=o: torch.cat(layernorm.add_layernorm_reference(*leaves, bias_D=None, **o), 1),
            [x, r, w],
            normal(n, 2 * D),
        )
    wide = [normal(n, 4 * D), normal(4 * D)]
    yield "gelu", gelu.bias_gelu, gelu.bias_gelu_reference, wide, normal(n, 4 * D)
    yield "geglu", geglu.geglu, geglu.geglu_reference, wide[:1], normal(n, 2 * D)
    turns = rope.rotations(torch.arange(n, device=s.device), D // s.H, 1e4)
    packed = normal(n, 3, s.H, D // s.H)
    yield (
        "rope",
        lambda q: rope.rope(q, turns),
        lambda q: rope.rope_reference(q, turns),
        [packed],
        normal(n, 3, s.H, D // s.H),
    )
    lengths = [512] * 6 + [301, 61, 512, 137, 13] if s.on_gpu else [20, 9, 3]
    layout, rows = s.layout(lengths), sum(lengths)
    for p, window in itertools.product((0.0, 0.1), (0, 64 if s.on_gpu else 4)):
        o = dict(dropout_p=p, seed=s.seed, stream=4, window=window)
        yield (
            f"attention p={p}" + f" window {window}" * (window > 0),
            lambda q, o=o: attention.attention(q, layout, backend="fused", **o),
            lambda q, o=o: attention.attention_reference(q, layout, **o),
            [normal(rows, 3, s.H, D // s.H)],
            normal(rows, s.H, D // s.H),
        )
    index, head = torch.arange(n, device=s.device), torch.zeros(1, dtype=torch.long, device=s.device)
    kept = dropout.keep_reference(s.seed, 0, 0.1, head, index, torch.arange(D, device=s.device))[0]
    yield (
        "dropout",
        lambda y: dropout.dropout(y, s.seed, stream=0, dropout_p=0.1),
        lambda y: torch.where(kept, y / 0.9, 0.0),
        [x],
        dy,
    )


def operators_of_losses(s: Setting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
    import torch

    from fastdistil.kernels import cosine, distill

    D, normal = s.D, s.normal
    x, r = normal(n, D), normal(n, D)
    yield "cosine", lambda y: cosine.cosine_loss(y, r)[0], lambda y: cosine.cosine_loss_reference(y, r)[0], [x], None
    labels = s.labels(n)
    rows_that_count = torch.tensor(n - 7, dtype=torch.int32, device=s.device)
    o = dict(
        temperature=2.0, kd_scale=5 / n, mlm_scale=2 / (0.15 * n), vocab_size=s.vocab_size, num_rows=rows_that_count
    )
    teacher = normal(n, D), normal(s.V, D, scale=0.1), normal(s.V)
    exact_teacher: Any = [x.float() for x in teacher]
    logits = [normal(n // 4, s.V)]
    some: dict[str, Any] = o | {"num_rows": None}
    yield (
        "distillation rows",
        lambda z: distill.distill_loss(z, logits[0] / 2, labels[: n // 4], **some)[0],
        lambda z: distill.distill_loss_reference(z, logits[0].float() / 2, labels[: n // 4], **some)[0],
        logits,
        None,
    )
    for chunk in (n, max(16, n // 3 // 16 * 16)):
        yield (
            f"linear_distill chunk {chunk}",
            partial(heads, teacher, labels, o | {"chunk_tokens": chunk}),
            partial(reference_of_heads, exact_teacher, labels, o),
            [normal(n, D), normal(s.V, D, scale=0.1), normal(s.V)],
            None,
        )


@stage(120, beside="operators")
def correct(s: Setting) -> Any:
    """Relative errors of every operator's value and gradients from its fp32 definition, and whether two runs agree."""
    import torch

    def go(function: Any, leaves: list[Any], dout: Any) -> list[Any]:
        out = function(*leaves)
        dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    found = {}
    for name, operator, reference, leaves, dout in operators(s, 4096 if s.on_gpu else 32):
        one, two = (go(operator, [x.clone().requires_grad_() for x in leaves], dout) for _ in range(2))
        wanted = go(reference, [x.float().requires_grad_() for x in leaves], dout)
        same = all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
        errors = [relative_error(x, y) for x, y in zip(one, wanted, strict=True)]
        found[name] = errors if same else ["two runs differ", *errors]
    found["layer"] = layer_errors(s)
    wrong = [
        n
        for n, errors in found.items()
        if "two runs differ" in errors or not max(map(float, errors)) < BOUND.get(n, 0.03)
    ]
    if wrong:
        raise RuntimeError(f"wrong: {', '.join(wrong)}; {json.dumps(found)}")
    return found


BOUND = {"layer": 0.1}
"""Of a relative error, 0.03 otherwise: beyond it no rounding to bf16 explains it."""


def layer_errors(s: Setting) -> list[str]:
    """Of the logits and of all gradients together of two layers by functions.py, in bf16 with dropout, from the modules
    in fp32."""
    import torch

    from benchmarks.step import architecture
    from fastdistil.model.masked_lm import MaskedLM

    sizes: Any = architecture("distilbert", 2, s.D)
    if not s.on_gpu:
        sizes = replace(sizes, num_heads=s.H)
    count, length = (4, s.L) if s.on_gpu else (2, 16)
    ids = torch.randint(1000, 30522, (count * length,), device=s.device)
    positions, layout = torch.arange(length, device=s.device).repeat(count), s.layout([length] * count)
    results = []
    for dtype, by_modules in ((torch.bfloat16, False), (torch.float32, True)):
        model = MaskedLM(sizes).to(s.device, dtype).train()
        model.encoder.attention_backend = "fused"
        if by_modules:
            model.run_by_modules()
        logits = model(ids, positions, layout, s.seed)
        logits.float().square().mean().backward()
        # Together: that of the keys' bias is 0 but for rounding.
        whole = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        results.append([logits.detach(), whole])
    return [relative_error(x, y) for x, y in zip(*results, strict=True)]


@stage(50)
def kernels(s: Setting) -> Any:
    """[ms, ms that its bytes take at 3 TB/s] of each kernel; for attention TFLOP/s beside torch's own."""
    import torch

    from fastdistil.kernels import cosine, distill, fp8_rows, geglu, gelu, layernorm, linear, rope

    found: dict[str, Any] = {}
    N, D, V, normal = s.N, s.D, s.V, s.normal
    one = N * D * 2

    def add(name: str, call: Callable[[], object], num_bytes: float) -> None:
        found[name] = [s.ms(call, 5, recorded=True), round(num_bytes / 3e9, 3)]

    x, r, w, b, dy = normal(N, D), normal(N, D), normal(D), normal(D), normal(N, D)
    sums = dict(zip(("dweight", "dbias", "dx_sum"), torch.zeros(3, D, device=s.device), strict=True))
    for p, seed in ((0.0, None), (0.1, s.seed)):
        _, saved = layernorm.forward(x, r, w, b, 1e-12, seed, 3, p)
        add(f"layernorm p={p}", lambda p=p, e=seed: layernorm.forward(x, r, w, b, 1e-12, e, 3, p), 3 * one)
        add(
            f"layernorm backward p={p}",
            lambda p=p, e=seed, k=saved: layernorm.backward(dy, k, w, e, 3, p, **sums, accumulate=True),
            (4 + (seed is not None)) * one,
        )
        *_, kept = layernorm.add_forward(x, r, w, None, 1e-5, seed, 3, p)
        add(f"add_layernorm p={p}", lambda p=p, e=seed: layernorm.add_forward(x, r, w, None, 1e-5, e, 3, p), 4 * one)
        into = {"dweight": sums["dweight"], "dbias": None, "accumulate": True}
        add(
            f"add_layernorm backward p={p}",
            lambda p=p, e=seed, k=kept, o=into: layernorm.add_backward(dy, r, k, w, e, 3, p, **o),
            (4 + (seed is not None)) * one,
        )
    g, gb, dg = normal(N, 4 * D), normal(4 * D), normal(N, 4 * D)
    add("gelu", lambda: gelu.bias_gelu(g, gb), 8 * one)
    add("gelu backward", lambda: gelu.gelu_backward_rows(dg, g, dbias=None, accumulate=False), 12 * one)
    half = normal(N, 2 * D)
    add("geglu", lambda: geglu.forward(g), 6 * one)
    add("geglu backward", lambda: geglu.backward(half, g), 10 * one)
    qkv, turns = normal(N, 3, s.H, D // s.H), rope.rotations(torch.arange(N, device=s.device), D // s.H, 1e4)
    add("rope in place", lambda: rope.rotate_(qkv, turns), 4 * one + turns.numel() * 4)
    scale = torch.ones((), device=s.device)
    add("cosine", lambda: cosine.forward(x, r, None, scale), 3 * one)
    n = N // 4
    z, y, labels, both = normal(n, V), normal(n, V), s.labels(n), torch.full((2,), 1e-4, device=s.device)
    for gradient in (True, False):
        into = z if gradient else None
        add(
            f"row kernel of {n}, gradient {gradient}",
            lambda i=into: distill.forward(z, y, labels, None, i, 0, 2.0, both, s.vocab_size),
            (6 if gradient else 4) * n * V,
        )
    total = torch.zeros(V, device=s.device)
    add(f"column sum of {n}", lambda: linear.add_column_sum(total, z, True), 2 * n * V)
    add("quantise D", lambda: fp8_rows.quantise_rows(x), 3 * N * D)
    add("quantise 4 D with gelu", lambda: fp8_rows.quantise_rows(g, gb), 12 * N * D)
    return found | attention_speeds(s)


def attention_speeds(s: Setting) -> dict[str, Any]:
    """{backend and dropout: TFLOP/s forward, and forward with backward}: the rows of attention_backends.py's table."""
    from typing import get_args

    from fastdistil.kernels import attention
    from fastdistil.kernels.attention_backends import AttentionBackend

    found: dict[str, Any] = {}
    layout = s.layout([s.L] * (s.N // s.L))
    qkv, dout = s.normal(s.N, 3, s.H, s.D // s.H), s.normal(s.N, s.H, s.D // s.H)
    flops = 4.0 * s.N * s.L * s.D
    for backend in (name for name in get_args(AttentionBackend) if name != "auto"):
        for p in (0.0, 0.1):
            common = (layout, s.seed if p else None, 4, p, backend)
            try:
                forward = s.ms(lambda c=common: attention.forward(qkv, *c, keep=False))

                def both(c: Any = common) -> None:
                    out, saved = attention.forward(qkv, *c)
                    attention.backward(dout, qkv, out, saved, *c, dbias=None, accumulate=False)

                whole = s.ms(both)
                found[f"{backend} p={p}"] = {
                    "ms": [forward, whole],
                    "TFLOP/s": [round(flops / forward / 1e9), round(3.5 * flops / whole / 1e9)],
                }
            except Exception as error:  # a backend that this machine lacks
                found[f"{backend} p={p}"] = f"{type(error).__name__}: {str(error)[:100]}"
    return found


@stage(60)
def tiles(s: Setting) -> Any:
    """The four fastest blocks of each kernel, and the one in use; all of them are in OUT/tiles.json (tiles.py)."""
    from benchmarks import tiles

    if not s.on_gpu:
        return {}  # their sizes are a GPU's
    found = tiles.measure(lambda call: s.ms(call, 5, recorded=True), s.device)
    (s.out / "tiles.json").write_text(json.dumps(found, indent=1))
    return {
        kernel: {tile: ms for i, (tile, ms) in enumerate(rows.items()) if i < 4 or tile.endswith("*")}
        for kernel, rows in found.items()
    }


@stage(40)
def chunks(s: Setting) -> Any:
    """{tokens of a chunk: [ms, TFLOP/s, MiB beside inputs]} of the heads with their loss, forward and backward."""
    import torch

    from fastdistil.kernels import linear_distill

    N, D, V = s.N, s.D, s.V
    student, teacher = ((s.normal(N, D), s.normal(V, D, scale=0.1), s.normal(V)) for _ in range(2))
    labels, scales = s.labels(N), torch.full((2,), 1e-4, device=s.device)
    into: dict[str, Any] = {"dweight": torch.zeros(V, D, device=s.device), "dbias": torch.zeros(V, device=s.device)}
    found = {}
    for chunk in (1024, 2048, 4096, 8192, N) if s.on_gpu else (64, N):
        before = 0
        if s.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms = s.ms(
            lambda c=chunk: linear_distill.forward(
                *student, *teacher, labels, None, 2.0, scales, s.vocab_size, c, **into, accumulate=True
            ),
            8,
        )
        peak = (torch.cuda.max_memory_allocated() - before) // 2**20 if s.on_gpu else 0
        found[chunk] = [ms, round(8.0 * N * D * V / ms / 1e9), peak]
    return found


def ours(s: Setting, tokens: int, *, batches: int = 1, **changes: Any) -> Any:
    """The trainer of benchmarks/step.py."""
    from benchmarks import step

    size, length = ("bert-base", s.L) if s.on_gpu else ("toy", s.L)
    args = SimpleNamespace(size=size, precision="bf16", tokens=tokens, length=length, shards=None, batches=batches)
    return step.Ours(args, **changes)  # type: ignore[arg-type]


WAYS: dict[str, dict[str, bool]] = {
    "": {},
    ", launch by launch": {"graph": False},
    ", launch by launch, teacher first": {"graph": False, "overlap": False},
}


@stage(80)
def step(s: Setting) -> Any:
    """Whole updates by token budget, as one graph and launch by launch: tokens/s, MFU, host ms, GiB."""
    import torch

    found: dict[str, Any] = {"graphs": kept_lines("fastdistil", "one CUDA graph")}
    for tokens in (16384, 32768, 65536) if s.on_gpu else (256,):
        count = max(1, 65536 // tokens) if s.on_gpu else 2
        for name, way in list(WAYS.items())[: 2 if tokens > 16384 else None]:
            if s.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainer = ours(s, tokens, batches=count, **way)
            for _ in range(2):
                trainer.run()
            ms = s.ms(trainer.run, 6)
            hosts = []
            for _ in range(3):
                s.sync()
                begin = time.perf_counter()
                trainer.run()
                hosts.append(1e3 * (time.perf_counter() - begin))
            speed = trainer.num_tokens / ms * 1e3
            found[f"{tokens}{name}"] = {
                "tokens/s": round(speed),
                "MFU": round(664e6 * speed / 989e12, 3),
                "ms an update": ms,
                "micro-batches": count,
                "host ms a micro-batch": round(min(hosts) / count, 2),
                "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if s.on_gpu else 0,
            }
            del trainer
    return found


def kept_lines(logger: str, part: str) -> list[str]:
    """A list to which every message of a logger with this part is added from here on."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if part in record.getMessage():
            lines.append(record.getMessage())
        return True

    logging.getLogger(logger).addFilter(keep)
    return lines


@stage(40)
def fp8(s: Setting) -> Any:
    """The teacher in bf16 and in FP8: ms, and how far its hidden states are apart."""
    from fastdistil.training.precision import require_fp8

    if s.on_gpu:
        require_fp8(s.device)
    found, states = {}, []
    for quantised in (False, True) if s.on_gpu else (False,):
        trainer = ours(s, s.N, fp8_teacher=quantised)
        batch = trainer.batches[0].to(s.device)
        found["fp8 ms" if quantised else "bf16 ms"] = s.ms(lambda t=trainer, b=batch: t.teacher(b), 5, recorded=True)
        states.append(trainer.teacher(batch).encoder.hidden_ND)
    return found | {"hidden states differ by": relative_error(states[-1], states[0])}


@stage(40)
def profile(s: Setting) -> Any:
    """Kernels of two micro-batches of 32,768 tokens, one by one, by name: OUT/kernels.txt; here the longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    trainer = ours(s, 2 * s.N, graph=False, overlap=False)
    trainer.run()
    s.sync()
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.on_gpu else [])]) as seen:
        trainer.run()
        trainer.run()
        s.sync()
    # Kernels alone: an operator of PyTorch's or an autograd function of ours has the time of its kernels once more.
    events = [e for e in seen.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    rows = sorted(((e.key, e.count, e.self_device_time_total / 1e3) for e in events), key=lambda row: -row[2])
    (s.out / "kernels.txt").write_text("".join(f"{ms:9.3f} ms {count:6d} {name[:110]}\n" for name, count, ms in rows))
    return {
        "ms a micro-batch": round(sum(ms for *_, ms in rows) / 2, 2),
        "launches": sum(count for _, count, _ in rows) / 2,
        "longest": [(name[:60], count, round(ms, 2)) for name, count, ms in rows[:14]],
    }


class Commands:
    """The program's own commands on a small run of the scratch folder; what they say goes to its logs."""

    def __init__(self, s: Setting) -> None:
        self.work, self.logs = s.scratch, s.scratch / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.environment.pop("TRITON_INTERPRET", None)
        self.shards = s.shards or self.work / "shards"
        self.teacher = self.work / "teacher"
        self.s = s

    def start(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        log = (self.logs / f"{name}.log").open("wb")
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=ROOT)

    def run(self, name: str, *words: object) -> str:
        """What a command's log ends with. Raises RuntimeError with it, if that is a failure."""
        status = self.start(name, *words).wait()
        last = self.text(name).strip().splitlines()[-1:]
        if status:
            raise RuntimeError(f"{name}: status {status}, {' '.join(last)[:300]}")
        return " ".join(last)[:200]

    def text(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def prepare(self) -> None:
        """Text, if none is given, and a teacher of random weights whose distribution is not flat; once, for all rows of
        stages."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._prepare()

    def _prepare(self) -> None:
        import torch

        from benchmarks import docstrings
        from benchmarks.step import architecture
        from fastdistil.data.shards import read_meta
        from fastdistil.export import write_hugging_face_folder
        from fastdistil.model.masked_lm import MaskedLM

        if self.s.shards is None and not (self.shards / "meta.json").is_file():
            docstrings.write(self.work / "docs.jsonl")
            lines = (self.work / "docs.jsonl").read_text().splitlines(keepends=True)
            (self.work / "text.jsonl").write_text("".join(lines[: 10**6 if self.s.on_gpu else 400]))
            length, vocabulary = (512, "train:30522") if self.s.on_gpu else (64, "train:500")
            words = ("--tokenizer", vocabulary, "--max-length", length, "--out", self.shards)
            self.run("prepare", "fastdistil.prepare", self.work / "text.jsonl", *words)
        if not self.teacher.is_dir():
            meta, sizes = read_meta(self.shards), architecture("bert", 12 if self.s.on_gpu else 2, self.s.D)
            pad = meta.special_ids["pad"]
            sizes = replace(sizes, vocab_size=meta.vocab_size, pad_id=pad, num_heads=self.s.H)
            model = MaskedLM(sizes, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                model.head.weight.mul_(4.0)
            self.teacher.mkdir()
            write_hugging_face_folder(model.state_dict(), sizes, self.shards / "tokenizer", self.teacher)

    def pretrain(self, out: str, updates: int, *, recipe: str = "distilbert") -> list[object]:
        budget = 16384 if self.s.on_gpu else 256
        words = f"--batch.token-budget {budget} --batch.size {4 * budget} --batch.unit tokens --optim.unit updates "
        words += f"--optim.duration {updates} --log.every 2 --log.checkpoint-every 12 --log.validate-every 1000 "
        words += "--data.validation-sequences 64 --teacher.check warn --teacher.max-drift 1"
        places = ("--data.shards", self.shards, "--teacher.path", self.teacher, "--out", self.work / out)
        return ["fastdistil.pretrain", recipe, *places, *words.split()]

    def update(self, name: str, number: int) -> str:
        """What a log says of an update."""
        lines = [line for line in self.text(name).splitlines() if f" update {number}/" in line]
        return lines[0].partition(" ")[2] if lines else ""


def told(text: str) -> list[str]:
    """Lines of a log that say what only a device can."""
    words = (
        *("CUDA graph", "launch by launch", "predicted", "measured", "overlap", "attention:", "profile:", "drift"),
        "WARNING",
    )
    return [line[:160] for line in text.splitlines() if any(word in line for word in words)][:24]


@stage(130, beside="program")
def program(s: Setting) -> Any:
    """Twelve updates or some more, SIGTERM, resumed with a profile; bit for bit a run in one go; exported, and loaded
    by transformers."""
    import torch
    import transformers
    from safetensors.torch import load_file

    commands = Commands(s)
    commands.prepare()
    twin = commands.start("twin", *commands.pretrain("twin", 48))
    words = commands.pretrain("run", 48)
    first = commands.start("run", *words)
    while first.poll() is None and "update 12/" not in commands.text("run"):
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    status = first.wait()
    if status != 75:
        raise RuntimeError(f"status {status}, wanted 75: {commands.text('run')[-300:]}")
    commands.run("resumed", *words, "--resume", "auto", "--profile", "40:42")
    if twin.wait():
        raise RuntimeError(f"the run in one go: status {twin.returncode}, {commands.text('twin')[-300:]}")
    students = [commands.work / f"{name}-student" for name in ("run", "twin")]
    words = [("fastdistil.export", commands.work / name, "--overwrite", "--out") for name in ("run", "twin")]
    exports = [commands.start(path.name, *w, path) for w, path in zip(words, students, strict=True)]
    if any([export.wait() for export in exports]):
        raise RuntimeError(f"export: {commands.text(students[0].name)[-300:]}")
    weights = [load_file(path / "model.safetensors") for path in students]
    _, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        students[0], output_loading_info=True, trust_remote_code=False
    )
    return {
        "resumed differs from the run in one go by": {
            name: float((x - weights[1][name]).abs().max())
            for name, x in weights[0].items()
            if not torch.equal(x, weights[1][name])
        },
        "transformers misses or does not know": [*loading["missing_keys"], *loading["unexpected_keys"]],
        "updates": [commands.update("run", 2), commands.update("run", 12), commands.update("resumed", 48)],
        "first": told(commands.text("run")),
        "log": told(commands.text("resumed")),
    }


@stage(90, beside="others")
def embed(s: Setting) -> Any:
    """Twelve updates of an embedding student, and of the terms that nothing else here computes."""
    commands = Commands(s)
    commands.prepare()
    found = {}
    relations = f"--loss.queries 1 --loss.keys 1 --loss.values 1 --loss.relation-heads {s.H} --loss.similarity 1"
    for name, terms in (("embed", ""), ("relations", relations)):
        words = [*commands.pretrain(name, 12, recipe="embed"), "--teacher.pooling", "mean", *terms.split()]
        commands.run(name, *words)
        found[name] = {"last update": commands.update(name, 12), "log": told(commands.text(name))}
    return found


@stage(90, beside="others")
def zero(s: Setting) -> Any:
    """Three updates of ZeRO 1 and 3 under torchrun, one rank: NCCL, which the default of several GPUs needs."""
    commands = Commands(s)
    commands.prepare()
    found, failed = {}, False
    for number in (1, 3):
        torchrun = ("torch.distributed.run", "--nproc-per-node", "1", "-m")
        words = [*commands.pretrain(f"zero{number}", 3), "--engine.zero-stage", number]
        try:
            commands.run(f"zero{number}", *torchrun, *words)
            found[number] = commands.update(f"zero{number}", 3)
        except RuntimeError as error:
            found[number], failed = str(error)[:300], True
    if failed:
        raise RuntimeError(json.dumps(found))
    return found


TESTS = (
    *("distill", "linear_distill", "cosine", "dropout", "attention", "layernorm", "gelu", "linear", "fp8_rows"),
    *("geglu", "rope", "mixture", "backend"),
)
TESTS_S = 150
"""After which the tests are ended, before their stage is."""


@stage(170, beside="tests")
def tests(s: Setting) -> Any:
    """The tests that a GPU runs as well, side by side where pytest-xdist is installed; logs/tests.log, failures.log."""
    import importlib.util

    commands = Commands(s)
    paths = [f"tests/kernels/test_{name}.py" for name in TESTS]
    paths += [
        f"tests/{name}.py" for name in ("model/test_functions", "training/test_objective", "training/test_teacher")
    ]
    beside = ["-n", "12", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    words = "-v --timeout 120 --timeout-method thread -p no:cacheprovider -p no:benchmark --tb=short -m"
    options = [*words.split(), "(triton or gpu) and not soak"]
    if not s.on_gpu:
        paths, beside = paths[-3:-2], []
        options += ["-k", "flat"]
    failures = commands.logs / "failures.log"
    failures.unlink(missing_ok=True)
    # Each worker's Inductor would start a process for every core.
    commands.environment |= {"FAILURES": str(failures), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = commands.start("tests", "pytest", *paths, *beside, *options)
    try:
        status: object = process.wait(TESTS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it sums up
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        status = f"cut off after {TESTS_S} s"
    # A broken CUDA context fails all that comes after it in its worker: the first of each worker says most.
    failed = [line[:200] for line in failures.read_text().splitlines()][:30] if failures.exists() else []
    found = {"status": status, "summary": commands.text("tests").splitlines()[-1:], "failed": failed}
    if status:
        raise RuntimeError(json.dumps(found))
    return found


LEARN = "--batch.size 16384 --batch.unit tokens --optim.unit updates --optim.lr 1e-3 --data.validation-sequences 1024 "
LEARN += "--masking.fraction 0.3 --masking.smoothing 0 --student.dropout 0 --student.attention-dropout 0 "
LEARN += "--log.every 100 --log.validate-every 1000 --log.checkpoint-every 100000"
FROM_NOTHING = "mlm --student.family modernbert --student.init random --student.num-layers 6 --student.hidden-size 384 "
FROM_NOTHING += "--student.num-heads 6 --student.ffn-size 576"
UPDATES = (4000, 1500)
"""Of a teacher and of its students, each of 16,384 tokens: a BERT needs many times as many to leave the frequencies of
words (docs/study.md)."""


@stage(420, by_default=False, beside="learn")
def learn(s: Setting) -> Any:
    """A small ModernBERT that learns from nothing, half of its layers by distillation, and these without a teacher.

    With --glue also fine-tuned on STS-B. Their report: OUT/report.html. Beside peers its commands wait until these have
    timed what they are at.
    """
    commands = Commands(s)
    commands.prepare()
    teacher, student = UPDATES if s.on_gpu else (6, 4)
    common = [*LEARN.split(), "--data.shards", commands.shards]
    if not s.on_gpu:
        common += ["--batch.size", "512", "--batch.token-budget", "256", "--data.validation-sequences", "64"]
    place = {name: commands.work / f"learn-{name}" for name in ("teacher", "student", "twin")}
    twin = "--student.layers 0 2 5 --optim.encoder-lr 1e-3"
    recipes = {
        "teacher": [*FROM_NOTHING.split(), "--optim.duration", teacher],
        "student": ["modernbert", "--teacher.path", place["teacher"] / "model", "--optim.duration", student],
        "twin": ["mlm", "--student.init", place["teacher"] / "model", *twin.split(), "--optim.duration", student],
    }
    for name, recipe in recipes.items():
        with device_to_itself(shared=True):
            commands.run(f"learn-{name}", "fastdistil.pretrain", *recipe, *common, "--out", place[name] / "run")
        commands.run(f"export-{name}", "fastdistil.export", place[name] / "run", "--out", place[name] / "model")
    commands.run("report", "fastdistil.report", *(p / "run" for p in place.values()), "--out", s.out / "report.html")
    found = {name: commands.text(f"learn-{name}").splitlines()[-8:] for name in place}
    if s.glue:
        words = ("--task", "stsb", "--data", s.glue / "stsb", "--seeds", 2, *(() if s.on_gpu else ("--dry-run",)))
        with device_to_itself(shared=True):
            scores = [commands.start(f"stsb-{n}", "fastdistil.evaluate", p / "model", *words) for n, p in place.items()]
            for process in scores:
                process.wait()
        for name in place:
            found[name] += commands.text(f"stsb-{name}").splitlines()[-3:]
    return found


@stage(480, by_default=False, beside="peers")
def peers(s: Setting) -> Any:
    """The whole step beside Hugging Face's (benchmarks/step.py), on prepared text if there is; keeps its results."""
    commands = Commands(s)
    size = (
        ["--tokens", "16384", "--batches", "4"] if s.on_gpu else ["--size", "toy", "--tokens", "256", "--length", "64"]
    )
    shards = ["--shards", s.shards] if s.shards and s.on_gpu else []
    size += shards
    words = [*size, "--limit-s", 450, "--results", s.out, *([] if s.on_gpu else ["--only", "fastdistil, launch"])]
    commands.environment["PYTHONWARNINGS"] = "ignore"  # torch.compile's, among the table's lines
    commands.run("peers", "benchmarks.step", *words)
    return commands.text("peers").splitlines()[1:11]


@stage(210, by_default=False)
def bench(s: Setting) -> Any:
    """Operators beside their floors and their peers (benchmarks/bench_*.py); their results go to the logs."""
    if not s.on_gpu:
        return []  # on a CPU `make bench` keeps them
    commands = Commands(s)
    commands.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    chosen = "not float32 and (not attention or wikipedia-64 or 512-64)"
    words = ["-q", "-s", "--tb=short", "-p", "no:cacheprovider", "-k", chosen, "--results", commands.logs]
    names = ("distill", "layernorm", "attention", "gelu", "geglu", "rope", "cosine", "dropout", "mixture")
    failed = []
    # Side by side, since compiling the peers is what takes the time; to be timed they wait for each other. Both heads
    # with their loss want the memory of all the others.
    for beside in (("linear_distill",), names):
        begun = {n: commands.start(f"bench-{n}", "pytest", f"benchmarks/bench_{n}.py", *words) for n in beside}
        failed += [name for name, process in begun.items() if process.wait()]
    commands.start("table", "benchmarks._harness", commands.logs).wait()
    if failed:
        raise RuntimeError(json.dumps({name: commands.text(f"bench-{name}")[-200:] for name in failed}))
    return commands.text("table").splitlines()


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton's interpreter does nothing inside."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.__getitem__
    InterpretedFunction.__getitem__ = lambda self, grid: lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        InterpretedFunction.__getitem__ = launch  # type: ignore[method-assign]


def work_through(names: Sequence[str], args: argparse.Namespace) -> None:
    """The process of the stages: a record on stdout when a stage begins, and one when it ends."""
    handed, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    setting = Setting(args)

    def hand_over(record: dict[str, Any]) -> None:
        print(RECORD + json.dumps(record, default=str), file=handed, flush=True)

    for name in names:
        hand_over({"stage": name})
        begin, record = time.monotonic(), {"stage": name, "ok": True}
        try:
            # In the interpreter they would take minutes, so where nobody looks at the results launches do nothing.
            with without_launches() if args.rehearse and name != "correct" else contextlib.nullcontext():
                record["found"] = STAGES[name].work(setting)
            setting.sync()
        except Exception as error:  # a stage may not end the others
            trace = traceback.format_exc()[-3000:].replace(f"{ROOT}{os.sep}", "")
            record |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:600]}", "trace": trace}
        hand_over(record | {"seconds": round(time.monotonic() - begin, 1)})
        if "CUDA error" in record.get("error", ""):
            return  # the context is broken


class Report:
    """Lines and files of what the stages found."""

    def __init__(self, out: Path, scratch: Path, *, rehearsed: bool) -> None:
        for folder in (out, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.out, self.scratch, self.begin = out, scratch, time.monotonic()
        self.path = results_file("first_light", out)
        self.whole: dict[str, Any] = stamp() | {"rehearsed": rehearsed, "stages": {}}
        if self.path.is_file():  # stages of before, by --only
            self.whole["stages"] = json.loads(self.path.read_text())["stages"]
        self.failed: list[str] = []
        self.lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        name, ok = record["stage"], record["ok"]
        if not ok:
            self.failed.append(name)
        with (self.out / "stages.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.whole["stages"][name] = record
        self.path.write_text(json.dumps(self.whole, indent=1) + "\n")
        with tarfile.open(self.out / "logs.tgz", "w:gz") as archive:
            for pattern in ("logs/*", "*/metrics.jsonl", "*/*/metrics.jsonl", "*/profile/table.json"):
                for path in sorted(self.scratch.glob(pattern)):
                    archive.add(path, path.relative_to(self.scratch))
        said = json.dumps(record.get("found", record.get("error")))
        passed = time.monotonic() - self.begin
        print(f"[{passed:4.0f} s] {name} {'ok' if ok else 'FAILED'} {record.get('seconds')} s {said[:900]}", flush=True)


def supervise(names: Sequence[str], command: Sequence[str], report: Report, *, patience: float) -> None:
    """Has the stages worked through by processes of a command, as many as it takes, and reports each."""
    left = list(names)
    while left:
        errors = (report.out / "errors.log").open("ab")
        words = [*command, "--work", ",".join(left)]
        # Without a buffer, in which a second line would lie unseen by select.
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, start_new_session=True, bufsize=0
        )
        assert process.stdout is not None
        begun, readable, limit_s = None, [], START_S * patience
        while left:
            readable, _, _ = select.select([process.stdout], [], [], limit_s)
            line = process.stdout.readline().decode() if readable else ""
            if not line:  # it is late, or dead
                break
            record = json.loads(line.removeprefix(RECORD)) if line.startswith(RECORD) else {}
            if "ok" in record:
                report.add(record)
                left.remove(record["stage"])
                begun, limit_s = None, START_S * patience
            elif record:
                begun = record["stage"]
                limit_s = STAGES[begun].limit_s * patience
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        status = process.wait()
        if left and (begun or not readable or status):
            name, why = begun or left[0], f"no word in {limit_s:.0f} s" if not readable else f"status {status}"
            report.add({"stage": name, "ok": False, "error": f"the process of the stages ended: {why}, see errors.log"})
            left.remove(name)


def main(module: str = "benchmarks.first_light") -> int:
    """Exit status 1 where a stage failed. `module` is what a process of the stages is started by."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder of runs and models; OUT/work")
    parser.add_argument("--only", help="stages, separated by commas, of: " + " ".join(STAGES))
    parser.add_argument("--shards", type=Path, help="prepared text; else the documentation of installed packages")
    parser.add_argument("--glue", type=Path, help="folder of GLUE, for the stage learn")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on a CPU")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.scratch = (args.scratch or args.out / "work").resolve()
    asked = (args.work or args.only or ",".join(n for n, s in STAGES.items() if s.by_default or args.rehearse)).split(
        ","
    )
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        parser.error(f"--only wants stages of {' '.join(STAGES)}, got {' '.join(unknown)}")
    if args.work:
        work_through(asked, args)
        return 0
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, str(args.out), "--scratch", str(args.scratch)]
    for name, path in (("--shards", args.shards), ("--glue", args.glue)):
        command += [name, str(path.resolve())] if path else []
    command += ["--rehearse"] if args.rehearse else []
    report = Report(args.out, args.scratch, rehearsed=args.rehearse)
    rows: dict[str, list[str]] = {"": []}
    for name in asked:
        rows.setdefault(STAGES[name].beside, []).append(name)
    work = partial(supervise, command=command, report=report, patience=3.0 if args.rehearse else 1.0)
    work(rows.pop(""))
    beside = [threading.Thread(target=work, args=(row,)) for row in rows.values()]
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    print(f"{len(asked) - len(report.failed)} of {len(asked)} stages ok; {report.path}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
