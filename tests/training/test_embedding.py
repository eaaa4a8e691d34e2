"""Terms of embeddings against transformers in fp64, and what a run without a head builds, runs, keeps and refuses."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastdistil.kernels import linear_distill
from fastdistil.model import functions
from fastdistil.model.sentence import Pooling
from fastdistil.run import checkpoint
from fastdistil.run.config import LossConfig
from fastdistil.run.files import read_json
from fastdistil.training.objective import Objective
from tests.support import authors, forked, launch, runs
from tests.support.launch import options
from tests.support.toy import MAX_LENGTH, VOCABULARY
from tests.support.updates import CPU, imitated_layers, make_batches, make_student, make_teacher, one_update
from tests.workers import engine_worker

MEAN = Pooling(mode="mean", normalise=True, max_length=None)
LONG = replace(MEAN, normalise=False)
CLS = Pooling(mode="cls", normalise=True, max_length=None)
EMBEDDING = LossConfig(kd=0.0, mlm=0.0, cosine=0.0, embedding=3.0)
SIMILARITY = replace(EMBEDDING, embedding=0.0, similarity=3.0)
ALL = replace(EMBEDDING, cosine=0.5, hidden=2.0, similarity=1.5)
TERMS = ("cosine", "hidden", "embedding", "similarity", "mlm")


def reference(root, name: str, micro_batches: int, config: LossConfig, pooling: Pooling):
    """(unweighted terms, their weighted sum and its gradient), sequence by sequence in fp64."""
    _, batches = make_batches(root, micro_batches, CPU)
    teacher, student = authors.load(root / "teacher"), authors.load(root / name)
    projection = make_student(root, name, CPU, loss=config).projection
    matrix = None if projection is None else projection.weight.detach().double().requires_grad_()
    sums: dict[str, list[torch.Tensor]] = {term: [] for term in TERMS}
    real = masked = num_sequences = 0

    def embedding(states_LD: torch.Tensor) -> torch.Tensor:
        return states_LD.mean(0) if pooling.mode == "mean" else states_LD[0]

    def distance(pairs) -> torch.Tensor:
        return torch.stack([1 - F.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean(0).sum()

    for batch in batches:
        embeddings = []
        for ids, labels in authors.sequences([batch]):
            with torch.no_grad():
                examples = authors.layer_outputs(teacher, teacher(input_ids=ids, output_hidden_states=True))
            output = student(input_ids=ids, output_hidden_states=True)
            mine = [h if matrix is None else h @ matrix.T for h in authors.layer_outputs(student, output)]
            last, layers = (mine[-1], examples[-1]), imitated_layers(root)
            sums["mlm"].append(F.cross_entropy(output.logits[0], labels, ignore_index=-100, reduction="sum"))
            if config.cosine or config.hidden:  # else the widths may differ
                sums["cosine"].append(distance([last]))
                sums["hidden"].append(distance([(h, examples[i]) for h, i in zip(mine, layers, strict=True)]))
            embeddings.append([embedding(states) for states in last])
            real, masked = real + len(labels), masked + int((labels >= 0).sum())
        for pair in embeddings if config.embedding else ():
            if config.embedding_distance == "l2":
                e, f = (x / x.norm() if pooling.normalise else x for x in pair)
                sums["embedding"].append((e - f).square().sum())
            else:
                sums["embedding"].append(1 - F.cosine_similarity(*pair, dim=0))
        for i, (e, f) in enumerate(embeddings):
            others = embeddings[:i] + embeddings[i + 1 :]
            errors = [(F.cosine_similarity(e, x, dim=0) - F.cosine_similarity(f, y, dim=0)) ** 2 for x, y in others]
            sums["similarity"].append(torch.stack(errors).mean())
        num_sequences += len(embeddings)
    number = {"mlm": masked, "embedding": num_sequences, "similarity": num_sequences}
    terms = {term: torch.stack(parts).sum() / number.get(term, real) for term, parts in sums.items() if parts}
    loss = torch.stack([getattr(config, term) * value for term, value in terms.items()]).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    if matrix is not None and matrix.grad is not None:
        gradients["projection.weight"] = matrix.grad
    return {term: value.item() for term, value in terms.items()}, loss.item(), gradients


CASES = {
    "embedding": ("same", EMBEDDING, MEAN),
    "embedding by cls": ("same", EMBEDDING, CLS),
    "embedding, l2": ("same", replace(EMBEDDING, embedding_distance="l2"), LONG),
    "embedding, l2 of length 1": ("same", replace(EMBEDDING, embedding_distance="l2"), CLS),
    "similarity": ("same", SIMILARITY, MEAN),
    "similarity of another width": ("narrow", replace(SIMILARITY, mlm=1.0), MEAN),
    "projected hidden": ("narrow", replace(EMBEDDING, embedding=0.0, hidden=3.0), MEAN),
    "projected cosine": ("narrow", replace(EMBEDDING, embedding=0.0, cosine=3.0, mlm=1.0), MEAN),
    "projected, l2": ("narrow", replace(EMBEDDING, embedding_distance="l2"), LONG),
    "projected, all there is": ("narrow", replace(ALL, mlm=1.0), MEAN),
}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("name", "config", "pooling"), CASES.values(), ids=list(CASES))
def test_terms_and_gradients_equal_the_reference(of_each, name, config, pooling, micro_batches):
    losses, gradients = one_update(of_each, name, micro_batches, config, pooling=pooling)
    terms, loss, exact = reference(of_each, name, micro_batches, config, pooling)
    assert losses["loss"] == pytest.approx(loss, rel=1e-5)
    for term in TERMS:
        assert (term in losses) == bool(getattr(config, term))
        if term in losses:
            assert losses[term] == pytest.approx(terms[term], rel=1e-5)
            assert losses[term] > 1e-3
    assert ("projection.weight" in exact) == (name == "narrow" and config.similarity != 3.0)
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_engine_gives_the_gradient_of_one_process(of_each, ranks):
    """Three micro-batches, so that one of two ranks has an empty one."""
    stages = (0, 1, 2, 3)
    losses, exact = one_update(of_each, "narrow", 3, ALL, pooling=MEAN)
    results, *_ = forked.call(engine_worker.gradients, of_each, "narrow", "fp32", stages, 3, ALL, MEAN, ranks=ranks)
    for stage in stages:
        found, gradients = results[stage]
        assert found.keys() == losses.keys() == {"loss", *TERMS} - {"mlm"}
        assert found == pytest.approx(losses, rel=1e-5), stage
        assert exact["projection.weight"].any()
        error, where = authors.worst_relative_error(gradients, {n: g for n, g in exact.items() if g.any()})
        assert error < 1e-4, (stage, where)


# --- products of a vocabulary


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (ALL, ""),
        (replace(ALL, mlm=1.0), "transform M, logits M"),
        (LossConfig(mlm=0.0), "transform N, transform N, distill N"),
        (LossConfig(), "transform N, transform N, distill N"),
    ],
    ids=["embed", "mlm", "kd", "distilbert"],
)
def test_products_of_the_vocabulary_run_where_a_term_asks(folder, monkeypatch, loss, wanted):
    """By how many rows: all N, or the M masked ones; the first transform of kd is the teacher's."""
    called: list[str] = []
    _, (batch,) = make_batches(folder, 1, CPU)
    rows = {len(batch.input_ids): "N", len(batch.masked_rows): "M"}

    def count(module: Any, function: str, what: str, argument: int) -> None:
        real = getattr(module, function)

        def counted(*args: Any, **more: Any) -> Any:
            called.append(f"{what} {rows[len(args[argument])]}")
            return real(*args, **more)

        monkeypatch.setattr(module, function, counted)

    count(functions, "head_transform", "transform", 1)
    count(functions, "linear_map", "logits", 0)
    count(linear_distill, "forward", "distill", 0)
    student, teacher = make_student(folder, "same", CPU, loss=loss), make_teacher(folder, CPU, loss=loss)
    part, _ = Objective(student, loss, MEAN)(batch, teacher(batch))
    part.backward()
    assert ", ".join(called) == wanted
    assert (student.head is None) == (not wanted)


# --- whole runs


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A folder of sentence-transformers with an encoder of the toy vocabulary: mean, length 1, 48 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    root = tmp_path_factory.mktemp("encoder")
    (root / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    load: Any = getattr(transformers, "BertTokenizerFast")  # noqa: B009  pyright does not see it
    tokenizer = load(vocab=str(root / "vocab.txt"))
    tokenizer.save_pretrained(root / "bare")
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "bare")
    parts = [
        modules.Transformer(str(root / "bare"), max_seq_length=MAX_LENGTH),
        modules.Pooling(32, pooling_mode="mean"),
        modules.Normalize(),
    ]
    SentenceTransformer(modules=parts, device="cpu").save(str(root / "model"))
    return root / "model"


def words(root: Path, teacher: Path, out: Path, **changes: object) -> list[str]:
    """Module, recipe and options of a run of 4 updates, with dropout."""
    usual: dict[str, object] = {
        "data__shards": root / "shards",
        "teacher__path": teacher,
        "out": out,
        "batch__unit": "sequences",
        "optim__duration": 4,
        "log__every": 1,
        "log__validate_every": 2,
        "log__checkpoint_every": 2,
        "student__dropout": 0.1,
        "student__attention_dropout": 0.1,
        "engine__threads": 1,
    }
    return ["fastdistil.pretrain", "embed", *runs.SHORT, *options(**usual | changes)]


IN: dict[str, dict[str, object]] = {"fp32": {}, "bf16": {"engine__precision": "bf16"}}


@pytest.fixture(scope="module")
def straight(root, encoder, tmp_path_factory):
    """Runs in one go by their precision; that in fp32 is profiled, which changes no number."""
    out = tmp_path_factory.mktemp("straight")
    given = {name: words(root, encoder, out / name, **changes) for name, changes in IN.items()}
    given["fp32"] += ["--profile", "2:3"]
    return {name: runs.Done(out / name, forked.run(*given[name]).stdout) for name in IN}


def test_what_a_run_says_and_leaves(straight):
    run, printed = straight["fp32"]
    for line in (
        "teacher: 39,584 parameters (4 layers, 32 wide)",
        "student: 22,432 parameters (2 layers, 32 wide) from layers 0 3 of",
        "embeddings: mean of the last hidden states, scaled to length 1, of texts of up to 48 tokens",
    ):
        assert line in printed
    assert "masked LM" not in printed
    lines = runs.metrics_of(run)
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(line["hidden"] + line["embedding"])
        assert not {"kd", "mlm", "agreement", "accuracy"} & line.keys()
    first, last = (line for line in lines if line["split"] == "validation")
    assert last["loss"] < first["loss"]
    tensors = runs.tensors_of(run, 4)
    assert tensors
    assert not [name for name in tensors if "head" in name]
    record = read_json(run / "config.json")
    assert record["pooling"] == {"mode": "mean", "normalise": True, "max_length": 48}
    assert (record["student"]["mlm_head"], record["teacher"]["mlm_head"]) == (False, False)
    parts = read_json(run / "profile" / "table.json")["parts"]
    assert {"teacher", "loss", "backward"} <= parts.keys()


@pytest.mark.parametrize(("precision", "changes"), IN.items())
def test_two_and_two_updates_are_four_bit_for_bit(root, encoder, straight, tmp_path, precision, changes):
    done, run = straight[precision].run, tmp_path / "run"
    stopped_after_two(done, run)
    forked.run(*words(root, encoder, run, **changes, resume="auto"))
    assert runs.exact_metrics(run) == runs.exact_metrics(done)
    runs.same_ends(run, done)


def stopped_after_two(done: Path, run: Path) -> None:
    """A copy of a run as it was after its second update."""
    shutil.copytree(done, run)
    shutil.rmtree(checkpoint.folder_of(run, 4))
    (run / "status.json").unlink()


def test_another_number_of_ranks_goes_on(root, encoder, straight, tmp_path):
    """3 micro-batches on 2 ranks with ZeRO-2: one has an empty one."""
    done, run = straight["fp32"].run, tmp_path / "run"
    stopped_after_two(done, run)
    forked.run(*words(root, encoder, run, engine__zero_stage=2, resume="auto"), ranks=2)
    for line, other in zip(runs.metrics_of(run), runs.metrics_of(done), strict=True):
        for name in ("loss", "hidden", "embedding"):
            assert line[name] == pytest.approx(other[name], rel=1e-5)


def test_an_update_is_replayed(straight):
    run = straight["fp32"].run
    (third,) = [line for line in runs.metrics_of(run) if line["split"] == "train" and line["update"] == 3]
    done = forked.run("fastdistil.replay", run, "--update", 3, "--checkpoint", 2)
    parts = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert sum(parts) == pytest.approx(third["loss"], rel=1e-5)
    assert "0 of 3 micro-batches" in done.stdout


def test_a_teacher_on_a_rank_of_its_own_gives_the_same_numbers(root, encoder, tmp_path):
    """Embeddings need its last hidden states alone, and so does a projected cosine."""
    sizes = {"init": "random", "num_layers": 1, "hidden_size": 24, "num_heads": 3}
    asked = {"loss__hidden": 0, "loss__cosine": 1, "loss__similarity": 1, "optim__duration": 2, "engine__zero_stage": 0}
    asked |= {f"student__{name}": value for name, value in sizes.items()}
    forked.run(*words(root, encoder, tmp_path / "here", **asked))
    forked.run(*words(root, encoder, tmp_path / "apart", **asked, teacher__ranks=1), ranks=2)
    assert runs.exact_metrics(tmp_path / "apart") == runs.exact_metrics(tmp_path / "here")
    assert "projection.weight" in runs.tensors_of(tmp_path / "here", 2)


def test_a_dry_run_counts_no_vocabulary(root, encoder, tmp_path):
    done = forked.run(*words(root, encoder, tmp_path / "run"), "--dry-run", "--world-size", 2)
    assert "22,432 parameters (2 layers, 32 wide)" in done.stdout
    assert "mean of the last hidden states, scaled to length 1" in done.stdout
    assert not (tmp_path / "run").exists()


def test_without_kd_a_teacher_needs_no_head(root, encoder, tmp_path):
    """mlm beside it is of the student's own head, which begins anew."""
    given = words(root, encoder, tmp_path / "run", loss__mlm=1, masking__fraction=0.15, optim__duration=2)
    done = forked.run(*given)
    assert "teacher: masked LM" not in done.stdout
    line = runs.metrics_of(tmp_path / "run")[-1]
    assert {"mlm", "hidden", "embedding", "accuracy"} <= line.keys()
    assert "head.dense.weight" in runs.tensors_of(tmp_path / "run", 2)


def test_a_run_of_an_older_version_keeps_the_head_that_no_term_wanted(root, tmp_path):
    """Its checkpoints have one, and its teacher's digest is of a model with one."""
    weightless = {"loss__kd": 0, "loss__mlm": 0, "optim__duration": 2, "log__checkpoint_every": 1}
    run = tmp_path / "run"
    forked.run(*runs.arguments(root, run, loss__kd=1, loss__mlm=1, optim__duration=2, log__checkpoint_every=1))
    record = read_json(run / "config.json")
    record["config"]["loss"] |= {"kd": 0.0, "mlm": 0.0}
    for model in ("student", "teacher"):
        del record[model]["mlm_head"], record[model]["embedding_size"]
    (run / "config.json").write_text(json.dumps(record))
    shutil.rmtree(checkpoint.folder_of(run, 2))
    (run / "status.json").unlink()
    forked.run(*runs.arguments(root, run, **weightless, resume="auto"))
    assert {"loss", "cosine"} <= runs.metrics_of(run)[-1].keys()
    before, after = (runs.tensors_of(run, update)["head.bias"] for update in (1, 2))
    assert before.shape == after.shape
    forked.run("fastdistil.export", run, "--out", tmp_path / "student")


# --- mistakes

IN_ONE_PROCESS = """
import json, sys
from fastdistil import pretrain
for words in json.loads(sys.argv[1]):
    status = pretrain.main(words)
    print(f"status {status}, torch {'torch' in sys.modules}", file=sys.stderr)
"""


def test_what_is_refused_before_torch_is_imported(root, encoder, tmp_path):
    def spoilt(name: str, file: str, **changes: object) -> Path:
        copy = shutil.copytree(encoder, tmp_path / name)
        record = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(record | changes))
        return copy

    silent = shutil.copytree(encoder, tmp_path / "silent")
    (silent / "modules.json").unlink()
    other = shutil.copytree(encoder, tmp_path / "other")
    tokens = other / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"w17"', '"v17"'))
    narrow: dict[str, Any] = {
        "student__init": "random",
        "student__num_layers": 1,
        "student__hidden_size": 24,
        "student__num_heads": 3,
    }
    hidden: dict[str, Any] = {"loss__hidden": 1, "loss__embedding": 0}
    mistakes: dict[str, tuple[Path, dict[str, Any]]] = {
        f"--loss.embedding reads the embeddings of --teacher.path {silent}, which does not say how": (silent, {}),
        "a tokenizer with hash": (other, {}),
        "use --student.projection, --loss.hidden 0, or the teacher's width": (encoder, narrow | hidden),
        "--masking.fraction 0 leaves nothing to predict, and --loss.mlm 1,": (encoder, {"loss__mlm": 1}),
        "--masking.fraction 0 leaves nothing to predict, and --loss.kd 1,": (encoder, {"loss__kd": 1}),
        "imitates a teacher (--loss.hidden 1, --loss.embedding 1) and --teacher.path is missing: give a Hugging Face "
        "folder, or": (Path("None"), {}),
        "wanted the pooling mode mean or cls, one of them, got max": (
            spoilt("max", "1_Pooling/config.json", pooling_mode="max"),
            {},
        ),
    }
    commands = []
    for teacher, changes in mistakes.values():
        given = words(root, teacher, tmp_path / "run", **changes)[1:]
        commands.append([*given, "--student.no-projection"] if changes == narrow | hidden else given)
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=launch.ENVIRONMENT,
        cwd=tmp_path,
    )
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(mistakes), done.stderr
    for message, line, status in zip(mistakes, said[::2], said[1::2], strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert status == "status 2, torch False"
    assert not (tmp_path / "run").exists()


def test_a_pooling_that_is_given_is_taken_for_one_that_is_not_known(root, encoder, tmp_path):
    """Without modules.json, and where what it names is not there."""
    for name in ("modules.json", "1_Pooling"):
        copy = shutil.copytree(encoder, tmp_path / name)
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
        done = forked.run(*words(root, copy, tmp_path / "run", teacher__pooling="cls"), "--dry-run")
        assert "last hidden state of the first token, scaled to length 1" in done.stdout


# --- as a user does it


def test_text_to_a_sentence_encoder(encoder, tmp_path):
    """prepare, pretrain embed, export, with no option but the folders."""
    from sentence_transformers import SentenceTransformer

    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(96)}" for _ in range(draw.randrange(5, 40))) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    given = [tmp_path / "text.txt", "--tokenizer", encoder, "--out", tmp_path / "shards"]
    assert "sequences of up to 48 tokens" in forked.run("fastdistil.prepare", *given).stderr
    given = ["--data.shards", tmp_path / "shards", "--teacher.path", encoder, "--out", tmp_path / "run"]
    forked.run("fastdistil.pretrain", "embed", *given)
    forked.run("fastdistil.export", tmp_path / "run", "--out", tmp_path / "student")
    teacher, student = (SentenceTransformer(str(path), device="cpu") for path in (encoder, tmp_path / "student"))
    assert student.max_seq_length == teacher.max_seq_length == 48
    of_teacher, of_student = (torch.as_tensor(x.encode(texts[:20])) for x in (teacher, student))
    assert of_student.norm(dim=1).tolist() == pytest.approx([1.0] * 20, abs=1e-5)
    validation = runs.metrics_of(tmp_path / "run")[-1]["embedding"]
    assert (1 - (of_teacher * of_student).sum(1)).mean().item() == pytest.approx(validation, rel=0.5)
