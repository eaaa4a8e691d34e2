"""Files that want to run code, leave their folder or learn secrets: each payload as each file that a command reads."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastdistil import report
from fastdistil.data import shards, sources, tokenizer
from fastdistil.evaluation import finetune, squad, tasks
from fastdistil.evaluation.tasks import TASKS, Examples, Settings, TaskData
from fastdistil.export import write_hugging_face_folder
from fastdistil.model import architecture, headers, weights
from fastdistil.run import checkpoint, folder
from fastdistil.run.config import Config, to_json
from tests.support import launch, toy
from tests.support.checkpoints import save
from tests.support.launch import options


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
AUTO_MAP = {"auto_map": dict.fromkeys(AUTO_CLASSES, "modeling_x.X")}


def payloads(marker: Path) -> dict[str, bytes]:
    """Files that make the marker when something in them is run."""
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": Calls(os.system, shell),
        "exec": Calls(exec, python),
        "eval": Calls(eval, python),
        "open": Calls(open, str(marker), "w"),
        "subprocess": Calls(subprocess.call, ["touch", str(marker)]),
        "mkdir": Calls(os.mkdir, str(marker)),
    }
    found = {f"pickle of {name}": pickle.dumps(call) for name, call in calls.items()}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": calls["os.system"]}, buffer, _use_new_zipfile_serialization=zipped)
        found[f"torch.save, zip {zipped}"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.array([calls["exec"]], dtype=object), allow_pickle=True)
    found["npy of objects"] = buffer.getvalue()
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    found["safetensors and a pickle"] = len(header).to_bytes(8, "little") + header + found["pickle of exec"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("data.pkl", found["pickle of exec"])
    found["zip"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("../escaped")
        archive.addfile(entry, io.BytesIO())
    found["tar"] = buffer.getvalue()
    found["gzip"] = gzip.compress(found["pickle of exec"])
    found["yaml"] = f"!!python/object/apply:os.system ['{shell}']\n".encode()
    found["python"] = f"import os\nos.system({shell!r})\n".encode()
    found["JSON that names code"] = json.dumps(AUTO_MAP | {"model_type": "x"}).encode()
    on_hub = {"model_type": "bert", "auto_map": {"AutoConfig": "evil/x--modeling_x.X"}}
    found["JSON that names code on the hub"] = json.dumps(on_hub).encode()
    found["jinja"] = f"{{{{ cycler.__init__.__globals__.os.system({shell!r}) }}}}".encode()
    found["JSON of another type"] = b'[{"__reduce__": "os.system"}]'
    return found


def all_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def load_teacher(folder: Path) -> None:
    weights.load_masked_lm(folder, need_head=True)
    tokenizer.read_vocabulary(folder)
    architecture.read_architecture(folder)


def load_for_evaluation(folder: Path) -> None:
    import transformers

    data = TaskData(TASKS["sst2"], Examples((["a"],), [0.0]), Examples((["a"],), [0.0]), ("0", "1"))
    finetune.pretrained(transformers.AutoTokenizer, folder)
    finetune.load_model(str(folder), data, Settings(), seed=1)


def load_shards(folder: Path) -> None:
    shards.Shards(folder)
    tokenizer.load(folder / "tokenizer")


def load_forged_shards(folder: Path) -> None:
    """Whoever plants a file can write its hash, too."""
    with suppress(ValueError, KeyError, TypeError):  # meta.json itself was planted
        meta = json.loads((folder / "meta.json").read_bytes())
        meta["counts_sha256"] = sha256(folder / "counts.npy")
        for shard in meta["shards"]:
            for kind in ("tokens", "offsets"):
                shard[f"{kind}_sha256"] = sha256(folder / f"{shard['name']}.{kind}")
        (folder / "meta.json").write_text(json.dumps(meta))
    load_shards(folder)


def load_checkpoint(folder: Path) -> None:
    checkpoint.newest(folder)
    checkpoint.load_weights(folder, 10)


def load_forged_checkpoint(folder: Path) -> None:
    inside = folder / "checkpoints" / "update-00000010"
    with suppress(ValueError, KeyError, TypeError):  # the manifest itself was planted
        manifest = json.loads((inside / "manifest.json").read_bytes())
        for name, entry in manifest["files"].items():
            entry |= {"bytes": (inside / name).stat().st_size, "sha256": sha256(inside / name)}
        (inside / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(folder)


def load_run(run: Path) -> None:
    folder.read(run)
    report.read("run", run)


def load_task(folder: Path) -> None:
    for name in ("train.tsv", "train.json", "train.parquet"):
        if (folder / name).exists():
            tasks.rows_of([folder / name])
    squad._read(folder / "squad.json")


def load_text(folder: Path) -> None:
    for source in sources.resolve((str(folder),)):
        list(source.documents())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def error_of(read: Callable[[Path], object], folder: Path) -> Exception | None:
    try:
        read(folder)
    except Exception as error:
        return error
    return None


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """One folder of each kind, all good."""
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("hostile")
    toy.make_shards(root / "shards", num_sequences=40)
    toy.make_teacher(root / "teacher", root / "shards", num_layers=1)
    save(root / "run", 10)
    record = {"config": to_json(Config()), "student": {}}
    (root / "run" / "config.json").write_text(json.dumps(record))
    (root / "run" / "metrics.jsonl").write_text('{"update": 1, "split": "train"}')
    (root / "run" / "evaluation.json").write_text("{}")
    for name in ("task", "text"):
        (root / name).mkdir()
    (root / "task" / "train.tsv").write_text("sentence\tlabel\na\t1\n")
    (root / "task" / "train.json").write_text('{"sentence": "a", "label": 1}')
    (root / "task" / "squad.json").write_text('{"data": []}')
    table = pyarrow.table({"text": ["a b"], "sentence": ["a"], "label": [1]})
    parquet.write_table(table, root / "task" / "train.parquet")
    parquet.write_table(table, root / "text" / "c.parquet")
    (root / "text" / "a.jsonl").write_text('{"text": "a"}')
    (root / "text" / "b.txt.gz").write_bytes(gzip.compress(b"a b c"))
    return root


# what is read -> (folder, reader, files that could lie there too)
OF_A_MODEL = (
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "modeling_x.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "adapter_config.json",
)
READERS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "checkpoint": ("run", load_checkpoint, ()),
    "forged checkpoint": ("run", load_forged_checkpoint, ()),
    "run": ("run", load_run, ("profile/table.json",)),
    "teacher": ("teacher", load_teacher, OF_A_MODEL),
    "headers": ("teacher", headers.read_headers, OF_A_MODEL[:2]),
    "evaluation": ("teacher", load_for_evaluation, OF_A_MODEL),
    "shards": ("shards", load_shards, ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")),
    "forged shards": ("shards", load_forged_shards, ()),
    "task": ("task", load_task, ()),
    "text": ("text", load_text, ()),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_payload_in_any_file_runs(good, tmp_path, reader, monkeypatch):
    from datasets import config as datasets_config

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    part, read, more = READERS[reader]
    marker = tmp_path / "executed"
    everything = payloads(marker)
    assert len(everything) >= 12
    names = sorted({*all_files(good / part), *more})
    readings, refused = 0, 0
    for name in names:
        for what, content in everything.items():
            folder = tmp_path / "folder"
            shutil.copytree(good / part, folder)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            if name in ("pytorch_model.bin", "model.safetensors.index.json"):
                (folder / "model.safetensors").unlink()  # only then they are looked at
            error = error_of(read, folder)
            if error is not None:
                refused += 1
                ours = isinstance(error, ValueError | OSError) and len(str(error)) > 20
                assert ours, (name, what, repr(error))
            readings += 1
            assert not marker.exists(), (name, what)
            shutil.rmtree(folder)
    assert readings == len(everything) * len(names)
    assert refused > readings / 4  # they were read, not overlooked
    assert not (tmp_path.parent / "escaped").exists()


def test_the_payloads_work(tmp_path):
    """Or the test above would show nothing."""
    for number, what in enumerate(("pickle of os.system", "pickle of exec", "pickle of open")):
        marker = tmp_path / str(number)
        pickle.loads(payloads(marker)[what])
        assert marker.exists()
    with zipfile.ZipFile(io.BytesIO(payloads(tmp_path / "zip")["torch.save, zip True"])) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        pickle.loads(archive.read(name))
    assert (tmp_path / "zip").exists()


def hostile_model(good: Path, folder: Path, marker: Path) -> Path:
    """A whole model that brings code and names it wherever transformers looks for a name."""
    shutil.copytree(good / "teacher", folder)
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (folder / name).write_bytes(payloads(marker)["python"] + b"class X: pass\n")
    (folder / "chat_template.jinja").write_bytes(payloads(marker)["jinja"])
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        record = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(record | AUTO_MAP))
    return folder


def test_a_model_that_brings_code_is_read_without_it(good, tmp_path, monkeypatch):
    folder = hostile_model(good, tmp_path / "model", tmp_path / "executed")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asked whether to run the code"))
    load_teacher(folder)
    load_for_evaluation(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_refused(good, tmp_path, key):
    """transformers would fetch and run it, even for a folder on this machine."""
    shutil.copytree(good / "teacher", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: "someone/attention"}))
    with pytest.raises(ValueError, match=r"model: config.json asks for the attention 'someone/att"):
        load_for_evaluation(tmp_path / "model")


def test_an_export_names_no_code(good, tmp_path):
    folder = hostile_model(good, tmp_path / "model", tmp_path / "executed")
    model = weights.load_masked_lm(folder, need_head=True)
    (tmp_path / "out").mkdir()
    write_hugging_face_folder(model.state_dict(), model.architecture, folder, tmp_path / "out")
    written = all_files(tmp_path / "out")
    words = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert written == ["config.json", "model.safetensors", *words]
    for name in written[:1] + words:
        assert "auto_map" not in (tmp_path / "out" / name).read_text()


def test_a_data_set_folder_runs_nothing(tmp_path, monkeypatch):
    """A script, and pickles in an archive, which WebDataset once unpickled."""
    from datasets import config as datasets_config

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, marker = tmp_path / "set", tmp_path / "executed"
    folder.mkdir()
    everything = payloads(marker)
    with tarfile.open(folder / "train.tar", "w") as archive:
        contents = {
            "a.txt": b"a text",
            "a.pyd": everything["pickle of exec"],
            "a.pickle": everything["pickle of exec"],
            "a.pth": everything["torch.save, zip True"],
        }
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

    def read(folder: Path) -> None:
        (source,) = sources.resolve((f"hf:{folder}",), sources.Options(text_field="txt"))
        list(source.documents())

    error = error_of(read, folder)
    assert error is None or isinstance(error, ValueError), repr(error)
    (folder / "set.py").write_bytes(everything["python"])
    error_of(read, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd", "a/../../x"])
def test_names_in_an_index_cannot_leave_the_folder(good, tmp_path, name):
    folder = tmp_path / "teacher"
    shutil.copytree(good / "teacher", folder)
    shutil.copytree(good / "teacher", tmp_path / "a")
    (folder / "model.safetensors").unlink()
    keys = weights_of(good / "teacher")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files beside itself"):
        weights.load_masked_lm(folder, need_head=True)


def weights_of(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_shard_names_cannot_leave_the_folder(good, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(good / "shards", folder)
    text = (folder / "meta.json").read_text()
    for name in ("../shards/shard-00000", "/tmp/x", "a/b"):
        (folder / "meta.json").write_text(text.replace("shard-00000", name))
        with pytest.raises(ValueError, match=r"meta\.json"):
            shards.Shards(folder)


SECRET = "s3cr3t-5f1d7a"
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "GITHUB_TOKEN",
    "MY_PASSWORD",
)


AUDIT = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = args[0] if event == "socket.getaddrinfo" else args[1]
        open(CALLS, "a").write(f"{event} {address!r}\\n")
sys.addaudithook(hook)
open(CALLS, "a").write("audited\\n")
"""


@pytest.fixture(scope="module")
def commands(good, tmp_path_factory) -> tuple[Path, str]:
    """(folder, what was printed) of prepare, pretrain under torchrun, export and evaluate on local files.

    There are secrets in the environment. FOLDER/calls has what Python asked of sockets, by an audit hook in every
    process; FOLDER/strace, where that is installed, what the system was asked by Python and C++ alike.
    """
    root = tmp_path_factory.mktemp("commands")
    artefacts = root / "artefacts"
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(f"CALLS = {str(root / 'calls')!r}\n{AUDIT}")
    environment = launch.ENVIRONMENT | dict.fromkeys(SECRETS, SECRET)
    environment |= {"PYTHONPATH": f"{root / 'site'}{os.pathsep}{launch.ROOT}", "HF_HOME": str(root / "cache")}
    del environment["HF_HUB_OFFLINE"]  # nothing but the names given keeps it from the hub
    documents = (f"w{i} w{i + 1} w{i + 2} w3 w4 w5 w6 w7 w8 w9 w10 w11 w12" for i in range(80))
    (root / "text.txt").write_text("\n".join(documents))
    (root / "task").mkdir()
    for split in ("train", "validation"):
        lines = [f"w{i} w2\t{i % 2}" for i in range(8)]
        (root / "task" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    shards, run, exported, teacher = artefacts / "shards", artefacts / "run", artefacts / "export", good / "teacher"
    prepared = options(tokenizer=teacher, out=shards, workers=1, max_length=32)
    trained = options(
        data__shards=shards,
        teacher__path=teacher,
        out=run,
        student__num_layers=1,
        optim__duration=2,
        optim__unit="updates",
        batch__size=512,
        batch__token_budget=256,
        data__num_workers=0,
        data__validation_sequences=4,
        engine__zero_stage=1,  # with all of DeepSpeed
    )
    tuned = options(data=root / "task", seeds=1, epochs=1, device="cpu", save=artefacts / "tuned")
    printed = []
    for words, ranks in (
        (["prepare", root / "text.txt", *prepared], None),
        (["pretrain", "quickstart", *trained], 1),
        (["export", run, "--out", exported], None),
        (["evaluate", exported, "--task", "sst2", *tuned], None),
    ):
        command = launch.command(f"fastdistil.{words[0]}", *words[1:], ranks=ranks)
        if shutil.which("strace"):
            trace = ["-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg", "-e", "signal=none"]
            command = ["strace", *trace, "-A", "-o", str(root / "strace"), *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        printed += [done.stdout, done.stderr]
    return root, "".join(printed)


def test_secrets_reach_no_artefact(commands):
    root, printed = commands
    assert SECRET not in printed
    files = [p for p in (root / "artefacts").rglob("*") if p.is_file()]
    assert {"config.json", "metrics.jsonl", "README.md", "evaluation.json"} <= {p.name for p in files}
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]


def test_python_calls_nobody_but_this_machine(commands):
    root, _ = commands
    called = (root / "calls").read_text().splitlines()
    assert called.count("audited") > 4  # each command, and torchrun's and prepare's workers
    own = ("audited", "'127.0.0.1'", "'localhost'", "'::1'", repr(socket.gethostname()), " '/")
    foreign = [call for call in called if not any(name in call for name in own)]
    assert not foreign


@pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed: what C++ asks of sockets was not seen"
)
def test_nothing_calls_another_machine(commands):
    root, _ = commands
    lines = (root / "strace").read_text().splitlines()
    # port 53: torch's TCPStore asks the name server for the name of 127.0.0.1
    called = [line for line in lines if "sa_family=AF_INET" in line and "htons(53)" not in line]
    assert called  # torchrun's rendezvous
    own = ["127.", "::ffff:127.", *own_addresses()]
    foreign = [line for line in called if not any(f'"{address}' in line for address in own)]
    assert not foreign


def own_addresses() -> list[str]:
    return [a.address for found in psutil.net_if_addrs().values() for a in found]


UNPICKLE = """
import sys, torch
from fastdistil.training import engine
engine._import_deepspeed(torch.device("cpu"))
try:
    torch.load(sys.argv[1], weights_only=False)
except Exception as error:
    print("refused", type(error).__name__)
"""


def test_deepspeed_cannot_unpickle(tmp_path):
    file, marker = tmp_path / "x.pt", tmp_path / "executed"
    torch.save({"a": Calls(os.system, f"touch {marker}")}, file)
    words = [sys.executable, "-c", UNPICKLE, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, env=launch.ENVIRONMENT)
    assert "refused" in done.stdout, done.stderr
    assert not marker.exists()
