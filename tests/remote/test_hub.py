"""Names on the hub and what is pushed to it: the real huggingface_hub against the hub of tests/support/hub.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support import launch, runs
from tests.support.hub import TOKEN, serve

SHOW = """
import sys
from fastdistil.remote import hub
for name in sys.argv[1:]:
    try:
        folder = hub.folder_of("--teacher.path", name)
        print(folder, *sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    except ValueError as error:
        print(error)
"""


@pytest.fixture
def hub(root):
    """A hub with a BERT, lab/teacher."""
    with serve() as found:
        found.add("lab/teacher", root / "teacher")
        yield found


def look(hub, home: Path, *names: str, token: bool = False, cwd: Path | None = None, **more: str) -> list[str]:
    """What becomes of each name, in a process with its cache in `home`."""
    environment = launch.ENVIRONMENT | hub.environment(home, token=token) | more
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *names], env=environment, capture_output=True, text=True, check=True, cwd=cwd
    )
    return done.stdout.splitlines()


def test_what_is_fetched(hub, tmp_path):
    teacher = hub.repositories["models/lab/teacher"]
    wanted = sorted(teacher.files.keys() | {"README.md", "1_Pooling/config.json"})
    first = teacher.main
    more = {"README.md": b"# A", "1_Pooling/config.json": b"{}", "pytorch_model.bin": b"a pickle", "x.py": b"code"}
    teacher.commit(teacher.files | more | {"onnx/model.safetensors": b"another", "tf_model.h5": b"another"})
    (line,) = look(hub, tmp_path / "home", "lab/teacher")
    folder, *names = line.split()
    assert names == wanted
    assert folder == str(tmp_path / "home/hub/models--lab--teacher/snapshots" / teacher.main)
    fetched = len(hub.fetched(""))
    assert look(hub, tmp_path / "home", "lab/teacher@main") == [line]
    assert len(hub.fetched("")) == fetched  # all of it was in the cache
    assert look(hub, tmp_path / "home", f"lab/teacher@{first}")[0].split()[0].endswith(first)

    # A folder of the cache of another machine is that name at that commit.
    there = f"/elsewhere/.cache/huggingface/hub/models--lab--teacher/snapshots/{teacher.main}"
    assert look(hub, tmp_path / "elsewhere", there)[0].split()[1:] == wanted

    # Without the network the cache is enough, and a cache without a part of it is not.
    assert look(hub, tmp_path / "home", "lab/teacher", HF_HUB_OFFLINE="1") == [line]
    Path(folder, "model.safetensors").unlink()
    (said,) = look(hub, tmp_path / "home", "lab/teacher", HF_HUB_OFFLINE="1")
    assert "(the hub cannot be reached, and not all of it is in the cache: " in said


def test_pickles_only_where_there_are_no_safetensors(hub, tmp_path):
    teacher = hub.repositories["models/lab/teacher"]
    files = {name: data for name, data in teacher.files.items() if name != "model.safetensors"}
    dense = {"2_Dense/config.json": b"{}", "2_Dense/model.safetensors": b"a", "2_Dense/pytorch_model.bin": b"a"}
    teacher.commit(files | dense | {"pytorch_model.bin": b"a pickle"})
    (line,) = look(hub, tmp_path, "lab/teacher")
    assert [name for name in line.split() if ".bin" in name or "safetensors" in name] == [
        "2_Dense/model.safetensors",
        "pytorch_model.bin",
    ]


def test_a_folder_of_that_name_wins(hub, tmp_path):
    (tmp_path / "lab" / "teacher").mkdir(parents=True)
    assert look(hub, tmp_path / "home", "lab/teacher", cwd=tmp_path) == ["lab/teacher"]
    assert not hub.requests


def test_what_the_hub_does_not_give(hub, tmp_path):
    hub.add("lab/secret", tmp_path).private = True
    hub.add("lab/gated", Path(__file__).parent).gated = True
    hub.repositories["models/lab/gated"].commit({"config.json": b"{}"})
    said = look(hub, tmp_path, "lab/teached", "lab/teacher@v9", "lab/secret", "lab/gated", "/a/b")
    begin = "--teacher.path {}: there is no such folder, and the hub does not give a model of that name "
    assert said == [
        begin.format("lab/teached") + "(not found, or private): correct it, or `hf auth login`",
        begin.format("lab/teacher@v9") + "(it has no such revision): name a branch, a tag or a commit after the @",
        begin.format("lab/secret") + "(not found, or private): correct it, or `hf auth login`",
        begin.format("lab/gated") + "(its owner asks for an agreement): give it on its page, and `hf auth login`",
        "/a/b",
    ]
    (offline,) = look(hub, tmp_path, "lab/other", HF_HUB_OFFLINE="1")
    assert offline.startswith(begin.format("lab/other") + "(the hub cannot be reached")
    hub.broken = None
    (away,) = look(hub, tmp_path, "lab/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert "(the hub cannot be reached, and not all of it is in the cache: " in away


def test_processes_at_once_fetch_it_once(hub, tmp_path):
    command = [sys.executable, "-c", SHOW, "lab/teacher"]
    environment = launch.ENVIRONMENT | hub.environment(tmp_path)
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = {process.communicate()[0] for process in started}
    assert len(lines) == 1
    assert len(hub.fetched("safetensors")) == 1


def test_from_names_to_a_pushed_student(hub, root, tmp_path):
    """prepare, pretrain, evaluate's door and export, each with a name; the student is read back by its own name."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = (" ".join(f"w{i + j}" for j in range(20)) for i in range(70))
    (corpus / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * 4)
    hub.add("lab/corpus", corpus, kind="datasets")
    card = b"---\nlicense: mit\nlanguage: en\n---\n# The teacher\n"
    teacher = hub.repositories["models/lab/teacher"]
    teacher.commit(teacher.files | {"README.md": card})
    environment = hub.environment(tmp_path / "home", token=True)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return launch.run(*words, environment=environment, cwd=tmp_path)

    run("fastdistil.prepare", "hf:lab/corpus", "--tokenizer", "lab/teacher", "--out", "shards", "--max-length", 32)
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    assert meta["preparation"]["tokenizer"] == {"name": "lab/teacher"}
    changes = {"data__shards": "shards", "teacher__path": "lab/teacher", "optim__duration": 1, "log__validate_every": 1}
    run(*runs.arguments(root, Path("run"), **changes))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert f"models--lab--teacher/snapshots/{teacher.main}" in record["config"]["teacher"]["path"]
    done = run("fastdistil.export", "run", "--out", "student", "--push", "me/student", "--private")
    assert f"{hub.endpoint}/me/student" in done.stdout.splitlines()

    pushed = hub.repositories["models/me/student"]
    assert pushed.private
    local = {p.name: p.read_bytes() for p in (tmp_path / "student").iterdir()}
    assert pushed.files == local | {".gitattributes": b""}
    assert ModelCard(local["README.md"].decode()).data.to_dict() == {
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "base_model": "lab/teacher",
        "base_model_relation": "finetune",
        "datasets": ["lab/corpus"],
        "tags": ["fastdistil", "knowledge-distillation"],
    }
    done = run("fastdistil.efficiency", "lab/teacher", "me/student", "--rounds", 1, "--length", 8, "--batch-size", 2)
    names = [line.split()[0] for line in done.stdout.splitlines() if line.split()]
    assert {"teacher", "student"} <= {*names}


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["--push", "me/new"], False, "and nobody has logged in: `hf auth login`"),
        (["--push", "me/student"], True, "me/student exists on the hub: choose another, or replace its files by --ov"),
        (["--push", "lab2/new"], True, "the login is that of me, which may push to me lab alone"),
        (["--push", "new"], True, "--push wants USER/NAME or ORGANISATION/NAME, got new"),
        (["--private"], True, "--private has no effect without --push"),
    ],
)
def test_no_right_to_push_is_said_before_the_work(hub, quiet, tmp_path, words, token, message):
    hub.repositories["models/me/student"] = hub.repositories["models/lab/teacher"]
    environment = hub.environment(tmp_path / "home", token=token)
    out = tmp_path / "student"
    done = launch.run("fastdistil.export", quiet.run, "--out", out, *words, environment=environment, ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_push_that_fails_leaves_the_folder(hub, quiet, tmp_path):
    import re

    hub.broken = re.compile("POST /api/models/lab/new/commit")
    environment = hub.environment(tmp_path / "home", token=True)
    words = ("fastdistil.export", quiet.run, "--out", tmp_path / "student", "--push", "lab/new")
    done = launch.run(*words, environment=environment, ok=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"`hf upload lab/new {tmp_path / 'student'}` tries it again")
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert TOKEN not in done.stdout + done.stderr

    # The same again, once the hub is well.
    hub.broken = None
    done = launch.run(*words, "--overwrite", environment=environment)
    assert hub.repositories["models/lab/new"].files["model.safetensors"]
