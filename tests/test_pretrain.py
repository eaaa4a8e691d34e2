"""The main job as a user runs it: in one process and by torchrun, stopped, resumed, misused."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fastdistil.model.weights import load_masked_lm
from fastdistil.run import checkpoint
from fastdistil.run.command import STOPPED
from tests.support import forked, launch, runs, toy
from tests.support.launch import options
from tests.support.runs import arguments, exact_metrics, metrics_of, same, tensors_of


def test_what_a_run_says_and_leaves(quiet):
    run, printed = quiet
    for line in (
        "teacher: 40,805 parameters (4 layers, 32 wide)",
        "student: 23,653 parameters (2 layers, 32 wide) from layers 0 3 of",
        "text: 12,248 tokens in 400 sequences, 40 held out",
        "12 updates of 3 micro-batches of 256 tokens",
        "(matrix product of 1024 in float32 on",
        "attention: fused (student), sdpa (teacher)",
        "update 12/12  loss",
        "GiB  0:00:00 left",
    ):
        assert line in printed
    records = metrics_of(run)
    assert [r["update"] for r in records if r["split"] == "train"] == list(range(1, 13))
    assert [r["update"] for r in records if r["split"] == "validation"] == [6, 12]
    assert {"loss", "kd", "mlm", "cosine", "agreement"} <= records[-1].keys()
    first, last = records[0], [r for r in records if r["split"] == "train"][-1]
    assert last["loss"] < first["loss"]
    assert first["lr"] == 0  # the authors' schedule
    config = json.loads((run / "config.json").read_text())
    assert config["layers"] == [0, 3]
    assert config["machine"].endswith((" thread", " threads")) or "×" in config["machine"]
    assert (run / "tokenizer/vocab.txt").is_file()
    assert list((run / "tensorboard").iterdir())
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["update-00000005", "update-00000010", "update-00000012"]


def stopped_and_resumed(root, run, straight, *, ranks, **changes):
    """Stop a run by SIGTERM after update 7 and resume it: metrics, weights and moments of `straight`, bit for bit."""
    words = arguments(root, run, **changes | {"log__every": 1, "resume": "auto"})
    process = launch.start_until("update 7/12", launch.command(*words, ranks=ranks))
    process.send_signal(signal.SIGTERM)
    rest = launch.rest_of(process)
    assert process.returncode == (STOPPED if ranks is None else 1)  # torchrun has its own
    assert "stopped after update" in rest
    stopped = metrics_of(run)[-1]["update"]
    assert 7 <= stopped < 12
    assert (run / "checkpoints" / f"update-{stopped:08d}").is_dir()
    done = launch.run(*words, ranks=ranks)
    assert f"resuming after update {stopped} of 12" in done.stdout
    assert exact_metrics(run) == exact_metrics(straight)
    assert same(tensors_of(run, 12), tensors_of(straight, 12))


def resumed_when_finished(root, run, straight, *, ranks, **changes):
    again = forked.run(*arguments(root, run, **changes, resume="auto"), ranks=ranks)
    assert f"the run in {run} is finished, after update 12; a larger" in again.stdout
    assert f"next: python -m fastdistil.export {run} --out {run}-model" in again.stdout
    assert "memory:" not in again.stdout  # nothing was loaded
    assert exact_metrics(run) == exact_metrics(straight)


def test_stopped_and_resumed_is_bitwise_the_run_that_never_stopped_whoever_makes_its_batches(root, quiet, tmp_path):
    """Mid-epoch, dropout on. Two worker processes in place of none change nothing either."""
    run, changes = tmp_path / "run", {"ranks": None, "data__num_workers": 2}
    stopped_and_resumed(root, run, quiet.run, **changes)
    resumed_when_finished(root, run, quiet.run, **changes)


def test_ranks_stopped_and_resumed_are_bitwise_the_ranks_that_never_stopped(root, quiet_two, tmp_path):
    """ZeRO-3 in bf16 on two ranks, which divide neither the update nor the parameters."""
    run, changes = tmp_path / "run", {"ranks": 2, **runs.TWO}
    stopped_and_resumed(root, run, quiet_two.run, **changes)
    resumed_when_finished(root, run, quiet_two.run, **changes)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {"engine__zero_stage": 0}), (2, {"engine__zero_stage": 2}), (3, runs.TWO)],
    ids=["zero-0-of-2-ranks", "zero-2-of-2-ranks", "zero-3-of-3-ranks-bf16"],
)
def test_more_ranks_stopped_and_resumed(root, tmp_path, ranks, changes):
    straight, run = tmp_path / "straight", tmp_path / "run"
    launch.run(*arguments(root, straight, **changes), ranks=ranks)
    stopped_and_resumed(root, run, straight, ranks=ranks, **changes)
    resumed_when_finished(root, run, straight, ranks=ranks, **changes)


def test_killed_and_resumed_on_another_number_of_ranks(root, quiet, tmp_path):
    """SIGKILL after the checkpoint of update 5; on by two ranks with ZeRO-3: the same sequences, losses within 1e-5."""
    run = tmp_path / "run"
    process = launch.start_until("update 7/12", launch.command(*arguments(root, run, log__every=1)))
    process.kill()
    process.wait(timeout=60)
    forked.run(*arguments(root, run, resume="auto", engine__zero_stage=3), ranks=2)
    got, wanted = exact_metrics(run), exact_metrics(quiet.run)
    assert [[x for x in a if x[0] in ("split", "update", "tokens", "masked")] for a in got] == [
        [x for x in a if x[0] in ("split", "update", "tokens", "masked")] for a in wanted
    ]
    for a, b in zip(got, wanted, strict=True):
        for (name, x), (_, y) in zip(a, b, strict=True):
            if name in ("loss", "kd", "mlm", "cosine"):
                assert float.fromhex(x) == pytest.approx(float.fromhex(y), rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "recipe", "classes"),
    [
        ({"num_layers": 2, "token_types": 2}, "quickstart", ("BertForMaskedLM", "DistilBertForMaskedLM")),
        ({"num_layers": 6, "family": "modernbert"}, "modernbert", ("ModernBertForMaskedLM",) * 2),
    ],
    ids=["BERT", "ModernBERT"],
)
def test_text_to_hugging_face(tmp_path, sizes, recipe, classes):
    """prepare -> mlm (a teacher) -> distil -> export -> transformers, by the commands of the README."""
    sentence = "the cat sat on a mat and looked at some birds in trees of green"
    words = sentence.split()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(words[(i * k) % 15] for k in range(5, 40)) for i in range(1, 300)))
    forked.run("fastdistil.prepare", text, "--tokenizer", "train:200", "--max-length", 64, "--out", tmp_path / "shards")
    common = [*runs.SHORT, "--data.shards", tmp_path / "shards"]
    size = options(student__hidden_size=32, student__num_heads=2, **{f"student__{k}": v for k, v in sizes.items()})
    forked.run("fastdistil.pretrain", "mlm", "--out", tmp_path / "teacher-run", *size, *common)
    forked.run("fastdistil.export", tmp_path / "teacher-run", "--out", tmp_path / "teacher")
    given = ["--out", tmp_path / "run", "--teacher.path", tmp_path / "teacher", *common]
    forked.run("fastdistil.pretrain", recipe, *given)
    forked.run("fastdistil.export", tmp_path / "run", "--out", tmp_path / "student")
    import transformers

    model, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert type(model).__name__ == classes[1]
    assert model.config.num_hidden_layers == sizes["num_layers"] // 2
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    logits = model(**tokenizer("the cat sat on a [MASK]", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "teacher")).__name__ == classes[0]


def test_an_encoder_gets_a_head_that_begins_with_what_is_known(root, tmp_path):
    """And trains faster than the encoder; a run in two pieces is the same, bit for bit."""
    encoder = shutil.copytree(root / "teacher", tmp_path / "encoder")
    runs.take_head_away(encoder)
    given = ["fastdistil.pretrain", "mlm", *runs.SHORT, *options(student__init=encoder, data__shards=root / "shards")]
    given += options(log__every=1, log__checkpoint_every=1, log__keep_checkpoints=99, resume="auto")
    run, pieces = tmp_path / "run", tmp_path / "pieces"
    printed = forked.run(*given, "--out", run).stdout
    assert "has no masked-LM head: it gets a fresh one" in printed
    assert metrics_of(run)[0]["lr"] == 0
    first, last = (tensors_of(run, update) for update in (1, 12))
    assert torch.equal(first["head.dense.weight"], torch.eye(32))
    moved = {name: (last[name] - first[name]).abs().max() for name in first}
    assert moved["head.dense.weight"] > 2 * moved["encoder.layers.0.ffn_in.weight"] > 0
    # One that started from an older checkpoint, whose first weights nobody reads.
    shutil.copytree(run, pieces)
    for folder in sorted((pieces / "checkpoints").iterdir())[4:]:
        shutil.rmtree(folder)
    shutil.rmtree(encoder)
    forked.run(*given, "--out", pieces)
    runs.same_ends(run, pieces)


class TestMistakes:
    """One message, exit status 2, and nothing written."""

    def refused(self, *args: str, ranks: int | None = None) -> str:
        done = forked.run(*args, ok=False) if ranks is None else launch.run(*args, ok=False, ranks=ranks)
        assert done.returncode == (2 if ranks is None else 1)  # torchrun has its own
        assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed")[0]
        return done.stderr

    def test_a_teacher_without_a_head(self, root, tmp_path):
        headless = shutil.copytree(root / "teacher", tmp_path / "headless")
        runs.take_head_away(headless)
        load_masked_lm(headless, need_head=False)
        message = self.refused(*arguments(root, tmp_path / "run", teacher__path=headless))
        assert "mlm" in message
        assert not (tmp_path / "run").exists()

    def test_an_edited_shard_found_by_another_rank(self, root, tmp_path):
        shards = shutil.copytree(root / "shards", tmp_path / "shards")
        path = shards / "shard-00000.tokens"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        message = self.refused(*arguments(root, tmp_path / "run", data__shards=shards))
        assert "shard-00000.tokens was changed" in message
        message = self.refused(*arguments(root, tmp_path / "run", data__shards=shards), ranks=2)
        # One rank says it at once, and torchrun last, below its own traceback.
        said, cause = message.split("Root Cause (first observed failure):")
        assert said.count("error: ") == said.count("shard-00000.tokens was changed") == 1
        assert "shard-00000.tokens was changed" in cause.splitlines()[-2]

    def test_a_truncated_shard(self, root, tmp_path):
        shards = shutil.copytree(root / "shards", tmp_path / "shards")
        path = shards / "shard-00001.tokens"
        path.write_bytes(path.read_bytes()[:-2])
        assert "shard-00001.tokens has" in self.refused(*arguments(root, tmp_path / "run", data__shards=shards))

    def test_other_text_at_a_resume(self, root, quiet, tmp_path):
        """Of a run of an older version, which kept no digests: the checkpoint knows how often it met each word."""
        run = shutil.copytree(quiet.run, tmp_path / "run")
        shutil.rmtree(checkpoint.folder_of(run, 12))
        shards = toy.make_shards(tmp_path / "again", seed=9)
        record = json.loads((run / "config.json").read_text())
        del record["inputs"]
        (run / "config.json").write_text(json.dumps(record))
        message = self.refused(*arguments(root, run, data__shards=shards, resume="auto"))
        assert "is not the text that the run" in message

    def test_zero_without_torchrun(self, root, tmp_path):
        message = self.refused(*arguments(root, tmp_path / "run", engine__zero_stage=2))
        assert "torchrun" in message

    def test_cuda_where_there_is_none(self, root, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        message = self.refused(*arguments(root, tmp_path / "run", engine__device="cuda"))
        assert "wants a GPU" in message

    def test_flash_attn_on_a_cpu(self, root, tmp_path):
        run = arguments(root, tmp_path / "run", engine__attention="flash-attn", engine__device="cpu")
        assert "flash-attn wants bf16 or fp16 on CUDA, got torch.float32 on cpu" in self.refused(*run)

    def test_a_full_disk_leaves_the_run_as_it_was(self, root, tmp_path):
        """A file size limit of 64 kB stops the checkpoint of update 5: said in one line, no half a checkpoint."""

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))

        words = [*launch.command(*arguments(root, tmp_path / "run")), "--log.to", "none"]
        done = subprocess.run(words, capture_output=True, text=True, env=launch.ENVIRONMENT, preexec_fn=limit)
        assert done.returncode == 1
        assert "cannot write the checkpoint" in done.stderr
        assert "free" in done.stderr
        assert not list((tmp_path / "run/checkpoints").iterdir())


IN_A_NOTEBOOK = """
import signal, sys
from fastdistil import pretrain
from fastdistil.run.command import STOP_SIGNALS
before = [signal.getsignal(number) for number in STOP_SIGNALS]
assert pretrain.main(sys.argv[1:]) == 0
assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
"""


def test_in_a_notebook_signal_handlers_are_put_back(root, tmp_path):
    _, *words = arguments(root, tmp_path / "run", optim__duration=2)
    done = subprocess.run([sys.executable, "-c", IN_A_NOTEBOOK, *words, "--log.to", "none"], env=launch.ENVIRONMENT)
    assert done.returncode == 0


def syncs(root, out, updates):
    """How often each line brought a tensor's number to the host in a run that logs, validates and saves at its end."""
    seldom = {f"log__{name}": 1000 for name in ("every", "validate_every", "checkpoint_every")}
    changes = seldom | {"optim__duration": updates, "data__num_workers": 1, "student__num_layers": 1}
    _, *words = arguments(root, out, **changes)
    done = forked.run("tests.workers.sync_worker", *words)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SYNCS "))
    return json.loads(line.removeprefix("SYNCS "))


def test_no_update_makes_the_host_wait(root, tmp_path):
    few, many = (syncs(root, tmp_path / str(count), count) for count in (2, 4))
    assert few.keys() == many.keys()
    more = {line: many[line] - few[line] for line in many if many[line] != few[line]}
    assert more == {}
