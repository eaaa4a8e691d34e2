"""Vocabulary heads and loss, forward and backward; and the memory they take. Floor: the four GEMMs alone.

python -m benchmarks.bench_linear_distill --rows 1024 --widths 384,768 --vocab 30522
python -m pytest benchmarks/bench_linear_distill.py -s
"""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._cli import benchmark, compare
from benchmarks._options import Case, Options, Sizes

if TYPE_CHECKING:
    from benchmarks._harness import Problem, Provider

WEIGHTS = {"temperature": 2.0, "kd_scale": 5.0, "mlm_scale": 2.0}
MEMORY_CASE: dict[str, Any] = dict(rows=4096, width=384, teacher_width=384, vocab=30522, dtype="float32", device="cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDistill(Options):
    """Check and time linear_distill_loss(student_ND, student_weight_VD, student_bias_V, teacher_ND, teacher_weight_VE,
    teacher_bias_V, labels_N, temperature=..., kd_scale=..., mlm_scale=..., vocab_size=...); a kernel of your own may
    return the loss alone."""

    rows: Sizes = ()
    """Tokens. Without it 1,024, on a GPU 16,384."""
    widths: Sizes = ()
    """Widths of the student. Without it 384, on a GPU 768: MiniLM's and DistilBERT's."""
    teacher_width: int | None = None
    """Width of the teacher. None: that of the student."""
    vocab: Sizes = (30522,)
    """Words; the heads have as many rows, rounded up to a multiple of 16."""


def cases(options: LinearDistill) -> Iterator[Case]:
    rows, widths = options.rows or options.usual((1024,), (16384,)), options.widths or options.usual((384,), (768,))
    for n, width, vocab, dtype, backward in itertools.product(
        rows, widths, options.vocab, options.dtypes(), options.passes(True)
    ):
        of_teacher = options.teacher_width or width
        name = f"{n} tokens, {width} / {of_teacher} x {columns(vocab)} {dtype}{'' if backward else ', forward'}"
        sizes = {"rows": n, "width": width, "teacher_width": of_teacher, "vocab": vocab, "dtype": dtype}
        yield Case(name, sizes | {"backward": backward}, linear_distill)


def columns(vocab: int) -> int:
    """Of the logits: padded, as the trained models have them."""
    return -(-vocab // 16) * 16


def inputs(*, rows: int, width: int, teacher_width: int, vocab: int, dtype: str, device: str) -> list[Any]:
    """The seven arguments of the loss."""
    import torch

    def normal(*shape):
        return (0.5 * torch.randn(*shape, device=device)).to(getattr(torch, dtype))

    V = columns(vocab)
    heads = [[normal(rows, D), normal(V, D) / 8, normal(V)] for D in (width, teacher_width)]
    labels = torch.randint(vocab, (rows,), device=device).masked_fill_(torch.rand(rows, device=device) > 0.15, -100)
    return [*heads[0], *heads[1], labels]


def linear_distill(*, backward: bool, device: str, **sizes: Any) -> "Problem":
    import torch
    from torch.nn import functional as F

    from benchmarks._harness import Problem, pytorch_and_ours
    from fastdistil.kernels.linear_distill import linear_distill_loss, linear_distill_loss_reference

    arguments = inputs(device=device, **sizes)
    for x in arguments[:3]:
        x.requires_grad_(backward)

    def eager(*args, **kwargs):
        return linear_distill_loss_reference(*args, **kwargs)

    providers = pytorch_and_ours(linear_distill_loss, eager)
    if backward and device == "cuda" and importlib.util.find_spec("liger_kernel"):
        providers |= liger_peers(*arguments)
    hidden, weight, _, of_teacher, teachers_weight, *_ = (x.detach() for x in arguments)
    N, V = len(hidden), len(weight)
    dlogits = torch.randn(N, V, device=device, dtype=hidden.dtype) if backward else torch.empty(0)

    def gemms():
        F.linear(hidden, weight)
        F.linear(of_teacher, teachers_weight)
        if backward:
            torch.mm(dlogits, weight)
            torch.mm(dlogits.t(), hidden)

    return Problem(
        arguments=arguments,
        options=WEIGHTS | {"vocab_size": sizes["vocab"]},
        trained=range(3) if backward else (),
        definition=linear_distill_loss_reference,
        rowwise=[0, 3, 6],
        providers=providers,
        num_bytes=(2 + backward) * N * V * hidden.element_size(),  # of the row kernel
        num_flops=2 * N * V * ((1 + 2 * backward) * hidden.shape[1] + of_teacher.shape[1]),
        floor=gemms,
        budget_s=20.0,
    )


def liger_peers(h, w, b, th, tw, tb, labels) -> dict[str, "Provider"]:
    """Liger's fused linears with a KL: without T^2 (all) and, but in the last, without biases and MLM term.

    The KL wants the teacher's probabilities, which are made here, whole.
    """
    import torch
    from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports]
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F

    from benchmarks._harness import Provider

    kl = liger.LigerFusedLinearKLDivLoss(reduction="sum", temperature=2.0, accum_dtype=torch.float32)
    jsd = liger.LigerFusedLinearJSD(jsd_beta=0.0, temperature=2.0)
    every_row = torch.zeros_like(labels)  # it leaves out rows whose label is -100
    chunked = LigerFusedLinearJSDLoss(beta=0.0, temperature=2.0)

    def peer(title, why, loss):
        return Provider(title, lambda: torch.autograd.grad(loss(), [h, w, b], allow_unused=True), why, True)

    return {
        "liger-kl": peer("Liger fused linear KL", "KL alone", lambda: kl(h, w, (F.linear(th, tw, tb) / 2).softmax(-1))),
        "liger-jsd": peer("Liger fused linear JSD", "KL alone", lambda: jsd(h, w, th, tw, every_row)),
        "liger-chunked": peer("Liger chunked distillation", "no T^2", lambda: chunked(h, w, th, tw, labels, b, tb)),
    }


def _growth_mib(provider: str) -> float:
    """MiB that a call adds to the resident memory of a fresh process, at its peak."""
    code = f"from benchmarks.bench_linear_distill import print_growth; print_growth({provider!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_growth(provider: str) -> None:
    """Run in a process of its own. Linux: the kernel's own high-water mark, reset before the call."""
    from fastdistil.kernels.linear_distill import linear_distill_loss, linear_distill_loss_reference

    arguments = inputs(**MEMORY_CASE)
    for x in arguments[:3]:
        x.requires_grad_()
    loss = linear_distill_loss if provider == "ours" else linear_distill_loss_reference
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    loss(*arguments, **WEIGHTS, vocab_size=MEMORY_CASE["vocab"]).loss.backward()
    print((_status_kib("VmHWM") - before) / 2**10)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def usual_cases() -> Iterator[Case]:
    return cases(LinearDistill())


def test_linear_distill(benchmark, case, results):
    compare(benchmark, "linear_distill", case, results)


def test_memory(benchmark):
    """The peak of ours against full logits, on the CPU."""
    import pytest

    if LinearDistill().on == "cuda":
        pytest.skip("there, every table has the peak of every provider")
    ours, eager = _growth_mib("ours"), _growth_mib("eager")
    num_tokens, V = MEMORY_CASE["rows"], columns(MEMORY_CASE["vocab"])
    logits = 2 * num_tokens * V * 4 / 2**20
    gradients = (V * 385 + num_tokens * 384) * 4 / 2**20
    print(
        f"\npeak over the inputs, {num_tokens} tokens fp32: ours {ours:.0f} MiB (gradients, which any "
        f"implementation returns, {gradients:.0f}), eager {eager:.0f} MiB, both full logits {logits:.0f} MiB"
    )
    benchmark.extra_info.update({"ours_mib": ours, "eager_mib": eager, "full_logits_mib": logits})
    benchmark.pedantic(lambda: None, rounds=1)
    assert ours < 0.2 * eager


main = benchmark("linear_distill", LinearDistill, cases)

if __name__ == "__main__":
    sys.exit(main())
