"""Vocabulary heads and loss, forward and backward; and the memory they take. Floor: the four GEMMs alone.

python -m pytest benchmarks/bench_linear_distill.py -s
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks._harness import DEVICE, OURS, compare
from fastdistil.kernels.linear_distill import linear_distill_loss, linear_distill_loss_reference

V, VOCAB = 30528, 30522
WEIGHTS = {"temperature": 2.0, "kd_scale": 5.0, "mlm_scale": 2.0, "vocab_size": VOCAB}
# (tokens, width of the student, of the teacher): DistilBERT on a GPU, MiniLM's width on the CPU.
CASES = (
    [(16384, 768, 768, "bfloat16")] if DEVICE == "cuda" else [(1024, 384, 384, "float32"), (1024, 384, 384, "bfloat16")]
)
MEMORY_CASE = (4096, 384, 384, "float32")


def make_inputs(num_tokens, student_width, teacher_width, dtype):
    kind = getattr(torch, dtype)

    def normal(*shape):
        return (0.5 * torch.randn(*shape, device=DEVICE)).to(kind)

    student = [normal(num_tokens, student_width), normal(V, student_width) / 8, normal(V)]
    teacher = [normal(num_tokens, teacher_width), normal(V, teacher_width) / 8, normal(V)]
    labels = torch.randint(VOCAB, (num_tokens,), device=DEVICE)
    labels = torch.where(torch.rand(num_tokens, device=DEVICE) < 0.15, labels, -100)
    return [x.requires_grad_() for x in student], teacher, labels


def backward(loss, student, teacher, labels):
    for leaf in student:
        leaf.grad = None
    loss(*student, *teacher, labels, **WEIGHTS).loss.backward()


def liger_peers(student, teacher, labels):
    """Liger's fused linears with a KL: without T^2 (all) and, but in the last, without biases and MLM term.

    The KL wants the teacher's probabilities, which are made here, whole.
    """
    from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports]
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    kl = liger.LigerFusedLinearKLDivLoss(reduction="sum", temperature=2.0, accum_dtype=torch.float32)
    jsd = liger.LigerFusedLinearJSD(jsd_beta=0.0, temperature=2.0)
    every_row = torch.zeros_like(labels)  # it leaves out rows whose label is -100
    chunked = LigerFusedLinearJSDLoss(beta=0.0, temperature=2.0)
    (h, w, b), (th, tw, tb) = student, teacher

    def run(loss):
        for leaf in student:
            leaf.grad = None
        loss.backward()

    return {
        "Liger fused linear KL": lambda: run(kl(h, w, (F.linear(th, tw, tb) / 2).softmax(-1))),
        "Liger fused linear JSD": lambda: run(jsd(h, w, th, tw, every_row)),
        "Liger chunked distillation": lambda: run(chunked(h, w, th, tw, labels, b, tb)),
    }


@pytest.mark.parametrize(("num_tokens", "student_width", "teacher_width", "dtype"), CASES)
def test_forward_and_backward(benchmark, num_tokens, student_width, teacher_width, dtype):
    student, teacher, labels = make_inputs(num_tokens, student_width, teacher_width, dtype)

    def eager(*args, **kwargs):
        return linear_distill_loss_reference(*args, **kwargs)

    compiled = torch.compile(eager)
    providers: dict[str, Callable[[], object]] = {
        OURS: lambda: backward(linear_distill_loss, student, teacher, labels),
        "eager PyTorch": lambda: backward(eager, student, teacher, labels),
        "torch.compile": lambda: backward(compiled, student, teacher, labels),
    }
    if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
        providers |= liger_peers(student, teacher, labels)
    hidden, weight = student[0].detach(), student[1].detach()
    dlogits = torch.randn(num_tokens, V, device=DEVICE, dtype=hidden.dtype)

    def gemms():
        F.linear(hidden, weight)
        F.linear(teacher[0], teacher[1])
        torch.mm(dlogits, weight)
        torch.mm(dlogits.t(), hidden)

    compare(
        benchmark,
        "linear_distill",
        f"{num_tokens} tokens, {student_width} / {teacher_width} x {V} {dtype}",
        providers,
        num_bytes=3 * num_tokens * V * hidden.element_size(),  # of the row kernel
        num_flops=2 * num_tokens * V * (3 * student_width + teacher_width),
        floor=gemms,
        budget_s=20.0,
    )


def _growth_mib(provider: str) -> float:
    """MiB that a call adds to the resident memory of a fresh process, at its peak."""
    code = f"from benchmarks.bench_linear_distill import print_growth; print_growth({provider!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_growth(provider: str) -> None:
    """Run in a process of its own. Linux: the kernel's own high-water mark, reset before the call."""
    student, teacher, labels = make_inputs(*MEMORY_CASE)
    loss = linear_distill_loss if provider == OURS else linear_distill_loss_reference
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    backward(loss, student, teacher, labels)
    print((_status_kib("VmHWM") - before) / 2**10)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(DEVICE == "cuda", reason="there, `compare` reports the peak of every provider")
def test_memory(benchmark):
    """The peak of ours against full logits, on the CPU."""
    ours, eager = _growth_mib(OURS), _growth_mib("eager PyTorch")
    num_tokens, *_ = MEMORY_CASE
    logits = 2 * num_tokens * V * 4 / 2**20
    gradients = (V * 385 + num_tokens * 384) * 4 / 2**20
    print(
        f"\npeak over the inputs, {num_tokens} tokens fp32: ours {ours:.0f} MiB (gradients, which any "
        f"implementation returns, {gradients:.0f}), eager {eager:.0f} MiB, both full logits {logits:.0f} MiB"
    )
    benchmark.extra_info.update({"ours_mib": ours, "eager_mib": eager, "full_logits_mib": logits})
    benchmark.pedantic(lambda: None, rounds=1)
    assert ours < 0.2 * eager
