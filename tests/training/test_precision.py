"""The teacher in low precision: its encoder in FP8, on the CPU by PyTorch's own torch._scaled_mm, and its drift."""

import copy
import logging
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels.fp8_rows import quantise_rows, quantise_rows_reference
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import Encoder
from fastdistil.model.weights import load_masked_lm
from fastdistil.run.config import Config, DataConfig, LossConfig, TeacherConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training import inputs
from fastdistil.training.precision import Fp8Linear, kl_sum, quantise_encoder, require_fp8, require_small_drift
from fastdistil.training.preflight import resolve
from fastdistil.training.teacher import RemoteTeacher, Split, Teacher
from tests.support import forked, toy
from tests.support.runs import arguments
from tests.support.updates import CPU, DEVICE, make_batches, make_teacher

needs_fp8 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="a GPU without FP8"
)
ALONE = Ranks(0, 1, DEVICE)
PRODUCT = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]


def rowwise(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
    """torch._scaled_mm with a scale a row from the one with a scale a tensor: scales leave the sum over K unchanged."""
    one = torch.ones((), device=a.device)
    product = PRODUCT(a, b, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=use_fast_accum)
    product = product * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)


@pytest.fixture(autouse=True)
def scales_of_rows(monkeypatch):
    """PyTorch 2.11 has them on CUDA alone, where a run wants them: on a CPU they came after it."""
    if DEVICE.type == "cpu" and torch.__version__ < "2.13":
        monkeypatch.setattr(torch, "_scaled_mm", rowwise)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)


@needs_fp8
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_linear_is_the_product_of_what_e4m3_holds(num_tokens, with_bias, gelu):
    """To bf16's rounding of the result, and the 2^-11 that Hopper's sums keep."""
    x, weight = normal(num_tokens, 64, seed=0), normal(48, 64, seed=1)
    bias = normal(48, seed=2) if with_bias else None
    gelu_bias = normal(64, seed=3) if gelu else None
    got = Fp8Linear(weight, bias, gelu_bias)(x)
    assert got.dtype == torch.bfloat16
    a, b = (q.double() * scale.double() for q, scale in (quantise_rows(x, gelu_bias), quantise_rows_reference(weight)))
    wanted = a @ b.T + (0 if bias is None else bias.double())
    allowed = 2**-8 * wanted.abs() + 2**-11 * (a.abs() @ b.abs().T)
    assert ((got.double() - wanted).abs() <= allowed).all()


@needs_fp8
def test_linear_is_a_linear_to_three_bits():
    x, weight, bias = normal(37, 256, seed=0), normal(48, 256, seed=1), normal(48, seed=2)
    gelu_bias = normal(256, seed=3)
    wanted = F.linear(F.gelu(x.double() + gelu_bias), weight.double(), bias.double())
    error = Fp8Linear(weight, bias, gelu_bias)(x).double() - wanted
    assert error.norm() < 2**-4 * wanted.norm()  # half a step for each factor, at random


def encoder(**changes: Any) -> Encoder:
    """With a bias on every layer, that of ffn_in moving to where its GELU is."""
    model = toy.steep(toy.architecture(**changes), seed=1).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model.encoder.requires_grad_(False)


@needs_fp8
@pytest.mark.parametrize("changes", [{}, toy.MODERNBERT], ids=["BERT", "ModernBERT"])
def test_an_encoder_in_fp8_says_what_it_said(changes):
    exact = encoder(**changes)
    bf16 = copy.deepcopy(exact).to(torch.bfloat16)
    low = copy.deepcopy(bf16)
    quantise_encoder(low)
    ids = torch.randint(5, 101, (48,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    positions = torch.arange(24, device=DEVICE).repeat(2)
    layout = sequence_layout([24, 24], DEVICE)
    wanted, half, got = (e(ids, positions, layout).double() for e in (exact, bf16, low))
    errors = [((x - wanted).norm() / wanted.norm()).item() for x in (half, got)]
    assert errors[0] < errors[1] < 0.25, errors  # eight products, each 2^-5 or so off
    assert got.shape == wanted.shape


@needs_fp8
@pytest.mark.parametrize("changes", [{}, toy.MODERNBERT], ids=["BERT", "ModernBERT"])
def test_every_linear_of_the_layers_and_no_more(changes):
    low = encoder(**changes).to(torch.bfloat16)
    quantise_encoder(low)
    in_fp8 = {n for n, x in low.named_buffers() if x.dtype == torch.float8_e4m3fn}
    names = ("qkv", "attention_out", "ffn_in", "ffn_out")
    assert in_fp8 == {f"layers.{i}.{name}.weight_FD" for i in range(4) for name in names}
    assert {x.dtype for x in low.parameters()} == {torch.bfloat16}
    assert not [n for n, x in low.named_parameters() if x.ndim > 1 and "layers" in n]


@needs_fp8
def test_compiles_without_graph_breaks():
    linear = Fp8Linear(normal(48, 64, seed=1), None, normal(64, seed=3))
    x = normal(16, 64, seed=0)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))


@needs_fp8
def test_widths_have_to_be_whole_words():
    with pytest.raises(ValueError, match=r"divisible by 16, got 40 and 64 .*: use --teacher.prec"):
        quantise_encoder(encoder(hidden_size=40))


@pytest.mark.parametrize(("capability", "wanted"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_only_gpus_that_have_it(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    if wanted:
        require_fp8(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=r"wants a GPU of compute capability 8.9 .* got Old GPU"):
        require_fp8(torch.device("cuda", 0))


def test_a_run_on_a_cpu_is_refused(root, tmp_path):
    config = Config(
        data=DataConfig(shards=(str(root / "shards"),)),
        teacher=TeacherConfig(path=root / "teacher", precision="fp8"),
        out=tmp_path / "run",
    )
    resolved = resolve(config, world_size=1, by_torchrun=False)
    with pytest.raises(ValueError, match=r"--teacher.precision fp8 wants a GPU .* got the CPU"):
        inputs.load_models(resolved, Ranks(0, 1, CPU), inputs.load_corpus(resolved, rank=0, world_size=1))


# --- drift


def config(root, **changes: Any) -> TeacherConfig:
    return TeacherConfig(path=root / "teacher", precision="bf16", **changes)


def definition(low: Teacher, exact: Teacher, batches) -> tuple[float, int]:
    """Whole logits, in fp64 but for the products that are a teacher's own."""
    nats = num_tokens = 0
    for batch in batches:
        n = batch.num_tokens
        assert n < len(batch.input_ids)  # there is padding to leave out
        log_p, log_q = (t.head(t.hidden(batch))[:n].double().log_softmax(-1) for t in (low, exact))
        nats, num_tokens = nats + (log_p.exp() * (log_p - log_q)).sum().item(), num_tokens + n
    return nats, num_tokens


def test_the_definition(folder):
    _, batches = make_batches(folder, 2)
    low, exact = make_teacher(folder, dtype=torch.bfloat16), make_teacher(folder)
    with torch.no_grad():
        for teacher in (low, exact):
            teacher.head.norm.weight.mul_(4)  # far from flat: temperatures differ
    wanted, _ = definition(low, exact, batches[:1])
    batch = batches[0]
    got = kl_sum(exact(batch), low(batch), batch, vocab_size=101).item()
    assert got == pytest.approx(wanted, rel=1e-2)
    assert kl_sum(exact(batch), exact(batch), batch, vocab_size=101).item() < wanted / 1000


def test_the_mean_over_two_micro_batches_of_every_rank_is_said(folder, caplog, monkeypatch):
    _, batches = make_batches(folder, 2)
    low, exact = make_teacher(folder, dtype=torch.bfloat16), make_teacher(folder)
    nats, num_tokens = definition(low, exact, batches)

    other = torch.tensor([nats / 2, 2.0 * num_tokens], device=DEVICE)
    monkeypatch.setattr(Ranks, "sum", lambda ranks, x: x + other)

    def no_more():
        raise AssertionError("a third micro-batch was made")
        yield

    with caplog.at_level(logging.INFO, "fastdistil"):
        require_small_drift(low, config(folder), chain(batches, no_more()), ALONE, vocab_size=101)
    (line,) = caplog.messages
    mean = 1.5 * nats / (3 * num_tokens)
    said = f"teacher in bf16: drift {mean:.1e} nats a token from fp32, bound 5.0e-02"
    assert line == said


def test_beyond_the_bound_is_refused(folder):
    _, batches = make_batches(folder, 2)
    low = make_teacher(folder, dtype=torch.bfloat16)
    message = (
        r"--teacher.precision bf16 wants a teacher within 1.0e-08 nats .* got drift \d.\de-0\d .*: "
        "use --teacher.precision fp32, or a larger --teacher.max-drift"
    )
    with pytest.raises(ValueError, match=message):
        require_small_drift(low, config(folder, max_drift=1e-8), batches, ALONE, vocab_size=101)
    with torch.no_grad():
        low.head.bias[3] = float("nan")
    with pytest.raises(ValueError, match="got drift nan"):
        require_small_drift(low, config(folder), batches, ALONE, vocab_size=101)


def test_without_a_head_hidden_states_are_compared(folder, caplog):
    loss = LossConfig(kd=0.0, mlm=0.0, cosine=1.0)
    _, batches = make_batches(folder, 2)
    low, exact = (make_teacher(folder, loss=loss, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert low.head is None
    mine, its = (torch.cat([t.hidden(b)[: b.num_tokens].double() for b in batches]) for t in (low, exact))
    wanted = (1 - F.cosine_similarity(mine, its)).mean().item()
    with caplog.at_level(logging.INFO, "fastdistil"):
        require_small_drift(low, config(folder), batches, ALONE, vocab_size=101)
    (line,) = caplog.messages
    drift = float(line.split("drift ")[1].split()[0])
    assert drift == pytest.approx(wanted, rel=0.06)  # as many digits are said
    assert drift > 1e-6
    assert line.endswith(" (1 - cos) from fp32, bound 5.0e-02")
    with pytest.raises(ValueError, match=r"wants a teacher within 1.0e-08 \(1 - cos\) of itself in fp32"):
        require_small_drift(low, config(folder, max_drift=1e-8), batches, ALONE, vocab_size=101)


def test_fp32_is_not_measured(folder, caplog):
    with caplog.at_level(logging.INFO, "fastdistil"):
        require_small_drift(make_teacher(folder), TeacherConfig(), [], ALONE, vocab_size=101)
    assert not caplog.messages


def test_a_remote_teacher_is_asked(folder, caplog):
    """Its hidden states come over the link, for the micro-batches of the validation, from 0."""
    _, batches = make_batches(folder, 2)
    low, asked = make_teacher(folder, dtype=torch.bfloat16), []

    def ask(question, answer):
        asked.append(question)
        return lambda: answer.copy_(low.hidden(batches[question[1]]))

    model = load_masked_lm(folder / "teacher", need_head=True)
    link: Any = SimpleNamespace(ask=ask)
    remote = RemoteTeacher(model, link, device=DEVICE, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, "fastdistil"):
        require_small_drift(low, config(folder), batches, ALONE, vocab_size=101)
        require_small_drift(remote, config(folder), batches, ALONE, vocab_size=101)
    assert asked == [(Split.VALIDATION, 0), (Split.VALIDATION, 1)]
    assert caplog.messages[0] == caplog.messages[1]


def test_a_run_on_two_ranks_says_it_or_is_refused(root, tmp_path):
    """One line, or one error, nobody left waiting and nothing written."""
    few = {"teacher__precision": "bf16", "optim__duration": 1}
    done = forked.run(*arguments(root, tmp_path / "run", **few), ranks=2)
    assert done.stdout.count("teacher in bf16: drift ") == 1
    refused = forked.run(*arguments(root, tmp_path / "no", **few, teacher__max_drift=1e-9), ranks=2, ok=False)
    assert refused.returncode != 0
    assert refused.stderr.count("error: --teacher.precision bf16 wants") == 1
    assert not (tmp_path / "no").exists()
