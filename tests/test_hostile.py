"""Files that want to run code, leave their folder or learn secrets: every payload as every file that the program reads."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdistil import architecture, checkpoint, run_folder, shards, tokenizer, weights
from fastdistil.tasks import TASKS, Examples, Settings, TaskData
from tests import launch, toy
from tests.launch import options
from tests.test_checkpoint import save


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


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
    found["safetensors and a pickle"] = len(header).to_bytes(8, "little") + header + found["pickle of exec"]  # fmt: skip
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
    automatic = {"auto_map": {n: "modeling_x.X" for n in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoTokenizer")}}  # fmt: skip
    found["JSON that names code"] = json.dumps(automatic | {"model_type": "x"}).encode()
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

    from fastdistil import finetune

    data = TaskData(TASKS["sst2"], Examples((["a"],), [0.0]), Examples((["a"],), [0.0]), ("0", "1"))
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    finetune.load_model(str(folder), data, Settings(), seed=1)


def load_shards(folder: Path) -> None:
    shards.Shards(folder)
    tokenizer.read_vocabulary(folder / "tokenizer")


def load_checkpoint(folder: Path) -> None:
    checkpoint.newest(folder)
    checkpoint.load_weights(folder, 10)


def error_of(read: Callable[[Path], object], folder: Path) -> Exception | None:
    try:
        read(folder)
    except Exception as error:
        return error
    return None


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    toy.make_shards(root / "shards", num_sequences=40)
    toy.make_teacher(root / "teacher", root / "shards")
    save(root / "run", 10)
    (root / "run" / "config.json").write_text("{}")
    return root


READERS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "checkpoint": ("run", load_checkpoint, ()),
    "run": ("run", run_folder.read, ()),
    "teacher": ("teacher", load_teacher, ("pytorch_model.bin", "modeling_x.py", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")),
    "evaluation": ("teacher", load_for_evaluation, ("pytorch_model.bin", "modeling_x.py", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")),
    "shards": ("shards", load_shards, ("tokenizer/tokenizer.json",)),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_no_payload_in_any_file_runs(good, tmp_path, reader):
    part, read, more = READERS[reader]
    marker = tmp_path / "executed"
    everything = payloads(marker)
    assert len(everything) >= 12
    readings, refused = 0, 0
    for name in [*all_files(good / part), *more]:
        for what, content in everything.items():
            folder = tmp_path / "folder"
            shutil.copytree(good / part, folder)
            (folder / name).write_bytes(content)
            if name == "pytorch_model.bin":  # it is looked at only where there is nothing better
                (folder / "model.safetensors").unlink()
            error = error_of(read, folder)
            if error is not None:
                refused += 1
                # evaluation reads by transformers, whose errors are its own
                ours = isinstance(error, ValueError | OSError) and len(str(error)) > 20
                assert ours or reader == "evaluation", (name, what, repr(error))
            readings += 1
            assert not marker.exists(), (name, what)
            shutil.rmtree(folder)
    assert readings == len(everything) * (len(all_files(good / part)) + len(more))
    assert refused > readings / 3  # it was read, not overlooked
    assert not (tmp_path.parent / "escaped").exists()


def test_the_payloads_work(tmp_path):
    """Or the test above would show nothing."""
    for number, what in enumerate(("pickle of os.system", "pickle of exec", "pickle of open")):
        marker = tmp_path / str(number)
        pickle.loads(payloads(marker)[what])
        assert marker.exists()


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd", "a/../../x"])
def test_names_in_an_index_cannot_leave_the_folder(good, tmp_path, name):
    folder = tmp_path / "teacher"
    shutil.copytree(good / "teacher", folder)
    shutil.copytree(good / "teacher", tmp_path / "a")
    (folder / "model.safetensors").unlink()
    keys = weights_of(good / "teacher")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
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


def test_secrets_reach_no_artefact_and_nothing_but_this_machine_is_called(good, tmp_path):
    """A run and its export with secrets in the environment and an audit of sockets, which runs in every Python process of them."""
    secret = "s3cr3t-5f1d7a"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(tmp_path / 'calls')!r}, 'a').write(repr(args[1] if event == 'socket.connect' else args[0]) + chr(10))\n"
        "sys.addaudithook(hook)\n"
    )
    environment = {"PYTHONPATH": f"{site}{os.pathsep}{launch.ROOT}"}
    environment |= dict.fromkeys(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD"), secret)  # fmt: skip
    run = tmp_path / "run"
    given = options(
        data__shards=good / "shards", teacher__path=good / "teacher", out=run, student__num_layers=2, optim__duration=2,
        optim__unit="updates", batch__size=512, batch__token_budget=256, data__num_workers=0, data__validation_sequences=4,
    )  # fmt: skip
    printed = []
    for words, ranks in (
        (["fastdistil.pretrain", "quickstart", *given], 2),
        (["fastdistil.export", run, "--out", tmp_path / "export"], None),
    ):
        done = launch.run(*words, ranks=ranks, environment=environment)
        printed += [done.stdout, done.stderr]
    assert secret not in "".join(printed)
    files = [p for folder in (run, tmp_path / "export") for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 8
    assert not [p for p in files if secret.encode() in p.read_bytes()]
    assert "auto_map" not in (tmp_path / "export" / "config.json").read_text()
    called = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    local = ("127.0.0.1", "localhost", "::1", "/", "'\\x00", os.uname().nodename)
    assert not [c for c in called if not any(word in c for word in local)], called


def test_deepspeed_cannot_unpickle(tmp_path):
    file = tmp_path / "x.pt"
    marker = tmp_path / "executed"
    torch.save({"a": Calls(os.system, f"touch {marker}")}, file)
    code = (
        "import sys, torch\nfrom fastdistil import engine\nengine._import_deepspeed(torch.device('cpu'))\n"
        "try:\n    torch.load(sys.argv[1], weights_only=False)\nexcept Exception as e:\n    print('refused', type(e).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=launch.ENVIRONMENT)  # fmt: skip
    assert "refused" in done.stdout, done.stderr
    assert not marker.exists()
