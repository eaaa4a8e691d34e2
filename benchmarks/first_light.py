"""The first minutes on a GPU, in stages: what only a device can say, in one command of about five minutes.

    python -m benchmarks.first_light OUT [--only kernels,step] [--shards PREPARED] [--rehearse]        (make gpu)

Here stand the stages that work at operators and at the step, their sizes, and the list of all stages. Those that run
commands are in first_light_commands.py; stages.py works through them, and says what OUT holds.

--rehearse runs every stage at toy size on a CPU: operators in Triton's interpreter where their results are compared,
and launches that do nothing where they would take minutes. It finds mistakes of these files before they cost a
device's time. What is measured then is rubbish, and is kept nowhere but in OUT.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import torch
import torch.nn.functional as F

from benchmarks.first_light_commands import bench, embed, learn, peers, program, tests, zero
from benchmarks.stages import Setting, main, stage


class ModelSetting(Setting):
    """With the sizes of the model, and operands of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        sizes = (16384, 768, 30528, 12, 512) if self.on_gpu else (256, 48, 320, 3, 64)
        self.N, self.D, self.V, self.H, self.L = sizes  # tokens, width, padded vocabulary, heads, length
        self.vocab_size = self.V - 6
        self.seed = torch.tensor(2**62 + 5, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Normal numbers in bf16."""
        return (scale * torch.randn(*shape, device=self.device)).bfloat16()

    def labels(self, count: int) -> Any:
        """Of a seventh of the rows."""
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
def env(s: ModelSetting) -> Any:
    """What machine this is."""
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
def ceilings(s: ModelSetting) -> Any:
    """A copy, TB/s, and the products of the trainer by their shapes, TFLOP/s."""
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
    slope = s.normal(N, 4 * D)
    add("dX + GELU'", flops, lambda: gelu_backward_product(dy, back, slope, dbias=dbias, accumulate=True))
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


def operators(s: ModelSetting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
    """(name, operator, its definition, leaves, gradient of the result) of every operator, at the model's shapes."""
    yield from operators_of_layers(s, n)
    yield from operators_of_losses(s, n)


def operators_of_layers(s: ModelSetting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
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


def operators_of_losses(s: ModelSetting, n: int) -> Iterator[tuple[str, Any, Any, list[Any], Any]]:
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


@stage(120, beside="operators", compares=True)
def correct(s: ModelSetting) -> Any:
    """Relative errors of every operator's value and gradients from its fp32 definition, and whether two runs agree."""

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


def layer_errors(s: ModelSetting) -> list[str]:
    """Of the logits and of all gradients together of two layers by functions.py, in bf16 with dropout, from the modules
    in fp32."""
    from benchmarks.workload import architecture
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
def kernels(s: ModelSetting) -> Any:
    """[ms, ms that its bytes take at 3 TB/s] of each kernel; for attention TFLOP/s beside torch's own."""
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


def attention_speeds(s: ModelSetting) -> dict[str, Any]:
    """{backend and dropout: TFLOP/s forward, and forward with backward}: the rows of attention_backends.py's table."""
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


@stage(40)
def variants(s: ModelSetting) -> Any:
    """What holds up the product with GELU, and a wider tile of it (gelu_variants.py)."""
    from benchmarks import gelu_variants

    return gelu_variants.measure(partial(s.ms, recorded=True), s.device, s.N)


@stage(60)
def tiles(s: ModelSetting) -> Any:
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
def chunks(s: ModelSetting) -> Any:
    """{tokens of a chunk: [ms, TFLOP/s, MiB beside inputs]} of the heads with their loss, forward and backward."""
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


def ours(s: ModelSetting, tokens: int, *, batches: int = 1, **changes: Any) -> Any:
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
def step(s: ModelSetting) -> Any:
    """Whole updates by token budget, as one graph and launch by launch: tokens/s, MFU, host ms, GiB."""
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
def fp8(s: ModelSetting) -> Any:
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
def profile(s: ModelSetting) -> Any:
    """Kernels of two micro-batches of 32,768 tokens, one by one, by name: OUT/kernels.txt; here the longest."""
    trainer = ours(s, 2 * s.N, graph=False, overlap=False)
    trainer.run()
    s.sync()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if s.on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as seen:
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


STAGES = (
    *(env, ceilings, correct, kernels, variants, tiles, chunks, step, fp8, profile),
    *(program, embed, zero, tests, learn, peers, bench),
)
"""In the order in which those that run alone do."""

if __name__ == "__main__":
    sys.exit(main(STAGES, ModelSetting, "benchmarks.first_light", __doc__))
