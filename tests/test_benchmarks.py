"""The benchmarks of operators as commands: what is right is timed, what is wrong is said, nothing is overwritten."""

import csv
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import _cli, _harness, _options, bench_attention, gelu_variants, hugging_face, workload
from benchmarks.__main__ import OPERATORS
from fastdistil.kernels.layout import sequence_layout
from tests.support import launch

pytestmark = pytest.mark.usefixtures("one_thread", "untouched")

TOY = {
    "attention": "--tokens 70 --lengths 32,wikipedia --head-widths 16 --heads 2 --dtype fp32,bf16",
    "cosine": "--rows 33 --widths 20 --forward --backward",
    "distill": "--rows 9 --vocab 50",
    "dropout": "--rows 33 --widths 20",
    "geglu": "--rows 33 --widths 20",
    "gelu": "--rows 130 --widths 7,20",
    "layernorm": "--rows 33 --widths 20",
    "linear_distill": "--rows 9 --widths 16 --teacher-width 32 --vocab 50",
    "rope": "--rows 33 --head-widths 6",
    "mixture": "--rows 9 --vocab 50 --teachers 2,3",
}
QUICK = "--device cpu --rounds 2 --providers"
GELU = [
    "--device",
    "cpu",
    "--rows",
    "130",
    "--widths",
    "20",
    "--dtype",
    "fp32",
    "--backward",
    "--providers",
    "ours,eager",
]
OWN = """
import torch
from torch.nn import functional as F


def right(x, bias):
    return F.gelu(x + bias)


def last_row(x, bias):
    return torch.cat([right(x, bias)[:-1], torch.zeros_like(x[-1:])])


def gradient(x, bias):
    out = right(x, bias)
    return 2 * out - out.detach()


def in_place(x, bias):
    with torch.no_grad():
        x += 1
    return right(x, bias)


def wide(x, bias):
    return right(x, bias).double()


def raising(x, bias):
    raise RuntimeError("no kernel image")
"""


@pytest.fixture(scope="module")
def untouched():
    """What is committed of earlier runs is the same after all of these."""
    before = {path: path.read_bytes() for path in _harness.RESULTS.iterdir()}
    yield
    assert {path: path.read_bytes() for path in _harness.RESULTS.iterdir()} == before


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with own.py, as the current one."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def run(name: str, *words: object) -> int:
    """The exit status of the command."""
    return importlib.import_module(f"benchmarks.bench_{name}").main([str(word) for word in words])


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "options"), [*((name, TOY[name]) for name in OPERATORS), ("layernorm", TOY["layernorm"] + " --pre-norm")]
)
def test_ours_is_right_and_timed_beside_pytorch(name, options, tmp_path, capsys):
    peer = "padded" if name == "attention" else "eager"
    assert run(name, *options.split(), *QUICK.split(), f"ours,{peer}", "--csv", tmp_path / "x.csv") == 0
    lines = lines_of(tmp_path / "x.csv")
    cases = {line["case"] for line in lines}
    assert len(cases) >= 2
    assert len(lines) == 3 * len(cases)  # and the floor
    for line in lines:
        assert line["status"] in ("ok", "unchecked")
        assert float(line["low_ms"]) <= float(line["median_ms"]) <= float(line["high_ms"])
        assert line["rounds"] == "2"
        assert line["torch"] == torch.__version__
        assert line["commit"]
        if line["provider"].startswith(_harness.OURS):
            assert line["status"] == "ok"
            assert float(line["error_value"]) < 0.05
            backward = line.get("backward") == "True"  # a mixture has none
            assert (float(line["error_gradient"]) < 0.1) if backward else not line["error_gradient"]
    printed = capsys.readouterr().out
    assert all(f"{name}: {case};" in printed for case in cases)
    assert "min to max" in printed  # two rounds make no interval


def test_attention_with_a_window_is_right_and_its_work_counted(capsys):
    length, window = 70, 20
    seen = sum(abs(row - column) <= window for row in range(length) for column in range(length))
    assert [bench_attention.pairs(length, w) for w in (0, window, 69, 70)] == [4900, seen, 4900, 4900]
    words = f"--tokens {length} --lengths {length} --head-widths 16 --heads 64 --dtype fp32 --dropout 0 --forward"
    assert run("attention", *words.split(), "--window", window, *QUICK.split(), "ours,padded") == 0
    assert f"window {window}, forward; " in capsys.readouterr().out
    assert run("attention", "--window", -1) != 0
    assert "--window wants a whole number of 0 or more, got -1" in capsys.readouterr().err


def test_own_kernels_beside_ours(own, capsys):
    functions = ("right", "last_row", "gradient", "in_place", "wide", "raising")
    also = [word for name in functions for word in ("--also", f"own:{name}")]
    assert run("gelu", *GELU, "--rounds", 6, *also, "--out", "x.json", "--csv", "x.csv") == 1
    printed = capsys.readouterr()
    assert "95 % interval" in printed.out
    rows = json.loads(Path("x.json").read_text())["cases"]["130 x 20 float32 forward+backward"]["providers"]
    assert len(rows["own:right"]["seconds"]) == 6
    assert rows["own:right"].keys() >= {"median_ms", "speedup", "times_ours", "error_value", "error_gradient"}
    # Neither keeps the others from being right, nor is it timed itself.
    assert rows[_harness.OURS]["rounds"] == 6
    wrong = {name: rows[f"own:{name}"].get("wrong", "") for name in functions}
    assert wrong["last_row"].startswith("the value is off by")
    assert wrong["gradient"].startswith("the gradient of x_NF is off by")
    assert "the gradient of bias_F" in wrong["gradient"]
    assert "it writes over its arguments" in wrong["in_place"]
    assert wrong["wide"] == "the value is (130, 20) float64, wanted (130, 20) float32"
    assert not any("median_ms" in rows[f"own:{name}"] for name in functions[1:])
    assert rows["own:raising"]["error"] == "RuntimeError: no kernel image (own.py, line 30)"
    assert "own:raising failed: RuntimeError: no kernel image (own.py, line 30)" in printed.out
    assert "not right: own:last_row in 1 of 1, own:gradient in 1 of 1" in printed.err
    statuses = {line["provider"]: line["status"] for line in lines_of(Path("x.csv"))}
    assert statuses["own:right"] == "ok"
    assert statuses["own:wide"] == "wrong"
    assert statuses["own:raising"] == "failed"


def test_a_wrong_kernel_is_timed_when_asked(own, capsys):
    assert run("gelu", *GELU, "--rounds", 2, "--also", "own:gradient", "--time-wrong", "--out", "x.json") == 1
    (case,) = json.loads(Path("x.json").read_text())["cases"].values()
    assert case["providers"]["own:gradient"].keys() >= {"wrong", "median_ms"}


def test_no_rounds_check_alone(own, capsys):
    assert run("gelu", *GELU, "--rounds", 0, "--also", "own:right") == 0
    printed = capsys.readouterr().out
    assert "value error" in printed
    assert "median" not in printed
    assert "floor" not in printed


def test_the_mask_of_dropout_is_part_of_the_definition(tmp_path, monkeypatch, capsys):
    code = "from torch.nn import functional as F\n\n\ndef own_mask(x, seed, *, stream, dropout_p):\n    "
    (tmp_path / "masks.py").write_text(code + "return F.dropout(x, dropout_p)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*TOY["dropout"].split(), *QUICK.split(), "ours", "--also", "masks:own_mask"]
    assert run("dropout", *words, "--dropout", 0.5) == 1
    assert "masks:own_mask is wrong: the value is off by" in capsys.readouterr().out


def test_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = [*TOY["gelu"].split(), *QUICK.split(), "ours", "--forward", "--plot"]
    assert run("gelu", *words, tmp_path / "new" / "x.png") == 0
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    find = importlib.util.find_spec
    monkeypatch.setattr(_options.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n))
    capsys.readouterr()
    assert run("gelu", *words, tmp_path / "y.png") == 2
    assert "--plot wants matplotlib, which is not installed: pip install 'fastdistil[eval]'" in capsys.readouterr().err


def test_results_go_where_they_are_asked_to(tmp_path, capsys):
    for rows in (5, 6):
        assert run("cosine", "--rows", rows, "--widths", 8, "--device", "cpu", "--rounds", 1, "--dtype", "fp32",
                   "--providers", "ours") == 0  # fmt: skip
    assert not list(tmp_path.iterdir())
    compare_toy(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cosine.")
    (kept,) = json.loads(path.read_text()).values()
    assert kept.keys() >= {"device", "torch", "commit", "bytes", "flops", "providers"}
    capsys.readouterr()
    _harness.main(tmp_path)
    assert "cosine: 12 x 8 float32" in capsys.readouterr().out


def compare_toy(folder: Path | None) -> list[Any]:
    """Times a toy as the pytest-benchmark test does; what it hands over."""
    module = importlib.import_module("benchmarks.bench_cosine")
    (case,) = module.cases(module.Cosine(rows=(12,), widths=(8,), dtype=("fp32",)))
    handed: list[Any] = []
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, rounds: handed.append(call))
    _cli.compare(benchmark, "cosine", case, folder)
    assert benchmark.extra_info["case"] == case.name
    return handed


def test_pytest_benchmark_has_the_same_cases():
    files = [f"benchmarks/bench_{name}.py" for name in OPERATORS]
    words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files, "--results", "nowhere"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=launch.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in OPERATORS:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        ids = [f"benchmarks/bench_{name}.py::test_{name}[{case}]" for case in module.usual_cases()]
        assert ids
        assert set(ids) <= set(done.stdout.splitlines())


MISTAKES = [
    (
        "--row 5",
        "there is no --row: did you mean --rows?\n  `python -m benchmarks.bench_gelu --help` shows all options",
    ),
    ("--rows 5,0", "wanted --rows INT,INT..., got 5,0"),
    ("--widths x", "wanted --widths INT,INT..., got x"),
    ("--dtype fp8", "wanted --dtype fp32,bf16,fp16, got fp8"),
    ("--rounds -1", "--rounds must be 0 or more, got -1"),
    ("--providers our,eager", "wants some of ours,eager,compile,cublas, got 'our' (did you mean ours?)"),
    ("--also gelu", "--also wants MODULE:FUNCTION, such as my_module:my_gelu, got 'gelu'"),
    ("--also kernels/own.py:right", "/kernels write own:right"),
    ("--also owm:right", "--also owm:right: no module owm (did you mean own?)"),
    ("--also nowhere.own:right", "no module nowhere.own: there is no nowhere.own.py in "),
    ("--also own:rigth", "own has no function rigth; it has right, last_row, gradient, in_place, wide, raising"),
    ("--also broken:f", "broken cannot be imported: ModuleNotFoundError: No module named 'not_installed'"),
    ("--results x --providers ours", "leave --providers, --also and --rounds 0 out"),
    ("--rounds 0 --plot x.png", "--plot draws times"),
    ("--product", "--product: there are two ways on a GPU alone"),
    ("--machine-code 90 --csv x.csv", "--machine-code times nothing: leave --csv, --plot, --out and --results out"),
    ("--plot own.py/x.png", "--plot own.py/x.png cannot be made: "),
]


@pytest.mark.parametrize(("words", "answer"), MISTAKES, ids=lambda x: x.split()[0] + x.split()[-1])
def test_mistakes(words, answer, own, capsys):
    (own / "broken.py").write_text("import not_installed\n")
    assert run("gelu", *words.split(), "--device", "cpu") == 2
    printed = capsys.readouterr()
    assert answer in printed.err
    assert not printed.out


def test_help_and_mistakes_do_not_wait_for_torch():
    modules = ", ".join(f"benchmarks.bench_{name} as {name}" for name in OPERATORS)
    code = f"import sys, benchmarks.__main__, {modules}\nfor m in ({', '.join(OPERATORS)}):\n    "
    code += "assert m.main(['--rowz', '1']) == 2\nprint({'torch', 'triton', 'matplotlib', 'pytest'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=launch.ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_what_there_is(capsys):
    importlib.import_module("benchmarks.__main__").main()
    printed = capsys.readouterr().out
    assert all(f"python -m benchmarks.bench_{name} " in printed for name in OPERATORS)
    assert "python -m benchmarks.step " in printed
    assert "aot_variants" not in printed  # no command


KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, bias_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z = tl.load(x_ptr + row * F + column, mask=column < F).to(tl.float32)
    z += tl.load(bias_ptr + column, mask=column < F)
    tl.store(out_ptr + row * F + column, z * 0.5 * (1 + tl.erf(z * 0.7071067811865476)), mask=column < F)


def gelu(x, bias):
    out = torch.empty_like(x)
    kernel[(len(x),)](x, bias, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out
"""


def test_a_kernel_in_triton_on_a_machine_without_a_gpu(tmp_path):
    """In Triton's interpreter it is checked, for a GPU that is not here it is compiled, and neither is a riddle."""
    (tmp_path / "mine.py").write_text(KERNEL)
    words = ["benchmarks.bench_gelu", "--forward", "--dtype", "bf16", "--also", "mine:gelu"]
    check = [*words, *["--device", "cpu", "--rows", "5", "--widths", "20", "--rounds", "0", "--providers", "ours"]]
    done = launch.run(*check, cwd=tmp_path, environment={"TRITON_INTERPRET": "1"})
    assert "wrong" not in done.stdout
    if not torch.cuda.is_available():
        done = launch.run(*check, cwd=tmp_path, ok=False)
        assert done.returncode == 1
        assert "Triton finds no GPU: TRITON_INTERPRET=1 before the command" in done.stdout
    done = launch.run(*words, "--machine-code", 90, cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ours", "gelu._forward_kernel"] in [line[:2] for line in lines]
    (mine,) = (line for line in lines if line[:2] == ["mine:gelu", "mine.kernel"])
    assert int(mine[2]) > 0
    assert mine[4:6] == ["0", "0"]  # spills, stack


def test_variants_of_the_product_with_gelu_compile():
    """They change lines of a kernel that changes, too."""
    done = launch.run("benchmarks.tiles", "--compile", "--only", "product with GELU")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("    ")]
    assert [line[-1] for line in lines] == ["compiled"] * 11
    assert sum("*" in line for line in lines) == 3
    assert sum(line[2] == "192" for line in lines) == 2


@pytest.mark.parametrize(
    ("changes", "source"), [("-a\n+b", "a\nc\n"), ("-a\n+b\n-c\n+d", "c\na\n"), ("-a\n-c\n+b", "x\na\nc\n")]
)
def test_a_variant_changes_lines_that_stand_there_once(changes, source):
    assert "b\n" in gelu_variants.changed(source, changes)
    for wrong in (source + source, source.replace("a", "aa")):
        with pytest.raises(ValueError, match=r"to be changed once, stands there [02] times"):
            gelu_variants.changed(wrong, changes)


def test_the_definition_in_parts_is_the_definition(monkeypatch):
    module = importlib.import_module("benchmarks.bench_linear_distill")
    options = module.LinearDistill(rows=(9,), widths=(16,), vocab=(50,), dtype=("fp32",))
    (case,) = module.cases(options)
    truths = []
    for part in (1000, 4):
        monkeypatch.setattr(_harness, "PART", part)
        torch.manual_seed(0)
        truths.append(_harness.Judge(case.build(device="cpu", **case.sizes)).truth)
    assert [x.dtype for x in truths[0]] == [torch.float64] * 4
    for whole, parts in zip(*truths, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", ["toy", "modernbert-toy"])
def test_the_step_s_peers_have_our_models_and_their_own_heads(size):
    """Teacher and student in transformers: its logits are ours, and what Liger's losses multiply makes them."""
    ids, layout = torch.randint(1000, workload.VOCAB, (150,)), sequence_layout([150])
    for model in workload.models(size):
        theirs = hugging_face._hugging_face(model).eval()
        with torch.no_grad():
            ours = model.eval()(ids, torch.arange(150), layout)
            found = theirs(input_ids=ids[None].to(theirs.device), output_hidden_states=True)
            logits = theirs.get_output_embeddings()(hugging_face._transformed(theirs, found.hidden_states[-1]))
        torch.testing.assert_close(found.logits[0].cpu(), ours, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits, found.logits)


def test_nan_is_wrong():
    problem = importlib.import_module("benchmarks.bench_gelu").bias_gelu(
        rows=5, width=3, dtype="float32", backward=False, device="cpu"
    )
    with pytest.raises(_harness.Wrong, match="the value is off by nan"):
        _harness.Judge(problem).errors(lambda x, bias: F.gelu(x + bias) * torch.nan)


def test_the_interval_of_the_median():
    """Ranks as in Conover, Practical Nonparametric Statistics: of 100 values the 41st and the 60th, or one outside."""
    low, high = _harness.interval([float(i) for i in range(1, 101)])
    assert 39 <= low <= 41
    assert 60 <= high <= 62
    assert _harness.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_a_round_on_a_gpu_flushes_before_each_call_and_waits_once(monkeypatch):
    told = []
    numbers = itertools.count(1)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = next(numbers)

        def record(self):
            told.append("record")

        def elapsed_time(self, other):
            assert told[-1] == "synchronize"
            return 1e3 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    calls = [lambda: told.append("one"), lambda: told.append("two")]
    assert _harness._round_on_gpu(calls, lambda: told.append("flush")) == [1.0, 1.0]
    each = ["flush", "record", "CALL", "record"]
    assert told == [w.replace("CALL", "one") for w in each] + [w.replace("CALL", "two") for w in each] + ["synchronize"]
