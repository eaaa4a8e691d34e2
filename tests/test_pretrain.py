"""The main job as a user runs it: commands in subprocesses, one process and torchrun, stopped, resumed, misused."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import launch, toy
from tests.support.launch import options

COMMON = options(
    batch__size=24,
    batch__token_budget=256,
    optim__duration=12,
    optim__unit="updates",
    data__validation_sequences=40,
    data__num_workers=0,
    log__every=4,
    log__validate_every=6,
    log__checkpoint_every=5,
    log__keep_checkpoints=9,
    engine__bucket_elements=10_000,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    toy.make_teacher(folder / "teacher", toy.make_shards(folder / "shards"))
    return folder


def arguments(root: Path, out: Path, **extra: object) -> list[str]:
    given = options(data__shards=root / "shards", teacher__path=root / "teacher", out=out)
    return ["fastdistil.pretrain", "distilbert", *given, *COMMON, *options(**extra)]


def losses(run: Path) -> list[tuple]:
    """Every line of metrics.jsonl with exact numbers, speeds left out."""
    timing = {"tokens_per_s", "mfu"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple((k, v.hex() if isinstance(v, float) else v) for k, v in line.items() if k not in timing) for line in lines
    ]


def tensors(run: Path, update: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"update-{update:08d}"
    return load_file(folder / "weights.safetensors") | load_file(folder / "optimizer.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def quiet(root):
    """12 updates in one go, one process."""
    done = launch.run(*arguments(root, root / "quiet"))
    return root / "quiet", done.stdout


def test_what_a_run_says_and_leaves(root, quiet):
    run, printed = quiet
    for line in (
        "teacher: 40,805 parameters (4 layers, 32 wide)",
        "student: 23,653 parameters (2 layers, 32 wide) from layers 0 3 of",
        "text: 12,248 tokens in 400 sequences, 40 held out",
        "12 updates of 3 micro-batches of 256 tokens",
        "(matrix product of 1024 in float32 on",
        "attention: fused (student), sdpa (teacher)",
        "update 12/12  loss",
        "ETA 0:00:00",
    ):
        assert line in printed
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records if r["split"] == "train"] == list(range(1, 13))
    assert [r["update"] for r in records if r["split"] == "validation"] == [6, 12]
    assert {"loss", "kd", "mlm", "cosine", "agreement"} <= records[-1].keys()
    first, last = records[0], [r for r in records if r["split"] == "train"][-1]
    assert last["loss"] < first["loss"]
    assert first["lr"] == 0  # the authors' schedule
    config = json.loads((run / "config.json").read_text())
    assert config["layers"] == [0, 3]
    assert (run / "tokenizer/vocab.txt").is_file()
    assert list((run / "tensorboard").iterdir())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "update-00000005", "update-00000010", "update-00000012",
    ]  # fmt: skip


def test_workers_change_nothing(root, quiet, tmp_path):
    launch.run(*arguments(root, tmp_path / "run", data__num_workers=2))
    assert losses(tmp_path / "run") == losses(quiet[0])
    assert same(tensors(tmp_path / "run", 12), tensors(quiet[0], 12))


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (None, {}),
        (2, {"engine__zero_stage": 2}),
        # three ranks divide neither the update nor the parameters
        (3, {"engine__zero_stage": 3, "engine__precision": "bf16", "batch__size": 40}),
    ],
    ids=["plain", "zero-2-of-2-ranks", "zero-3-of-3-ranks-bf16"],
)
def test_stopped_by_a_signal_and_resumed_is_bitwise_the_run_that_never_stopped(root, tmp_path, ranks, extra, quiet):
    """Stopped mid-epoch at an update that is no multiple of anything; dropout on; metrics, weights and moments bitwise."""
    straight = quiet[0]
    if ranks:
        straight = tmp_path / "straight"
        launch.run(*arguments(root, straight, **extra), ranks=ranks)
    run = tmp_path / "run"
    extra = extra | {"log__every": 1}
    command = launch.command(*arguments(root, run, **extra), ranks=ranks)
    process = launch.start_until("update 7/12", command)
    process.send_signal(signal.SIGTERM)
    rest = launch.rest_of(process)
    assert "--resume auto goes on" in rest
    stopped = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["update"]
    assert 7 <= stopped < 12
    assert (run / "checkpoints" / f"update-{stopped:08d}").is_dir()
    done = launch.run(*arguments(root, run, resume="auto", **extra), ranks=ranks)
    assert f"resuming after update {stopped} of 12" in done.stdout
    assert losses(run) == losses(straight)
    assert same(tensors(run, 12), tensors(straight, 12))
    again = launch.run(*arguments(root, run, resume="auto", **extra), ranks=ranks)  # finished: nothing to do
    assert "resuming after update 12 of 12" in again.stdout
    assert losses(run) == losses(straight)


def test_killed_and_resumed_on_another_number_of_ranks(root, quiet, tmp_path):
    """SIGKILL after the checkpoint of update 5; on with two ranks and ZeRO-3: the same sequences, losses within 1e-5."""
    run = tmp_path / "run"
    command = launch.command(*arguments(root, run, log__every=1))
    process = launch.start_until("update 7/12", command)
    process.kill()
    process.wait(timeout=60)
    launch.run(*arguments(root, run, resume="auto", engine__zero_stage=3), ranks=2)
    got, wanted = losses(run), losses(quiet[0])
    assert [[x for x in a if x[0] in ("split", "update", "tokens", "masked")] for a in got] == [
        [x for x in a if x[0] in ("split", "update", "tokens", "masked")] for a in wanted
    ]
    for a, b in zip(got, wanted, strict=True):
        for (name, x), (_, y) in zip(a, b, strict=True):
            if name in ("loss", "kd", "mlm", "cosine"):
                assert float.fromhex(x) == pytest.approx(float.fromhex(y), rel=1e-5)


def test_text_to_hugging_face(root, tmp_path):
    """prepare -> mlm (a teacher) -> distil -> export -> transformers, by the commands of the README, on text of our own."""
    text = tmp_path / "text.txt"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "looked",
        "at",
        "some",
        "birds",
        "in",
        "trees",
        "of",
        "green",
    ]
    text.write_text("\n".join(" ".join(words[(i * k) % 15] for k in range(5, 40)) for i in range(1, 300)))
    launch.run("fastdistil.prepare", text, "--tokenizer", "train:200", "--max-length", 64, "--out", tmp_path / "shards")
    common = [*COMMON, "--data.shards", tmp_path / "shards"]
    size = options(student__num_layers=2, student__hidden_size=32, student__num_heads=2, student__token_types=2)
    launch.run("fastdistil.pretrain", "mlm", "--out", tmp_path / "teacher-run", *size, *common)
    launch.run("fastdistil.export", tmp_path / "teacher-run", "--out", tmp_path / "teacher")
    launch.run(
        "fastdistil.pretrain", "quickstart", "--out", tmp_path / "run", "--teacher.path", tmp_path / "teacher", *common
    )
    launch.run("fastdistil.export", tmp_path / "run", "--out", tmp_path / "student")
    import transformers

    model, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert type(model).__name__ == "DistilBertForMaskedLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    logits = model(**tokenizer("the cat sat on a [MASK]", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "teacher")).__name__ == "BertForMaskedLM"


class TestMistakes:
    """One message, exit status 2, and nothing written."""

    def refused(self, *args: object, ranks: int | None = None) -> str:
        done = launch.run(*args, ok=False, ranks=ranks)
        assert done.returncode == (2 if ranks is None else 1)  # torchrun has its own
        assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed")[0]
        return done.stderr

    def test_a_teacher_without_a_head(self, root, tmp_path):
        from safetensors.torch import save_file

        from fastdistil.model.weights import load_masked_lm

        headless = shutil.copytree(root / "teacher", tmp_path / "headless")
        state = load_file(headless / "model.safetensors")
        save_file(
            {k: v for k, v in state.items() if not k.startswith("cls.")},
            headless / "model.safetensors",
            metadata={"format": "pt"},
        )
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
        assert "shard-00000.tokens was changed" in message
        assert message.count("error: ") == 1 or message.count("was changed") == 1

    def test_a_truncated_shard(self, root, tmp_path):
        shards = shutil.copytree(root / "shards", tmp_path / "shards")
        path = shards / "shard-00001.tokens"
        path.write_bytes(path.read_bytes()[:-2])
        assert "shard-00001.tokens has" in self.refused(*arguments(root, tmp_path / "run", data__shards=shards))

    def test_other_text_at_a_resume(self, root, tmp_path):
        launch.run(*arguments(root, tmp_path / "run"))
        shards = tmp_path / "again"
        shutil.copytree(root / "shards", shards)
        shutil.rmtree(shards)
        toy.make_shards(shards, seed=9)
        config = json.loads((tmp_path / "run/config.json").read_text())
        config["config"]["data"]["shards"] = str(shards)
        (tmp_path / "run/config.json").write_text(json.dumps(config))
        message = self.refused(*arguments(root, tmp_path / "run", data__shards=shards, resume="auto"))
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
        script = f"ulimit -f 64; trap '' XFSZ; exec {' '.join(launch.command(*arguments(root, tmp_path / 'run', log__tensorboard=''))[:-1])} --log.no-tensorboard"
        script = script.replace("--log.tensorboard", "").replace("  ", " ")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=launch.ENVIRONMENT)
        assert done.returncode == 1
        assert "cannot write the checkpoint" in done.stderr
        assert "free" in done.stderr
        assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_second_signal_ends_at_once(root, tmp_path):
    command = launch.command(*arguments(root, tmp_path / "run", log__every=1, optim__duration=5000))
    process = launch.start_until("update 2/5000", command)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    launch.rest_of(process)
    assert process.returncode in (0, -signal.SIGTERM)  # 0 where the update ended between the two
    assert time.monotonic() - begin < 30


def syncs(root: Path, out: Path, updates: int) -> dict[str, int]:
    """How often each line brought a tensor's number to the host in a run that logs, validates and saves at its end alone."""
    seldom = {f"log__{name}": 1000 for name in ("every", "validate_every", "checkpoint_every")}
    words = arguments(root, out, **seldom, optim__duration=updates, data__num_workers=1, student__num_layers=1)[1:]  # fmt: skip
    done = launch.run(launch.ROOT / "tests" / "workers" / "sync_worker.py", *words, script=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SYNCS "))
    return json.loads(line.removeprefix("SYNCS "))


def test_no_update_makes_the_host_wait(root, tmp_path):
    few, many = (syncs(root, tmp_path / str(count), count) for count in (2, 4))
    assert few.keys() == many.keys()
    more = {line: many[line] - few[line] for line in many if many[line] != few[line]}
    # kernels/linear_distill.py reads the loss's gradient where that is on the CPU already, to save a pass over the weights
    assert more == {"engine.py: loss.backward()": 2 * 3}  # of three micro-batches each
