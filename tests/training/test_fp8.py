"""The teacher's encoder in FP8. On the CPU, too, by PyTorch's own row-wise torch._scaled_mm."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels.fp8_rows import quantise_rows, quantise_rows_reference
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import Encoder, MaskedLM
from fastdistil.run.config import Config, DataConfig, TeacherConfig
from fastdistil.run.ranks import Place
from fastdistil.training import fp8, inputs
from fastdistil.training.preflight import resolve
from tests.support import toy
from tests.support.precision import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="a GPU without FP8"
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_linear_is_the_product_of_what_e4m3_holds(num_tokens, with_bias, gelu):
    """To bf16's rounding of the result, and the 2^-11 that Hopper's sums keep."""
    x, weight = normal(num_tokens, 64, seed=0), normal(48, 64, seed=1)
    bias = normal(48, seed=2) if with_bias else None
    gelu_bias = normal(64, seed=3) if gelu else None
    got = fp8.Fp8Linear(weight, bias, gelu_bias)(x)
    assert got.dtype == torch.bfloat16
    a, b = (q.double() * scale.double() for q, scale in (quantise_rows(x, gelu_bias), quantise_rows_reference(weight)))
    wanted = a @ b.T + (0 if bias is None else bias.double())
    allowed = 2**-8 * wanted.abs() + 2**-11 * (a.abs() @ b.abs().T)
    assert ((got.double() - wanted).abs() <= allowed).all()


def test_linear_is_a_linear_to_three_bits():
    x, weight, bias = normal(37, 256, seed=0), normal(48, 256, seed=1), normal(48, seed=2)
    gelu_bias = normal(256, seed=3)
    wanted = F.linear(F.gelu(x.double() + gelu_bias), weight.double(), bias.double())
    error = fp8.Fp8Linear(weight, bias, gelu_bias)(x).double() - wanted
    assert error.norm() < 2**-4 * wanted.norm()  # half a step for each factor, at random


def encoder(**changes: int) -> Encoder:
    """With a bias on every layer, that of ffn_in moving to where its GELU is."""
    architecture = toy.architecture(**changes)
    model = MaskedLM(architecture, generator=torch.Generator().manual_seed(1)).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(5.0) if p.ndim > 1 else None
            if name.endswith("bias"):
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model.encoder.requires_grad_(False)


def test_an_encoder_in_fp8_says_what_it_said():
    exact = encoder()
    bf16 = copy.deepcopy(exact).to(torch.bfloat16)
    low = copy.deepcopy(bf16)
    fp8.quantise(low)
    ids = torch.randint(5, 101, (48,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    positions = torch.arange(24, device=DEVICE).repeat(2)
    layout = sequence_layout([24, 24], torch.device(DEVICE))
    wanted, half, got = (e(ids, positions, layout).double() for e in (exact, bf16, low))
    errors = [((x - wanted).norm() / wanted.norm()).item() for x in (half, got)]
    assert errors[0] < errors[1] < 0.25, errors  # eight products, each 2^-5 or so off
    assert got.shape == wanted.shape


def test_every_linear_of_the_layers_and_no_more():
    low = encoder().to(torch.bfloat16)
    fp8.quantise(low)
    in_fp8 = {n for n, x in low.named_buffers() if x.dtype == torch.float8_e4m3fn}
    names = ("qkv", "attention_out", "ffn_in", "ffn_out")
    assert in_fp8 == {f"layers.{i}.{name}.weight_FD" for i in range(4) for name in names}
    assert {x.dtype for x in low.parameters()} == {torch.bfloat16}
    assert not [n for n, x in low.named_parameters() if x.ndim > 1 and "layers" in n]


def test_compiles_without_graph_breaks():
    linear = fp8.Fp8Linear(normal(48, 64, seed=1), None, normal(64, seed=3))
    x = normal(16, 64, seed=0)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))


def test_widths_have_to_be_whole_words():
    with pytest.raises(ValueError, match=r"divisible by 16, got 40 and 64 .*: use --teacher.prec"):
        fp8.quantise(encoder(hidden_size=40))


@pytest.mark.parametrize(("capability", "wanted"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_only_gpus_that_have_it(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    if wanted:
        fp8.require_device(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=r"wants a GPU of compute capability 8.9 .* got Old GPU"):
        fp8.require_device(torch.device("cuda", 0))


def test_a_run_on_a_cpu_is_refused(tmp_path):
    toy.make_teacher(tmp_path / "teacher", toy.make_shards(tmp_path / "shards", num_sequences=60))
    config = Config(
        data=DataConfig(shards=tmp_path / "shards"),
        teacher=TeacherConfig(path=tmp_path / "teacher", precision="fp8"),
        out=tmp_path / "run",
    )
    resolved, cpu = resolve(config, world_size=1, by_torchrun=False), torch.device("cpu")
    with pytest.raises(ValueError, match=r"--teacher.precision fp8 wants a GPU .* got the CPU"):
        inputs.load_models(resolved, place=Place(0, 1, cpu, None), dtype=torch.bfloat16)
